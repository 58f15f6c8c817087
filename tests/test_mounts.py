"""What a container sees of the host."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given, strategies as st

from clawtrio import Group, Settings, UnsafePathError
from clawtrio._forbidden import Forbidden
from clawtrio._groups import Places, open_places
from clawtrio._hostfs import check_mountable
from clawtrio._mounts import container_directory, hold_mounts
from clawtrio._runtimes import HeldMount

from .helpers import open_descriptors

GROUP = Group("Family", "family")
MAIN = Group("Main", "main", is_main=True)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Count descriptors: none may be left, whatever happened."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """Hold the places of a root."""
    with open_places(Settings(root=str(tmp_path))) as places:
        yield places


@contextmanager
def mounts_of(
    places: Places, group: Group = GROUP, *, ours: bool = True
) -> Iterator[dict[str, HeldMount]]:
    """Hold the mounts of a run, by their place in the container."""
    forbidden = Forbidden(places.settings, environment={})
    with hold_mounts(places, group, forbidden, own_runner=ours) as mounts:
        by_target = {held.mount.container_path: held for held in mounts}
        assert len(by_target) == len(mounts)
        yield by_target


def test_a_group_sees_its_own(places: Places, tmp_path: Path) -> None:
    """A container has the group's directory and mailbox, to write in."""
    with mounts_of(places) as mounts:
        for target, source in {
            "/workspace/group": tmp_path / "groups" / "family",
            "/workspace/ipc": tmp_path / "data" / "ipc" / "family",
        }.items():
            assert mounts[target].mount.host_path == str(source)
            assert mounts[target].mount.readonly is False


def seen(mounts: Mapping[str, HeldMount], root: Path) -> dict[str, tuple[str, bool]]:
    """Return source, below the root, and read-only, by target."""
    return {
        target: (os.path.relpath(held.mount.host_path, root), held.mount.readonly)
        for target, held in mounts.items()
        if held.mount.host_path.startswith(str(root))
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Fill a root as a checkout of NanoClaw is, in use."""
    root = tmp_path
    for directory in (
        *(".git", ".claude/skills/setup", "store", "src", "node_modules/x"),
        *("container/agent-runner/src", "container/skills/agent-browser"),
        *("groups/main", "groups/global", "groups/family/logs"),
        *("data/sessions/family/.claude", "data/ipc/family/messages"),
    ):
        (root / directory).mkdir(parents=True)
    for file in (
        *(".env", ".env.local", ".gitignore", "package.json", "CLAUDE.md"),
        *("store/messages.db", "groups/global/CLAUDE.md", "groups/main/CLAUDE.md"),
        *("container/skills/agent-browser/SKILL.md", "src/index.ts"),
    ):
        (root / file).write_text(file)
    (root / "linked").symlink_to(root / ".env")
    os.mkfifo(root / "fifo")
    return root


def test_what_main_sees(checkout: Path) -> None:
    """Main sees the project read-only, without secrets, history, messages and data."""
    with (
        open_places(Settings(root=str(checkout))) as places,
        mounts_of(places, MAIN) as mounts,
    ):
        assert seen(mounts, checkout) == {
            "/workspace/project/.claude": (".claude", True),
            "/workspace/project/.gitignore": (".gitignore", True),
            "/workspace/project/CLAUDE.md": ("CLAUDE.md", True),
            "/workspace/project/container": ("container", True),
            "/workspace/project/groups": ("groups", True),
            "/workspace/project/node_modules": ("node_modules", True),
            "/workspace/project/package.json": ("package.json", True),
            "/workspace/project/src": ("src", True),
            "/workspace/group": ("groups/main", False),
            "/home/node/.claude": ("data/sessions/main/.claude", False),
            "/workspace/ipc": ("data/ipc/main", False),
        }


def test_what_another_group_sees(checkout: Path) -> None:
    """Another group sees its own, and the global memory read-only."""
    with (
        open_places(Settings(root=str(checkout))) as places,
        mounts_of(places) as mounts,
    ):
        assert seen(mounts, checkout) == {
            "/workspace/group": ("groups/family", False),
            "/workspace/global": ("groups/global", True),
            "/home/node/.claude": ("data/sessions/family/.claude", False),
            "/workspace/ipc": ("data/ipc/family", False),
        }


def test_the_global_memory_is_not_made(places: Places, tmp_path: Path) -> None:
    """Where there is none, none is mounted; a symlink in its place is an error."""
    with mounts_of(places) as mounts:
        assert "/workspace/global" not in mounts
    (tmp_path / "groups" / "global").symlink_to(tmp_path)

    with pytest.raises(UnsafePathError, match="must be a directory"), mounts_of(places):
        pass


def test_whatever_contains_the_data_is_not_the_project(tmp_path: Path) -> None:
    """However deep the data and the allowlist are, no mount of main leads there."""
    for path in ("var/lib/data", "conf/deep", "groups"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "var")
    settings = Settings(
        root=str(tmp_path),
        data_dir="link/lib/data",
        allowlist_path=str(tmp_path / "conf" / "deep" / "list.json"),
    )

    with open_places(settings) as places, mounts_of(places, MAIN) as mounts:
        project = [target for target in mounts if target.startswith("/workspace/proj")]
        assert project == ["/workspace/project/groups"]


def test_a_root_that_is_a_home_shows_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Main sees the project in it, not what people keep in their homes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (".ssh", ".config", ".cargo", ".claude", "snap", "src", "data"):
        (tmp_path / name).mkdir()
    for name in (".netrc", ".git-credentials", ".bash_history", "id_rsa", "notes"):
        (tmp_path / name).touch()
    settings = Settings(root=str(tmp_path), data_dir=str(tmp_path / "src" / "data"))
    (tmp_path / "src2").mkdir()

    with open_places(settings) as places, mounts_of(places, MAIN) as mounts:
        project = {t for t in mounts if t.startswith("/workspace/project")}

    assert project == {
        f"/workspace/project/{name}" for name in ("groups", "notes", "src2")
    }


def test_a_root_in_which_somebody_lives_shows_no_secrets(tmp_path: Path) -> None:
    """Not even where nobody knows that it is a home: agents run as its owner."""
    for name in (".ssh", ".config", ".aws", "data", "src", ".claude"):
        (tmp_path / name).mkdir()
    settings = Settings(root=str(tmp_path), data_dir=str(tmp_path / "elsewhere"))

    with open_places(settings) as places, mounts_of(places, MAIN) as mounts:
        project = {t for t in mounts if t.startswith("/workspace/project")}

    assert project == {
        f"/workspace/project/{name}" for name in ("groups", "src", ".claude")
    }


def test_an_entry_with_an_ambiguous_name_is_refused(
    places: Places, tmp_path: Path
) -> None:
    """It cannot be mounted, and the error says which to rename."""
    (tmp_path / "a\nb").touch()

    with pytest.raises(UnsafePathError) as caught, mounts_of(places, MAIN):
        pass

    assert caught.value.path == str(tmp_path / "a\nb")


def test_targets_are_disjoint(checkout: Path) -> None:
    """No mount lies in another, so that nobody decides where it is."""
    with (
        open_places(Settings(root=str(checkout))) as places,
        mounts_of(places, MAIN) as mounts,
    ):
        targets = sorted(map(PurePosixPath, mounts))

    assert not any(
        one.is_relative_to(other)
        for one in targets
        for other in targets
        if one is not other
    )


def test_a_writable_runner_is_the_groups_own(tmp_path: Path) -> None:
    """On demand each group has a copy of the runner, to change as it likes."""
    settings = Settings(root=str(tmp_path), writable_agent_runner=True)
    with open_places(settings) as places, mounts_of(places) as mounts:
        assert seen(mounts, tmp_path)["/app/src"] == (
            "data/sessions/family/agent-runner-src",
            False,
        )
    copy = tmp_path / "data" / "sessions" / "family" / "agent-runner-src"
    assert (copy / "__main__.py").is_file()


def test_our_runner_is_mounted_read_only(places: Places) -> None:
    """An agent cannot change the program that runs it."""
    with mounts_of(places) as mounts:
        mount = mounts["/app/src"].mount
        assert mount.readonly is True
        assert Path(mount.host_path) == container_directory() / "agent_runner"
        assert Path(mount.host_path, "__main__.py").is_file()


def test_a_foreign_image_gets_what_its_checkout_has(
    places: Places, tmp_path: Path
) -> None:
    """NanoClaw's image compiles the runner's source that is in its checkout."""
    with mounts_of(places, ours=False) as mounts:
        assert "/app/src" not in mounts
    source = tmp_path / "container" / "agent-runner" / "src"
    source.mkdir(parents=True)

    with mounts_of(places, ours=False) as mounts:
        assert mounts["/app/src"].mount.host_path == str(source)
        assert mounts["/app/src"].mount.readonly is True


def test_what_was_checked_is_held(places: Places, tmp_path: Path) -> None:
    """A source that is replaced after the check is not the one that is held."""
    with mounts_of(places) as mounts:
        source = tmp_path / "groups" / "family"
        original = source.stat()
        source.rename(tmp_path / "groups" / "moved")
        source.mkdir()
        for held in mounts.values():
            status = os.fstat(held.fd)
            assert (status.st_dev, status.st_ino) == (held.device, held.inode)
            assert not os.get_inheritable(held.fd)
        group = mounts["/workspace/group"]
        assert (group.device, group.inode) == (original.st_dev, original.st_ino)
        assert group.inode != source.stat().st_ino


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x7f", "\udcff", "a\x85"])
def test_a_root_with_an_ambiguous_name_is_refused(tmp_path: Path, name: str) -> None:
    """A path that docker would read as another is an error, which leaks nothing."""
    root = tmp_path / name
    root.mkdir()
    with open_places(Settings(root=str(root))) as places:
        before = open_descriptors()
        with pytest.raises(UnsafePathError) as caught, mounts_of(places):
            pass
        assert caught.value.path == str(root / "groups" / "family")
        assert open_descriptors() == before


@pytest.mark.parametrize(
    "name", ["a,b", "a:b", "a'\"b", "a b", "\u00e9\U0001f600", "$a"]
)
def test_a_root_with_an_odd_name_is_fine(tmp_path: Path, name: str) -> None:
    """What can be quoted can be mounted."""
    root = tmp_path / name
    root.mkdir()

    with open_places(Settings(root=str(root))) as places, mounts_of(places) as mounts:
        assert mounts["/workspace/group"].mount.host_path.startswith(str(root))


@given(path=st.text() | st.text("/a\0\n\x1f \x7e\x7f\x80\x9f\xa0\u2028\ud800\udfff"))
@example(path="/a\xffb")
@example(path="/a\udcffb")
def test_only_what_is_unambiguous_is_mounted(path: str) -> None:
    """A mountable path is UTF-8 without control characters, and nothing else is."""
    good = not {unicodedata.category(c) for c in path} & {"Cc", "Cs"}

    try:
        check_mountable(path)
    except UnsafePathError as exc:
        outcome: object = exc.path
    else:
        outcome = None

    assert outcome == (None if good else path)


def test_the_container_files_of_a_wheel_come_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wheel brings the image's files; a checkout has them beside src."""
    monkeypatch.setattr(
        "clawtrio._mounts.__file__", str(tmp_path / "src" / "clawtrio" / "_mounts.py")
    )
    assert container_directory() == tmp_path / "container"
    shipped = tmp_path / "src" / "clawtrio" / "_container"
    shipped.mkdir(parents=True)

    assert container_directory() == shipped
