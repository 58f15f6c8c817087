"""A loopback port for the proxy on the host, which is a Unix socket in here.

The container has no network; what calls an API knows TCP alone. So each connection to
the port is joined to one to the socket. It is done in a process of its own: the agent
may be any program, which replaces this one by ``exec``.

- The port is open before the agent starts. The process has none of the agent's streams,
  nor is it a child, which an agent that waits for all its children would wait for.
- It watches the agent by a pidfd, and ends with it, however that ends.
- At most one read is kept per direction: backpressure goes through, and so does the end
  of either direction. A client that leaves is thereby seen on the host at once.
- A stream that was cut off must not look like one that ended: a reset is passed on as a
  reset. But what the proxy said before it stopped listening still arrives.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Final, NoReturn, cast

SOCKET: Final = "CLAWTRIO_PROXY"
URL: Final = "ANTHROPIC_BASE_URL"

_READ_SIZE: Final = 2**16
#: Two descriptors each; 1024 of these are the least that containers are given.
_MAX_CONNECTIONS: Final = 400
#: Seconds until it is tried again, when the host is slow to accept.
_RETRY_INTERVAL: Final = 0.01
#: With it, closing sends a reset.
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class ForwardError(Exception):
    """The port cannot be opened: the agent would have no way to the proxy."""


def start(environ: Mapping[str, str]) -> None:
    """Open the port that *environ* names, for as long as this process lives.

    Raises:
        ForwardError: If it cannot be opened.
    """
    port = _port_of(environ.get(URL, ""))
    try:
        listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        agent = os.pidfd_open(os.getpid())
        between = os.fork()
    except OSError as exc:
        raise ForwardError(f"port {port} can't be opened: {exc.strerror}") from exc
    if not between:
        _become_forwarder(listener, environ[SOCKET], agent)
    os.waitpid(between, 0)
    listener.close()
    os.close(agent)


def _port_of(url: str) -> int:
    authority = url.partition("://")[2].partition("/")[0]
    port = authority.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ForwardError(f"{URL} names no port: {url!r}")
    return int(port)


def _become_forwarder(listener: socket.socket, path: str, agent: int) -> NoReturn:
    try:
        # Away from what is sent to the agent's process group, then from its children.
        os.setsid()
        if os.fork():
            os._exit(0)
        # Its streams end when it does, and no sooner because of us.
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        _Forwarder(listener, path).serve(agent)
    finally:
        os._exit(1)


class _Flow:
    """The bytes of one direction."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, *, refusable: bool
    ) -> None:
        self.source = source
        self.sink = sink
        self.pending = memoryview(b"")
        self.ended = False
        self._refusable = refusable
        self._refused = False

    @property
    def reads(self) -> bool:
        """Whether more may be read."""
        return not self.ended and not self.pending

    @property
    def over(self) -> bool:
        """Whether everything has gone its way."""
        return self.ended and not self.pending

    def receive(self) -> None:
        """Read once, and pass it on."""
        try:
            self.pending = memoryview(self.source.recv(_READ_SIZE))
        except BlockingIOError:
            return
        self.ended = not self.pending
        self.send()

    def send(self) -> None:
        """Pass on what is pending, as far as that goes."""
        try:
            if self.pending and not self._refused:
                self.pending = self.pending[self.sink.send(self.pending) :]
            if self.over:
                self.sink.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:
            if not self._refusable:
                raise
            self._refused = True
        if self._refused:
            self.pending = memoryview(b"")


class _Connection:
    """A client, and its own connection to the proxy."""

    def __init__(self, client: socket.socket, proxy: socket.socket) -> None:
        self.client = client
        self.proxy = proxy
        # A proxy that listens no more may have said why.
        self._up = _Flow(client, proxy, refusable=True)
        self._down = _Flow(proxy, client, refusable=False)

    @property
    def over(self) -> bool:
        """Whether both directions are."""
        return self._up.over and self._down.over

    def wanted(self, side: socket.socket) -> int:
        """Return the events that *side* is watched for."""
        out_of, into = self._flows(side)
        reading = EVENT_READ if out_of.reads else 0
        return reading | (EVENT_WRITE if into.pending else 0)

    def move(self, side: socket.socket, events: int) -> None:
        """Do what *events* on *side* allow.

        Raises:
            OSError: If the connection is broken.
        """
        out_of, into = self._flows(side)
        if events & EVENT_WRITE:
            into.send()
        if events & EVENT_READ:
            out_of.receive()

    def close(self, *, broken: bool = False) -> None:
        """Close both sides; the client sees it if the connection is *broken*."""
        if broken:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.client.close()
        self.proxy.close()

    def _flows(self, side: socket.socket) -> tuple[_Flow, _Flow]:
        if side is self.client:
            return self._up, self._down
        return self._down, self._up


class _Forwarder:
    """Joins each connection that *listener* gets to one to the Unix socket *path*."""

    def __init__(self, listener: socket.socket, path: str) -> None:
        self._listener = listener
        self._path = path
        self._selector = DefaultSelector()
        self._connections: set[_Connection] = set()
        listener.settimeout(0)

    def serve(self, agent: int) -> None:
        """Forward until the process of the pidfd *agent* is gone."""
        self._selector.register(agent, EVENT_READ)
        delayed = False
        while True:
            full = len(self._connections) >= _MAX_CONNECTIONS
            self._watch(self._listener, 0 if full or delayed else EVENT_READ)
            ready = self._selector.select(_RETRY_INTERVAL if delayed else None)
            delayed = False
            for key, events in ready:
                if key.fd == agent:
                    return
                if key.fileobj is self._listener:
                    delayed = not self._join()
                # It may have been closed for what happened on its other side.
                elif key.data in self._connections:
                    self._move(key.data, cast("socket.socket", key.fileobj), events)

    def _join(self) -> bool:
        """Take one client; False if it has to wait until the host accepts more."""
        proxy = socket.socket(socket.AF_UNIX)
        proxy.settimeout(0)
        reachable = True
        try:
            proxy.connect(self._path)
        except BlockingIOError:
            proxy.close()
            return False
        except OSError:
            reachable = False
        try:
            client, _ = self._listener.accept()
        except OSError:  # gone again
            proxy.close()
            return True
        client.settimeout(0)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, proxy)
        if reachable:
            self._connections.add(connection)
            self._watch_both(connection)
        else:
            connection.close(broken=True)
        return True

    def _move(self, connection: _Connection, side: socket.socket, events: int) -> None:
        broken = False
        try:
            connection.move(side, events)
        except OSError:
            broken = True
        if not broken and not connection.over:
            self._watch_both(connection)
            return
        self._connections.remove(connection)
        self._watch(connection.client, 0)
        self._watch(connection.proxy, 0)
        connection.close(broken=broken)

    def _watch_both(self, connection: _Connection) -> None:
        for side in (connection.client, connection.proxy):
            self._watch(side, connection.wanted(side), connection)

    def _watch(
        self, side: socket.socket, events: int, connection: _Connection | None = None
    ) -> None:
        # What is watched for nothing would still be reported once it is hung up.
        known = self._selector.get_map().get(side)
        if known is None:
            if events:
                self._selector.register(side, events, connection)
        elif not events:
            self._selector.unregister(side)
        elif events != known.events:
            self._selector.modify(side, events, connection)
