"""The credential proxy under load, under attack, and when it is cut off."""

from __future__ import annotations

import gc
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import h11
import pytest
import trio
import trio.lowlevel
from hypothesis import example, given, settings, strategies as st

from clawtrio._proxy import open_proxy
from clawtrio._proxy_rules import ProxyLimits

from .helpers import open_descriptors
from .upstream import (
    JSON,
    PATIENCE,
    SSE,
    Call,
    Client,
    FakeApi,
    Wallet,
    World,
    answering,
    credential_for,
    open_api,
    open_world,
    silent,
    unix_listener,
    until,
)

MIB: Final = 2**20
STREAMS: Final = 200
EVENTS: Final = 200
#: Seconds for a client's leaving to reach the API, and for a cancellation.
GONE: Final = 0.05
CANCELLED: Final = 0.1


def memory() -> int:
    """Return how many bytes this process occupies."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def event_of(stream: str, number: int) -> bytes:
    """Make one of a stream's events, a different one each."""
    delta = {"type": "content_block_delta", "delta": {"text": f"{stream} {number}"}}
    return b"event: content_block_delta\ndata: %b\n\n" % json.dumps(delta).encode()


@pytest.mark.slow
async def test_two_hundred_streams_at_once() -> None:
    """Each client gets each byte of its own stream; memory stays small."""

    async def streaming(call: Call) -> None:
        name = (await call.read()).decode()
        await call.head(200, SSE)
        for number in range(EVENTS):
            await call.send(event_of(name, number))
            await trio.lowlevel.checkpoint()
        await call.end()

    hashes: dict[int, str] = {}
    peak = 0

    async def ask(world: World, name: int) -> None:
        nonlocal peak
        answer = await world.ask(body=str(name).encode())
        assert answer.is_whole
        hashes[name] = hashlib.sha256(answer.body).hexdigest()
        peak = max(peak, memory()) if name % 20 == 0 else peak

    limits = ProxyLimits(max_connections_per_run=STREAMS)
    async with open_world(streaming, limits=limits) as world:
        await world.ask(body=b"0")
        before = memory()
        with trio.fail_after(170):
            async with trio.open_nursery() as nursery:
                for name in range(STREAMS):
                    nursery.start_soon(ask, world, name)

        expected = {
            name: hashlib.sha256(
                b"".join(event_of(str(name), n) for n in range(EVENTS))
            ).hexdigest()
            for name in range(STREAMS)
        }
        assert hashes == expected
        assert world.ticket.usage.output_tokens == (STREAMS + 1) * EVENTS
        # Clients and API are in it: 200 bodies of some 20 KiB, and six sockets' ends.
        assert peak - before < 64 * MIB


async def flooding(call: Call) -> None:
    """Send 64 MiB."""
    await call.read()
    await call.head(200, [("content-length", str(64 * MIB))])
    for _ in range(1024):
        await call.send(b"x" * 2**16)
        call.body += b"."
    await call.end()


async def test_a_slow_reader_slows_the_api() -> None:
    """A response waits for its reader, wherever it is, and then goes on."""
    async with open_world(flooding) as world:
        client = await world.connect()
        await client.send(world.head())
        await client.send(h11.EndOfMessage())
        before = memory()
        head = await client.next_event()
        assert isinstance(head, h11.Response)
        await trio.sleep(0.5)
        (call,) = world.api.calls
        # Four socket buffers of a few MiB each; nothing else holds any.
        assert len(call.body) < 512
        assert memory() - before < 16 * MIB

        size = 0
        with trio.fail_after(PATIENCE):
            while isinstance(event := await client.next_event(), h11.Data):
                size += len(event.data)
        assert size == 64 * MIB
        await client.stream.aclose()


async def test_a_reader_that_stops_is_cut_off() -> None:
    """Nobody holds the API's connection for ever."""
    async with open_world(flooding, limits=ProxyLimits(stall_timeout=0.3)) as world:
        client = await world.connect()
        await client.send(world.head())
        await client.send(h11.EndOfMessage())
        await until(lambda: world.api.calls)
        await until(lambda: not world.ticket.connections)
        await client.stream.aclose()


async def test_a_large_upload_passes_in_pieces() -> None:
    """64 MiB arrive whole, and are never in memory at once."""
    digest = hashlib.sha256()

    async def hashing(call: Call) -> None:
        while isinstance(event := await call.next_event(), h11.Data):
            digest.update(event.data)
        await call.reply(b"{}")

    piece = bytes(range(256)) * 256
    expected = hashlib.sha256()
    async with open_world(hashing) as world:
        client = await world.connect()
        length = [("content-length", str(64 * MIB))]
        before = peak = memory()
        await client.send(world.head(headers=length))
        with trio.fail_after(60):
            for number in range(1024):
                await client.send(h11.Data(data=piece))
                expected.update(piece)
                peak = max(peak, memory()) if number % 64 == 0 else peak
            await client.send(h11.EndOfMessage())
            assert (await client.answer()).status == 200

        assert digest.hexdigest() == expected.hexdigest()
        assert world.ticket.usage.request_bytes == 64 * MIB
        assert peak - before < 16 * MIB
        await client.stream.aclose()


async def test_an_upload_waits_for_the_api() -> None:
    """A client cannot make the proxy hold what the API does not take."""

    async def lazy(call: Call) -> None:
        await trio.sleep_forever()

    async with open_world(lazy) as world:
        client = await world.connect()
        await client.send(world.head(headers=[("content-length", str(64 * MIB))]))
        before = memory()
        sent = 0
        with trio.move_on_after(0.5):
            while True:
                await client.send(h11.Data(data=b"x" * 2**16))
                sent += 2**16

        assert sent < 48 * MIB
        assert memory() - before < 16 * MIB
        await client.stream.aclose()


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_has_a_largest_size(*, announced: bool) -> None:
    """One that is announced is refused at once, another when it has got too large."""
    broken = trio.Event()

    async def waiting(call: Call) -> None:
        await call.read()
        assert call.is_broken
        broken.set()

    async with open_world(waiting, limits=ProxyLimits(max_body_bytes=10**6)) as world:
        client = await world.connect()
        length = ("content-length", str(10**6 + 1))
        chunked = ("transfer-encoding", "chunked")
        await client.send(world.head(headers=[length if announced else chunked]))
        if not announced:
            await client.send(h11.Data(data=b"x" * (10**6 + 1)))
        with trio.fail_after(PATIENCE):
            answer = await client.answer()
            if not announced:
                await broken.wait()

        assert (answer.status, answer.error) == (413, "request_too_large")
        await client.stream.aclose()


async def test_an_upload_that_breaks_off_is_broken_for_the_api() -> None:
    """The API never takes half a request for a whole one."""
    broken = trio.Event()

    async def waiting(call: Call) -> None:
        assert await call.read() == b"half"
        assert call.is_broken
        broken.set()

    async with open_world(waiting) as world:
        for framing in (("content-length", "8"), ("transfer-encoding", "chunked")):
            broken = trio.Event()
            client = await world.connect()
            await client.send(world.head(headers=[framing]))
            await client.send(h11.Data(data=b"half"))
            await trio.sleep(0.05)
            await client.stream.aclose()
            with trio.fail_after(PATIENCE):
                await broken.wait()


async def test_an_api_that_answers_early_is_heard() -> None:
    """A refusal of the API reaches a client that is still uploading."""

    async def refusing(call: Call) -> None:
        await call.reply(b"{}", 413, [*JSON, ("connection", "close")])

    async with open_world(refusing) as world:
        client = await world.connect()
        await client.send(world.head(headers=[("content-length", str(32 * MIB))]))
        answers = []

        async def listen() -> None:
            answers.append(await client.answer())

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                try:
                    for _ in range(512):
                        await client.send(h11.Data(data=b"x" * 2**16))
                except trio.BrokenResourceError:
                    pass
        assert answers[0].status in {413, 502}
        await client.stream.aclose()


async def test_clients_that_dawdle_are_told_or_closed() -> None:
    """A head, a body, and the next request each have their time."""
    limits = ProxyLimits(header_timeout=0.2, idle_timeout=0.3, stall_timeout=0.2)
    async with open_world(limits=limits) as world:
        with trio.fail_after(PATIENCE):
            assert await world.ask_raw(b"") == b""
            for part in (b"POST /v1", b"POST /v1/messages HTTP/1.1\r\nHost: a\r\n"):
                got = await world.ask_raw(part)
                assert got.startswith(b"HTTP/1.1 408 ")
                assert b'"timeout_error"' in got
            client = await world.connect()
            assert (await world.ask(client=client)).status == 200
            assert await client.stream.receive_some() == b""
            await client.stream.aclose()
            client = await world.connect()
            await client.send(world.head(headers=[("content-length", "8")]))
            assert (await client.answer()).status == 408
            await client.stream.aclose()


async def test_a_head_that_trickles_has_one_time_limit() -> None:
    """Byte by byte is no way to stay."""
    async with open_world(limits=ProxyLimits(header_timeout=0.3)) as world:
        client = await world.connect()

        async def trickle() -> None:
            while True:
                await client.stream.send_all(b"P")
                await trio.sleep(0.05)

        with trio.fail_after(PATIENCE), pytest.raises(trio.BrokenResourceError):
            await trickle()
        await client.stream.aclose()


async def test_a_head_has_a_largest_size() -> None:
    """An endless head is 431."""
    async with open_world(limits=ProxyLimits(max_header_bytes=2**12)) as world:
        got = await world.ask_raw(b"POST /v1/messages HTTP/1.1\r\nX: " + b"x" * 2**13)

        assert got.startswith(b"HTTP/1.1 431 ")
        # Nor is one that comes whole in a read, of which h11 keeps no count.
        headers = [("x", "x" * 2**12)]
        assert (await world.ask(headers=headers)).status == 431
        assert world.api.calls == []


@pytest.mark.parametrize("own_listener", [True, False])
async def test_a_run_has_so_many_connections(
    caplog: pytest.LogCaptureFixture, *, own_listener: bool
) -> None:
    """One run cannot take the connections of all."""
    limits = ProxyLimits(max_connections_per_run=2)
    async with open_world(limits=limits, own_listener=own_listener) as world:
        clients = [await world.connect() for _ in range(2)]
        for client in clients:
            assert (await world.ask(client=client)).status == 200
        client = await world.connect()
        if own_listener:
            assert await client.stream.receive_some() == b""
            assert caplog.text.count("too many connections") == 1
        else:
            assert (await world.ask(client=client)).error == "rate_limit_error"
        for each in (client, *clients):
            await each.stream.aclose()
        await until(lambda: not world.ticket.connections)
        assert (await world.ask()).status == 200


async def test_there_are_so_many_connections_in_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Beyond the limit a connection is closed; the log says so once."""
    async with open_world(limits=ProxyLimits(max_connections=1)) as world:
        first = await world.connect()
        assert (await world.ask(client=first)).status == 200
        for _ in range(2):
            assert await world.ask_raw(b"GET") == b""
        assert caplog.text.count("has 1 connections") == 1
        await first.stream.aclose()


async def streaming_slowly(call: Call) -> None:
    """Send an event now and then, until the proxy leaves."""
    await call.read()
    await call.head(200, SSE)
    await call.send(b"data: 1\n\n")
    await call.wait_gone()


async def reading_forever(call: Call) -> None:
    """Take what comes, and notice the end."""
    await call.read()
    await call.wait_gone()


@pytest.mark.parametrize("abruptly", [True, False])
@pytest.mark.parametrize(
    "handler", [silent, streaming_slowly, reading_forever, flooding]
)
async def test_a_client_that_leaves_takes_its_request_with_it(
    handler: Callable[[Call], Awaitable[None]], *, abruptly: bool
) -> None:
    """The API's connection is closed within 50 ms, whatever it was doing."""
    took = []
    async with open_world(handler) as world:
        # The best of a few: other processes may have the machine.
        for _ in range(3):
            client = await world.connect()
            if handler is reading_forever:
                await client.send(world.head(headers=[("content-length", "99")]))
            else:
                await client.send(world.head())
                await client.send(h11.EndOfMessage())
            await until(lambda: world.ticket.connections and world.api.calls)
            await trio.sleep(0.1)
            assert len(world.ticket.connections) == 1
            if abruptly:
                linger = b"\x01\0\0\0\0\0\0\0"
                client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            started = trio.current_time()
            await client.stream.aclose()
            await until(lambda: not world.ticket.connections)
            took.append(trio.current_time() - started)
        if handler is not flooding:
            with trio.fail_after(PATIENCE):
                await world.api.gone.wait()
    assert min(took) < GONE


@asynccontextmanager
async def cancellable(
    api: FakeApi, wallet: Wallet
) -> AsyncIterator[tuple[World, Callable[[], Awaitable[float]]]]:
    """Have a proxy, and a way to cancel what it runs in, which says what that took."""
    scope = trio.CancelScope()
    over = trio.Event()

    async def engine(
        task_status: trio.TaskStatus[World] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with scope:
            async with open_proxy(wallet) as proxy, trio.open_nursery() as nursery:
                (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                port = listener.socket.getsockname()[1]
                await nursery.start(proxy.serve, listener)
                with proxy.admit("family", "1f") as ticket:
                    task_status.started(World(api, proxy, ticket, port, wallet))
                    await trio.sleep_forever()
        over.set()

    async def cancel() -> float:
        started = trio.current_time()
        scope.cancel()
        with trio.fail_after(PATIENCE):
            await over.wait()
        return trio.current_time() - started

    async with trio.open_nursery() as nursery:
        yield await nursery.start(engine), cancel


async def connect_only(world: World, client: Client) -> None:
    """Say nothing."""


async def half_a_head(world: World, client: Client) -> None:
    """Say half of what there is to say."""
    await client.stream.send_all(b"POST /v1/mess")


async def half_a_body(world: World, client: Client) -> None:
    """Upload a part."""
    await client.send(world.head(headers=[("content-length", "99")]))
    await client.send(h11.Data(data=b"x"))


async def endless_body(world: World, client: Client) -> None:
    """Upload more than the API takes."""
    await client.send(world.head(headers=[("content-length", str(64 * MIB))]))
    with trio.move_on_after(0.3):
        while True:
            await client.send(h11.Data(data=b"x" * 2**16))


async def whole_request(world: World, client: Client) -> None:
    """Ask, and do not read."""
    await client.send(world.head())
    await client.send(h11.EndOfMessage())


async def refused_request(world: World, client: Client) -> None:
    """Be refused, and stay."""
    await client.send(world.head(token="wrong"))
    await client.send(h11.EndOfMessage())
    await client.answer()


async def stuck(call: Call) -> None:
    """Take nothing."""
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("point", "handler"),
    [
        (connect_only, silent),
        (half_a_head, silent),
        (half_a_body, reading_forever),
        (endless_body, stuck),
        (whole_request, silent),
        (whole_request, streaming_slowly),
        (whole_request, flooding),
        (refused_request, silent),
    ],
)
@pytest.mark.parametrize("url_scheme", ["http", "https"])
async def test_cancellation_is_quick_at_any_point(
    point: Callable[[World, Client], Awaitable[None]],
    handler: Callable[[Call], Awaitable[None]],
    url_scheme: str,
) -> None:
    """Within 100 ms all is closed, whoever does not read, write or speak TLS."""
    took = []
    for _ in range(2):
        async with open_api(handler) as api:
            # No TLS there: the handshake hangs.
            api.is_mute = url_scheme == "https"
            wallet = Wallet(credential_for(api.port, url_scheme=url_scheme))
            async with cancellable(api, wallet) as (world, cancel):
                client = await world.connect()
                await point(world, client)
                await trio.sleep(0.1)
                took.append(await cancel())
                with trio.fail_after(PATIENCE):
                    try:
                        while await client.stream.receive_some():
                            pass
                    except trio.BrokenResourceError:
                        pass
                await client.stream.aclose()
    assert min(took) < CANCELLED


async def test_leaving_the_proxy_ends_those_who_serve() -> None:
    """Whoever still serves in a nursery further out comes to an end."""
    async with trio.open_nursery() as nursery:
        async with open_proxy(Wallet(None)) as proxy:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listener.socket.getsockname()[1]
            # That this closes before the nursery is what is tested.
            serve = proxy.serve
            await nursery.start(serve, listener)
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await trio.sleep(0.05)
        with trio.fail_after(PATIENCE):
            assert await stream.receive_some() == b""
        await stream.aclose()


REQUEST: Final = (
    b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: localhost\r\n"
    b"X-Api-Key: TOKEN\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\n\r\n"
)
PIECES: Final = (
    *(b"POST ", b"GET ", b"CONNECT ", b"/v1/messages", b" HTTP/1.1\r\n", b"\r\n"),
    *(b"Host: a\r\n", b"X-Api-Key: x\r\n", b"Content-Length: 5\r\n", b"\r\n\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"5\r\nabcde\r\n", b"0\r\n\r\n", b"\0", b"{}"),
)


async def reply_to(data: bytes, *, with_token: bool) -> tuple[bytes, int]:
    """Return what raw bytes are answered with, and how often they reach the API."""
    async with open_api(answering) as api:
        wallet = Wallet(credential_for(api.port))
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        async with open_proxy(wallet) as proxy, trio.open_nursery() as nursery:
            await nursery.start(proxy.serve, listener)
            with proxy.admit("family", "1f") as ticket:
                if with_token:
                    data = data.replace(b"TOKEN", ticket.token.encode())
                got = await _talk(port, data)
            nursery.cancel_scope.cancel()
        return got, api.connections


async def _talk(port: int, data: bytes) -> bytes:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    got = b""
    async with stream:
        with trio.fail_after(PATIENCE):
            try:
                await stream.send_all(data)
                await stream.send_eof()
                while chunk := await stream.receive_some():
                    got += chunk
            except trio.BrokenResourceError:
                pass
    return got


@given(data=st.binary(max_size=300) | st.lists(st.sampled_from(PIECES)).map(b"".join))
@example(data=b"\x16\x03\x01\x02\0\x01")
@example(data=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
@example(data=b"GET / HTTP/1.0\r\n\r\n")
@settings(max_examples=60)
def test_whatever_comes_is_answered_or_closed(data: bytes) -> None:
    """Raw bytes never raise, never reach the API, and are answered with 4xx at most."""
    got, connections = trio.run(partial(reply_to, data, with_token=False))

    assert connections == 0
    assert not got or got.startswith(b"HTTP/1.1 4")


@given(
    at=st.integers(1, len(REQUEST) - 5),
    byte=st.sampled_from(sorted({*range(32), 127} - {9})),
)
@settings(max_examples=60)
def test_a_control_character_anywhere_is_refused(at: int, byte: int) -> None:
    """With a good token, too, a head has nothing in it that could end or split it."""
    data = REQUEST[:at] + bytes([byte]) + REQUEST[at:] + b"{}"
    got, connections = trio.run(partial(reply_to, data, with_token=True))

    assert connections == 0
    assert not got or got.startswith(b"HTTP/1.1 4")


SMUGGLED: Final = b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nX-Api-Key: TOKEN\r\n"


@pytest.mark.parametrize(
    "data",
    [
        SMUGGLED + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
        SMUGGLED + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n8\r\nSMUG",
        SMUGGLED + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        SMUGGLED + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        SMUGGLED + b"Transfer-Encoding\r\n : chunked\r\n\r\n0\r\n\r\n",
        SMUGGLED
        + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
        SMUGGLED + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\nGET /admin",
        SMUGGLED + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde",
        SMUGGLED + b"Content-Length: 1_0\r\n\r\nabcdefghij",
        SMUGGLED + b"X: 1\nContent-Length: 5\r\n\r\nabcde",
        SMUGGLED.replace(b"/v1", b"http://other/v1") + b"\r\n",
        SMUGGLED.replace(b"/v1", b"//other/v1") + b"\r\n",
        SMUGGLED.replace(b"POST /v1/messages", b"CONNECT api:443") + b"\r\n",
        SMUGGLED + b"Host: b\r\n\r\n",
    ],
)
async def test_smuggling_is_refused(data: bytes) -> None:
    """Requests that two parsers read differently are 400, and end the connection."""
    got, connections = await reply_to(data, with_token=True)

    assert connections == 0
    assert got.startswith(b"HTTP/1.1 400 ")
    assert got.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "body", [b"5\r\nabcde\r\nZ\r\n", b"5\r\nabcdefg\r\n0\r\n\r\n", b"-1\r\n"]
)
async def test_chunks_that_are_none_break_the_request(body: bytes) -> None:
    """What was passed on until then is broken off; nothing after it is a request."""
    head = SMUGGLED + b"Transfer-Encoding: chunked\r\n\r\n"
    got, _ = await reply_to(head + body + b"GET / HTTP/1.1\r\n\r\n", with_token=True)

    assert got.startswith(b"HTTP/1.1 400 ")
    assert got.count(b"HTTP/1.1") == 1


async def test_requests_that_were_left_take_no_place() -> None:
    """Clients that leave do not use up the connections to the API."""

    async def once_asked(call: Call) -> None:
        await (silent if call.header("x-leaves") else answering)(call)

    async with open_world(once_asked, limits=ProxyLimits(max_connections=3)) as world:
        for number in range(12):
            client = await world.connect()
            await client.send(world.head(headers=[("x-leaves", "1")]))
            await client.send(h11.EndOfMessage())
            # Some leave before the API was reached.
            if number % 3:
                await until(lambda: world.ticket.connections)
                await trio.sleep(0.01 * (number % 2))
            await client.stream.aclose()
            await until(lambda: not world.ticket.connections)
        with trio.fail_after(PATIENCE):
            assert (await world.ask()).status == 200


async def test_descriptors_are_given_back(tmp_path: Path) -> None:
    """Requests, answered and refused, leave nothing open."""
    path = str(tmp_path / "s")
    async with open_world() as world, trio.open_nursery() as nursery:
        listener = await unix_listener(path)
        serve = partial(world.proxy.serve, listener, ticket=world.ticket)
        await nursery.start(serve)
        await world.ask()
        before = open_descriptors()
        for number in range(50):
            stream = await trio.open_unix_socket(path)
            client = Client(stream)
            token = None if number % 2 else "wrong"
            await world.ask(client=client, token=token)
            await stream.aclose()
        await until(lambda: not world.ticket.connections)
        assert open_descriptors() <= before + 2
        nursery.cancel_scope.cancel()
