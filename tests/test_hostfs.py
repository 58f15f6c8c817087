"""Files in places where a hostile agent writes, on the real file system."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clawtrio import UnsafePathError
from clawtrio._hostfs import (
    MAX_ENTRIES,
    MAX_FILE_BYTES,
    Directory,
    Owner,
    check_trusted,
)

from .helpers import open_descriptors

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that")

US = frozenset({0, os.geteuid()})
GIDS = frozenset({0, os.getegid()})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Directory]:
    """Hold a directory in which an agent may write."""
    (tmp_path / "place").mkdir()
    with Directory.at(str(tmp_path / "place")) as directory:
        yield directory


@pytest.fixture
def trash(tmp_path: Path) -> Iterator[Directory]:
    """Hold the trash."""
    (tmp_path / "trash").mkdir()
    with Directory.at(str(tmp_path / "trash")) as directory:
        yield directory


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Count descriptors: none may be left, whatever happened."""
    before = open_descriptors()
    yield
    # The fixtures that hold directories are still there.
    assert open_descriptors() <= before + 2


@contextmanager
def unprivileged(*directories: Directory) -> Iterator[None]:
    """Be a user, as a bot should be, who owns *directories*."""
    if os.geteuid() != 0:
        yield
        return
    for directory in directories:
        os.chown(directory.path, 12345, 12345)
    os.seteuid(12345)
    try:
        yield
    finally:
        os.seteuid(0)


# What an agent may put in the place of anything. Each gets the path, and a path of
# something precious outside.
def _symlink(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def _symlink_to_directory(path: Path, outside: Path) -> None:
    path.symlink_to(outside.parent)


def _dangling(path: Path, outside: Path) -> None:
    path.symlink_to(outside.parent / "made-through-a-link")


def _loop(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def _fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        # Not by its own path, which may be too long for a socket.
        here = os.open(path.parent, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def _directory(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


def _device(path: Path, outside: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


def _file(path: Path, outside: Path) -> None:
    path.write_text("agent's")


Plant = Callable[[Path, Path], None]
PLANTS: list[Plant] = [
    _symlink,
    _symlink_to_directory,
    _dangling,
    _loop,
    _fifo,
    _socket,
    _directory,
    _file,
]
if os.geteuid() == 0:
    PLANTS.append(_device)

every_plant = pytest.mark.parametrize("plant", PLANTS, ids=lambda p: p.__name__[1:])


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Have something precious outside, which nothing may touch."""
    (tmp_path / "outside").mkdir()
    precious = tmp_path / "outside" / "precious"
    precious.write_text("precious")
    yield precious
    assert precious.read_text() == "precious"
    assert list(precious.parent.iterdir()) == [precious]
    assert stat.S_IMODE(precious.stat().st_mode) == 0o644


# -- reading ---------------------------------------------------------------------------


@every_plant
def test_only_a_regular_file_is_read(
    place: Directory, outside: Path, plant: Plant
) -> None:
    """What an agent planted is refused at once, and never followed or waited for."""
    plant(Path(place.path, "x"), outside)

    if plant is _file:
        assert place.read("x") == b"agent's"
    else:
        with pytest.raises(UnsafePathError) as caught:
            place.read("x")
        assert caught.value.path == f"{place.path}/x"


@every_plant
def test_reading_what_was_planted_leaks_no_descriptor(
    place: Directory, outside: Path, plant: Plant
) -> None:
    """An agent cannot use up our descriptors by planting things."""
    plant(Path(place.path, "x"), outside)
    before = open_descriptors()

    for _ in range(5):
        with suppress(UnsafePathError):
            place.read("x")

    assert open_descriptors() == before


def test_a_missing_file_reads_as_none(place: Directory) -> None:
    """No file is no error, since agents remove what they have read."""
    assert place.read("x") is None


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_a_file_up_to_the_limit_is_read(place: Directory, size: int) -> None:
    """The limit itself is allowed."""
    Path(place.path, "x").write_bytes(b"a" * size)

    assert place.read("x", limit=10) == b"a" * size


def test_a_file_over_the_limit_is_refused(place: Directory) -> None:
    """A file that is too large is refused without reading it into memory."""
    Path(place.path, "x").touch()
    os.truncate(Path(place.path, "x"), 2**40)
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePathError, match="larger than"):
            place.read("x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 4 * MAX_FILE_BYTES


def test_a_leased_file_does_not_hold_us_up(place: Directory) -> None:
    """A lease on a file, which would block an open, makes it unreadable instead."""
    path = Path(place.path, "x")
    path.write_text("x")
    code = (
        "import fcntl, os, signal, sys\n"
        "signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"\n"
        with pytest.raises(UnsafePathError, match="cannot be read"):
            place.read("x")
        agent.kill()


def test_an_unreadable_file_is_refused(place: Directory) -> None:
    """A file that we have no leave to read is unsafe, not a crash."""
    path = Path(place.path, "x")
    path.write_text("x")
    path.chmod(0)

    with unprivileged(place), pytest.raises(UnsafePathError, match="cannot be read"):
        place.read("x")


def test_a_hard_link_is_a_file_like_any_other(place: Directory) -> None:
    """A hard link cannot lead out of a mount, and is read; writing unlinks it."""
    one, other = Path(place.path, "one"), Path(place.path, "other")
    one.write_text("x")
    other.hardlink_to(one)

    assert place.read("other") == b"x"
    place.write("other", b"y")
    assert one.read_text() == "x"


# -- writing ---------------------------------------------------------------------------


@every_plant
def test_writing_replaces_what_was_planted(
    place: Directory, trash: Directory, outside: Path, plant: Plant
) -> None:
    """A file is put in the place of anything, and nothing is written through it."""
    path = Path(place.path, "x")
    plant(path, outside)

    place.write("x", b"ours", trash=trash)

    assert place.names() == ["x"]
    assert path.read_bytes() == b"ours"
    assert stat.S_ISREG(path.lstat().st_mode)
    assert len(trash.names()) == (plant is _directory)


@every_plant
def test_what_is_there_can_be_left_alone(
    place: Directory, outside: Path, plant: Plant
) -> None:
    """Without replacing, whatever has the name wins, and no litter is left."""
    plant(Path(place.path, "x"), outside)
    before = Path(place.path, "x").lstat()

    with pytest.raises(FileExistsError):
        place.write("x", b"ours", replace=False)

    assert place.names() == ["x"]
    assert Path(place.path, "x").lstat() == before


def test_a_file_that_is_not_there_is_made_without_replacing(place: Directory) -> None:
    """Without replacing, the first one to write wins."""
    place.write("x", b"ours", replace=False)

    assert place.names() == ["x"]
    assert place.read("x") == b"ours"
    assert Path(place.path, "x").stat().st_nlink == 1


def test_a_directory_is_not_replaced_without_trash(place: Directory) -> None:
    """A write that cannot be done says so and leaves no temporary file."""
    Path(place.path, "x").mkdir()

    with pytest.raises(IsADirectoryError):
        place.write("x", b"ours")

    assert place.names() == ["x"]


def _swap_temporary(
    place: Directory, monkeypatch: pytest.MonkeyPatch, publisher: str
) -> None:
    """Play the agent that puts a directory where our temporary file was."""
    publish = getattr(os, publisher)

    def swap(source: str, *args: str, **options: int) -> None:
        try:
            publish(source, *args, **options)
        finally:
            with suppress(FileNotFoundError):
                Path(place.path, source).unlink()
            Path(place.path, source).mkdir()

    monkeypatch.setattr(os, publisher, swap)


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_that_was_published_is_written(
    place: Directory,
    monkeypatch: pytest.MonkeyPatch,
    *,
    replace: bool,
) -> None:
    """Whatever an agent then does with the temporary name is no failure of ours."""
    _swap_temporary(place, monkeypatch, "rename" if replace else "link")

    place.write("x", b"ours", replace=replace)

    assert place.read("x") == b"ours"


def test_why_a_write_failed_is_not_hidden_by_the_litter(
    place: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary name that cannot be removed does not replace the error."""
    Path(place.path, "x").touch()
    _swap_temporary(place, monkeypatch, "link")

    with pytest.raises(FileExistsError):
        place.write("x", b"ours", replace=False)


def test_a_published_file_is_not_removed_by_its_temporary_name(
    place: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of an agent's own that got the name in the meantime is not ours."""
    rename = os.rename

    def again(source: str, *args: str, **options: int) -> None:
        rename(source, *args, **options)  # type: ignore[arg-type]
        Path(place.path, source).touch()

    monkeypatch.setattr(os, "rename", again)

    place.write("x", b"ours")

    assert len(place.names()) == 2


def test_what_is_moved_away_is_told(
    place: Directory, trash: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    """Each discard of a wrong type is one warning, on one line; no other is any."""
    caplog.set_level(logging.DEBUG)
    Path(place.path, "a\nb").touch()
    Path(place.path, "c\nd").mkdir()
    place.subdirectory("a\nb", trash=trash).close()
    place.write("c\nd", b"ours", trash=trash)
    place.subdirectory("a\nb", trash=trash).close()
    place.write("c\nd", b"ours", trash=trash)
    place.discard("c\nd", trash)

    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"{place.path}/a\\nb must be a directory: moved to the trash"),
        ("WARNING", f"{place.path}/c\\nd must be a file: moved to the trash"),
    ]


def test_a_reader_sees_all_of_a_file_or_nothing(place: Directory) -> None:
    """However often a file is written, whoever reads it gets one of the writes."""
    pages = [bytes([digit]) * 100_000 for digit in b"012345"]
    done = threading.Event()

    def write() -> None:
        for _ in range(50):
            for page in pages:
                place.write("x", page)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = {place.read("x")}
    while not done.is_set():
        seen.add(place.read("x"))
    writer.join()

    assert seen <= {None, *pages}


@needs_root
def test_a_file_for_an_agent_is_the_agent_s(place: Directory) -> None:
    """What root writes for an agent belongs to the agent, from the first moment."""
    place.write("x", b"", owner=Owner(12345, 23456), mode=0o640)

    status = Path(place.path, "x").stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)
    assert stat.S_IMODE(status.st_mode) == 0o640


def test_who_is_not_root_keeps_what_he_makes(place: Directory) -> None:
    """A user cannot give files away, and does not try."""
    with unprivileged(place):
        place.write("x", b"ours", owner=Owner(1, 1))
        place.subdirectory("d", owner=Owner(1, 1)).close()
        assert place.read("x") == b"ours"


@pytest.mark.parametrize(
    "name", ["\U0001f600" * 63, "a" * 255, "\udcff" * 255], ids=["emoji", "a", "bytes"]
)
def test_the_longest_names_can_be_written_and_thrown_away(
    place: Directory, trash: Directory, name: str
) -> None:
    """A name that fills NAME_MAX, in whatever bytes, is a name like any other."""
    place.write(name, b"x")
    place.discard(name, trash)

    assert place.names() == []
    assert trash.empty(10)
    assert trash.names() == []


# -- directories -----------------------------------------------------------------------


@every_plant
def test_a_directory_takes_the_place_of_what_was_planted(
    place: Directory, trash: Directory, outside: Path, plant: Plant
) -> None:
    """What is no directory goes to the trash, unopened, and a new one is made."""
    path = Path(place.path, "x")
    plant(path, outside)

    with place.subdirectory("x", trash=trash) as directory:
        assert directory.path == f"{place.path}/x"
        assert directory.names() == (["inside"] if plant is _directory else [])

    assert stat.S_ISDIR(path.lstat().st_mode)
    assert len(trash.names()) == (plant is not _directory)


@every_plant
def test_without_trash_what_was_planted_is_refused(
    place: Directory, outside: Path, plant: Plant
) -> None:
    """Where only we write, something else in our place is an error."""
    if plant is _directory:
        return
    plant(Path(place.path, "x"), outside)

    with pytest.raises(UnsafePathError, match="must be a directory"):
        place.subdirectory("x")


def test_a_new_directory_has_the_mode(place: Directory) -> None:
    """Our own directories are closed to others."""
    place.subdirectory("x", mode=0o700).close()
    place.subdirectory("x", mode=0o755).close()

    assert stat.S_IMODE(Path(place.path, "x").stat().st_mode) == 0o700


@needs_root
def test_a_new_directory_for_an_agent_is_the_agent_s(place: Directory) -> None:
    """Made by root, it is given to the agent; one that is there stays whose it is."""
    place.subdirectory("ours").close()
    place.subdirectory("ours", owner=Owner(12345, 23456)).close()
    place.subdirectory("its", owner=Owner(12345, 23456)).close()

    status = Path(place.path, "its").stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)
    assert Path(place.path, "ours").stat().st_uid == 0


def test_a_directory_that_nobody_may_open_is_opened(
    place: Directory, trash: Directory
) -> None:
    """An agent of our own uid cannot shut us out by a mode of 000."""
    with unprivileged(place, trash):
        Path(f"/proc/self/fd/{place._fd}/x").mkdir(0o000)
        with place.subdirectory("x", trash=trash) as directory:
            directory.write("ours", b"")
        assert trash.names() == []


@needs_root
def test_a_directory_of_another_that_nobody_may_open_is_an_error(
    place: Directory, trash: Directory
) -> None:
    """What we may neither open, nor permit ourselves to, nor move, is told."""
    Path(place.path, "x").mkdir(0o000)

    with (
        unprivileged(place, trash),
        pytest.raises(UnsafePathError, match="cannot be opened: Permission denied"),
    ):
        place.subdirectory("x", trash=trash)


def test_a_directory_that_comes_back_is_an_error(
    place: Directory, trash: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is as fast as we are gets no endless race, and we leave nothing."""
    Path(place.path, "x").mkdir()
    really_rename = os.rename

    def rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        really_rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        if dst_dir_fd == trash._fd:
            Path(place.path, "x").mkdir()

    monkeypatch.setattr(os, "rename", rename)

    with pytest.raises(UnsafePathError, match="does not stay one"):
        place.write("x", b"", trash=trash)

    assert place.names() == ["x"]


def test_a_shut_directory_is_thrown_out_of(place: Directory, trash: Directory) -> None:
    """An agent of our own uid cannot keep us from moving its files away."""
    with place.subdirectory("box") as box:
        box.write("file", b"")
        with unprivileged(place, box, trash):
            box.subdirectory("directory").close()
            Path(f"/proc/self/fd/{box._fd}").chmod(0o555)
            box.discard("file", trash)
            Path(f"/proc/self/fd/{box._fd}").chmod(0o555)
            box.discard("directory", trash)

            assert box.names() == []
            assert len(trash.names()) == 2


def test_a_closed_directory_is_nobody_else_s(place: Directory, tmp_path: Path) -> None:
    """Its number may be another's by then, who must not be written to."""
    directory = place.subdirectory("x")
    directory.close()
    directory.close()
    with place.subdirectory("y") as other:
        assert other.path
        for use in (directory.names, partial(directory.write, "z", b"")):
            with pytest.raises(OSError, match="Bad file descriptor"):
                use()
        assert other.names() == []


def test_only_what_exists_is_opened(place: Directory, outside: Path) -> None:
    """A directory that is not made if it is missing; a symlink is not one."""
    assert place.existing("x") is None
    Path(place.path, "x").mkdir()
    Path(place.path, "link").symlink_to(outside.parent)

    with place.subdirectory("x") as made:
        made.write("file", b"1")
    found = place.existing("x")

    assert found is not None
    with found:
        assert found.read("file") == b"1"
    with pytest.raises(UnsafePathError, match="must be a directory"):
        place.existing("link")


def test_a_tree_is_copied_over_whatever_is_there(
    place: Directory, trash: Directory, outside: Path, tmp_path: Path
) -> None:
    """Files and directories arrive; a symlink in their place is not followed."""
    source = tmp_path / "source"
    (source / "sub" / "deep").mkdir(parents=True)
    (source / "file").write_text("new")
    (source / "sub" / "tool").write_text("run")
    (source / "sub" / "tool").chmod(0o744)
    (source / "linked").symlink_to(source / "file")
    (source / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(source / "fifo")
    target = Path(place.path)
    (target / "file").symlink_to(outside)
    (target / "sub").symlink_to(outside.parent)
    (target / "linked").mkdir()
    (target / "own").write_text("kept")
    before = outside.read_bytes()

    with Directory.at(str(source)) as original:
        place.copy_tree(original, trash, Owner(1000, 1000))

    assert outside.read_bytes() == before
    assert {path.name for path in target.iterdir()} == {"file", "sub", "linked", "own"}
    assert (target / "file").read_text() == "new"
    # A symlink is not copied: what is there stays.
    assert (target / "linked").is_dir()
    assert (target / "own").read_text() == "kept"
    assert stat.S_IMODE((target / "sub" / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "file").lstat().st_mode) == 0o644
    assert (target / "sub" / "deep").is_dir()
    assert len(trash.names()) == 1
    expected = 1000 if os.geteuid() == 0 else os.geteuid()
    assert (target / "sub" / "tool").stat().st_uid == expected


@pytest.mark.parametrize("before", ["stat", "open"])
def test_what_goes_away_meanwhile_is_not_copied(
    place: Directory,
    trash: Directory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
) -> None:
    """It is left out, not copied as if it were empty; the rest is copied."""
    source = tmp_path / "source"
    (source / "directory").mkdir(parents=True)
    (source / "file").write_text("ours")
    (source / "staying").write_text("ours")
    gone = []
    call = getattr(os, before)

    def late(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in {"directory", "file"} and name not in gone:
            gone.append(name)
            (source / name).rename(tmp_path / name)
        return call(name, *args, **kwargs)

    with Directory.at(str(source)) as original:
        monkeypatch.setattr(os, before, late)
        place.copy_tree(original, trash, Owner(1000, 1000))

    assert gone == ["directory", "file"]
    assert [path.name for path in Path(place.path).iterdir()] == ["staying"]


def test_a_tree_that_is_swapped_meanwhile_is_not_followed(
    place: Directory, trash: Directory, outside: Path, tmp_path: Path
) -> None:
    """Where an agent has got at the source, it leads nobody outside."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "file").write_text("ours")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for path, kind in ((source / "sub", "directory"), (source / "file", "")):
                with suppress(OSError):
                    path.rename(source / ".old")
                    path.symlink_to(outside.parent if kind else outside)
                    path.unlink()
                    (source / ".old").rename(path)

    agent = threading.Thread(target=swap)
    agent.start()
    try:
        with Directory.at(str(source)) as original:
            for _ in range(300):
                with suppress(UnsafePathError, FileNotFoundError):
                    place.copy_tree(original, trash, Owner(1000, 1000))
    finally:
        done.set()
        agent.join()

    copies = [path for path in Path(place.path).rglob("*") if path.is_file()]
    assert {path.read_text() for path in copies} <= {"ours"}


def test_swapping_in_a_tight_loop_never_leads_outside(
    place: Directory, trash: Directory, outside: Path
) -> None:
    """While an agent swaps a directory for a symlink, we get ours or an error."""
    path = Path(place.path, "x")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            with suppress(OSError):
                path.symlink_to(outside.parent)
            with suppress(OSError):
                path.unlink()
            with suppress(OSError):
                path.mkdir()
            with suppress(OSError):
                path.rmdir()

    home = outside.parent.stat()
    agent = threading.Thread(target=swap)
    agent.start()
    outcomes = set()
    try:
        for _ in range(3000):
            try:
                with place.subdirectory("x", trash=trash, owner=Owner(1, 1)) as ours:
                    status = os.fstat(ours._fd)
                    assert (status.st_dev, status.st_ino) != (home.st_dev, home.st_ino)
                    with suppress(FileNotFoundError):
                        ours.write("planted", b"")
                    with suppress(FileNotFoundError):
                        ours.remove("planted")
                outcomes.add("ours")
            except UnsafePathError:
                outcomes.add("refused")
            trash.empty(100)
    finally:
        done.set()
        agent.join()

    assert "ours" in outcomes
    assert outside.parent.stat().st_uid == os.geteuid()


def test_swapping_a_file_never_leads_outside(place: Directory, outside: Path) -> None:
    """While an agent swaps a file for a symlink, we read the file or nothing."""
    path = Path(place.path, "x")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            with suppress(OSError):
                path.symlink_to(outside)
            with suppress(OSError):
                path.unlink()
            path.write_text("agent's")
            with suppress(OSError):
                path.unlink()

    agent = threading.Thread(target=swap)
    agent.start()
    seen: set[bytes | None] = set()
    try:
        for _ in range(5000):
            with suppress(UnsafePathError):
                seen.add(place.read("x"))
    finally:
        done.set()
        agent.join()

    assert seen <= {None, b"", b"agent's"}


def test_a_directory_that_does_not_stay_one_is_given_up(
    place: Directory, trash: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that always wins the race gets no more than a few tries of ours."""
    Path(place.path, "x").write_text("x")
    monkeypatch.setattr(Directory, "discard", lambda *_: None)

    with pytest.raises(UnsafePathError, match="does not stay"):
        place.subdirectory("x", trash=trash)


def test_another_engine_may_make_a_directory_first(
    place: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two engines that make a directory at once, both get it."""
    real = os.mkdir

    def slow(name: str, mode: int, *, dir_fd: int) -> None:
        real(name, mode, dir_fd=dir_fd)
        real(name, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", slow)

    with place.subdirectory("x") as directory:
        assert directory.names() == []


def test_a_held_directory_is_the_one_that_was_opened(
    place: Directory, tmp_path: Path
) -> None:
    """What is held stays the same place, whatever its path becomes."""
    fd = place.hold()
    Path(place.path).rename(tmp_path / "moved")
    Path(place.path).mkdir()

    held, moved = os.fstat(fd), (tmp_path / "moved").stat()
    assert (held.st_dev, held.st_ino) == (moved.st_dev, moved.st_ino)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_removed_directory_is_an_empty_one(place: Directory) -> None:
    """An agent that removes what we hold open breaks nothing."""
    with place.subdirectory("x") as directory:
        Path(directory.path).rmdir()

        assert directory.names() == []
        assert directory.read("a") is None
        assert directory.modified("a") is None
        directory.remove("a")


# -- listing ---------------------------------------------------------------------------


def test_a_scan_is_bounded(place: Directory) -> None:
    """Of more than 1,000 entries, 1,000 are looked at."""
    for number in range(MAX_ENTRIES + 200):
        Path(place.path, f"{number}").touch()

    names = place.names()

    assert len(names) == MAX_ENTRIES
    assert names == sorted(names)
    assert len(place.names(limit=None)) == MAX_ENTRIES + 200


def test_names_may_be_any_bytes(place: Directory, trash: Directory) -> None:
    """A name that is not UTF-8 or holds a newline is listed, read and removed."""
    names = [b"\xff\xfe", b"a\nb", b"-rf", b" ", b"\xed\xa0\x80"]
    for raw in names:
        Path(place.path, os.fsdecode(raw)).write_bytes(raw)

    found = place.names()

    assert sorted(map(os.fsencode, found)) == sorted(names)
    assert [place.read(name) for name in found] == [os.fsencode(n) for n in found]
    for name in found[:2]:
        place.remove(name)
    for name in found[2:]:
        place.discard(name, trash)
    assert place.names() == []
    assert trash.empty(100)


@every_plant
def test_only_a_file_was_ever_written(
    place: Directory, outside: Path, plant: Plant
) -> None:
    """Only of a regular file is it told when it was written."""
    path = Path(place.path, "x")
    plant(path, outside)
    if plant is _file:
        os.utime(path, (1.0, 1234.5))

    assert place.modified("x") == (1234.5 if plant is _file else None)


def test_removing_what_is_not_there_is_nothing(place: Directory) -> None:
    """Two who remove the same file both succeed."""
    place.write("x", b"")
    place.remove("x")
    place.remove("x")

    assert place.names() == []


# -- the trash -------------------------------------------------------------------------


@every_plant
def test_anything_can_be_thrown_away(
    place: Directory, trash: Directory, outside: Path, plant: Plant
) -> None:
    """What was planted is moved as it is, and deleted without being followed."""
    plant(Path(place.path, "x"), outside)

    place.discard("x", trash)

    assert place.names() == []
    assert len(trash.names()) == 1
    assert trash.empty(10)
    assert trash.names() == []


def test_throwing_away_what_is_not_there_is_nothing(
    place: Directory, trash: Directory
) -> None:
    """There may be nothing to clear."""
    place.discard("x", trash)

    assert trash.names() == []


def test_things_of_one_name_do_not_meet_in_the_trash(
    place: Directory, trash: Directory
) -> None:
    """Each thing has a place of its own in the trash."""
    for _ in range(3):
        place.write("x", b"")
        place.discard("x", trash)

    assert len(trash.names()) == 3


def _dig(directory: Directory, levels: int) -> None:
    """Nest directories deeper than any path can say, a file on each level."""
    fd = os.dup(directory._fd)
    for _ in range(levels):
        os.mkdir("d" * 50, dir_fd=fd)
        inner = os.open("d" * 50, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
        os.close(os.open("file", os.O_CREAT, dir_fd=fd))
    os.close(fd)


@pytest.mark.slow
def test_a_tree_of_3000_levels_is_deleted(trash: Directory) -> None:
    """Depth costs neither recursion nor descriptors nor a long path."""
    _dig(trash, 3000)

    assert trash.empty(20_000)
    assert trash.names() == []


def test_deleting_ends_in_time_and_goes_on_later(trash: Directory) -> None:
    """A tree is deleted a little at a time, and each time gets further."""
    _dig(trash, 100)
    turns = 0
    while not trash.empty(20):
        turns += 1
        assert turns < 50

    assert turns > 5
    assert trash.names() == []


def test_a_wide_directory_is_deleted_a_little_at_a_time(trash: Directory) -> None:
    """An agent that makes very many files does not make one turn take for ever."""
    wide = Path(trash.path, "wide")
    wide.mkdir()
    for number in range(2 * MAX_ENTRIES + 500):
        (wide / f"{number}").touch()

    assert not trash.empty(1)
    assert len(list(wide.iterdir())) == MAX_ENTRIES + 500
    assert trash.empty(20_000)
    assert trash.names() == []


def test_a_tree_without_any_permission_is_deleted(
    trash: Directory, outside: Path
) -> None:
    """Modes of 000, which an agent of our own uid can set, stop nobody."""
    with unprivileged(trash):
        top = Path(f"/proc/self/fd/{trash._fd}/top")
        (top / "middle" / "bottom").mkdir(parents=True)
        (top / "middle" / "file").touch(0o000)
        (top / "link").symlink_to(outside)
        for path in (top / "middle" / "bottom", top / "middle", top):
            path.chmod(0o000)

        assert trash.empty(100)
        assert trash.names() == []


def test_an_agent_that_goes_on_writing_does_not_jam_the_trash(
    place: Directory, trash: Directory
) -> None:
    """While an agent fills what was thrown away, the rest is deleted all the same."""
    inside = place.subdirectory("x")
    place.discard("x", trash)
    done = threading.Event()

    def fill() -> None:
        for number in range(50_000):
            if done.is_set():
                return
            with suppress(OSError):
                os.close(os.open(f"{number}", os.O_CREAT, dir_fd=inside._fd))

    agent = threading.Thread(target=fill)
    agent.start()
    try:
        for _ in range(200):
            trash.empty(50)
    finally:
        done.set()
        agent.join()
        inside.close()

    assert trash.empty(100_000)
    assert trash.names() == []


def test_a_directory_that_cannot_be_removed_is_told(
    trash: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not go for another reason than its content is an error."""
    Path(trash.path, "x").mkdir()

    def busy(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rmdir", busy)

    with pytest.raises(PermissionError):
        trash.empty(10)


# -- locks -----------------------------------------------------------------------------

_TRY = """
import sys
from clawtrio._hostfs import Directory
with Directory.at(sys.argv[1]) as directory:
    try:
        with directory.lock(sys.argv[2]):
            print("mine", flush=True)
            sys.stdin.read(int(sys.argv[3]))
    except BlockingIOError:
        print("busy")
"""


def _try_elsewhere(place: Directory, name: str) -> str:
    argv = [sys.executable, "-c", _TRY, place.path, name, "0"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def test_a_lock_is_held_against_everybody(place: Directory) -> None:
    """A lock has one holder: in this process, and among all processes."""
    with place.lock("x"):
        with pytest.raises(BlockingIOError), place.lock("x"):
            pass
        assert _try_elsewhere(place, "x") == "busy\n"
        assert _try_elsewhere(place, "y") == "mine\n"
    assert _try_elsewhere(place, "x") == "mine\n"
    assert place.names() == ["x", "y"]


def test_a_lock_dies_with_its_process(place: Directory) -> None:
    """SIGKILL lets go of a lock."""
    argv = [sys.executable, "-c", _TRY, place.path, "x", "1"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mine\n"
        with pytest.raises(BlockingIOError), place.lock("x"):
            pass
        holder.kill()

    with place.lock("x"):
        pass


def test_a_lock_is_let_go_though_a_child_has_its_descriptor(place: Directory) -> None:
    """A process that is just being spawned does not keep a lock that was let go."""
    with place.lock("x") as fd:
        copy = os.dup(fd)
    try:
        with place.lock("x"):
            pass
    finally:
        os.close(copy)


def test_a_lock_is_let_go_after_an_error(place: Directory) -> None:
    """An exception in the block lets go of the lock."""
    with pytest.raises(ZeroDivisionError), place.lock("x"):
        raise ZeroDivisionError

    with place.lock("x"):
        pass


def test_a_lock_file_is_private(place: Directory) -> None:
    """Others cannot open the file, and so cannot hold the lock."""
    with place.lock("x") as fd:
        assert not os.get_inheritable(fd)

    assert stat.S_IMODE(Path(place.path, "x").stat().st_mode) == 0o600


def test_a_symlink_is_not_locked(place: Directory, outside: Path) -> None:
    """A lock is on our own file."""
    Path(place.path, "x").symlink_to(outside)

    with pytest.raises(OSError, match="symbolic"), place.lock("x"):
        pass


def test_a_claimed_file_is_locked_before_it_is_seen(place: Directory) -> None:
    """Whoever sees the file sees it whole, and cannot lock it while it is held."""
    stop = threading.Event()
    seen: set[bytes | None] = set()
    stolen: list[str] = []

    def look() -> None:
        while not stop.is_set():
            for name in place.names():
                if name.startswith("c"):
                    seen.add(place.read(name))
                    with suppress(BlockingIOError), place.lock(name):
                        stolen.append(name)

    watcher = threading.Thread(target=look)
    with ExitStack() as claims:
        watcher.start()
        for number in range(300):
            claims.enter_context(place.claim(f"c{number}", b"content"))
        stop.set()
        watcher.join()

    assert stolen == []
    assert seen <= {b"content"}
    assert len(place.names()) == 300


def test_a_claim_that_was_let_go_stays_to_be_found(place: Directory) -> None:
    """The file of a dead engine can be locked, and still says what it was."""
    with place.claim("x", b"docker"):
        assert _try_elsewhere(place, "x") == "busy\n"

    assert place.read("x") == b"docker"
    assert _try_elsewhere(place, "x") == "mine\n"


# -- trust -----------------------------------------------------------------------------


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """Make a place some levels down."""
    path = tmp_path / "a" / "b" / "c"
    path.mkdir(parents=True)
    return path


def test_a_place_of_ours_is_trusted(deep: Path) -> None:
    """What is ours, below sticky /tmp, is good enough."""
    check_trusted(str(deep), US, GIDS)


def test_sticky_tmp_is_trusted() -> None:
    """A sticky directory is writable by all, but nobody can replace our entries."""
    check_trusted("/tmp", US, GIDS)  # the real one is meant


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    ("mode", "advice"), [(0o757, "anybody: chmod o-w"), (0o702, "anybody")]
)
def test_a_place_that_anybody_can_write_is_refused(
    deep: Path, level: int, mode: int, advice: str
) -> None:
    """Whether it is the place or an ancestor, the error names it and the remedy."""
    loose = [deep, *deep.parents][level]
    loose.chmod(mode)

    with pytest.raises(UnsafePathError, match=advice) as caught:
        check_trusted(str(deep), US, GIDS)

    assert caught.value.path == str(loose)


@needs_root
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_place_of_somebody_else_is_refused(deep: Path, level: int) -> None:
    """Who owns an ancestor can replace what is below it."""
    foreign = [deep, *deep.parents][level]
    os.chown(foreign, 12345, 0)

    with pytest.raises(UnsafePathError, match="belongs to uid 12345, must") as caught:
        check_trusted(str(deep), US, GIDS)

    assert caught.value.path == str(foreign)
    check_trusted(str(deep), US | {12345}, GIDS)


@needs_root
def test_a_group_that_can_write_must_be_ours(deep: Path) -> None:
    """Group-writable is fine for our own group, and for nobody else's."""
    deep.parent.chmod(0o775)
    check_trusted(str(deep), US, GIDS)
    os.chown(deep.parent, 0, 12345)

    with pytest.raises(UnsafePathError, match="gid 12345: chmod g-w") as caught:
        check_trusted(str(deep), US, GIDS)

    assert caught.value.path == str(deep.parent)
    check_trusted(str(deep), US, GIDS | {12345})
    deep.parent.chmod(0o1775)
    check_trusted(str(deep), US, GIDS)


def test_a_symlink_of_ours_may_lead_to_a_trusted_place(
    deep: Path, tmp_path: Path
) -> None:
    """A root may be reached by links of our own."""
    (tmp_path / "link").symlink_to("a")

    check_trusted(str(tmp_path / "link" / "b" / "c"), US, GIDS)


def test_where_a_symlink_leads_is_looked_at(deep: Path, tmp_path: Path) -> None:
    """A link of ours into a place that anybody can write is refused."""
    (tmp_path / "link").symlink_to(deep)
    deep.parent.chmod(0o777)

    with pytest.raises(UnsafePathError, match="anybody") as caught:
        check_trusted(str(tmp_path / "link"), US, GIDS)

    assert caught.value.path == str(deep.parent)


def test_where_a_symlink_passes_through_is_looked_at(
    deep: Path, tmp_path: Path
) -> None:
    """Every link of a chain is in a place where nobody can replace it."""
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "second").symlink_to(deep)
    (tmp_path / "first").symlink_to("loose/second")
    check_trusted(str(tmp_path / "first"), US, GIDS)
    (tmp_path / "loose").chmod(0o777)

    with pytest.raises(UnsafePathError, match="anybody") as caught:
        check_trusted(str(tmp_path / "first"), US, GIDS)

    assert caught.value.path == str(tmp_path / "loose")


@needs_root
def test_a_symlink_of_somebody_else_is_refused(deep: Path, tmp_path: Path) -> None:
    """Who owns a link can lead it elsewhere."""
    link = tmp_path / "link"
    link.symlink_to(deep)
    os.lchown(link, 12345, 12345)

    with pytest.raises(UnsafePathError, match="belongs to uid 12345") as caught:
        check_trusted(str(link), US, GIDS)

    assert caught.value.path == str(link)


@pytest.mark.parametrize("name", ["missing", "missing/below", "link/below"])
def test_a_place_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    """What does not exist has to be made first."""
    (tmp_path / "link").symlink_to("nowhere")

    with pytest.raises(UnsafePathError, match="make it first"):
        check_trusted(str(tmp_path / name), US, GIDS)


@pytest.mark.parametrize("name", ["file/below", "loop/below"])
def test_a_place_that_cannot_be_reached_is_refused(tmp_path: Path, name: str) -> None:
    """A path through a file, or round in circles, is our error and no other."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")

    with pytest.raises(UnsafePathError):
        check_trusted(str(tmp_path / name), US, GIDS)


def test_no_descriptor_is_left_when_there_are_none(place: Directory) -> None:
    """Running out of descriptors is an OSError, and over once there are some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = place.hold()
    resource.setrlimit(resource.RLIMIT_NOFILE, (held, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            place.write("x", b"")
        with pytest.raises(UnsafePathError):
            place.read("x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(held)

    assert place.names() == []
