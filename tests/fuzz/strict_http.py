"""HTTP/1.1 as narrowly as RFC 9112 can be read, to compare the proxy with.

It shares no code with the proxy, nor with h11: whatever two parsers might read in two
ways is an error here.
"""

from __future__ import annotations

import re
from typing import Final, TypeAlias

import attrs

_Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE: Final = re.compile(rb"(%b) (/[!-~]*) HTTP/1\.1" % _TOKEN)
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([2-9][0-9]{2}) [^\r\n]*")
_FIELD: Final = re.compile(rb"(%b):[ \t]*([^\x00\r\n]*?)[ \t]*" % _TOKEN)
#: Nothing of an extension goes on: what is in it is all one.
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,20})[ \t]*(;[^\n]*?)?\r\n")
_LENGTH: Final = re.compile(rb"[0-9]{1,20}")
#: Nor of a trailer: how its lines end is all one.
_TRAILERS: Final = re.compile(rb"(%b:[^\x00\r\n]*\r?\n)*\r?\n" % _TOKEN)


class AmbiguousError(Exception):
    """Not every parser would read these bytes in the same way."""


class IncompleteError(AmbiguousError):
    """There is one way to read these bytes, as a message that was broken off."""


@attrs.frozen
class Message:
    """A request, or a response; names are in lower case, of codings too."""

    start: tuple[bytes, ...]
    headers: _Headers
    body: bytes = b""

    def values(self, name: bytes) -> list[bytes]:
        """Return what all headers of that name say."""
        return [value for found, value in self.headers if found == name]


def read_request(data: bytes, at: int = 0) -> tuple[Message, int]:
    """Read the request that begins at *at*.

    Returns:
        It, and where the next begins.

    Raises:
        IncompleteError: If its beginning is all there is.
        AmbiguousError: If there is more than one way to read it.
    """
    head, at = read_request_head(data, at)
    body, at = _read_body(data, at, head.headers, b"0")
    return attrs.evolve(head, body=body), at


def read_request_head(data: bytes, at: int = 0) -> tuple[Message, int]:
    """Read a head as :func:`read_request` does, and return where it ends."""
    start, headers, at = _read_head(data, at, _REQUEST_LINE)
    head = Message(start, headers)
    if len(head.values(b"host")) != 1:
        raise AmbiguousError("not one host")
    return head, at


def read_response(data: bytes, *, has_body: bool = True) -> Message:
    """Read all of *data* as one response.

    Raises:
        IncompleteError: As :func:`read_request`.
        AmbiguousError: As :func:`read_request`; or if there is more than that.
    """
    start, headers, at = _read_head(data, 0, _STATUS_LINE)
    if not has_body or start[0] in {b"204", b"304"}:
        body = b""
    else:
        body, at = _read_body(data, at, headers, b"%d" % (len(data) - at))
    if at < len(data):
        raise AmbiguousError("there is more than a response")
    return Message(start, headers, body)


def _read_head(
    data: bytes, at: int, first: re.Pattern[bytes]
) -> tuple[tuple[bytes, ...], _Headers, int]:
    end = data.find(b"\r\n\r\n", at)
    if end < 0:
        raise IncompleteError("the head is not whole")
    line, *lines = data[at:end].split(b"\r\n")
    start = first.fullmatch(line)
    fields = [_FIELD.fullmatch(line) for line in lines]
    if start is None or None in fields:
        raise AmbiguousError("a line of the head is none")
    headers = [(field[1].lower(), field[2]) for field in fields if field]
    codings = b"transfer-encoding"
    folded = ((n, value.lower() if n == codings else value) for n, value in headers)
    return start.groups(), tuple(folded), end + len(b"\r\n\r\n")


def _read_body(
    data: bytes, at: int, headers: _Headers, otherwise: bytes
) -> tuple[bytes, int]:
    """Read a body; *otherwise* is its length, if no header says how it ends."""
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    lengths = [value for name, value in headers if name == b"content-length"]
    if codings == [b"chunked"] and not lengths:
        return _read_chunks(data, at)
    length = (lengths or [otherwise])[0]
    if codings or len(lengths) > 1 or not _LENGTH.fullmatch(length):
        raise AmbiguousError("there are two lengths, or an odd one")
    end = at + int(length)
    if end > len(data):
        raise IncompleteError("the body is not whole")
    return data[at:end], end


def _read_chunks(data: bytes, at: int) -> tuple[bytes, int]:
    body = b""
    while chunk := _CHUNK.match(data, at):
        size = int(chunk[1], 16)
        at = chunk.end() + size
        if not size:
            break
        body += data[chunk.end() : at]
        if data[at : at + 2] != b"\r\n":
            raise AmbiguousError("a chunk does not end")
        at += 2
    if at == len(data):
        raise IncompleteError("there is a chunk to come")
    trailers = _TRAILERS.match(data, at)
    if not chunk or not trailers:
        raise AmbiguousError("the chunks do not end")
    return body, trailers.end()
