"""How a run's words reach the agent."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import (
    MockClock,
    lockstep_stream_one_way_pair,
    memory_stream_one_way_pair,
    wait_all_tasks_blocked,
)

from clawtrio import FollowUpRefusedError, UnsafePathError
from clawtrio._hostfs import Directory
from clawtrio._run import RunLogger
from clawtrio._stdin import QUEUE_LIMIT, FileWords, LifelineWords, write_words

FIRST = b'{"prompt":"Hi"}'


def lines_of(data: bytes | bytearray) -> list[dict[str, Any]]:
    """Read lines back; each is whole."""
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.decode().split("\n")[:-1]]


# -- lifeline --------------------------------------------------------------------------


async def test_the_input_comes_first_then_what_was_sent(
    autojump_clock: MockClock,
) -> None:
    """Lines come in order, whether sent before the writer runs or later."""
    words = LifelineWords(FIRST)
    stdin, agent = memory_stream_one_way_pair()
    words.send(1, "one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(words.write, stdin)
        await wait_all_tasks_blocked()
        words.send(2, "two\nlines \u2028 \U0001f600")
        words.finish()
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert lines_of(await agent.receive_some()) == [
        {"prompt": "Hi"},
        {"type": "message", "id": 1, "text": "one"},
        {"type": "message", "id": 2, "text": "two\nlines \u2028 \U0001f600"},
        {"type": "close"},
    ]


async def test_stdin_stays_open(autojump_clock: MockClock) -> None:
    """The end of stdin means that the host is gone, so the writer never ends it."""
    words = LifelineWords(FIRST)
    stdin, agent = memory_stream_one_way_pair()
    with trio.move_on_after(3600) as scope:
        words.finish()
        await words.write(stdin)

    assert scope.cancelled_caught
    await agent.receive_some()
    with trio.move_on_after(1) as scope:
        await agent.receive_some()
    assert scope.cancelled_caught


async def test_nothing_waits_for_an_agent_that_does_not_read(
    autojump_clock: MockClock,
) -> None:
    """Sending is possible while the writer is stuck in the middle of a line."""
    words = LifelineWords(FIRST)
    stdin, agent = lockstep_stream_one_way_pair()
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(words.write, stdin)
        await wait_all_tasks_blocked()
        for number in range(1, 100):
            words.send(number, "x")
        assert words.unread() == frozenset(range(1, 100))
        while len(received.splitlines()) < 100 or not received.endswith(b"\n"):
            received += await agent.receive_some(1)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert [line.get("id", 0) for line in lines_of(received)] == list(range(100))
    assert words.unread() == frozenset()


async def test_what_an_agent_cannot_have_read(autojump_clock: MockClock) -> None:
    """A line is unread until it is written, the prompt only until it is begun."""
    words = LifelineWords(FIRST)
    stdin, agent = lockstep_stream_one_way_pair()
    words.send(1, "one")
    assert words.unread() == {0, 1}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(words.write, stdin)
        await wait_all_tasks_blocked()
        assert words.unread() == {1}
        await agent.receive_some(len(FIRST) + 1)
        await wait_all_tasks_blocked()
        await agent.receive_some(5)
        assert words.unread() == {1}
        await agent.receive_some()
        await wait_all_tasks_blocked()
        assert words.unread() == frozenset()
        words.finish()
        assert words.unread() == frozenset()
        nursery.cancel_scope.cancel()


def size_of(number: int, text: str) -> int:
    """Return the bytes of a follow-up's line."""
    line = {"type": "message", "id": number, "text": text}
    return len(json.dumps(line, separators=(",", ":")))


async def test_the_queue_has_a_limit(autojump_clock: MockClock) -> None:
    """Up to 1 MiB may wait; what is refused leaves no trace, and room comes back."""
    words = LifelineWords(FIRST * 200_000)
    stdin, agent = lockstep_stream_one_way_pair()
    full = "x" * (QUEUE_LIMIT - size_of(1, ""))
    words.send(1, full)
    with pytest.raises(FollowUpRefusedError, match=f"{QUEUE_LIMIT} do"):
        words.send(2, "")
    assert words.unread() == {0, 1}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(words.write, stdin)
        while words.unread():
            await agent.receive_some()
            await wait_all_tasks_blocked()
        words.send(2, full)
        nursery.cancel_scope.cancel()


def test_a_follow_up_over_the_limit_is_refused() -> None:
    """One that can never fit is refused at once, and others are not."""
    words = LifelineWords(FIRST)
    with pytest.raises(FollowUpRefusedError, match="does not fit"):
        words.send(1, "x" * QUEUE_LIMIT)
    words.send(1, "x")

    assert words.unread() == {0, 1}


# -- eof -------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    """Hold ipc/input."""
    (tmp_path / "input").mkdir()
    with Directory.at(str(tmp_path / "input")) as directory:
        yield directory


async def test_stdin_is_the_input_and_its_end(
    autojump_clock: MockClock, directory: Directory
) -> None:
    """NanoClaw's agent reads its stdin to the end; the writer then stays quiet."""
    words = FileWords(FIRST, directory, "1f")
    stdin, agent = memory_stream_one_way_pair()
    assert words.unread() == {0}
    with trio.move_on_after(3600) as scope:
        await words.write(stdin)

    assert scope.cancelled_caught
    assert await agent.receive_some() == FIRST
    assert await agent.receive_some() == b""
    assert words.unread() == frozenset()


async def test_the_prompt_is_read_once_its_writing_has_begun(
    autojump_clock: MockClock, directory: Directory
) -> None:
    """An agent that answers before it has read all of the prompt answers that."""
    words = FileWords(FIRST, directory, "1f")
    stdin, _agent = lockstep_stream_one_way_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(words.write, stdin)
        await wait_all_tasks_blocked()
        assert words.unread() == frozenset()
        nursery.cancel_scope.cancel()


def test_an_agent_that_is_faster_refuses_itself_a_follow_up(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who puts something else in a file's place each time gets no message."""

    def refuse(*_: object, **__: object) -> None:
        raise UnsafePathError("1.json", "must be a file, and does not stay one")

    monkeypatch.setattr(Directory, "write", refuse)
    words = FileWords(FIRST, directory, "1f")

    with pytest.raises(FollowUpRefusedError, match="does not stay one"):
        words.send(1, "more")


def test_follow_ups_are_files_in_order(directory: Directory) -> None:
    """Agents take messages in order of their names; the close is a file, too."""
    words = FileWords(FIRST, directory, "1f")
    for number in (1, 2, 10, 100):
        words.send(number, f"text {number}")
    messages = [json.loads(directory.read(name) or b"") for name in directory.names()]
    words.finish()

    assert messages == [
        {"type": "message", "id": number, "text": f"text {number}"}
        for number in (1, 2, 10, 100)
    ]
    assert all(name.endswith(".json") for name in directory.names()[:-1])
    assert directory.names()[-1] == "_close"
    assert directory.read("_close") == b""


def test_a_file_that_is_gone_was_read(directory: Directory) -> None:
    """An agent removes what it has read, in whatever order."""
    words = FileWords(FIRST, directory, "1f")
    for number in (1, 2, 3):
        words.send(number, "x")
    directory.remove(directory.names()[1])

    assert words.unread() == {0, 1, 3}


def test_an_agent_cannot_hide_a_follow_up_among_files_of_its_own(
    directory: Directory,
) -> None:
    """However many files there are, ours is seen to be there still."""
    for number in range(1500):
        directory.write(f"{number}", b"")
    words = FileWords(FIRST, directory, "1f")
    words.send(1, "x")

    assert words.unread() == {0, 1}


def test_files_have_a_limit_too(directory: Directory) -> None:
    """What waits as files counts like what waits in a queue, until it is read."""
    words = FileWords(FIRST, directory, "1f")
    half = "x" * (QUEUE_LIMIT // 2)
    words.send(1, half)
    with pytest.raises(FollowUpRefusedError):
        words.send(2, half)
    assert len(directory.names()) == 1
    directory.remove(directory.names()[0])
    words.send(2, half)

    assert words.unread() == {0, 2}


def test_what_an_agent_does_to_its_mailbox_refuses_follow_ups(
    directory: Directory,
) -> None:
    """Where nothing can be written, a follow-up is refused, and nothing else breaks."""
    words = FileWords(FIRST, directory, "1f")
    words.send(1, "x")
    mailbox = Path(directory.path)
    (mailbox / directory.names()[0]).unlink()
    (mailbox / "00000002-1f.json").mkdir()
    with pytest.raises(FollowUpRefusedError):
        words.send(2, "x")
    (mailbox / "00000002-1f.json").rmdir()
    mailbox.rmdir()
    with pytest.raises(FollowUpRefusedError):
        words.send(2, "x")

    assert words.unread() == {0}
    with pytest.raises(OSError, match="No such file"):
        words.finish()


def test_a_directory_in_the_place_of_a_file_is_moved_away(
    directory: Directory, tmp_path: Path
) -> None:
    """An agent cannot keep us from sending or finishing by taking our names."""
    (tmp_path / "trash").mkdir()
    for name in ("_close", "00000001-1f.json"):
        (tmp_path / "input" / name / "inside").mkdir(parents=True)
    with Directory.at(str(tmp_path / "trash")) as trash:
        words = FileWords(FIRST, directory, "1f", trash=trash)
        words.send(1, "x")
        words.finish()

        assert len(trash.names()) == 2
    assert json.loads(directory.read("00000001-1f.json") or b"")["text"] == "x"
    assert directory.read("_close") == b""
    assert words.unread() == {0, 1}


# -- the writer ------------------------------------------------------------------------

LOG = RunLogger(logging.getLogger("clawtrio.test"), {"group": "family", "run": "1f"})


@pytest.mark.parametrize("theirs", [True, False])
async def test_a_broken_stdin_is_no_end_of_a_run(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, *, theirs: bool
) -> None:
    """Whoever closes stdin, the writer just ends, and the log says who it was."""
    caplog.set_level(logging.DEBUG)
    stdin, agent = memory_stream_one_way_pair()
    if theirs:
        agent.close()
    else:
        stdin.close()

    with trio.fail_after(1):
        await write_words(LifelineWords(FIRST), stdin, LOG)

    (record,) = caplog.records
    assert record.levelno == (logging.INFO if theirs else logging.DEBUG)
    assert record.getMessage().startswith("[family 1f] ")
    assert record.levelno < logging.WARNING
