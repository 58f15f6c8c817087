"""Real containers. Whatever a test does, none of its containers may be left."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import attrs
import pytest
import trio

from clawtrio._docker import DockerRuntime
from clawtrio._errors import RuntimeUnavailableError
from clawtrio._flavours import FLAVOURS, Flavour
from clawtrio._image import build_image
from clawtrio._models import VolumeMount
from clawtrio._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    Container,
    ContainerSpec,
    HeldMount,
)

BASE_IMAGE = "clawtrio-base:bookworm"
IMAGE = "clawtrio-test-docker:latest"
UID = 1000

Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a client on the PATH that answers as told, and nothing else."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", os.fspath(bin_dir))

    def make(name: str, **answers: tuple[int, str, str]) -> None:
        cases = []
        for command, (code, stdout, stderr) in answers.items():
            out = bin_dir / f"{command}.out"
            err = bin_dir / f"{command}.err"
            out.write_text(stdout)
            err.write_text(stderr)
            act = f"/bin/cat '{out}'; /bin/cat '{err}' >&2; exit {code}"
            cases.append(f"{command}) {act};;")
        client = bin_dir / name
        client.write_text("#!/bin/sh\ncase $1 in\n" + "\n".join(cases) + "\nesac\n")
        client.chmod(0o755)

    return make


@cache
def _why_not(name: str) -> str | None:
    """Build the image once; say what stands in the way."""
    if shutil.which(name) is None:
        return f"{name} is not installed"
    inspect = [name, "image", "inspect", BASE_IMAGE]
    if subprocess.run(inspect, capture_output=True, check=False).returncode:
        return f"{name} does not answer, or has no {BASE_IMAGE}"

    async def build() -> None:
        with trio.fail_after(900):  # the first time it fetches Claude
            await build_image(name, image=IMAGE, base_image=BASE_IMAGE, on_line=print)

    try:
        trio.run(build)
    except RuntimeUnavailableError as exc:  # test_image.py fails for it, once
        return str(exc)
    return None


@pytest.fixture(
    params=[
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("podman", marks=pytest.mark.podman),
    ]
)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    if reason := _why_not(request.param):
        pytest.skip(reason)
    return FLAVOURS[request.param]


@pytest.fixture
async def runtime(flavour: Flavour) -> DockerRuntime:
    """A runtime that has been checked."""
    runtime = DockerRuntime(flavour, image=IMAGE)
    with trio.fail_after(30):
        await runtime.check()
    return runtime


@attrs.define
class Finished:
    code: int
    stdout: str
    stderr: str


@attrs.define
class House:
    """What a test's containers are made from, under one label."""

    path: Path
    root: str
    held: contextlib.ExitStack

    @property
    def group(self) -> Path:
        return self.path / "group"

    def hold(self, source: Path, target: str, *, readonly: bool = False) -> HeldMount:
        fd = os.open(source, os.O_PATH)
        self.held.callback(os.close, fd)
        status = os.fstat(fd)
        mount = VolumeMount(os.fspath(source), target, readonly)
        return HeldMount(mount, fd, status.st_dev, status.st_ino)

    def spec(
        self,
        program: str,
        *mounts: HeldMount,
        arguments: tuple[str, ...] = ("one", "two words"),
        environment: dict[str, str] | None = None,
        memory: int = 128 * 2**20,
        pids: int = 64,
    ) -> ContainerSpec:
        """Have *program* run as the agent, in a container of its own."""
        run = uuid.uuid4().hex
        source = self.path / f"src-{run}"
        source.mkdir(mode=0o755)
        (source / "__main__.py").write_text(program)
        return ContainerSpec(
            name=f"clawtrio-test-{run}",
            labels={LABEL_ROOT: self.root, LABEL_ENGINE: "engine", LABEL_RUN: run},
            mounts=(
                self.hold(source, "/app/src", readonly=True),
                self.hold(self.group, "/workspace/group"),
                *mounts,
            ),
            environment={"HOME": "/home/node", **(environment or {})},
            arguments=arguments,
            uid=UID,
            gid=UID,
            memory=memory,
            cpus=2,
            pids=pids,
        )


@pytest.fixture
def house(tmp_path: Path, flavour: Flavour) -> Iterator[House]:
    """Make specs; afterwards, no container made from them may exist."""
    root = f"test-{uuid.uuid4().hex}"
    group = tmp_path / "group"
    group.mkdir()
    os.chown(group, UID, UID)
    with contextlib.ExitStack() as held:
        yield House(tmp_path, root, held)
    ps = [flavour.name, "ps", "-aq", "--no-trunc", "--filter"]
    ps.append(f"label={LABEL_ROOT}={root}")
    left: list[str] = []
    for _ in range(30):
        done = subprocess.run(ps, capture_output=True, check=True, text=True)
        left = done.stdout.split()
        if not left:
            return
        time.sleep(0.1)
    for command in flavour.remove:
        remove = [flavour.name, *command, *left]
        subprocess.run(remove, check=False, capture_output=True)
    pytest.fail(f"left behind: {left}")


async def read_all(stream: trio.abc.ReceiveStream) -> str:
    return b"".join([chunk async for chunk in stream]).decode()


async def read_line(stream: trio.abc.ReceiveStream) -> str:
    data = b""
    while not data.endswith(b"\n"):
        chunk = await stream.receive_some(1)
        assert chunk, data
        data += chunk
    return data.decode().rstrip("\n")


async def finish(container: Container) -> Finished:
    """Read a container to its end."""
    result = Finished(-1, "", "")

    async def read_stderr() -> None:
        result.stderr = await read_all(container.stderr)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_stderr)
            result.stdout = await read_all(container.stdout)
        result.code = await container.wait()
    finally:
        await container.aclose()
    return result


async def run(runtime: DockerRuntime, spec: ContainerSpec) -> Finished:
    """Run a container that needs no input to its end."""
    with trio.fail_after(60):
        container = await runtime.start(spec)
        await container.stdin.aclose()
        return await finish(container)
