"""How fast is the parser, next to its peers, and to the least that must be done?

The peers are the programs under ``peers``: NanoClaw's way in Node, and asyncio's. The
least is decoding alone, with the same decoder, and one search through all bytes. What
one read completes is handed out together: to decode as many, and to forget none of them
before the last is there, costs more, and has nothing to do with markers.

All get the same bytes in the same reads, in turn, again and again: machines are noisy,
so look at the ratios. ``python benchmarks/parse.py`` prints tables; Node must be
installed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, Self

import attrs
from matplotlib.figure import Figure as Canvas
from report import Report

from clawtrio import MarkerParser
from clawtrio._codec import decode_output
from clawtrio.testing import framed

READS: Final = (512, 4096, 2**16, 2**20)
#: What is measured with reads of one size has that of a pipe.
READ: Final = 2**16
#: In MiB.
SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
ROUNDS: Final = 5
#: A peer gives up after so many seconds.
LIMIT: Final = 15
#: What takes longer, in seconds, is measured once.
SLOW: Final = 0.5
MIB: Final = 2**20

OURS: Final = "clawtrio"
DECODING: Final = "decoding"
KEEPING: Final = "decoding, kept"
FINDING: Final = "bytes.find"
NODE: Final = "Node"
ASYNCIO: Final = "asyncio"
OTHERS: Final = (NODE, ASYNCIO, DECODING, KEEPING, FINDING)

Times = dict[tuple[str, int], list[float]]


@attrs.frozen(eq=False)
class Stream:
    """What an agent wrote.

    Attributes:
        name: What it is called.
        data: All of it.
        bodies: What is between the markers of each frame.
        node: How many times as fast as Node we want to be, by the size of the reads.
        decoding: How much of the speed of decoding alone we want to have.
    """

    name: str
    data: bytes
    bodies: list[bytes]
    node: dict[int, float] = attrs.field(factory=dict)
    decoding: float | None = None


def body(size: int) -> bytes:
    """Return an output of *size* bytes, with a few characters beyond ASCII."""
    sentence = "It is “fine”, 20 °C, and tomorrow too. "
    text = sentence * (size // len(sentence.encode()) - 1)
    spare = size - len(encoded(text))
    return encoded(text + "." * spare)


def encoded(text: str) -> bytes:
    """Return the output that says *text*, as an agent writes it."""
    output = {"status": "success", "result": text}
    return json.dumps(output, ensure_ascii=False, separators=(",", ":")).encode()


def streams() -> Iterator[Stream]:
    """Yield what is parsed."""
    for name, size, total, node, decoding in (
        ("126 B", 126, MIB, dict.fromkeys(READS, 1.0), 0.5),
        ("1 KiB", 1024, 2 * MIB, dict.fromkeys(READS, 1.5), 0.75),
        ("75 KiB", 75 * 1024, 4 * MIB, dict.fromkeys(READS, 2.0), 0.75),
        ("8 MiB", 8 * MIB, 8 * MIB, {4096: 200.0, 2**16: 20.0}, 0.75),
    ):
        bodies = [body(size)] * (total // size)
        yield Stream(name, b"".join(map(framed, bodies)), bodies, node, decoding)
    bodies = [body(1024)] * 2000
    data = b"".join(map(framed, bodies)).replace(b"\n", b"\r\n")
    yield Stream("CRLF, 1 KiB", data, bodies)
    bodies = [b"{this is no JSON at all, though it looks as if}"] * 8000
    yield Stream("dropped, 47 B", b"".join(map(framed, bodies)), bodies)
    line = b"[info] 12:00:01 npm notice - nothing to see here, %d files --- ok\n" % 17
    noise = line * (4 * MIB // len(line))
    yield Stream("noise", noise, [], {4096: 100.0, 2**16: 100.0})
    yield Stream("dashes", b"-" * (4 * MIB), [])


def cut(data: bytes, size: int) -> list[bytes]:
    """Cut *data* up into reads of *size* bytes."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def parse(reads: Iterable[bytes], max_frame_bytes: int = 128 * MIB) -> int:
    """Parse *reads*; return the number of frames."""
    parser = MarkerParser(max_frame_bytes=max_frame_bytes)
    frames = sum(len(parser.feed(read)) for read in reads)
    return frames + len(parser.close())


def decode(bodies: list[bytes]) -> int:
    """Decode *bodies*, and nothing else; return how many there were."""
    for one in bodies:
        decode_output(one)
    return len(bodies)


def decode_and_keep(bodies: list[bytes], number: int) -> int:
    """Decode *bodies*, and forget none before there are *number*, as in a read."""
    for at in range(0, len(bodies), number):
        kept = [decode_output(one) for one in bodies[at : at + number]]
        del kept
    return len(bodies)


def find(reads: list[bytes]) -> None:
    """Search all *reads* for what begins no frame, and nothing else."""
    for read in reads:
        read.find(b"NANOCLAW_INPUT")


def seconds(work: Callable[[], int | None], expected: int | None) -> float:
    """Return how long *work* takes; it must come to *expected*."""
    started = time.perf_counter()
    outcome = work()
    elapsed = time.perf_counter() - started
    if outcome != expected:
        raise RuntimeError(f"{outcome} frames in place of {expected}")
    return elapsed


class Peer:
    """A program that parses the same and times itself."""

    def __init__(self, *argv: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - it is ours
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def seconds(self, file: Path, read: int, expected: int) -> float:
        """Return how long it takes, from *LIMIT* on if it gave up."""
        order = {"file": str(file), "read": read, "limit": LIMIT}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        elapsed: float = answer["seconds"]
        if answer["frames"] != expected and elapsed < LIMIT:
            raise RuntimeError(f"{answer['frames']} frames in place of {expected}")
        return elapsed


def measure(stream: Stream, file: Path, peers: dict[str, Peer]) -> Times:
    """Let all parse *stream*, in turn; return their seconds, by name and read size."""
    frames = len(stream.bodies)
    works: dict[tuple[str, int], Callable[[], float]] = {}
    for read in READS:
        reads = cut(stream.data, read)
        works[OURS, read] = partial(seconds, partial(parse, reads), frames)
        works[DECODING, read] = partial(seconds, partial(decode, stream.bodies), frames)
        number = max(read * frames // len(stream.data), 1)
        keeping = partial(decode_and_keep, stream.bodies, number)
        works[KEEPING, read] = partial(seconds, keeping, frames)
        works[FINDING, read] = partial(seconds, partial(find, reads), None)
        for name, peer in peers.items():
            works[name, read] = partial(peer.seconds, file, read, frames)
    times: Times = defaultdict(list)
    # The first half of the rounds is for Node's compiler to warm up.
    for _ in range(2 * ROUNDS):
        for key, work in works.items():
            seen = times[key]
            seen.append(seen[-1] if seen and seen[-1] > SLOW else work())
    return {key: seen[ROUNDS:] for key, seen in times.items()}


def ratio(times: Times, read: int, name: str) -> float:
    """Return how many times as long as we *name* takes: the median of the rounds."""
    pairs = zip(times[name, read], times[OURS, read], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def text(times: Times, read: int, name: str) -> str:
    """Write a ratio; a peer that gave up would have taken longer than that."""
    more = "> " if max(times[name, read]) >= LIMIT else ""
    return f"{more}{ratio(times, read, name):.3g}"


def compare(report: Report) -> None:
    """Measure all streams, and report the ratios."""
    found: dict[Stream, Times] = {}
    peers = Path(__file__).parent / "peers"
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "stream"
        running = {
            NODE: Peer("node", str(peers / "parse.js")),
            ASYNCIO: Peer(sys.executable, str(peers / "parse_asyncio.py")),
        }
        for peer in running.values():
            stack.enter_context(peer)
        for stream in streams():
            print(f"parse: {stream.name}", file=sys.stderr)
            file.write_bytes(stream.data)
            found[stream] = measure(stream, file, running)
    report.table(
        "The time of others, in times of ours",
        ("frames", "reads, bytes", "MB/s", *OTHERS),
        (
            (stream.name, f"{read:,}", rate(stream, times, read), *row)
            for stream, times in found.items()
            for read in READS
            for row in ([text(times, read, name) for name in OTHERS],)
        ),
    )
    for stream, times in found.items():
        judge(report, stream, times)
    for name, other in (("node", NODE), ("decoding", DECODING)):
        report.plot(name, partial(draw_ratios, found, other))


def rate(stream: Stream, times: Times, read: int) -> str:
    """Write how many MB we parse in a second."""
    return f"{len(stream.data) / statistics.median(times[OURS, read]) / 1e6:,.0f}"


def judge(report: Report, stream: Stream, times: Times) -> None:
    """Report what should be reached."""
    for read, least in stream.node.items():
        name = f"{stream.name}, reads of {read:,} B: Node's time in ours"
        report.figure(name, ratio(times, read, NODE), at_least=least)
    if stream.decoding is None:
        return
    for read in READS:
        name = f"{stream.name}, reads of {read:,} B: decoding's time in ours"
        value = ratio(times, read, DECODING)
        report.figure(name, value, at_least=stream.decoding)
    pairs = zip(times[OURS, MIB], times[OURS, 4096], strict=True)
    flat = statistics.median(large / small for large, small in pairs)
    name = f"{stream.name}: speed in reads of 4 KiB, of that in 1 MiB"
    report.figure(name, flat, at_least=0.7)


def draw_ratios(found: dict[Stream, Times], other: str, canvas: Canvas) -> None:
    """Draw how *other* compares, for all streams that it has something to do with."""
    axes = canvas.subplots()
    for stream, times in found.items():
        if other == NODE or stream.bodies:
            ratios = [ratio(times, read, other) for read in READS]
            axes.plot(READS, ratios, marker="o", label=stream.name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    if other == NODE:
        axes.set_yscale("log")
    axes.set_xlabel("reads, bytes")
    axes.set_ylabel(f"{other}'s time, in times of ours")
    axes.legend()


def fit(report: Report) -> None:
    """Report whether the time is linear in the number of bytes."""
    points: dict[str, list[float]] = {}
    for name, size in (("one frame", None), ("frames of 1 KiB", 1024)):
        print(f"parse: from {SIZES[0]} to {SIZES[-1]} MiB, {name}", file=sys.stderr)
        points[name] = [parsing(mib, size) for mib in SIZES]
        square = statistics.correlation(SIZES, points[name]) ** 2
        what = f"{name}, from {SIZES[0]} to {SIZES[-1]} MiB: R² of the linear fit"
        report.figure(what, square, at_least=0.99)
    report.table(
        f"Seconds by MiB, in reads of {READ:,} B",
        ("MiB", *points),
        (
            (mib, *(f"{time:.4f}" for time in row))
            for mib, *row in zip(SIZES, *points.values(), strict=True)
        ),
    )
    report.plot("linear", partial(draw_fit, points))


def parsing(mib: int, size: int | None) -> float:
    """Return how long *mib* MiB take, in frames of *size*, or in one."""
    one = framed(body(size or mib * MIB))
    frames = mib * MIB // len(one) if size else 1
    work = partial(parse, cut(one * frames, READ))
    return statistics.median(seconds(work, frames) for _ in range(ROUNDS))


def draw_fit(points: dict[str, list[float]], canvas: Canvas) -> None:
    """Draw what was measured, and the lines that fit it best."""
    axes = canvas.subplots()
    for name, times in points.items():
        slope, intercept = statistics.linear_regression(SIZES, times)
        square = statistics.correlation(SIZES, times) ** 2
        axes.scatter(SIZES, times, label=f"{name}, R² = {square:.4f}")
        axes.plot(SIZES, [intercept + slope * mib for mib in SIZES])
    axes.set_xlabel("MiB")
    axes.set_ylabel("seconds")
    axes.legend()


def keep(report: Report) -> None:
    """Report what is kept between reads, and the most that is needed at once."""
    print("parse: memory", file=sys.stderr)
    rows = []
    most = 0
    for name, data in (
        ("the largest frame", framed(body(MIB - 2))),
        ("a frame that is too large", framed(body(8 * MIB))),
        ("no marker, one line", body(8 * MIB)),
        ("dashes", b"-" * 8 * MIB),
        ("frames of 1 KiB", framed(body(1024)) * 4000),
    ):
        counted, allocated, peak = memory(cut(data, READ))
        most = max(most, counted)
        rows.append(
            (name, *(f"{size / MIB:.2f}" for size in (counted, allocated, peak)))
        )
    columns = ("stream", "counted, MiB", "allocated, MiB", "peak, MiB")
    title = f"Kept between reads of {READ:,} B, where a frame may have 1 MiB"
    report.table(title, columns, rows)
    kept, limit = most / MIB, 1 + READ / MIB
    report.figure("kept between reads, counted", kept, "MiB", at_most=limit)
    *_, peak = memory(cut(framed(body(8 * MIB)), READ), 16 * MIB)
    report.figure("peak while a frame of 8 MiB is decoded", peak / MIB, "MiB")


def memory(reads: list[bytes], max_frame_bytes: int = MIB) -> tuple[int, int, int]:
    """Return the most that is kept, as counted and as allocated, and the peak."""
    tracemalloc.start()
    parser = MarkerParser(max_frame_bytes=max_frame_bytes)
    counted = allocated = 0
    for read in reads:
        parser.feed(read)
        counted = max(counted, parser.buffered)
        allocated = max(allocated, tracemalloc.get_traced_memory()[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return counted, allocated, peak


def main() -> int:
    """Measure all; return the exit code."""
    report = Report("parse")
    compare(report)
    fit(report)
    keep(report)
    return report.finish()


if __name__ == "__main__":
    if not shutil.which("node"):
        sys.exit("Node is not installed: there is nothing to compare with")
    sys.exit(main())
