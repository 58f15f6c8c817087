"""A fake API on loopback, the proxy before it, and a client that reads every byte."""

from __future__ import annotations

import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs
import h11
import trio

from clawtrio._credentials import BaseUrl, Credential, Scheme
from clawtrio._proxy import Proxy, open_proxy
from clawtrio._proxy_rules import ProxyLimits
from clawtrio._proxy_tickets import Ticket

#: Seconds for what takes milliseconds, on a busy machine.
PATIENCE: Final = 20.0
SECRET: Final = "sk-ant-the-real-one-8f3a"
Headers: TypeAlias = list[tuple[str, str]]
JSON: Final[Headers] = [("content-type", "application/json")]
SSE: Final[Headers] = [("content-type", "text/event-stream")]
MESSAGE: Final = {
    "type": "message",
    "content": [{"type": "text", "text": 'the "usage" of it'}],
    "usage": {
        "input_tokens": 7,
        "output_tokens": 5,
        "cache_creation_input_tokens": 3,
        "cache_read_input_tokens": 2,
    },
}


class Call:
    """One request that has reached the API.

    Attributes:
        headers: What came with it, in order.
        body: What came of its body so far.
        is_broken: Whether the body was broken off.
    """

    def __init__(
        self, api: FakeApi, stream: trio.abc.Stream, connection: h11.Connection
    ) -> None:
        self._api = api
        self._stream = stream
        self._http = connection
        self.method = ""
        self.target = ""
        self.headers: Headers = []
        self.body = bytearray()
        self.is_broken = False

    def header(self, name: str) -> str | None:
        """Return the one header of that name."""
        values = [value for n, value in self.headers if n == name]
        assert len(values) <= 1
        return values[0] if values else None

    async def next_event(self) -> object:
        """Return the next event of h11."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(bytes(await self._stream.receive_some(2**16)))
        return event

    async def begin(self) -> bool:
        """Read a head; tell whether there was one."""
        event = await self.next_event()
        if not isinstance(event, h11.Request):
            return False
        self.method = event.method.decode()
        self.target = event.target.decode()
        self.headers = [(n.decode(), v.decode()) for n, v in event.headers]
        self._api.calls.append(self)
        return True

    async def read(self) -> bytes:
        """Read the body."""
        try:
            while isinstance(event := await self.next_event(), h11.Data):
                self.body += event.data
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            self.is_broken = True
        return bytes(self.body)

    async def head(self, status: int, headers: Headers, reason: str = "") -> None:
        """Write a head."""
        event = h11.Response(status_code=status, headers=headers, reason=reason)
        await self.raw(self._http.send(event) or b"")

    async def send(self, data: bytes) -> None:
        """Write a piece of the body."""
        await self.raw(self._http.send(h11.Data(data=data)) or b"")

    async def end(self) -> None:
        """End the body."""
        await self.raw(self._http.send(h11.EndOfMessage()) or b"")

    async def raw(self, data: bytes) -> None:
        """Write bytes."""
        await self._stream.send_all(data)

    async def reply(
        self, body: bytes, status: int = 200, headers: Headers = JSON
    ) -> None:
        """Write a whole response."""
        await self.head(status, [*headers, ("content-length", str(len(body)))])
        if self.method != "HEAD":
            await self.send(body)
        await self.end()

    async def wait_gone(self) -> None:
        """Wait until the proxy has closed the connection."""
        try:
            while await self._stream.receive_some(2**16):
                pass
        except trio.BrokenResourceError:
            pass
        self._api.gone.set()


Handler: TypeAlias = Callable[[Call], Awaitable[None]]


async def answering(call: Call) -> None:
    """Answer as the API does."""
    await call.read()
    await call.reply(json.dumps(MESSAGE).encode())


async def silent(call: Call) -> None:
    """Read, and say nothing."""
    await call.read()
    await call.wait_gone()


class FakeApi:
    """The API.

    Attributes:
        calls: What has reached it.
        connections: How many were made to it.
        gone: Set once a handler has seen the proxy leave.
        port: Where it is.
        is_mute: Whether it accepts connections, and then does nothing.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.is_mute = False
        self.calls: list[Call] = []
        self.connections = 0
        self.gone = trio.Event()
        self.port = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve a connection."""
        self.connections += 1
        connection = h11.Connection(h11.SERVER)
        try:
            if self.is_mute:
                await trio.sleep_forever()
            while await (call := Call(self, stream, connection)).begin():
                await self.handler(call)
                if connection.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                    break
                connection.start_next_cycle()
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            pass
        finally:
            await trio.aclose_forcefully(stream)


def is_bound(listener: trio.SocketListener) -> int:
    """Return the port."""
    port: int = listener.socket.getsockname()[1]
    return port


@asynccontextmanager
async def open_api(
    handler: Handler = answering, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[FakeApi]:
    """Have an API on loopback."""
    api = FakeApi(handler)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    api.port = is_bound(listener)
    listeners: list[Any] = [listener]
    if tls is not None:
        listeners = [trio.SSLListener(listener, tls, https_compatible=True)]
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, api.serve, listeners))
        yield api
        nursery.cancel_scope.cancel()


def write_env(
    root: Path, port: int, variable: str = "ANTHROPIC_API_KEY", secret: str = SECRET
) -> None:
    """Write ``.env`` as whoever renews a token does."""
    new = root / "new"
    base_url = f"http://127.0.0.1:{port}"
    new.write_text(f"{variable}={secret}\nANTHROPIC_BASE_URL={base_url}\n")
    new.rename(root / ".env")


def credential_for(
    port: int,
    scheme: Scheme = "api-key",
    *,
    path: str = "",
    url_scheme: str = "http",
    host: str = "127.0.0.1",
) -> Credential:
    """Make a credential for an API on this machine."""
    return Credential(
        scheme=scheme,
        secret=SECRET,
        variable="ANTHROPIC_API_KEY",
        base_url=BaseUrl(scheme=url_scheme, host=host, port=port, path=path),
    )


@attrs.define
class Wallet:
    """A credential that a test can exchange."""

    credential: Credential | None

    def current(self) -> Credential | None:
        """Return it."""
        return self.credential


@attrs.frozen
class Answer:
    """What a client got.

    Attributes:
        is_whole: Whether the end of the body came.
    """

    status: int
    headers: Headers
    body: bytes
    is_whole: bool

    def header(self, name: str) -> str | None:
        """Return the one header of that name."""
        values = [value for n, value in self.headers if n == name]
        assert len(values) <= 1
        return values[0] if values else None

    @property
    def error(self) -> str:
        """The type of the error, in the API's format."""
        value = json.loads(self.body)
        assert value["type"] == "error"
        assert value["error"]["message"]
        kind: str = value["error"]["type"]
        return kind


class Client:
    """A client, with one connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT)

    async def send(self, event: h11.Event) -> None:
        """Write what h11 makes of an event."""
        await self.stream.send_all(self.http.send(event) or b"")

    async def next_event(self) -> object:
        """Return the next event of h11."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(bytes(await self.stream.receive_some(2**16)))
        return event

    async def answer(self) -> Answer:
        """Read a response."""
        while isinstance(head := await self.next_event(), h11.InformationalResponse):
            pass
        assert isinstance(head, h11.Response), head
        body = bytearray()
        whole = True
        try:
            while isinstance(event := await self.next_event(), h11.Data):
                body += event.data
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            whole = False
        headers = [(n.decode(), v.decode()) for n, v in head.headers]
        return Answer(head.status_code, headers, bytes(body), whole)


class World:
    """The proxy between a client and the API."""

    def __init__(
        self, api: FakeApi, proxy: Proxy, ticket: Ticket, port: int, wallet: Wallet
    ) -> None:
        self.api = api
        self.proxy = proxy
        self.ticket = ticket
        self.port = port
        self.wallet = wallet

    async def connect(self) -> Client:
        """Connect to the proxy."""
        return Client(await trio.open_tcp_stream("127.0.0.1", self.port))

    def head(
        self,
        method: str = "POST",
        target: str = "/v1/messages",
        headers: Sequence[tuple[str, str]] = (),
        *,
        token: str | None = None,
    ) -> h11.Request:
        """Make a request's head, with the run's token."""
        own = [("host", "localhost"), ("x-api-key", token or self.ticket.token)]
        return h11.Request(method=method, target=target, headers=[*own, *headers])

    async def ask(
        self,
        method: str = "POST",
        target: str = "/v1/messages",
        headers: Sequence[tuple[str, str]] = (),
        *,
        body: bytes = b"",
        token: str | None = None,
        client: Client | None = None,
    ) -> Answer:
        """Ask one thing on a connection, by default one of its own."""
        asking = client or await self.connect()
        length = [("content-length", str(len(body)))] if body else []
        head = self.head(method, target, [*headers, *length], token=token)
        await asking.send(head)
        if body:
            await asking.send(h11.Data(data=body))
        await asking.send(h11.EndOfMessage())
        answer = await asking.answer()
        if client is None:
            await asking.stream.aclose()
        return answer

    async def ask_raw(self, data: bytes) -> bytes:
        """Send bytes, and return all that comes until the proxy closes."""
        client = await self.connect()
        async with client.stream:
            await client.stream.send_all(data)
            got = bytearray()
            try:
                while chunk := await client.stream.receive_some(2**16):
                    got += chunk
            except trio.BrokenResourceError:
                pass
        return bytes(got)


@contextmanager
def no_bugs() -> Iterator[None]:
    """Make sure that the proxy logs no error of its own."""
    errors: list[object] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.exc_info)

    handler = Keep(logging.ERROR)
    logger = logging.getLogger("clawtrio._proxy")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert errors == []


@asynccontextmanager
async def open_world(
    handler: Handler = answering,
    *,
    scheme: Scheme = "api-key",
    path: str = "",
    paths: Sequence[str] | None = None,
    limits: ProxyLimits | None = None,
    own_listener: bool = False,
    is_sound: bool = True,
    max_requests: int | None = None,
    max_output_tokens: int | None = None,
) -> AsyncIterator[World]:
    """Have an API, a proxy before it, and a run's ticket for it.

    With *own_listener*, the run has a listener of its own. That a connection failed by
    a bug of the proxy, which it survives, is an error here, if *is_sound*.
    """
    async with open_api(handler) as api:
        wallet = Wallet(credential_for(api.port, scheme, path=path))
        async with (
            open_proxy(wallet, paths=paths, limits=limits) as proxy,
            trio.open_nursery() as nursery,
        ):
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            with proxy.admit(
                "family",
                "1f",
                max_requests=max_requests,
                max_output_tokens=max_output_tokens,
            ) as ticket:
                only = ticket if own_listener else None
                await nursery.start(partial(proxy.serve, listener, ticket=only))
                with no_bugs() if is_sound else nullcontext():
                    yield World(api, proxy, ticket, is_bound(listener), wallet)
            nursery.cancel_scope.cancel()


async def unix_listener(path: str) -> trio.SocketListener:
    """Listen on a Unix socket."""
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(path)
    sock.listen()
    return trio.SocketListener(sock)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what nobody tells."""
    with trio.fail_after(PATIENCE):
        while True:
            if condition():
                return
            await trio.sleep(0.002)
