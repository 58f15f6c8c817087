"""One run: an agent, its pipes, its outputs and its deadline, in one nursery.

::

    engine's nursery
      supervise()                shielded: only stop() and the clock end a run early
        _read_stdout()           bytes, frames, outputs; hands over one at a time
        _read_stderr()           keeps head and tail
        write_words()            the one writer to stdin
        _until_exit()            the process, under the scope whose deadline is the
                                 agent's patience; then the stop ladder

Whoever holds the run (``open_run``, ``engine.run``, the engine) ends it by ``stop()``,
so cancellation and errors of the caller need no way into the nursery, and what goes
wrong in here has no way out but the result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import trio

from ._errors import NotStartedError, RunClosedError
from ._events import (
    EventHub,
    RunDeadlineMoved,
    RunEnded,
    RunEvent,
    RunFollowUp,
    RunOutput,
    RunStarted,
    RunStopping,
)
from ._handover import Handover
from ._markers import MarkerParser
from ._models import (
    AdditionalMount,
    AgentOutput,
    DroppedFrame,
    Ending,
    Group,
    RunResult,
    Usage,
)
from ._runlog import Capture
from ._runtimes import RUNTIME_FAILURES, Container, ContainerSpec, Runtime
from ._settings import MIB, Settings
from ._stdin import Words, write_words
from ._teardown import Supervised, bring_down
from ._text import one_line
from ._turns import State, Then, Turns

#: How much is read of a pipe when the time for it is over: far more than it holds.
_OVERTIME_BYTES: Final = 16 * MIB
#: In how many rounds of the event loop a read gets what is there: it takes two.
_READ_ROUNDS: Final = 5
#: How much of stderr an error quotes, as NanoClaw does.
_QUOTED_STDERR: Final = 200
#: Enough of stderr to find a runtime's own message in.
_KEPT_STDERR: Final = 4096
#: Seconds between two looks for who iterated over a run, in the long run.
_TAKER_INTERVAL: Final = 60.0

_KILLED: Final = 128 + 9


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Says in every record which group and run it is about."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Put group and run before the message, and beside it."""
        extra = self.extra or {}
        kwargs["extra"] = {**extra, **kwargs.get("extra", {})}
        return f"[{extra['group']} {extra['run']}] {msg}", kwargs


@attrs.frozen(kw_only=True)
class Captures:
    """What is kept of a run's streams."""

    stdout: Capture
    stderr: Capture


@attrs.frozen(kw_only=True)
class RunStatistics:
    """What a live run is doing.

    Attributes:
        group: The folder of its group.
        run: Its id.
        state: ``working``, ``answered``, ``waiting``, ``leaving`` or ``stopping``.
        age: Seconds since its start.
        idle: Seconds since its agent's last sign of life; heartbeats count.
        outputs: How many were delivered, or are being delivered.
        usage: What it has asked of the API so far; None if it has no way there.
        process: The host's id of the first process in its container, whose namespace
            of processes it has for itself; None if that is not known.
    """

    group: str
    run: str
    state: State | Literal["stopping"]
    age: float
    idle: float
    outputs: int
    usage: Usage | None
    process: int | None


class _Pipe:
    """An agent's stdout or stderr; once it has exited, read only for so long."""

    def __init__(self, stream: trio.abc.ReceiveStream, drain_grace: float) -> None:
        self._stream = stream
        self._left = drain_grace
        self._overtime = _OVERTIME_BYTES
        self._draining_since = math.inf
        self._scope = trio.CancelScope()

    def drain(self) -> None:
        """Begin to count the time that is spent on reading."""
        self._draining_since = trio.current_time()
        self._scope.deadline = self._draining_since + self._left

    async def read(self) -> bytes:
        """Return what comes next; nothing at the end."""
        started = trio.current_time()
        chunk = b""
        with trio.CancelScope() as self._scope:
            if started >= self._draining_since:
                self._scope.deadline = started + self._left
            chunk = await self._receive()
        since = max(started, self._draining_since)
        self._left -= max(0, trio.current_time() - since)
        if self._scope.cancelled_caught and self._overtime > 0:
            chunk = await self._receive_at_once()
            self._overtime -= len(chunk)
        return chunk

    async def _receive(self) -> bytes:
        # A broken stream is as good as its end: nothing more will come.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            return bytes(await self._stream.receive_some())
        return b""

    async def _receive_at_once(self) -> bytes:
        """Return what is there already. That time ran out may be our own doing.

        It gets rounds of the event loop rather than time, which a task of the
        application that blocks the loop would use up.
        """
        chunk = b""

        async def receive() -> None:
            nonlocal chunk
            chunk = await self._receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for _ in range(_READ_ROUNDS):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        return chunk


class Run:
    """A live run: iterate over it for its outputs, send it follow-ups, end it.

    It is its own iterator. The iteration ends when the run is over; then
    :attr:`result` is there.

    Attributes:
        id: Unique.
        group: Whose run it is.
        container_name: What the runtime calls the container.
    """

    def __init__(
        self,
        *,
        run_id: str,
        group: Group,
        container_name: str,
        settings: Settings,
        runtime: Runtime,
        turns: Turns,
        words: Words,
        single_turn: bool,
        refused_mounts: Sequence[tuple[AdditionalMount, str]],
        open_port: Callable[[Container], Awaitable[object]] | None,
        count_usage: Callable[[], Usage | None],
        events: EventHub,
        log_path: Path,
        logger: RunLogger,
    ) -> None:
        self.id = run_id
        self.group = group
        self.container_name = container_name
        self._container: Container | None = None
        self.captures = Captures(
            # Outputs are in the log only on demand, and then not for nothing here.
            stdout=Capture(settings.max_log_bytes if settings.log_text else 0),
            stderr=Capture(settings.max_log_bytes),
        )
        self._settings = settings
        self._runtime = runtime
        self._turns = turns
        self._words = words
        self._single_turn = single_turn
        self._refused_mounts = tuple(refused_mounts)
        self._open_port = open_port
        self._count_usage = count_usage
        self._events = events
        self._log_path = log_path
        self._logger = logger
        self._handover = Handover()
        self._over = trio.Event()
        self._exited = trio.Event()
        self._patience = trio.CancelScope()
        self._delivering = False
        self._cause: Ending | None = None
        self._problem: str | None = None
        self._dropped = 0
        # Apart from the log's stderr, of which the operator may want to keep little.
        self._last_stderr = b""
        self.started = self._heard = trio.current_time()
        self.last_text: str | None = None
        """What :attr:`RunResult.result` will be."""
        self._result: RunResult | None = None
        self.begun = False
        """Whether its client process was started."""
        self.gone = True
        """Whether the container is known to be gone, or left in order."""

    def __repr__(self) -> str:
        return f"<Run {self.id} of {self.group.folder}>"

    @property
    def result(self) -> RunResult:
        """How the run ended.

        Raises:
            RuntimeError: If it has not.
        """
        if self._result is None:
            how = "was ended by a bug" if self._over.is_set() else "is not over"
            raise RuntimeError(f"run {self.id} {how}")
        return self._result

    @property
    def pending(self) -> tuple[int, ...]:
        """The numbers of the messages that got no answer yet, in order.

        The prompt's is 0, and follow-ups count on from there. While an output is being
        dealt with, what it answers is no longer among them.
        """
        return self._turns.pending

    def statistics(self) -> RunStatistics:
        """Return what it is doing."""
        now = trio.current_time()
        return RunStatistics(
            group=self.group.folder,
            run=self.id,
            state="stopping" if self._cause is not None else self._turns.state,
            age=now - self.started,
            idle=now - self._heard,
            outputs=self._handover.begun,
            usage=self._count_usage(),
            process=self._container.process if self._container else None,
        )

    async def send(self, text: str) -> None:
        """Ask the agent something more. Accepted is not answered.

        Raises:
            RunClosedError: If the run was finished or stopped, or is over.
            FollowUpRefusedError: If too much waits for the agent already.
        """
        # Before anything is queued: whoever is cancelled here has sent nothing.
        await trio.lowlevel.checkpoint()
        if self._turns.finished or self._cause is not None or self._exited.is_set():
            raise RunClosedError(self.id)
        self._words.send(self._turns.next_number, text)
        self._tell(partial(RunFollowUp, number=self._turns.next_number))
        self._turns.ask(text)
        self._restart_clock()

    def finish(self) -> None:
        """Let the agent answer what it was asked, then leave. No more follow-ups."""
        if self._turns.finished or self._exited.is_set():
            return
        self._turns.finished = True
        try:
            self._words.finish()
        except RUNTIME_FAILURES as exc:
            # The clock runs all the same, so the agent goes the hard way.
            self._logger.warning("cannot tell the agent to finish: %s", exc)
        # An agent that is working does not get more time for that.
        if not self._turns.unanswered:
            self._restart_clock()

    def stop(self) -> None:
        """Stop the agent now, and have it killed if it does not listen."""
        self._end(Ending.STOPPED)

    def leave(self) -> None:
        """Stop, and discard the outputs that are still to come."""
        self.stop()
        self._handover.abandon()

    async def wait(self) -> RunResult:
        """Wait until the run is over. Outputs that nobody asks for are discarded.

        While another task is busy with an output, that task may ask for the next one.
        """
        seconds = 1.0
        with self._handover.waiting():
            while True:
                with trio.move_on_after(seconds):
                    await self._over.wait()
                    return self.result
                # Whoever iterated over the run may have gone without a word.
                self._handover.discard_if_unwanted()
                seconds = min(2 * seconds, _TAKER_INTERVAL)

    async def wait_over(self) -> None:
        """Wait until the run is over, without a say in its outputs."""
        await self._over.wait()

    def __aiter__(self) -> Run:
        return self

    async def __anext__(self) -> AgentOutput:
        if self._over.is_set():
            await trio.lowlevel.checkpoint()
            raise StopAsyncIteration
        with suppress(trio.EndOfChannel):
            return await self._handover.take()
        await self._over.wait()
        raise StopAsyncIteration

    # From here on, what only the engine and the run's own tasks call.

    async def start(self, spec: ContainerSpec) -> Container:
        """Start the container, unless the run is stopped before.

        Raises:
            NotStartedError: If it could not be started, or not soon.
            UnsafePathError: If a mount cannot be told to the runtime.
        """
        seconds = self._settings.command_timeout
        # Who knows what a runtime that is interrupted has begun.
        self.gone = False
        try:
            with trio.move_on_after(seconds) as self._patience:
                container = await self._runtime.start(spec)
                self.gone = True
                return container
        except RUNTIME_FAILURES as exc:
            # It says itself that it has begun nothing.
            self.gone = True
            if isinstance(exc, OSError):
                problem = f"cannot start {spec.name}: {exc}"
                raise NotStartedError(problem) from exc
            raise
        if self._cause is not None:
            raise NotStartedError(f"{spec.name} was stopped before it had started")
        problem = f"{self._runtime.name} started no container within {seconds:g} s"
        raise NotStartedError(problem)

    def begin(self) -> None:
        """Note that its client process was started."""
        self.begun = True
        self._tell(RunStarted)

    async def supervise(
        self, supervised: Supervised, conclude: Callable[[RunResult], Awaitable[object]]
    ) -> None:
        """See the container through to its end. Cannot be cancelled, only stopped.

        Args:
            supervised: The started container.
            conclude: Awaited with the result, before anybody else gets to see it.
        """
        container = self._container = supervised.container
        stdout = _Pipe(container.stdout, self._settings.drain_grace)
        stderr = _Pipe(container.stderr, self._settings.drain_grace)
        with trio.CancelScope(shield=True):
            try:
                async with trio.open_nursery() as nursery:
                    async with trio.open_nursery() as readers:
                        readers.start_soon(self._read_stdout, stdout, supervised)
                        readers.start_soon(self._read_stderr, stderr)
                        nursery.start_soon(self._converse, supervised)
                        await self._until_exit(supervised)
                        self._exited.set()
                        stdout.drain()
                        stderr.drain()
                    nursery.cancel_scope.cancel()
                result = self._conclude(supervised)
                await conclude(result)
                self._result = result
                ended = partial(RunEnded, ending=result.ending, status=result.status)
                self._tell(ended)
            finally:
                try:
                    with trio.move_on_after(self._settings.command_timeout):
                        await container.aclose()
                finally:
                    self._handover.close()
                    self._over.set()

    def _end(self, cause: Ending, problem: str | None = None) -> None:
        if self._cause is None and not self._over.is_set():
            self._cause = cause
            self._problem = problem
            self._patience.cancel()
            if self.begun:
                self._tell(partial(RunStopping, ending=cause))

    def _tell(self, event: Callable[..., RunEvent]) -> None:
        self._events.emit(
            lambda now: event(group=self.group.folder, run=self.id, time=now)
        )

    def _restart_clock(self) -> None:
        seconds = math.inf if self._delivering else self._turns.patience()[0]
        self._patience.deadline = trio.current_time() + seconds
        self._tell(partial(RunDeadlineMoved, deadline=self._patience.deadline))

    async def _until_exit(self, supervised: Supervised) -> None:
        """Wait for the process; if patience or somebody ends it, bring it down."""
        try:
            while self._cause is None and supervised.exit_code is None:
                with trio.CancelScope() as self._patience:
                    self._restart_clock()
                    await supervised.wait()
                if supervised.lost is not None:
                    self._end(Ending.FAILED, f"Container was lost: {supervised.lost}")
                    break
                # A frame may have moved the deadline after it had fired.
                late = trio.current_time() >= self._patience.deadline
                if late and supervised.exit_code is None:
                    self._lose_patience()
        finally:
            if supervised.exit_code is None:
                self._logger.info("stopping %s", self.container_name)
                self.gone = await bring_down(  # noqa: ASYNC102 - shields itself
                    supervised, self._runtime, self.id, self._settings, self._logger
                )

    def _lose_patience(self) -> None:
        then = self._turns.patience()[1]
        if then is Then.FINISH:
            self.finish()
        else:
            self._end(Ending.IDLE if then is Then.IDLE else Ending.TIMED_OUT)

    async def _converse(self, supervised: Supervised) -> None:
        """Write to the agent, once it is known to see only what it may see."""
        seconds = self._settings.command_timeout
        try:
            with trio.move_on_after(seconds) as scope:
                await supervised.container.verify()
                if self._open_port is not None:
                    await self._open_port(supervised.container)
        except RUNTIME_FAILURES as exc:
            self._end(Ending.NOT_STARTED, str(exc))
            return
        if scope.cancelled_caught:
            problem = (
                f"the container's mounts could not be looked at within {seconds:g} s"
            )
            self._end(Ending.NOT_STARTED, problem)
            return
        await write_words(self._words, supervised.container.stdin, self._logger)

    async def _read_stdout(self, pipe: _Pipe, supervised: Supervised) -> None:
        parser = MarkerParser(max_frame_bytes=self._settings.max_frame_bytes)
        while chunk := await pipe.read():
            self.captures.stdout.add(chunk)
            await self._take_all(parser.feed(chunk))
        await self._take_all(parser.close())
        await self._exited.wait()
        if supervised.exit_code == 0 and (output := parser.last_line()):
            await self._take_all([output])

    async def _take_all(self, events: Sequence[AgentOutput | DroppedFrame]) -> None:
        if events:
            # As things are now that they were read: what is asked while the first of
            # them is delivered is no question that the second could answer.
            unread, later = self._words.unread(), self._turns.next_number
            for event in events:
                asked_since = range(later, self._turns.next_number)
                await self._take(event, unread.union(asked_since))

    async def _take(
        self, event: AgentOutput | DroppedFrame, unread: frozenset[int]
    ) -> None:
        if isinstance(event, DroppedFrame):
            # Once: an agent could fill the host's log with them.
            level = logging.DEBUG if self._dropped else logging.WARNING
            self._dropped += 1
            self._logger.log(
                level, "frame dropped: %s, %d bytes", event.reason, event.size
            )
            return
        self._heard = trio.current_time()
        self._turns.take(event, unread)
        if not (event.partial and event.result is None):
            self._tell(partial(RunOutput, status=event.status, partial=event.partial))
            self._delivering = True
            self._restart_clock()
            try:
                await self._handover.give(event)
            finally:
                self._delivering = False
        self._restart_clock()
        if self._single_turn and not self._turns.unanswered:
            self.finish()

    async def _read_stderr(self, pipe: _Pipe) -> None:
        # Pushes no deadline out: agents chatter on stderr without getting anywhere.
        while chunk := await pipe.read():
            self.captures.stderr.add(chunk)
            self._last_stderr = (self._last_stderr + chunk)[-_KEPT_STDERR:]
            if self._logger.isEnabledFor(logging.DEBUG):
                for line in chunk.decode(errors="replace").splitlines():
                    self._logger.debug("stderr: %s", one_line(line))

    def _conclude(self, supervised: Supervised) -> RunResult:
        ending, problem = self._ending(supervised)
        status, error = self._turns.verdict(ending, problem)
        limit = self._settings.max_log_bytes
        return RunResult(
            status=status,
            result=self.last_text,
            new_session_id=self._turns.session_id,
            error=error,
            ending=ending,
            exit_code=supervised.exit_code,
            duration=trio.current_time() - self.started,
            outputs=self._handover.begun,
            dropped_frames=self._dropped,
            unanswered=self._turns.unanswered,
            stdout_truncated=self.captures.stdout.total > limit,
            stderr_truncated=self.captures.stderr.total > limit,
            refused_mounts=self._refused_mounts,
            usage=self._count_usage(),
            log_path=self._log_path,
        )

    def _ending(self, supervised: Supervised) -> tuple[Ending, str | None]:
        """Return the first row of the endings' table that fits, and what to say."""
        code = supervised.exit_code
        if self._cause is Ending.NOT_STARTED:
            return self._cause, self._problem
        said = self._last_stderr.decode(errors="replace")
        if code is not None and not self.captures.stdout.total:
            message = supervised.container.start_failure(code, said)
            if message is not None:
                return Ending.NOT_STARTED, message
        if self._cause is not None:
            return self._cause, self._problem
        if code == 0:
            return Ending.EXITED, None
        said = said[-_QUOTED_STDERR:]
        if code == _KILLED:
            limit = f"{self._settings.memory / MIB:g} MiB"
            said = f"killed, most likely out of memory (limit {limit}). {said}"
        return Ending.FAILED, f"Container exited with code {code}: {said}"
