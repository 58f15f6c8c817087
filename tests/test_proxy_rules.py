"""What the credential proxy lets pass, and how it writes it anew."""

from __future__ import annotations

import json
import math

import h11
import pytest

from clawtrio import SettingsError
from clawtrio._proxy_rules import (
    ProxyLimits,
    RefusedError,
    check_request,
    check_route,
    choose_routes,
    fit_limits,
    response_headers,
    tokens_of,
    upstream_headers,
    upstream_target,
)

from .upstream import SECRET, credential_for

HOST = b"Host: localhost\r\n"


def parse(head: bytes) -> h11.Request:
    """Let h11 read a head."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    return event


def status_of(head: bytes) -> int | None:
    """Return the status that a head is refused with."""
    try:
        request = parse(head)
    except h11.RemoteProtocolError as exc:
        return exc.error_status_hint
    try:
        check_request(head, request)
        check_route(request, choose_routes(None))
    except RefusedError as exc:
        return exc.status
    return None


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages?beta=true"),
        ("POST", "/v1/messages?a=%C3%BC&b=/?"),
        ("POST", "/v1/messages/count_tokens?beta=true"),
        ("HEAD", "/api/hello"),
        ("GET", "/api/hello"),
    ],
)
def test_what_the_cli_calls_passes(method: str, target: str) -> None:
    """The Claude CLI can do its work."""
    assert (
        status_of(f"{method} {target} HTTP/1.1\r\n".encode() + HOST + b"\r\n") is None
    )


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/"),
        ("GET", "/v1/messages"),
        ("POST", "/v1/messages/"),
        ("POST", "/V1/messages"),
        ("POST", "/v1/messagesX"),
        ("POST", "/v1/messages/batches"),
        ("POST", "/v1/files"),
        ("GET", "/v1/models"),
        ("DELETE", "/v1/messages"),
        ("OPTIONS", "/v1/messages"),
        ("post", "/v1/messages"),
        ("POST", "/api/oauth/claude_cli/create_api_key"),
        ("GET", "/api/oauth/profile"),
    ],
)
def test_everything_else_is_denied(method: str, target: str) -> None:
    """Paths and methods are compared exactly, with a list."""
    head = f"{method} {target} HTTP/1.1\r\n".encode() + HOST + b"\r\n"

    assert status_of(head) == 403


@pytest.mark.parametrize(
    "target",
    [
        b"http://localhost/v1/messages",
        b"localhost:80",
        b"*",
        b"//evil/v1/messages",
        b"/v1//messages",
        b"/v1/../v1/messages",
        b"/v1/./messages",
        b"/v1/messages/..",
        b"/v1/%2e%2e/messages",
        b"/v1/%252e%252e/messages",
        b"/v1%2fmessages",
        b"/v1%5cmessages",
        b"/v1/messages%00",
        b"/v1/messages%2500",
        b"/v1\\messages",
        b"/v1/messages#top",
        b"/v1/messages?a#top",
        b"/v1/messages?a=%0d%0aX:1",
        b"/v1/messages?a=%00",
        b"/v1/messages?a=%7f",
        b"/v1/messages?a=%zz",
        b"/v1/messages?a=%",
        b"/v1/messages?a=\\",
        b"/v1/messages?" + b"a" * 2049,
        b"/v1/messages ?a",
        b"/v1/mess\xc3\xbc",
        b"/v1/messages\x01",
        b"v1/messages",
    ],
)
def test_a_target_that_others_may_read_otherwise_is_refused(target: bytes) -> None:
    """Absolute, authority and asterisk forms, traversal and encodings are 400."""
    assert status_of(b"POST " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n") == 400


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-length : 5\r\n",
        b"Content-Length: 5, 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5, 5\r\n",
        b"content-length : 5,5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b" X: 1\r\n",
        b"X: 1\r\n 2\r\n",
        b"X: 1\r\n\t2\r\n",
        b"X: 1\n",
        b"X: 1\r2\r\n",
        b"X: \x00\r\n",
        b"X: \x01\r\n",
        b"X: \x7f\r\n",
        b"X\x00: 1\r\n",
        b": 1\r\n",
        b"X\r\n",
        b"Host: other\r\n",
        b"Upgrade: websocket\r\nConnection: upgrade\r\n",
    ],
)
def test_a_head_that_others_may_read_otherwise_is_refused(lines: bytes) -> None:
    """Two lengths, folded lines and strange bytes are 400."""
    head = b"POST /v1/messages HTTP/1.1\r\n" + HOST + lines + b"\r\n"

    assert status_of(head) == 400


@pytest.mark.parametrize(
    "coding",
    [b"gzip", b"gzip, chunked", b"identity", b"chunked\r\nTransfer-Encoding: chunked"],
)
def test_another_transfer_coding_is_refused(coding: bytes) -> None:
    """Only chunked is understood; h11 calls the rest 501."""
    head = b"POST /v1/messages HTTP/1.1\r\n" + HOST

    assert status_of(head + b"Transfer-Encoding: " + coding + b"\r\n\r\n") == 501


@pytest.mark.parametrize(
    "start",
    [
        b"POST /v1/messages HTTP/1.0\r\n" + HOST,
        b"POST /v1/messages HTTP/2.0\r\n" + HOST,
        b"POST /v1/messages HTTP/1.1\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost:\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: a b\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: u@h\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: h/x\r\n",
        b"POST /v1/messages HTTP/1.1\nHost: localhost\r\n",
        b"POST  /v1/messages HTTP/1.1\r\n" + HOST,
        b"POST /v1/messages\r\n" + HOST,
        b"CONNECT /v1/messages HTTP/1.1\r\n" + HOST,
        b"TRACE /v1/messages HTTP/1.1\r\n" + HOST,
        b"\r\nPOST /v1/messages HTTP/1.1\r\n" + HOST,
    ],
)
def test_a_start_that_others_may_read_otherwise_is_refused(start: bytes) -> None:
    """Other versions, strange hosts, tunnels and traces are 400."""
    assert status_of(start + b"\r\n") == 400


@pytest.mark.parametrize("host", [b"127.0.0.1:80", b"[::1]:8080", b"a-b.c"])
def test_hosts_are_names_or_addresses(host: bytes) -> None:
    """Whatever the client calls us by."""
    head = b"POST /v1/messages HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"

    assert status_of(head) is None


def test_only_one_thing_can_be_expected() -> None:
    """Another expectation than 100-continue fails."""
    head = b"POST /v1/messages HTTP/1.1\r\n" + HOST + b"Expect: "

    assert status_of(head + b"100-Continue\r\n\r\n") is None
    assert status_of(head + b"tea\r\n\r\n") == 417


def test_the_settings_say_which_paths_instead() -> None:
    """Configured paths stand in place of the usual ones."""
    routes = choose_routes(["/v1/models"])

    assert routes == {(m, "/v1/models") for m in ("GET", "HEAD", "POST")}
    assert choose_routes([]) == frozenset()


@pytest.mark.parametrize(
    "path",
    [
        "/api/oauth/claude_cli/create_api_key",
        "/API/oauth",
        "/v1/files",
        "/v1/files/abc",
        "/v1/messages/batches",
        "/v1/organizations/api_keys",
        "/v1/oauth/token",
        "/gate/v1/files",
        "/v1/models?x",
        "/v1/../v1/files",
        "/v1/%66iles",
        "//v1/files",
        "v1/models",
    ],
)
def test_some_paths_are_never_allowed(path: str) -> None:
    """Settings that would give real keys, files or batches to agents are errors."""
    with pytest.raises(SettingsError) as caught:
        choose_routes(["/v1/models", path])

    assert caught.value.field == "proxy_paths"


def test_tokens_are_taken_from_either_header() -> None:
    """The CLI sends a key or a bearer token, by what it was given."""
    request = parse(
        b"GET / HTTP/1.1\r\n" + HOST + b"X-Api-Key: a\r\nauthorization: bearer b\r\n"
        b"Authorization: Basic c\r\nAuthorization: Bearer\r\n\r\n"
    )

    assert tokens_of(request) == [b"a", b"b", b""]


def sent(lines: bytes, **kind: str) -> list[tuple[bytes, bytes]]:
    """Return the headers that the API gets."""
    request = parse(b"POST /v1/messages HTTP/1.1\r\n" + HOST + lines + b"\r\n")
    credential = credential_for(80, "oauth" if kind else "api-key", path="/base")
    assert upstream_target(request, credential) == b"/base/v1/messages"
    return upstream_headers(list(request.headers), credential)


def test_the_key_takes_the_token_s_place() -> None:
    """Neither of the container's credentials goes on, whatever Connection names."""
    headers = sent(
        b"x-api-key: t\r\nAuthorization: Bearer t\r\nX-Api-Key: u\r\nx_api_key: v\r\n"
        b"Connection: x-api-key, host, content-length, x-other\r\nX-Other: 1\r\n"
        b"Content-Length: 5\r\nAccept-Encoding: br\r\nAnthropic-Version: v\r\n"
    )

    assert headers == [
        (b"host", b"127.0.0.1"),
        (b"anthropic-version", b"v"),
        (b"accept-encoding", b"identity"),
        (b"content-length", b"5"),
        (b"x-api-key", SECRET.encode()),
    ]


def test_oauth_comes_with_its_beta() -> None:
    """The betas that the client wants are kept, each once."""
    headers = sent(b"Anthropic-Beta: a, b\r\nanthropic-beta: b,,\r\n", scheme="oauth")

    assert headers[2:] == [
        (b"anthropic-beta", b"a,b,oauth-2025-04-20"),
        (b"authorization", b"Bearer " + SECRET.encode()),
    ]
    again = sent(b"anthropic-beta: oauth-2025-04-20,c\r\n", scheme="oauth")
    assert (b"anthropic-beta", b"oauth-2025-04-20,c") in again
    assert (b"anthropic-beta", b"a") in sent(b"anthropic-beta: a\r\n")


def test_hop_by_hop_headers_stay_behind() -> None:
    """What concerns a neighbour is dropped in both directions."""
    lines = (
        b"Connection: close, X-Hop\r\nKeep-Alive: 5\r\nTE: trailers\r\nTrailer: x\r\n"
        b"Proxy-Authorization: x\r\nX-Hop: 1\r\nExpect: 100-continue\r\n"
        b"Transfer-Encoding: chunked\r\nX-Stays: 1\r\n"
    )
    headers = dict(sent(lines))

    assert set(headers) == {
        *(b"host", b"x-stays", b"accept-encoding"),
        *(b"transfer-encoding", b"x-api-key"),
    }
    answer = [(b"Connection", b"X-Hop"), (b"x-hop", b"1"), (b"X-Stays", b"1")]
    assert response_headers(answer, credential_for(80)) == [(b"x-stays", b"1")]


def test_a_response_s_length_gives_way_to_chunks() -> None:
    """An API that says both was read in chunks."""
    both = [(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")]

    assert response_headers(both, credential_for(80)) == []
    assert response_headers(both[:1], credential_for(80)) == [(b"content-length", b"5")]


def test_a_header_with_the_credential_stays_behind() -> None:
    """An API that echoes does not tell the agent."""
    answer = [
        (b"X-Echo", b"key=" + SECRET.encode()),
        (b"X-Loud", SECRET.upper().encode()),
        (SECRET.encode(), b"is the key"),
        (b"X-Stays", b"1"),
    ]

    assert response_headers(answer, credential_for(80)) == [(b"x-stays", b"1")]


def test_a_refusal_is_in_the_api_s_format() -> None:
    """Clients can read why, and are told not to ask again for minutes."""
    refusal = RefusedError(429, "rate_limit_error", "no more")

    assert json.loads(refusal.body) == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "no more"},
    }
    assert (b"x-should-retry", b"false") in refusal.headers
    assert str(refusal) == "429 rate_limit_error: no more"
    again = RefusedError(502, "api_error", "later", retry=True)
    assert b"x-should-retry" not in dict(again.headers)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_are_above_0(value: float) -> None:
    """A limit that makes no sense is refused."""
    with pytest.raises(ValueError, match="idle_timeout must be above 0"):
        ProxyLimits(idle_timeout=value)


@pytest.mark.parametrize(
    ("descriptors", "connections", "per_run"),
    [(math.inf, 1000, 64), (1024, 412, 64), (512, 156, 31), (256, 28, 5), (10, 2, 1)],
)
def test_a_bot_keeps_most_of_its_descriptors(
    descriptors: float, connections: int, per_run: int
) -> None:
    """A connection can hold two of them; four hostile runs leave others their share."""
    limits = fit_limits(ProxyLimits(), descriptors)

    assert limits.max_connections == connections
    assert limits.max_connections_per_run == per_run
