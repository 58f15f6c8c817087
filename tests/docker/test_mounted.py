"""What is mounted is what was checked, under whatever name."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio

from clawtrio._docker import DockerRuntime, _compare_mounts
from clawtrio._errors import UnsafePathError
from clawtrio._runtimes import ContainerSpec

from .conftest import UID, House, finish, run

#: Says what is mounted below /workspace/extra, once its stdin has ended.
SHOW = """
import json, os, sys
sys.stdin.read()
os.chdir("/workspace/extra")
print(json.dumps({name: open(name + "/it").read() for name in sorted(os.listdir())}))
"""

NAMES = [
    "a,b",
    'say "hi"',
    '",readonly,"',
    "c:d",
    "back\\slash\\",
    " spaces ",
    "$HOME=`x`",
    "é\u202e😀",
    "n" * 255,
]


def make(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "it").write_text(content)
    os.chown(path, UID, UID)
    return path


async def test_odd_names(runtime: DockerRuntime, house: House, tmp_path: Path) -> None:
    """Commas, quotes, colons and long names, outside and inside, mean themselves."""
    sources = [make(tmp_path / name, name) for name in NAMES]
    mounts = [
        house.hold(source, f"/workspace/extra/{source.name}", readonly=True)
        for source in sources
        if source.name != " spaces "  # outside only: Docker's client trims no value
    ]
    spec = house.spec(SHOW, *mounts)

    with trio.fail_after(30):
        container = await runtime.start(spec)
        await container.verify()
        await container.stdin.aclose()
        result = await finish(container)

    expected = {name: name for name in NAMES if name != " spaces "}
    assert json.loads(result.stdout) == expected


@pytest.mark.parametrize("name", [b"a\xffb", b"a\r\nb", b"a\x7f", b"a\xc2\x85b"])
async def test_misread_names_are_refused(
    runtime: DockerRuntime, house: House, tmp_path: Path, name: bytes
) -> None:
    """Names for which another directory would be mounted never reach the client."""
    source = make(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), "")
    spec = house.spec("print(1)", house.hold(source, "/workspace/extra/x"))

    with pytest.raises(UnsafePathError) as caught:
        await runtime.start(spec)

    assert caught.value.path == str(source)


async def test_readonly_and_writable(
    runtime: DockerRuntime, house: House, tmp_path: Path
) -> None:
    """A read-only mount cannot be written to, its neighbour can."""
    mounts = [
        house.hold(make(tmp_path / "ro", "1"), "/workspace/extra/ro", readonly=True),
        house.hold(make(tmp_path / "rw", "1"), "/workspace/extra/rw"),
    ]
    program = """
for name in "ro", "rw":
    try:
        open(f"/workspace/extra/{name}/new", "w").close(); print(name, "written")
    except OSError as exc:
        print(name, exc.strerror)
"""
    result = await run(runtime, house.spec(program, *mounts))

    assert result.stdout == "ro Read-only file system\nrw written\n"


@pytest.fixture
def submount(tmp_path: Path) -> Iterator[Path]:
    """Have a directory with another file system mounted in it."""
    outer = make(tmp_path / "outer", "1")
    inner = outer / "inner"
    inner.mkdir()
    mount = ["mount", "-t", "tmpfs", "clawtrio-test", str(inner)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs to mount something")
    inner.joinpath("secret").touch()
    inner.chmod(0o777)
    yield outer
    subprocess.run(["umount", str(inner)], check=True)


@pytest.mark.parametrize("readonly", [True, False])
async def test_submounts_stay_outside(
    runtime: DockerRuntime, house: House, submount: Path, *, readonly: bool
) -> None:
    """What is mounted below a granted directory was not granted, and does not show."""
    mount = house.hold(submount, "/workspace/extra/x", readonly=readonly)
    program = "import os; print(os.listdir('/workspace/extra/x/inner'))"

    result = await run(runtime, house.spec(program, mount))

    assert result.stdout == "[]\n"


async def test_home_of_the_sessions(
    runtime: DockerRuntime, house: House, tmp_path: Path
) -> None:
    """A directory is mounted into the fresh HOME, and a single file elsewhere."""
    claude = house.hold(make(tmp_path / "claude", "1"), "/home/node/.claude")
    one = tmp_path / "one"
    one.write_text("2")
    file = house.hold(one, "/workspace/project/one", readonly=True)
    program = """
import sys
sys.stdin.read()
open("/home/node/.claude/new", "w").write("3")
print(open("/workspace/project/one").read())
"""
    with trio.fail_after(30):
        container = await runtime.start(house.spec(program, claude, file))
        await container.verify()
        await container.stdin.aclose()
        result = await finish(container)

    assert result.stdout == "2\n", result.stderr
    assert (tmp_path / "claude" / "new").read_text() == "3"


async def verify_fails(runtime: DockerRuntime, spec: ContainerSpec) -> UnsafePathError:
    with trio.fail_after(30):
        container = await runtime.start(spec)
        with pytest.raises(UnsafePathError) as caught:
            await container.verify()
        await container.kill()
        assert (await finish(container)).stdout == ""
    return caught.value


async def test_symlink_swapped_in(
    runtime: DockerRuntime, house: House, tmp_path: Path
) -> None:
    """A directory replaced by a symlink, after it was checked, is found out."""
    source = make(tmp_path / "granted", "granted")
    secret = make(tmp_path / "secret", "secret")
    spec = house.spec(SHOW, house.hold(source, "/workspace/extra/x"))
    source.rename(tmp_path / "moved")
    source.symlink_to(secret)

    error = await verify_fails(runtime, spec)

    assert error.path == str(source)
    assert "another place" in error.problem


async def test_parent_swapped(
    runtime: DockerRuntime, house: House, tmp_path: Path
) -> None:
    """So is one whose parent was replaced, by a directory with the same name in it."""
    parent = tmp_path / "parent"
    parent.mkdir()
    source = make(parent / "x", "granted")
    spec = house.spec(SHOW, house.hold(source, "/workspace/extra/x", readonly=True))
    parent.rename(tmp_path / "moved")
    parent.mkdir()
    make(parent / "x", "secret")

    assert (await verify_fails(runtime, spec)).path == str(source)


async def test_nothing_mounted_there(runtime: DockerRuntime, house: House) -> None:
    """A target at which there is nothing is another place, too."""
    spec = house.spec(SHOW)
    container = await runtime.start(spec)
    missing = [house.hold(house.path, f"/{name}") for name in ("none", "bin/sh/x")]
    for held in missing:
        container._spec = attrs.evolve(spec, mounts=(held,))
        with trio.fail_after(30), pytest.raises(UnsafePathError):
            await container.verify()
    await container.kill()
    await finish(container)


async def test_container_is_gone(
    runtime: DockerRuntime, house: House, tmp_path: Path
) -> None:
    """There is nothing to compare, nor to protect, in a container that has left."""
    source = make(tmp_path / "granted", "granted")
    spec = house.spec("", house.hold(source, "/workspace/extra/x"))
    source.rename(tmp_path / "moved")
    make(source, "another")

    with trio.fail_after(30):
        container = await runtime.start(spec)
        await container.wait()
        await container.verify()
        await finish(container)


@pytest.mark.parametrize("leaves", [True, False])
async def test_not_to_be_compared(
    runtime: DockerRuntime,
    house: House,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    leaves: bool,
) -> None:
    """What an agent could replace must be seen, unless the container has left."""
    source = make(tmp_path / "granted", "granted")
    held = attrs.evolve(house.hold(source, "/workspace/extra/x"), replaceable=True)
    really_open = os.open

    def refuse(name: str, flags: int, *, dir_fd: int | None = None) -> int:
        if name == "mountinfo":
            raise PermissionError(13, "Permission denied")
        return really_open(name, flags, dir_fd=dir_fd)

    with trio.fail_after(30):
        assert runtime.compares_mounts
        container = await runtime.start(house.spec(SHOW, held))
        monkeypatch.setattr(os, "open", refuse)
        if leaves:
            await container.stdin.aclose()
            await container.verify()
        else:
            with pytest.raises(UnsafePathError, match="cannot be compared") as caught:
                await container.verify()
            assert caught.value.path == str(source)
            await container.kill()
        await finish(container)


async def test_process_of_something_else(runtime: DockerRuntime, house: House) -> None:
    """A number that is another process's here is not followed."""
    spec = house.spec(SHOW)
    other = house.hold(house.path, "/workspace/group")
    with trio.fail_after(30):
        container = await runtime.start(spec)
        await container.verify()
        assert container._seen is not None
        container_id, pid = container._seen
        await container.stdin.aclose()

        replaced, why = _compare_mounts(container_id, os.getpid(), [other])
        assert (replaced, why) == (None, "its process is not on this host")
        await finish(container)
        replaced, why = _compare_mounts(container_id, pid, [other])

    assert replaced is None
    assert "No such file or directory" in why
