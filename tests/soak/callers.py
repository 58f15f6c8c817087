"""Callers of runs: each does its part of a plan, then checks what has come of it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import attrs
import trio

from clawtrio import (
    AgentOutput,
    ClawtrioError,
    ContainerConfig,
    Ending,
    Engine,
    Group,
    Run,
    RunClosedError,
    RunResult,
    Usage,
)
from clawtrio._runtimes import LABEL_RUN
from tests.e2e.conftest import Process, processes

from .plans import Plan

#: Seconds in which any run is over: the longest plan, its end, and a busy machine.
BOUND: Final = 120.0


class DisturbanceError(Exception):
    """What a caller raises in the midst of it."""


@attrs.define
class Tally:
    """What has come of all plans so far, by runtime where that is a key.

    Attributes:
        runs: Runs that have ended.
        sent: Outputs that agents have written in runs whose caller listened to the end.
        received: Outputs received in those.
        cut: Outputs received in runs that the caller has ended.
        endings: How runs have ended.
        deeds: What was done to them.
        problems: What should not have been.
    """

    runs: Counter[str] = attrs.field(factory=Counter)
    sent: Counter[str] = attrs.field(factory=Counter)
    received: Counter[str] = attrs.field(factory=Counter)
    cut: Counter[str] = attrs.field(factory=Counter)
    endings: Counter[str] = attrs.field(factory=Counter)
    deeds: Counter[str] = attrs.field(factory=Counter)
    problems: list[str] = attrs.field(factory=list)


@attrs.define
class Counted:
    """What an agent says that it has written."""

    begun: int = 0
    written: int = 0


def read_note(path: Path) -> Counted:
    """Read an agent's note; one that was not begun counts nothing."""
    try:
        numbers = list(map(int, path.read_text().split()))
    except FileNotFoundError:
        return Counted()
    return Counted(*numbers)


@attrs.define
class Talk:
    """A run, its caller, and whoever disturbs them."""

    plan: Plan
    engine: Engine
    group: Group
    heard: list[AgentOutput] = attrs.field(factory=list)
    asked: list[str] = attrs.field(factory=list)
    run: Run | None = None
    hit: bool = False
    _begun: trio.Event = attrs.field(factory=trio.Event)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    async def hold(self) -> None:
        """Have the run, as planned, from start to end."""
        async with trio.open_nursery() as disturbers:
            disturbers.start_soon(self._disturb)
            disturbers.start_soon(self._send)
            disturbers.start_soon(self._attack)
            with self._scope:
                try:
                    await (self._call_back if self.plan.by_callback else self._loop)()
                except DisturbanceError:
                    assert self.plan.caller == "raises"
            disturbers.cancel_scope.cancel()

    def started(self, value: Run | None = None) -> None:
        """Note that the run has begun; as ``task_status`` is told."""
        self.run = value
        self.asked.append(self.plan.prompt)
        self._begun.set()

    async def _call_back(self) -> None:
        await self.engine.run(
            self.group,
            self.plan.prompt,
            chat_jid="tg:1",
            on_output=self._take,
            single_turn=self.plan.single_turn,
            task_status=self,
        )

    async def _loop(self) -> None:
        call = self.engine.open_run(
            self.group,
            self.plan.prompt,
            chat_jid="tg:1",
            single_turn=self.plan.single_turn,
        )
        async with call as run:
            self.started(run)
            if self.plan.caller == "waits":
                await run.wait()
            async for output in run:
                await self._take(output)
                if self.plan.caller == "leaves" and len(self.heard) == self.plan.count:
                    break

    async def _take(self, output: AgentOutput) -> None:
        self.heard.append(output)
        if self.plan.caller == "raises" and len(self.heard) == self.plan.count:
            raise DisturbanceError
        await trio.sleep(self.plan.slowness)

    async def _disturb(self) -> None:
        await trio.sleep(self.plan.moment)
        if self.plan.caller == "cancels":
            self._scope.cancel()
        await self._begun.wait()
        assert self.run is not None
        if self.plan.caller == "stops":
            self.run.stop()
        elif self.plan.caller == "finishes":
            self.run.finish()

    async def _send(self) -> None:
        await self._begun.wait()
        assert self.run is not None
        for number, pause in enumerate(self.plan.follow_ups):
            await trio.sleep(pause)
            text = f"follow-up {number}"
            try:
                await self.run.send(text)
            except RunClosedError:
                return
            self.asked.append(text)

    async def _attack(self) -> None:
        await self._begun.wait()
        assert self.run is not None
        if self.plan.attack != "none":
            await trio.sleep(self.plan.moment)
            self.hit = await attack(self.engine, self.run, self.plan.attack)

    def problems(self, *, ended: bool) -> Iterator[str]:
        """Yield what is wrong with the run that is over.

        Args:
            ended: Whether somebody else may have ended it, so that not all was for us.
        """
        assert self.run is not None
        plan, result, counted = self.plan, self.run.result, self.counted()
        numbers = [output.new_session_id for output in self.heard]
        if numbers != [str(n + 1) for n in range(len(numbers))]:
            yield f"lost, doubled or out of order: {numbers}"
        if len(numbers) > counted.begun:
            yield f"made up: {len(numbers)} received, {counted.begun} begun"
        if not ended and plan.is_complete:
            if len(numbers) < counted.written:
                yield f"lost: {counted.written} written, {len(numbers)} received"
            yield from self._wrong_result(result, numbers)
            if plan.is_undisturbed and result.ending in {Ending.EXITED, Ending.FAILED}:
                yield from self._not_as_planned(result)

    def _wrong_result(
        self, result: RunResult, numbers: Sequence[str | None]
    ) -> Iterator[str]:
        """Yield what the result should not say of a run that its caller saw all of."""
        if result.outputs != len(numbers):
            yield f"{len(numbers)} received, the result says {result.outputs}"
        if result.new_session_id != (numbers[-1] if numbers else None):
            yield f"session {result.new_session_id} after {numbers}"
        answers = (output.answers for output in self.heard if not output.partial)
        last = max((n for n in answers if n is not None), default=-1)
        if list(result.unanswered) != self.asked[last + 1 :]:
            yield f"unanswered after {last}: {result.unanswered}"
        if result.ending not in self.plan.endings:
            yield f"{result.ending}, code {result.exit_code}: {result.error}"

    def _not_as_planned(self, result: RunResult) -> Iterator[str]:
        """Yield what is wrong with a run whose agent got to its last step."""
        plan = self.plan
        if result.exit_code != plan.exit_code:
            yield f"code {result.exit_code}, not {plan.exit_code}"
        if result.dropped_frames != plan.dropped:
            yield f"{result.dropped_frames} frames dropped, not {plan.dropped}"
        if len(self.heard) < plan.outputs:
            yield f"lost: {plan.outputs} in the plan, {len(self.heard)} received"
        if plan.runtime != "fake":  # that has no way to the API
            usage = result.usage or Usage()
            counted = (usage.requests, usage.request_bytes, usage.response_bytes)
            if counted != plan.asked:
                yield f"asked {plan.asked}, counted {usage}"

    def counted(self) -> Counted:
        """Return what the agent has counted."""
        place = Path(self.engine.settings.groups_dir, self.group.folder)
        return read_note(place / self.plan.note)


async def carry_out(
    plan: Plan,
    engine: Engine,
    folder: str,
    tally: Tally,
    is_closing: Callable[[], bool],
) -> None:
    """Carry out a plan and note what has come of it.

    Args:
        plan: What is to be done.
        engine: What runs the agent.
        folder: Of a group that has no run.
        tally: Where it is noted.
        is_closing: Tells whether the engine is being closed meanwhile.
    """
    config = ContainerConfig(timeout=plan.patience)
    talk = Talk(plan, engine, Group(folder, folder, container_config=config))
    problems = []
    with trio.move_on_after(BOUND) as scope:
        try:
            await talk.hold()
        except* (ClawtrioError, RuntimeError) as group:
            if not is_closing():
                problems += [repr(exc) for exc in group.exceptions]
    if scope.cancelled_caught:
        problems.append(f"not over after {BOUND:g} s")
    if talk.run is not None:
        # Whoever listens while the engine closes is left by it.
        ended = is_closing() or scope.cancelled_caught
        problems += talk.problems(ended=ended)
        _count(talk, tally, ended=ended)
    tally.problems += [f"run {plan.number} ({plan.runtime}): {p}" for p in problems]


def _count(talk: Talk, tally: Tally, *, ended: bool) -> None:
    plan, runtime = talk.plan, talk.plan.runtime
    assert talk.run is not None
    tally.runs[runtime] += 1
    tally.endings[talk.run.result.ending.value] += 1
    tally.deeds[f"caller {plan.caller}"] += 1
    if talk.hit:
        tally.deeds[f"{plan.attack} killed"] += 1
    tally.deeds["follow-ups"] += len(talk.asked) - 1
    tally.deeds.update({f"agent: {kind}" for kind, *_ in plan.steps})
    if ended or not plan.is_complete:
        tally.cut[runtime] += len(talk.heard)
    else:
        tally.sent[runtime] += max(talk.counted().written, len(talk.heard))
        tally.received[runtime] += len(talk.heard)


async def attack(engine: Engine, run: Run, what: str) -> bool:
    """Kill a run's client, or its container behind the client's back.

    Returns:
        Whether there was one left to kill.
    """
    program = engine.runtime.name
    if what == "container" and program != "bwrap":
        argv = [program, "kill", run.container_name]
        done = await trio.run_process(
            argv, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return done.returncode == 0
    found = await engine.runtime.find({LABEL_RUN: run.id})
    sandboxes = {int(one.id.partition(":")[0]) for one in found if program == "bwrap"}
    clients = {
        process.pid
        for process in processes()
        if process.parent == os.getpid()
        and (process.pid in sandboxes or _runs(process, run.container_name))
    }
    victims = clients
    if what == "container":
        victims = {p.pid for p in processes() if p.parent in clients}
    for pid in victims:
        # A sandbox may go while we look; its client stays until it was waited for.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(victims)


def _runs(process: Process, name: str) -> bool:
    return process.argv[1:2] == ("run",) and name in process.argv
