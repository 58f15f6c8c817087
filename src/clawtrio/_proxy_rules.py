"""What the credential proxy lets pass, and in which form; sans-I/O.

The client is an agent, which may be hostile; the upstream is the API, which may be a
gateway with a parser of its own. So a request is refused unless every parser would read
it the same way, and what goes on is written anew from what was understood.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias

import attrs
import h11

from ._credentials import Credential
from ._errors import SettingsError
from ._settings import KIB, MIB

Header: TypeAlias = tuple[bytes, bytes]
Route: TypeAlias = tuple[str, str]

ErrorType: TypeAlias = Literal[
    "api_error",
    "authentication_error",
    "invalid_request_error",
    "permission_error",
    "rate_limit_error",
    "request_too_large",
    "timeout_error",
]

#: What the Claude CLI calls.
_ROUTES: Final[frozenset[Route]] = frozenset(
    {
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
        ("GET", "/api/hello"),
        ("HEAD", "/api/hello"),
    }
)
#: Methods of a path that the settings name.
_METHODS: Final = ("GET", "HEAD", "POST")
#: Real keys, what other runs have left with the API, and what outlives the run.
_NEVER: Final = re.compile(
    r"/api/oauth|/v1/(files|messages/batches|organizations|oauth)", re.IGNORECASE
)

# No path that is let pass has a percent sign: what is encoded can only mean to deceive.
_PATH: Final = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@-]+)+/?|/")
_QUERY: Final = re.compile(
    rb"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%(?![01]|7[Ff])[0-9A-Fa-f]{2})*"
)
_LONGEST_QUERY: Final = 2 * KIB
_HOST: Final = re.compile(rb"[A-Za-z0-9._-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
#: All that ends a line anywhere but at its end, folds one, or is invisible.
_UNCLEAN: Final = re.compile(
    rb"(?<!\r)\n|\r(?!\n)|\r\n[ \t]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)
#: Headers that frame a message or name its receiver: two of one are two messages.
_SINGLE: Final = re.compile(
    rb"\r\n(content-length|transfer-encoding|host|expect)[ \t]*:", re.IGNORECASE
)

#: Two lengths in one: what reads them as one drops the other.
_LENGTHS: Final = re.compile(rb"\r\ncontent-length[ \t]*:[^\r]*,", re.IGNORECASE)

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
#: What we say in the client's place.
_OURS: Final = frozenset(
    {
        b"accept-encoding",
        b"anthropic-beta",
        b"authorization",
        b"content-length",
        b"expect",
        b"host",
        b"x-api-key",
    }
)
#: What the API wants to see beside an OAuth token.
_OAUTH_BETA: Final = b"oauth-2025-04-20"


@attrs.define
class RefusedError(Exception):
    """A request is answered by the proxy itself; nobody outside it sees this.

    Attributes:
        status: The HTTP status.
        kind: The type of the error, in the API's words.
        message: What to tell the client.
        retry: Whether the same request may succeed later; clients ask again for
            minutes, unless told not to.
    """

    status: int
    kind: ErrorType
    message: str
    retry: bool = False

    def __str__(self) -> str:
        return f"{self.status} {self.kind}: {self.message}"

    @property
    def body(self) -> bytes:
        """The error as the API would write it."""
        error = {"type": self.kind, "message": self.message}
        return json.dumps({"type": "error", "error": error}).encode()

    @property
    def headers(self) -> list[Header]:
        """The headers for the body; the connection ends with it."""
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(self.body)),
            (b"connection", b"close"),
        ]
        if not self.retry:
            headers.append((b"x-should-retry", b"false"))
        return headers


def _positive(_: object, field: attrs.Attribute[Any], value: float) -> None:
    if not value > 0 or math.isnan(value):
        raise ValueError(f"{field.name} must be above 0, not {value!r}")


def _limit(default: Any) -> Any:
    return attrs.field(default=default, validator=_positive)


#: Descriptors for all else that a bot has open: of the usual 1024 it keeps these.
_RESERVED_DESCRIPTORS: Final = 200
#: One run may have this part of all connections.
_SHARES: Final = 5

#: A body of events, one after the other.
EVENT_STREAM: Final = b"text/event-stream"


@attrs.frozen(kw_only=True)
class ProxyLimits:
    """How much the credential proxy takes, and how long it waits.

    Attributes:
        max_connections: Connections in all; further ones are closed at once.
        max_connections_per_run: Connections of one run, or of one open listener.
        max_header_bytes: Largest head of a request; curl and Node stop at less.
        max_body_bytes: Largest body of a request; the API takes 32 MiB.
        idle_timeout: Seconds that a connection may be without a request.
        header_timeout: Seconds for a head, from its first byte.
        stall_timeout: Seconds that a client may send nothing of a body, or take
            nothing of a response, and the API nothing of a request.
        connect_timeout: Seconds for a connection to the API, TLS included.
        silence_timeout: Seconds that the API may be silent; it thinks for minutes.
        stream_timeout: The same once it streams events: then it pings as it thinks.
        total_timeout: Seconds for a request and its response.

    Raises:
        ValueError: If one is not above 0.
    """

    max_connections: int = _limit(1000)
    max_connections_per_run: int = _limit(64)
    max_header_bytes: int = _limit(64 * KIB)
    max_body_bytes: int = _limit(64 * MIB)
    idle_timeout: float = _limit(75.0)
    header_timeout: float = _limit(15.0)
    stall_timeout: float = _limit(120.0)
    connect_timeout: float = _limit(15.0)
    silence_timeout: float = _limit(600.0)
    stream_timeout: float = _limit(60.0)
    total_timeout: float = _limit(3600.0)


def fit_limits(limits: ProxyLimits, descriptors: float) -> ProxyLimits:
    """Take no more connections than there are descriptors for, and share them.

    Args:
        limits: What would be taken.
        descriptors: How many the process may have. A request takes two.
    """
    most = max(int(min(descriptors, 2**20) - _RESERVED_DESCRIPTORS) // 2, 2)
    return attrs.evolve(
        limits,
        max_connections=min(limits.max_connections, most),
        max_connections_per_run=min(
            limits.max_connections_per_run, max(most // _SHARES, 1)
        ),
    )


def choose_routes(paths: Iterable[str] | None) -> frozenset[Route]:
    """Return what may be called: by default what the Claude CLI needs.

    Args:
        paths: Paths to allow in place of that, for GET, HEAD and POST.

    Raises:
        SettingsError: If one can never be allowed.
    """
    if paths is None:
        return _ROUTES
    paths = tuple(paths)
    for path in paths:
        if not _PATH.fullmatch(path) or _has_dots(path):
            problem = f"must be plain URL paths, without a query, not {path!r}"
            raise SettingsError("proxy_paths", problem)
        if _NEVER.search(path):
            raise SettingsError("proxy_paths", f"{path} is never for agents to call")
    return frozenset((method, path) for method in _METHODS for path in paths)


def _has_dots(path: str) -> bool:
    return not {".", ".."}.isdisjoint(path.split("/"))


def check_request(head: bytes, request: h11.Request) -> None:
    """Check that everyone would read a request as h11 has.

    Args:
        head: Its bytes: h11 forgives, and tells only what it made of them.
        request: What h11 made of them.

    Raises:
        RefusedError: If it must not go on.
    """
    _check_head(head, request)
    path, _, query = request.target.partition(b"?")
    if len(query) > _LONGEST_QUERY or not _QUERY.fullmatch(query):
        raise _malformed("the query is too long, or has characters of no query")
    name = path.decode("ascii")
    if not _PATH.fullmatch(name) or _has_dots(name):
        raise _malformed("the target must be a plain path")


def check_route(request: h11.Request, routes: frozenset[Route]) -> None:
    """Check that a request is one of those that may be made.

    Raises:
        RefusedError: If it is not.
    """
    method = request.method.decode("ascii")
    path = request.target.partition(b"?")[0].decode("ascii")
    if (method, path) not in routes:
        message = f"the credential proxy does not pass on {method} {path[:200]}"
        raise RefusedError(403, "permission_error", message)


def check_target(request: h11.Request, credential: Credential) -> None:
    """Check that a request and the base URL together are not what is never called.

    Raises:
        RefusedError: If they are.
    """
    path = upstream_target(request, credential).partition(b"?")[0].decode("ascii")
    # What the base URL alone has of it is the operator's business.
    base = len(credential.base_url.path)
    if any(found.end() > base for found in _NEVER.finditer(path)):
        message = f"the credential proxy never passes on {path[base:][:200]}"
        raise RefusedError(403, "permission_error", message)


def _check_head(head: bytes, request: h11.Request) -> None:
    headers = dict(request.headers)
    named = [name.lower() for name in _SINGLE.findall(head)]
    if request.http_version != b"1.1":
        raise _malformed("speak HTTP/1.1")
    if _UNCLEAN.search(head):
        raise _malformed("the head has folded lines or control characters")
    if len(set(named)) < len(named) or _LENGTHS.search(head):
        raise _malformed("a header that must come once comes twice")
    if b"content-length" in headers and b"transfer-encoding" in headers:
        raise _malformed("Content-Length and Transfer-Encoding exclude each other")
    if not _HOST.fullmatch(headers[b"host"]):
        raise _malformed("the Host header names no host")
    if request.method in {b"CONNECT", b"TRACE"} or b"upgrade" in headers:
        raise _malformed("there are no tunnels here, nor other protocols")
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise RefusedError(417, "invalid_request_error", "expect 100-continue")


def _malformed(message: str) -> RefusedError:
    return RefusedError(400, "invalid_request_error", message)


def check_size(size: int, limits: ProxyLimits) -> None:
    """Check how large a request's body is, or says that it will be.

    Raises:
        RefusedError: If it is too large.
    """
    if size > limits.max_body_bytes:
        message = f"a request may have {limits.max_body_bytes} bytes"
        raise RefusedError(413, "request_too_large", message)


def announced_size(request: h11.Request) -> int:
    """Return how large the body says it is; 0 if it does not say."""
    return int(dict(request.headers).get(b"content-length", b"0"))


def tokens_of(request: h11.Request) -> list[bytes]:
    """Return what a request carries in place of a credential, in either header."""
    tokens = []
    for name, value in request.headers:
        if name == b"x-api-key":
            tokens.append(value)
        elif name == b"authorization":
            scheme, _, token = value.partition(b" ")
            if scheme.lower() == b"bearer":
                tokens.append(token.strip())
    return tokens


def upstream_target(request: h11.Request, credential: Credential) -> bytes:
    """Return the path and query to ask the API for."""
    return credential.base_url.path.encode() + request.target


def upstream_headers(headers: Sequence[Header], credential: Credential) -> list[Header]:
    """Return a request's headers for the API, the credential among them.

    The API is asked not to compress, so that its tokens can be counted in passing.
    """
    passed = [
        (name, value)
        for name, value in _end_to_end(headers)
        # Some servers take an underscore for a dash: x_api_key would be ours.
        if name not in _OURS and b"_" not in name
    ]
    framing = [
        (name, value)
        for name, value in headers
        if name in {b"content-length", b"transfer-encoding"}
    ]
    return [
        (b"host", credential.base_url.authority.encode()),
        *passed,
        (b"accept-encoding", b"identity"),
        *_betas(headers, credential),
        *framing,
        credential_header(credential),
    ]


def credential_header(credential: Credential) -> Header:
    """Return the header that the API knows us by."""
    secret = credential.secret.encode("ascii")
    if credential.scheme == "api-key":
        return b"x-api-key", secret
    return b"authorization", b"Bearer " + secret


def _betas(headers: Iterable[Header], credential: Credential) -> list[Header]:
    values = [value for name, value in headers if name == b"anthropic-beta"]
    if credential.scheme == "oauth":
        values.append(_OAUTH_BETA)
    betas = dict.fromkeys(b.strip() for value in values for b in value.split(b","))
    betas.pop(b"", None)
    return [(b"anthropic-beta", b",".join(betas))] if betas else []


def response_headers(headers: Iterable[Header], credential: Credential) -> list[Header]:
    """Return a response's headers for the client: none has the credential in it."""
    lowered = [(name.lower(), value) for name, value in headers]
    passed = _end_to_end(lowered)
    if b"transfer-encoding" in dict(lowered):
        # It was read in chunks, whatever length it gave besides.
        passed = [header for header in passed if header[0] != b"content-length"]
    return [header for header in passed if not tells(b": ".join(header), credential)]


def tells(text: bytes, credential: Credential) -> bool:
    """Whether what the API says has the credential in it, in whatever case."""
    return credential.secret.lower().encode("ascii") in text.lower()


def media_type(headers: Iterable[Header]) -> bytes:
    """Return what kind of body comes with these headers, in lower case."""
    named = {name.lower(): value for name, value in headers}
    return named.get(b"content-type", b"").partition(b";")[0].strip().lower()


def _end_to_end(headers: Sequence[Header]) -> list[Header]:
    """Leave out what is between two neighbours only."""
    named = {
        word.strip().lower()
        for name, value in headers
        if name == b"connection"
        for word in value.split(b",")
    }
    # A length is of the message, whatever Connection says of it.
    dropped = _HOP_BY_HOP | (named - {b"content-length"})
    return [header for header in headers if header[0] not in dropped]
