"""A group's wishes for directories of the host, on the real file system."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given

from clawtrio import AdditionalMount, AllowedRoot, MountAllowlist, Settings
from clawtrio._allowlist import AllowlistFile
from clawtrio._codec_allowlist import encode_allowlist
from clawtrio._forbidden import Forbidden
from clawtrio._grants import (
    Decision,
    WritableSources,
    explain,
    grant_mounts,
)
from clawtrio._grants_sources import find_socket
from clawtrio._runtimes import HeldMount

from .helpers import open_descriptors
from .strategies import mount_trees


class World:
    """A host with a bot, an allowlist, and directories to wish for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.settings = Settings(
            root=str(place / "bot"), allowlist_path=str(place / "allow" / "list.json")
        )
        (place / "bot").mkdir()
        (place / "allow").mkdir()
        self.forbidden = Forbidden(self.settings, environment={}, fixed=[])
        self.allowlist = AllowlistFile(self.settings, self.forbidden)
        self.writable = WritableSources()

    def allow(
        self,
        *roots: AllowedRoot,
        patterns: tuple[str, ...] = (),
        non_main_read_only: bool = False,
    ) -> None:
        """Write the allowlist."""
        allowlist = MountAllowlist(roots, patterns, non_main_read_only)
        Path(self.settings.allowlist_path).write_bytes(encode_allowlist(allowlist))

    def make(self, *names: str) -> Path:
        """Make directories, and return the first."""
        for name in names:
            (self.place / name).mkdir(parents=True, exist_ok=True)
        return self.place / names[0]

    @contextmanager
    def granted(
        self, *requests: AdditionalMount, is_main: bool = True, **options: Any
    ) -> Iterator[tuple[list[HeldMount], list[tuple[AdditionalMount, str]]]]:
        """Hold what is granted for the length of the block."""
        with ExitStack() as stack:
            yield grant_mounts(
                requests,
                is_main=is_main,
                allowlist=self.allowlist,
                forbidden=self.forbidden,
                writable=self.writable,
                stack=stack,
                **{"compares": True, **options},
            )

    def explain(self, request: AdditionalMount, *, is_main: bool = True) -> Decision:
        """Decide on one wish."""
        return explain(
            request,
            is_main=is_main,
            allowlist=self.allowlist,
            forbidden=self.forbidden,
        )

    def refusal(self, path: str | Path, container_path: str | None = None) -> str:
        """Return why a wish is refused."""
        with self.granted(wish(path, container_path)) as (held, refused):
            assert held == []
            [(_, reason)] = refused
        assert reason.startswith(f"{path}: ") or "\\" in reason
        return reason


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Count descriptors: none may be left, whatever happened."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Have a host on which ``p`` may be read, and ``w`` written."""
    world = World(tmp_path)
    monkeypatch.setenv("HOME", str(world.make("home")))
    world.make("p/x", "w/y", "other")
    world.allow(root(tmp_path / "p"), root(tmp_path / "w", rw=True))
    return world


def root(path: Path | str, *, rw: bool = False) -> AllowedRoot:
    return AllowedRoot(str(path), allow_read_write=rw)


def wish(
    path: Path | str, to: str | None = None, *, rw: bool = False
) -> AdditionalMount:
    return AdditionalMount(str(path), to, readonly=not rw)


# ---------------------------------------------------------------- what is granted


def test_a_directory_in_a_root_is_held(world: World) -> None:
    """What is granted is open, known by device and inode, and read-only by default."""
    place = world.place / "p" / "x"

    with world.granted(wish(place)) as (held, refused):
        assert refused == []
        [mount] = held
        assert mount.mount.host_path == str(place)
        assert mount.mount.container_path == "/workspace/extra/x"
        assert mount.mount.readonly is True
        status = os.fstat(mount.fd)
        assert (mount.device, mount.inode) == (status.st_dev, status.st_ino)
        assert os.path.samestat(status, place.stat())


def test_a_root_itself_is_granted(world: World) -> None:
    """Not only what is in it."""
    with world.granted(wish(world.place / "p")) as (held, _):
        assert held[0].mount.host_path == str(world.place / "p")


def test_the_home_may_be_meant_by_a_tilde(world: World) -> None:
    """In wishes and in roots."""
    world.make("home/projects/x")
    world.allow(root("~/projects"))

    with world.granted(wish("~/projects/x")) as (held, refused):
        assert refused == []
        assert held[0].mount.host_path == str(world.place / "home/projects/x")


def test_a_symlink_means_what_it_leads_to(world: World) -> None:
    """A way out of a root leads to nothing, a way into it to the directory itself."""
    (world.place / "p" / "out").symlink_to(world.place / "other")
    (world.place / "other" / "in").symlink_to("../p/x")

    assert "is not in an allowed root" in world.refusal(world.place / "p" / "out")
    with world.granted(wish(world.place / "other" / "in")) as (held, _):
        assert held[0].mount.host_path == str(world.place / "p" / "x")
        assert held[0].mount.container_path == "/workspace/extra/in"


def test_a_root_may_be_a_symlink(world: World) -> None:
    """The operator's own symlinks are followed."""
    (world.place / "link").symlink_to("other")
    world.make("other/z")
    world.allow(root(world.place / "link"))

    with world.granted(wish(world.place / "link" / "z")) as (held, _):
        assert held[0].mount.host_path == str(world.place / "other" / "z")


def test_paths_are_compared_by_components(world: World) -> None:
    """What only begins like a root is not in it."""
    assert "is not in an allowed root" in world.refusal(world.make("p-not"))


@pytest.mark.parametrize(
    ("name", "rw", "is_main", "readonly"),
    [
        ("w/y", True, True, False),
        ("w/y", True, False, True),
        ("w/y", False, True, True),
        ("p/x", True, True, True),
        ("bot/shared", True, True, True),
    ],
)
def test_writing_is_for_who_asks_and_may(
    world: World, name: str, *, rw: bool, is_main: bool, readonly: bool
) -> None:
    """Who asks for more than is allowed gets less, not nothing, and is told why."""
    world.make("bot/shared")
    world.allow(
        root(world.place / "p"),
        root(world.place / "w", rw=True),
        root(world.place / "bot" / "shared", rw=True),
        non_main_read_only=True,
    )

    decision = world.explain(wish(world.place / name, rw=rw), is_main=is_main)

    assert decision.held is not None
    assert decision.held.mount.readonly is readonly
    assert decision.reason.startswith(f"allowed by root {world.place}/")
    assert (rw and readonly) == (decision.reason.count(" ") > 3)


def test_others_write_where_the_operator_lets_them(world: World) -> None:
    """Without nonMainReadOnly every group may write."""
    with world.granted(wish(world.place / "w/y", rw=True), is_main=False) as (held, _):
        assert held[0].mount.readonly is False


def test_only_false_asks_to_write(world: World) -> None:
    """A readonly that is no boolean does not make a directory writable."""
    request = AdditionalMount(world.place / "w/y", readonly=0)  # type: ignore[arg-type]

    with world.granted(request) as (held, _):
        assert held[0].mount.readonly is True


def test_the_nearest_root_counts(world: World) -> None:
    """What is written of a directory is more to the point than of one around it."""
    world.make("p/x/deep")
    world.allow(root(world.place / "p"), root(world.place / "p" / "x", rw=True))

    for name, readonly in {"p": True, "p/x": False, "p/x/deep": False}.items():
        decision = world.explain(wish(world.place / name, rw=True))
        assert decision.held is not None
        assert decision.held.mount.readonly is readonly


def test_of_the_same_root_twice_the_stricter_counts(world: World) -> None:
    """Whichever is written first."""
    world.allow(root(world.place / "p", rw=True), root(world.place / "p"))

    decision = world.explain(wish(world.place / "p" / "x", rw=True))

    assert decision.held is not None
    assert decision.held.mount.readonly is True


# ---------------------------------------------------------------- what is refused


def test_nothing_is_granted_without_an_allowlist(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """All wishes are refused, with one warning, and the remedy."""
    Path(world.settings.allowlist_path).unlink()

    for _ in range(2):
        assert "clawtrio mounts init" in world.refusal(world.place / "p" / "x")

    assert len(caplog.records) == 1


def test_nothing_is_granted_by_a_malformed_allowlist(world: World) -> None:
    """All wishes are refused with what is wrong in it."""
    Path(world.settings.allowlist_path).write_text(json.dumps({"allowedRoots": []}))
    requests = [wish(world.place / "p" / "x"), wish(world.place / "w" / "y")]

    with world.granted(*requests) as (held, refused):
        assert held == []
        assert [request for request, _ in refused] == requests
        assert all("$.blockedPatterns: must be there" in why for _, why in refused)


def test_who_wishes_for_nothing_needs_no_allowlist(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """No warning, either."""
    Path(world.settings.allowlist_path).unlink()

    with world.granted() as granted:
        assert granted == ([], [])
    assert caplog.records == []


def test_an_empty_allowlist_allows_nothing(world: World) -> None:
    """The reason says so."""
    world.allow()

    assert "allowed root (none)" in world.refusal(world.place / "p" / "x")


def _missing(place: Path) -> None:
    """Have nothing there."""


def _file(place: Path) -> None:
    place.write_text("x")


def _fifo(place: Path) -> None:
    os.mkfifo(place)


def _circle(place: Path) -> None:
    place.symlink_to(place.name)


def _dangling(place: Path) -> None:
    place.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (_missing, "does not exist"),
        (_file, "is no directory"),
        (_fifo, "is no directory"),
        (_circle, "cannot be opened: Too many levels"),
        (_dangling, "does not exist"),
    ],
)
def test_only_a_directory_is_granted(
    world: World, plant: Callable[[Path], None], reason: str
) -> None:
    """Anything else in its place is refused, and holds nobody up."""
    plant(world.place / "p" / "it")

    assert reason in world.refusal(world.place / "p" / "it")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("p/x", "must be absolute"),
        ("~other/x", "must be absolute"),
        ("", "must not be empty"),
        ("/a\nb", "must not hold control characters"),
        ("/a\0b", "must not hold control characters"),
        ("/a\udcffb", "must be UTF-8"),
        ("/" + "x" * 256, "over 255 bytes"),
        ("/" + "x/" * 5000, "cannot be opened: File name too long"),
    ],
)
def test_a_path_that_is_none_is_refused(world: World, path: str, reason: str) -> None:
    """Nothing is guessed, and nothing raises."""
    assert reason in world.refusal(path)


@pytest.mark.parametrize("name", ["a\nb", b"a\xffb".decode(errors="surrogateescape")])
def test_a_real_name_that_is_mistaken_is_refused(world: World, name: str) -> None:
    """Also where a symlink with a harmless name leads to it."""
    (world.place / "p" / name).mkdir()
    (world.place / "p" / "link").symlink_to(name)

    assert "the real path must" in world.refusal(world.place / "p" / "link")


@pytest.mark.parametrize("name", ["a,b", "a:b", 'a"b', "a'b", "é" * 127, " ", "a..b"])
def test_odd_names_are_granted(world: World, name: str) -> None:
    """What runtimes can be told is no reason to refuse."""
    (world.place / "p" / name).mkdir()

    with world.granted(wish(world.place / "p" / name, "it")) as (held, _):
        assert held[0].mount.host_path == str(world.place / "p" / name)


@pytest.mark.parametrize(
    "name", [".ssh", "my.SSH-keys", "Credentials.d", ".password-store", "a.Token.b"]
)
def test_a_blocked_pattern_is_found_in_any_component(world: World, name: str) -> None:
    """Whatever its case, wherever it is: the default ones and the operator's."""
    world.allow(root(world.place / "p"), patterns=("tOkEn",))
    deep = world.make(f"p/{name}/deep")

    reason = world.refusal(deep)

    assert f"the name {name!r} has the blocked pattern" in reason


def test_a_blocked_pattern_is_found_in_every_name_on_the_way(world: World) -> None:
    """The name of a symlink counts, and those of what it leads through."""
    world.make("p/.aws")
    (world.place / "p" / "id_rsa").symlink_to("x")
    (world.place / "p" / ".aws" / "back").symlink_to("../x")
    (world.place / "p" / "harmless").symlink_to(".aws/back")

    assert "id_rsa" in world.refusal(world.place / "p" / "id_rsa")
    assert ".aws" in world.refusal(world.place / "p" / "harmless")


def test_what_is_forbidden_is_not_granted_by_a_root(world: World) -> None:
    """Not even by one that is everything."""
    world.make("bot/groups/other", "bot/data")
    world.allow(root("/", rw=True))

    for path in ("/etc", "/proc", world.place / "bot/groups/other", world.place):
        assert "so it is never mounted" in world.refusal(path)


def test_a_root_that_does_not_exist_allows_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning; the others count."""
    _file(world.place / "file")
    world.allow(
        root(world.place / "new"), root(world.place / "file"), root(world.place / "p")
    )

    for _ in range(2):
        with world.granted(wish(world.place / "p" / "x")) as (held, _refused):
            assert len(held) == 1

    assert len(caplog.records) == 2
    assert "new is not an existing directory: it allows nothing" in caplog.text


def test_a_root_where_agents_write_allows_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """An agent could make it lead anywhere."""
    (world.place / "w" / "inner").symlink_to(world.place / "other")
    world.allow(
        root(world.place / "w", rw=True), root(world.place / "w" / "inner", rw=True)
    )

    assert "not in an allowed root" in world.refusal(world.place / "w" / "inner")

    assert "is where agents may write: it allows nothing" in caplog.text


@pytest.mark.parametrize("rw", [False, True])
def test_a_root_where_agents_write_still_forbids_to_write(
    world: World, *, rw: bool
) -> None:
    """What is set apart as read-only is not writable by the root around it."""
    world.allow(root(world.place / "w", rw=True), root(world.place / "w" / "y", rw=rw))

    decision = world.explain(wish(world.place / "w" / "y", rw=True))

    assert decision.held is not None
    assert decision.held.mount.readonly is not rw


def test_a_directory_that_moves_meanwhile_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its opening and its naming it must stay where it is."""
    real = Path.readlink

    def readlink_late(self: Path) -> Path:
        found = real(self)
        if str(self).startswith("/proc/self/fd/"):
            with suppress(FileNotFoundError):
                (world.place / "p" / "x").rmdir()
        return found

    monkeypatch.setattr(Path, "readlink", readlink_late)

    assert "was moved or removed" in world.refusal(world.place / "p" / "x")


def test_a_removed_directory_is_not_mistaken(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says of a removed one may be the name of another."""
    world.make("p/x (deleted)")
    real = Path.readlink

    def readlink_of_removed(self: Path) -> Path:
        if str(self).startswith("/proc/self/fd/"):
            (world.place / "p" / "x").rmdir()
        return real(self)

    monkeypatch.setattr(Path, "readlink", readlink_of_removed)

    assert "was moved or removed" in world.refusal(world.place / "p" / "x")


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("container_path", "target"),
    [
        (None, "x"),
        ("", "x"),
        ("docs", "docs"),
        ("a/b", "a/b"),
        ("./a//b/.", "a/b"),
        ("a..b", "a..b"),
        ("a:b,c", "a:b,c"),
        ("a b", "a b"),
    ],
)
def test_a_target_is_in_extra(
    world: World, container_path: str | None, target: str
) -> None:
    """Under its own name or the one that is wished for, normalised."""
    with world.granted(wish(world.place / "p" / "x", container_path)) as (held, _):
        assert held[0].mount.container_path == f"/workspace/extra/{target}"


@pytest.mark.parametrize(
    ("container_path", "reason"),
    [
        ("..", "must be relative and without '..'"),
        ("a/../../group", "must be relative and without '..'"),
        ("/etc", "must be relative and without '..'"),
        (" ", "must not be empty"),
        (".", "must not be empty"),
        ("./", "must not be empty"),
        ("a\nb", "the container path must not hold control characters"),
        ("a\udcff", "the container path must be UTF-8"),
        ("x" * 256, "over 255 bytes"),
        ("x/" * 600, "over 1024 bytes"),
    ],
)
def test_a_target_elsewhere_is_refused(
    world: World, container_path: str, reason: str
) -> None:
    """A container sees nothing in the place of what is its own."""
    assert reason in world.refusal(world.place / "p" / "x", container_path)


@pytest.mark.parametrize(
    ("first", "second"), [("a", "a"), ("a", "./a/b"), ("a/b/c", "a"), ("a", "a/")]
)
def test_overlapping_targets_are_refused(world: World, first: str, second: str) -> None:
    """No mount is in another; the first wish is granted."""
    requests = wish(world.place / "p" / "x", first), wish(world.place / "w", second)

    with world.granted(*requests) as (held, refused):
        assert [mount.mount.host_path for mount in held] == [f"{world.place}/p/x"]
        assert "choose another container path" in refused[0][1]


def test_targets_side_by_side_are_granted(world: World) -> None:
    """A refused wish takes no target from the others."""
    requests = [
        wish(world.place / "other", "a"),
        wish(world.place / "p" / "x", "a"),
        wish(world.place / "p" / "x", "ab"),
    ]

    with world.granted(*requests) as (held, refused):
        targets = [mount.mount.container_path for mount in held]
        assert targets == ["/workspace/extra/a", "/workspace/extra/ab"]
        assert len(refused) == 1


# ---------------------------------------------------------------- live runs


def test_what_is_in_a_live_run_s_directory_is_refused(world: World) -> None:
    """Its agent could swap it; so could it a symlink on the way."""
    (world.place / "w" / "link").symlink_to("../p/x")

    with world.granted(wish(world.place / "w", rw=True)):
        for name in ("y", "link"):
            reason = world.refusal(world.place / "w" / name)
            assert "where a live run can write" in reason

    with world.granted(wish(world.place / "w" / "y")) as (held, _):
        assert len(held) == 1


def test_groups_may_share_a_directory(world: World) -> None:
    """The same one may be written by two; it stays closed until both are over."""
    shared = wish(world.place / "w", rw=True)
    with world.granted(shared):
        with world.granted(shared) as (held, _):
            assert held[0].mount.readonly is False
        assert "live run" in world.refusal(world.place / "w" / "y")


def test_what_a_live_run_only_reads_is_open(world: World) -> None:
    """Nobody can swap anything there."""
    with (
        world.granted(wish(world.place / "w")),
        world.granted(wish(world.place / "w" / "y")) as (held, _),
    ):
        assert len(held) == 1


def test_a_run_s_own_wishes_do_not_stand_in_each_other_s_way(world: World) -> None:
    """Its agent is not there yet, whichever is written first."""
    requests = [wish(world.place / "w", rw=True), wish(world.place / "w" / "y")]

    for wishes in (requests, requests[::-1]):
        with world.granted(*wishes) as (held, _):
            assert len(held) == 2


def test_an_agent_may_replace_what_is_in_a_writable_root(world: World) -> None:
    """It is not for runtimes that cannot tell what they have mounted."""
    for name, expected in (("w/y", True), ("w", False), ("p/x", False)):
        with world.granted(wish(world.place / name)) as (held, _):
            assert held[0].replaceable is expected
        with world.granted(wish(world.place / name), compares=False) as (held, refused):
            assert len(held) == (not expected)
            assert all("cannot tell what it mounts" in reason for _, reason in refused)


# ---------------------------------------------------------------- sockets


def listen(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        # Not by its own path, which may be too long for a socket.
        here = os.open(place.parent, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/{place.name}")
        os.close(here)


def test_a_socket_is_warned_about(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Through a read-only mount it can be connected to all the same."""
    world.make("p/x/deep\u202e")
    listen(world.place / "p/x/deep\u202e/sock")
    logger = logging.LoggerAdapter(logging.getLogger("clawtrio.run"), {"run": "1"})

    with world.granted(wish(world.place / "p" / "x"), logger=logger) as (held, _):
        assert len(held) == 1

    [record] = caplog.records
    assert (record.name, record.levelno) == ("clawtrio.run", logging.WARNING)
    assert f"connect to {world.place}/p/x/deep\\u202e/sock" in record.getMessage()


def test_a_search_for_sockets_is_bounded(world: World) -> None:
    """It looks at so many entries, the nearest first, and no further."""
    place = world.make("p/x", *(f"p/x/{n}/deep" for n in range(9)))
    listen(world.place / "p/x/8/deep/sock")
    fd = os.open(place, os.O_PATH)
    try:
        assert find_socket(fd) == "8/deep/sock"
        assert find_socket(fd, limit=10) is None
    finally:
        os.close(fd)


def test_a_search_for_sockets_passes_over_what_may_not_be_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a warning's matter, no more."""
    place = world.make("p/x", "p/x/closed")
    fd = os.open(place, os.O_PATH)

    def refuse(*args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    try:
        assert find_socket(fd) is None
    finally:
        os.close(fd)


# ---------------------------------------------------------------- any tree at all


class Oracle:
    """Says what paths mean, naively: from the end, by recursion over strings."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._links = 0

    def resolve(self, path: str) -> str:
        """Return the real path, "" for "/"; remember the names met on the way."""
        if not path:
            return ""
        parent, _, name = path.rpartition("/")
        base = self.resolve(parent)
        if name in ("", "."):
            return base
        if name == "..":
            return base.rpartition("/")[0]
        entry = f"{base}/{name}"
        self.seen.update(entry.split("/"))
        if not Path(entry).is_symlink():
            return entry
        self._links += 1
        if self._links > 40:
            raise RecursionError
        target = str(Path(entry).readlink())
        return self.resolve(target if target.startswith("/") else f"{base}/{target}")


def real_directory(path: str) -> str | None:
    with suppress(RecursionError):
        found = Oracle().resolve(path)
        # A missing directory does not come back by "..", other than in a string.
        if Path(path).is_dir():
            return found
    return None


def plant_tree(base: Path, tree: dict[str, Any]) -> None:
    for names in tree["directories"]:
        with suppress(FileExistsError, NotADirectoryError):
            base.joinpath(*names).mkdir(parents=True)
    for names, target, absolute in tree["links"]:
        place = base.joinpath(*names)
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            start = str(base) if absolute else "."
            place.symlink_to("/".join([start, *target]))


@given(tree=mount_trees())
@example(
    tree={
        "directories": [["k1", "k2"], ["\u00e4"]],
        "links": [(["k1", "\u00df"], ["..", "\u00e4"], False)],
        "roots": [(["k1"], True), (["k1", "\u00df"], False)],
        "patterns": [],
        "wishes": [(["k1", "\u00df"], True), (["k1", "k2"], True)],
    }
)
def test_what_is_granted_is_in_a_root_and_matches_no_pattern(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    """Whatever the tree, after symlinks; with read-only roots no other is refused."""
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as place:
        world = World(Path(place))
        base = world.make("tree")
        plant_tree(base, tree)
        roots = [("/".join([str(base), *names]), rw) for names, rw in tree["roots"]]
        world.allow(
            *(root(path, rw=rw) for path, rw in roots), patterns=tuple(tree["patterns"])
        )
        wishes = [
            wish("/".join([str(base), *names]), f"w{n}", rw=rw)
            for n, (names, rw) in enumerate(tree["wishes"])
        ]
        tops = [(real_directory(path), rw) for path, rw in roots]
        with world.granted(*wishes) as (held, _):
            by_target = {mount.mount.container_path: mount for mount in held}
            for request in wishes:
                mount = by_target.get(f"/workspace/extra/{request.container_path}")
                permitted = judge(request.host_path, tops, tree["patterns"], world)
                if mount is None:
                    assert permitted is None or any(rw for _, rw in roots)
                    continue
                assert permitted is not None
                real, writable = permitted
                assert mount.mount.host_path == real
                assert os.path.samestat(os.fstat(mount.fd), Path(real).stat())
                assert mount.mount.readonly or (writable and not request.readonly)


def judge(
    path: str, tops: list[tuple[str | None, bool]], patterns: list[str], world: World
) -> tuple[str, bool] | None:
    """Say what may be granted at most: the real path, and whether to write."""
    oracle = Oracle()
    try:
        real = oracle.resolve(path)
    except RecursionError:
        return None
    names = {name.casefold() for name in oracle.seen}
    inside = [rw for top, rw in tops if top and f"{real}/".startswith(f"{top}/")]
    # The allowlist and the bot are beside the tree.
    around = f"{world.place}/".startswith(f"{real}/")
    blocked = any(pattern.casefold() in name for pattern in patterns for name in names)
    if not Path(path).is_dir() or not inside or blocked or around:
        return None
    return real, any(inside)


# ---------------------------------------------------------------- races


def swap_forever(places: list[Callable[[], None]], over: threading.Event) -> None:
    while not over.is_set():
        for place in places:
            place()


def test_what_was_checked_is_what_is_held(world: World) -> None:
    """Symlinks and directories swapped in a tight loop never let another one in."""
    base = world.place / "p"
    world.make("p/good/leaf", "p/swapped/leaf", "outside/leaf")
    good, bad = base / "good", world.place / "outside"

    def point(name: str, target: Path) -> None:
        (base / f"{name}.new").symlink_to(target)
        (base / f"{name}.new").rename(base / name)

    def exchange() -> None:
        (base / "swapped").rename(base / "aside")
        (base / "swapped").symlink_to(bad)
        (base / "swapped").unlink()
        (base / "aside").rename(base / "swapped")

    over = threading.Event()
    swaps = [lambda: point("link", good), lambda: point("link", bad), exchange]
    allowed = {
        (status.st_dev, status.st_ino)
        for place in (good, good / "leaf", base / "swapped", base / "swapped" / "leaf")
        for status in [place.stat()]
    }
    point("link", good)
    thread = threading.Thread(target=swap_forever, args=(swaps, over))
    thread.start()
    outcomes = {True: 0, False: 0}
    try:
        for _ in range(300):
            requests = [
                wish(base / name, str(n))
                for n, name in enumerate(
                    ["link", "link/leaf", "swapped", "swapped/leaf"]
                )
            ]
            with world.granted(*requests) as (held, refused):
                for mount in held:
                    status = os.fstat(mount.fd)
                    assert (status.st_dev, status.st_ino) in allowed
                    assert (mount.device, mount.inode) in allowed
                outcomes[True] += len(held)
                outcomes[False] += len(refused)
    finally:
        over.set()
        thread.join()
    shutil.rmtree(bad)

    # Else nothing was swapped while it mattered.
    assert min(outcomes.values()) > 10
