"""What no group is ever given, whatever the allowlist says.

A place that is closed takes with it all that is in it, and all that it is in: who is
given a directory is given what it holds. Paths are compared by their components, after
symlinks; and by device and inode, since a directory may be mounted at two places.
"""

from __future__ import annotations

import os
import pwd
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ._settings import Settings

#: As many symlinks as the kernel follows.
_MAX_LINKS: Final = 40

_SYSTEM: Final = ("/proc", "/sys", "/dev", "/run", "/var/run", "/etc", "/boot")
_SERVICES: Final = (
    *("/var/lib/docker", "/var/lib/containerd", "/var/lib/containers"),
    *("/var/lib/kubelet", "/var/lib/libvirt", "/var/spool/cron"),
    "/tmp/.X11-unix",  # noqa: S108 - to be kept out of
)
#: In a home directory.
_SECRETS: Final = (
    *(".config", ".ssh", ".gnupg", ".pki", ".local/share/keyrings", ".password-store"),
    *(".local/share/kwalletd", ".local/share/containers", ".local/share/docker"),
    *(".local/share/fish", ".local/share/atuin", ".local/share/gnome-keyring"),
    *(".aws", ".azure", ".gcloud", ".oci", ".kube", ".docker", ".terraform.d"),
    *(".mozilla", ".thunderbird", ".cargo", ".m2", ".gradle", ".electrum"),
)
#: Likewise; but in a bot's directory, if that is no home, they are the project's.
_PERSONAL: Final = (".var", "snap", ".claude", ".codex", ".gemini", ".cursor")
#: Environment variables that say where such things are instead; lists have colons.
_VARIABLES: Final = (
    *("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "SSH_AUTH_SOCK", "GNUPGHOME"),
    *("PASSWORD_STORE_DIR", "AWS_SHARED_CREDENTIALS_FILE", "AZURE_CONFIG_DIR"),
    *("CLOUDSDK_CONFIG", "GOOGLE_APPLICATION_CREDENTIALS", "KUBECONFIG"),
    *("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "CLAUDE_CONFIG_DIR"),
)
#: The same for sockets, as addresses: ``unix:///path`` or ``unix:path=/path,...``.
_ADDRESSES: Final = ("DOCKER_HOST", "CONTAINER_HOST", "DBUS_SESSION_BUS_ADDRESS")
_SOCKET: Final = re.compile(r"unix:(?://|path=)(/[^,;]+)")
#: In the bot's directory.
_ROOT_SECRETS: Final = (".env", ".git", "store", "data")
#: What is in these may be given, but for homes.
_WHOLES: Final = ("/", "/home", "/tmp", "/var/tmp")  # noqa: S108 - to be kept out of
_HOMES: Final = Path("/home")


def expand(path: str) -> str:
    """Put the home directory in the place of a leading ``~``."""
    if path == "~" or path.startswith("~/"):
        return os.path.expanduser(path)  # noqa: PTH111 - never another user's
    return path


def trail(path: str) -> Iterator[Path]:
    """Name every entry of a directory that is looked up on the way to *path*.

    Symlinks are among them, and what they lead through. The directory that an entry is
    in is named by where it really is.
    """
    place = Path("/")
    names = [*reversed(Path(path).parts)]
    links = 0
    while names:
        name = names.pop()
        if name == ".." or name.startswith("/"):
            place = place.parent if name == ".." else Path("/")
            continue
        entry = place / name
        yield entry
        target = _target(entry)
        if target is None:
            place = entry
            continue
        links += 1
        if links > _MAX_LINKS:
            return
        names += reversed(target.parts)


def _target(entry: Path) -> Path | None:
    try:
        return entry.readlink()
    except OSError:
        return None


class Zone:
    """Places out of bounds, with all that is in them and around them.

    Args:
        places: Why each of them is.
        wholes: The same for what is out of bounds itself, and around it, only.
    """

    def __init__(
        self,
        places: Mapping[str, str],
        wholes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._closed: dict[Path, str] = {}
        self._wholes: dict[Path, str] = {}
        for path, why in places.items():
            for name in _names(path):
                self._closed.setdefault(name, why)
        for path, why in [*wholes.items(), *places.items()]:
            for name in _names(path):
                if path in wholes:
                    self._wholes.setdefault(name, why)
                for parent in name.parents:
                    self._wholes.setdefault(parent, f"holds {name}, which {why}")

    def complaint(self, place: Path) -> str | None:
        """Say why *place*, the real path of a directory, is out of bounds, if it is."""
        inside = _Twins(self._closed)
        for outer in (place, *place.parents):
            if (twin := inside.find(outer)) is not None:
                return f"{twin} {self._closed[twin]}"
        if (twin := _Twins(self._wholes).find(place)) is not None:
            return f"{twin} {self._wholes[twin]}"
        return None


class _Twins:
    """Finds directories again, also where they are mounted at another place."""

    def __init__(self, places: Iterable[Path]) -> None:
        self._places = frozenset(places)
        self._twins = {_identity(place): place for place in places}

    def find(self, place: Path) -> Path | None:
        if place in self._places:
            return place
        identity = _identity(place)
        return None if identity is None else self._twins.get(identity)


def _identity(place: Path) -> tuple[int, int] | None:
    try:
        # Of a symlink itself: what it leads to may hold much that is open.
        status = place.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _names(path: str) -> Iterator[Path]:
    """Name a place by each symlink on the way to it, and by where it really is."""
    yield from (entry for entry in trail(path) if _target(entry) is not None)
    # POSIX lets two slashes at the beginning mean something else; Linux does not.
    yield Path("/" + os.path.realpath(path).lstrip("/"))


class Forbidden:
    """What no group is ever given; found out once, from settings and environment.

    Args:
        settings: Where clawtrio's own places are.
        environment: Where the user's sockets and secrets are.
        fixed: More places in which no group may write.

    Attributes:
        root_is_home: Whether the bot's directory is somebody's home, with all that
            people keep there.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        environment: Mapping[str, str] = os.environ,
        fixed: Iterable[str] = (),
    ) -> None:
        root, groups = settings.root, settings.groups_dir
        homes = _homes(settings)
        self.root_is_home = os.path.realpath(root) in map(os.path.realpath, homes)
        secrets = [
            f"{home}/{name}" for home in homes for name in (*_SECRETS, *_PERSONAL)
        ]
        # Its owner is whom agents run as, and need not be known to this host.
        secrets += [f"{root}/{name}" for name in _SECRETS]
        secrets += _from_environment(environment)
        private = {
            settings.data_dir: "is clawtrio's own",
            settings.allowlist_path: "says what may be mounted",
            **{f"{root}/{name}": "is the bot's own" for name in _ROOT_SECRETS},
            **dict.fromkeys(_SYSTEM, "is the system's"),
            **dict.fromkeys(_SERVICES, "belongs to a service"),
            **dict.fromkeys(secrets, "is where secrets are"),
        }
        self._private = Zone(private)
        self._never = Zone(
            {groups: "is where agents write", **private},
            {
                root: "is the bot's own",
                **dict.fromkeys(_WHOLES, "is too much"),
                **dict.fromkeys(homes, "is a home directory"),
            },
        )
        self._fixed = Zone(
            {
                root: "is the bot's own",
                **dict.fromkeys(_code(), "is what this Python runs"),
                **dict.fromkeys(fixed, "is what containers run"),
            }
        )
        # How many levels further down an agent can write.
        self._agents = [
            (Path(os.path.realpath(groups)), 1),
            (Path(os.path.realpath(settings.data_dir), "ipc"), 1),
            (Path(os.path.realpath(settings.data_dir), "sessions"), 2),
        ]

    def complaint(self, place: Path) -> str | None:
        """Say why nobody is given *place*, the real path of a directory, if so."""
        if place.parent == _HOMES:
            return f"{place} is a home directory"
        return self._never.complaint(place)

    def is_private(self, place: Path) -> bool:
        """Whether not even main sees *place*, which is in the bot's directory."""
        return self._private.complaint(place) is not None

    def write_complaint(self, place: Path) -> str | None:
        """Say why nobody may write in *place*, the real path of a directory, if so."""
        return self._fixed.complaint(place)

    def agent_may_replace(self, path: str, writable: Iterable[Path] = ()) -> bool:
        """Whether an agent could make *path* lead elsewhere, now or at another time.

        Args:
            path: An absolute path.
            writable: Directories, by their real paths, in which agents may write as
                well.
        """
        places = [*self._agents, *((place, 0) for place in writable)]
        return any(
            entry.is_relative_to(place) and len(entry.parts) - len(place.parts) > depth
            for entry in trail(path)
            for place, depth in places
        )


def _homes(settings: Settings) -> list[str]:
    """List the homes there are: ours, that of whom agents run as, all in /home."""
    homes = [expand("~"), "/root"]
    uids = [os.geteuid(), settings.run_uid]
    with suppress(OSError):
        uids.append(Path(settings.root).stat().st_uid)
    for uid in uids:
        with suppress(KeyError):
            homes += [pwd.getpwuid(uid).pw_dir] if uid is not None else []
    with suppress(OSError):
        homes += [str(home) for home in _HOMES.iterdir()]
    return [home for home in homes if home.strip("/") and Path(home).is_dir()]


def _from_environment(environment: Mapping[str, str]) -> Iterator[str]:
    for name in _VARIABLES:
        for path in environment.get(name, "").split(os.pathsep):
            if path.startswith("/"):
                yield path
    for name in _ADDRESSES:
        yield from _SOCKET.findall(environment.get(name, ""))


def _code() -> Iterator[str]:
    """Name where this Python, and what it imports, comes from."""
    yield from (sys.prefix, sys.base_prefix, str(Path(__file__).parent))
    # Not where "python -m" was called, which may be the home: if the bot is there, then
    # that is the root.
    here = _identity(Path())
    for path in map(Path, sys.path):
        if path.is_absolute() and _identity(path) != here:
            yield str(path)
