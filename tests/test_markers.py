"""The parser, against a simple one and rule by rule."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

import attrs
import pytest
from hypothesis import example, given, strategies as st

from clawtrio._markers import END, START, MarkerParser
from clawtrio._models import AgentOutput, DroppedFrame

from . import oracle
from .strategies import chunked, limits, marker_streams, texts

Events: TypeAlias = list[AgentOutput | DroppedFrame]

HI = b'{"status":"success","result":"hi"}'
HI_OUTPUT = AgentOutput("success", "hi")
HO = b'{"status":"success","result":"ho"}'
HO_OUTPUT = AgentOutput("success", "ho")
#: More than any part of a marker that has to wait, and its line's end.
SLACK = len(START) + 2


def parse(
    chunks: Iterable[bytes], limit: int = 2**20
) -> tuple[Events, AgentOutput | None]:
    """Tell all that a stream leads to."""
    parser = MarkerParser(max_frame_bytes=limit)
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    events += parser.close()
    return events, parser.last_line()


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def events_of(data: bytes, limit: int = 2**20) -> Events:
    """Parse *data* whole and byte by byte, which must come to the same."""
    whole, last = parse([data], limit)

    assert parse(bytewise(data), limit) == (whole, last)
    assert oracle.events(data, limit) == whole
    return whole


def framed(data: bytes) -> bytes:
    return START + b"\n" + data + b"\n" + END + b"\n"


@given(chunks=chunked(marker_streams | st.binary()), limit=limits)
def test_nothing_but_our_events_comes_out(chunks: list[bytes], limit: int) -> None:
    """Whatever an agent writes is outputs and dropped frames, never an exception."""
    events, last = parse(chunks, limit)

    assert all(isinstance(event, AgentOutput | DroppedFrame) for event in events)
    assert isinstance(last, AgentOutput | None)


@given(chunks=chunked(marker_streams), limit=limits)
@example(chunks=[START + b"\n" + HI, b"\n" + END], limit=len(HI) + 2)
@example(chunks=[START + b"\n" + HI + b"\n" + END[:-1], END[-1:]], limit=len(HI) + 1)
def test_chunk_boundaries_do_not_matter(chunks: list[bytes], limit: int) -> None:
    """However a stream is cut, it means the same."""
    data = b"".join(chunks)

    assert parse(chunks, limit) == parse([data], limit)
    assert parse(chunks, limit) == parse(bytewise(data), limit)


@given(chunks=chunked(marker_streams), limit=limits)
@example(chunks=[START + b"\n" + HI + b"\n", END], limit=len(HI) + 2)
@example(chunks=[START + b"\n" + HI, b"\n" + END], limit=len(HI) + 2)
@example(chunks=[START + b"\n" + HI, END, b"\n"], limit=len(HI) + 40)
@example(chunks=[START, b"x" * 40, b"\n", START + HI + b"\n", END], limit=100)
@example(chunks=[START, b"x" * 40, b"y"], limit=40)
def test_what_is_sure_is_told_at_once(chunks: list[bytes], limit: int) -> None:
    """Nothing waits for a later read that the bytes so far have decided."""
    for reads in (chunks, bytewise(b"".join(chunks))):
        parser = MarkerParser(max_frame_bytes=limit)
        events: Events = []
        so_far = b""
        for read in reads:
            events += parser.feed(read)
            so_far += read
            assert events == MarkerParser(max_frame_bytes=limit).feed(so_far)


MORE = b" and more, on the same line, than a marker is long"


@pytest.mark.parametrize(
    "data",
    [
        START + b"\n" + END + MORE + b"\n" + framed(HI),
        START + b"\n{\n" + END + MORE + b"\n" + framed(HI),
        START + b"\n\n" + HI + b"\n" + END + MORE + b"\n",
        START + b"\nx\n" + HI + END + b"\r\n" + MORE,
        START + b"\nno\t" + END + b"\n" + HO + b"\n" + END,
        START + b"\n" + HI + b"\t" + END + b"!\n" + HO + b"\n" + END,
        framed(HI) + framed(HO)[:-1] + b"-" + framed(HI),
        b"x\n" + HI + b" \r\n\n",
        b" \n " + HI,
        HI + b"\n--" + START[:-1],
    ],
)
@pytest.mark.parametrize("limit", [len(HI) + 3, 2**20])
def test_a_stream_may_be_cut_anywhere(data: bytes, limit: int) -> None:
    """In two places: what comes of it is the same, and each event as soon as it can."""
    told = []
    for size in range(len(data) + 1):
        told.append(MarkerParser(max_frame_bytes=limit).feed(data[:size]))
        events, last = parse([data[:size]], limit)
        assert events == oracle.events(data[:size], limit)
        assert last == oracle.last_line(data[:size], limit)
    whole = parse([data], limit)

    for second in range(len(data) + 1):
        for first in range(second + 1):
            parser = MarkerParser(max_frame_bytes=limit)
            events = parser.feed(data[:first])
            events += parser.feed(data[first:second])
            assert events == told[second]
            events += parser.feed(data[second:])
            assert events == told[-1]
            assert ([*events, *parser.close()], parser.last_line()) == whole


@pytest.mark.parametrize("more", [0, 1])
def test_the_usual_limit_is_16_mib(more: int) -> None:
    """What is larger by a byte is too large."""
    frame = START + b"\n" + HI.ljust(2**24 - 2 + more) + b"\n" + END
    parser = MarkerParser()

    events = [*parser.feed(frame[:1000]), *parser.feed(frame[1000:])]

    assert events == [DroppedFrame("too_large", 2**24 + 1) if more else HI_OUTPUT]


@given(data=marker_streams, limit=limits)
def test_the_contract_in_its_simplest_form_agrees(data: bytes, limit: int) -> None:
    """A stream means what the contract says that it means."""
    events, last = parse([data], limit)

    assert events == oracle.events(data, limit)
    assert last == oracle.last_line(data, limit)


@given(said=st.lists(texts, max_size=5))
@example(
    said=[START.decode(), END.decode(), f"\n{END.decode()}\n", framed(HI).decode()]
)
def test_agents_may_talk_about_the_markers(said: list[str]) -> None:
    """An output that quotes markers, even whole frames, arrives as it is."""
    said = [text.encode(errors="replace").decode() for text in said]
    frames = [
        framed(json.dumps({"status": "success", "result": text}).encode())
        for text in said
    ]

    assert events_of(b"".join(frames)) == [AgentOutput("success", t) for t in said]


@given(
    frames=st.lists(
        st.sampled_from(
            [
                framed(HI),
                framed(b'{"status":"success"'),
                framed(b'"result":"x"}'),
                framed(HI + HO),
                framed(b"{}"),
                framed(b""),
                framed(HI + b"\n" + HO),
                framed(b'{"status":"success","result":"\\ud83d"}'),
            ]
        ),
        max_size=6,
    ),
    limit=limits,
)
def test_frames_without_noise_mean_the_same_together(
    frames: list[bytes], limit: int
) -> None:
    """Neighbours in a read do not mix, however broken they are."""
    events_of(b"".join(frames), limit)


def test_frames_among_noise() -> None:
    """Noise before, between and after frames does not matter."""
    data = b"npm WARN\n" + framed(HI) + b"\xff\0---\n" + framed(HO) + b"bye"

    assert events_of(data) == [HI_OUTPUT, HO_OUTPUT]


def test_start_may_stand_anywhere_outside_a_frame() -> None:
    """Noise may lack its newline."""
    assert events_of(b"progress 99%" + framed(HI)) == [HI_OUTPUT]
    assert events_of(b"-" + framed(HI)) == [HI_OUTPUT]


def test_the_rest_of_starts_line_is_the_first_of_the_body() -> None:
    """A frame may be written in one line."""
    assert events_of(START + HI + END + b"\n") == [HI_OUTPUT]
    assert events_of(START + HI + b"\n" + END) == [HI_OUTPUT]


def test_a_marker_directly_after_start_is_text() -> None:
    """START's own line does not start after START."""
    data = START + END + b"\n" + HI + b"\n" + END

    assert events_of(data) == [HI_OUTPUT]
    assert events_of(START + START + HI + b"\n" + END) == [
        DroppedFrame("unacceptable", len(START + HI) + 1)
    ]


def test_an_output_is_there_with_ends_last_byte() -> None:
    """Nothing is waited for after END at the start of a line."""
    parser = MarkerParser()

    assert parser.feed(START + b"\n" + HI + b"\n" + END[:-1]) == []
    assert parser.feed(END[-1:]) == [HI_OUTPUT]


def test_what_follows_end_is_outside() -> None:
    """A frame may begin on the line on which another ended."""
    data = START + b"\n" + HI + b"\n" + END + START + b"\n" + HO + b"\n" + END

    assert events_of(data) == [HI_OUTPUT, HO_OUTPUT]


def test_start_at_the_start_of_a_line_ends_a_frame_and_opens_another() -> None:
    """An agent that was cut off loses nothing that is whole."""
    data = START + b"\n" + HI + b"\n" + START + b"\n" + HO + b"\n" + END

    assert events_of(data) == [HI_OUTPUT, HO_OUTPUT]
    assert events_of((START + b"\n") * 2) == [DroppedFrame("unacceptable", 1)] * 2


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_an_acceptable_line_with_end_ends_a_frame(line_end: bytes) -> None:
    """END need not have its own line behind an output."""
    data = START + b"\nnoise\n" + HI + END + line_end + b"noise\n"

    assert MarkerParser().feed(data) == [HI_OUTPUT]
    assert events_of(data + framed(HO)) == [HI_OUTPUT, HO_OUTPUT]


@pytest.mark.parametrize("after", [b"x\n", b" \n", b"\r\r\n", b"\rx\n", END + b"\n"])
def test_an_acceptable_line_with_more_than_end_does_not(after: bytes) -> None:
    """END behind an output counts only at the end of the line."""
    data = START + b"\n" + HI + END + after + HO + b"\n" + END

    assert events_of(data) == [HO_OUTPUT]


def test_an_unacceptable_line_with_end_does_not_end_a_frame() -> None:
    """A child's noise between an output and END does not cost the output."""
    data = START + b"\nnoise" + END + b"\n" + HI + b"\n" + END

    assert events_of(data) == [HI_OUTPUT]


def test_the_end_of_file_ends_a_frame() -> None:
    """An output that is whole is not lost for its missing END."""
    assert events_of(START + b"\n" + HI) == [HI_OUTPUT]
    assert events_of(START + b"\n" + HI + END) == [HI_OUTPUT]
    assert events_of(START + b"\n" + HI + END + b"\r") == [HI_OUTPUT]
    assert events_of(START + b"\n" + HI + b"\n" + END[:-1]) == [HI_OUTPUT]
    assert events_of(START) == [DroppedFrame("unacceptable", 0)]


def test_the_end_of_file_is_the_end_of_a_line() -> None:
    """The END behind the last output is not part of the body."""
    limit = len(HI)

    assert events_of(START + HI + END, limit) == [HI_OUTPUT]
    assert events_of(START + HI + END + b"\r", limit) == [HI_OUTPUT]
    assert events_of(START + HI + END + b"x", limit) == [
        DroppedFrame("too_large", limit + 1)
    ]
    assert events_of(START + HI + b"\n" + END[:-1], limit + 1) == [
        DroppedFrame("too_large", limit + 2)
    ]
    assert events_of(START + b"x" + END, limit=99) == [
        DroppedFrame("unacceptable", 1 + len(END))
    ]


def test_an_output_over_several_lines() -> None:
    """The whole body counts first: a pretty-printed output is one."""
    pretty = json.dumps({"status": "success", "result": "hi"}, indent=1).encode()

    assert events_of(framed(pretty)) == [HI_OUTPUT]
    assert events_of(framed(pretty.replace(b"\n", b"\r\n"))) == [HI_OUTPUT]


def test_the_last_acceptable_line_counts() -> None:
    """Else it is the last line that is an output, whatever stands around it."""
    data = framed(b"noise\n" + HI + b"\n{}\n" + HO + END + b" x\n" + b"noise")

    assert events_of(data) == [HI_OUTPUT]
    assert events_of(framed(HI + b"\r\n" + HO + b"\r\nnoise")) == [HO_OUTPUT]
    assert events_of(framed(b'{"status":"succ\\u0065ss"}\nerror "error"')) == [
        AgentOutput("success")
    ]


def test_a_frame_without_an_output_is_dropped() -> None:
    """What is lost is counted, with the size of the body."""
    assert events_of(framed(b"oops") + framed(HI)) == [
        DroppedFrame("unacceptable", 6),
        HI_OUTPUT,
    ]


@pytest.mark.parametrize("end", [b"\n" + END, b"\n" + START, END + b"\r\n", b""])
def test_a_frame_may_be_as_large_as_the_limit(end: bytes) -> None:
    """The limit is on the body alone, and a marker beyond it still counts."""
    body = HI + (b"\n" if end.startswith(b"\n") else b"")
    data = START + HI + end

    assert events_of(data, len(body))[0] == HI_OUTPUT
    assert events_of(data, len(body) - 1)[0] == DroppedFrame("too_large", len(body))


@pytest.mark.parametrize("end", [END, START])
def test_a_frame_too_large_is_dropped_once_and_skipped(end: bytes) -> None:
    """It ends at the next marker at the start of a line, and nowhere else."""
    data = (
        START + b"x" * 99 + b"\n" + HI + END + b"\nx" + END + b"\nx" + START + b"\n"
    ) + end

    assert events_of(data + framed(HI), 70) == [
        DroppedFrame("too_large", 71),
        HI_OUTPUT,
    ]


def test_a_frame_too_large_is_dropped_at_once() -> None:
    """As soon as no marker can have begun within the limit, it is known."""
    parser = MarkerParser(max_frame_bytes=10)

    assert parser.feed(START + b"x" * 10) == []
    assert parser.feed(b"x") == [DroppedFrame("too_large", 11)]
    assert parser.feed(b"x" * 99) == []
    assert parser.close() == []


def test_what_may_be_a_marker_is_held_beyond_the_limit() -> None:
    """A marker that turns out to be none makes the frame too large, no sooner."""
    parser = MarkerParser(max_frame_bytes=10)

    assert parser.feed(START + b"x" * 9 + b"\n" + END[:-1]) == []
    assert parser.feed(b"x") == [DroppedFrame("too_large", 11)]


def test_no_bytes_do_nothing() -> None:
    """Empty data is not the end of the stream."""
    parser = MarkerParser()

    assert parser.feed(b"") == []
    assert parser.feed(framed(HI)) == [HI_OUTPUT]


def test_nothing_can_be_fed_after_the_end() -> None:
    """Feeding a closed parser is a mistake; closing it again is none."""
    parser = MarkerParser()
    parser.feed(START)

    assert len(parser.close()) == 1
    assert parser.close() == []
    for data in (b"x", b""):
        with pytest.raises(RuntimeError, match="closed"):
            parser.feed(data)


def test_a_limit_below_1_makes_no_sense() -> None:
    """There is no frame of no bytes."""
    with pytest.raises(ValueError, match="max_frame_bytes"):
        MarkerParser(max_frame_bytes=0)


def test_any_bytes_like_can_be_fed() -> None:
    """What is fed may be reused by its owner, whatever it is."""
    parser = MarkerParser()
    owned = bytearray(START + b"\n" + HI)

    parser.feed(memoryview(owned))
    owned[:] = b"x" * len(owned)

    assert parser.feed(bytearray(b"\n" + END)) == [HI_OUTPUT]


@pytest.mark.parametrize(
    ("stream", "output"),
    [
        (b"", None),
        (HI, HI_OUTPUT),
        (HO + b"\n" + HI + b"\r\n\n \t\r\n", HI_OUTPUT),
        (b" " * 5 + HI, HI_OUTPUT),
        (b" " * 5 + HI + b"\r\n", HI_OUTPUT),
        (HI + b"\nbye\n", None),
        (HI + b"\n \n x", None),
        (b"\n" * 9, None),
        (b" " * 30 + HI + b"\r", None),
        (HI + b"." * 40, None),
        (framed(HI), None),
        (START, None),
        (END + b"\n" + HI, HI_OUTPUT),
    ],
)
def test_the_last_line_of_an_agent_without_markers(
    stream: bytes, output: AgentOutput | None
) -> None:
    """Where START was never seen, the last line that is not blank may be an output."""
    limit = len(HI) + 5
    assert oracle.last_line(stream, limit) == output

    for chunks in ([stream], bytewise(stream)):
        assert parse(chunks, limit)[1] == output


@pytest.mark.parametrize("before", [b"", b"x\n"])
@pytest.mark.parametrize("after", [b"", b"\r", b"\r\n", b"\n \n"])
def test_the_last_line_is_as_large_as_the_limit(before: bytes, after: bytes) -> None:
    """Blanks count, however they come; a carriage return at its end does not."""
    limit = len(HI) + 3
    for lead in range(5):
        for trail in range(5):
            stream = before + b" " * lead + HI + b" " * trail + after
            output = HI_OUTPUT if lead + trail <= 3 else None
            assert oracle.last_line(stream, limit) == output
            for cut in range(len(stream)):
                assert parse([stream[:cut], stream[cut:]], limit)[1] == output


def test_blanks_of_an_earlier_line_do_not_count() -> None:
    """They came in a read of their own, as its end did."""
    assert parse([b"  ", b"x\n", HI], len(HI))[1] == HI_OUTPUT


@pytest.mark.parametrize(
    "noise",
    [
        b"text and more text\n",
        b"text without a newline",
        b"-",
        b"\n",
        b" ",
        HI + b"\n",
        b"{" + b" " * 50,
        START,
        END,
        b"NANOCLAW_OUTPUT_",
        b"x" + END + b"\n",
    ],
)
@pytest.mark.parametrize("before", [b"", START, b"\n" + START + b"\n", START + b"\n{"])
def test_what_is_kept_is_bounded(before: bytes, noise: bytes) -> None:
    """Endless noise, or a frame without end, costs no more than the limit."""
    limit = 20_000
    parser = MarkerParser(max_frame_bytes=limit)
    parser.feed(before)
    chunk = (noise * 4000)[:4000]
    most = 0

    tracemalloc.start()
    try:
        for _ in range(50):
            parser.feed(chunk)
            most = max(most, parser.buffered)
        # A bytearray has an eighth to spare.
        assert tracemalloc.get_traced_memory()[0] < limit * 1.2 + 2000
    finally:
        tracemalloc.stop()

    assert most <= limit + SLACK


def test_nothing_is_kept_outside_a_frame() -> None:
    """Outside a frame, only what may be the beginning of START stays."""
    parser = MarkerParser()
    parser.feed(framed(HI) + b"noise")
    assert parser.buffered == 0

    parser.feed(b"-----" + START[:-1])
    assert parser.buffered == len(START) - 1


def test_what_is_kept_counts_the_last_line() -> None:
    """It is kept until START is seen, beside what may become START."""
    parser = MarkerParser()
    parser.feed(b"a line\nabc" + START[:5])

    assert parser.buffered == len(b"abc") + 2 * len(START[:5])


@attrs.define
class Work:
    """What a parser did: calls of any function, and bytes that were decoded."""

    calls: int = 0
    decoded: int = 0


@contextmanager
def measured() -> Iterator[Work]:
    work = Work()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_call"):
            work.calls += 1
        name = frame.f_code.co_name
        if event == "call" and name == "decode_output":
            work.decoded += len(frame.f_locals["data"])

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield work
    finally:
        sys.setprofile(previous)


def work_for(data: bytes, chunk: int) -> Work:
    with measured() as work:
        parse([data[i : i + chunk] for i in range(0, len(data), chunk)])
    return work


@pytest.mark.parametrize(
    "noise",
    [
        b"-",
        b"\n",
        b"}\n",
        START + b"\n",
        b"\n" + START,
        b"\n" + END,
        b"x" + END,
        b"NANOCLAW_OUTPUT_",
        b"---NANOCLAW_OUTPUT_",
        b'{"status":1}' + END + b"\n",
        b'{"status":"error",}' + END + b"\n",
        b'"error"\n',
        b"[" * 16,
        framed(HI),
        framed(b"{}"),
        framed(HI) + b"{",
        HI + b"\n",
    ],
)
@pytest.mark.parametrize("before", [b"", START, START + b"\n", START + b'{"x":'])
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_work_is_linear(before: bytes, noise: bytes, chunk: int) -> None:
    """Twice the bytes are at most twice the work, and none is decoded often."""
    size = 4096
    once = work_for(before + noise * (size // len(noise)), chunk)
    data = before + noise * (4 * size // len(noise))
    much = work_for(data, chunk)

    assert much.calls <= 5 * once.calls + 200
    assert much.decoded <= 3 * len(data)


def test_a_large_output_is_searched_and_copied_once() -> None:
    """In many little reads, with newlines or without, no byte is dealt with again."""
    parser = MarkerParser()
    parser.feed(START + b"x" * 500)
    body = parser._buffer

    for fed in range(500, 100_000, 500):
        parser.feed(b"x" * 499)
        parser.feed(b"\n")
        assert parser._seek > fed - len(START)
        # Nor is it copied.
        assert parser._buffer is body


NODE = """
const { spawn } = require('node:child_process');
const noise = `let n = 0; setInterval(() => {
  try {
    for (let i = 0; i < 50; i++)
      require('node:fs').writeSync(1, 'noise ' + n++ + ' ---NANOCLAW_OUTPUT\\\\n');
  } catch (full) { if (full.code !== 'EAGAIN') throw full; }
  process.send('here I am');
}, 1)`;
const child = spawn(process.execPath, ['-e', noise],
                    { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
child.once('message', () => {
  let frame = 0;
  const timer = setInterval(() => {
    console.log('---NANOCLAW_OUTPUT_START---');
    console.log(JSON.stringify({ status: 'success', result: 'text ' + frame }));
    console.log('---NANOCLAW_OUTPUT_END---');
    if (++frame === 200) { clearInterval(timer); child.kill('SIGKILL'); }
  }, 1);
});
"""


@pytest.mark.node
def test_a_childs_noise_breaks_no_frame_of_node() -> None:
    """All that Node says arrives, though a child writes lines to the same stdout."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")

    with subprocess.Popen([node, "-e", NODE], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        chunks = list(iter(lambda: os.read(fd, 65536), b""))
    events, _ = parse(chunks)

    assert process.returncode == 0
    # Whole lines of it fall between, and into, about every tenth frame.
    assert b"".join(chunks).count(b"noise") >= 50
    assert events == [AgentOutput("success", f"text {n}") for n in range(200)]
