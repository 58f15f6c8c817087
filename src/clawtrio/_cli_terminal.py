"""The terminal: what the command line reads and writes there, and its signals.

What an agent, a runtime or a file said goes through :func:`printable` on its way here,
and no markup is read in it. The terminal may be slow, or stand still behind a pager:
what is written while an agent runs is written in a thread, so that a Ctrl-C still
stops it. Such a thread may be abandoned at exit, hence descriptors and not
:data:`sys.stdin` and :data:`sys.stdout`, whose locks it would hold.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Final, NoReturn

import trio
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._text import one_line, printable

_STDIN: Final = 0
_STDOUT: Final = 1
_STDERR: Final = 2
_READ_SIZE: Final = 2**16
#: Added to a signal's number, as shells do.
_SIGNALLED: Final = 128
#: json.dumps leaves this control character alone.
_DEL: Final = "\x7f"


def prepare() -> None:
    """Make the standard streams fit to be written to, whatever we were started with."""
    for fd in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(fd)
        except OSError:
            # Else the next file that we open is in its place, and gets what we say.
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        # What a terminal has no character for must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Write to stdout at once; *text* was made fit for it."""
    data = memoryview(text.encode(_encoding(), "backslashreplace"))
    while data:
        data = data[os.write(_STDOUT, data) :]


async def say(text: str) -> None:
    """Write a text that an agent chose to stdout, on lines of its own."""
    await _write_elsewhere(printable(text) + "\n")


async def say_json(value: Mapping[str, object]) -> None:
    """Write a value to stdout as one line of JSON."""
    line = json.dumps(value).replace(_DEL, "\\u007f")
    await _write_elsewhere(line + "\n")


async def _write_elsewhere(text: str) -> None:
    await trio.to_thread.run_sync(write, text, abandon_on_cancel=True)


def show(rows: Iterable[tuple[str | Text, ...]], *, header: tuple[str, ...]) -> None:
    """Write a table to stdout; in a pipe it has plain, whole lines."""
    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(one_line(c)) if isinstance(c, str) else c for c in row))
    is_terminal = os.isatty(_STDOUT)
    console = Console(
        force_terminal=is_terminal, width=None if is_terminal else 2**12, markup=False
    )
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    write("".join(line.rstrip() + "\n" for line in lines))


def complain(problem: object) -> None:
    """Say in one line on stderr what went wrong."""
    _tell("bold red", str(problem))


def note(text: str) -> None:
    """Say in one line on stderr what a person may want to know."""
    _tell("dim", text)


def _tell(style: str, text: str) -> None:
    # Made anew, since stderr may have been exchanged.
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("clawtrio: ", style), one_line(text)), soft_wrap=True)


def is_interactive() -> bool:
    """Whether a person types here and reads along."""
    return os.isatty(_STDIN) and os.isatty(_STDOUT)


class Lines:
    """What comes on stdin, line by line."""

    def __init__(self) -> None:
        self._whole: deque[bytes] = deque()
        self._rest = b""

    async def next(self) -> str | None:
        """Return the next line without its end; None after the last."""
        while not self._whole:
            chunk = await _read()
            if not chunk:
                last, self._rest = self._rest, b""
                return _decoded(last) if last else None
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            self._whole.extend(whole)
        return _decoded(self._whole.popleft())


async def read_all() -> str:
    """Return all of stdin, without the newline at its end."""
    data = b""
    while chunk := await _read():
        data += chunk
    return _decoded(data.removesuffix(b"\n"))


async def _read() -> bytes:
    return await trio.to_thread.run_sync(_read_now, abandon_on_cancel=True)


def _read_now() -> bytes:
    # Others with the same terminal may have made it non-blocking.
    select.select([_STDIN], [], [])
    return os.read(_STDIN, _READ_SIZE)


def _decoded(line: bytes) -> str:
    return line.removesuffix(b"\r").decode(errors="replace")


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


class Interrupts:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into an end in order.

    Attributes:
        number: The signal that came; None if none did.
        stop: What a signal calls: something that ends the work soon. By default it is
            cancelled.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.scope = trio.CancelScope()
        self.stop: Callable[[], object] = self.scope.cancel

    async def listen(self, signals: AsyncIterator[int]) -> None:
        """Obey the signals that come."""
        async for number in signals:
            if self.number is not None:
                _leave_now(number)
            self.number = number
            note("stopping; the same again leaves at once")
            self.stop()


async def obeying_signals(work: Callable[[Interrupts], Awaitable[int]]) -> int:
    """Do *work* until it ends or a signal ends it, and return the exit code.

    The code is 130 after a Ctrl-C and 143 after SIGTERM, as in a shell. A second signal
    is for who does not want to wait for the first one's effect: it ends the process.
    Agents then see the end of their stdin, and the next sweep removes what is left.
    """
    interrupts = Interrupts()
    code = 1
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # What nohup, or a shell that runs us in the background, has ignored stays ignored.
    heeded = [n for n in wanted if signal.getsignal(n) is not signal.SIG_IGN]
    with trio.open_signal_receiver(*heeded) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupts.listen, signals)
            with interrupts.scope:
                code = await work(interrupts)
            nursery.cancel_scope.cancel()
    return code if interrupts.number is None else _SIGNALLED + interrupts.number


def _leave_now(number: int) -> NoReturn:
    # Not sys.exit: it would wait for what is in the way.
    os._exit(_SIGNALLED + number)
