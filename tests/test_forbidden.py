"""What no group is ever given."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import clawtrio
from clawtrio import Settings
from clawtrio._forbidden import Forbidden, Zone, expand, trail


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a home of one's own."""
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    return place


def forbidden_for(
    tmp_path: Path, environment: Mapping[str, str] | None = None, **changes: Any
) -> Forbidden:
    settings = Settings(root=str(tmp_path / "bot"), **changes)
    return Forbidden(settings, environment=environment or {}, fixed=[])


# ---------------------------------------------------------------- paths


def test_a_tilde_is_our_own_home(home: Path) -> None:
    """Only a component of its own means the home directory."""
    assert expand("~") == str(home)
    assert expand("~/x") == f"{home}/x"
    assert expand("~other/x") == "~other/x"
    assert expand("/a/~") == "/a/~"


def test_a_trail_names_what_is_looked_up(tmp_path: Path) -> None:
    """Symlinks, what they lead through, and what is not there are in it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "up").symlink_to("../b")
    (tmp_path / "far").symlink_to(tmp_path / "a" / "up")

    names = [
        str(entry.relative_to(tmp_path))
        for entry in trail(f"/{tmp_path}/a/../far/./new//x")
        if entry.is_relative_to(tmp_path) and entry != tmp_path
    ]

    assert names == ["a", "far", "a", "a/up", "b", "b/new", "b/new/x"]


def test_a_trail_in_circles_ends(tmp_path: Path) -> None:
    """Symlinks that lead to each other are followed no further than by the kernel."""
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")

    assert len(list(trail(str(tmp_path / "x")))) < 100


# ---------------------------------------------------------------- zones


def test_a_closed_place_takes_what_is_in_it_and_around_it(tmp_path: Path) -> None:
    """Whoever is given a directory is given what it holds, but not what is beside."""
    (tmp_path / "a" / "closed").mkdir(parents=True)
    zone = Zone({str(tmp_path / "a" / "closed"): "is secret"})
    closed = tmp_path / "a" / "closed"

    assert zone.complaint(closed) == f"{closed} is secret"
    assert zone.complaint(closed / "x" / "y") == f"{closed} is secret"
    for outer in (tmp_path / "a", tmp_path, Path("/")):
        assert zone.complaint(outer) == f"{outer} holds {closed}, which is secret"
    assert zone.complaint(tmp_path / "a" / "closed-not") is None
    assert zone.complaint(tmp_path / "b") is None


def test_a_whole_takes_what_is_around_it_only(tmp_path: Path) -> None:
    """What is in it may be given."""
    zone = Zone({}, {str(tmp_path / "a"): "is too much"})

    assert zone.complaint(tmp_path / "a") == f"{tmp_path / 'a'} is too much"
    assert "which is too much" in (zone.complaint(tmp_path) or "")
    assert zone.complaint(tmp_path / "a" / "b") is None


def test_a_place_is_closed_by_each_of_its_names(tmp_path: Path) -> None:
    """A symlink to a secret place, and where it leads, are closed both."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "real")
    zone = Zone({str(tmp_path / "a" / "link"): "is secret"})

    assert zone.complaint(tmp_path / "b" / "real" / "x") is not None
    assert zone.complaint(tmp_path / "b") is not None
    assert zone.complaint(tmp_path / "a") is not None


def test_a_symlink_on_the_way_closes_no_more_than_itself(tmp_path: Path) -> None:
    """A home that is reached through a symlink keeps what is open in it open."""
    (tmp_path / "real" / "home" / ".ssh").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/home")
    zone = Zone({str(tmp_path / "link" / ".ssh"): "is secret"})

    assert zone.complaint(tmp_path / "real" / "home" / ".ssh") is not None
    assert zone.complaint(tmp_path / "real" / "home") is not None
    assert zone.complaint(tmp_path / "real" / "home" / "projects") is None


def test_a_place_is_found_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that is mounted elsewhere, too, is known by device and inode."""
    (tmp_path / "a" / "closed").mkdir(parents=True)
    (tmp_path / "twin").mkdir()
    zone = Zone({str(tmp_path / "a" / "closed"): "is secret"})
    real = Path.stat

    def stat_as_if_mounted(self: Path, **options: bool) -> os.stat_result:
        # What a bind mount of a/closed on twin would say.
        if self == tmp_path / "twin":
            return real(tmp_path / "a" / "closed", **options)
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat_as_if_mounted)

    complaint = f"{tmp_path / 'a' / 'closed'} is secret"
    assert zone.complaint(tmp_path / "twin") == complaint
    assert zone.complaint(tmp_path / "twin" / "x") == complaint


# ---------------------------------------------------------------- what is forbidden


@pytest.mark.parametrize(
    "place",
    [
        *("/", "/home", "/home/somebody", "/tmp", "/var/tmp", "/var"),
        *("/etc", "/etc/ssl/certs", "/proc/self", "/sys/fs", "/dev/shm", "/run/user/7"),
        *("/boot", "/var/lib/docker/volumes", "/var/lib"),
    ],
)
def test_the_system_is_not_given(tmp_path: Path, place: str) -> None:
    """Neither what is the system's, nor more of the host than anybody could mean."""
    assert forbidden_for(tmp_path).complaint(Path(place)) is not None


@pytest.mark.parametrize(
    "name", ["", ".config", ".config/x", ".ssh", ".gnupg/y", ".aws"]
)
def test_secrets_of_a_home_are_not_given(tmp_path: Path, home: Path, name: str) -> None:
    """Nor is the home itself."""
    assert forbidden_for(tmp_path).complaint(home / name) is not None


@pytest.mark.parametrize(
    "name",
    [
        *("", "data", "data/ipc/family", "groups", "groups/other", "groups/global"),
        *(".git", ".env", "store/auth"),
    ],
)
def test_the_bot_s_own_is_not_given(tmp_path: Path, name: str) -> None:
    """Neither the root, nor what is in it that is nobody's but its own."""
    assert forbidden_for(tmp_path).complaint(tmp_path / "bot" / name) is not None


def test_places_that_the_settings_move_are_not_given(tmp_path: Path) -> None:
    """Groups, data and the allowlist are kept out of mounts wherever they are."""
    forbidden = forbidden_for(
        tmp_path,
        groups_dir=str(tmp_path / "g" / "groups"),
        data_dir=str(tmp_path / "d" / "data"),
        allowlist_path=str(tmp_path / "l" / "allowlist.json"),
    )

    for name in ("g", "g/groups/a", "d", "d/data/logs", "l", "bot"):
        assert forbidden.complaint(tmp_path / name) is not None
    for name in ("bot/src", "g/x", "l/x", "home/projects"):
        assert forbidden.complaint(tmp_path / name) is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("XDG_RUNTIME_DIR", "{}/secret"),
        ("SSH_AUTH_SOCK", "{}/secret/agent"),
        ("DOCKER_HOST", "unix://{}/secret/docker.sock"),
        ("DBUS_SESSION_BUS_ADDRESS", "unix:path={}/secret/bus,guid=1;tcp:x"),
        ("KUBECONFIG", "relative:{}/secret/config"),
    ],
)
def test_what_the_environment_names_is_not_given(
    tmp_path: Path, variable: str, value: str
) -> None:
    """Sockets of agents and containers, and secrets, stay out wherever they are."""
    place = tmp_path / "secret"
    assert forbidden_for(tmp_path).complaint(place) is None

    environment = {variable: value.format(tmp_path)}

    assert forbidden_for(tmp_path, environment).complaint(place) is not None


def test_the_host_s_code_is_not_written(tmp_path: Path) -> None:
    """Nobody may write where the bot or its Python comes from; reading is harmless."""
    forbidden = forbidden_for(tmp_path)
    package = Path(clawtrio.__file__).parent

    for place in (
        *(tmp_path / "bot", tmp_path / "bot" / "src", tmp_path, package),
        *(package.parent, Path(sys.prefix), Path(sys.base_prefix, "lib")),
    ):
        assert forbidden.write_complaint(place) is not None
    assert forbidden.write_complaint(tmp_path / "elsewhere") is None


def test_what_is_imported_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory that we were started in is not meant: it may be the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "x", str(tmp_path), str(tmp_path / "lib")])
    forbidden = forbidden_for(tmp_path)

    assert forbidden.write_complaint(tmp_path / "lib" / "x") is not None
    assert forbidden.write_complaint(tmp_path / "x") is None


def test_more_may_be_fixed(tmp_path: Path) -> None:
    """What the caller names is not written either."""
    settings = Settings(root=str(tmp_path / "bot"))
    forbidden = Forbidden(settings, fixed=[str(tmp_path / "runner")])

    complaint = forbidden.write_complaint(tmp_path / "runner" / "x")

    assert complaint == f"{tmp_path / 'runner'} is what containers run"


def test_a_user_without_an_entry_has_the_home_that_is_set(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A uid of a container need not be in the list of users."""
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 7)

    assert forbidden_for(tmp_path).complaint(home / ".ssh") is not None


# ---------------------------------------------------------------- where agents write


@pytest.mark.parametrize(
    ("name", "replaceable"),
    [
        ("bot", False),
        ("bot/groups", False),
        ("bot/groups/main", False),
        ("bot/groups/main/x", True),
        ("bot/groups/main/x/y", True),
        ("bot/data/ipc/main", False),
        ("bot/data/ipc/main/input", True),
        ("bot/data/sessions/main/.claude", False),
        ("bot/data/sessions/main/.claude/skills", True),
        ("bot/data/logs/main/x", False),
        ("shared", False),
        ("shared/x", True),
        ("through/x", True),
        ("elsewhere/x", False),
        ("groupsy", False),
    ],
)
def test_an_agent_may_replace_what_is_where_it_writes(
    tmp_path: Path, name: str, *, replaceable: bool
) -> None:
    """Not the directory that it was given, but all in it, also on the way elsewhere."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "through").symlink_to("shared/link")
    (tmp_path / "shared" / "link").symlink_to("../elsewhere")
    forbidden = forbidden_for(tmp_path)
    path = str(tmp_path / name)

    found = forbidden.agent_may_replace(path, [tmp_path / "shared"])

    assert found is replaceable


def test_every_home_s_secrets_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of whom agents run as, and of all in /home, are nobody's either."""
    homes = tmp_path / "homes"
    for name in ("alice/.config/gh", "bob/.ssh", "carol/.config", "carol/work"):
        (homes / name).mkdir(parents=True)
    (homes / "file").touch()
    (tmp_path / "bot").mkdir()
    owner = (tmp_path / "bot").stat().st_uid
    accounts = {owner: homes / "alice", 4321: homes / "bob"}

    def account(uid: int) -> pwd.struct_passwd:
        return pwd.struct_passwd(("", "", uid, uid, "", str(accounts[uid]), ""))

    monkeypatch.setattr(pwd, "getpwuid", account)
    monkeypatch.setattr("clawtrio._forbidden._HOMES", homes)
    forbidden = forbidden_for(tmp_path, run_uid=4321)

    for closed in ("alice/.config/gh", "bob/.ssh", "carol/.config", "carol"):
        assert forbidden.complaint(homes / closed) is not None
    assert forbidden.complaint(homes / "carol" / "work") is None
    assert not forbidden.root_is_home
    monkeypatch.setitem(accounts, owner, tmp_path / "bot")
    assert forbidden_for(tmp_path).root_is_home
