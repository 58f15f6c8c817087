"""``clawtrio mounts``: the allowlist to begin with, and why it says no."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from clawtrio._allowlist import TEMPLATE
from clawtrio._cli import execute
from clawtrio._codec_allowlist import decode_allowlist

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a home and no settings, and be in a bot's directory."""
    for name in os.environ:
        if name.startswith("CLAWTRIO_") or name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name)
    place = tmp_path / "home"
    (place / "projects" / "x").mkdir(parents=True)
    (place / "agents").mkdir()
    (tmp_path / "bot").mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(tmp_path / "bot")
    return place


@pytest.fixture
def path(home: Path) -> Path:
    """Name where the allowlist is."""
    return home / ".config" / "clawtrio" / "mount-allowlist.json"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the command line."""

    def call_it(*arguments: str) -> tuple[int, str, str]:
        code = execute(["mounts", *arguments])
        return (code, *capfd.readouterr())

    return call_it


def test_init_writes_an_allowlist(call: Call, path: Path) -> None:
    """It says where, and the file is for us alone."""
    assert call("init") == (0, f"{path}\n", "")

    assert decode_allowlist(path.read_bytes()) == TEMPLATE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_init_replaces_nothing_unless_forced(call: Call, path: Path) -> None:
    """What an operator wrote is kept, and the remedy is told."""
    path.parent.mkdir(parents=True)
    path.write_text("mine")

    code, out, err = call("init")
    assert (code, out) == (1, "")
    assert err == f"clawtrio: there is {path} already: --force replaces it\n"
    assert path.read_text() == "mine"

    assert call("init", "--force")[0] == 0
    assert decode_allowlist(path.read_bytes()) == TEMPLATE


def test_init_says_that_nanoclaw_s_is_read_no_more(
    call: Call, home: Path, path: Path
) -> None:
    """Who had an allowlist there does not lose it unawares."""
    old = home / ".config" / "nanoclaw" / "mount-allowlist.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")

    code, out, err = call("init")

    assert (code, out) == (0, f"{path}\n")
    assert err == f"clawtrio: from now on it is read in the place of {old}\n"


def test_init_says_what_stands_in_its_way(call: Call, home: Path) -> None:
    """A place that cannot be written is one line."""
    (home / ".config").write_text("a file")

    code, out, err = call("init")

    assert (code, out) == (1, "")
    assert ".config" in err
    assert err.count("\n") == 1


def test_check_explains_what_is_granted(call: Call, home: Path) -> None:
    """What, where, how far and by which root; the exit code says yes."""
    call("init")

    code, out, err = call("check", "~/projects/x", "--rw")

    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "granted to read: allowed by root ~/projects, which has not got allowReadWrite",
        f"  on the host       {home}/projects/x",
        "  in the container  /workspace/extra/x",
    ]


def test_check_tells_main_from_others(call: Call) -> None:
    """Only main may write, unless the operator lets the others."""
    call("init")

    main = call("check", "~/agents", "--rw")
    other = call("check", "~/agents", "--rw", "--group", "family")

    assert main[1].startswith("granted to read and write: allowed by root ~/agents\n")
    assert other[1].startswith("granted to read: allowed by root ~/agents; only main")
    assert (main[0], other[0]) == (0, 0)


def test_check_takes_a_path_as_a_shell_completes_it(
    call: Call, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative one is in the current directory."""
    call("init")
    monkeypatch.chdir(home / "projects")

    code, out, _ = call("check", "x", "--root", "../../bot")

    assert code == 0
    assert f"{home}/projects/x\n" in out


def test_check_explains_what_is_refused(call: Call, home: Path) -> None:
    """The reason is on stdout, and the exit code says no."""
    call("init")

    code, out, err = call("check", "~/.config")

    assert (code, err) == (1, "")
    assert out == (
        f"refused: ~/.config: {home}/.config is where secrets are, "
        "so it is never mounted\n"
    )


def test_check_without_an_allowlist_names_the_remedy(call: Call) -> None:
    """Nothing is allowed, and init is what helps."""
    code, out, _ = call("check", "~/projects/x")

    assert code == 1
    assert "'clawtrio mounts init' writes one" in out


def test_check_shows_what_is_malformed(call: Call, path: Path) -> None:
    """The JSON path is in the reason."""
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"allowedRoots": [7]}))

    code, out, _ = call("check", "~/projects/x")

    assert code == 1
    assert "$.allowedRoots[0]: must be an object, not 7" in out


def test_check_shows_names_as_text(call: Call, home: Path) -> None:
    """A terminal obeys nothing that a path or an allowlist says."""
    call("init")
    nasty = home / "projects" / "a\u202eb"
    nasty.mkdir()

    granted = call("check", str(nasty))
    refused = call("check", "/x\x1b]0;owned\x07[/nope]")

    assert granted[0] == 0
    assert "/workspace/extra/a\\u202eb\n" in granted[1]
    assert refused[0] == 1
    assert "/x\\x1b]0;owned\\x07[/nope]: " in refused[1]
    assert "\x1b" not in refused[1]


@pytest.mark.parametrize("command", ["init", "check"])
def test_each_command_explains_itself(call: Call, command: str) -> None:
    """Each has a help text that tells of its options."""
    code, out, _ = call(command, "--help")

    assert code == 0
    assert "--root" in out
    assert {"init": "--force", "check": "--rw"}[command] in out
