"""The scheduler: tasks that are due, into the dispatcher."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final
from zoneinfo import ZoneInfo

import attrs
import trio
from cronsim import CronSim, CronSimError

from ._dispatcher import Dispatcher
from ._engine import open_bare_nursery
from ._errors import ScheduleError, UnknownChatError, UnknownTaskError, UnsafePathError
from ._mailbox import (
    CancelTask,
    PauseTask,
    Request,
    ResumeTask,
    ScheduleTask,
    UpdateTask,
)
from ._models import Group, ScheduledTask

log = logging.getLogger(__name__)

#: Seconds after which the host's clock is looked at again: it may have been set, or the
#: host may have slept.
_LONGEST_WAIT: Final = 60.0
#: Tasks that a group may have, for agents make them.
MAX_TASKS: Final = 1000
#: A container takes about as long to start.
_SHORTEST_INTERVAL: Final = timedelta(seconds=1)


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def next_run(
    task: ScheduledTask, now: datetime, zone: ZoneInfo, *, anchor: datetime | None
) -> datetime | None:
    """Return when a task is due next, after *now*; None if never.

    Args:
        task: The task, whose own ``next_run`` does not matter.
        now: An aware time.
        zone: The group's time zone, for cron and for times without one.
        anchor: When it was due before: an interval counts from there, so that it does
            not drift. None, if it never was; ``once`` may then be in the past.

    Raises:
        ScheduleError: If the schedule makes no sense.
    """
    value = task.schedule_value
    try:
        if task.schedule_type == "cron":
            return next(CronSim(value, now.astimezone(zone)), None)
        if task.schedule_type == "interval":
            interval = timedelta(milliseconds=int(value))
            if interval < _SHORTEST_INTERVAL:
                raise ScheduleError(value, "must be 1000 milliseconds at least")
            begin = anchor or now
            return begin + interval * max(1, math.floor((now - begin) / interval) + 1)
        if task.schedule_type == "once":
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=zone)
            return moment.astimezone(UTC) if anchor is None else None
    except (CronSimError, OverflowError, ValueError) as exc:
        raise ScheduleError(value, str(exc)) from exc
    raise ScheduleError(task.schedule_type, "must be cron, interval or once")


class Scheduler:
    """Runs tasks when they are due. Made by :func:`open_scheduler`.

    Tasks are kept in the dispatcher's store. Whenever they change, the groups' agents
    get to see them.
    """

    def __init__(self, dispatcher: Dispatcher, now: Callable[[], datetime]) -> None:
        self._dispatcher = dispatcher
        self._now = now
        self._zone = ZoneInfo(dispatcher.engine.settings.timezone)
        self._changed = trio.Event()

    @property
    def tasks(self) -> tuple[ScheduledTask, ...]:
        """All tasks, those that are paused or completed included."""
        return tuple(self._dispatcher.tasks.values())

    async def schedule(self, task: ScheduledTask) -> ScheduledTask:
        """Add a task, and return it with the time when it is due.

        Raises:
            ScheduleError: If its schedule makes no sense, its id is taken, or the group
                has too many.
            UnknownChatError: If no group belongs to its chat.
        """
        chat_jid = self._dispatcher.chat_of(task)
        folder = self._dispatcher.groups[chat_jid].folder
        task = attrs.evolve(task, chat_jid=chat_jid, group_folder=folder)
        if task.id in self._dispatcher.tasks:
            raise ScheduleError(task.id, "is the id of another task")
        changes = self._make_room(task.group_folder)
        task = self._planned(task)
        await self._write({**changes, task.id: task})
        return task

    async def pause(self, task_id: str) -> None:
        """Have a task not run until it is resumed.

        Raises:
            UnknownTaskError: If there is no such task.
        """
        task = self.find(task_id)
        if task.status == "active":
            await self._write({task_id: attrs.evolve(task, status="paused")})

    async def resume(self, task_id: str) -> None:
        """Have a paused task run again. What it has missed is skipped.

        Raises:
            UnknownTaskError: If there is no such task.
        """
        task = self.find(task_id)
        if task.status == "paused":
            task = attrs.evolve(task, status="active")
            if task.schedule_type != "once":
                task = self._planned(task, anchor=self._due(task))
            await self._write({task_id: task})

    async def cancel(self, task_id: str) -> None:
        """Remove a task. A run of it that waits or lives goes on.

        Raises:
            UnknownTaskError: If there is no such task.
        """
        task = self.find(task_id)
        await self._write({task.id: None})

    async def update(
        self,
        task_id: str,
        *,
        prompt: str | None = None,
        schedule_type: str | None = None,
        schedule_value: str | None = None,
    ) -> None:
        """Change what is not None. A new schedule counts from now.

        Raises:
            UnknownTaskError: If there is no such task.
            ScheduleError: If the schedule makes no sense; nothing has changed.
        """
        task = self.find(task_id)
        changed = attrs.evolve(
            task,
            prompt=task.prompt if prompt is None else prompt,
            schedule_type=schedule_type or task.schedule_type,
            schedule_value=schedule_value or task.schedule_value,
        )
        if schedule_type or schedule_value:
            status = "active" if task.status == "completed" else task.status
            changed = self._planned(attrs.evolve(changed, status=status))
        await self._write({task_id: changed})

    async def apply(self, request: Request) -> bool:
        """Do what an agent asks about tasks; False if it asks for something else.

        What it has no right to, or makes no sense, is refused, and logged.
        """
        try:
            if isinstance(request, ScheduleTask):
                await self.schedule(
                    ScheduledTask(
                        request.task_id or f"task-{secrets.token_hex(8)}",
                        "",
                        request.prompt,
                        request.schedule_type,
                        request.schedule_value,
                        chat_jid=request.target_jid,
                        context_mode=request.context_mode,
                    )
                )
            elif isinstance(request, UpdateTask):
                await self.update(
                    self._allowed(request),
                    prompt=request.prompt,
                    schedule_type=request.schedule_type,
                    schedule_value=request.schedule_value,
                )
            elif isinstance(request, PauseTask):
                await self.pause(self._allowed(request))
            elif isinstance(request, ResumeTask):
                await self.resume(self._allowed(request))
            elif isinstance(request, CancelTask):
                await self.cancel(self._allowed(request))
            else:
                return False
        except (ScheduleError, UnknownChatError, UnknownTaskError) as exc:
            kind = type(exc).__name__
            log.warning("refused %s a request: %s", request.group.folder, kind)
        return True

    def _allowed(
        self, request: UpdateTask | PauseTask | ResumeTask | CancelTask
    ) -> str:
        """Return the id of the task, if the agent may do something about it."""
        task = self.find(request.task_id)
        own = task.group_folder.casefold() == request.group.folder.casefold()
        if not (own or request.group.is_main):
            # As if there was none: other groups' tasks are none of its business.
            raise UnknownTaskError(task.id)
        return task.id

    def find(self, task_id: str) -> ScheduledTask:
        """Return a task.

        Raises:
            UnknownTaskError: If there is no such task.
        """
        try:
            return self._dispatcher.tasks[task_id]
        except KeyError:
            raise UnknownTaskError(task_id) from None

    async def work(self) -> None:
        """Run what is due, for ever."""
        await self._publish({group.folder for group in self._groups()})
        while True:
            self._changed = trio.Event()
            now = self._now()
            active = [task for task in self.tasks if task.status == "active"]
            for task in active:
                if (due := self._due(task)) is not None and due <= now:
                    await self._launch(task, due, now)
            times = [due for task in active if (due := self._due(task)) and due > now]
            seconds = (
                min((time - now).total_seconds() for time in times) if times else 60
            )
            with trio.move_on_after(min(seconds, _LONGEST_WAIT)):
                await self._changed.wait()

    async def _launch(self, task: ScheduledTask, due: datetime, now: datetime) -> None:
        after = next_run(task, now, self._zone, anchor=due)
        then = attrs.evolve(
            task,
            last_run=task.next_run,
            next_run=_iso(after) if after else None,
            status="active" if after else "completed",
        )
        try:
            await self._dispatcher.submit_task(task, then=then)
        except UnknownChatError as exc:
            log.warning("task %s is paused: %s", task.id, exc)
            await self._write({task.id: attrs.evolve(task, status="paused")})
        else:
            await self._note({task.group_folder})

    def _planned(
        self, task: ScheduledTask, anchor: datetime | None = None
    ) -> ScheduledTask:
        due = next_run(task, self._now(), self._zone, anchor=anchor)
        if due is None:
            raise ScheduleError(task.schedule_value, "never comes")
        return attrs.evolve(task, next_run=_iso(due))

    def _due(self, task: ScheduledTask) -> datetime | None:
        return datetime.fromisoformat(task.next_run) if task.next_run else None

    def _make_room(self, folder: str) -> dict[str, ScheduledTask | None]:
        """Drop a completed task of a group that has too many."""
        found = [task for task in self.tasks if task.group_folder == folder]
        if len(found) < MAX_TASKS:
            return {}
        for task in found:
            if task.status == "completed":
                return {task.id: None}
        raise ScheduleError(folder, f"has {MAX_TASKS} tasks already")

    async def _write(self, tasks: dict[str, ScheduledTask | None]) -> None:
        folders = {
            task.group_folder
            for task in (*map(self._dispatcher.tasks.get, tasks), *tasks.values())
            if task is not None
        }
        await self._dispatcher.write_tasks(tasks)
        await self._note(folders)

    async def _note(self, folders: set[str]) -> None:
        self._changed.set()
        await self._publish(folders)

    def _groups(self) -> list[Group]:
        return list({g.folder: g for g in self._dispatcher.groups.values()}.values())

    async def _publish(self, folders: set[str]) -> None:
        """Have agents see the tasks: those of the groups, and main."""
        for group in self._groups():
            if group.is_main or group.folder in folders:
                try:
                    await self._dispatcher.engine.write_tasks_snapshot(
                        group, self.tasks
                    )
                except (OSError, UnsafePathError) as exc:
                    log.warning("cannot show %s its tasks: %s", group.folder, exc)


def _host_clock() -> datetime:
    return datetime.now(UTC)


def _virtual_clock(begin: datetime, since: float) -> datetime:
    return begin + timedelta(seconds=trio.current_time() - since)


@asynccontextmanager
async def open_scheduler(dispatcher: Dispatcher) -> AsyncIterator[Scheduler]:
    """Run the dispatcher's tasks for as long as the block takes.

    A task that came due while nobody looked is run once, late; what else it missed is
    skipped. Over a fake runtime, time is Trio's, so that a mock clock works.
    """
    now = _host_clock
    if dispatcher.engine.runtime.in_process:
        now = partial(_virtual_clock, _host_clock(), trio.current_time())
    scheduler = Scheduler(dispatcher, now)
    async with open_bare_nursery() as nursery:
        nursery.start_soon(scheduler.work)
        try:
            yield scheduler
        finally:
            nursery.cancel_scope.cancel()
