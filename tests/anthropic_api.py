"""A fake of the Messages API: streams, tools and errors, as a test scripts them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, TypeAlias

import attrs
import h11
import trio

_READ_SIZE = 2**16
_MESSAGE_IDS = count(1)

#: What the API calls its errors.
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


@attrs.frozen
class Text:
    """An answer, sent in *pieces*, with *pause* seconds before each but the first."""

    pieces: tuple[str, ...]
    pause: float = 0.0


@attrs.frozen
class ToolUse:
    """A call of a tool, after *text*."""

    name: str
    input: dict[str, Any]
    text: str = ""


@attrs.frozen
class Failure:
    """An error with this HTTP status."""

    status: int


@attrs.frozen
class Broken:
    """An answer that breaks off after *text*, and *pause* seconds."""

    text: str
    pause: float = 0.0


@attrs.frozen
class Silence:
    """No answer at all, for *seconds*; headers come first if *begun*."""

    seconds: float
    begun: bool = False


Step: TypeAlias = Text | ToolUse | Failure | Broken | Silence


@attrs.frozen
class Request:
    """What was asked.

    Attributes:
        method: The HTTP method.
        target: The path, with the query.
        headers: Names in lower case.
        body: The JSON; empty where there was none.
    """

    method: str
    target: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def is_turn(self) -> bool:
        """Whether it is part of the conversation, no side question of the client."""
        return self.target.partition("?")[0] == "/v1/messages" and bool(
            self.body.get("tools")
        )

    @property
    def said(self) -> str:
        """All texts of the last message of the user, and results of tools."""
        messages = self.body.get("messages", [])
        return "\n".join(_texts(messages[-1]["content"])) if messages else ""


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    else:
        for block in content:
            if block["type"] == "text":
                yield block["text"]
            elif block["type"] == "tool_result":
                yield from _texts(block.get("content", ""))


@attrs.define
class Api:
    """A live server.

    Attributes:
        script: The steps to come; the last one stays.
        url: Where it is.
        requests: What was asked so far.
        live: Requests that are being answered.
    """

    script: list[Step]
    url: str = ""
    requests: list[Request] = attrs.field(factory=list)
    live: int = 0
    _heard: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    @property
    def turns(self) -> list[Request]:
        """Those of the requests that are part of the conversation."""
        return [request for request in self.requests if request.is_turn]

    async def wait_turns(self, number: int) -> None:
        """Wait until there were so many."""
        while len(self.turns) < number:
            await self._heard.park()

    def hear(self, request: Request) -> Step:
        """Take a request, and say what is answered to it."""
        self.requests.append(request)
        self._heard.unpark_all()
        if not request.is_turn:
            return Text(("aside",))
        return self.script[0] if len(self.script) == 1 else self.script.pop(0)


@asynccontextmanager
async def open_api(*script: Step) -> AsyncIterator[Api]:
    """Serve on loopback for as long as the block takes."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    api = Api(list(script) or [Text(("ok",))], url=f"http://127.0.0.1:{port}")
    async with serve_api(api, listeners):
        yield api


@asynccontextmanager
async def serve_api(
    api: Api, listeners: list[trio.SocketListener]
) -> AsyncIterator[Api]:
    """Serve there for as long as the block takes."""

    async def serve(stream: trio.SocketStream) -> None:
        # The client may go at any moment.
        try:
            await _serve(stream, api)
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        yield api
        nursery.cancel_scope.cancel()


async def _serve(stream: trio.SocketStream, api: Api) -> None:
    connection = h11.Connection(h11.SERVER)
    while True:
        request = await _read_request(stream, connection)
        if request is None:
            return
        step = api.hear(request)
        api.live += 1
        try:
            if not await _answer(stream, connection, request, step):
                return
        finally:
            api.live -= 1
        if connection.our_state is not h11.DONE:
            return
        connection.start_next_cycle()


async def _read_request(
    stream: trio.SocketStream, connection: h11.Connection
) -> Request | None:
    head: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_READ_SIZE))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            return Request(
                method=head.method.decode(),
                target=head.target.decode(),
                headers={name.decode(): value.decode() for name, value in head.headers},
                body=json.loads(body) if body else {},
            )
        else:
            return None


async def _answer(
    stream: trio.SocketStream,
    connection: h11.Connection,
    request: Request,
    step: Step,
) -> bool:
    """Answer *request*; False if the connection is to be broken off."""

    async def send(event: h11.Event) -> None:
        data = connection.send(event)
        assert data is not None
        await stream.send_all(data)

    if isinstance(step, Silence) and not step.begun:
        await trio.sleep(step.seconds)
        return False
    if isinstance(step, Failure) or not request.target.startswith("/v1/messages?"):
        status = step.status if isinstance(step, Failure) else 200
        error = {"type": ERRORS.get(status, "none"), "message": f"fake {status}"}
        data = json.dumps({"type": "error", "error": error}).encode()
        headers = [("content-type", "application/json"), ("request-id", "req_fake")]
        length = ("content-length", str(len(data)))
        await send(h11.Response(status_code=status, headers=[*headers, length]))
        if request.method != "HEAD":
            await send(h11.Data(data=data))
        await send(h11.EndOfMessage())
        return True
    kind = "text/event-stream" if request.body.get("stream") else "application/json"
    await send(h11.Response(status_code=200, headers=[("content-type", kind)]))
    if not request.body.get("stream"):
        data = json.dumps(_whole(request, step)).encode()
        if isinstance(step, Broken):
            await send(h11.Data(data=data[:-9]))
            return False
        await send(h11.Data(data=data))
        await send(h11.EndOfMessage())
        return True
    for event in _events(request, step):
        if event is None:
            assert isinstance(step, Text)
            await trio.sleep(step.pause)
            continue
        text = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        await send(h11.Data(data=text.encode()))
    if isinstance(step, Silence | Broken):
        pause = step.seconds if isinstance(step, Silence) else step.pause
        await trio.sleep(pause)
        return False
    await send(h11.EndOfMessage())
    return True


def _blocks(step: Step) -> list[dict[str, Any]]:
    match step:
        case Text(pieces):
            return [{"type": "text", "text": "".join(pieces)}]
        case ToolUse(name, given, text):
            use = {
                "type": "tool_use",
                "id": f"toolu_{next(_MESSAGE_IDS)}",
                "name": name,
                "input": given,
            }
            return [{"type": "text", "text": text}, use] if text else [use]
        case Broken(text):
            return [{"type": "text", "text": text}]
        case _:
            return []


def _whole(request: Request, step: Step) -> dict[str, Any]:
    return {
        "id": f"msg_{next(_MESSAGE_IDS)}",
        "type": "message",
        "role": "assistant",
        "model": request.body.get("model", "fake"),
        "content": _blocks(step),
        "stop_reason": "tool_use" if isinstance(step, ToolUse) else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 5},
    }


def _events(request: Request, step: Step) -> Iterator[dict[str, Any] | None]:
    """Yield the events of a stream; None is a pause."""
    whole = _whole(request, step)
    blocks = whole["content"]
    yield {
        "type": "message_start",
        "message": {**whole, "content": [], "stop_reason": None},
    }
    for index, block in enumerate(blocks):
        if block["type"] == "text":
            empty: dict[str, Any] = {"type": "text", "text": ""}
            pieces = step.pieces if isinstance(step, Text) else (block["text"],)
            deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
        else:
            empty = {**block, "input": {}}
            partial = json.dumps(block["input"])
            deltas = [{"type": "input_json_delta", "partial_json": partial}]
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for number, delta in enumerate(deltas):
            if number:
                yield None
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        if isinstance(step, Broken):
            return
        yield {"type": "content_block_stop", "index": index}
    if isinstance(step, Silence):
        return
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": whole["stop_reason"], "stop_sequence": None},
        "usage": {"output_tokens": 5},
    }
    yield {"type": "message_stop"}
