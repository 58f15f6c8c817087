"""Real sandboxes, as whoever runs the tests; ``test_as_user.py`` runs them again."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import attrs
import pytest
import trio

from clawtrio._bwrap import BwrapRuntime
from clawtrio._models import VolumeMount
from clawtrio._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    Container,
    ContainerSpec,
    HeldMount,
)

IS_ROOT = os.geteuid() == 0
#: Whom root's agents run as; a user's run as that user.
UID = 1000 if IS_ROOT else os.getuid()
GID = 1000 if IS_ROOT else os.getgid()

ENVIRONMENT = {
    "HOME": "/home/node",
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "PYTHONUNBUFFERED": "1",
    "TZ": "UTC",
}


@attrs.frozen
class Finished:
    code: int
    stdout: str
    stderr: str
    failure: str | None

    @property
    def answer(self) -> Any:
        """What the agent printed, as JSON."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)


@attrs.define
class Sandbox:
    """Makes agents of Python source, and sandboxes around them."""

    path: Path
    held: ExitStack
    runtime: BwrapRuntime = attrs.field(factory=BwrapRuntime)
    agents: int = 0

    @property
    def group(self) -> Path:
        """What the agent sees as /workspace/group."""
        return self.path / "group"

    def directory(self, name: str) -> Path:
        """Make a directory that the agent may write in, if it is mounted so."""
        path = self.path / name
        path.mkdir(parents=True)
        if IS_ROOT:
            os.chown(path, UID, GID)
        return path

    def hold(self, source: Path, target: str, *, readonly: bool) -> HeldMount:
        """Do to a mount what the engine's checks do."""
        fd = os.open(source, os.O_PATH)
        self.held.callback(os.close, fd)
        found = os.fstat(fd)
        mount = VolumeMount(str(source), target, readonly)
        return HeldMount(mount, fd, found.st_dev, found.st_ino)

    def spec(
        self,
        agent: str,
        *,
        mounts: Sequence[HeldMount] = (),
        environment: Mapping[str, str] = ENVIRONMENT,
        run: str = "a run",
        memory: int = 2**31,
        pids: int = 512,
    ) -> ContainerSpec:
        """Describe a sandbox whose agent runner is *agent*."""
        self.agents += 1
        runner = self.path / f"runner{self.agents}"
        runner.mkdir()
        (runner / "__main__.py").write_text(dedent(agent))
        if not self.group.exists():
            self.directory("group")
        return ContainerSpec(
            name=f"clawtrio-test-{self.agents}",
            labels={
                LABEL_ROOT: str(self.path),
                LABEL_ENGINE: "an engine",
                LABEL_RUN: run,
            },
            mounts=(
                self.hold(runner, "/app/src", readonly=True),
                self.hold(self.group, "/workspace/group", readonly=False),
                *mounts,
            ),
            environment=environment,
            arguments=("one", "--two"),
            uid=UID,
            gid=GID,
            memory=memory,
            cpus=2,
            pids=pids,
        )

    @asynccontextmanager
    async def start(self, spec: ContainerSpec) -> AsyncIterator[Container]:
        """Start a sandbox; at the end it is killed, if it is still there."""
        container = await self.runtime.start(spec)
        try:
            await container.verify()
            yield container
        finally:
            with trio.move_on_after(5, shield=True):
                await container.kill()
                await container.wait()
            with trio.CancelScope(shield=True):
                await container.aclose()

    async def finish(self, container: Container) -> Finished:
        """Read it to its end, within a bound."""
        stdout, stderr = bytearray(), bytearray()

        async def read(stream: trio.abc.ReceiveStream, into: bytearray) -> None:
            async for chunk in stream:
                into += chunk

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, container.stdout, stdout)
                nursery.start_soon(read, container.stderr, stderr)
                code = await container.wait()
        text = stderr.decode()
        return Finished(
            code, stdout.decode(), text, container.start_failure(code, text)
        )

    async def run(self, spec: ContainerSpec) -> Finished:
        """Run a sandbox from start to end, without an input."""
        with trio.fail_after(30):
            async with self.start(spec) as container:
                await container.stdin.aclose()
                return await self.finish(container)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    with ExitStack() as held:
        yield Sandbox(tmp_path, held)


async def read_line(container: Container) -> str:
    """Read until the agent has said a line."""
    line = b""
    with trio.fail_after(10):
        while not line.endswith(b"\n"):
            chunk = await container.stdout.receive_some(1)
            assert chunk, "the agent left"
            line += chunk
    return line.decode().rstrip()
