"""Tasks that are due, in virtual time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import attrs
import pytest
import trio
from trio.testing import MockClock

from clawtrio import (
    Group,
    MemoryStore,
    ScheduledTask,
    ScheduleError,
    Scheduler,
    UnknownChatError,
    UnknownTaskError,
    open_scheduler,
)
from clawtrio._scheduler import MAX_TASKS, next_run

from .helpers import OwnRuntime, engine_on
from .test_dispatcher import Bot, answer_at_once, bot_of, dispatcher_on, quiet

BERLIN: Final = ZoneInfo("Europe/Berlin")
NOW: Final = datetime(2026, 3, 28, 12, 0, 0, tzinfo=UTC)


def task_of(kind: str, value: str, name: str = "t", **fields: Any) -> ScheduledTask:
    """Make a task of the group a."""
    return ScheduledTask(name, "a", name, kind, value, **fields)


@pytest.mark.parametrize(
    ("kind", "value", "anchor", "expected"),
    [
        ("cron", "0 9 * * *", None, "2026-03-29T07:00Z"),  # summer time has begun
        ("cron", "30 13 * * *", None, "2026-03-28T12:30Z"),
        ("interval", "60000", None, "2026-03-28T12:01Z"),
        ("interval", "60000", "2026-03-28T11:59:30Z", "2026-03-28T12:00:30Z"),
        ("interval", "60000", "2026-03-01T00:00:05Z", "2026-03-28T12:00:05Z"),
        ("interval", "60000", "2026-03-28T12:00Z", "2026-03-28T12:01Z"),
        ("once", "2026-03-28T20:00", None, "2026-03-28T19:00Z"),
        ("once", "2026-03-28T20:00+00:00", None, "2026-03-28T20:00Z"),
        ("once", "2020-01-01", None, "2019-12-31T23:00Z"),
        ("once", "2026-03-28T20:00", "2026-03-28T20:00Z", None),
    ],
)
def test_a_task_is_due_next(
    kind: str, value: str, anchor: str | None, expected: str | None
) -> None:
    """Cron goes by the group's clocks, an interval by when it was due before."""
    before = datetime.fromisoformat(anchor) if anchor else None

    due = next_run(task_of(kind, value), NOW, BERLIN, anchor=before)

    assert due == (datetime.fromisoformat(expected) if expected else None)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("cron", "every day"),
        ("cron", "99 * * * *"),
        ("interval", "often"),
        ("interval", "999"),
        ("interval", "-60000"),
        ("interval", "9" * 40),
        ("interval", "9" * 5000),
        ("once", "tomorrow"),
        ("yearly", "1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(kind: str, value: str) -> None:
    """The error names what was wrong."""
    with pytest.raises(ScheduleError) as caught:
        next_run(task_of(kind, value), NOW, BERLIN, anchor=None)
    assert caught.value.value in {kind, value}
    assert str(caught.value)


@asynccontextmanager
async def scheduler_of(
    root: Path, store: MemoryStore | None = None, groups: Any = None
) -> AsyncIterator[tuple[Scheduler, Bot]]:
    """Open a scheduler whose agents answer at once; a is main."""
    groups = groups or {"a": Group("A", "a", is_main=True), "b": Group("B", "b")}
    async with (
        bot_of(root, answer_at_once, store=store, groups=groups) as (dispatcher, bot),
        open_scheduler(dispatcher) as scheduler,
    ):
        yield scheduler, bot


def snapshot(root: Path, folder: str) -> list[dict[str, Any]]:
    """Read what a group's agent sees of the tasks."""
    path = root / "data" / "ipc" / folder / "current_tasks.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


async def test_an_interval_does_not_drift(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It is due a minute after it was due before, however late it was run."""
    async with scheduler_of(tmp_path) as (scheduler, bot):
        await scheduler.schedule(task_of("interval", "90000"))
        await bot.wait_for(4)

    times = [time for time, _, _ in bot.said]
    assert times == pytest.approx([90, 180, 270, 360], abs=0.1)


async def test_a_task_is_run_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Afterwards it is completed, and everybody sees that."""
    store = MemoryStore()
    async with scheduler_of(tmp_path, store) as (scheduler, bot):
        when = datetime.now(UTC) + timedelta(hours=1)
        task = await scheduler.schedule(task_of("once", when.isoformat()))
        assert [shown["status"] for shown in snapshot(tmp_path, "a")] == ["active"]
        assert datetime.fromisoformat(task.next_run or "") == when
        await bot.wait_for(1)
        await trio.sleep(1)

        (done,) = scheduler.tasks
        assert (done.status, done.next_run) == ("completed", None)
        assert done.last_run == task.next_run
        assert store.contents.tasks == {"t": done}
        assert [shown["status"] for shown in snapshot(tmp_path, "a")] == ["completed"]
        await trio.sleep(10_000)
    assert bot.texts == ["re: t"]
    assert bot.said[0][0] == pytest.approx(3600, abs=1)


async def test_cron_runs_by_the_minute(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Every five minutes means that."""
    async with scheduler_of(tmp_path) as (scheduler, bot):
        await scheduler.schedule(task_of("cron", "*/5 * * * *"))
        await bot.wait_for(3)

    first, second, third = (time for time, _, _ in bot.said)
    assert (second - first, third - second) == pytest.approx((300, 300), abs=0.1)


async def test_what_was_missed_is_run_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A host that was away for days does not make up for each of them."""
    store = MemoryStore()
    async with scheduler_of(tmp_path, store) as (scheduler, _):
        await scheduler.schedule(task_of("interval", "60000"))
    tasks = store.contents.tasks
    late = datetime.now(UTC) - timedelta(days=3)
    missed = attrs.evolve(tasks["t"], next_run=late.isoformat())
    store = MemoryStore(attrs.evolve(store.contents, tasks={"t": missed}))
    async with scheduler_of(tmp_path, store) as (scheduler, bot):
        await trio.sleep(50)
        assert bot.texts == ["re: t"]
        await bot.wait_for(2)

    assert (bot.said[1][0] - bot.said[0][0]) <= 60.1


async def test_a_paused_task_does_not_run(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What it misses meanwhile is skipped; a single time is caught up with."""
    async with scheduler_of(tmp_path) as (scheduler, bot):
        await scheduler.schedule(task_of("interval", "60000"))
        once = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
        await scheduler.schedule(task_of("once", once, "o", chat_jid="b"))
        for name in "tot":
            await scheduler.pause(name)
        await trio.sleep(190)
        assert bot.said == []
        for name in "tot":
            await scheduler.resume(name)
        await bot.wait_for(2)

    assert bot.texts == ["re: o", "re: t"]
    times = [time for time, _, _ in bot.said]
    assert times == pytest.approx([190, 240], abs=0.1)


async def test_tasks_can_be_changed(tmp_path: Path, autojump_clock: MockClock) -> None:
    """What is not named stays; a completed one runs again with a new schedule."""
    async with scheduler_of(tmp_path) as (scheduler, bot):
        await scheduler.schedule(task_of("once", "2020-01-01"))
        await bot.wait_for(1)
        await scheduler.update("t", prompt="new")
        assert scheduler.find("t").status == "completed"
        with pytest.raises(ScheduleError):
            await scheduler.update("t", schedule_type="interval")
        await scheduler.update("t", schedule_type="interval", schedule_value="60000")
        await bot.wait_for(2)
        await scheduler.pause("t")
        await scheduler.update("t", schedule_value="90000")
        assert scheduler.find("t").status == "paused"
        await scheduler.cancel("t")

        assert scheduler.tasks == ()
        assert snapshot(tmp_path, "a") == []
    assert bot.texts == ["re: t", "re: new"]


async def test_main_sees_the_tasks_of_all(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Another group sees its own, from the start on."""
    async with scheduler_of(tmp_path) as (scheduler, _):
        await trio.sleep(1)
        assert snapshot(tmp_path, "b") == []
        await scheduler.schedule(task_of("interval", "60000"))
        await scheduler.schedule(task_of("interval", "60000", "u", chat_jid="b"))

        assert [task["id"] for task in snapshot(tmp_path, "a")] == ["t", "u"]
        assert [task["id"] for task in snapshot(tmp_path, "b")] == ["u"]


async def test_what_cannot_be_scheduled_is_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nothing has changed then."""
    async with scheduler_of(tmp_path) as (scheduler, _):
        await scheduler.schedule(task_of("interval", "60000"))
        with pytest.raises(ScheduleError, match="is the id of another task"):
            await scheduler.schedule(task_of("interval", "60000"))
        with pytest.raises(ScheduleError, match="never comes"):
            scheduler._planned(task_of("once", "2020-01-01"), anchor=NOW)
        with pytest.raises(UnknownChatError):
            await scheduler.schedule(task_of("once", "2020-01-01", "u", chat_jid="x"))
        with pytest.raises(UnknownTaskError) as caught:
            await scheduler.pause("u")
        assert str(caught.value) == "there is no task 'u'"
        assert [task.id for task in scheduler.tasks] == ["t"]


async def test_a_group_has_so_many_tasks(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Those that are completed make room."""
    many = {
        f"t{n}": attrs.evolve(task_of("once", "2020-01-01", f"t{n}"), status=status)
        for n, status in enumerate(["active", "completed", *["active"] * MAX_TASKS])
        if n < MAX_TASKS
    }
    store = MemoryStore()
    store.contents = attrs.evolve(store.contents, tasks=many)
    async with scheduler_of(tmp_path, store) as (scheduler, _):
        await scheduler.schedule(task_of("interval", "60000"))
        assert "t1" not in {task.id for task in scheduler.tasks}
        with pytest.raises(ScheduleError, match="has 1000 tasks already"):
            await scheduler.schedule(task_of("interval", "60000", "u"))


async def test_a_task_without_a_group_is_paused(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A chat that is gone does not make its tasks fail again and again."""
    groups = {"a": Group("A", "a"), "b": Group("B", "b")}
    async with scheduler_of(tmp_path, groups=groups) as (scheduler, _):
        await scheduler.schedule(task_of("interval", "60000"))
        del groups["a"]
        await trio.sleep(100)

        assert scheduler.find("t").status == "paused"
    assert "task t is paused: no group belongs to chat 'a'" in caplog.text


async def test_a_snapshot_that_cannot_be_written_stops_nothing(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so, and tasks run all the same."""
    async with scheduler_of(tmp_path) as (scheduler, _):
        await trio.sleep(1)
        (tmp_path / "data" / "ipc" / "a").rename(tmp_path / "data" / "ipc" / "z")
        (tmp_path / "data" / "ipc" / "a").write_text("")
        await scheduler.schedule(task_of("once", "2020-01-01"))
        await trio.sleep(1)
        assert scheduler.find("t").status == "completed"
    assert "cannot show a its tasks" in caplog.text


async def test_the_clock_is_the_hosts(tmp_path: Path) -> None:
    """With real containers, time is what people call it."""
    minute = timedelta(minutes=1)
    groups = {"a": Group("A", "a")}
    async with (
        engine_on(tmp_path, OwnRuntime(quiet, in_process=False)) as engine,
        dispatcher_on(engine, Bot(), None, groups) as dispatcher,
        open_scheduler(dispatcher) as scheduler,
    ):
        before = datetime.now(UTC)
        task = await scheduler.schedule(task_of("interval", "60000"))
        due = datetime.fromisoformat(task.next_run or "")
        assert before + minute <= due <= datetime.now(UTC) + minute
