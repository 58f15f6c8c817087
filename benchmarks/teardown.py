"""How long does it take, from a cancellation until the container is gone?

An agent that listens leaves at the end of its stdin; a stubborn one reads nothing and
ignores ``SIGTERM``, so it is killed after ``stop_grace``. Each holds a pipe open, which
closes when it is gone. The container is, when the runtime lists it no more. The run
itself is over later: the engine has to miss the container twice, half a second apart.
``python benchmarks/teardown.py`` prints a table.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio
from bots import GROUP, JID, group_directory, in_each_runtime
from matplotlib.figure import Figure as Canvas
from report import Report

from clawtrio import AgentOutput, Engine, Run, Settings, open_engine
from clawtrio._runtimes import LABEL_RUN

ROUNDS: Final = 7
STOP_GRACE: Final = 1.0
PIPE: Final = "alive"
#: Seconds between two looks for the container.
PAUSE: Final = 0.01
#: Far beyond the bound of the stop ladder.
TOO_LONG: Final = 120

LISTENS: Final = """
import os, sys, threading
alive = os.open("/workspace/group/alive", os.O_WRONLY)
sys.path.insert(0, "/app/src")
import wire

session = wire.open_session(wire.take_stdin())
session.listen(print)
wire.emit(result="ready", answers=0)
threading.Event().wait()
"""
STUBBORN: Final = """
import os, signal, sys, time
alive = os.open("/workspace/group/alive", os.O_WRONLY)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path.insert(0, "/app/src")
import wire

wire.emit(result="ready")
while True:
    time.sleep(60)
"""
AGENTS: Final = {"listens": LISTENS, "stubborn": STUBBORN}


@attrs.frozen
class End:
    """How many seconds after the cancellation a run had ended.

    Attributes:
        left: The agent was gone.
        gone: So was its container, as far as the runtime knows.
        over: ``engine.run`` had come to its end.
    """

    left: float
    gone: float
    over: float


async def cancel_once(engine: Engine, pipe: Path) -> End:
    """Run an agent, cancel it when it is there, and watch it go."""
    ready = trio.Event()
    left = gone = math.nan

    async def hear(output: AgentOutput) -> None:
        await trio.lowlevel.checkpoint()
        if output.status != "success":
            raise RuntimeError(output.error)
        ready.set()

    async def watch(fd: int, run: Run) -> None:
        nonlocal left, gone
        await trio.lowlevel.wait_readable(fd)
        left = trio.current_time()
        while await engine.runtime.find({LABEL_RUN: run.id}):  # noqa: ASYNC110 - no event
            await trio.sleep(PAUSE)
        gone = trio.current_time()

    with ExitStack() as held, trio.fail_after(TOO_LONG):
        fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        held.callback(os.close, fd)
        async with trio.open_nursery() as watching:
            async with trio.open_nursery() as running:
                start = partial(engine.run, GROUP, "Hi", chat_jid=JID, on_output=hear)
                run: Run = await running.start(start)
                await ready.wait()
                watching.start_soon(watch, fd, run)
                cancelled = trio.current_time()
                running.cancel_scope.cancel()
            over = trio.current_time()
        return End(left - cancelled, gone - cancelled, over - cancelled)


async def measure(settings: Settings) -> dict[str, list[End]]:
    """Cancel each kind of agent again and again."""
    pipe = group_directory(settings) / PIPE
    make_pipe(pipe)
    found = {}
    for name, program in AGENTS.items():
        command = ("python3", "-c", program)
        async with open_engine(attrs.evolve(settings, agent_command=command)) as engine:
            found[name] = [await cancel_once(engine, pipe) for _ in range(ROUNDS)]
    return found


def make_pipe(pipe: Path) -> None:
    """Make a named pipe that the agent may open, whoever it runs as."""
    os.mkfifo(pipe)
    pipe.chmod(0o622)


def tell(report: Report, found: Mapping[str, Mapping[str, list[End]]]) -> None:
    """Put it all into the report."""
    rows: dict[str, list[End]] = {
        f"{runtime}, {agent}": ends
        for runtime, agents in found.items()
        for agent, ends in agents.items()
    }
    table = []
    for name, ends in rows.items():
        columns = list(zip(*map(attrs.astuple, ends), strict=True))
        figures = [f(column) for column in columns for f in (statistics.median, max)]
        table.append([name, *(f"{figure:.3f}" for figure in figures)])
        median = statistics.median(end.gone for end in ends)
        report.figure(f"{name}: container gone", median, "s")
    title = f"Seconds from cancellation to the end (stop_grace: {STOP_GRACE:g} s)"
    parts = ("agent", "container", "run")
    heads = (head for part in parts for head in (part, "worst"))
    report.table(title, ("", *heads), table)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for name, ends in rows.items():
            axes.scatter([end.gone for end in ends], [name] * len(ends))
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds from the cancellation until the container is gone")

    report.plot("gone", draw)


async def main() -> int:
    """Print the table; return the exit code."""
    report = Report("teardown")
    tell(report, await in_each_runtime(measure, stop_grace=STOP_GRACE))
    return report.finish()


if __name__ == "__main__":
    sys.exit(trio.run(main))
