"""Bytes from an agent's stdout in, outputs out. There is no I/O here, and no Trio.

The rules, where a line starts directly after a newline, and the rest of START's own
line, though it is the body's first, has no start of its own:

- Outside a frame START opens one, wherever it stands.
- A frame ends, whichever comes first, at END or START at the start of a line; at a line
  ``{...}END``, if the object is acceptable; or at end of file. A START that ends a
  frame opens the next. Anything else that looks like a marker is text: JSON has no raw
  newline, so an output cannot end itself by quoting one.
- A frame's value is its whole body, else the last of its lines, if acceptable, which
  :func:`~clawtrio._codec.decode_output` decides.
- A body over the limit is dropped once it is sure that no marker began within it, and
  skipped up to an END or START at the start of a line.

It must not matter how the stream is cut. So nothing is decided on a marker, or on the
end of a line after one, before its last byte is there: what may be the beginning of one
is held back, also beyond the limit.

And every byte is looked at a constant number of times. Both markers contain _CORE, so a
single search, which never goes back, finds either; one without dashes at its start,
since that is slow in text full of dashes. A marker that is changed must keep that. What
no end of a line is near needs no such search, and an output is mostly one line: to look
for a newline takes a twentieth of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from ._codec import STATUS_SIGNS, decode_output
from ._models import AgentOutput, DroppedFrame

START: Final = b"---NANOCLAW_OUTPUT_START---"
END: Final = b"---NANOCLAW_OUTPUT_END---"

_CORE: Final = b"NANOCLAW_OUTPUT_"
_START_CORE: Final = _CORE + b"START"
#: What stands in front of its core, and how much of it.
_DASHES: Final = b"---"
_LEAD: Final = len(_DASHES)
#: The longest part of a marker that may have to wait for its other part.
_PART: Final = len(START) - 1
#: Newlines that no marker follows.
_OPENINGS: Final = (b"\n{", b"\r\n{")
#: The longest end of a line that has to do with the newline behind it, or its lack.
_LINE_END: Final = len(START) + len(b"\r")
_NEWLINE: Final = 0x0A
#: What is around an output, and between two, where each has a line of its own.
_FIRST: Final = START + b"\n"
_LAST: Final = b"\n" + END
_BETWEEN: Final = _LAST + b"\n" + _FIRST
#: How the plainest frame begins. One cannot end on the line that begins with the brace.
_PLAIN: Final = _FIRST + b"{"
#: Outputs beyond this gain nothing from being read together.
_RUN_BYTES: Final = 2**16
#: JSON's white space, less the newline.
_BLANK: Final = b" \t\r"

_Event: TypeAlias = AgentOutput | DroppedFrame
_Text: TypeAlias = bytes | bytearray


class MarkerParser:
    """Incremental parser for one agent's stdout.

    However the stream is cut into reads, it means the same. The work is linear in its
    length. Between two reads at most *max_frame_bytes* and a few dozen bytes are kept.

    Args:
        max_frame_bytes: Largest body of a frame, all between its markers, that is
            accepted.

    Raises:
        ValueError: If *max_frame_bytes* is below 1.
    """

    def __init__(self, *, max_frame_bytes: int = 16 * 2**20) -> None:
        if max_frame_bytes < 1:
            raise ValueError(f"max_frame_bytes must be 1 or more: {max_frame_bytes!r}")
        self._max_frame_bytes = max_frame_bytes
        # A run, or a frame that waits for the next read, is no longer than that: so no
        # body in it is over the limit.
        self._longest = len(START) + min(max_frame_bytes, _RUN_BYTES)
        self._events: list[_Event] = []
        # Outside a frame, what may be the beginning of START, or what there is of a
        # frame that a run may have. In one, its body so far, or, while it is skipped,
        # enough of that to know the next marker by.
        self._buffer = bytearray()
        self._inside = False
        self._skipping = False
        # No undecided _CORE begins in front of this, counted as _buffer is.
        self._seek = 0
        # How much may follow, without a newline, before there is anything to decide: an
        # end of a frame has one on either side of it.
        self._room = 0
        # What a line "{...}END" that ended a frame gave.
        self._value: AgentOutput | None = None
        # No run of frames begins in front of this, counted as the text at hand is.
        self._no_run = 0
        # Tracked until START is seen.
        self._fallback: _LastLine | None = _LastLine(max_frame_bytes)
        self._closed = False

    @property
    def buffered(self) -> int:
        """Bytes that are kept for what is still to come."""
        line = 0 if self._fallback is None else len(self._fallback.line)
        return len(self._buffer) + line

    def feed(
        self, data: bytes | bytearray | memoryview
    ) -> list[AgentOutput | DroppedFrame]:
        """Take the next bytes of the stream. No bytes do nothing.

        Returns:
            What they complete, heartbeats included, in order.

        Raises:
            RuntimeError: If the parser was closed.
        """
        if self._closed:
            raise RuntimeError("the parser is closed: there is nothing after the end")
        if not data:
            return []
        data = bytes(data)
        if len(data) <= self._room and b"\n" not in data:
            self._buffer += data
            self._room -= len(data)
            return []
        events = self._parse(data, final=False)
        if self._fallback is not None:
            self._fallback.feed(data)
        return events

    def close(self) -> list[AgentOutput | DroppedFrame]:
        """Say that the stream is at its end, which ends an open frame.

        Returns:
            What that completes; nothing the second time.
        """
        if self._closed:
            return []
        self._closed = True
        events = self._parse(b"", final=True)
        if self._inside and not self._skipping:
            with memoryview(self._buffer) as body:
                events.append(_frame(body))
        self._buffer = bytearray()
        return events

    def last_line(self) -> AgentOutput | None:
        """Read the output of an agent that knows no markers. Call it after close().

        Returns:
            The last line that is not blank, if START was never seen and that line is
            acceptable, and not over *max_frame_bytes*. Else None.
        """
        return None if self._fallback is None else self._fallback.value()

    def _parse(self, data: bytes, *, final: bool) -> list[_Event]:
        events: list[_Event] = []
        self._events = events
        self._no_run = self._room = 0
        text: _Text = data
        if self._inside:
            self._buffer += data
            text = self._buffer
        elif self._buffer:
            text = b"".join((self._buffer, data))
        at = 0  # in a frame, where its body begins; outside, what is still to search
        while True:
            if not self._inside:
                at = self._open(text, at, final=final)
                if not self._inside:
                    break
            mark = self._find_end(text, at, final=final)
            if mark < 0:
                break
            if not self._skipping:
                # A view, since a copy of something large takes half as long again.
                with memoryview(text) as whole, whole[at:mark] as body:
                    events.append(self._value or _frame(body))
            self._inside = self._skipping = False
            self._value = None
            # A START that ends a frame is not used up: it opens the next.
            at = mark + len(END) if text.startswith(END, mark) else mark
            if text is self._buffer:
                # The rest came with this read, and is faster to deal with as bytes.
                text = bytes(text[at:])
                self._buffer = bytearray()
                at = self._no_run = 0
        self._keep(text, at)
        # They are the caller's alone, to forget.
        self._events = []
        return events

    def _open(self, text: _Text, at: int, *, final: bool) -> int:
        """Go into the next frame, but for one that a run has, or may have soon.

        Returns:
            Where its body begins; outside, where what is to be kept begins.
        """
        while (start := _find_start(text, at)) >= 0:
            self._fallback = None
            if start >= self._no_run and text.startswith(_PLAIN, start):
                stop = start + self._longest
                if text.find(b"\n", start + len(_PLAIN), stop) >= 0:
                    at = self._take_run(text, start, stop)
                    if at > start:
                        continue
                elif len(text) <= stop and not final:
                    self._room = stop - len(text)
                    return start
            self._inside = True
            self._seek = start + len(START)
            return self._seek
        return _held(text, at)

    def _take_run(self, text: _Text, start: int, stop: int) -> int:
        """Take a run of the plainest frames at once, which is faster.

        It means what taking them one by one would: within an output, which is JSON, no
        marker is at the start of a line, and no line is an output with END behind it.

        Returns:
            Where the run ends; *start* if there is none.
        """
        begin = start + len(_FIRST)
        last = max(begin, text.rfind(_LAST, begin, stop))
        bodies: Sequence[_Text] = text[begin:last].split(_BETWEEN)
        outputs: list[AgentOutput] = []
        for output in map(decode_output, bodies):
            if output is None:
                self._no_run = stop
                left = bodies[len(outputs) :]
                last -= sum(len(_BETWEEN) + len(body) for body in left)
                break
            outputs.append(output)
        self._events += outputs
        return last + len(_LAST) if outputs else start

    def _keep(self, text: _Text, at: int) -> None:
        """Keep *text* from *at* on, or what matters of it, for the next read."""
        if self._skipping:
            # Part of a marker, and the newline that puts it at the start of a line.
            at = max(at, len(text) - 1 - _PART)
        self._seek -= at
        if text is self._buffer:
            del self._buffer[:at]
        else:
            self._buffer = bytearray(text[at:])
        if self._inside and not self._skipping:
            size = len(self._buffer)
            if self._buffer.find(b"\n", max(0, size - _LINE_END)) < 0:
                self._room = self._max_frame_bytes - size

    def _find_end(self, text: _Text, begin: int, *, final: bool) -> int:
        """Find the marker that ends the frame whose body begins at *begin*.

        Gives the frame up on the way, if it is too large.

        Returns:
            Where the marker is; -1 if it is not there yet.
        """
        limit = begin + self._max_frame_bytes
        line = max(begin, self._seek - _LEAD - 1)
        if text.startswith(_OPENINGS, line):
            # START's own newline, mostly.
            line += 2
        newline = text.find(b"\n", line)
        seek = max(self._seek, (newline if newline >= 0 else len(text)) - _LINE_END)
        while (core := text.find(_CORE, seek)) >= 0:
            mark = core - _LEAD
            if mark > limit:
                self._give_up()
            ends = self._ends_frame(text, begin, mark, final=final)
            if ends:
                return mark
            if ends is None:
                self._seek = core
                return -1
            seek = core + len(_CORE)
        self._seek = max(seek, len(text) - len(_CORE) + 1)
        if len(text) > limit and (final or _held(text, begin) > limit):
            self._give_up()
        return -1

    def _give_up(self) -> None:
        if not self._skipping:
            self._skipping = True
            size = self._max_frame_bytes + 1
            self._events.append(DroppedFrame("too_large", size))

    def _ends_frame(
        self, text: _Text, begin: int, mark: int, *, final: bool
    ) -> bool | None:
        """Tell whether the frame ends at *mark*; None if that is not clear yet."""
        if mark < begin:
            return False
        starts_line = mark > begin and text[mark - 1] == _NEWLINE
        if text.startswith(END, mark):
            if starts_line or self._skipping:
                return starts_line
            return self._ends_line(text, begin, mark, final=final)
        if text.startswith(START, mark):
            return starts_line
        return None if not final and _held(text, mark) == mark else False

    def _ends_line(
        self, text: _Text, begin: int, mark: int, *, final: bool
    ) -> bool | None:
        """Tell the same of an END at *mark* that follows something on its line."""
        after = text[mark + len(END) : mark + len(END) + 2]
        if not after.startswith(b"\n") and after != b"\r\n":
            if after not in (b"", b"\r"):
                return False
            if not final:
                return None
        line = text[max(begin, text.rfind(b"\n", begin, mark) + 1) : mark]
        self._value = decode_output(line)
        return self._value is not None


class _LastLine:
    """The last line of a stream that is not blank."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        #: Its bytes, less blank ones of earlier reads; none if it is too long.
        self.line = bytearray()
        self._size = 0
        self._whole = True
        # Of the blank beginning of the line after it. Only its size matters.
        self._lead = 0

    def feed(self, data: bytes) -> None:
        begin = 0
        if filled := len(data.rstrip(_BLANK + b"\n")):
            begin = data.rfind(b"\n", 0, filled) + 1
            if begin or self._whole:
                self.line.clear()
                self._size = 0 if begin else self._lead
                self._whole = False
        if not self._whole:
            end = data.find(b"\n", max(begin, filled))
            self._whole = end >= 0
            self._extend(data[begin:end] if self._whole else data[begin:])
        newline = data.rfind(b"\n")
        self._lead = len(data) - 1 - newline + (self._lead if newline < 0 else 0)

    def _extend(self, part: bytes) -> None:
        self._size += len(part)
        # One more than the limit: a carriage return at the end does not count.
        if self._size <= self._max_bytes + 1:
            self.line += part
        else:
            self.line.clear()

    def value(self) -> AgentOutput | None:
        size = self._size - self.line.endswith(b"\r")
        return decode_output(self.line) if size <= self._max_bytes else None


def _find_start(text: _Text, at: int) -> int:
    """Do what ``text.find(START, at)`` does, and fast in text full of dashes too."""
    while (core := text.find(_START_CORE, at + _LEAD)) >= 0:
        at = core - _LEAD
        if text.startswith(START, at):
            return at
        at = core
    return -1


def _held(text: _Text, begin: int) -> int:
    """Find what may be the beginning of a marker, at the end of *text*.

    Returns:
        Where it is, not in front of *begin*; the length of *text* if there is none.
    """
    end = text[max(begin, len(text) - _PART) :]
    at = end.rfind(_DASHES)
    part = end[at:]
    if at < 0 or not (START.startswith(part) or END.startswith(part)):
        # There are less than three.
        part = end[len(end.rstrip(b"-")) :]
    return len(text) - len(part)


def _frame(body: memoryview) -> AgentOutput | DroppedFrame:
    """Read the body of a frame."""
    return (
        decode_output(body)
        or _last_acceptable(bytes(body))
        or DroppedFrame("unacceptable", len(body))
    )


def _last_acceptable(body: bytes) -> AgentOutput | None:
    """Read the last line of *body* that is an output, less an END behind it."""
    end = len(body)
    # Where the last of each is; without them, a million little lines would be tried.
    signs = dict.fromkeys(STATUS_SIGNS, end)
    while True:
        for sign, seen in signs.items():
            if seen >= end:
                signs[sign] = body.rfind(sign, 0, end)
        sign_at = max(signs.values())
        if sign_at < 0:
            return None
        begin = body.rfind(b"\n", 0, sign_at) + 1
        newline = body.find(b"\n", sign_at, end)
        line = body[begin : end if newline < 0 else newline]
        if value := decode_output(line.removesuffix(b"\r").removesuffix(END)):
            return value
        end = begin
