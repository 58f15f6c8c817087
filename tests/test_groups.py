"""Where everything of a group is on the host."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clawtrio import Group, GroupBusyError, Settings, UnsafePathError
from clawtrio._groups import IPC_SUBDIRECTORIES, Places, open_places
from clawtrio._hostfs import Directory, Owner

from .helpers import open_descriptors

FAMILY = Group("Family", "Family")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that")


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Count descriptors: none may be left, whatever happened."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a root."""
    path = tmp_path / "bot"
    path.mkdir()
    return path


def settings_of(root: Path, **changes: Any) -> Settings:
    """Make settings of a root."""
    return Settings(root=str(root), **changes)


def names_in(directory: Path) -> list[str]:
    """List a directory."""
    return sorted(path.name for path in directory.iterdir())


def mode_of(path: Path) -> int:
    """Return the permissions."""
    return stat.S_IMODE(path.stat().st_mode)


def make_ipc(places: Places) -> None:
    """Make the group's mailbox, with all that belongs in it."""
    with places.open_ipc(FAMILY) as ipc:
        places.furnish_ipc(ipc)


def test_an_empty_root_gets_all_that_is_needed(root: Path) -> None:
    """Opening makes the directories; what is ours alone is closed to others."""
    with open_places(settings_of(root)):
        pass

    assert names_in(root) == ["data", "groups"]
    assert names_in(root / "data") == [
        "engines",
        "errors",
        "ipc",
        "locks",
        "logs",
        "root-id",
        "sessions",
        "sockets",
        "trash",
    ]
    assert mode_of(root / "data") == 0o700
    for name in ("engines", "locks", "logs", "sockets", "trash"):
        assert mode_of(root / "data" / name) == 0o700
    assert mode_of(root / "data" / "root-id") == 0o600


def test_a_root_can_be_opened_by_several_and_again(root: Path) -> None:
    """Two engines share a root and agree on its id, which outlives them."""
    with (
        open_places(settings_of(root)) as one,
        open_places(settings_of(root)) as other,
    ):
        root_id = one.root_id
        assert other.root_id == root_id
    with open_places(settings_of(root)) as later:
        assert later.root_id == root_id

    assert re.fullmatch("[0-9a-f]{32}", root_id)


def test_engines_that_start_at_once_agree_on_the_root_s_id(root: Path) -> None:
    """However many start at the same moment, a root has one id."""
    code = (
        "import sys; from clawtrio import Settings\n"
        "from clawtrio._groups import open_places\n"
        "sys.stdin.read()\n"
        "with open_places(Settings(root=sys.argv[1])) as p: print(p.root_id)\n"
    )
    engines = [
        subprocess.Popen(
            [sys.executable, "-c", code, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for engine in engines:
        assert engine.stdin is not None
        engine.stdin.close()
    ids = set()
    for engine in engines:
        assert engine.stdout is not None
        ids.add(engine.stdout.read())
        engine.stdout.close()
        assert engine.wait() == 0

    assert len(ids) == 1


def test_the_first_id_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second to writing the id takes the first one's."""
    with open_places(settings_of(root)) as places:
        first = places.root_id
    real = Directory.read
    looks = iter([None])

    def late(self: Directory, name: str) -> bytes | None:
        return next(looks, real(self, name))

    monkeypatch.setattr(Directory, "read", late)

    with open_places(settings_of(root)) as places:
        assert places.root_id == first


def test_roots_have_ids_of_their_own(root: Path, tmp_path: Path) -> None:
    """Another root is another root, wherever it is."""
    other = tmp_path / "other"
    other.mkdir()

    with (
        open_places(settings_of(root)) as one,
        open_places(settings_of(other)) as two,
    ):
        assert one.root_id != two.root_id


# -- trust -----------------------------------------------------------------------------


def test_a_root_must_be_there(root: Path) -> None:
    """A mistyped root is not made."""
    with (
        pytest.raises(UnsafePathError, match="make it first") as caught,
        open_places(settings_of(root / "typo")),
    ):
        pass

    assert caught.value.path == str(root / "typo")
    assert names_in(root) == []


@pytest.mark.parametrize("name", ["", "groups", "data"])
def test_a_root_that_others_can_write_is_refused(root: Path, name: str) -> None:
    """Neither root, groups nor data may be anybody's."""
    with open_places(settings_of(root)):
        pass
    (root / name).chmod(0o777)

    with (
        pytest.raises(UnsafePathError, match="anybody") as caught,
        open_places(settings_of(root)),
    ):
        pass

    assert caught.value.path == str(root / name)


@pytest.mark.parametrize(
    ("groups", "data"),
    [
        ("groups", "groups"),
        ("groups", "groups/data"),
        ("groups", "groups/family/data"),
        (".", "data"),
        ("..", "data"),
        ("data/ipc/family", "data"),
        ("data/sessions", "data"),
        ("data/logs", "data"),
        ("data/locks", "data"),
        ("data/engines", "data"),
        ("data/trash", "data"),
        ("data/groups", "data"),
        ("link", "groups/data"),
        ("groups", "link/data"),
    ],
)
def test_no_root_is_where_agents_write(root: Path, groups: str, data: str) -> None:
    """Groups and data do not overlap, nor is the root a place of agents."""
    (root / "groups").mkdir()
    (root / "link").symlink_to("groups")

    with (
        pytest.raises(UnsafePathError),
        open_places(settings_of(root, groups_dir=root / groups, data_dir=root / data)),
    ):
        pass


def test_groups_and_data_may_be_elsewhere(root: Path, tmp_path: Path) -> None:
    """The three places may be anywhere that is ours, and are made with ancestors."""
    settings = settings_of(
        root, groups_dir=tmp_path / "x" / "g", data_dir=tmp_path / "y" / "d"
    )

    with open_places(settings) as places:
        places.open_group(FAMILY).close()

    assert names_in(tmp_path / "x" / "g") == ["Family"]
    assert names_in(root) == []


# -- who -------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(
    ("owner", "run_uid", "expected"),
    [
        ((0, 0), None, Owner(1000, 1000)),
        ((1234, 0), None, Owner(1234, 1000)),
        ((0, 2345), None, Owner(1000, 2345)),
        ((1234, 2345), None, Owner(1234, 2345)),
        ((1234, 2345), 3456, Owner(3456, 2345)),
        ((0, 0), 3456, Owner(3456, 1000)),
    ],
)
def test_agents_run_as_the_owner_of_the_root(
    root: Path, owner: tuple[int, int], run_uid: int | None, expected: Owner
) -> None:
    """Never as uid or gid 0; the operator may say as whom."""
    os.chown(root, *owner)
    settings = settings_of(root, run_uid=run_uid)
    if run_uid is not None and owner[0] not in {0, run_uid}:
        with pytest.raises(UnsafePathError, match=f"uid {owner[0]}"):
            open_places(settings).__enter__()
        return

    with open_places(settings) as places:
        assert places.owner == expected
        places.open_group(FAMILY).close()
        make_ipc(places)
        places.open_logs(FAMILY).close()

    for path in (
        root / "groups" / "Family",
        root / "data" / "ipc" / "Family",
        *(root / "data" / "ipc" / "Family" / name for name in IPC_SUBDIRECTORIES),
    ):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (expected.uid, expected.gid)
    assert (root / "data" / "logs" / "Family").stat().st_uid == 0


# -- groups ----------------------------------------------------------------------------


@pytest.fixture
def places(root: Path) -> Iterator[Places]:
    """Hold the places of a root."""
    with open_places(settings_of(root)) as places:
        yield places


def test_the_directories_of_a_group(places: Places, root: Path) -> None:
    """A group's own directory, its mailbox and its logs are where NanoClaw has them."""
    places.open_group(FAMILY).close()
    make_ipc(places)
    places.open_logs(FAMILY).close()

    assert names_in(root / "groups") == ["Family"]
    assert names_in(root / "data" / "ipc" / "Family") == [
        "input",
        "messages",
        "tasks",
    ]
    assert mode_of(root / "data" / "logs" / "Family") == 0o700


def test_what_is_in_a_group_stays(places: Places, root: Path) -> None:
    """Opening changes nothing of what is there already."""
    (root / "groups" / "Family").mkdir()
    (root / "groups" / "Family" / "CLAUDE.md").write_text("memory")
    mailbox = root / "data" / "ipc" / "Family"
    (mailbox / "messages").mkdir(parents=True)
    (mailbox / "messages" / "1.json").write_text("{}")

    places.open_group(FAMILY).close()
    make_ipc(places)

    assert (root / "groups" / "Family" / "CLAUDE.md").read_text() == "memory"
    assert (mailbox / "messages" / "1.json").read_text() == "{}"
    assert places.trash.names() == []


def _plant(path: Path, what: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if what == "a symlink":
        (path.parent.parent / "elsewhere").mkdir()
        path.symlink_to("../elsewhere")
    else:
        path.write_text("the operator's")


@pytest.mark.parametrize("what", ["a symlink", "a file"])
@pytest.mark.parametrize("where", ["groups", "data/ipc"])
def test_what_stands_in_the_place_of_a_group_is_left_alone(
    places: Places, root: Path, where: str, what: str
) -> None:
    """What only the operator can have put there is an error, and stays."""
    path = root / where / "Family"
    _plant(path, what)
    before = path.lstat()
    open_it = places.open_group if where == "groups" else places.open_ipc

    with pytest.raises(UnsafePathError, match="must be a directory") as caught:
        open_it(FAMILY)

    assert caught.value.path == str(path)
    assert path.lstat() == before
    assert places.trash.names() == []


@pytest.mark.parametrize("where", ["groups", "data/ipc"])
def test_a_group_that_cannot_be_opened_is_left_alone(
    places: Places, root: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A directory of the operator's that we may not read is an error, and stays."""
    path = root / where / "Family"
    path.mkdir(0o700)
    real = os.open

    def forbid(name: str, *args: Any, **options: Any) -> int:
        if name == "Family":
            raise PermissionError(13, "Permission denied")
        return real(name, *args, **options)

    # Root, who may run this, may read everything.
    monkeypatch.setattr(os, "open", forbid)
    open_it = places.open_group if where == "groups" else places.open_ipc

    with pytest.raises(UnsafePathError, match="opened: Permission") as caught:
        open_it(FAMILY)

    assert caught.value.path == str(path)
    assert path.is_dir()
    assert places.trash.names() == []


@pytest.mark.parametrize("name", IPC_SUBDIRECTORIES)
def test_what_an_agent_planted_in_its_mailbox_is_thrown_away(
    places: Places,
    root: Path,
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A symlink in a mailbox is not followed, but replaced, and the log says so."""
    outside = tmp_path / "outside"
    outside.mkdir()
    make_ipc(places)
    planted = root / "data" / "ipc" / "Family" / name
    planted.rmdir()
    planted.symlink_to(outside)

    make_ipc(places)

    assert planted.is_dir()
    assert not planted.is_symlink()
    assert len(places.trash.names()) == 1
    assert names_in(outside) == []
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(planted) in record.getMessage()


def test_the_logs_of_a_group_are_no_link(places: Places, root: Path) -> None:
    """Nobody may have planted anything where only we write."""
    (root / "data" / "logs" / "Family").symlink_to("/tmp")

    with pytest.raises(UnsafePathError):
        places.open_logs(FAMILY)


def test_a_group_has_one_live_run(places: Places) -> None:
    """A second run of the same group is told that it is busy; others are not."""
    with places.lock_group(FAMILY):
        with (
            pytest.raises(GroupBusyError) as caught,
            places.lock_group(Group("F", "FAMILY")),
        ):
            pass
        with places.lock_group(Group("Other", "other")):
            pass
    with places.lock_group(FAMILY):
        pass

    assert caught.value.folder == "FAMILY"


def test_a_group_is_busy_across_processes(places: Places, root: Path) -> None:
    """Another process of the same root does not run the group either."""
    code = (
        "import sys; from clawtrio import Group, GroupBusyError, Settings\n"
        "from clawtrio._groups import open_places\n"
        "with open_places(Settings(root=sys.argv[1])) as places:\n"
        "    try:\n"
        "        with places.lock_group(Group('F', 'family')): print('free')\n"
        "    except GroupBusyError: print('busy')\n"
    )

    def look() -> bytes:
        argv = [sys.executable, "-c", code, str(root)]
        return subprocess.run(argv, check=True, capture_output=True).stdout

    with places.lock_group(FAMILY):
        assert look() == b"busy\n"
    assert look() == b"free\n"


def test_an_error_in_the_block_is_no_busy_group(places: Places) -> None:
    """A BlockingIOError of whoever holds the group comes out as itself."""
    with pytest.raises(BlockingIOError), places.lock_group(FAMILY):
        raise BlockingIOError


def test_locks_are_where_no_mount_shows_them(places: Places, root: Path) -> None:
    """An agent cannot hold its own group's lock."""
    with places.lock_group(FAMILY):
        assert names_in(root / "data" / "locks") == ["family"]


# -- the trash and the space -----------------------------------------------------------


def test_the_trash_is_emptied_by_one_at_a_time(places: Places) -> None:
    """While somebody else empties the trash there is nothing to do for us."""
    for name in ("a", "b", "c"):
        places.trash.write(name, b"")
    with places._locks.lock(".trash"):
        assert places.empty_trash(10)
        assert len(places.trash.names()) == 3

    assert not places.empty_trash(2)
    assert places.empty_trash(2)
    assert places.trash.names() == []


def test_the_free_space_is_what_the_fullest_place_has(
    places: Places, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups and data may be on two disks; a disk may count no inodes."""
    fields = ("f_frsize", "f_bavail", "f_files", "f_favail")
    disks: dict[str, tuple[int, ...]] = {
        str(root / "groups"): (4096, 10, 1000, 7),
        str(root / "data"): (1024, 100, 0, 0),
    }
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda path: type("Disk", (), dict(zip(fields, disks[path], strict=True))),
    )

    assert places.free() == (40960, 7)
    disks[str(root / "groups")] = (4096, 1000, 0, 0)
    assert places.free() == (102400, None)


def test_the_real_disk_has_space(places: Places) -> None:
    """What df says is what there is."""
    free, inodes = places.free()

    assert 0 < free <= 2**60
    assert inodes is None or inodes > 0
