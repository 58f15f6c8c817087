"""The program inside the container, run as the real process that it is."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

SOURCE = Path(__file__).parents[1] / "container" / "agent_runner"
START = b"---NANOCLAW_OUTPUT_START---\n"
END = b"\n---NANOCLAW_OUTPUT_END---\n"

# Far more than anything here takes; a hang is what fails.
BOUND = 20
HOST_GONE = 129

INPUT = {"prompt": "hi", "groupFolder": "g", "chatJid": "tg:1", "isMain": False}

# What a test puts before the program itself, in the same process.
RUN = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, SOURCE)
{prelude}
main = runpy.run_path(SOURCE + "/__main__.py")["main"]
sys.exit(main(["echo"], inbox=INBOX and Path(INBOX)))
"""

Frame = dict[str, Any]


def program(*, prelude: str = "", inbox: Path | None = None) -> list[str]:
    """Give the argv that runs the echo backend, changed as a test needs it."""
    names = f"SOURCE = {str(SOURCE)!r}\nINBOX = {inbox and str(inbox)!r}\n"
    return [sys.executable, "-c", names + RUN.format(prelude=prelude)]


def line(value: object) -> bytes:
    """Give one line of JSON."""
    return json.dumps(value).encode() + b"\n"


def message(text: str, **others: object) -> bytes:
    """Give a follow-up, as a line or as a file's content."""
    return line({"type": "message", "text": text, **others})


def lifeline(**others: object) -> bytes:
    """Give a first line in lifeline mode."""
    return line({**INPUT, "sessionId": "s", "lifeline": True, **others})


def heartbeat(session_id: str = "s") -> Frame:
    """Give the frame that comes first."""
    return {
        "status": "success",
        "result": None,
        "newSessionId": session_id,
        "partial": True,
    }


def output(text: str, **others: object) -> Frame:
    """Give a frame with a text."""
    return {"status": "success", "result": text, **others}


def waiting(answers: int | None = 0, session_id: str = "s") -> Frame:
    """Give the frame that comes after each answer."""
    frame: Frame = {"status": "success", "result": None, "newSessionId": session_id}
    return frame if answers is None else {**frame, "answers": answers}


def framed(frame: Frame) -> bytes:
    """Give the bytes of a frame."""
    text = json.dumps(frame, ensure_ascii=False, separators=(",", ":"))
    return START + text.encode() + END


def frames_in(data: bytes) -> list[Frame]:
    """Take *data* apart, which must be whole frames and nothing else."""
    frames = []
    while data:
        assert data.startswith(START)
        body, end, data = data.removeprefix(START).partition(END)
        assert end
        frames.append(json.loads(body))
        assert b"\n" not in body
    return frames


def names_in(directory: Path) -> set[str]:
    """Name the files that are left in *directory*."""
    return {path.name for path in directory.iterdir()}


class Agent:
    """A live process, and what it has written."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._unread = b""

    async def send(self, data: bytes) -> None:
        """Write to its stdin."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(data)

    async def hang_up(self) -> None:
        """Close its stdin, as a host's death does."""
        assert self.process.stdin is not None
        await self.process.stdin.aclose()

    async def next(self, count: int) -> list[Frame]:
        """Read exactly *count* frames."""
        assert self.process.stdout is not None
        frames: list[Frame] = []
        while len(frames) < count:
            body, end, rest = self._unread.partition(END)
            if end:
                frames += frames_in(body + end)
                self._unread = rest
                continue
            data = await self.process.stdout.receive_some()
            assert data, f"stdout ended after {frames}"
            self._unread += data
        return frames

    async def rest(self) -> list[Frame]:
        """Read all that comes until it leaves."""
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            self._unread += data
        await self.process.wait()
        return frames_in(self._unread)

    async def said(self) -> list[str]:
        """Read its stderr to the end, as lines."""
        assert self.process.stderr is not None
        data = b""
        async for more in self.process.stderr:
            data += more
        return data.decode().splitlines()


@asynccontextmanager
async def running(
    argv: list[str] | None = None, **options: Any
) -> AsyncIterator[Agent]:
    """Run the program, by default the echo backend, and kill it in the end."""
    argv = argv or [sys.executable, str(SOURCE), "echo"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with trio.fail_after(BOUND):
        process = await trio.lowlevel.open_process(
            argv, stdin=subprocess.PIPE, **options
        )
        try:
            yield Agent(process)
        finally:
            process.kill()
            with trio.move_on_after(BOUND, shield=True):
                await process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        await stream.aclose()


async def run(
    stdin: bytes, *argv: str, program: list[str] | None = None
) -> tuple[int, bytes, str]:
    """Run the program to its end, and give its exit code, stdout and stderr."""
    with trio.fail_after(BOUND):
        done = await trio.run_process(
            program or [sys.executable, str(SOURCE), *argv],
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return done.returncode, done.stdout, done.stderr.decode()


@contextmanager
def pipe_nobody_reads() -> Iterator[int]:
    """Give the writing end of a pipe in which there is no room left."""
    reader, writer = os.pipe()
    with closing(os.fdopen(reader, "rb")), closing(os.fdopen(writer, "wb")):
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        yield writer


# Lifeline mode


async def test_prompt_and_follow_ups_are_answered() -> None:
    """Each message is answered line by line, under its id, and then it waits."""
    async with running() as agent:
        await agent.send(lifeline(prompt="one\n\ntwo\r\nthree\n"))
        assert await agent.next(5) == [
            heartbeat(),
            output("one", partial=True),
            output("two", partial=True),
            output("three", answers=0),
            waiting(),
        ]

        await agent.send(message("four", id=7))
        assert await agent.next(2) == [output("four", answers=7), waiting(7)]

        await agent.send(message("five"))
        assert await agent.next(2) == [output("five"), waiting(None)]

        await agent.send(line({"type": "close"}))
        assert await agent.rest() == []
        assert agent.process.returncode == 0
        assert await agent.said() == []


async def test_close_comes_after_what_was_sent_before_it() -> None:
    """Messages that came while it was busy are answered in order before it leaves."""
    async with running() as agent:
        texts = [str(n) for n in range(1, 101)]
        await agent.send(
            lifeline(prompt="0\n" * 200)
            + b"".join(message(text, id=int(text)) for text in texts)
            + line({"type": "close"})
        )
        answers = [f for f in await agent.rest() if "answers" in f]
        assert answers == [
            frame
            for text in ["0", *texts]
            for frame in (output(text, answers=int(text)), waiting(int(text)))
        ]
        assert agent.process.returncode == 0


@pytest.mark.parametrize("text", ["", "\n", " \n\t\r\n "])
async def test_blank_text_has_an_empty_answer(text: str) -> None:
    """A text in which nothing is written is answered, with nothing."""
    async with running() as agent:
        await agent.send(lifeline(prompt=text))
        assert await agent.next(3) == [heartbeat(), output("", answers=0), waiting()]


async def test_new_session_gets_an_id() -> None:
    """Without a session to go on with, every start makes up another one."""
    seen = set()
    for _ in range(2):
        async with running() as agent:
            await agent.send(lifeline(sessionId=None))
            first, _, last = await agent.next(3)
            assert first == heartbeat(last["newSessionId"])
            seen.add(last["newSessionId"])
    assert len(seen) == 2
    assert all(session_id.startswith("echo-") for session_id in seen)


@pytest.mark.parametrize("cut", range(1, 60, 7))
async def test_input_may_come_in_pieces(cut: int) -> None:
    """However its bytes are cut, a line means the same."""
    data = lifeline(prompt="ä😀") + message("ü", id=1) + line({"type": "close"})
    async with running() as agent:
        for i in range(0, len(data), cut):
            await agent.send(data[i : i + cut])
        texts = [f["result"] for f in await agent.rest() if f["result"]]
    assert texts == ["ä😀", "ü"]


async def test_end_of_file_while_waiting() -> None:
    """A host that dies while the agent waits takes it along within a second."""
    async with running() as agent:
        await agent.send(lifeline())
        await agent.next(3)
        await agent.hang_up()
        with trio.fail_after(1):
            await agent.process.wait()
        assert agent.process.returncode == HOST_GONE
        assert await agent.said() == [
            "agent_runner: the host is gone (end of file on stdin)"
        ]


@pytest.mark.parametrize("torn", [b"", b'{"type":"mess'])
async def test_end_of_file_while_stuck_in_a_write(torn: bytes) -> None:
    """It leaves within a second also in a write to a stdout that nobody reads."""
    async with running() as agent:
        assert agent.process.stdout is not None
        await agent.send(lifeline(prompt="x" * 2**20) + message("y", id=1) + torn)
        # One byte of the second frame: the rest of it is more than a pipe holds.
        left = len(framed(heartbeat())) + 1
        while left:
            left -= len(await agent.process.stdout.receive_some(left))
        await agent.hang_up()
        with trio.fail_after(1):
            await agent.process.wait()
        assert agent.process.returncode == HOST_GONE


async def test_end_of_file_while_stderr_is_stuck() -> None:
    """It neither waits to say why it leaves, nor grows deaf over bad lines."""
    with pipe_nobody_reads() as stuck:
        async with running(stderr=stuck) as agent:
            await agent.send(lifeline() + b"nonsense\n" * 100 + message("on", id=1))
            assert (await agent.next(5))[3] == output("on", answers=1)
            await agent.hang_up()
            with trio.fail_after(1):
                await agent.process.wait()
            assert agent.process.returncode == HOST_GONE


async def test_end_of_file_right_after_the_input() -> None:
    """A first line that was cut off before its newline has no host any more."""
    code, stdout, stderr = await run(lifeline().rstrip(b"\n"), "echo")
    assert (code, stdout) == (HOST_GONE, b"")
    assert "host is gone" in stderr


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "beyond what JSON should hold"),
        (b'{"type":"message","id":' + b"9" * 5000 + b"}", "beyond what JSON"),
        (b"[]", "not a JSON object"),
        (b'{"type":"massage"}', "neither a message nor a close"),
        (b'{"type":"message"}', "its text is not a string"),
        (b'{"type":"message","text":"secret","id":"1"}', "its id is not an integer"),
        (b'{"type":"message","text":"secret","id":true}', "its id is not an integer"),
    ],
)
async def test_malformed_line_is_skipped(bad: bytes, problem: str) -> None:
    """A line that means nothing costs one line on stderr, which does not quote it."""
    async with running() as agent:
        await agent.send(lifeline() + bad + b"\n\n" + message("on", id=1))
        assert (await agent.next(5))[3] == output("on", answers=1)
        await agent.hang_up()
        (complaint, _) = await agent.said()
    assert complaint.startswith(f"agent_runner: skipped a line on stdin: {problem}")
    assert "secret" not in complaint


async def test_message_after_the_close_is_refused() -> None:
    """What comes after the close is not answered, and that is said."""
    async with running() as agent:
        data = lifeline(prompt="x\n" * 5000) + line({"type": "close"}) + message("late")
        await agent.send(data)
        assert output("late") not in await agent.rest()
        assert agent.process.returncode == 0
        assert await agent.said() == [
            "agent_runner: skipped a line on stdin: it came after the close"
        ]


async def test_failure_of_the_reader_ends_the_process() -> None:
    """A reader that fails takes the agent along: it could never be told to leave."""
    script = f"""
import signal, sys
sys.path.insert(0, {str(SOURCE)!r})
import wire
wire.open_session(wire.take_stdin()).listen(lambda message: 1 / 0)
signal.pause()
"""
    async with running([sys.executable, "-c", script]) as agent:
        await agent.send(lifeline() + message("x"))
        await agent.process.wait()
        assert agent.process.returncode == 1
        (complaint,) = await agent.said()
        assert "reading messages failed: ZeroDivisionError" in complaint


# eof mode


async def test_follow_ups_come_as_files(tmp_path: Path) -> None:
    """Files are taken in order of name and removed, until there is a _close."""
    for name in ("3", "1", "2"):
        (tmp_path / f"{name}.json").write_bytes(message(name, id=int(name)))
    (tmp_path / "0.json.tmp").write_bytes(b"half")
    (tmp_path / ".0.json").write_bytes(b"hidden")
    async with running(program(inbox=tmp_path)) as agent:
        await agent.send(line({**INPUT, "sessionId": "s"}))
        await agent.hang_up()
        texts = [f["result"] for f in await agent.next(9) if f["result"] is not None]
        assert texts == ["hi", "1", "2", "3"]

        (tmp_path / "new").write_bytes(message("no id"))
        (tmp_path / "new").rename(tmp_path / "4.json")
        assert await agent.next(2) == [output("no id"), waiting(None)]

        (tmp_path / "_close").touch()
        assert await agent.rest() == []
        assert agent.process.returncode == 0
        assert await agent.said() == []
    assert names_in(tmp_path) == {"0.json.tmp", ".0.json"}


async def test_close_file_comes_after_the_others(tmp_path: Path) -> None:
    """What lies there together with a _close is answered before it leaves."""
    (tmp_path / "_close").touch()
    for n in range(1, 21):
        (tmp_path / f"{n:03}.json").write_bytes(message(str(n), id=n))
    code, stdout, stderr = await run(line(INPUT), program=program(inbox=tmp_path))
    assert (code, stderr) == (0, "")
    answers = [f["answers"] for f in frames_in(stdout) if f["result"] is not None]
    assert answers == list(range(21))
    assert not names_in(tmp_path)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ending", ["", "\n", "\n \n"])
@pytest.mark.parametrize("before", ["", "\n\n", "\ufeff"])
async def test_any_layout_of_the_input(
    tmp_path: Path, indent: int | None, ending: str, before: str
) -> None:
    """The input may be printed prettily, and end with a newline or without."""
    (tmp_path / "_close").touch()
    data = before + json.dumps({**INPUT, "sessionId": "s"}, indent=indent) + ending
    code, stdout, _ = await run(data.encode(), program=program(inbox=tmp_path))
    assert code == 0
    assert frames_in(stdout) == [heartbeat(), output("hi", answers=0), waiting()]


async def test_no_inbox_yet(tmp_path: Path) -> None:
    """An inbox that does not exist is one that is empty so far."""
    inbox = tmp_path / "input"
    async with running(program(inbox=inbox)) as agent:
        await agent.send(line(INPUT))
        await agent.hang_up()
        await agent.next(3)
        inbox.mkdir()
        (inbox / "_close").touch()
        assert await agent.rest() == []
        assert agent.process.returncode == 0


async def test_files_are_heard_of_at_once(tmp_path: Path) -> None:
    """The kernel tells of a file: there is no waiting for the next look."""
    prelude = "import wire; wire.WATCHED_INTERVAL = 60"
    async with running(program(inbox=tmp_path, prelude=prelude)) as agent:
        await agent.send(line(INPUT))
        await agent.hang_up()
        await agent.next(3)
        await trio.sleep(0.5)
        for number in range(1, 21):
            started = trio.current_time()
            path = tmp_path / f"{number}.tmp"
            path.write_bytes(message("?", id=number))
            path.rename(path.with_suffix(".json"))
            assert (await agent.next(2))[0] == output("?", answers=number)
            assert trio.current_time() - started < 5
        (tmp_path / "_close").touch()
        assert await agent.rest() == []


@pytest.mark.parametrize("lacking", ["inotify_init1", "inotify_add_watch"])
async def test_files_without_a_watch(tmp_path: Path, lacking: str) -> None:
    """Where the kernel has no watch to give, it looks again and again."""
    prelude = f"""
import ctypes
class Library(ctypes.CDLL):
    def {lacking}(self, *arguments):
        return -1
ctypes.CDLL = Library
"""
    async with running(program(inbox=tmp_path, prelude=prelude)) as agent:
        await agent.send(line(INPUT))
        await agent.hang_up()
        await agent.next(3)
        await trio.sleep(0.3)
        path = tmp_path / "1.tmp"
        path.write_bytes(message("on", id=1))
        path.rename(path.with_suffix(".json"))
        assert (await agent.next(2))[0] == output("on", answers=1)


async def test_malformed_file_is_removed(tmp_path: Path) -> None:
    """A file that means nothing is named once on stderr, and is gone."""
    (tmp_path / "1.json").write_bytes(b"{")
    (tmp_path / "2.json").write_bytes(line({"type": "close"}))
    (tmp_path / "3.json").write_bytes(b"")
    (tmp_path / "4.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "5.json")
    (tmp_path / "6.json").write_bytes(message("on", id=1))
    (tmp_path / "_close").touch()
    code, stdout, stderr = await run(line(INPUT), program=program(inbox=tmp_path))
    assert code == 0
    assert frames_in(stdout)[3] == output("on", answers=1)
    assert [c.split(":", 2)[1] for c in stderr.splitlines()] == [
        f" skipped '{n}.json'" for n in range(1, 6)
    ]
    assert not names_in(tmp_path)


async def test_what_cannot_be_removed_is_taken_once(tmp_path: Path) -> None:
    """Neither a stubborn message nor a directory comes back at the next look."""
    prelude = """
real = Path.unlink
def unlink(self, missing_ok=False):
    if self.name == "1.json":
        raise PermissionError(13, "stubborn")
    real(self, missing_ok)
Path.unlink = unlink
"""
    (tmp_path / "1.json").write_bytes(message("once", id=1))
    (tmp_path / "2.json").mkdir()
    async with running(program(inbox=tmp_path, prelude=prelude)) as agent:
        await agent.send(line(INPUT))
        await agent.hang_up()
        assert (await agent.next(5))[3] == output("once", answers=1)
        for n in (3, 4):  # each is a look at all of them
            (tmp_path / f"{n}.json").write_bytes(message(str(n), id=n))
            assert (await agent.next(2))[0] == output(str(n), answers=n)
        (tmp_path / "_close").touch()
        assert await agent.rest() == []
        assert len(await agent.said()) == 3


# Input that is none


@pytest.mark.parametrize(
    ("stdin", "problem"),
    [
        (b"", "no input came on stdin"),
        (b" \n\n", "no input came on stdin"),
        (b"hello", "the input is not JSON: Expecting value"),
        (b'{"prompt": "hi",\n\n', "the input is not JSON: Expecting property name"),
        (line(INPUT) + b"more", "the input is not JSON: Extra data"),
        (b"\xff\xfe", "the input is not UTF-8"),
        (b"[" * 100_000, "the input is beyond what JSON should hold"),
        (b"[1]", "the input is not a JSON object"),
        (line({**INPUT, "prompt": None}), "the input's prompt is missing"),
        (line({**INPUT, "prompt": 5}), "the input's prompt is not a string"),
        (line({**INPUT, "isMain": 1}), "the input's isMain is not a boolean"),
        (line({**INPUT, "sessionId": 5}), "the input's sessionId is not a string"),
        (line({**INPUT, "lifeline": "yes"}), "the input's lifeline is not a boolean"),
        (lifeline(chatJid=[]), "the input's chatJid is not a string"),
    ],
)
async def test_bad_input_is_an_error_frame(stdin: bytes, problem: str) -> None:
    """An input that is none gets one frame that says why, and exit code 1."""
    code, stdout, stderr = await run(stdin, "echo")
    (frame,) = frames_in(stdout)
    assert (code, stderr) == (1, "")
    assert frame.pop("error").startswith(problem)
    assert frame == {"status": "error", "result": None}


@pytest.mark.parametrize("bad", [b"hello\n", b'{"prompt": hi, "lifeline": true}\n'])
async def test_bad_first_line_does_not_wait_for_more(bad: bytes) -> None:
    """A first line that nothing can mend is refused while stdin is still open."""
    async with running() as agent:
        await agent.send(bad)
        (frame,) = await agent.rest()
        assert "not JSON" in frame["error"]
        assert agent.process.returncode == 1


@pytest.mark.parametrize("redirection", ["<&-", "0>/dev/null"])
async def test_no_stdin_at_all(redirection: str) -> None:
    """A stdin that is closed, or can't be read, is said in an error frame."""
    argv = [sys.executable, str(SOURCE)]
    shell = ["sh", "-c", f'exec "$0" "$1" echo {redirection}', *argv]
    code, stdout, _ = await run(b"", program=shell)
    (frame,) = frames_in(stdout)
    assert code == 1
    assert frame["error"].startswith("stdin can't be ")


# Frames


async def test_big_prompt() -> None:
    """A prompt of 5 MiB comes back whole, in one frame."""
    prompt = "0123456789abcdeé" * (5 * 2**20 // 17)
    async with running() as agent:
        await agent.send(lifeline(prompt=prompt))
        frames = await agent.next(3)
    assert frames == [heartbeat(), output(prompt, answers=0), waiting()]


@pytest.mark.parametrize(
    ("text", "back"),
    [
        ("smörgås 日本 😀 \u2028 \x85 \x0b \0", None),
        ("---NANOCLAW_OUTPUT_END---", None),
        ("cut \ud83d off", "cut \ufffd off"),
        ("\ud83d\ude00 and \ude00", "\U0001f600 and \ufffd"),
    ],
)
async def test_any_text_survives(text: str, back: str | None) -> None:
    """A text comes back as it was, but half a character becomes U+FFFD."""
    async with running() as agent:
        await agent.send(lifeline(prompt=text) + line({"type": "close"}))
        _, frame, _ = await agent.rest()
    assert frame == output(text if back is None else back, answers=0)


async def test_each_frame_is_one_write() -> None:
    """Nothing that a child writes to the same stdout can get into a frame."""
    prelude = """
import os
real = os.write
def write(fd, data):
    if fd == 1:
        real(2, len(data).to_bytes(4, "big"))
    return real(fd, data)
os.write = write
"""
    stdin = lifeline(prompt="a\n" + "b" * 10_000 + "\nc") + line({"type": "close"})
    async with running(program(prelude=prelude)) as agent:
        assert agent.process.stderr is not None
        await agent.send(stdin)
        frames = await agent.rest()
        sizes = b"".join([data async for data in agent.process.stderr])
    assert len(frames) == 5
    assert [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 20, 4)] == [
        len(framed(frame)) for frame in frames
    ]
    assert len(sizes) == 20


async def test_short_writes_are_gone_on_with() -> None:
    """Also where the system takes but a few bytes at a time, all of them come."""
    prelude = """
import os
real = os.write
os.write = lambda fd, data: real(fd, data[:7])
"""
    async with running(program(prelude=prelude)) as agent:
        await agent.send(lifeline(prompt="a\nb"))
        assert len(await agent.next(4)) == 4


async def test_stdout_that_does_not_block() -> None:
    """A frame stays whole if a child, as Node does, makes stdout non-blocking."""
    text = "x" * 2**20
    prelude = "import os; os.set_blocking(1, False)"
    async with running(program(prelude=prelude)) as agent:
        await agent.send(lifeline(prompt=text))
        assert (await agent.next(3))[1] == output(text, answers=0)


async def test_stdout_that_is_closed(tmp_path: Path) -> None:
    """An agent that nobody listens to any more leaves, and says so in one line."""
    async with running(program(inbox=tmp_path)) as agent:
        assert agent.process.stdout is not None
        await agent.process.stdout.aclose()
        await agent.send(line(INPUT))
        await agent.hang_up()
        await agent.process.wait()
        assert agent.process.returncode == 1
        assert await agent.said() == [
            "agent_runner: stdout is closed, so nobody reads the answers"
        ]


# The process


async def test_children_do_not_get_the_protocol() -> None:
    """A child reads end of file, even one that inherits every descriptor it can."""
    script = f"""
import os, subprocess, sys
sys.path.insert(0, {str(SOURCE)!r})
import wire
pipe = os.fstat(0).st_ino
stdin = wire.take_stdin()
look = "import os, sys; print([os.read(0, 9), [os.stat(f'/proc/self/fd/{{n}}').st_ino "
look += "for n in range(256) if os.path.exists(f'/proc/self/fd/{{n}}')]])"
argv = [sys.executable, "-c", look]
print(pipe, subprocess.check_output(argv, close_fds=False).decode(), flush=True)
print(os.read(stdin, 99))
"""
    code, stdout, _ = await run(b"mine", program=[sys.executable, "-c", script])
    pipe, _, child = stdout.decode().partition(" ")
    assert code == 0
    assert child.startswith("[b'', [")
    assert pipe not in child
    assert child.endswith("b'mine'\n")


async def test_sigterm_ends_it() -> None:
    """SIGTERM needs no help to work."""
    async with running() as agent:
        await agent.send(lifeline())
        await agent.next(3)
        agent.process.terminate()
        await agent.process.wait()
        assert agent.process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_end_it_as_first_process(number: signal.Signals) -> None:
    """As process 1 of a container, which the kernel spares, it leaves all the same."""
    prelude = "import os; os.getpid = lambda: 1"
    async with running(program(prelude=prelude)) as agent:
        await agent.send(lifeline(prompt="x" * 2**20))
        await agent.next(1)  # and now it is stuck in a write
        agent.process.send_signal(number)
        await agent.process.wait()
        assert agent.process.returncode == 128 + number


@pytest.mark.parametrize(
    "argv", [[], ["--"], ["claud"], ["echo", "more"], ["--help"], ["", "echo"]]
)
async def test_wrong_arguments(argv: list[str]) -> None:
    """Arguments that mean nothing get one line and exit code 2."""
    code, stdout, stderr = await run(b"", *argv)
    assert (code, stdout) == (2, b"")
    assert stderr == (
        f"agent_runner: expected claude | echo | -- COMMAND [ARGUMENT]..., not {argv}\n"
    )


async def test_claude_that_is_not_installed() -> None:
    """Without the SDK the prompt is answered with what to do about it."""
    argv = program(prelude="sys.modules['claude_agent_sdk'] = None")
    argv[2] = argv[2].replace('["echo"]', '["claude"]')
    code, stdout, _ = await run(lifeline(), program=argv)
    (frame,) = frames_in(stdout)
    assert (code, frame["status"], frame["answers"]) == (1, "error", 0)
    assert frame["error"].startswith("Claude is not installed here (")
    assert "clawtrio agent install" in frame["error"]


async def test_own_command_takes_the_place() -> None:
    """A user's own agent has stdin, stdout, arguments and process for itself."""
    script = 'read -r line; echo "$line $1 $$"; exit 5'
    async with running(
        [sys.executable, str(SOURCE), "--", "sh", "-c", script, "sh", "a b"]
    ) as agent:
        assert agent.process.stdout is not None
        await agent.send(b"first\n")
        said = b"".join([data async for data in agent.process.stdout])
        assert said == f"first a b {agent.process.pid}\n".encode()
        assert await agent.process.wait() == 5


async def test_own_command_dies_of_sigpipe() -> None:
    """What Python ignores for itself, it does not make others ignore."""
    code, stdout, _ = await run(b"", "--", "sh", "-c", "kill -PIPE $$; echo alive")
    assert (code, stdout) == (-signal.SIGPIPE, b"")


async def test_own_command_that_is_not_there() -> None:
    """A command that is not found is exit code 127 and one line."""
    code, stdout, stderr = await run(b"", "--", "no-such\nagent")
    assert (code, stdout) == (127, b"")
    assert stderr == "agent_runner: 'no-such\\nagent': command not found\n"


@pytest.mark.parametrize("executable", [True, False])
async def test_own_command_that_does_not_start(
    tmp_path: Path, *, executable: bool
) -> None:
    """A file that is no program, or not executable, is exit code 126 and one line."""
    command = tmp_path / "agent"
    command.write_bytes(b"\0\0\0\0")
    command.chmod(stat.S_IRUSR | (stat.S_IXUSR if executable else 0))
    code, stdout, stderr = await run(b"", "--", str(command))
    problem = "Exec format error" if executable else "Permission denied"
    assert (code, stdout) == (126, b"")
    assert stderr == f"agent_runner: {str(command)!r}: {problem}\n"


async def test_own_command_of_many_arguments() -> None:
    """Arguments that look like ours are the command's, once it has begun."""
    code, stdout, _ = await run(b"", "--", "echo", "--", "echo")
    assert (code, stdout) == (0, b"-- echo\n")
