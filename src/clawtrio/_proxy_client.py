"""One client's connection: requests in, one after the other, responses out.

Every byte from the client goes through h11, and every answer too. While an answer is
due, somebody reads from the client all the same, to notice that it has left: its end
of file is that, since no client of the API half-closes. Nobody reads what it uploads
but the API itself, so that neither is faster than the other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import Final, Protocol

import attrs
import h11
import httpcore2
import trio

from ._credentials import Credential
from ._proxy_rules import (
    ProxyLimits,
    RefusedError,
    Route,
    announced_size,
    check_request,
    check_route,
    check_size,
    check_target,
    response_headers,
    tells,
    tokens_of,
)
from ._proxy_tickets import Ticket, TicketOffice
from ._proxy_upstream import UPSTREAM_ERRORS, Upstream, upstream_failure
from ._proxy_usage import Meter

log = logging.getLogger(__name__)

_READ_SIZE: Final = 2**16
#: Seconds for a client to read a last answer: closing before it has sent all would
#: take the answer from it.
_LINGER: Final = 2.0
_TOO_LONG: Final = "the request is too long, malformed, or broken off"


class Credentials(Protocol):
    """Where the credential of the moment is from."""

    def current(self) -> Credential | None:
        """Return it; None if there is none."""


@attrs.frozen(kw_only=True)
class Service:
    """What all connections share."""

    credentials: Credentials
    office: TicketOffice
    upstream: Upstream
    routes: frozenset[Route]
    limits: ProxyLimits


class ClientConnection:
    """A connection that was accepted.

    Args:
        stream: To the client.
        service: What it shares with others.
        ticket: The only one that is good here; None if each live one is.
    """

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        service: Service,
        ticket: Ticket | None,
    ) -> None:
        self._stream = stream
        self._service = service
        self._limits = service.limits
        self._ticket = ticket
        self._scope = trio.CancelScope()
        self._http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=self._limits.max_header_bytes
        )
        self._method = b""
        self._watched = False

    async def run(self) -> None:
        """Serve the client until it leaves, or must."""
        try:
            with self._scope:
                if self._ticket is not None:
                    self._ticket.connections.add(self._scope)
                while await self._exchange():
                    self._http.start_next_cycle()
                if self._http.our_state in {h11.DONE, h11.MUST_CLOSE}:
                    await self._linger()
        except trio.BrokenResourceError:
            self._debug("a client has left")
        finally:
            if self._ticket is not None:
                self._ticket.connections.discard(self._scope)
            await trio.aclose_forcefully(self._stream)  # noqa: ASYNC102 - as it says

    async def _exchange(self) -> bool:
        """Answer a request; tell whether there may be another."""
        try:
            request = await self._next_request()
            if request is None:
                return False
            return await self._forward(request, self._admit(request))
        except RefusedError as refusal:
            await self._refuse(refusal)
        return False

    async def _next_request(self) -> h11.Request | None:
        """Return the next request, checked; None if there is none."""
        limits = self._limits
        received = bytearray(self._http.trailing_data[0])
        self._method = b""
        with trio.move_on_after(limits.idle_timeout) as scope:
            while (event := self._next_event()) is h11.NEED_DATA:
                data = await self._receive()
                if not received:
                    scope.deadline = trio.current_time() + limits.header_timeout
                received += data
                self._http.receive_data(data)
            if not isinstance(event, h11.Request):
                return None
            self._method = event.method
            head = bytes(received[: len(received) - len(self._http.trailing_data[0])])
            if len(head) > limits.max_header_bytes:
                raise RefusedError(431, "invalid_request_error", _TOO_LONG)
            check_request(head, event)
            return event
        if not received:
            return None
        raise RefusedError(408, "timeout_error", "the request does not come")

    def _next_event(self) -> object:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as exc:
            # Its words quote the client.
            status = 431 if exc.error_status_hint == HTTPStatus(431) else 400
            raise RefusedError(status, "invalid_request_error", _TOO_LONG) from None

    def _admit(self, request: h11.Request) -> Credential:
        service = self._service
        ticket = service.office.find(tokens_of(request), self._ticket)
        if ticket is None:
            message = "the run's token is missing, wrong, or dead"
            raise RefusedError(401, "authentication_error", message)
        self._join(ticket)
        check_route(request, service.routes)
        check_size(announced_size(request), self._limits)
        credential = service.credentials.current()
        if credential is None:
            raise RefusedError(503, "api_error", "the host has no credential")
        check_target(request, credential)
        ticket.spend_request()
        return credential

    def _join(self, ticket: Ticket) -> None:
        """Be one of the connections that end with the ticket."""
        if self._scope in ticket.connections:
            return
        if len(ticket.connections) >= self._limits.max_connections_per_run:
            message = "the run has too many connections"
            raise RefusedError(429, "rate_limit_error", message, retry=True)
        self._ticket = ticket
        ticket.connections.add(self._scope)

    async def _forward(self, request: h11.Request, credential: Credential) -> bool:
        outcome: RefusedError | bool = False
        self._watched = False
        async with trio.open_nursery() as nursery:
            watch = partial(self._start_watching, nursery)
            outcome = await self._relay(request, credential, watch)
            nursery.cancel_scope.cancel()
        if isinstance(outcome, RefusedError):
            raise outcome
        return outcome

    def _start_watching(self, nursery: trio.Nursery) -> None:
        if not self._watched:
            self._watched = True
            nursery.start_soon(self._watch, nursery.cancel_scope)

    async def _watch(self, scope: trio.CancelScope) -> None:
        """End the exchange when the client leaves. What it sends is for later."""
        ahead = 0
        try:
            while data := await self._receive():
                # What it still sends of a body that the API did not want is dropped.
                if self._http.their_state is h11.DONE:
                    self._http.receive_data(data)
                    ahead += len(data)
                if ahead > self._limits.max_header_bytes:
                    break
        except trio.BrokenResourceError:
            pass
        scope.cancel()

    async def _relay(
        self, request: h11.Request, credential: Credential, watch: Callable[[], None]
    ) -> RefusedError | bool:
        """Have the API answer; return what stood in the way, or as _exchange does."""
        try:
            with trio.move_on_after(self._limits.total_timeout):
                return await self._pass_on(request, credential, watch)
            refusal = RefusedError(504, "timeout_error", "the request takes too long")
        except RefusedError as exc:
            refusal = exc
        except trio.BrokenResourceError:
            return False
        # An answer that has begun can only be broken off.
        return refusal if self._http.our_state is h11.SEND_RESPONSE else False

    async def _pass_on(
        self, request: h11.Request, credential: Credential, watch: Callable[[], None]
    ) -> bool:
        body = self._body(watch)
        assert self._ticket is not None
        # Once for each trouble: an agent that tries again could fill the host's log.
        tell = self._ticket.warn_once
        response = await self._service.upstream.begin(
            request, body, credential, tell=tell
        )
        try:
            watch()
            await self._answer(response, credential)
        finally:
            await response.aclose()  # noqa: ASYNC102 - shields itself
        return self._http.our_state is self._http.their_state is h11.DONE

    async def _body(self, watch: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """Give what the client uploads, as it comes, and as the API takes it."""
        assert self._ticket is not None
        size = 0
        while isinstance(event := await self._next_body_event(), h11.Data):
            size += len(event.data)
            check_size(size, self._limits)
            self._ticket.count_request_bytes(len(event.data))
            yield bytes(event.data)
        watch()

    async def _next_body_event(self) -> object:
        while (event := self._next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                await self._send(h11.InformationalResponse(status_code=100, headers=[]))
            with trio.move_on_after(self._limits.stall_timeout) as scope:
                self._http.receive_data(await self._receive())
            if scope.cancelled_caught:
                raise RefusedError(408, "timeout_error", "the body does not come")
        return event

    async def _answer(
        self, response: httpcore2.Response, credential: Credential
    ) -> None:
        assert self._ticket is not None
        headers = response_headers(response.headers, credential)
        meter = Meter(headers, self._ticket.tokens)
        if self._http.their_state is h11.SEND_BODY:
            headers.append((b"connection", b"close"))
        reason = response.extensions["reason_phrase"]
        if tells(reason, credential):
            reason = b""
        head = h11.Response(status_code=response.status, headers=headers, reason=reason)
        await self._send(head)
        self._ticket.count_status(response.status)
        try:
            async with aclosing(response.aiter_stream()) as chunks:
                async for chunk in chunks:
                    try:
                        await self._send(h11.Data(data=chunk))
                    finally:
                        self._ticket.count_response_bytes(len(chunk))
                        meter.feed(chunk)
        except UPSTREAM_ERRORS as exc:
            raise upstream_failure(exc, self._ticket.warn_once) from None
        finally:
            meter.close()
        await self._send(h11.EndOfMessage())

    async def _refuse(self, refusal: RefusedError) -> None:
        """Answer in the API's place."""
        self._debug(f"refused: {refusal}")
        if self._ticket is not None:
            self._ticket.count_status(refusal.status)
        answer: list[h11.Event] = [
            h11.Response(status_code=refusal.status, headers=refusal.headers),
            h11.Data(data=refusal.body),
            h11.EndOfMessage(),
        ]
        if self._method == b"HEAD":
            del answer[1]
        await self._send(*answer)

    def _debug(self, message: str) -> None:
        tell = log.debug if self._ticket is None else self._ticket.debug
        tell(message)

    async def _send(self, *events: h11.Event) -> None:
        data = b"".join(self._http.send(event) or b"" for event in events)
        if data:
            # A client that does not read is done with. This is cheaper than a scope for
            # each piece, and most pieces are small.
            self._scope.deadline = trio.current_time() + self._limits.stall_timeout
            await self._stream.send_all(data)
            self._scope.deadline = math.inf

    async def _receive(self) -> bytes:
        return bytes(await self._stream.receive_some(_READ_SIZE))

    async def _linger(self) -> None:
        """Let the client read the last answer before the connection goes."""
        with trio.move_on_after(_LINGER):
            await self._stream.send_eof()
            while await self._receive():
                pass
