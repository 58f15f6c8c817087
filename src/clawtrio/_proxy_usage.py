"""What the API says a request has cost, read from its response in passing; sans-I/O.

The bytes go on to the agent first, and are looked at then. What is kept of them is
bounded: the line that is not yet whole, or a response that is not a stream.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from ._proxy_rules import EVENT_STREAM, Header, media_type
from ._settings import KIB, MIB

TOKENS: Final = (
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)
#: The API's longest line that has a usage in it is a few hundred bytes.
_LONGEST_LINE: Final = 64 * KIB
#: A response of 64,000 tokens has some 300 KiB.
_LARGEST_RESPONSE: Final = 2 * MIB
#: In a text, the quotes would be escaped.
_USAGE: Final = b'"usage"'
_PIECE: Final = b"event: content_block_delta"


class Meter:
    """Adds what one response says to the totals of its run.

    Args:
        headers: The response's, their names in lower case.
        totals: What to add to: a count for each of :data:`TOKENS`.
    """

    def __init__(self, headers: Sequence[Header], totals: Counter[str]) -> None:
        named = dict(headers)
        kind = media_type(headers)
        plain = named.get(b"content-encoding", b"identity").lower() == b"identity"
        self._is_stream = plain and kind == EVENT_STREAM
        self._is_whole = plain and kind == b"application/json"
        self._totals = totals
        self._counted: Counter[str] = Counter()
        self._buffer = bytearray()
        self._skipping = False
        self._pieces = 0
        self._summed_up = False

    def feed(self, data: bytes) -> None:
        """Look at bytes that the client has already got."""
        if self._is_stream:
            self._feed_lines(data)
        elif self._is_whole:
            self._buffer += data
            self._is_whole = len(self._buffer) <= _LARGEST_RESPONSE

    def close(self) -> None:
        """Look at what is left, the response being over or broken off."""
        if self._is_whole:
            self._read(self._buffer)
        elif self._is_stream and not self._summed_up:
            # Leaving before the sum came must not make it free.
            self._count("output_tokens", self._pieces)

    def _feed_lines(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            if self._buffer:
                line = bytes(self._buffer + line)  # noqa: PLW2901 - the same, whole
                self._buffer.clear()
            if not self._skipping:
                self._read_line(line)
            self._skipping = False
        self._buffer += rest
        if len(self._buffer) > _LONGEST_LINE:
            self._buffer.clear()
            self._skipping = True

    def _read_line(self, line: bytes) -> None:
        if line.startswith(b"data:") and _USAGE in line:
            self._read(line[len(b"data:") :])
        elif line.startswith(_PIECE):
            self._pieces += 1

    def _read(self, data: bytes | bytearray) -> None:
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(event, dict):
            return
        if event.get("type") == "message_delta":
            self._summed_up = True
        message = event.get("message", event)
        usage: Any = message.get("usage") if isinstance(message, dict) else None
        if isinstance(usage, dict):
            for name in TOKENS:
                self._count(name, usage.get(name))

    def _count(self, name: str, value: object) -> None:
        """Take a sum: the API repeats itself, with larger numbers."""
        if type(value) is int and value > self._counted[name]:
            self._totals[name] += value - self._counted[name]
            self._counted[name] = value
