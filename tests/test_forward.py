"""The forwarder inside the container, with real sockets and as a real process."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

SOURCE = Path(__file__).parents[1] / "container" / "agent_runner"
BOUND = 20
MIB = 2**20
RESET = struct.pack("ii", 1, 0)

# An agent that holds its stdin, and says when it runs.
AGENT = ["sh", "-c", "echo $$; read -r line"]

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@pytest.fixture
def port() -> int:
    """Give a port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
    assert isinstance(number, int)
    return number


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a place for the proxy's socket, short enough for one."""
    return str(tmp_path_factory.mktemp("s") / "proxy.sock")


@asynccontextmanager
async def agent(
    path: str, port: int, argv: list[str] | None = None
) -> AsyncIterator[trio.Process]:
    """Run an own command behind the entry, and wait until it runs."""
    with trio.fail_after(BOUND):
        process = await trio.lowlevel.open_process(
            [sys.executable, str(SOURCE), "--", *(argv or AGENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "CLAWTRIO_PROXY": path,
                "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}",
            },
        )
        try:
            assert process.stdout is not None
            assert await process.stdout.receive_some() == f"{process.pid}\n".encode()
            yield process
        finally:
            process.kill()
            with trio.move_on_after(BOUND, shield=True):
                await process.wait()
                assert process.stdin is not None
                assert process.stdout is not None
                await process.stdin.aclose()
                await process.stdout.aclose()


@asynccontextmanager
async def proxy(path: str, handler: Handler) -> AsyncIterator[None]:
    """Listen on *path*, and give each connection to *handler*."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen(128)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock.dup()))
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, handler, [listener])
            yield
            nursery.cancel_scope.cancel()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Read *stream* to its end."""
    return b"".join([data async for data in stream])


async def echo(stream: trio.SocketStream) -> None:
    """Send all back, and end when the client does."""
    async for data in stream:
        await stream.send_all(data)
    await stream.aclose()


async def test_both_directions_and_their_ends(path: str, port: int) -> None:
    """What a client sends arrives, then its end, and then still the answer."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all((await read_all(stream)).upper())
        await stream.aclose()

    async with proxy(path, answer), agent(path, port):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await send_whole(client, b"hello")
        assert await read_all(client) == b"HELLO"
        await client.aclose()


async def test_the_port_is_open_before_the_agent_starts(path: str, port: int) -> None:
    """The first thing that an agent does may be to connect."""
    connect = (
        "import os, socket; "
        "s = socket.create_connection(('127.0.0.1', int(os.environ['PORT']))); "
        "s.sendall(b'hi'); assert s.recv(9) == b'hi'; "
        "os.write(1, b'%d\\n' % os.getpid()); input()"
    ).replace("int(os.environ['PORT'])", str(port))
    async with proxy(path, echo), agent(path, port, [sys.executable, "-c", connect]):
        pass


async def test_many_streams_at_once(path: str, port: int) -> None:
    """A hundred connections get all their bytes, each its own."""
    got: dict[int, bytes] = {}

    async def client(number: int) -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        data = number.to_bytes(1, "big") * 300_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_whole, stream, data)
            got[number] = await read_all(stream)
        await stream.aclose()

    async with proxy(path, echo), agent(path, port), trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(client, number)
    assert got == {n: n.to_bytes(1, "big") * 300_000 for n in range(100)}


async def send_whole(stream: trio.SocketStream, data: bytes) -> None:
    """Send *data*, then the end."""
    await stream.send_all(data)
    await stream.send_eof()


async def test_more_clients_than_it_takes_wait_their_turn(path: str, port: int) -> None:
    """Beyond its limit clients wait until others leave; none is lost."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        async with proxy(path, echo), agent(path, port):
            clients = [
                await trio.open_tcp_stream("127.0.0.1", port) for _ in range(450)
            ]
            await clients[399].send_all(b"in")
            assert await clients[399].receive_some() == b"in"
            await clients[449].send_all(b"late")
            with trio.move_on_after(0.2) as scope:
                await clients[449].receive_some()
            assert scope.cancelled_caught
            for client in clients[:100]:
                await client.aclose()
            assert await clients[449].receive_some() == b"late"
            for client in clients[100:]:
                await client.aclose()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("downwards", [True, False])
async def test_backpressure(path: str, port: int, *, downwards: bool) -> None:
    """Whoever reads nothing gets little sent: buffers of the kernel, and one read."""
    sent = 0
    done = trio.Event()

    async def pour(stream: trio.SocketStream) -> None:
        nonlocal sent
        with trio.move_on_after(0.5):
            while True:
                sent += await stream.socket.send(b"x" * 2**16)
        done.set()

    async def stare(stream: trio.SocketStream) -> None:
        await done.wait()

    async with proxy(path, pour if downwards else stare), agent(path, port):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await (stare if downwards else pour)(client)
        await client.aclose()
    assert 0 < sent < 16 * MIB


async def test_client_that_goes_is_seen_at_once(path: str, port: int) -> None:
    """A client that leaves in the middle of an answer ends it at the proxy."""
    gone = trio.Event()

    async def stream_for_ever(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"event")
            assert await read_all(stream) == b"ask"
            gone.set()

    async with proxy(path, stream_for_ever), agent(path, port):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await client.send_all(b"ask")
        assert await client.receive_some() == b"event"
        await client.aclose()
        with trio.fail_after(1):
            await gone.wait()


async def test_client_that_goes_without_reading(path: str, port: int) -> None:
    """A client that leaves while the answer is stuck ends it, too."""
    gone = trio.Event()

    async def pour(stream: trio.SocketStream) -> None:
        try:
            while True:
                await stream.send_all(b"x" * MIB)
        except trio.BrokenResourceError:
            gone.set()

    async with proxy(path, pour), agent(path, port):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await client.send_eof()
        await trio.sleep(0.2)  # by now nothing moves
        await client.aclose()
        with trio.fail_after(1):
            await gone.wait()


async def test_reset_is_passed_on(path: str, port: int) -> None:
    """A stream that the proxy breaks off is broken for the client, not ended."""

    async def break_off(stream: trio.SocketStream) -> None:
        await stream.send_all(b"begun")
        await trio.sleep(0.1)
        # With something unread a Unix socket is reset by its closing.
        await stream.aclose()

    async with proxy(path, break_off), agent(path, port):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await client.send_all(b"ask")
        assert await client.receive_some() == b"begun"
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        await client.aclose()


async def test_refusal_of_an_upload_arrives(path: str, port: int) -> None:
    """What the proxy says before it listens no more reaches a client that sends on."""

    async def refuse(stream: trio.SocketStream) -> None:
        stream.socket.shutdown(trio.socket.SHUT_RD)
        # What is left unread when it is closed makes that a reset.
        await read_all(stream)
        await stream.send_all(b"too large")
        await stream.aclose()

    async with proxy(path, refuse), agent(path, port):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await send_whole(client, b"x" * 8 * MIB)
        assert await read_all(client) == b"too large"
        await client.aclose()


async def test_reset_of_a_client_is_seen(path: str, port: int) -> None:
    """A client that breaks off ends its connection to the proxy."""
    over = trio.Event()

    async def wait_for_end(stream: trio.SocketStream) -> None:
        assert await read_all(stream) == b"ask"
        over.set()

    async with proxy(path, wait_for_end), agent(path, port):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await client.send_all(b"ask")
        await trio.sleep(0.1)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await client.aclose()
        with trio.fail_after(1):
            await over.wait()


async def test_proxy_that_is_not_there(path: str, port: int) -> None:
    """Without a proxy a client's connection breaks; with one, the next works."""
    async with agent(path, port):
        # On a busy machine it may break before we know that it was there.
        with pytest.raises((trio.BrokenResourceError, OSError)):
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                await client.receive_some()
        async with proxy(path, echo):
            client = await trio.open_tcp_stream("127.0.0.1", port)
            await client.send_all(b"hi")
            assert await client.receive_some() == b"hi"
            await client.aclose()


async def test_proxy_that_is_slow_to_accept(path: str, port: int) -> None:
    """While the proxy accepts nothing clients wait, and then are served."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen(0)
        async with agent(path, port):
            clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(5)]
            await trio.sleep(0.2)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock.dup()))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, echo, [listener])
                for client in clients:
                    await client.send_all(b"hi")
                    assert await client.receive_some() == b"hi"
                    await client.aclose()
                nursery.cancel_scope.cancel()


def connectable(port: int) -> bool:
    """Tell whether anybody listens on *port*."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
async def test_it_ends_with_the_agent(
    path: str, port: int, end: signal.Signals | None
) -> None:
    """However the agent ends, the port is closed, and its stdout, too."""
    async with agent(path, port) as process:
        assert connectable(port)
        assert process.stdin is not None
        assert process.stdout is not None
        if end is None:
            await process.stdin.aclose()
        else:
            process.send_signal(end)
        assert await read_all(process.stdout) == b""
        with trio.fail_after(2):
            while connectable(port):  # noqa: ASYNC110 - another process's doing
                await trio.sleep(0.01)


async def test_it_is_no_child_of_the_agent(path: str, port: int) -> None:
    """An agent that waits for all its children does not wait for it."""
    script = (
        "import os\n"
        "print(f'{os.getpid()}\\n', end='', flush=True)\n"
        "input()\n"
        "try: os.wait()\n"
        "except ChildProcessError: print('none', flush=True)\n"
    )
    async with agent(path, port, [sys.executable, "-c", script]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send_all(b"\n")
        assert await read_all(process.stdout) == b"none\n"


async def test_signals_of_the_group_are_not_for_it(path: str, port: int) -> None:
    """What the agent sends to its own process group leaves the way to the proxy."""
    script = "trap '' TERM; echo $$; kill -TERM 0; read -r line"
    run = [sys.executable, "-c", f"import os; os.setpgid(0, 0); {exec_line(script)}"]
    async with proxy(path, echo), agent(path, port, run):
        await trio.sleep(0.2)
        assert connectable(port)


def exec_line(script: str) -> str:
    """Give the Python that becomes a shell with *script*."""
    return f"os.execvp('sh', ['sh', '-c', {script!r}])"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (None, "ANTHROPIC_BASE_URL names no port: ''"),
        ("http://proxy", "ANTHROPIC_BASE_URL names no port: 'http://proxy'"),
        ("http://h:0", "ANTHROPIC_BASE_URL names no port: 'http://h:0'"),
        ("http://h:65536/", "ANTHROPIC_BASE_URL names no port: 'http://h:65536/'"),
    ],
)
async def test_port_that_is_none(url: str | None, problem: str) -> None:
    """A URL without a port is said in one line, and nothing is started."""
    environment = {
        "CLAWTRIO_PROXY": "/nowhere",
        **({"ANTHROPIC_BASE_URL": url} if url else {}),
    }
    assert await run_echo(environment) == (1, f"agent_runner: {problem}\n")


async def test_port_that_is_taken() -> None:
    """A port that cannot be opened is said in one line, and nothing is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        environment = {"CLAWTRIO_PROXY": "/nowhere", "ANTHROPIC_BASE_URL": url}
        code, stderr = await run_echo(environment)
    assert code == 1
    assert stderr.startswith(
        f"agent_runner: port {port} can't be opened: Address already in use"
    )


async def run_echo(environment: dict[str, str]) -> tuple[int, str]:
    """Run the echo backend to its end; give its exit code and stderr."""
    inherited = {k: v for k, v in os.environ.items() if k != "ANTHROPIC_BASE_URL"}
    with trio.fail_after(BOUND):
        done = await trio.run_process(
            [sys.executable, str(SOURCE), "echo"],
            stdin=b"",
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**inherited, **environment},
        )
    assert done.stdout == b""
    return done.returncode, done.stderr.decode()
