"""The way to the API: pooled connections, what can go wrong on them, and a look."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterable, Callable
from typing import Any, Final, Literal

import attrs
import h11
import httpcore2
import trio

from ._credentials import Credential
from ._proxy_rules import (
    EVENT_STREAM,
    ProxyLimits,
    RefusedError,
    media_type,
    upstream_headers,
    upstream_target,
)
from ._text import one_line

log = logging.getLogger(__name__)

#: What the API, or the way to it, can do to us.
UPSTREAM_ERRORS: Final = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
)
#: Seconds that an unused connection is kept; the API's own end keeps it for longer.
_KEEPALIVE: Final = 30.0
_IDLE_CONNECTIONS: Final = 20

_DEAD: Final = frozenset({401, 403})
#: It is refused for what it lacks, by all who know the key, and costs nothing.
_QUESTION: Final = b"{}"
_QUESTION_PATH: Final = "/v1/messages/count_tokens"


class _Stream(httpcore2.AsyncNetworkStream):
    """A connection that is closed if its handshake is cancelled; httpcore2's is not."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self.read = stream.read  # type: ignore[method-assign]
        self.write = stream.write  # type: ignore[method-assign]
        self.aclose = stream.aclose  # type: ignore[method-assign]
        self.get_extra_info = stream.get_extra_info  # type: ignore[method-assign]

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the name is httpcore2's
    ) -> httpcore2.AsyncNetworkStream:
        try:
            return await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            with trio.CancelScope(shield=True):
                # Nothing is said before it: no wait.
                await self._stream.aclose()
            raise


class _Backend(httpcore2.TrioBackend):
    async def connect_tcp(
        self, *args: Any, **options: Any
    ) -> httpcore2.AsyncNetworkStream:
        return _Stream(await super().connect_tcp(*args, **options))


class Upstream:
    """Sends requests to the API. Connections are verified, and used again.

    Args:
        limits: How long to wait.
    """

    def __init__(self, limits: ProxyLimits) -> None:
        self._timeouts = {
            "connect": limits.connect_timeout,
            "read": limits.silence_timeout,
            "write": limits.stall_timeout,
        }
        self._stream_timeout = limits.stream_timeout
        self._pool = httpcore2.AsyncConnectionPool(
            # The system's authorities, or those that SSL_CERT_FILE names.
            ssl_context=ssl.create_default_context(),
            max_connections=limits.max_connections,
            max_keepalive_connections=_IDLE_CONNECTIONS,
            keepalive_expiry=_KEEPALIVE,
            network_backend=_Backend(),
        )

    async def aclose(self) -> None:
        """Close all connections, at once."""
        await self._pool.aclose()

    async def begin(
        self,
        request: h11.Request,
        body: AsyncIterable[bytes],
        credential: Credential,
        *,
        tell: Callable[[str], object],
    ) -> httpcore2.Response:
        """Send a client's request, and return the response once its head is there.

        Args:
            request: The client's.
            body: Its body.
            credential: What it gets.
            tell: Told what goes wrong with the API.

        Raises:
            RefusedError: If there is no response.
        """
        base = credential.base_url
        url = httpcore2.URL(
            scheme=base.scheme,
            host=base.host,
            port=base.port,
            target=upstream_target(request, credential),
        )
        timeouts = dict(self._timeouts)
        wanted = httpcore2.Request(
            request.method,
            url,
            headers=upstream_headers(list(request.headers), credential),
            content=body,
            extensions={"timeout": timeouts},
        )
        try:
            response = await self._pool.handle_async_request(wanted)
        except UPSTREAM_ERRORS as exc:
            raise upstream_failure(exc, tell) from None
        if media_type(response.headers) == EVENT_STREAM:
            # The body is yet to be read, and by this.
            timeouts["read"] = self._stream_timeout
        return response


def upstream_failure(exc: Exception, tell: Callable[[str], object]) -> RefusedError:
    """Tell what went wrong with the API, and return what to answer the client."""
    tell(f"the API did not answer as it should: {_reason(exc)}")
    if isinstance(exc, httpcore2.TimeoutException):
        return RefusedError(504, "timeout_error", "the API is too slow", retry=True)
    return RefusedError(502, "api_error", "the API cannot be reached", retry=True)


def _reason(exc: BaseException) -> str:
    """Say why in a line; a protocol error would quote what the API has sent."""
    name = type(exc).__name__
    if not isinstance(exc, httpcore2.ConnectError):
        return name
    cause: BaseException | None = exc
    while cause is not None:
        exc = cause
        if isinstance(exc, BaseExceptionGroup):
            cause = exc.exceptions[0]
        else:
            cause = exc.__cause__ or exc.__context__
    return one_line(f"{name}: {exc}")


@attrs.frozen
class CredentialState:
    """What the API thinks of a credential.

    Attributes:
        state: ``alive``, ``dead`` if the API refuses it, ``unreachable`` if nobody
            could be asked.
        detail: More in a few words; never the credential.
    """

    state: Literal["alive", "dead", "unreachable"]
    detail: str


async def check_credential(
    credential: Credential, *, check_timeout: float = 5.0
) -> CredentialState:
    """Ask the API whether a credential is good; it costs nothing.

    Args:
        credential: Which.
        check_timeout: Seconds to wait for an answer.
    """
    base = credential.base_url
    where = f"{base.scheme}://{base.authority}"
    upstream = Upstream(ProxyLimits())
    request = h11.Request(
        method="POST",
        target=_QUESTION_PATH,
        headers=[
            ("host", base.authority),
            ("content-type", "application/json"),
            ("content-length", str(len(_QUESTION))),
            ("anthropic-version", "2023-06-01"),
        ],
    )
    try:
        with trio.fail_after(check_timeout):
            response = await upstream.begin(
                request, _question(), credential, tell=log.debug
            )
            await response.aclose()
    except trio.TooSlowError:
        detail = f"{where} has not answered in {check_timeout:g} s"
        return CredentialState("unreachable", detail)
    except RefusedError as refusal:
        return CredentialState("unreachable", f"{where}: {refusal.message}")
    finally:
        await upstream.aclose()  # noqa: ASYNC102 - shields itself
    answer = f"{where} answers {response.status} to {credential.variable}"
    return CredentialState("dead" if response.status in _DEAD else "alive", answer)


async def _question() -> AsyncIterable[bytes]:
    yield _QUESTION
