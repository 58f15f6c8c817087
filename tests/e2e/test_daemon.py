"""kill -9 of the Docker daemon: one of our own, since others use the usual one."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import attrs
import pytest
import trio

from clawtrio import Ending, open_engine

from .conftest import LISTLESS, Site, group, nothing_left

pytestmark = [pytest.mark.docker, pytest.mark.slow]


#: Takes its time to leave, but less than a daemon gives it that finds it again.
SLOW = """
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), os._exit(0)))
hear()
emit("here")
stay()
"""


@attrs.define
class Daemon:
    """A Docker daemon of our own.

    Attributes:
        home: Where all of it is.
        process: None if it does not run.
    """

    home: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.home}/docker.sock"

    def pids(self) -> set[int]:
        """Return its process id, if it runs."""
        return set() if self.process is None else {self.process.pid}

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # In a network namespace of its own: with --bridge=none it removes docker0,
        # which may be the bridge of a daemon that others use.
        argv = ["unshare", "--net", "dockerd", "--storage-driver=overlay2"]
        argv += [
            "--bridge=none",
            "--iptables=false",
            "--ip-forward=false",
            f"--host={self.url}",
        ]
        argv += [f"--data-root={self.home}/data", f"--exec-root={self.home}/exec"]
        with (self.home / "log").open("ab") as file:
            self.process = subprocess.Popen(
                [*argv, f"--pidfile={self.home}/pid"], stdout=file, stderr=file
            )
        until = time.monotonic() + 30
        while self.docker("info").returncode:
            assert time.monotonic() < until, (self.home / "log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it without a warning, and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=30)
            self.process = None
        # Its containerd gets a SIGKILL with it. Until that is reaped, the next daemon
        # would wait for it.
        for name in ("pid", "exec/containerd/containerd.pid"):
            (self.home / name).unlink(missing_ok=True)

    def docker(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Ask it."""
        argv = ["docker", "--host", self.url, *arguments]
        return subprocess.run(argv, check=False, capture_output=True)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon with the agent image."""
    # Deleting an image's files can take half a minute on a disk, and no time in memory.
    # pytest's tmp_path is too long for a socket.
    shared = "/dev/shm"
    roomy = Path(shared).is_dir() and shutil.disk_usage(shared).free > 2**30
    place = mkdtemp(prefix="clawtrio-dockerd-", dir=shared if roomy else None)
    daemon = Daemon(Path(place))
    try:
        daemon.start()
        with subprocess.Popen(
            ["docker", "save", "clawtrio-agent:latest"], stdout=subprocess.PIPE
        ) as saved:
            load = ["docker", "--host", daemon.url, "load"]
            subprocess.run(load, check=True, stdin=saved.stdout, capture_output=True)
        yield daemon
    finally:
        daemon.kill()
        # It has left its mounts.
        mounts = Path("/proc/self/mounts").read_text().split("\n")
        for mount in reversed([line.split()[1] for line in mounts if line]):
            if Path(mount).is_relative_to(daemon.home):
                subprocess.run(["umount", "--lazy", mount], check=True)
        shutil.rmtree(daemon.home)


@pytest.fixture
def site(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """A root whose containers are run by that daemon."""
    monkeypatch.setenv("DOCKER_HOST", daemon.url)
    site = Site("docker", tmp_path)
    if daemon.process is None:
        daemon.start()
    with nothing_left(site, spare=daemon.pids):
        yield site


async def test_daemon_killed(site: Site, daemon: Daemon) -> None:
    """A daemon that dies is the run's failure, and leaves nothing once it is back."""
    with trio.fail_after(60):
        async with (
            open_engine(site.settings(LISTLESS, command_timeout=3)) as engine,
            engine.open_run(group(), "go", chat_jid="tg:1") as live,
        ):
            first = await anext(live)
            daemon.kill()
            killed = trio.current_time()
            rest = [output.result async for output in live]
            took = trio.current_time() - killed
        closed = trio.current_time() - killed

        assert first.result == "here"
        assert rest == []
        assert live.result.ending is Ending.FAILED
        assert live.result.unanswered == ()
        assert took < 5
        assert closed < 15
        assert len(site.engine_files()) == 1

        await trio.to_thread.run_sync(daemon.start)
        async with open_engine(site.settings()) as engine:
            assert site.containers() == []
            assert len(site.engine_files()) == 1
            result = await engine.run(group(), "again", chat_jid="tg:1")

    assert result.result == "again"


async def test_daemon_killed_while_stopping(site: Site, daemon: Daemon) -> None:
    """A stop that no daemon answers ends in its bound, and the next start cleans up."""
    with trio.fail_after(60):
        async with (
            open_engine(site.settings(SLOW, command_timeout=2)) as engine,
            engine.open_run(group(), "go", chat_jid="tg:1") as live,
        ):
            assert (await anext(live)).result == "here"
            live.stop()
            await trio.sleep(0.3)
            daemon.kill()
            killed = trio.current_time()
            result = await live.wait()
            took = trio.current_time() - killed

        assert result.ending is Ending.STOPPED
        assert result.status == "success"
        assert took < 1 + 3 * 2 + 2
        assert len(site.engine_files()) == 1

        await trio.to_thread.run_sync(daemon.start)
        async with open_engine(site.settings()):
            assert site.containers() == []
