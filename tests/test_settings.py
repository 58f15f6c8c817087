"""What the operator decides, and how it is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import tzlocal
from hypothesis import example, given, strategies as st

from clawtrio import Settings, SettingsError

FIELDS = [field.name for field in attrs.fields(Settings)]
MIB = 2**20
GIB = 2**30


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Stand in an empty root, with no variable of ours set."""
    for name in list(os.environ):
        if name.startswith("CLAWTRIO_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    tzlocal.reload_localzone()
    yield tmp_path
    monkeypatch.undo()
    tzlocal.reload_localzone()


def test_defaults(root: Path) -> None:
    """Without a word from the operator, the settings are those of the contract."""
    settings = Settings.load()

    assert settings == Settings(
        root=str(root),
        groups_dir=str(root / "groups"),
        data_dir=str(root / "data"),
        runtime="auto",
        image="clawtrio-agent:latest",
        agent="claude",
        agent_command=None,
        stdin="lifeline",
        answer_timeout=1800.0,
        idle_timeout=1800.0,
        close_grace=30.0,
        stop_grace=10.0,
        drain_grace=2.0,
        command_timeout=15.0,
        max_frame_bytes=16 * MIB,
        max_log_bytes=10 * MIB,
        max_concurrent=5,
        memory=2 * GIB,
        cpus=2.0,
        pids=512,
        network="proxy",
        run_uid=None,
        min_free_bytes=GIB,
        assistant_name="Andy",
        timezone=settings.timezone,
        allowlist_path=str(Path.home() / ".config/clawtrio/mount-allowlist.json"),
        log_retention=7 * 86400.0,
        log_text=False,
        partial_text=False,
        model=None,
        agent_env={},
        writable_agent_runner=False,
        proxy_host=None,
        proxy_paths=None,
        max_output_tokens=None,
        max_requests=None,
    )


# By field: what may stand in the environment or .env, and what it means.
GOOD: list[tuple[str, str, Any]] = [
    ("groups_dir", "/srv/groups", "/srv/groups"),
    ("data_dir", "/srv/data", "/srv/data"),
    ("runtime", "bwrap", "bwrap"),
    ("runtime", "podman", "podman"),
    ("image", "registry.example:5000/agent:2", "registry.example:5000/agent:2"),
    ("agent", "echo", "echo"),
    ("agent", "claude", "claude"),
    (
        "agent_command",
        '["python3", "-u", "a b.py", ""]',
        ("python3", "-u", "a b.py", ""),
    ),
    ("stdin", "eof", "eof"),
    ("answer_timeout", "0.5", 0.5),
    ("answer_timeout", "inf", math.inf),
    ("idle_timeout", "3600", 3600.0),
    ("idle_timeout", "Infinity", math.inf),
    ("close_grace", "0", 0.0),
    ("stop_grace", "0", 0.0),
    ("drain_grace", "0.0", 0.0),
    ("command_timeout", " 7 ", 7.0),
    ("max_frame_bytes", "1", 1),
    ("max_frame_bytes", "64K", 64 * 2**10),
    ("max_log_bytes", "3m", 3 * MIB),
    ("max_concurrent", "1", 1),
    ("memory", "1536m", 1536 * MIB),
    ("memory", "2 GiB", 2 * GIB),
    ("memory", "2gb", 2 * GIB),
    ("memory", "16777216", 16 * MIB),
    ("cpus", "0.5", 0.5),
    ("pids", "64", 64),
    ("network", "open", "open"),
    ("run_uid", "1001", 1001),
    ("run_uid", "4294967294", 2**32 - 2),
    ("min_free_bytes", "0", 0),
    ("assistant_name", "Zo\u00eb the 2nd", "Zo\u00eb the 2nd"),
    ("timezone", "America/Argentina/Buenos_Aires", "America/Argentina/Buenos_Aires"),
    ("timezone", "UTC", "UTC"),
    ("allowlist_path", "/etc/allow.json", "/etc/allow.json"),
    ("log_retention", "0.5", 0.5),
    ("log_retention", "inf", math.inf),
    ("log_text", "1", True),
    ("log_text", "Off", False),
    ("partial_text", "yes", True),
    ("model", "claude-x", "claude-x"),
    ("agent_env", '{"A_1": "x=$y", "b": ""}', {"A_1": "x=$y", "b": ""}),
    (
        "agent_env",
        '{"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "1", "KEYBOARD": "de", "PATH": "/bin"}',
        {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "1", "KEYBOARD": "de", "PATH": "/bin"},
    ),
    ("agent_env", '{"HOMEPAGE": "x", "OLD_TZ": "y"}', {"HOMEPAGE": "x", "OLD_TZ": "y"}),
    ("writable_agent_runner", "TRUE", True),
    ("proxy_host", "10.0.0.1", "10.0.0.1"),
    ("proxy_paths", '["/v1/messages"]', ("/v1/messages",)),
    ("max_output_tokens", "100000", 100000),
    ("max_requests", "10", 10),
    ("max_requests", "9223372036854775807", 2**63 - 1),
]


def test_every_field_is_tried() -> None:
    """The lists of these tests leave no field out."""
    assert {field for field, _, _ in GOOD} == set(FIELDS) - {"root"}
    assert {field for field, _ in BAD} == set(FIELDS)


@pytest.mark.parametrize(("field", "text", "value"), GOOD)
def test_a_field_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, field: str, text: str, value: Any
) -> None:
    """CLAWTRIO_<FIELD> sets a field, and no other."""
    default = Settings.load()
    monkeypatch.setenv(f"CLAWTRIO_{field.upper()}", text)

    assert Settings.load() == attrs.evolve(default, **{field: value})


@pytest.mark.parametrize(("field", "text", "value"), GOOD)
def test_a_field_from_the_file(root: Path, field: str, text: str, value: Any) -> None:
    """The same line in .env means the same."""
    default = Settings.load()
    (root / ".env").write_text(f"CLAWTRIO_{field.upper()}='{text}'\n")

    assert Settings.load() == attrs.evolve(default, **{field: value})


@pytest.mark.parametrize(("field", "text", "value"), GOOD)
def test_a_field_from_code(field: str, text: str, value: object) -> None:
    """A value given directly may be the text or what it means."""
    by_text: Any = {field: text}
    by_value: Any = {field: value}

    assert getattr(Settings(**by_text), field) == value
    assert getattr(Settings(**by_value), field) == value


BAD: list[tuple[str, Any]] = [
    ("root", 7),
    ("root", b"/tmp"),
    ("root", "/a\0b"),
    ("groups_dir", "/a\0b"),
    ("groups_dir", "~nobody-of-that-name/groups"),
    ("data_dir", 7),
    ("data_dir", None),
    ("runtime", "runc"),
    ("runtime", ""),
    ("runtime", None),
    ("image", "a\nb"),
    ("image", ""),
    ("image", "--privileged"),
    ("agent", "nobody"),
    ("agent_command", "python3 agent.py"),
    ("agent_command", "[]"),
    ("agent_command", '[""]'),
    ("agent_command", '["a", 1]'),
    ("agent_command", '"python3"'),
    ("agent_command", '{"a": "b"}' * 2),
    ("agent_command", '["a\\u0000"]'),
    ("agent_command", '["a", "\\ud800"]'),
    ("agent_command", "[" * 100_000),
    ("agent_command", 7),
    ("stdin", "LIFELINE"),
    ("answer_timeout", "0"),
    ("answer_timeout", "-1"),
    ("answer_timeout", "nan"),
    ("answer_timeout", "-inf"),
    ("answer_timeout", "10s"),
    ("answer_timeout", True),
    ("answer_timeout", None),
    ("idle_timeout", 0),
    ("idle_timeout", 10**400),
    ("close_grace", "-0.1"),
    ("close_grace", math.inf),
    ("stop_grace", math.nan),
    ("stop_grace", "inf"),
    ("drain_grace", -1),
    ("drain_grace", "inf"),
    ("command_timeout", 0),
    ("command_timeout", "inf"),
    ("max_frame_bytes", 0),
    ("max_frame_bytes", "-1K"),
    ("max_frame_bytes", "1.5M"),
    ("max_frame_bytes", "1T"),
    ("max_frame_bytes", "K"),
    ("max_frame_bytes", 1.0),
    ("max_frame_bytes", True),
    ("max_frame_bytes", 10**400),
    ("max_frame_bytes", "1" * 400),
    ("max_frame_bytes", "9" * 5000),
    ("max_log_bytes", "0"),
    ("max_log_bytes", "0G"),
    ("max_concurrent", 0),
    ("max_concurrent", "2.0"),
    ("max_concurrent", 2.0),
    ("memory", "1"),
    ("memory", "-2g"),
    ("cpus", "0"),
    ("cpus", "inf"),
    ("pids", "0"),
    ("pids", True),
    ("network", "none"),
    ("run_uid", 0),
    ("run_uid", "root"),
    ("run_uid", -1),
    ("run_uid", 2**32 - 1),
    ("run_uid", "4294967295"),
    ("min_free_bytes", -1),
    ("min_free_bytes", -(10**400)),
    ("assistant_name", ""),
    ("assistant_name", "A\nB"),
    ("assistant_name", "\u202eAndy"),
    ("assistant_name", 7),
    ("timezone", "Mars/Olympus"),
    ("timezone", "../../../etc/passwd"),
    ("timezone", "/etc/localtime"),
    ("timezone", "America"),
    ("timezone", "\ud800"),
    ("timezone", ""),
    ("allowlist_path", ""),
    ("log_retention", -1),
    ("log_retention", 0),
    ("log_retention", "0"),
    ("log_retention", "a week"),
    ("log_text", "maybe"),
    ("log_text", 1),
    ("partial_text", None),
    ("model", ""),
    ("model", 7),
    ("agent_env", "A=b"),
    ("agent_env", '["A"]'),
    ("agent_env", '{"A": 1}'),
    ("agent_env", '{"A=B": "c"}'),
    ("agent_env", '{"1A": "c"}'),
    ("agent_env", '{"A\\n": "c"}'),
    ("agent_env", '{"": "c"}'),
    ("agent_env", '{"A": "\\u0000"}'),
    ("agent_env", '{"A": "\\ud83d"}'),
    ("agent_env", {7: "c"}),
    ("agent_env", {"ANTHROPIC_API_KEY": "c"}),
    ("agent_env", {"github_token": "c"}),
    ("agent_env", {"MY_Secret": "c"}),
    ("agent_env", {"FOO_API_KEY": "c"}),
    ("agent_env", {"KEY_ID": "c"}),
    ("agent_env", {"PASSWORD": "c"}),
    ("agent_env", {"AWS_CREDENTIALS_FILE": "c"}),
    ("agent_env", {"A_CREDENTIAL": "c"}),
    ("agent_env", {"LD_PRELOAD": "c"}),
    ("agent_env", {"GLIBC_TUNABLES": "c"}),
    ("agent_env", {"CLAWTRIO_X": "c"}),
    ("agent_env", {"HOME": "/"}),
    ("agent_env", {"TZ": "UTC"}),
    ("agent_env", {"DBUS_SESSION_BUS_ADDRESS": "c"}),
    ("agent_env", {"XDG_RUNTIME_DIR": "c"}),
    ("writable_agent_runner", "2"),
    ("proxy_host", ""),
    ("proxy_host", "a b\n"),
    ("proxy_paths", "/v1/messages"),
    ("proxy_paths", '["v1/messages"]'),
    ("proxy_paths", "[]"),
    ("max_output_tokens", 0),
    ("max_requests", "-1"),
    ("max_requests", 2**63),
    ("max_requests", "9223372036854775808"),
    ("memory", 2**63),
    ("memory", "9999999999G"),
]


def _shorten(value: object) -> str:
    return repr(value)[:40]


@pytest.mark.parametrize(("field", "value"), BAD, ids=_shorten)
def test_a_value_that_makes_no_sense_names_its_field(field: str, value: Any) -> None:
    """A wrong value is a SettingsError that says which field it is about."""
    with pytest.raises(SettingsError) as caught:
        Settings(**{field: value})

    assert caught.value.field == field
    assert caught.value.problem


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field, value in BAD
        if isinstance(value, str) and value and not {"\0", "\ud800"} & set(value)
    ],
    ids=_shorten,
)
def test_a_wrong_variable_names_its_field(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    """What makes no sense in code makes none in the environment."""
    monkeypatch.setenv(f"CLAWTRIO_{field.upper()}", value)

    with pytest.raises(SettingsError) as caught:
        Settings.load()

    assert caught.value.field == field


_numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400)])
_json = st.sampled_from(["[]", "{}", '["a"]', '{"A":"b"}', "inf", "1g", "true", "UTC"])


@given(
    field=st.sampled_from(FIELDS),
    value=st.none() | st.booleans() | _numbers | st.text() | _json | st.binary(),
)
@example(field="memory", value=-(10**400))
@example(field="groups_dir", value="~\0")
def test_any_value_is_taken_or_is_a_settings_error(field: str, value: Any) -> None:
    """No value, however odd, raises anything but an error that names its field."""
    try:
        outcome = getattr(Settings(**{field: value}), field)
    except SettingsError as exc:
        outcome = exc.field if exc.field == field else exc

    assert isinstance(outcome, (str, int, float, tuple, dict)) or outcome is None


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@given(
    number=st.integers(0, 2**30),
    unit=st.sampled_from(list(_UNITS)),
    lower=st.booleans(),
    tail=st.sampled_from(["", "B", "iB"]),
    space=st.sampled_from(["", " "]),
)
def test_sizes(number: int, unit: str, lower: bool, tail: str, space: str) -> None:  # noqa: FBT001
    """K, M and G are powers of 1024, in any case."""
    tail = tail if unit else ""
    text = f"{number}{space}{unit}{tail}"

    settings = Settings(min_free_bytes=text.lower() if lower else text)  # type: ignore[arg-type]

    assert settings.min_free_bytes == number * _UNITS[unit]


def test_the_environment_beats_the_file(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """What is exported overrides what is written down; an empty variable is none."""
    (root / ".env").write_text(
        "CLAWTRIO_PIDS=1\nCLAWTRIO_CPUS=1\nCLAWTRIO_STOP_GRACE=1\nCLAWTRIO_MODEL=\n"
    )
    monkeypatch.setenv("CLAWTRIO_PIDS", "2")
    monkeypatch.setenv("CLAWTRIO_CPUS", "")

    settings = Settings.load()

    assert (settings.pids, settings.cpus, settings.stop_grace) == (2, 1.0, 1.0)
    assert settings.model is None


def test_the_file_s_quotes_and_dollars(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """.env has a shell's quotes, comments and export, but nothing is interpolated."""
    monkeypatch.setenv("HOME", "/home/other")
    (root / ".env").write_text(
        "# a comment\n"
        "export CLAWTRIO_ASSISTANT_NAME=\"The 'A'\"  # another\n"
        "CLAWTRIO_MODEL='$HOME and ${HOME}'\n"
        'CLAWTRIO_IMAGE="a:$HOME"\n'
        'CLAWTRIO_AGENT_ENV=\'{"A": "${B}"}\'\n'
        "CLAWTRIO_LOG_TEXT\n"
        "ANTHROPIC_API_KEY=not-ours\n"
    )

    settings = Settings.load()

    assert settings.assistant_name == "The 'A'"
    assert settings.model == "$HOME and ${HOME}"
    assert settings.image == "a:$HOME"
    assert settings.agent_env == {"A": "${B}"}
    assert settings.log_text is False


def test_reading_settings_changes_no_environment(root: Path) -> None:
    """A secret in .env does not get into the environment of our children."""
    (root / ".env").write_text("SOME_SECRET=x\nCLAWTRIO_PIDS=3\n")
    before = dict(os.environ)

    Settings.load()

    assert dict(os.environ) == before


def test_the_root_that_is_given_is_the_one_that_is_read(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """The root comes from the caller, the environment or the current directory."""
    for name in ("given", "exported"):
        (root / name).mkdir()
        (root / name / ".env").write_text(f"CLAWTRIO_MODEL={name}\n")
    (root / ".env").write_text("CLAWTRIO_MODEL=here\nCLAWTRIO_ROOT=/elsewhere\n")

    assert (Settings.load().root, Settings.load().model) == (str(root), "here")
    monkeypatch.setenv("CLAWTRIO_ROOT", str(root / "exported"))
    assert Settings.load().model == "exported"
    given = Settings.load(Path("given"))
    assert given.model == "given"
    assert given.root == str(root / "given")
    assert given.data_dir == str(root / "given" / "data")


def test_a_root_at_home_has_its_file_read(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """A unit file can say ~/bot, and the .env there counts."""
    (root / "bot").mkdir()
    (root / "bot" / ".env").write_text("CLAWTRIO_PIDS=3\n")
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("CLAWTRIO_ROOT", "~/bot")

    settings = Settings.load()

    assert (settings.root, settings.pids) == (str(root / "bot"), 3)


def test_relative_paths_are_made_absolute_once(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """A bot that changes its directory later means the same places."""
    settings = Settings(root="bot", data_dir="state", allowlist_path="~/a.json")
    monkeypatch.chdir("/")

    assert settings.root == str(root / "bot")
    assert settings.groups_dir == str(root / "bot" / "groups")
    assert settings.data_dir == str(root / "bot" / "state")
    assert settings.allowlist_path == str(Path.home() / "a.json")


def test_places_are_relative_to_the_root_wherever_one_stands(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """What .env says of a root's places is the same for all who read it."""
    (root / "bot").mkdir()
    (root / "bot" / ".env").write_text(
        "CLAWTRIO_GROUPS_DIR=../chats\nCLAWTRIO_DATA_DIR=state\n"
        "CLAWTRIO_ALLOWLIST_PATH=allow.json\n"
    )

    settings = Settings.load("bot")
    assert settings.groups_dir == str(root / "bot" / ".." / "chats")
    assert settings.data_dir == str(root / "bot" / "state")
    assert settings.allowlist_path == str(root / "allow.json")

    monkeypatch.setenv("CLAWTRIO_GROUPS_DIR", "g")
    monkeypatch.setenv("CLAWTRIO_DATA_DIR", "~/d")
    settings = Settings.load("bot")
    assert settings.groups_dir == str(root / "bot" / "g")
    assert settings.data_dir == str(Path.home() / "d")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("run_uid", 2**32 - 1, "at most 4294967294"),
        ("memory", "9999999999G", "at most 9223372036854775807"),
        ("max_requests", 10**400, "at most 9223372036854775807"),
        ("agent_env", {"LD_PRELOAD": "x"}, "LD_PRELOAD is reserved"),
        ("agent_env", {"FOO_API_KEY": "x"}, "FOO_API_KEY looks like a secret"),
    ],
)
def test_an_error_says_what_is_wrong(field: str, value: Any, problem: str) -> None:
    """The message names the bound or the variable."""
    with pytest.raises(SettingsError, match=problem):
        Settings(**{field: value})


@pytest.mark.parametrize("unknown", ["~nobody-of-that-name", "a\0b"])
def test_a_root_that_cannot_be_is_named(unknown: str) -> None:
    """A root which makes no sense is a SettingsError of that field."""
    with pytest.raises(SettingsError) as caught:
        Settings.load(unknown)

    assert caught.value.field == "root"


def test_a_file_that_is_no_text_is_an_error(root: Path) -> None:
    """A .env that cannot be read is not silently left out."""
    (root / ".env").write_bytes(b"CLAWTRIO_MODEL=\xff\xfe\n")

    with pytest.raises(SettingsError) as caught:
        Settings.load()

    assert caught.value.field == "root"
    assert ".env" in caught.value.problem


def test_a_misplaced_secret_is_not_quoted() -> None:
    """What stands where JSON should be is not repeated: logs show errors."""
    with pytest.raises(SettingsError) as caught:
        Settings(agent_env="sk-ant-api03")  # type: ignore[arg-type]

    assert "sk-ant" not in str(caught.value)


def test_a_secret_in_agent_env_is_not_quoted() -> None:
    """An error about a secret variable names it, without its value."""
    with pytest.raises(SettingsError, match="API_KEY") as caught:
        Settings(agent_env={"API_KEY": "sk-ant-api03"})

    assert "sk-ant" not in str(caught.value)


def test_collections_are_ours(root: Path) -> None:
    """Changing what was passed in changes no settings."""
    command, variables = ["a"], {"A": "b"}
    settings = Settings(agent_command=command, agent_env=variables)  # type: ignore[arg-type]
    command.append("b")
    variables["B"] = "c"

    assert settings.agent_command == ("a",)
    assert settings.agent_env == {"A": "b"}


def test_the_host_s_zone_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups live in the time zone of their host."""
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    tzlocal.reload_localzone()

    assert Settings().timezone == "Asia/Kathmandu"


def test_a_host_without_a_known_zone_is_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings load on a host whose time zone has no name."""
    monkeypatch.setattr(tzlocal, "get_localzone_name", lambda: None)

    assert Settings().timezone == "UTC"
