"""Whole runs: real engines, real containers, the real clock.

Whatever a test does, afterwards there is no container, no process, no descriptor and no
engine file more than before: ``site`` sees to that.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from clawtrio import Group, RunResult, Settings

HERE = Path(__file__).parent

#: What agents made here begin with. Frames go out whole, whoever else writes.
_PRELUDE = """\
# {token}
import json, os, signal, subprocess, sys, threading, time

def emit(result=None, **more):
    frame = json.dumps({{"status": "success", "result": result, **more}})
    start, end = "---NANOCLAW_OUTPUT_START---", "---NANOCLAW_OUTPUT_END---"
    data = "\\n".join([start, frame, end, ""]).encode()
    while data:
        data = data[os.write(1, data):]

def hear():
    line = sys.stdin.readline()
    return json.loads(line) if line else None

def stay():
    while True:
        time.sleep(60)

"""

#: Deaf to SIGTERM and to the end of its lifeline.
STUBBORN = """\
signal.signal(signal.SIGTERM, signal.SIG_IGN)
hear()
emit("here")
stay()
"""
#: Reads no more than its input, but leaves at a SIGTERM.
LISTLESS = """\
hear()
emit("here")
stay()
"""


@attrs.frozen
class Process:
    """A process of this machine, as it was a moment ago."""

    pid: int
    parent: int
    argv: tuple[str, ...]


def processes() -> Iterator[Process]:
    """Yield all processes, but for zombies that are not ours."""
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text(errors="replace").rpartition(") ")[2]
            state, parent = fields.split()[:2]
            if state == "Z" and int(parent) != os.getpid():
                continue
            argv = (path / "cmdline").read_bytes().split(b"\0")[:-1]
            yield Process(int(path.name), int(parent), tuple(map(os.fsdecode, argv)))


def descriptors() -> dict[int, str]:
    """Return what this process has open."""
    found = {}
    for path in list(Path("/proc/self/fd").iterdir()):
        # The one that lists them is gone by now.
        with contextlib.suppress(OSError):
            found[int(path.name)] = str(path.readlink())
    return found


def memory(what: str) -> int:
    """Return a number that /proc/self/status has, such as VmRSS, in bytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def wait_until(true: Callable[[], object]) -> None:
    """Wait for something that nobody tells us of; callers bound it."""
    while not true():  # noqa: ASYNC110 - nobody tells us
        await trio.sleep(0.02)


@attrs.define
class Site:
    """A bot's root, and what runs for it.

    Attributes:
        runtime: The name of the runtime.
        root: The directory.
        token: In the source of every agent, and so in the command lines.
        docker_host: The daemon to look into; None is the usual one.
    """

    runtime: str
    root: Path
    token: str = attrs.field(factory=lambda: uuid.uuid4().hex)
    docker_host: str | None = None

    def agent(self, source: str) -> tuple[str, ...]:
        """Return the argv of an agent, given what it does."""
        python = sys.executable if self.runtime == "bwrap" else "python3"
        return (python, "-c", _PRELUDE.format(token=self.token) + source)

    def settings(self, agent: str | None = None, **changes: Any) -> Settings:
        """Return settings with small timeouts, and *agent* as the source of one."""
        if agent is not None:
            changes["agent_command"] = self.agent(agent)
        values: dict[str, Any] = {
            "root": self.root,
            "runtime": self.runtime,
            "agent": "echo",
            "answer_timeout": 30,
            "idle_timeout": 30,
            "close_grace": 10,
            "stop_grace": 1,
            "drain_grace": 1,
            "command_timeout": 10,
            "min_free_bytes": 0,
            "timezone": "UTC",
        }
        return Settings(**values | changes)

    @property
    def root_id(self) -> str | None:
        """What is in the labels; None if no engine was opened."""
        try:
            return (self.root / "data" / "root-id").read_text()
        except FileNotFoundError:
            return None

    def containers(self) -> list[str]:
        """List the containers of this root, running or not."""
        if self.root_id is None:
            return []
        if self.runtime == "bwrap":
            return list(self._sandboxed(f"CLAWTRIO_ROOT={self.root_id}"))
        argv = [self.runtime, "ps", "-aq", "--no-trunc", "--filter"]
        argv += [f"label=clawtrio.root={self.root_id}"]
        environment = dict(os.environ)
        if self.docker_host is not None:
            environment["DOCKER_HOST"] = self.docker_host
        done = subprocess.run(
            argv, check=True, capture_output=True, text=True, env=environment
        )
        return done.stdout.split()

    def _sandboxed(self, entry: str) -> Iterator[str]:
        for process in processes():
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes()
                if entry.encode() in environment.split(b"\0"):
                    yield str(process.pid)

    def agents(self) -> list[Process]:
        """List the agents: what runs the source of one."""
        return [
            process
            for process in processes()
            if process.argv[1:2] == ("-c",)
            and f"# {self.token}\n" in "".join(process.argv[2:3])
        ]

    def clients(self) -> list[Process]:
        """List the clients that belong to this process."""
        return [
            process
            for process in processes()
            if process.parent == os.getpid() and self.token in " ".join(process.argv)
        ]

    def strays(self) -> list[Process]:
        """List all processes that belong to a run of this root, by their argv."""
        marks = {self.token, self.root_id or self.token}
        return [
            process
            for process in processes()
            if any(mark in word for word in process.argv[1:] for mark in marks)
            and "host.py" not in " ".join(process.argv)
        ]

    def engine_files(self) -> list[str]:
        """List the files of engines that live, or were not seen to be dead."""
        engines = self.root / "data" / "engines"
        found = engines.iterdir() if engines.exists() else ()
        # A socket beside a file goes with it.
        files = [path for path in found if path.suffix != ".sock"]
        return [path.name for path in files if "dead" not in path.read_text()]

    def remains(self) -> list[str]:
        """List what is left, wherever: containers, agents, clients, engine files."""
        stray = [f"process {found.pid}: {found.argv[0]}" for found in self.strays()]
        containers = [f"container {name}" for name in self.containers()]
        engines = [f"engine file {name}" for name in self.engine_files()]
        return [*containers, *stray, *engines]


def group(folder: str = "chat", **changes: Any) -> Group:
    """Return a group of that folder."""
    return Group(name=folder, folder=folder, **changes)


def facts(result: RunResult) -> tuple[str, str, int, str | None]:
    """Return what the endings' table decides, and the error."""
    return result.status, result.ending.name, result.outputs, result.error


RUNTIMES = [
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("podman", marks=pytest.mark.podman),
    pytest.param("bwrap", marks=pytest.mark.bwrap),
]


@pytest.fixture(params=RUNTIMES)
def runtime_name(request: pytest.FixtureRequest) -> str:
    """Each runtime in turn."""
    name: str = request.param
    return name


@pytest.fixture
def site(runtime_name: str, tmp_path: Path) -> Iterator[Site]:
    """A root for a runtime; afterwards nothing may be left of what ran for it."""
    root = tmp_path / "root"
    root.mkdir()
    site = Site(runtime_name, root)
    with nothing_left(site):
        yield site


@contextlib.contextmanager
def nothing_left(site: Site, *, spare: Callable[[], set[int]] = set) -> Iterator[None]:
    """Make sure that what was done has left no container, process or descriptor.

    Args:
        site: Where it was done.
        spare: Tells afterwards which processes are to be there.
    """
    children = {process.pid for process in processes() if process.parent == os.getpid()}
    opened = descriptors()
    yield
    more = {fd: what for fd, what in descriptors().items() if fd not in opened}
    left = site.remains()
    until = time.monotonic() + 3
    while left and time.monotonic() < until:
        time.sleep(0.05)
        left = site.remains()
    for name in site.containers():
        _remove(site, name)
    assert left == []
    assert more == {}
    assert [
        process
        for process in processes()
        if process.parent == os.getpid() and process.pid not in children | spare()
    ] == []


def _remove(site: Site, name: str) -> None:
    """Clean up after a failure, so that others do not suffer from it."""
    if site.runtime == "bwrap":
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(name), 9)
    else:
        argv = [site.runtime, "rm", "-f", name]
        subprocess.run(argv, check=False, capture_output=True)
