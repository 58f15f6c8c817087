"""What is kept of a run."""

from __future__ import annotations

import os
import re
import time
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import example, given, strategies as st

from clawtrio import Ending, RunResult, VolumeMount
from clawtrio._hostfs import MAX_ENTRIES, Directory
from clawtrio._runlog import Capture, LogEntry, log_name, prune_logs, render_log

from .helpers import result_of
from .strategies import chunked


@given(chunks=chunked(st.binary(max_size=60)), limit=st.integers(0, 40))
@example(chunks=[b"abc"], limit=0)
@example(chunks=[b"ab", b"c"], limit=1)
@example(chunks=[b"a"] * 41, limit=40)
def test_head_gap_and_tail_are_the_stream(chunks: list[bytes], limit: int) -> None:
    """However a stream is cut, its two ends are kept and the gap is counted."""
    stream = b"".join(chunks)
    capture = Capture(limit)
    for chunk in chunks:
        capture.add(bytearray(chunk))

    head, missing, tail = capture.kept()

    assert capture.total == len(stream)
    assert len(head) + missing + len(tail) == len(stream)
    assert stream.startswith(head)
    assert stream.endswith(tail)
    assert len(head) + len(tail) == min(limit, len(stream))
    if missing:
        assert len(head) - len(tail) in {0, 1}


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65536])
def test_memory_is_bounded_whatever_the_reads(size: int) -> None:
    """An agent that writes two bytes at a time costs no more than any other."""
    limit = 2**15
    tracemalloc.start()
    try:
        capture = Capture(limit)
        for number in range(3 * limit // size):
            # Bytes of their own, not one object that many refer to.
            capture.add(number.to_bytes(4, "big") * (size // 4) + bytes(size % 4))
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert current < 2 * limit
    assert peak < 3 * limit + 4 * size


def test_a_capture_that_only_counts_keeps_nothing() -> None:
    """A limit of 0 counts bytes, for whoever wants to know how many there were."""
    capture = Capture(0)
    capture.add(b"secret")

    assert capture.kept() == (b"", 6, b"")
    assert capture.text() == "\n[6 bytes left out]\n"


def test_text_says_where_bytes_are_missing() -> None:
    """The text of a long stream shows both ends, and how much is between them."""
    capture = Capture(8)
    capture.add(b"head-middle-tail")

    assert capture.text() == "head\n[8 bytes left out]\ntail"


def test_text_is_fit_for_a_terminal() -> None:
    """What an agent wrote cannot work a terminal, nor break a decoder."""
    capture = Capture(100)
    capture.add(b"a\n\x1b[2J\xff\xe2\x80\xae")

    assert capture.text() == "a\n\\x1b[2J\ufffd\\u202e"


def test_text_is_decoded_whole() -> None:
    """A character that two reads share, or head and tail, is one character."""
    capture = Capture(4)
    for byte in "\U0001f600".encode():
        capture.add(bytes([byte]))

    assert capture.text() == "\U0001f600"


# -- the log file ----------------------------------------------------------------------

STARTED = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC)


def captured(data: bytes, limit: int = 100) -> Capture:
    """Capture some bytes."""
    capture = Capture(limit)
    capture.add(data)
    return capture


def entry_of(**changes: Any) -> LogEntry:
    """Make an entry of a run that logs no text."""
    entry = LogEntry(
        started=STARTED,
        group_name="Family",
        is_main=False,
        container_name="clawtrio-family-1f",
        prompt_length=17,
        session_id=None,
        argv=lambda: ["docker", "run", "image"],
        mounts=[
            VolumeMount("/srv/groups/family", "/workspace/group", readonly=False),
            VolumeMount("/srv/src", "/app/src", readonly=True),
        ],
        input_text=None,
        stdout=None,
        stderr=captured(b"it broke\n"),
    )
    return attrs.evolve(entry, **changes)


FAILED = result_of(status="error", ending=Ending.FAILED, exit_code=1, outputs=0)


def sections(entry: LogEntry, result: RunResult) -> dict[str, str]:
    """Read a log's sections back."""
    text = render_log(entry, result).decode()
    titles = re.findall("^=== (.*) ===$", text, re.MULTILINE)
    bodies = re.split("^=== .* ===\n", text, flags=re.MULTILINE)
    assert bodies[0] == ""
    return dict(zip(titles, (body.rstrip("\n") for body in bodies[1:]), strict=True))


def test_the_log_of_a_run_that_went_well() -> None:
    """Facts and mounts are there; no text of chat, agent or command line is."""
    found = sections(entry_of(), result_of())

    assert list(found) == ["Container Run Log", "Input Summary", "Mounts"]
    assert found["Container Run Log"].splitlines() == [
        "Timestamp: 2026-02-03T04:05:06.000789+00:00",
        "Group: Family",
        "Container: clawtrio-family-1f",
        "IsMain: false",
        "Duration: 1234ms",
        "Exit Code: 0",
        "Ending: exited",
        "Status: success",
        "Had Streaming Output: true",
        "Outputs: 1",
        "Dropped Frames: 0",
        "Unanswered: 0",
        "Stdout Truncated: false",
        "Stderr Truncated: false",
    ]
    assert found["Input Summary"] == "Prompt length: 17 chars\nSession ID: new"
    assert found["Mounts"] == "/workspace/group\n/app/src (ro)"


def test_the_log_of_a_run_that_failed() -> None:
    """An error adds what it takes to find out why: argv, sources, stderr."""
    found = sections(entry_of(session_id="s-1", is_main=True), FAILED)

    assert list(found) == [
        "Container Run Log",
        "Input Summary",
        "Container Args",
        "Mounts",
        "Stderr",
    ]
    assert "Session ID: s-1" in found["Input Summary"]
    assert "IsMain: true" in found["Container Run Log"]
    assert found["Container Args"] == "docker run image"
    assert found["Mounts"] == (
        "/srv/groups/family -> /workspace/group\n/srv/src -> /app/src (ro)"
    )
    assert found["Stderr"] == "it broke"


def test_text_is_logged_on_demand_alone() -> None:
    """With log_text there are input and stdout, of any run."""
    entry = entry_of(input_text='{"prompt":"Hi\x1b"}', stdout=captured(b"hello"))
    found = sections(entry, result_of())

    assert found["Input"] == '{"prompt":"Hi\\x1b"}'
    assert found["Stdout"] == "hello"
    assert "Input Summary" not in found
    assert "Stderr" not in found


def test_streams_that_were_cut_say_so() -> None:
    """Truncated streams are marked as such."""
    entry = entry_of(
        stdout=captured(b"0123456789", 2), stderr=captured(b"abcdefghij", 4)
    )
    result = attrs.evolve(FAILED, stdout_truncated=True, stderr_truncated=True)
    found = sections(entry, result)

    assert found["Stdout (TRUNCATED)"] == "0\n[8 bytes left out]\n9"
    assert found["Stderr (TRUNCATED)"] == "ab\n[6 bytes left out]\nij"


@pytest.mark.parametrize("ending", Ending)
def test_a_log_of_a_timeout_is_titled_so(ending: Ending) -> None:
    """NanoClaw's title shows that our clock ended a run."""
    found = sections(entry_of(), result_of(ending=ending, exit_code=None))

    by_clock = ending in {Ending.IDLE, Ending.TIMED_OUT}
    assert ("Container Run Log (TIMEOUT)" in found) is by_clock
    assert "Exit Code: none" in "\n".join(found.values())


@pytest.mark.parametrize("code", [1, 137])
def test_a_code_is_an_error_whatever_the_status(code: int) -> None:
    """A run that was stopped after its answer shows what it complained of."""
    result = result_of(ending=Ending.STOPPED, exit_code=code)

    assert "Stderr" in sections(entry_of(), result)


def test_nobody_forges_a_section() -> None:
    """A group's name or an argument with newlines stays on its line."""
    evil = "x\n=== Stderr ===\nEverything is fine"
    entry = entry_of(
        group_name=evil,
        argv=lambda: ["run", evil],
        mounts=[VolumeMount(f"/{evil}", "/a", readonly=True)],
        stderr=captured(b""),
    )
    text = render_log(entry, FAILED).decode()

    assert len(re.findall("^=== ", text, re.MULTILINE)) == 5
    assert "Everything" not in sections(entry, FAILED)["Stderr"]


def test_a_log_is_utf_8_whatever_is_in_it() -> None:
    """Paths of any bytes, and halves of emoji, do not stop a log."""
    entry = entry_of(
        argv=lambda: ["\udcff\ud83d"], input_text="\ud83d", group_name="\ud83d"
    )

    assert render_log(entry, FAILED).decode()


def test_names_sort_by_time() -> None:
    """The last log of a group is the last in order of name, in whatever zone."""
    zone = timezone(timedelta(hours=-5))
    moments = [
        STARTED,
        STARTED + timedelta(microseconds=1),
        (STARTED + timedelta(seconds=1)).astimezone(zone),
        STARTED + timedelta(hours=1),
    ]
    names = [log_name(moment, "1f") for moment in moments]

    assert names == sorted(names)
    assert names[0] == "container-2026-02-03T04-05-06.000789Z-1f.log"


def test_old_logs_are_removed(tmp_path: Path) -> None:
    """After its retention a log goes, and nothing else does."""
    now = time.time()
    for name, age in {"old": 101, "older": 10**6, "young": 50}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now, now - age))
    (tmp_path / "directory").mkdir()
    os.utime(tmp_path / "directory", (0, 0))
    (tmp_path / "link").symlink_to("young")
    os.utime(tmp_path / "link", (0, 0), follow_symlinks=False)

    with Directory.at(str(tmp_path)) as directory:
        prune_logs(directory, 100)
        assert directory.names() == ["directory", "link", "young"]
        prune_logs(directory, float("inf"))
        assert directory.names() == ["directory", "link", "young"]


def test_however_many_logs_there_are_the_old_ones_go(tmp_path: Path) -> None:
    """A busy group's logs are pruned, though they are more than a mailbox may hold."""
    for number in range(2 * MAX_ENTRIES):
        path = tmp_path / f"{number}"
        path.touch()
        if number % 2:
            os.utime(path, (0, 0))

    with Directory.at(str(tmp_path)) as directory:
        prune_logs(directory, 1000)
        assert len(directory.names(limit=None)) == MAX_ENTRIES
