"""How many runs at once does one process carry?

Each of 1 to 500 agents is asked for as many outputs, at once. Before that all of them
are idle, and the memory is looked at. The fake runtime has agents that are tasks of
this process, so what is measured is the engine, and a little more; bwrap has real ones.
Each number of runs has a new process to itself, so that none inherits memory which
another has left. ``python benchmarks/load.py`` prints a table.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal

import attrs
import trio
from bots import open_root
from matplotlib.figure import Figure as Canvas
from report import Report, memory_of
from trio_util import AsyncValue

from clawtrio import (
    AgentOutput,
    Engine,
    Group,
    Run,
    RuntimeUnavailableError,
    open_engine,
)
from clawtrio.testing import AgentPipes, FakeRuntime, framed

Kind = Literal["fake", "bwrap"]

#: Runs at once, and outputs of all of them together.
NUMBERS: Final[Mapping[Kind, Sequence[int]]] = {
    "fake": (1, 10, 100, 500),
    "bwrap": (1, 10, 50),
}
OUTPUTS: Final[Mapping[Kind, int]] = {"fake": 20_000, "bwrap": 10_000}
#: Most KiB of this process for one idle run, told from as many as there are.
MOST: Final = 256
#: Runs before the first look, for what is loaded and allocated only once.
WARM_UP: Final = 5

#: As an operator's own, the echo agent gets a way to the proxy, as real agents have.
AGENT: Final = """
import sys
sys.path.insert(0, "/app/src")
import echo, wire
sys.exit(echo.run(wire.open_session(wire.take_stdin())))
"""
ANSWER: Final = framed(b'{"status": "success", "result": "Hello."}')
WAITING: Final = framed(b'{"status": "success", "result": null}')


@attrs.frozen(kw_only=True)
class Load:
    """What a number of runs came to.

    Attributes:
        rate: Outputs per second, of all runs together.
        work: Microseconds of the engine's processor time for each output.
        memory: KiB that each idle run adds to the engine's process.
        descriptors: How many it has open there for each.
    """

    rate: float
    work: float
    memory: float
    descriptors: float


async def fake_agent(pipes: AgentPipes) -> int:
    """Answer each line of a question, then wait, as the echo agent does."""
    buffer = b""
    async for chunk in pipes.stdin:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            asked = json.loads(line)
            if asked.get("type") == "close":
                return 0
            text = asked["prompt"] if "prompt" in asked else asked["text"]
            for _ in text.splitlines():
                await pipes.stdout.send_all(ANSWER)
            await pipes.stdout.send_all(WAITING)
    return 0


class Crowd:
    """Runs at once, and what they have said."""

    def __init__(self, engine: Engine, nursery: trio.Nursery) -> None:
        self._engine = engine
        self._nursery = nursery
        self._turns = AsyncValue(0)
        self._outputs = 0

    async def start(self, numbers: Iterable[int]) -> list[Run]:
        """Start runs, and return when all of them wait for a question."""
        runs: list[Run] = []
        for number in numbers:
            run = partial(
                self._engine.run,
                Group(name="bench", folder=f"bench{number}"),
                "Hello?",
                chat_jid=f"tg:{number}",
                on_output=self._hear,
                single_turn=False,
            )
            runs.append(await self._nursery.start(run))
        await self._turns.wait_value(lambda turns: turns == len(self._engine.runs))
        return runs

    async def ask(self, runs: Sequence[Run], outputs: int) -> float:
        """Have each give so many outputs; return how many came per second."""
        self._turns.value = self._outputs = 0
        started = time.perf_counter()
        for run in runs:
            await run.send("\n".join(["again"] * outputs))
        await self._turns.wait_value(lambda turns: turns == len(runs))
        if self._outputs != outputs * len(runs):
            raise RuntimeError(f"{self._outputs} outputs came")
        return self._outputs / (time.perf_counter() - started)

    async def _hear(self, output: AgentOutput) -> None:
        await trio.lowlevel.checkpoint()
        if output.result is None:
            self._turns.value += 1
        else:
            self._outputs += 1


def memory() -> float:
    """Return the KiB of this process that are in memory."""
    gc.collect()
    return memory_of() / 1024


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def measure(kind: Kind, number: int) -> Load:
    """Measure so many runs at once, in a process that did nothing yet."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    runtime = FakeRuntime(fake_agent) if kind == "fake" else None
    with open_root("bwrap", agent_command=("python3", "-c", AGENT)) as settings:
        async with (
            open_engine(settings, runtime) as engine,
            trio.open_nursery() as nursery,
        ):
            crowd = Crowd(engine, nursery)
            await crowd.start(range(-WARM_UP, 0))
            kept, held = memory(), descriptors()
            runs = await crowd.start(range(number))
            kept, held = memory() - kept, descriptors() - held
            worked = time.process_time()
            each = OUTPUTS[kind] // number
            rate = await crowd.ask(runs, each)
            worked = time.process_time() - worked
            for run in engine.runs:
                run.finish()
    return Load(
        rate=rate,
        work=worked / (each * number) * 1e6,
        memory=kept / number,
        descriptors=held / number,
    )


async def measure_apart(kind: Kind, number: int) -> Load | None:
    """Measure in a new process; None where there is no such runtime."""
    print(f"{kind}, {number} runs ...", file=sys.stderr)
    argv = [sys.executable, __file__, kind, str(number)]
    done = await trio.run_process(argv, capture_stdout=True)
    return Load(**json.loads(done.stdout)) if done.stdout else None


def tell(report: Report, found: Mapping[Kind, Mapping[int, Load]]) -> None:
    """Put it all into the report."""
    rows = []
    for kind, loads in found.items():
        for number, load in loads.items():
            of_outputs = f"{load.rate:,.0f}", f"{load.work:.0f}"
            of_runs = f"{load.memory:.0f}", f"{load.descriptors:.0f}"
            rows.append([kind, number, *of_outputs, *of_runs])
        most = max(loads)
        name = f"{kind}: memory of an idle run, of {most}"
        report.figure(name, loads[most].memory, "KiB", at_most=MOST)
    columns = ("", "runs", "outputs/s", "µs of processor", "KiB idle", "descriptors")
    report.table("Runs at once: all outputs, and each output or run", columns, rows)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for kind, loads in found.items():
            rates = [load.rate for load in loads.values()]
            axes.plot(list(loads), rates, marker="o", label=kind)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("runs at once")
        axes.set_ylabel("outputs per second, of all runs")
        axes.legend()

    report.plot("outputs", draw)


async def main() -> int:
    """Print the table; return the exit code."""
    report = Report("load")
    found: dict[Kind, dict[int, Load]] = {}
    for kind, numbers in NUMBERS.items():
        for number in numbers:
            if load := await measure_apart(kind, number):
                found.setdefault(kind, {})[number] = load
    tell(report, found)
    return report.finish()


async def be_measured(kind: Kind, number: int) -> None:
    """Print what this process measures; nothing if it cannot."""
    try:
        load = await measure(kind, number)
    except RuntimeUnavailableError as exc:
        print(exc, file=sys.stderr)
    else:
        print(json.dumps(attrs.asdict(load)))


if __name__ == "__main__":
    for one in NUMBERS:
        if sys.argv[1:2] == [one]:
            sys.exit(trio.run(be_measured, one, int(sys.argv[2])))
    sys.exit(trio.run(main))
