"""The dispatcher: messages of many chats in, each answered once, by runs of the engine.

::

    dispatcher's nursery
      _decide()     the one task that starts runs, sends into them and has them finish,
                    as the queue says
      _serve()      a run: its outputs to the callback, and to the store that they were

What is promised hangs on when the store is told:

- a message: before ``submit()`` returns;
- that it is answered: once the callback has returned. A crash in between repeats its
  turn, with the same keys;
- that text of its turn was said: likewise. From then on it is not asked again, and
  fails if it is not answered;
- that it failed: before ``on_failure`` is called, and again once that has returned.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

import attrs
import trio

from ._codec import well_formed
from ._engine import Engine, open_bare_nursery
from ._errors import (
    CredentialsError,
    FollowUpRefusedError,
    GroupBusyError,
    NotStartedError,
    RunClosedError,
    RuntimeUnavailableError,
    UnknownChatError,
    UnsafePathError,
)
from ._models import AgentOutput, Ending, Group, RunResult, ScheduledTask
from ._queue import Lane, Queue, RunState
from ._run import Run
from ._store import Change, Contents, Message, Store

log = logging.getLogger(__name__)

OnChatOutput: TypeAlias = Callable[[str, AgentOutput, str], Awaitable[object]]
OnFailure: TypeAlias = Callable[[str, tuple[str, ...], RunResult], Awaitable[object]]

#: As NanoClaw does it: five more tries, after 5, 10, 20, 40 and 80 seconds.
MAX_RETRIES: Final = 5
RETRY_DELAY: Final = 5.0
_CANNOT_START: Final = (
    CredentialsError,
    GroupBusyError,
    NotStartedError,
    RuntimeUnavailableError,
    UnknownChatError,
    UnsafePathError,
)
#: What a chat's run is doing while nobody waits for an answer.
_AT_REST: Final = (None, RunState.IDLE)
#: A session that cannot be resumed should not fail a message for good.
_FRESH_SESSION_AFTER: Final = 3


@attrs.frozen(kw_only=True)
class DispatcherStatistics:
    """What a dispatcher is doing.

    Attributes:
        runs: Chats that have a run.
        idle_runs: Those of them that have answered everything.
        waiting_chats: Chats where something waits, be it for a slot or for a time.
        waiting: Messages and tasks that wait.
        in_flight: Those that a run was given, and has not answered.
        answered: How many were answered since the start.
        failed: How many failed since the start.
        retries: How many were tried again since the start.
    """

    runs: int
    idle_runs: int
    waiting_chats: int
    waiting: int
    in_flight: int
    answered: int
    failed: int
    retries: int


@attrs.define(eq=False)
class _Job:
    """A run, and what it was given.

    Attributes:
        lane: The chat's.
        batch: What it is given at its start.
        given: How many messages the run was given: the number of the next one.
        open: Messages that have not ended, by their number in the run.
        errors: Messages that the agent answered with an error, and no text.
        run: The run, once it takes more.
        stopped: Whether somebody wants it stopped.
        last_turn: The id of the first message of the turn that text last belonged to.
        texts: How many texts each turn had so far, by that id.
        problem: What the callback raised.
        complaint: What the agent last said of an error.
    """

    lane: Lane
    batch: list[Message]
    given: int = 0
    open: dict[int, Message] = attrs.field(factory=dict)
    errors: list[Message] = attrs.field(factory=list)
    run: Run | None = None
    stopped: bool = False
    last_turn: int | None = None
    texts: Counter[int] = attrs.field(factory=Counter)
    problem: Exception | None = None
    complaint: str | None = None

    @property
    def isolated(self) -> bool:
        """Whether the group's session has nothing to do with it."""
        return self.batch[0].isolated

    def give(self, message: Message) -> None:
        """Note that the run was given a message."""
        self.open[self.given] = message
        self.given += 1

    def answered_by(self, pending: Sequence[int]) -> list[int]:
        """Return the numbers of those that are pending no longer."""
        return [number for number in self.open if number not in pending]

    def turn_of(self, output: AgentOutput, answered: list[int]) -> list[int]:
        """Return the numbers of the messages whose turn a text belongs to.

        None, if it is one more for a turn that is over. A part of an answer that does
        not say what it answers may answer all that was asked.
        """
        if answered:
            return answered
        if output.partial:
            last = self.given if output.answers is None else output.answers
            return [number for number in self.open if number <= last]
        return list(self.open)[:1] if self.last_turn is None else []

    def reach(self, turn: list[int]) -> list[Message]:
        """Note that text of their turn reaches the chat; return whom that is new of."""
        new = [n for n in turn if self.open[n].state == "waiting"]
        for number in new:
            self.open[number] = attrs.evolve(self.open[number], state="reached")
        return [self.open[number] for number in new]

    def next_key(self, turn: list[int]) -> str:
        """Return the key of a text: the same, if a crash makes the turn repeat."""
        if turn:
            self.last_turn = self.open[turn[0]].id
        assert self.last_turn is not None, "no turn has begun"
        key = f"{self.lane.chat_jid}/{self.last_turn}/{self.texts[self.last_turn]}"
        self.texts[self.last_turn] += 1
        return key


class Dispatcher:
    """Answers the messages of many chats. Made by :func:`open_dispatcher`.

    Attributes:
        engine: What runs the agents.
        groups: Which chat has which group; it may change.
        tasks: What the store holds of scheduled tasks, by id.
    """

    def __init__(
        self,
        engine: Engine,
        groups: Mapping[str, Group],
        store: Store,
        nursery: trio.Nursery,
        *,
        on_output: OnChatOutput,
        on_failure: OnFailure,
        max_retries: int,
    ) -> None:
        self.engine = engine
        self.groups = groups
        self.tasks: dict[str, ScheduledTask] = {}
        self._on_output = on_output
        self._on_failure = on_failure
        self._max_retries = max_retries
        self._store = store
        self._nursery = nursery
        self._queue = Queue(engine.settings.max_concurrent)
        self._jobs: dict[str, _Job] = {}
        self._orphans: dict[str, list[Message]] = {}
        self._next_id = 1
        self._sessions: dict[str, str] = {}
        self._changed = trio.Event()
        self._done = trio.Event()
        self._giving_up = 0
        self._totals: Counter[str] = Counter()

    async def submit(self, chat_jid: str, text: str) -> int:
        """Take a message, to be answered in its turn; it is in the store then.

        Returns:
            The message's id, which is in the keys of its outputs.

        Raises:
            UnknownChatError: If no group belongs to the chat.
            RuntimeError: If the dispatcher is closed.
        """
        lane = self._lane(chat_jid)
        message = Message(id=self._new_id(), chat_jid=chat_jid, text=well_formed(text))
        await self._enqueue(message, lane, {})
        return message.id

    async def submit_task(
        self, task: ScheduledTask, *, then: ScheduledTask | None = None
    ) -> None:
        """Take a task, to be run in its turn; it is in the store then.

        Nothing happens if it waits or runs already.

        Args:
            task: What to run now, whatever its schedule says.
            then: What the store keeps of it, from the same moment on.

        Raises:
            UnknownChatError: If no group belongs to its chat, or no chat to its group.
            RuntimeError: If the dispatcher is closed.
        """
        chat_jid = self.chat_of(task)
        lane = self._lane(chat_jid)
        tasks = {then.id: then} if then else {}
        job = self._jobs.get(chat_jid)
        held = [*lane.tasks, *(job.batch if job else ())]
        if any(message.task_id == task.id for message in held):
            log.debug("task %s waits or runs already", task.id)
            await self.write_tasks(tasks)
            return
        message = Message(
            id=self._new_id(),
            chat_jid=chat_jid,
            text=well_formed(task.prompt),
            task_id=task.id,
            isolated=task.context_mode == "isolated",
        )
        await self._enqueue(message, lane, tasks)

    def chat_of(self, task: ScheduledTask) -> str:
        """Return the chat that gets a task's answers.

        Raises:
            UnknownChatError: If no group belongs to its chat, or no chat to its group.
        """
        folder = task.group_folder.casefold()
        for chat_jid, group in self.groups.items():
            if chat_jid == task.chat_jid or (
                not task.chat_jid and group.folder.casefold() == folder
            ):
                return chat_jid
        raise UnknownChatError(task.chat_jid or task.group_folder)

    async def write_tasks(self, tasks: Mapping[str, ScheduledTask | None]) -> None:
        """Keep tasks in the store, by id; None removes one."""
        await self._store.write(Change(tasks=tasks))
        self._note_tasks(tasks)

    def stop(self, chat_jid: str) -> None:
        """Stop what an agent does for a chat, and give up all that waits for one there.

        The messages fail. Tasks that wait do not.

        Raises:
            UnknownChatError: If no group belongs to the chat.
        """
        lane = self._open_lane(chat_jid)
        if job := self._jobs.get(chat_jid):
            job.stopped = True
            if job.run is not None:
                job.run.stop()
        if dropped := lane.remove(lane.messages):
            self._start_giving_up(dropped, "Stopped")
        self._queue.forget_empty(lane)

    async def wait_idle(self) -> None:
        """Wait until nothing waits here, and no agent owes an answer."""
        await trio.lowlevel.checkpoint()
        while self._is_busy():
            await self._changed.wait()

    def statistics(self) -> DispatcherStatistics:
        """Return what it is doing."""
        lanes = self._queue.lanes.values()
        return DispatcherStatistics(
            runs=len(self._jobs),
            idle_runs=sum(lane.state is RunState.IDLE for lane in lanes),
            waiting_chats=sum(bool(lane.tasks or lane.messages) for lane in lanes),
            waiting=sum(len(lane.tasks) + len(lane.messages) for lane in lanes),
            in_flight=sum(
                len(job.open) + len(job.errors) for job in self._jobs.values()
            ),
            answered=self._totals["answered"],
            failed=self._totals["failed"],
            retries=self._totals["retries"],
        )

    # From here on, what only open_dispatcher() and its own tasks call.

    def begin(self, contents: Contents) -> None:
        """Take up what the store holds."""
        self._next_id = contents.next_id
        self._sessions.update(contents.sessions)
        self.tasks.update(contents.tasks)
        ended: dict[str, list[Message]] = {}
        for message in contents.messages.values():
            waits = self._orphans if message.state == "waiting" else ended
            waits.setdefault(message.chat_jid, []).append(message)
        for messages in ended.values():
            self._start_giving_up(messages, "The host ended before the answer")
        for chat_jid in list(self._orphans):
            if chat_jid in self.groups:
                self._lane(chat_jid)
            else:
                log.warning("messages wait for a chat that no group belongs to")
        self._nursery.start_soon(self._decide)

    async def shut_down(self, seconds: float) -> None:
        """Begin nothing more, and give agents so long to answer."""
        self._queue.closed = True
        self._wake()
        with trio.move_on_after(seconds):
            await self._done.wait()

    def _lane(self, chat_jid: str) -> Lane:
        if self._queue.closed:
            raise RuntimeError("the dispatcher is closed")
        return self._open_lane(chat_jid)

    def _open_lane(self, chat_jid: str) -> Lane:
        group = self.groups.get(chat_jid)
        if group is None:
            raise UnknownChatError(chat_jid)
        lane = self._queue.lane(chat_jid, group.folder.casefold())
        lane.add(self._orphans.pop(chat_jid, ()))
        return lane

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _is_busy(self) -> bool:
        return bool(self._giving_up) or any(
            lane.tasks or lane.messages or lane.state not in _AT_REST
            for lane in self._queue.lanes.values()
        )

    async def _enqueue(
        self,
        message: Message,
        lane: Lane,
        tasks: Mapping[str, ScheduledTask | None],
    ) -> None:
        await self._store.write(Change(put=[message], tasks=tasks))
        self._note_tasks(tasks)
        # It may have been forgotten in the meantime.
        self._queue.lane(lane.chat_jid, lane.group_key).add([message])
        self._wake()

    def _note_tasks(self, tasks: Mapping[str, ScheduledTask | None]) -> None:
        for task_id, task in tasks.items():
            self.tasks.pop(task_id, None)
            if task is not None:
                self.tasks[task_id] = task

    def _wake(self) -> None:
        self._changed.set()

    async def _write(self, change: Change) -> None:
        # What has happened has happened: a cancellation must not make us forget it.
        with trio.CancelScope(shield=True):
            await self._store.write(change)

    async def _decide(self) -> None:
        """Do what the queue says, whenever something has changed."""
        while self._jobs or self._giving_up or not self._queue.closed:
            if self._changed.is_set():
                # Not when only time has passed: others wait for it, too.
                self._changed = trio.Event()
            now = trio.current_time()
            while begun := self._queue.begin(now):
                self._begin(*begun)
            for lane, message in self._queue.to_send(now):
                job = self._jobs.get(lane.chat_jid)
                # While others were sent, this one may have been given up, or its run.
                if not (job and job.run and message in lane.messages) or lane.alone:
                    continue
                # It waits until it is sent: its run may end meanwhile.
                if await self._send(job, job.run, message):
                    lane.remove([message])
            for lane in self._queue.to_finish(now):
                self._finish(self._jobs[lane.chat_jid])
            with trio.move_on_after(self._queue.next_due(now) - now):
                await self._changed.wait()
        self._done.set()

    def _begin(self, lane: Lane, batch: list[Message]) -> None:
        job = self._jobs[lane.chat_jid] = _Job(lane, batch)
        self._nursery.start_soon(self._serve, job)

    async def _send(self, job: _Job, run: Run, message: Message) -> bool:
        """Put a message into a live run; tell whether it fits."""
        try:
            await run.send(message.text)
        except (RunClosedError, FollowUpRefusedError) as exc:
            log.info("cannot send to %s: %s", run, exc)
            job.lane.alone = True
            return False
        job.give(message)
        if job.lane.state is RunState.IDLE:
            job.lane.state = RunState.WORKING
        return True

    def _finish(self, job: _Job) -> None:
        job.lane.state = RunState.LEAVING
        if job.run is not None:
            job.run.finish()

    async def _serve(self, job: _Job) -> None:
        """See messages through a run, and to their end or their next one."""
        try:
            await self._conclude(job, await self._converse(job))
        except BaseException:
            # Cancelled, most likely, perhaps in a callback that has said half of it.
            reached = [m for m in job.open.values() if m.state == "reached"]
            await self._write(Change(put=reached))  # noqa: ASYNC102 - shields itself
            raise
        del self._jobs[job.lane.chat_jid]
        self._queue.end(job.lane)
        self._wake()

    async def _converse(self, job: _Job) -> RunResult:
        """Run an agent for the messages, and return how that ended."""
        first, *others = job.batch
        job.give(first)
        group = self.groups.get(first.chat_jid)
        fresh = first.isolated or first.attempts >= _FRESH_SESSION_AFTER
        try:
            if group is None:
                raise UnknownChatError(first.chat_jid)
            async with self.engine.open_run(
                group,
                first.text,
                chat_jid=first.chat_jid,
                session_id=None if fresh else self._sessions.get(job.lane.group_key),
                is_scheduled_task=first.task_id is not None,
                single_turn=first.task_id is not None,
            ) as run:
                for message in others:
                    if not await self._send(job, run, message):
                        job.lane.add([message])
                job.run = run
                if job.stopped:
                    run.stop()
                elif job.lane.state is RunState.LEAVING:
                    run.finish()
                self._wake()
                await self._listen(job, run)
        except _CANNOT_START as exc:
            for message in others:
                job.give(message)
            return self._no_run(first.chat_jid, Ending.NOT_STARTED, str(exc))
        if run.result.status == "success":
            await self._end(job, [], run.result.new_session_id)
        if job.problem is None:
            return run.result
        problem = f"on_output raised {job.problem!r}"
        return attrs.evolve(run.result, status="error", error=problem)

    async def _listen(self, job: _Job, run: Run) -> None:
        async for output in run:
            await self._take(job, run, output)
            if job.problem is not None:
                return
            if not run.pending and job.lane.state is RunState.WORKING:
                job.lane.state = RunState.IDLE
                job.lane.idle_since = trio.current_time()
            self._wake()

    async def _take(self, job: _Job, run: Run, output: AgentOutput) -> None:
        """Deal with one output: say it, then note that it was said."""
        answered = job.answered_by(run.pending)
        if output.result is None:
            if output.status == "error":
                # They are tried again once this run is over, which it should be soon.
                job.complaint = output.error or "The agent reported an error"
                job.errors += [job.open.pop(number) for number in answered]
                self._finish(job)
            elif answered:
                await self._end(job, answered, output.new_session_id)
            return
        turn = job.turn_of(output, answered)
        key = job.next_key(turn)
        new = job.reach(turn)
        try:
            await self._on_output(job.lane.chat_jid, output, key)
        except Exception as exc:
            # Its text may hold anything, a bot's token included.
            log.error("on_output raised %s", type(exc).__name__)  # noqa: TRY400
            log.debug("it was", exc_info=exc)
            job.problem = exc
            return
        if answered:
            await self._end(job, answered, output.new_session_id)
        elif new:
            await self._write(Change(put=new))

    async def _end(
        self, job: _Job, answered: list[int], session_id: str | None
    ) -> None:
        """Note that messages were answered, and the session that knows of it."""
        folder, sessions = job.lane.group_key, {}
        if session_id not in {None, self._sessions.get(folder)} and not job.isolated:
            sessions[folder] = session_id
        ended = [job.open[number].id for number in answered]
        if ended or sessions:
            await self._write(Change(ended=ended, sessions=sessions))
        self._sessions.update(sessions)
        self._totals["answered"] += len(answered)
        for number in answered:
            del job.open[number]

    async def _conclude(self, job: _Job, result: RunResult) -> None:
        """Have what was not answered wait for another run, or fail."""
        left = sorted([*job.errors, *job.open.values()], key=lambda message: message.id)
        failed, again = [], []
        for message in left:
            if (
                job.stopped
                or message.state == "reached"
                or message.attempts >= self._max_retries
            ):
                failed.append(attrs.evolve(message, state="failed"))
            else:
                again.append(attrs.evolve(message, attempts=message.attempts + 1))
        if left:
            await self._write(Change(put=[*failed, *again]))
        job.open.clear()
        job.errors.clear()
        job.lane.suspicious = result.ending is not Ending.NOT_STARTED
        for message in again:
            delay = RETRY_DELAY * 2 ** (message.attempts - 1)
            job.lane.add([message], trio.current_time() + delay)
        self._totals["retries"] += len(again)
        if failed and result.status == "success":
            # As for others, that is.
            result = attrs.evolve(result, status="error", error=job.complaint)
        if failed or job.problem is not None:
            await self._fail(job.lane.chat_jid, failed, result)

    def _start_giving_up(self, messages: list[Message], problem: str) -> None:
        self._giving_up += 1
        self._nursery.start_soon(self._give_up, messages, problem)

    async def _give_up(self, messages: list[Message], problem: str) -> None:
        """Have the messages of a chat fail that no run has."""
        chat_jid = messages[0].chat_jid
        failed = [attrs.evolve(message, state="failed") for message in messages]
        await self._write(Change(put=failed))
        result = self._no_run(chat_jid, Ending.STOPPED, problem)
        await self._fail(chat_jid, failed, result)
        self._giving_up -= 1
        self._wake()

    async def _fail(
        self, chat_jid: str, messages: Sequence[Message], result: RunResult
    ) -> None:
        """Say that messages have failed; the store knows already."""
        texts = tuple(message.text for message in messages)
        try:
            await self._on_failure(chat_jid, texts, result)
        except Exception as exc:
            log.error("on_failure raised %s", type(exc).__name__)  # noqa: TRY400
            log.debug("it was", exc_info=exc)
        self._totals["failed"] += len(messages)
        await self._write(Change(ended=[message.id for message in messages]))

    def _no_run(self, chat_jid: str, ending: Ending, problem: str) -> RunResult:
        """Make the result of a run that there was not, or is no more."""
        group = self.groups.get(chat_jid)
        logs = Path(self.engine.settings.data_dir, "logs")
        return RunResult(
            status="error",
            error=problem,
            ending=ending,
            exit_code=None,
            duration=0,
            outputs=0,
            dropped_frames=0,
            unanswered=(),
            stdout_truncated=False,
            stderr_truncated=False,
            log_path=logs / group.folder if group else logs,
        )


@asynccontextmanager
async def open_dispatcher(
    engine: Engine,
    groups: Mapping[str, Group],
    on_output: OnChatOutput,
    on_failure: OnFailure,
    store: Store,
    *,
    max_retries: int = MAX_RETRIES,
    shutdown_timeout: float | None = None,
) -> AsyncIterator[Dispatcher]:
    """Open a dispatcher for as long as the block takes.

    It takes up what the store still holds. When the block is left, nothing more begins,
    and agents may answer what they were asked; what is unanswered then stays in the
    store. When the block raises or is cancelled, all runs are stopped at once.

    A message ends once: answered, or failed after *max_retries* more tries. Without a
    crash of the host it is answered at most once; a crash while a callback is at work
    repeats the turn that each group was at, with the same keys. Once text of a turn has
    reached the callback, its messages are not asked again: they fail if that was not
    all of it.

    Args:
        engine: What runs the agents; at most :attr:`Settings.max_concurrent` at a time.
        groups: Which chat has which group. Chats may be added later.
        on_output: Awaited with the chat, each output that has text, and that text's
            key, ``<chat>/<message id>/<n>``: the n-th text in the turn of that message.
            An exception of it stops the run and goes to *on_failure*.
        on_failure: Awaited with the chat, the texts of messages that have failed, and
            how their last run has ended. After a failure of *on_output* with text that
            was no message's first answer, there may be none.
        store: Where everything is kept that must not be lost.
        max_retries: How often a message is tried again before it fails: after 5 s, and
            each time twice as much.
        shutdown_timeout: Seconds that agents have for their last answers; by default
            :attr:`Settings.close_grace`.

    Raises:
        StoreBusyError: If another dispatcher has the store.
        ValueError: If *max_retries* is below 0.
    """
    if max_retries < 0:
        raise ValueError(f"max_retries must be at least 0, not {max_retries}")
    if shutdown_timeout is None:
        shutdown_timeout = engine.settings.close_grace
    contents = await store.open()
    try:
        async with open_bare_nursery() as nursery:
            dispatcher = Dispatcher(
                engine,
                groups,
                store,
                nursery,
                on_output=on_output,
                on_failure=on_failure,
                max_retries=max_retries,
            )
            dispatcher.begin(contents)
            try:
                yield dispatcher
                await dispatcher.shut_down(shutdown_timeout)
            finally:
                nursery.cancel_scope.cancel()
    finally:
        await store.close()  # noqa: ASYNC102 - shields itself
