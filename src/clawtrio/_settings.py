"""Settings: what the operator decides, from the environment, ``.env`` and defaults."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import attrs
import tzlocal
from dotenv import dotenv_values

from ._errors import SettingsError

KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
DAY: Final = 86400.0

_PREFIX: Final = "CLAWTRIO_"
_SIZE: Final = re.compile(r"(\d+)\s*([kmg]?)(?:i?b)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB}
# Whole words: of MAX_OUTPUT_TOKENS an agent may know.
_SECRET: Final = re.compile(
    r"(^|_)((API)?KEY|TOKEN|SECRET|PASSWO?R?D|CREDENTIALS?)($|_)", re.IGNORECASE
)
# What changes how programs are loaded, what is ours to say, and ways to the host's
# services.
_RESERVED: Final = re.compile(
    r"(LD|GLIBC|CLAWTRIO)_\w*|HOME|TZ|DBUS_SESSION_BUS_ADDRESS|XDG_RUNTIME_DIR"
)

#: Above it is no file, and no number that a runtime takes.
_LARGEST: Final = 2**63 - 1
#: The uid after it means "no change".
_LARGEST_UID: Final = 2**32 - 2

Field: TypeAlias = "attrs.Attribute[Any]"


def _size(value: object) -> int:
    """Take bytes as a number, or as text with K, M or G."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(match[1]) * _UNITS[match[2].lower()]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"must be bytes, or a number with K, M or G, not {value!r}")


def _number(value: object) -> float:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            if not math.isnan(number):
                return number
    raise ValueError(f"must be a number, not {value!r}")


def _whole(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,19}", value.strip()):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"must be a whole number, not {value!r}")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value.strip().lower() in {"1", "true", "yes", "on"}:
            return True
        if value.strip().lower() in {"0", "false", "no", "off"}:
            return False
    raise ValueError(f"must be true or false, not {value!r}")


def _text(value: object) -> str:
    if isinstance(value, str) and value and value.isprintable():
        return value
    raise ValueError(f"must be printable text, not {value!r}")


def _image(value: object) -> str:
    # docker and podman would take it for an option of theirs.
    if (text := _text(value)).startswith("-"):
        raise ValueError(f"must be the name of an image, not {value!r}")
    return text


def _path(value: object, base: str = "") -> str:
    """Take a path; a relative one is in *base*, by default the current directory."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"must be a path, not {value!r}")  # noqa: TRY004 - one kind
    path = os.fspath(value)
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"must be a path, not {value!r}")
    try:
        return str(Path(base, Path(path).expanduser()).absolute())
    except RuntimeError as exc:
        raise ValueError(f"{exc}: {value!r}") from None


def _words(value: object) -> tuple[str, ...]:
    """Take an argv: a list of text, or a JSON array of it."""
    if isinstance(value, str):
        value = _from_json(value, 'a JSON array such as ["python3", "agent.py"]')
    # JSON may be text, which is a sequence of text, too.
    if isinstance(value, str) or not isinstance(value, Sequence):
        value = ()
    words = tuple(value)
    if words and all(map(_is_argument, words)) and words[0]:
        return words
    raise ValueError(f"must be a list of text, the program first, not {value!r}")


def _is_argument(value: object) -> bool:
    """Tell whether a process can be given this; JSON can spell half an emoji."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def _paths(value: object) -> tuple[str, ...]:
    words = _words(value)
    if not all(word.startswith("/") for word in words):
        raise ValueError(f"must be URL paths that begin with '/', not {value!r}")
    return words


def _variables(value: object) -> Mapping[str, str]:
    """Take environment variables: a mapping, or a JSON object."""
    if isinstance(value, str):
        value = _from_json(value, 'a JSON object such as {"NAME": "value"}')
    if not isinstance(value, Mapping):
        raise ValueError(f"must map names to values, not {value!r}")  # noqa: TRY004
    for name, text in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"{name!r} is not the name of an environment variable")
        if _SECRET.search(name):
            raise ValueError(f"{name} looks like a secret: it would reach the agent")
        if _RESERVED.fullmatch(name):
            raise ValueError(f"{name} is reserved: it is not for agent_env to set")
        if not _is_argument(text):
            raise ValueError(f"the value of {name} must be text")
    return dict(value)


def _from_json(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # The text is not quoted: it may be somebody's misplaced secret.
        raise ValueError(f"must be {what}") from None


def _zone(value: object) -> str:
    try:
        return ZoneInfo(_text(value)).key
    except (ZoneInfoNotFoundError, ValueError, OSError):
        problem = f"must be a time zone such as 'Europe/Berlin', not {value!r}"
        raise ValueError(problem) from None


def _local_zone() -> str:
    try:
        return _zone(tzlocal.get_localzone_name())
    except (ValueError, ZoneInfoNotFoundError):
        # A host without a (known) zone says what it says in UTC.
        return "UTC"


def _one_of(*choices: str) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}")

    return convert


def _field(
    convert: Callable[[object], object],
    *,
    default: Any = attrs.NOTHING,
    factory: Callable[[Settings], object] | None = None,
    low: float | None = None,
    above: float | None = None,
    high: int = _LARGEST,
    finite: bool = True,
    optional: bool = False,
    in_root: bool = False,
) -> Any:
    """Describe one setting: how it is read, its default and its bounds."""

    def converter(value: object, settings: Any, field: Field) -> object:
        if value is None and optional:
            return None
        try:
            converted = _path(value, settings.root) if in_root else convert(value)
            if isinstance(converted, int) and converted > high:
                # The value is not repeated: it may be very long.
                raise ValueError(f"must be at most {high}")  # noqa: TRY301 - as its like
            if isinstance(converted, (int, float)):
                _check_bounds(converted, low, above, finite=finite)
        except (ValueError, OverflowError) as exc:
            raise SettingsError(field.name, str(exc)) from None
        return converted

    if factory is not None:
        default = attrs.Factory(factory, takes_self=True)
    return attrs.field(
        default=default,
        converter=attrs.Converter(converter, takes_self=True, takes_field=True),
    )


def _shown(number: float) -> str:
    # Sizes are whole, and nobody reads 1.67772e+07 as 16 MiB.
    return f"{number}" if isinstance(number, int) else f"{number:g}"


def _check_bounds(
    value: float, low: float | None, above: float | None, *, finite: bool
) -> None:
    if low is not None and value < low:
        raise ValueError(f"must be at least {_shown(low)}, not {_shown(value)}")
    if above is not None and value <= above:
        raise ValueError(f"must be above {_shown(above)}, not {_shown(value)}")
    if finite and math.isinf(value):
        raise ValueError("must be finite")


@attrs.frozen(kw_only=True)
class Settings:
    """What an engine needs to know of its host and its operator's wishes.

    Attributes:
        root: The bot's directory.
        groups_dir: Where the groups' folders are; ``root/groups``. A relative path
            is in *root*.
        data_dir: What clawtrio keeps; ``root/data``. A relative path is in *root*.
        runtime: ``docker``, ``podman``, ``bwrap``; ``auto`` takes bwrap only where
            neither docker nor podman is installed.
        image: The container image; bwrap has none.
        agent: The backend of our agent runner: ``claude``, or ``echo``, which works
            offline.
        agent_command: An argv to run in place of our agent, in the container.
        stdin: ``lifeline``: follow-ups come by stdin, whose end means that the host
            is gone. ``eof``: stdin ends after the input, follow-ups come as files;
            for NanoClaw's image.
        answer_timeout: Seconds of silence allowed while an answer is due, and after
            one; inf never ends it.
        idle_timeout: Seconds that an agent which waits is kept; inf keeps it.
        close_grace: Seconds an agent has to leave once it was told to.
        stop_grace: Seconds between SIGTERM and SIGKILL.
        drain_grace: Seconds of reading what a grandchild may still write.
        command_timeout: Seconds that a command of the runtime may take.
        max_frame_bytes: Largest frame accepted.
        max_log_bytes: What a run log keeps of each stream.
        max_concurrent: Runs at a time, for a dispatcher.
        memory: Bytes of memory for a container, swap included.
        cpus: Processors' worth of time for a container.
        pids: Processes and threads in a container.
        network: ``proxy``: containers reach the credential proxy, and nothing else.
            ``open``: also what the host reaches, and the host, but not each other.
        run_uid: The user that agents run as: by default the owner of *root*, or
            1000 where that is uid 0.
        min_free_bytes: Free disk space under which no run starts.
        assistant_name: What the agent is called.
        timezone: The groups' time zone, by its IANA name; the host's by default.
        allowlist_path: The file that says what additional mounts may be granted.
        log_retention: Seconds that run logs are kept; inf keeps them.
        log_text: Whether run logs hold prompts and outputs.
        partial_text: Whether agents send text while an answer grows.
        model: The model for the agent; None leaves the choice to it.
        agent_env: More environment variables for agents; never secrets, nor what is
            clawtrio's to set (``HOME``, ``TZ``, ``CLAWTRIO_*``) or changes how
            programs are loaded (``LD_*``, ``GLIBC_*``).
        writable_agent_runner: Whether each group has its own copy of the runner.
        proxy_host: An address of this host on which the proxy listens, with network
            ``open``, for engines whose containers are on another machine, or in a
            virtual one (Docker Desktop: 127.0.0.1).
        proxy_paths: API paths that agents may call, by GET, HEAD and POST; None is what
            the Claude CLI needs. Never OAuth, files, batches or administration.
        max_output_tokens: Budget of a run; None is no limit.
        max_requests: API requests of a run; None is no limit.

    Raises:
        SettingsError: If a value makes no sense; names the field.
    """

    root: str = _field(_path, default=".")
    groups_dir: str = _field(_path, default="groups", in_root=True)
    data_dir: str = _field(_path, default="data", in_root=True)
    runtime: Literal["auto", "docker", "podman", "bwrap"] = _field(
        _one_of("auto", "docker", "podman", "bwrap"), default="auto"
    )
    image: str = _field(_image, default="clawtrio-agent:latest")
    agent: Literal["claude", "echo"] = _field(
        _one_of("claude", "echo"), default="claude"
    )
    agent_command: tuple[str, ...] | None = _field(_words, default=None, optional=True)
    stdin: Literal["lifeline", "eof"] = _field(
        _one_of("lifeline", "eof"), default="lifeline"
    )
    answer_timeout: float = _field(_number, default=1800.0, above=0, finite=False)
    idle_timeout: float = _field(_number, default=1800.0, above=0, finite=False)
    close_grace: float = _field(_number, default=30.0, low=0)
    stop_grace: float = _field(_number, default=10.0, low=0)
    drain_grace: float = _field(_number, default=2.0, low=0)
    command_timeout: float = _field(_number, default=15.0, above=0)
    max_frame_bytes: int = _field(_size, default=16 * MIB, low=1)
    max_log_bytes: int = _field(_size, default=10 * MIB, low=1)
    max_concurrent: int = _field(_whole, default=5, low=1)
    memory: int = _field(_size, default="2g", low=16 * MIB)
    cpus: float = _field(_number, default=2.0, above=0)
    pids: int = _field(_whole, default=512, low=1)
    network: Literal["proxy", "open"] = _field(
        _one_of("proxy", "open"), default="proxy"
    )
    run_uid: int | None = _field(
        _whole, default=None, low=1, high=_LARGEST_UID, optional=True
    )
    min_free_bytes: int = _field(_size, default=GIB, low=0)
    assistant_name: str = _field(_text, default="Andy")
    timezone: str = _field(_zone, factory=lambda _: _local_zone())
    allowlist_path: str = _field(
        _path, default="~/.config/clawtrio/mount-allowlist.json"
    )
    log_retention: float = _field(_number, default=7 * DAY, above=0, finite=False)
    log_text: bool = _field(_flag, default=False)
    partial_text: bool = _field(_flag, default=False)
    model: str | None = _field(_text, default=None, optional=True)
    agent_env: Mapping[str, str] = _field(_variables, factory=lambda _: {})
    writable_agent_runner: bool = _field(_flag, default=False)
    proxy_host: str | None = _field(_text, default=None, optional=True)
    proxy_paths: tuple[str, ...] | None = _field(_paths, default=None, optional=True)
    max_output_tokens: int | None = _field(_whole, default=None, low=1, optional=True)
    max_requests: int | None = _field(_whole, default=None, low=1, optional=True)

    @classmethod
    def load(cls, root: str | os.PathLike[str] | None = None) -> Settings:
        """Read ``CLAWTRIO_<FIELD>`` from the environment, then ``root/.env``.

        Args:
            root: The bot's directory; by default ``CLAWTRIO_ROOT``, else the current
                directory.

        Raises:
            SettingsError: If a value makes no sense, or ``.env`` cannot be read.
        """
        try:
            place = _path(root or os.environ.get(_PREFIX + "ROOT") or Path.cwd())
        except ValueError as exc:
            raise SettingsError("root", str(exc)) from None
        dotenv = Path(place, ".env")
        try:
            lines = dotenv_values(dotenv, interpolate=False) if dotenv.exists() else {}
        except (OSError, UnicodeDecodeError) as exc:
            raise SettingsError("root", f"cannot read {dotenv}: {exc}") from exc
        found = {name: value for name, value in lines.items() if value is not None}
        # An empty variable is how a shell or a unit file unsets one.
        found.update({name: value for name, value in os.environ.items() if value})
        values: dict[str, Any] = {
            field.name: found[variable]
            for field in attrs.fields(cls)
            if found.get(variable := _PREFIX + field.name.upper())
        }
        return cls(**values | {"root": place})
