"""What does ``engine.run`` cost over the process that it runs?

The same container with the same offline agent, which answers the same prompt and
leaves: once by ``engine.run``, once by a plain ``subprocess.Popen`` of the very command
line, without checks, limits on time, logs or clean-up. Both are measured in turn, so a
machine that is busy is so for both. ``python benchmarks/overhead.py`` prints a table.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

import attrs
import trio
from bots import GROUP, JID, in_each_runtime
from report import Report

from clawtrio import ContainerSpec, Engine, HeldMount, Settings, open_engine
from clawtrio._bwrap import BwrapRuntime
from clawtrio._bwrap_argv import Data, command, environment, launcher, options
from clawtrio.testing import FakeRuntime, scripted_agent

ROUNDS: Final = 15
#: Median of engine.run over that of the process, less what is granted for the rest.
MOST: Final = 1.3
GRANTED: Final = 0.005
PROMPT: Final = "Hello?"
INPUT: Final = {
    "prompt": PROMPT,
    "groupFolder": GROUP.folder,
    "chatJid": JID,
    "isMain": False,
    "assistantName": "Andy",
    "lifeline": True,
}
#: The close at once: it is heeded when the prompt is answered.
STDIN: Final = json.dumps(INPUT).encode() + b'\n{"type":"close"}\n'


@attrs.frozen
class Command:
    """A process to start."""

    argv: Sequence[str]
    environment: Mapping[str, str] | None = None
    fds: Sequence[int] = ()


async def specify(settings: Settings) -> ContainerSpec:
    """Return what a run's container is made from; this one is not started."""
    runtime = FakeRuntime(scripted_agent(exit_code=0))
    async with open_engine(settings, runtime) as engine:
        await engine.run(GROUP, PROMPT, chat_jid=JID)
    return runtime.specs[0]


@contextmanager
def bare(engine: Engine, spec: ContainerSpec) -> Iterator[Command]:
    """Have the command by which the engine's runtime starts that container."""
    if not isinstance(engine.runtime, BwrapRuntime):
        yield Command(engine.runtime.argv(spec))
        return
    host = engine.runtime._known_host()  # noqa: SLF001 - the same to the last option
    with ExitStack() as held:
        fds: list[int] = []

        def pass_on(fd: int) -> str:
            held.callback(os.close, fd)
            fds.append(fd)
            return str(fd)

        def memory(content: bytes) -> str:
            fd = os.memfd_create("bench")
            os.write(fd, content)
            os.lseek(fd, 0, os.SEEK_SET)
            return pass_on(fd)

        arguments = []
        for option in options(spec, host):
            if isinstance(option, str):
                arguments.append(option)
            elif isinstance(option, HeldMount):
                arguments.append(pass_on(os.open(option.mount.host_path, os.O_PATH)))
            elif isinstance(option, Data):
                arguments.append(memory(option.content))
            else:
                arguments.append(pass_on(os.open(os.devnull, os.O_WRONLY)))
        listed = memory(b"\0".join(map(os.fsencode, arguments)))
        # The engine counts what the user has running; here it is enough that it fits.
        inside = command(spec, host, tasks_elsewhere=10_000)
        argv = [*launcher(spec, host), "--args", listed, "--", *inside]
        yield Command(argv, environment(spec, host), fds)


def run_bare(command: Command) -> float:
    """Run a process to its end; return the seconds that it took."""
    started = time.perf_counter()
    with subprocess.Popen(  # noqa: S603 - our own
        list(command.argv),
        env=command.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=command.fds,
        cwd="/",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(STDIN)
        process.stdin.flush()
        answer = process.stdout.read()
        code = process.wait()
    seconds = time.perf_counter() - started
    if code or PROMPT.encode() not in answer:
        raise RuntimeError(f"the bare process left with code {code}")
    return seconds


async def run_engine(engine: Engine) -> float:
    """Run an agent to its end; return the seconds that it took."""
    started = time.perf_counter()
    result = await engine.run(GROUP, PROMPT, chat_jid=JID)
    seconds = time.perf_counter() - started
    if result.status != "success":
        raise RuntimeError(result.error)
    return seconds


async def measure(settings: Settings) -> list[tuple[float, float]]:
    """Return the seconds of the bare process and of engine.run, in pairs."""
    spec = await specify(settings)
    pairs = []
    async with open_engine(settings) as engine:
        # The first of each finds nothing in the caches.
        for number in range(ROUNDS + 1):
            name = f"{spec.name}-{number}"
            with bare(engine, attrs.evolve(spec, name=name)) as process:
                seconds = run_bare(process)
            pairs.append((seconds, await run_engine(engine)))
    return pairs[1:]


async def main() -> int:
    """Print the table; return the exit code."""
    report = Report("overhead")
    found = await in_each_runtime(measure)
    rows = []
    for runtime, pairs in found.items():
        plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        added = statistics.median(b - a for a, b in pairs)
        cells = (f"{seconds * 1000:.0f}" for seconds in (plain, ours, added))
        rows.append([runtime, *cells])
        name = f"{runtime}: (engine.run - {GRANTED * 1000:g} ms) / process"
        report.figure(name, (ours - GRANTED) / plain, at_most=MOST)
    columns = ("", "process", "engine.run", "added (median of pairs)")
    report.table("Milliseconds from start to end", columns, rows)
    return report.finish()


if __name__ == "__main__":
    sys.exit(trio.run(main))
