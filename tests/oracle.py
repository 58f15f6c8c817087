"""What a stream means, written from the contract as simply as can be.

It shares no code with the parser, and takes its time: the tests compare the two.
"""

from __future__ import annotations

import json
import re
import sys
from typing import NoReturn

from clawtrio import _models as m

START = b"---NANOCLAW_OUTPUT_START---"
END = b"---NANOCLAW_OUTPUT_END---"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(number: str) -> float:
    return min(max(float(number), -sys.float_info.max), sys.float_info.max)


def _text(value: object) -> str | None:
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if type(value) is str else None


def acceptable(data: bytes) -> m.AgentOutput | None:
    """Read *data* as an output; None if it is not acceptable."""
    try:
        value = json.loads(
            data.decode(errors="replace"),
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("status") not in ("success", "error"):
        return None
    result = value.get("result")
    if result is not None and not isinstance(result, str):
        result = json.dumps(result, ensure_ascii=False)
    session_id = _text(value.get("newSessionId"))
    if session_id is not None:
        good = 1 <= len(session_id) <= 256 and session_id.isprintable()
        session_id = session_id if good else None
    answers = value.get("answers")
    return m.AgentOutput(
        status=value["status"],
        result=_text(result),
        new_session_id=session_id,
        error=_text(value.get("error")),
        partial=value.get("partial") is True,
        answers=answers if type(answers) is int else None,
    )


def _value(body: bytes, max_frame_bytes: int) -> m.AgentOutput | m.DroppedFrame:
    if len(body) > max_frame_bytes:
        return m.DroppedFrame("too_large", max_frame_bytes + 1)
    if whole := acceptable(body):
        return whole
    for line in reversed(body.split(b"\n")):
        if output := acceptable(line.removesuffix(b"\r").removesuffix(END)):
            return output
    return m.DroppedFrame("unacceptable", len(body))


def _frame_end(stream: bytes, begin: int, max_frame_bytes: int) -> tuple[int, int]:
    """Find where the body that begins at *begin* ends, and where to go on."""
    at = begin
    for line in stream[begin:].split(b"\n"):
        if at > begin and line.startswith(END):
            return at, at + len(END)
        if at > begin and line.startswith(START):
            return at, at
        content = line.removesuffix(b"\r")
        if content.endswith(END):
            end = at + len(content) - len(END)
            small = end - begin <= max_frame_bytes
            if small and acceptable(content.removesuffix(END)):
                return end, end + len(END)
        at += len(line) + 1
    return len(stream), len(stream)


def events(stream: bytes, max_frame_bytes: int) -> list[m.AgentOutput | m.DroppedFrame]:
    """List what a whole stream leads to."""
    found: list[m.AgentOutput | m.DroppedFrame] = []
    at = 0
    while (start := stream.find(START, at)) >= 0:
        begin = start + len(START)
        end, at = _frame_end(stream, begin, max_frame_bytes)
        found.append(_value(stream[begin:end], max_frame_bytes))
    return found


def last_line(stream: bytes, max_frame_bytes: int) -> m.AgentOutput | None:
    """Read what an agent without markers says at last."""
    lines = [line for line in stream.split(b"\n") if line.strip(b" \t\r")]
    if START in stream or not lines:
        return None
    line = lines[-1].removesuffix(b"\r")
    return acceptable(line) if len(line) <= max_frame_bytes else None
