"""Sockets that listen in another network namespace, or on one device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
import trio

from clawtrio import _netns
from clawtrio._errors import RuntimeUnavailableError
from clawtrio._netns import listen_inside, listen_on_device, open_network_of

from .helpers import open_descriptors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux only")

#: Brings lo up, then connects to each port that it is told, and says what it hears.
INSIDE = """
import fcntl, socket, struct, sys
with socket.socket() as any_socket:
    flags = struct.pack("16sh14x", b"lo", 0x49)  # SIOCSIFFLAGS: up, running
    fcntl.ioctl(any_socket, 0x8914, flags)
print("ready", flush=True)
for line in sys.stdin:
    with socket.create_connection(("127.0.0.1", int(line)), timeout=10) as peer:
        peer.sendall(b"question")
        print(peer.recv(16).decode(), flush=True)
"""


@attrs.frozen
class Namespace:
    """A process in a network namespace of its own.

    Attributes:
        process: It.
        network: A descriptor of the namespace.
    """

    process: subprocess.Popen[str]
    network: int

    def hears(self, port: int) -> str:
        """Have it connect, and return what it was told."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{port}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture(params=[("--net",), ("--net", "--user", "--map-root-user")], ids=str)
def namespace(request: pytest.FixtureRequest) -> Iterator[Namespace]:
    """Make one in our own user namespace, where we may, and one in another."""
    options = list(request.param)
    if os.geteuid() != 0 and "--user" not in options:
        options += ["--user", "--map-root-user"]
    argv = ["unshare", *options, sys.executable, "-c", INSIDE]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process,
        ExitStack() as held,
    ):
        held.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        directory = os.open(f"/proc/{process.pid}", os.O_PATH)
        held.callback(os.close, directory)
        network = open_network_of(directory)
        held.callback(os.close, network)
        yield Namespace(process, network)


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Count descriptors: none may be left, whatever happened."""
    if "namespace" in request.fixturenames:
        request.getfixturevalue("namespace")
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in the place of the helper."""

    def make(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", os.fspath(path))

    return make


async def answer(listener: trio.SocketListener) -> None:
    stream = await listener.accept()
    assert await stream.receive_some() == b"question"
    await stream.send_all(b"answer")
    await stream.aclose()


async def test_serves_a_namespace(namespace: Namespace) -> None:
    """Who is inside connects to its loopback, and is served by us."""
    with trio.fail_after(30):
        listener = await listen_inside("x", namespace.network, 4000)
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(answer, listener)
            heard = await trio.to_thread.run_sync(namespace.hears, 4000)

    assert heard == "answer"


async def test_nobody_outside_is_served(namespace: Namespace) -> None:
    """The port is not one of ours; a child process does not get the socket."""
    with trio.fail_after(30):
        async with await listen_inside("x", namespace.network, 4000) as listener:
            assert listener.socket.getsockname() == ("127.0.0.1", 4000)
            assert not os.get_inheritable(listener.socket.fileno())
            with pytest.raises(OSError, match="all attempts"):
                await trio.open_tcp_stream("127.0.0.1", 4000)


async def test_port_is_taken(namespace: Namespace) -> None:
    """A port that somebody inside has is an error."""
    with trio.fail_after(30):
        async with await listen_inside("x", namespace.network, 4000):
            with pytest.raises(RuntimeUnavailableError) as caught:
                await listen_inside("x", namespace.network, 4000)

    assert caught.value.runtime == "x"
    assert "port 4000" in caught.value.problem
    assert "in use" in caught.value.problem


async def test_not_a_namespace() -> None:
    """What cannot be joined is an error that says what would help."""
    with ExitStack() as held:
        null = os.open(os.devnull, os.O_RDONLY)
        held.callback(os.close, null)

        with pytest.raises(RuntimeUnavailableError) as caught:
            await listen_inside("x", null, 4000)

    assert "Inappropriate ioctl" in caught.value.problem
    assert "CLAWTRIO_NETWORK to open" in caught.value.remedy


def test_our_own_network() -> None:
    """A process that has the host's network has no port to open in it."""
    with ExitStack() as held:
        directory = os.open("/proc/self", os.O_PATH)
        held.callback(os.close, directory)

        with pytest.raises(OSError, match="host's own"):
            open_network_of(directory)


def test_process_is_gone() -> None:
    """The descriptor of a process that has left leads nowhere, whoever has its id."""
    with subprocess.Popen(["sleep", "60"]) as process, ExitStack() as held:
        directory = os.open(f"/proc/{process.pid}", os.O_PATH)
        held.callback(os.close, directory)
        process.kill()
        process.wait()

        with pytest.raises(ProcessLookupError):
            open_network_of(directory)


async def test_helper_hangs(
    helper: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper that does not end is killed, and that is an error."""
    helper("exec sleep 60")
    monkeypatch.setattr(_netns, "_TIMEOUT", 0.2)

    with trio.fail_after(10), pytest.raises(RuntimeUnavailableError, match=r"0\.2 s"):
        await listen_inside("x", 0, 4000)


async def test_given_up(helper: Callable[[str], None]) -> None:
    """Cancelling ends it at once."""
    helper("exec sleep 60")
    started = trio.current_time()

    with trio.move_on_after(0.2) as scope:
        await listen_inside("x", 0, 4000)

    assert scope.cancelled_caught
    assert trio.current_time() - started < 2


async def test_no_helper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no helper can be run, that is the error."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))

    with pytest.raises(RuntimeUnavailableError, match="cannot run"):
        await listen_inside("x", 0, 4000)


async def test_listens_on_a_device() -> None:
    """What comes in by the device is served, on a port that the kernel chose."""
    listener = listen_on_device("127.0.0.1", "lo")
    host, port = listener.socket.getsockname()

    with trio.fail_after(10):
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(answer, listener)
            async with await trio.open_tcp_stream(host, port) as stream:
                await stream.send_all(b"question")
                assert await stream.receive_some() == b"answer"

    assert listener.socket.family == socket.AF_INET


@pytest.mark.parametrize(
    ("address", "device", "problem"),
    [("127.0.0.1", "ct-none", "No such device"), ("192.0.2.77", "lo", "assign")],
)
def test_no_such_device(address: str, device: str, problem: str) -> None:
    """Neither a device nor an address that is not there is listened on."""
    with pytest.raises(RuntimeUnavailableError, match=problem) as caught:
        listen_on_device(address, device)

    assert "CLAWTRIO_NETWORK" in caught.value.remedy
