"""Soak clawtrio in random runs: ``python -m tests.soak [MINUTES] [--seed N]``."""

from __future__ import annotations

import argparse
import faulthandler
import random
import secrets
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Final
from unittest.mock import patch

import attrs
import trio
from rich.console import Console
from rich.table import Table

from clawtrio import Engine, open_engine
from clawtrio.testing import FakeRuntime
from tests.conftest import CHECKS
from tests.e2e.conftest import Site
from tests.upstream import open_api, write_env

from . import agent, fake
from .callers import Tally, carry_out
from .hosts import dispatch, echo, kill_host, sweep_up
from .measures import Measures, measure, more
from .plans import MAX_FRAME_BYTES, Plan, draw

RUNTIMES: Final = ("docker", "podman", "bwrap", "fake")
#: Plans between two openings of the engines, and the most runs at a time.
ROUND: Final = 24
MOST_RUNS: Final = 8
PROGRESS_INTERVAL: Final = 10.0
#: Seconds that a soak may last beyond its time. One that lasts longer has met a hang
#: that no cancellation ends.
OVERTIME: Final = 600.0
#: Caches, lazy imports, and the allocator's arenas have their size after so much of it.
WARM_UP: Final = 0.2


@attrs.define(kw_only=True)
class Soak:
    """A soak.

    Attributes:
        seed: Of all that is chosen.
        site: A root for the engines, and what marks what is ours.
        runtimes: The names of those that work here.
        tally: What has come of it.
    """

    seed: int
    site: Site
    runtimes: Sequence[str]
    tally: Tally = attrs.field(factory=Tally)
    _rounds: int = 0
    _closing: bool = False

    @property
    def sites(self) -> list[Site]:
        """The root, and another one, in the eyes of each runtime."""
        return [
            attrs.evolve(site, runtime=name)
            for site in (self.site, self.doomed)
            for name in self.runtimes
            if name != "fake"
        ]

    @property
    def doomed(self) -> Site:
        """The root of hosts that are killed."""
        return attrs.evolve(self.site, root=self.site.root.with_name("doomed"))

    async def run(self, seconds: float) -> tuple[Measures, Measures]:
        """Do rounds for so long; return what there was before and after.

        What comes before the first measure, a round at least, is to warm up.
        """
        started = trio.current_time()
        before = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, started)
            while before is None or trio.current_time() < started + seconds:
                await self.do_round()
                if before is None and trio.current_time() > started + WARM_UP * seconds:
                    before = await self._measure()
                    await self.do_round()
            after = await self._measure()
            nursery.cancel_scope.cancel()
        return before, after

    async def _measure(self) -> Measures:
        await sweep_up([site for site in self.sites if site.root == self.doomed.root])
        return await measure(self.sites)

    async def _tell(self, started: float) -> None:
        while True:
            await trio.sleep(PROGRESS_INTERVAL)
            tally, seconds = self.tally, trio.current_time() - started
            received = tally.received.total() + tally.cut.total()
            line = (
                f"{seconds:6.0f} s: {self._rounds} rounds, {tally.runs.total()} runs, "
                f"{received} outputs, {len(tally.problems)} problems"
            )
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - who waits may know

    async def do_round(self) -> None:
        """Open engines, and carry out some plans; now and then the engines close."""
        number = self._rounds
        self._rounds += 1
        chance = random.Random(f"{self.seed}/round {number}")
        first = number * ROUND
        plans = deque(
            draw(self.seed, n, self.runtimes) for n in range(first, first + ROUND)
        )
        workers = chance.randint(2, MOST_RUNS)
        abrupt = chance.random() < 0.15
        beside = chance.choice(("dispatcher", "killed host", "nothing"))
        name = chance.choice(self.runtimes)
        moment = chance.uniform(0, 5)
        stdin = chance.choice(("lifeline", "lifeline", "eof"))
        self._closing = False
        async with trio.open_nursery() as outliving, AsyncExitStack() as stack:
            api = await stack.enter_async_context(open_api(echo))
            write_env(self.site.root, api.port)
            engines = {
                name: await stack.enter_async_context(self.open_engine(name, stdin))
                for name in self.runtimes
            }
            async with trio.open_nursery() as nursery:
                if not abrupt and beside == "dispatcher":
                    title = f"d{number}"
                    nursery.start_soon(
                        dispatch, engines[name], title, chance, self.tally
                    )
                if beside == "killed host" and name != "fake":
                    doomed = attrs.evolve(self.doomed, runtime=name)
                    nursery.start_soon(kill_host, doomed, chance, self.tally)
                for worker in range(workers):
                    (outliving if abrupt else nursery).start_soon(
                        self._work, f"w{worker}", plans, engines
                    )
            if abrupt:
                await trio.sleep(moment)
                self.tally.deeds["engines closed amidst"] += 1
                self._closing = True
                plans.clear()

    async def _work(
        self, folder: str, plans: deque[Plan], engines: dict[str, Engine]
    ) -> None:
        while plans:
            plan = plans.popleft()
            engine = engines[plan.runtime]
            await carry_out(plan, engine, folder, self.tally, lambda: self._closing)

    def open_engine(self, name: str, stdin: str) -> AbstractAsyncContextManager[Engine]:
        """Open an engine with that runtime on the root."""
        site = attrs.evolve(self.site, runtime="bwrap" if name == "fake" else name)
        python = sys.executable if name == "bwrap" else "python3"
        source = f"# {site.token}\n" + Path(agent.__file__).read_text()
        settings = site.settings(
            agent_command=(python, "-c", source),
            stdin=stdin,
            idle_timeout=2,
            command_timeout=20,
            max_frame_bytes=MAX_FRAME_BYTES,
        )
        return open_engine(
            settings, FakeRuntime(fake.agent) if name == "fake" else None
        )


def show(soak: Soak, before: Measures, after: Measures) -> None:
    """Print what has come of a soak."""
    tally, console = soak.tally, Console()
    table = Table("runtime", "runs", "sent", "received", "cut by the caller")
    for name in soak.runtimes:
        counts = (tally.runs, tally.sent, tally.received, tally.cut)
        table.add_row(name, *(f"{count[name]}" for count in counts))
    console.print(table)
    table = Table("", "before", "after", "may grow by")
    for field in attrs.fields(Measures):
        values = (getattr(before, field.name), getattr(after, field.name))
        table.add_row(
            f"{field.name} {field.metadata['unit']}",
            *map(str, values),
            "none left" if field.metadata["ours"] else str(field.metadata["within"]),
        )
    console.print(table)
    for named in (tally.endings, tally.deeds):
        console.print(", ".join(f"{name} {n}" for name, n in sorted(named.items())))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("minutes", nargs="?", type=float, default=5)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument(
        "--runtime", action="append", choices=RUNTIMES, help="may be repeated"
    )
    return parser.parse_args(argv)


def main(wanted: argparse.Namespace) -> int:
    """Soak; return 1 if something was lost or left."""
    runtimes = wanted.runtime or [
        name for name in RUNTIMES if name == "fake" or CHECKS[name]() is None
    ]
    print(f"seed {wanted.seed}, {', '.join(runtimes)}", file=sys.stderr)  # noqa: T201
    place = Path(tempfile.mkdtemp(prefix="clawtrio-soak-"))
    try:
        for name in ("root", "doomed"):
            (place / name).mkdir()
        place.chmod(0o755)
        soak = Soak(
            seed=wanted.seed, site=Site(runtimes[0], place / "root"), runtimes=runtimes
        )
        # As NanoClaw does it, retries would take minutes.
        with patch("clawtrio._dispatcher.RETRY_DELAY", 0.05):
            before, after = trio.run(soak.run, wanted.minutes * 60)
    finally:
        shutil.rmtree(place)
    show(soak, before, after)
    problems = [*soak.tally.problems, *more(before, after)]
    for problem in problems:
        print(problem)  # noqa: T201 - it is a program
    verdict = f"{len(problems)} problems" if problems else "nothing lost, nothing left"
    print(f"soak: {verdict} (seed {wanted.seed})")  # noqa: T201 - as above
    return 1 if problems else 0


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    faulthandler.dump_traceback_later(arguments.minutes * 60 + OVERTIME, exit=True)
    sys.exit(main(arguments))
