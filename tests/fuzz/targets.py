"""What is fuzzed: functions of bytes that raise if a promise is broken.

The first bytes of an input choose among circumstances, the rest is what an attacker
writes. In what goes to the proxy and comes from the API, ``@TOKEN@`` and ``@SECRET@``
stand for what only the run, and only the host, has.
"""

from __future__ import annotations

import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import attrs
import h11
import httpcore2
import trio
from trio.testing import MockClock

from clawtrio import _mailbox as mail
from clawtrio._allowlist import is_blocked
from clawtrio._codec import (
    ContainerInput,
    camel,
    decode_output,
    encode_input,
    encode_message,
    well_formed,
)
from clawtrio._codec_allowlist import decode_allowlist, encode_allowlist
from clawtrio._credentials import Credential, Scheme
from clawtrio._markers import MarkerParser
from clawtrio._models import AgentOutput, Group, MountAllowlist
from clawtrio._proxy_client import ClientConnection, Service
from clawtrio._proxy_rules import (
    ProxyLimits,
    RefusedError,
    check_request,
    choose_routes,
    credential_header,
    upstream_headers,
)
from clawtrio._proxy_tickets import TicketOffice
from clawtrio._proxy_upstream import Upstream
from tests import oracle
from tests.upstream import SECRET, Wallet, credential_for

from . import strict_http

SOURCE: Final = Path(__file__).parents[2] / "container" / "agent_runner"
sys.path.insert(0, str(SOURCE))

import wire  # noqa: E402 - it is no package

sys.path.remove(str(SOURCE))


def _cut(data: bytes, seed: int) -> list[bytes]:
    """Cut *data* into pieces whose sizes come of *seed*, 0 to 255; 0 leaves it whole.

    Small pieces and large ones take turns.
    """
    sizes = (seed % 16, seed // 16) if seed else (len(data), 0)
    pieces = []
    at = turn = 0
    while at < len(data):
        end = at + max(sizes[turn % 2], 1)
        pieces.append(data[at:end])
        at = end
        turn += 1
    return pieces


# ------------------------------------------------------------------------- the parser


def markers(data: bytes) -> None:
    """However a stream is cut, it means what the oracle says, and little is kept."""
    head, stream = data[:2].ljust(2, b"\0"), data[2:]
    limit = head[0] * 4 + 1
    parser = MarkerParser(max_frame_bytes=limit)
    events = []
    for piece in _cut(stream, head[1]):
        events += parser.feed(piece)
        # The body, and the last line of a stream without frames: either, not both.
        assert parser.buffered <= limit + 64
    events += parser.close()
    assert events == oracle.events(stream, limit)
    assert parser.last_line() == oracle.last_line(stream, limit)


def outputs(data: bytes) -> None:
    """What is acceptable is what the oracle says; what we write, we read."""
    output = decode_output(data)
    assert output == oracle.acceptable(data)
    if output is not None and output.answers is not None:
        assert type(output.answers) is int


# --------------------------------------------------------------------------- the wire


def agent_wire(data: bytes) -> None:
    """Each side reads what the other writes; what means nothing is one error."""
    with suppress(wire._MalformedError):
        message = wire._as_message(data)
        if message is not None:
            assert isinstance(message.text, str)
            assert type(message.id) in {int, type(None)}
    with suppress(wire._MalformedError, wire.InputError):
        wire._as_input(wire._first_value(data))
    text = data.decode("utf-16-le", "surrogatepass" if len(data) % 2 == 0 else "ignore")
    _round_trip(text)


def _round_trip(text: str) -> None:
    line = encode_message(1, text)
    assert b"\n" not in line
    assert wire._as_message(line) == wire.Message(well_formed(text), 1)
    given = ContainerInput(text, None, "group", text, is_main=False, lifeline=True)
    assert wire._as_input(wire._first_value(encode_input(given))) == wire.AgentInput(
        *(well_formed(text), "group", well_formed(text)), is_main=False, lifeline=True
    )
    frame = wire._encode({"status": "success", "result": text})
    parser = MarkerParser()
    events = parser.feed(wire.START + frame + wire.END)
    assert events == [AgentOutput("success", well_formed(text))]


# ---------------------------------------------------------------------- the allowlist


def allowlist(data: bytes) -> None:
    """It says exactly what plain JSON says, or is refused with a path in one line."""
    found = _read_allowlist(data)
    if isinstance(found, str):
        assert found.startswith("$")
        return
    said = json.loads(data.decode(), object_pairs_hook=_once)
    _compare(found, said, {"allowedRoots", "blockedPatterns", "nonMainReadOnly"})
    for root, told in zip(found.allowed_roots, said["allowedRoots"], strict=True):
        _compare(root, told, {"path"}, "allowReadWrite", "description")
        assert re.fullmatch(r"(/|~/|~\Z)[^\0-\x1f\x7f]*", root.path)
        root.path.encode()
    for pattern in found.blocked_patterns:
        # Whatever is round it, and in whatever case.
        for name in (pattern, f"x{pattern.casefold()}y"):
            assert is_blocked(name, found.blocked_patterns)
    assert decode_allowlist(encode_allowlist(found)) == found


def _read_allowlist(data: bytes) -> MountAllowlist | str:
    try:
        return decode_allowlist(data)
    except ValueError as exc:
        return str(exc)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a name came twice"
    return dict(pairs)


def _compare(value: Any, said: Any, needed: set[str], *others: str) -> None:
    """Compare what was read with JSON, which must have these names."""
    assert type(said) is dict
    assert needed <= set(said) <= needed | set(others)
    for field in attrs.fields(type(value)):
        part, told = getattr(value, field.name), said.get(camel(field.name))
        if camel(field.name) not in said:
            assert part == field.default
        elif not isinstance(part, tuple):
            assert type(part) in {str, bool, type(None)}
            assert type(part) is type(told)
            assert part == told


# ------------------------------------------------------------------------ the mailbox

_MAIN: Final = Group("Main", "main", is_main=True)
_OTHER: Final = Group("Other", "other")
_THIRD: Final = Group("Third", "third")
_GROUPS: Final = {"m": _MAIN, "o": _OTHER, "o2": _OTHER, "t": _THIRD}
_KINDS: Final = {
    "message": mail.SendMessage,
    "schedule_task": mail.ScheduleTask,
    "pause_task": mail.PauseTask,
    "resume_task": mail.ResumeTask,
    "cancel_task": mail.CancelTask,
    "update_task": mail.UpdateTask,
    "refresh_groups": mail.RefreshGroups,
    "register_group": mail.RegisterGroup,
}


class _Box:
    """A mailbox with one file, which remembers what became of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.became: list[str] = []

    def read(self, _name: str) -> bytes:
        """Return the file."""
        return self._data

    def remove(self, _name: str) -> None:
        """Remove it."""
        self.became.append("removed")

    def discard(self, _name: str, place: str) -> None:
        """Put it elsewhere."""
        self.became.append(place)


class _Places:
    """Where what makes no sense goes."""

    class _Errors(str):
        __slots__ = ()

        def names(self) -> list[str]:
            """Return what is there."""
            return []

    errors = _Errors("errors")
    trash = "trash"


def mailbox(data: bytes) -> None:
    """A file is offered, refused or set aside, and nobody gets beyond its rights."""
    choice, content = data[:1] or b"\0", data[1:]
    group = (_MAIN, _OTHER)[choice[0] & 1]
    box_name = ("messages", "tasks")[choice[0] >> 1 & 1]
    box, places = _Box(content), _Places()
    # Fakes of the directories: the types are not theirs.
    inbox: Any = mail.Requests
    asked = inbox(places, _GROUPS, _unused, _unused)
    try:
        asked._read(group, (group.folder, box_name, "1.json"), box)
    finally:
        asked.close()
    found: list[mail.Request] = asked._found
    if not found:
        assert box.became in (["removed"], ["errors"])
        return
    assert box.became == []
    (request,) = found
    said = json.loads(content)
    assert request.group is group
    assert type(request) is _KINDS[said["type"]]
    assert (said["type"] == "message") == (box_name == "messages")
    _check_rights(request, group)
    _check_texts(request)


async def _unused(*_: object) -> None:
    raise AssertionError


def _check_rights(request: mail.Request, group: Group) -> None:
    own = {jid for jid, owner in _GROUPS.items() if owner is group}
    match request:
        case mail.SendMessage(chat_jid=jid) | mail.ScheduleTask(target_jid=jid):
            assert group.is_main or jid in own
        case mail.RefreshGroups():
            assert group.is_main
        case mail.RegisterGroup(jid=jid, new_group=new):
            assert group.is_main
            assert not new.is_main
            assert jid != "m"
            assert new.folder.casefold() not in {"main", "global"}
            assert re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", new.folder)
            timeout = new.container_config.timeout
            assert timeout is None or timeout > 0
            for mount in new.container_config.additional_mounts:
                assert type(mount.readonly) is bool
        case _:
            pass


def _check_texts(value: Any) -> None:
    """Check that every text in it can be written, and every id told in a line."""
    for field in attrs.fields(type(value)):
        part = getattr(value, field.name)
        if isinstance(part, str):
            assert part
            part.encode()
            if field.name in {"chat_jid", "target_jid", "task_id", "jid"}:
                assert len(part) <= 256
                assert part.isprintable()
        elif isinstance(part, tuple):
            for item in part:
                _check_texts(item)
        elif attrs.has(type(part)) and field.name != "group":
            _check_texts(part)


# -------------------------------------------------------------------------- the proxy

_SCHEMES: Final[tuple[Scheme, ...]] = ("api-key", "oauth")
_LIMITS: Final = ProxyLimits(max_header_bytes=1024, max_body_bytes=256)
_BASE_PATH: Final = b"/base"
_REQUEST: Final = (
    b"POST /v1/messages HTTP/1.1\r\nHost: h\r\nX-Api-Key: @TOKEN@\r\n"
    b"Content-Length: 2\r\n\r\n{}"
)
#: The end of the connection, so that each request has a connection of its own.
_ANSWER: Final = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi"
#: What is between two neighbours, or ours to say.
_NEVER_PASSED: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"upgrade", b"expect"),
    }
)


class _Client(trio.abc.HalfCloseableStream):
    """Sends some pieces, and then nothing; what it is sent, it keeps."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = deque(pieces)
        self.got = b""

    async def receive_some(self, *_: Any) -> bytes:
        """Return the next piece."""
        await trio.lowlevel.checkpoint()
        if not self._pieces:
            await trio.sleep_forever()
        return self._pieces.popleft()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Keep *data*."""
        await trio.lowlevel.checkpoint()
        self.got += data

    async def wait_send_all_might_not_block(self) -> None:
        """Never wait."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """Take the end."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Close."""
        await trio.lowlevel.checkpoint()


class _ApiStream(httpcore2.AsyncNetworkStream):
    """A connection to the API, which answers alike, whatever it is asked."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = deque(pieces)
        self.asked = b""

    async def read(self, *_: Any, **__: Any) -> bytes:
        """Return the next piece; the end after the last."""
        await trio.lowlevel.checkpoint()
        return self._pieces.popleft() if self._pieces else b""

    async def write(self, buffer: bytes, *_: Any, **__: Any) -> None:
        """Keep what is asked."""
        await trio.lowlevel.checkpoint()
        self.asked += buffer

    async def aclose(self) -> None:
        """Close."""
        await trio.lowlevel.checkpoint()

    def get_extra_info(self, *_: Any) -> Any:
        """Know nothing."""
        return None


class _Api(httpcore2.AsyncNetworkBackend):
    """The network, on which there is only an API."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.streams: list[_ApiStream] = []

    async def connect_tcp(self, *_: Any, **__: Any) -> _ApiStream:
        """Connect."""
        await trio.lowlevel.checkpoint()
        self.streams.append(_ApiStream(self._pieces))
        return self.streams[-1]


@cache
def _upstream() -> Upstream:
    return Upstream(_LIMITS)


def _serve(pieces: Callable[[bytes], list[bytes]], api: _Api) -> tuple[bytes, bytes]:
    """Let a client talk to the proxy, and that to *api*.

    Returns:
        What the client sent, and what it got.
    """
    office = TicketOffice()
    upstream = _upstream()
    upstream._pool = httpcore2.AsyncConnectionPool(network_backend=api)
    service = Service(
        credentials=Wallet(credential_for(80, path=_BASE_PATH.decode())),
        office=office,
        upstream=upstream,
        routes=choose_routes(None),
        limits=_LIMITS,
    )
    with office.admit("g", "r", max_output_tokens=None, max_requests=None) as ticket:
        sent = pieces(ticket.token.encode())
        client = _Client(sent)
        connection = ClientConnection(client, service, None)
        trio.run(connection.run, clock=MockClock(autojump_threshold=0))
    assert not ticket.connections
    return b"".join(sent), client.got


def heads(data: bytes) -> None:
    """What is understood of a head is all that it says, and is written anew."""
    ours = h11.Connection(h11.SERVER)
    ours.receive_data(data)
    try:
        request = ours.next_event()
    except h11.RemoteProtocolError:
        return
    if not isinstance(request, h11.Request):
        return
    head = data[: len(data) - len(ours.trailing_data[0])]
    try:
        check_request(head, request)
    except RefusedError:
        return
    said, end = strict_http.read_request_head(head)
    assert end == len(head)
    assert said.start == (request.method, request.target)
    assert list(said.headers) == list(request.headers)
    for scheme in _SCHEMES:
        credential = credential_for(80, scheme)
        headers = upstream_headers(list(request.headers), credential)
        anew = h11.Request(
            method=request.method, target=request.target, headers=headers
        )
        written = h11.Connection(h11.CLIENT).send(anew) or b""
        asked, end = strict_http.read_request_head(written)
        assert end == len(written)
        _check_headers(asked, credential)
        assert _framing(asked) == _framing(said)


def _framing(head: strict_http.Message) -> list[list[bytes]]:
    names = (b"content-length", b"transfer-encoding")
    return [head.values(name) for name in names]


def requests(data: bytes) -> None:
    """What goes on is what the strictest reader reads, one for one, and our key."""
    seed, written = (data[0] if data else 0), data[1:]
    api = _Api([_ANSWER])
    sent, got = _serve(
        lambda token: _cut(written.replace(b"@TOKEN@", token), seed), api
    )
    answered = got.count(b"HTTP/1.1 200 ")
    at = 0
    for stream in api.streams[:answered]:
        at = _check_passed_on(stream.asked, sent, at)
    # One that the client did not finish is not finished by us.
    for stream in api.streams[answered:]:
        if _is_whole(stream.asked):
            at = _check_passed_on(stream.asked, sent, at)
    assert len(api.streams) - answered in {0, 1}
    assert SECRET.encode() not in got


def _is_whole(passed_on: bytes) -> bool:
    try:
        strict_http.read_request(passed_on)
    except strict_http.IncompleteError:
        return False
    return True


def _check_passed_on(passed_on: bytes, sent: bytes, at: int) -> int:
    """Compare with the request at *at*; return where the next is."""
    asked, end = strict_http.read_request(passed_on)
    assert end == len(passed_on), "there is more than a request"
    said, at = strict_http.read_request(sent, at)
    method, target = said.start
    assert asked.start == (method, _BASE_PATH + target)
    assert (method.decode(), target.partition(b"?")[0].decode()) in choose_routes(None)
    assert asked.body == said.body
    _check_headers(asked, credential_for(80))
    return at


def _check_headers(asked: strict_http.Message, credential: Credential) -> None:
    """Check that the API hears of one host and one key, and both are ours."""
    name, value = credential_header(credential)
    keys = asked.values(b"x-api-key") + asked.values(b"authorization")
    assert asked.values(name) == keys == [value]
    assert asked.values(b"host") == [b"127.0.0.1"]
    assert asked.values(b"accept-encoding") == [b"identity"]
    names = {name for name, _ in asked.headers}
    assert names.isdisjoint(_NEVER_PASSED)
    assert not any(b"_" in name for name in names)


def responses(data: bytes) -> None:
    """Whatever the API says, the client gets one response, and not the key."""
    seed, written = (data[0] if data else 0), data[1:]
    answer = written.replace(b"@SECRET@", SECRET.encode())
    api = _Api(_cut(answer, seed))
    _, got = _serve(lambda token: [_REQUEST.replace(b"@TOKEN@", token)], api)
    head, end, _ = got.partition(b"\r\n\r\n")
    assert end
    assert SECRET.encode() not in head
    # The API may have broken it off.
    with suppress(strict_http.IncompleteError):
        response = strict_http.read_response(got)
        assert response.values(b"connection") in ([], [b"close"])


#: By name.
TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        *(markers, outputs, agent_wire, allowlist, mailbox, heads, requests, responses),
    )
}

_JSON: Final = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b" ", b"true", b"false"),
    *(b"null", b"NaN", b"-1e999", b"\\ud83d", b"\\u0000", b"\xc3", b"\xf0\x9f\x98\x80"),
)
_OUTPUT: Final = (
    *(b'{"status":"success"}', b'"status":"error"', b',"result":', b',"error":'),
    *(b',"newSessionId":"s"', b',"partial":true', b',"answers":1'),
)
_HTTP: Final = (
    *(b"\r\n", b"\n", b": ", b" ", b"\t", b",", b";", b" HTTP/1.1\r\n", b"HTTP/1.0"),
    *(b"Host: h\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n"),
    *(b"Connection: ", b"keep-alive", b"close", b"Trailer: X\r\n", b"5", b"0\r\n\r\n"),
    *(b"2\r\n{}\r\n", b"\r\n\r\n", b"Upgrade: x\r\n", b"X-Api-Key: @TOKEN@\r\n"),
)

#: What an input is made of, by target: the fuzzers' vocabulary.
WORDS: Final[dict[str, tuple[bytes, ...]]] = {
    "markers": (
        *(
            oracle.START,
            oracle.END,
            b"\n",
            b"\r\n",
            oracle.START[:9],
            b"\n" + oracle.END,
        ),
        *(b"NANOCLAW_OUTPUT_", *_OUTPUT),
    ),
    "outputs": (*_OUTPUT, *_JSON),
    "agent_wire": (
        *(b'{"type":"message"', b'{"type":"close"}', b',"text":"x"', b',"id":1'),
        *(b'{"prompt":"p","groupFolder":"g","chatJid":"c","isMain":true', *_JSON),
        *(
            b',"lifeline":true',
            b',"sessionId":',
            b',"assistantName":"A"',
            b"\xef\xbb\xbf",
        ),
    ),
    "allowlist": (
        *(b'"allowedRoots":[', b'"blockedPatterns":[', b'"nonMainReadOnly":', *_JSON),
        *(b'{"path":"~/x","allowReadWrite":true', b'"description":', b"/", b"~"),
    ),
    "mailbox": (
        *(b'{"type":"' + kind.encode() + b'"' for kind in _KINDS),
        *(b',"chatJid":"o"', b',"text":"x"', b',"sender":"s"', b',"targetJid":"t"'),
        *(b',"taskId":"i"', b',"prompt":"p"', b',"schedule_type":"once"'),
        *(b',"schedule_value":"1"', b',"context_mode":"group"', b',"jid":"n"'),
        *(b',"name":"N"', b',"folder":"new"', b',"trigger":"@A"', b'"is_main":true'),
        *(b',"containerConfig":{"timeout":1', b'"additionalMounts":[{"hostPath":"/x"'),
        *(b',"containerPath":"y"', b',"readonly":false', b"main", b'"m"', *_JSON),
    ),
    "heads": (
        *(b"POST /v1/messages HTTP/1.1\r\n", b"GET /", b"?a=%20", b"/..", b"[::1]:1"),
        *(
            b"Anthropic-Beta: a\r\n",
            b"Expect: 100-continue\r\n",
            b"X_Api_Key: x",
            *_HTTP,
        ),
    ),
    "requests": (
        *(
            b"\0" + _REQUEST,
            b"POST /v1/messages HTTP/1.1\r\n",
            b"GET /api/hello",
            *_HTTP,
        ),
        *(b"HEAD /api/hello", b"Expect: 100-continue\r\n"),
    ),
    "responses": (
        *(b"\0" + _ANSWER, b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 101 \r\n", b"@SECRET@"),
        *(b"Content-Type: text/event-stream\r\n", b"HTTP/1.1 204 \r\n", *_HTTP),
        *(b"HTTP/1.1 100 \r\n", b'data: {"usage":{"output_tokens":1}}\n'),
        *(b"Content-Type: application/json\r\n", b"X-Request-Id: 1\r\n"),
    ),
}
