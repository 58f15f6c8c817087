"""How long does a word take, from the agent to its bot and the other way?

An agent says when it got each follow-up, and when it began to write the answer. That is
compared with when the bot sent, and got, them: every clock here is the kernel's
monotonic one. A follow-up that NanoClaw writes waits for a poll: measured with a plain
program that polls like that, if Node is installed. ``python benchmarks/latency.py``
prints a table.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
import trio
from bots import GROUP, JID, in_each_runtime, quantile
from matplotlib.figure import Figure as Canvas
from report import Report

from clawtrio import Settings, open_engine

ROUNDS: Final = 500
#: As chats have it: nobody is at work when a follow-up comes.
PAUSE: Final = 0.005
#: Milliseconds of a follow-up: what the design promises.
MOST: Final = 1.0
#: Follow-ups for the peer, and seconds between them: they come at any time of its poll.
POLLED: Final = 200
POLLED_PAUSE: Final = 0.0737

AGENT: Final = """
import queue, sys, time
sys.path.insert(0, "/app/src")
import wire

session, post = wire.open_session(wire.take_stdin()), queue.Queue()
session.listen(lambda message: post.put((message, time.monotonic())))
wire.emit(result="ready", answers=0)
while (got := post.get())[0] is not None:
    wire.emit(result=f"{got[1]} {time.monotonic()}", answers=got[0].id)
"""


@attrs.frozen
class Waits:
    """Milliseconds that words took.

    Attributes:
        frames: From before the agent wrote a frame, to the bot's having its output.
        lines: From a bot's call to the agent's receipt, as lines on stdin.
        files: The same, as files, which NanoClaw's own image wants.
    """

    frames: Sequence[float]
    lines: Sequence[float]
    files: Sequence[float]


async def converse(settings: Settings) -> tuple[list[float], list[float]]:
    """Return the milliseconds that frames took, and follow-ups."""
    frames: list[float] = []
    follow_ups: list[float] = []
    async with (
        open_engine(settings) as engine,
        engine.open_run(GROUP, "Hello?", chat_jid=JID) as run,
    ):
        sent = 0.0
        async for output in run:
            arrived = time.monotonic()
            assert output.result is not None
            if sent:
                heard, written = map(float, output.result.split())
                follow_ups.append((heard - sent) * 1000)
                frames.append((arrived - written) * 1000)
            if len(frames) == ROUNDS:
                break
            await trio.sleep(PAUSE)
            sent = time.monotonic()
            await run.send("and then?")
    return frames, follow_ups


async def measure(settings: Settings) -> Waits:
    """Measure one runtime, in both ways of following up."""
    frames, lines = await converse(attrs.evolve(settings, stdin="lifeline"))
    _, files = await converse(attrs.evolve(settings, stdin="eof"))
    return Waits(frames, lines, files)


async def poll(directory: Path) -> list[float]:
    """Return the milliseconds that follow-ups wait for an agent that polls."""
    script = Path(__file__).parent / "peers" / "inbox.js"
    argv = ["node", str(script), str(directory)]
    print("a poll of 500 ms ...", file=sys.stderr)
    done: list[subprocess.CompletedProcess[bytes]] = []

    async def listen() -> None:
        done.append(await trio.run_process(argv, capture_stdout=True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        for number in range(POLLED):
            await trio.sleep(POLLED_PAUSE)
            post(directory, f"{number:04d}.json")
        post(directory, "_close")
    waits = [float(line) for line in done[0].stdout.split()]
    if len(waits) != POLLED:
        raise RuntimeError(f"the peer got {len(waits)} of {POLLED} follow-ups")
    return waits


def post(directory: Path, name: str) -> None:
    """Write a file, whole at once, that says when."""
    half = directory / "half"
    half.write_text(json.dumps({"sent": time.monotonic() * 1000}))
    half.rename(directory / name)


def tell(
    report: Report, found: Mapping[str, Waits], polled: Sequence[float] | None
) -> None:
    """Put it all into the report."""
    rows = {}
    for runtime, waits in found.items():
        rows[f"{runtime}: frame to output"] = waits.frames
        rows[f"{runtime}: follow-up, as a line"] = waits.lines
        rows[f"{runtime}: follow-up, as a file"] = waits.files
    if polled is not None:
        rows["NanoClaw's poll: follow-up"] = polled
    table = []
    for name, values in rows.items():
        p50, p99 = quantile(values, 0.5), quantile(values, 0.99)
        found_of = (statistics.mean(values), p50, p99, max(values))
        table.append([name, *(f"{value:.2f}" for value in found_of)])
    report.table("Milliseconds on the way", ("", "mean", "p50", "p99", "worst"), table)
    for runtime, waits in found.items():
        median = statistics.median(waits.lines)
        report.figure(f"{runtime}: follow-up, median", median, "ms", at_most=MOST)
        if polled is not None:
            ratio = statistics.median(polled) / median
            report.figure(f"{runtime}: NanoClaw's poll / follow-up, medians", ratio)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for name, values in rows.items():
            axes.ecdf(values, label=name)
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("share that took no longer")
        axes.legend(fontsize="small")

    report.plot("words", draw)


async def main() -> int:
    """Print the table; return the exit code."""
    report = Report("latency")
    found = await in_each_runtime(measure, agent_command=("python3", "-c", AGENT))
    polled = None
    if shutil.which("node"):
        with tempfile.TemporaryDirectory(prefix="clawtrio-bench-") as directory:
            polled = await poll(Path(directory))
    else:
        print("Node is not installed: no poll to compare with", file=sys.stderr)
    tell(report, found, polled)
    return report.finish()


if __name__ == "__main__":
    sys.exit(trio.run(main))
