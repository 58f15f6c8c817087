"""What a container sees of the host."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st

from clawtrio import Group, Settings, UnsafePathError
from clawtrio._groups import Places, open_places
from clawtrio._mounts import check_mountable, container_directory, hold_mounts
from clawtrio._runtimes import HeldMount

from .helpers import open_descriptors

GROUP = Group("Family", "family")


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
def mounts_of(places: Places, *, ours: bool = True) -> Iterator[dict[str, HeldMount]]:
    """Hold the mounts of a run, by their place in the container."""
    with (
        places.open_ipc(GROUP) as ipc,
        hold_mounts(places, GROUP, ipc, own_runner=ours) as mounts,
    ):
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
