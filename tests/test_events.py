"""What whoever watches runs gets to see, in virtual time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from clawtrio import (
    Ending,
    EngineStatistics,
    Events,
    NotStartedError,
    RunDeadlineMoved,
    RunEnded,
    RunEvent,
    RunFollowUp,
    RunOutput,
    RunStarted,
    RunStopping,
)
from clawtrio.testing import scripted_agent

from .helpers import (
    GROUP,
    HEARTBEAT,
    JID,
    WAITS,
    OwnContainer,
    OwnRuntime,
    echoing,
    engine_of,
    engine_on,
    frame,
)


async def all_of(events: Events) -> list[RunEvent]:
    """Return what there is."""
    found: list[RunEvent] = []
    with trio.move_on_after(0.5):
        while True:
            found.append(await anext(events))
    return found


async def test_a_run_is_seen_from_its_start_to_its_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Events come in order, each with group, run and time."""
    agent = scripted_agent(3.0, frame("one"), 4.0, frame("two"))
    async with engine_of(tmp_path, agent) as engine, engine.open_events() as events:
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            began = trio.current_time()
            assert (await anext(run)).result == "one"
            await run.send("and?")
            assert (await anext(run)).result == "two"
        seen = await all_of(events)

    def of(time: float) -> dict[str, Any]:
        return {"group": "family", "run": run.id, "time": began + time}

    moves = [e for e in seen if isinstance(e, RunDeadlineMoved)]
    # While an output is dealt with, the clock stands still.
    assert [move.deadline - began for move in moves[:2]] == [100, math.inf]
    told = [event for event in seen if event not in moves]
    assert told == [
        RunStarted(**of(0)),
        RunOutput(**of(3), status="success", partial=False),
        RunFollowUp(**of(3), number=1),
        RunOutput(**of(7), status="success", partial=False),
        RunStopping(**of(7), ending=Ending.STOPPED),
        RunEnded(**of(told[-1].time - began), ending=Ending.STOPPED, status="success"),
    ]


async def test_events_hold_no_texts(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Whoever watches learns that something was said, not what."""
    async with (
        engine_of(tmp_path, echoing()) as engine,
        engine.open_events() as events,
    ):
        await engine.run(GROUP, "hunter2", chat_jid=JID)
        seen = await all_of(events)

    assert any(isinstance(event, RunOutput) for event in seen)
    assert "hunter2" not in repr(seen)


async def test_a_slow_reader_loses_the_oldest_and_stalls_nobody(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What does not fit is counted, and the newest is there; others miss nothing."""
    async with (
        engine_of(tmp_path, echoing()) as engine,
        engine.open_events(max_buffer=2) as slow,
        engine.open_events() as patient,
    ):
        await engine.run(GROUP, "Hi", chat_jid=JID)
        missed, everything = await all_of(slow), await all_of(patient)

    assert missed == everything[-2:]
    assert (slow.lost, patient.lost) == (len(everything) - 2, 0)
    assert isinstance(missed[-1], RunEnded)


async def test_watching_ends_with_the_engine(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A reader gets to the end once the engine is closed, the last events included."""
    seen: list[RunEvent] = []
    async with engine_of(tmp_path, echoing()) as engine, engine.open_events() as events:

        async def watch() -> None:
            seen.extend([event async for event in events])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await engine.run(GROUP, "Hi", chat_jid=JID)
            await engine.close()

    assert isinstance(seen[-1], RunEnded)
    async with engine.open_events() as late:
        assert [event async for event in late] == []


async def test_a_run_stopped_while_it_starts_tells_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What has not begun has no end."""
    runtime = OwnRuntime(hang_in, start=trio.sleep_forever)
    async with engine_on(tmp_path, runtime) as engine, engine.open_events() as events:

        async def run() -> None:
            with pytest.raises(NotStartedError, match="stopped before"):
                await engine.run(GROUP, "Hi", chat_jid=JID)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await wait_all_tasks_blocked()
            assert engine.statistics() == EngineStatistics(runs=(), starting=1)
            await engine.close()
        assert [event async for event in events] == []


async def hang_in(container: OwnContainer) -> None:
    """Be an agent that does nothing."""
    await trio.sleep_forever()


def test_a_buffer_has_room_for_one_at_least() -> None:
    """Anything less would be no stream."""
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Events(0)


async def test_statistics_tell_what_each_run_is_doing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """They have its state, its age, and how long its agent has been silent."""
    agent = scripted_agent(3.0, frame("one"), 4.0, HEARTBEAT, 5.0, WAITS)
    states = []
    # The clock of a loop may say anything.
    await trio.sleep(1000)
    async with engine_of(tmp_path, agent) as engine:
        assert engine.statistics() == EngineStatistics(runs=(), starting=0)
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            (first,) = engine.statistics().runs
            await anext(run)
            answered = run.statistics()
            with trio.move_on_after(5):
                await anext(run)
            quiet = run.statistics()
            await anext(run)
            states = [first.state, answered.state, quiet.state]
            states.append(run.statistics().state)
            run.finish()
            states.append(run.statistics().state)
            run.stop()
            states.append(run.statistics().state)

    assert states == [
        *("working", "answered", "answered"),
        *("waiting", "leaving", "stopping"),
    ]
    assert (first.group, first.run, first.usage) == ("family", run.id, None)
    assert (first.age, first.idle, first.outputs) == (0, 0, 0)
    assert (quiet.age, quiet.idle, quiet.outputs) == (8, 1, 1)
