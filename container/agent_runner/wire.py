"""The agent's end of the wire: input and messages in, frames out.

It knows the protocol and no backend. What a backend is given is a :class:`Session`;
what it gives goes through :func:`emit`. Both may be used from any thread, so that a
backend on an event loop can hand messages over to it and write frames in a thread.

Two rules shape the module:

- In lifeline mode end of file on stdin means that the host is gone, and then nothing
  may keep the process: not a long turn, not a full pipe. So one thread does nothing but
  read stdin, never waits for anything else, and ends the process itself.
- Children get /dev/null as stdin. One that inherited the real one could eat messages.

The host's side of this is src/clawtrio: change both.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import children

START: Final = b"---NANOCLAW_OUTPUT_START---\n"
END: Final = b"\n---NANOCLAW_OUTPUT_END---\n"

INBOX: Final = Path("/workspace/ipc/input")
CLOSE: Final = "_close"
POLL_INTERVAL: Final = 0.1
#: Where the kernel tells of files; file sharing with a virtual machine may not.
WATCHED_INTERVAL: Final = 0.5

HOST_GONE: Final = 129
"""Exit code when the host has hung up: 128 + SIGHUP, as a shell would put it."""

_READ_SIZE: Final = 2**16
#: IN_CLOSE_WRITE and IN_MOVED_TO: at IN_CREATE there is nothing in it yet.
_IN_COMES: Final = 0x8 | 0x80
_STDOUT: Final = 1
_STDERR: Final = 2
_writing = threading.Lock()


class InputError(Exception):
    """No input came, or a wrong one: tell the host in an error frame, and leave."""


@dataclass(frozen=True, slots=True)
class AgentInput:
    """What the agent is started with."""

    prompt: str
    group_folder: str
    chat_jid: str
    is_main: bool
    session_id: str | None = None
    is_scheduled_task: bool = False
    assistant_name: str | None = None
    lifeline: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One thing to answer. Without an *id*, its answer names none. The prompt has 0."""

    text: str
    id: int | None = None


Deliver = Callable[[Message | None], None]


class Session:
    """One start of the agent: its input, and the messages that follow it."""

    def __init__(self, given: AgentInput, follow: Callable[[Deliver], None]) -> None:
        self.input = given
        self._follow = follow

    def listen(self, deliver: Deliver) -> None:
        """Hand each message to *deliver* as it comes, and at the close ``None``.

        Call it once, and first of all: from then on a host that has gone ends the
        process. *deliver* is called in another thread, and must not block.
        """
        threading.Thread(
            target=self._listen, args=(deliver,), name="wire", daemon=True
        ).start()

    def _listen(self, deliver: Deliver) -> None:
        try:
            self._follow(deliver)
        except Exception as exc:  # noqa: BLE001 - deaf, the agent would never leave
            leave(f"reading messages failed: {exc!r}", 1)


def take_stdin() -> int:
    """Move stdin to a descriptor that children don't inherit, and return that.

    Raises:
        InputError: If there is no stdin.
    """
    try:
        stdin = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        null = os.open(os.devnull, os.O_RDONLY)
    except OSError as exc:
        raise InputError(f"stdin can't be used: {exc.strerror}") from exc
    os.dup2(null, 0)
    os.close(null)
    return stdin


def open_session(stdin: int, *, inbox: Path = INBOX) -> Session:
    """Read the input from *stdin*; its first line tells which mode this is.

    Args:
        stdin: A descriptor. The session owns it from here on.
        inbox: The directory where follow-ups come in eof mode.

    Raises:
        InputError: If no input came, or a wrong one.
    """
    rest = bytearray()
    lines = _read_lines(stdin, rest)
    try:
        first = next((line for line in lines if line.strip()), b"")
        value = _first_value(first)
        if _is_lifeline(value):
            return Session(
                _as_input(value), lambda deliver: _follow_lines(lines, deliver)
            )
        whole = b"\n".join([*([first] if first else []), *lines, rest])
        if not whole.strip():
            raise InputError("no input came on stdin")
        value = _load(whole)
    except OSError as exc:
        raise InputError(f"stdin can't be read: {exc.strerror}") from exc
    except _MalformedError as exc:
        raise InputError(f"the input is {exc}") from exc
    if _is_lifeline(value):
        _leave_without_host()
    os.close(stdin)
    return Session(_as_input(value), lambda deliver: _follow_files(inbox, deliver))


def emit(
    result: str | None = None,
    *,
    status: str = "success",
    new_session_id: str | None = None,
    error: str | None = None,
    partial: bool = False,
    answers: int | None = None,
) -> None:
    """Write one frame to stdout, whole, before anyone else's.

    Args:
        result: The text, if this is an output.
        status: ``"success"`` or ``"error"``.
        new_session_id: The session that the agent is in.
        error: What went wrong.
        partial: Whether more belongs to the same answer. Without a *result* this is a
            heartbeat; a frame that has neither says that the agent waits.
        answers: The message that is answered by this, and all before it.
    """
    fields: dict[str, object] = {"status": status, "result": result}
    if new_session_id is not None:
        fields["newSessionId"] = new_session_id
    if error is not None:
        fields["error"] = error
    if partial:
        fields["partial"] = True
    if answers is not None:
        fields["answers"] = answers
    with _writing:
        _write_all(START + _encode(fields) + END)


def say(text: str) -> None:
    """Put one line on stderr, unless that would block."""
    line = " ".join(f"agent_runner: {text}".split())
    data = line.encode(errors="replace")[: select.PIPE_BUF - 1] + b"\n"
    poll = select.poll()
    poll.register(_STDERR, select.POLLOUT)
    # A pipe that polls as writable takes PIPE_BUF bytes at once. sys.stderr has a lock
    # besides, which a stuck thread might hold.
    if poll.poll(0):
        with contextlib.suppress(OSError):
            os.write(_STDERR, data)


def leave(reason: str, code: int) -> NoReturn:
    """End the process now, from whichever thread, whatever the others are stuck in.

    What it has started ends with it.
    """
    # Else another thread might first tell of the end of what is killed here, and leave.
    _writing.acquire(blocking=False)
    try:
        say(reason)
        children.kill_all()
    finally:
        os._exit(code)


def _leave_without_host() -> NoReturn:
    leave("the host is gone (end of file on stdin)", HOST_GONE)


def _read_lines(fd: int, rest: bytearray) -> Iterator[bytes]:
    """Yield the whole lines of *fd*; after that *rest* is what had no newline."""
    searched = 0  # a long line isn't searched from its beginning at each read
    while True:
        while (end := rest.find(b"\n", searched)) >= 0:
            line = bytes(rest[:end])
            del rest[: end + 1]
            searched = 0
            yield line
        searched = len(rest)
        data = os.read(fd, _READ_SIZE)
        if not data:
            return
        rest += data


def _follow_lines(lines: Iterator[bytes], deliver: Deliver) -> None:
    closed = False
    for line in lines:
        if not line.strip():
            continue
        try:
            message = _as_message(line)
        except _MalformedError as exc:
            say(f"skipped a line on stdin: {exc}")
            continue
        if closed:
            say("skipped a line on stdin: it came after the close")
            continue
        deliver(message)
        closed = message is None
    _leave_without_host()


def _follow_files(inbox: Path, deliver: Deliver) -> None:
    close = inbox / CLOSE
    watch = _Watch(inbox)
    stuck: set[Path] = set()  # what can't be removed must not be answered twice
    while True:
        # Looked for before the files are: what came before it is then among them.
        closing = os.path.lexists(close)
        for path in _files_in(inbox):
            if path in stuck:
                continue
            message = _read_message(path)
            if not _remove(path):
                stuck.add(path)
            if message is not None:
                deliver(message)
        if closing:
            _remove(close)
            deliver(None)
            return
        watch.wait()


class _Watch:
    """Waits for files to come into *directory*, which need not be there yet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd: int | None = None

    def wait(self) -> None:
        """Wait until a file comes, or it is time to look again."""
        if self._fd is None:
            time.sleep(POLL_INTERVAL)
            self._fd = _open_inotify(self._directory)
        elif select.select([self._fd], [], [], WATCHED_INTERVAL)[0]:
            os.read(self._fd, _READ_SIZE)


def _open_inotify(directory: Path) -> int | None:
    """Return a descriptor that is readable when a file comes; None without such."""
    import ctypes  # noqa: PLC0415 - only where follow-ups are files

    libc = ctypes.CDLL(None)
    fd: int = libc.inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        return None
    if libc.inotify_add_watch(fd, bytes(directory), _IN_COMES) < 0:
        os.close(fd)
        return None
    return fd


def _files_in(inbox: Path) -> list[Path]:
    try:
        paths = sorted(inbox.iterdir())
    except FileNotFoundError:
        return []  # nobody has sent anything yet
    return [p for p in paths if p.suffix == ".json" and not p.name.startswith(".")]


def _read_message(path: Path) -> Message | None:
    try:
        # Opening a named pipe would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            message = _as_message(file.read())
    except OSError as exc:
        say(f"skipped {path.name!r}: {exc.strerror}")
    except _MalformedError as exc:
        say(f"skipped {path.name!r}: {exc}")
    else:
        if message is not None:
            return message
        say(f"skipped {path.name!r}: a close is a file named {CLOSE}")
    return None


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        say(f"{path.name!r} can't be removed: {exc.strerror}")
        return False
    return True


class _MalformedError(Exception):
    """Some bytes mean nothing. The text says why, and never quotes them."""

    def __init__(self, problem: str, *, cut_short: bool = False) -> None:
        super().__init__(problem)
        self.cut_short = cut_short


def _load(data: bytes) -> object:
    try:
        value: object = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as exc:
        raise _MalformedError(
            f"not JSON: {exc}", cut_short=exc.pos >= len(exc.doc.rstrip())
        ) from exc
    except UnicodeDecodeError as exc:
        raise _MalformedError("not UTF-8") from exc
    except (ValueError, RecursionError) as exc:
        raise _MalformedError("beyond what JSON should hold") from exc
    return value


def _first_value(line: bytes) -> object:
    """Decode a first line, which is ``None`` if it is only the beginning of a value.

    White space alone may span lines in JSON, so what is wrong before the end of the
    line stays wrong. Without that a bad line in lifeline mode would wait for ever.
    """
    try:
        return _load(line)
    except _MalformedError as exc:
        if exc.cut_short:
            return None
        raise


def _is_lifeline(value: object) -> bool:
    return isinstance(value, dict) and value.get("lifeline") is True


def _as_input(value: object) -> AgentInput:
    if not isinstance(value, dict):
        raise InputError("the input is not a JSON object")
    return AgentInput(
        prompt=_field(value, "prompt", str),
        group_folder=_field(value, "groupFolder", str),
        chat_jid=_field(value, "chatJid", str),
        is_main=_field(value, "isMain", bool),
        session_id=_field(value, "sessionId", str, needed=False),
        is_scheduled_task=_field(value, "isScheduledTask", bool, needed=False) or False,
        assistant_name=_field(value, "assistantName", str, needed=False),
        lifeline=_field(value, "lifeline", bool, needed=False) or False,
    )


_KINDS: Final = {str: "string", bool: "boolean"}


def _field(value: dict[str, Any], name: str, kind: type, *, needed: bool = True) -> Any:
    field = value.get(name)
    if isinstance(field, kind) or (field is None and not needed):
        return field
    problem = "is missing" if field is None else f"is not a {_KINDS[kind]}"
    raise InputError(f"the input's {name} {problem}")


def _as_message(data: bytes) -> Message | None:
    """Take a message apart; ``None`` is a close."""
    value = _load(data)
    if not isinstance(value, dict):
        raise _MalformedError("not a JSON object")
    if value.get("type") == "close":
        return None
    if value.get("type") != "message":
        raise _MalformedError("neither a message nor a close")
    text, number = value.get("text"), value.get("id")
    if not isinstance(text, str):
        raise _MalformedError("its text is not a string")
    if number is not None and type(number) is not int:
        raise _MalformedError("its id is not an integer")
    return Message(text, number)


def _encode(fields: dict[str, object]) -> bytes:
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        # JavaScript cuts strings between surrogates: pairs are joined, halves replaced.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text.encode()


def _write_all(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(_STDOUT, rest) :]
        except BlockingIOError:
            # A child may have made our stdout non-blocking: Node does that to pipes.
            select.select([], [_STDOUT], [])
