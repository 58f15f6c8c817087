"""The engine: what runs share, and what is left of them cleaned up."""

from __future__ import annotations

import logging
import operator
import secrets
import shutil
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
)
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs
import trio
from trio_util import AsyncValue

from ._access import Access
from ._agent import agent_python
from ._bwrap import BwrapRuntime
from ._codec import ContainerInput, encode_groups, encode_input, encode_tasks
from ._credentials import CredentialFile
from ._docker import DockerRuntime
from ._errors import NotStartedError, RuntimeUnavailableError
from ._events import EventHub, Events
from ._flavours import FLAVOURS
from ._groups import Places, open_places
from ._hostfs import Directory
from ._mailbox import Requests
from ._models import AgentOutput, AvailableGroup, Group, RunResult, ScheduledTask
from ._outfit import Outfitter
from ._process import in_thread
from ._proxy import Proxy, open_proxy
from ._run import Run, RunLogger, RunStatistics
from ._runlog import LogEntry, log_name, prune_logs, render_log
from ._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    RUNTIME_FAILURES,
    Runtime,
    ask_within,
)
from ._settings import Settings
from ._status import open_status, serve_status
from ._stdin import open_words
from ._sweep import EngineFile, sweep
from ._teardown import Janitor, Supervised
from ._turns import Timeouts, Turns
from ._upkeep import check_space, empty_trash, watch_space

T = TypeVar("T")
OnOutput = Callable[[AgentOutput], Awaitable[object]]

log = logging.getLogger(__name__)


def choose_runtime(settings: Settings) -> Runtime:
    """Return the runtime that the settings name.

    ``auto`` is docker or podman, if installed, and bwrap only if neither is: a daemon
    that is down is an error to mend, and no reason for a weaker sandbox.
    """
    name = settings.runtime
    if name == "auto":
        name = next((n for n in ("docker", "podman") if shutil.which(n)), "bwrap")
    # What has a program of its own to be installed.
    claude = settings.agent == "claude" and settings.agent_command is None
    if name == "bwrap":
        return BwrapRuntime(python=agent_python() if claude else None)
    agent = settings.agent if claude else None
    return DockerRuntime(FLAVOURS[name], image=settings.image, agent=agent)


@attrs.frozen(kw_only=True)
class EngineStatistics:
    """What an engine is doing.

    Attributes:
        runs: Of each live run, the oldest first.
        starting: How many are still starting.
    """

    runs: tuple[RunStatistics, ...]
    starting: int


class Engine:
    """Runs agents in containers. Made by :func:`open_engine`.

    Attributes:
        settings: What it was opened with.
        runtime: What runs the containers.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        runtime: Runtime,
        places: Places,
        credentials: CredentialFile,
        proxy: Proxy,
        labels: Mapping[str, str],
        nursery: trio.Nursery,
    ) -> None:
        self.settings = settings
        self.runtime = runtime
        self._places = places
        self._proxy = proxy
        self._outfitter = Outfitter(
            places=places,
            runtime=runtime,
            proxy=proxy,
            credentials=credentials,
            labels=labels,
            serve=self._serve,
            check_open=self._check_open,
        )
        self._nursery = nursery
        self._runs: AsyncValue[tuple[Run, ...]] = AsyncValue(())
        self._events = EventHub()
        self._closing = False
        self._chats: dict[str, Group] = {}
        self._janitor = Janitor(runtime, labels[LABEL_ENGINE], settings.command_timeout)
        nursery.start_soon(self._janitor.work)
        nursery.start_soon(watch_space, places, self._runs)
        nursery.start_soon(empty_trash, places, self._offload)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The live runs, the oldest first; not those that are still starting."""
        return tuple(run for run in self._runs.value if run.begun)

    @asynccontextmanager
    async def open_run(
        self,
        group: Group,
        prompt: str,
        *,
        chat_jid: str,
        session_id: str | None = None,
        is_scheduled_task: bool = False,
        single_turn: bool = False,
    ) -> AsyncIterator[Run]:
        """Run an agent for as long as the block takes; leaving the block stops it.

        An exception of the block comes out as itself, after the container is gone.

        Args:
            group: Whose agent.
            prompt: What to ask first.
            chat_jid: The chat that asks, for the agent to know.
            session_id: The session to resume; see :attr:`RunResult.new_session_id`.
            is_scheduled_task: Whether a schedule asks, not a person.
            single_turn: Finish the run once nothing is unanswered.

        Raises:
            NotStartedError: If the container could not be started.
            CredentialsError: If there is no credential for the agent's API.
            GroupBusyError: If the group has a live run.
            UnsafePathError: If a place on the host cannot be trusted.
            RuntimeError: If the engine is closed.
        """
        self._chats[chat_jid] = group
        container_input = ContainerInput(
            prompt=prompt,
            session_id=session_id,
            group_folder=group.folder,
            chat_jid=chat_jid,
            is_main=group.is_main,
            is_scheduled_task=is_scheduled_task or None,
            assistant_name=self.settings.assistant_name,
            lifeline=self.settings.stdin == "lifeline",
        )
        run = await self._start(group, container_input, single_turn=single_turn)
        try:
            yield run
        finally:
            run.leave()
            with trio.CancelScope(shield=True):
                await run.wait_over()

    async def run(
        self,
        group: Group,
        prompt: str,
        *,
        chat_jid: str,
        on_output: OnOutput | None = None,
        session_id: str | None = None,
        is_scheduled_task: bool = False,
        single_turn: bool = True,
        task_status: trio.TaskStatus[Run] = trio.TASK_STATUS_IGNORED,
    ) -> RunResult:
        """Run an agent to its end, giving *on_output* every output, in order.

        Await it, or ``await nursery.start(partial(engine.run, ...))`` to get the
        :class:`Run` while it lives. The callback runs in the caller's task, one call at
        a time; an exception of it comes out as itself, after the container is gone.

        Args:
            group: Whose agent.
            prompt: What to ask first.
            chat_jid: The chat that asks, for the agent to know.
            on_output: Awaited with each output. Without it, the last text is
                :attr:`RunResult.result`.
            session_id: The session to resume.
            is_scheduled_task: Whether a schedule asks, not a person.
            single_turn: Finish the run once nothing is unanswered.
            task_status: Told the run once its client process runs.

        Raises:
            NotStartedError: If the container could not be started.
            CredentialsError: If there is no credential for the agent's API.
            GroupBusyError: If the group has a live run.
            UnsafePathError: If a place on the host cannot be trusted.
            RuntimeError: If the engine is closed.
        """
        async with self.open_run(
            group,
            prompt,
            chat_jid=chat_jid,
            session_id=session_id,
            is_scheduled_task=is_scheduled_task,
            single_turn=single_turn,
        ) as run:
            task_status.started(run)
            async for output in run:
                if on_output is not None:
                    await on_output(output)
                elif output.result is not None and not output.partial:
                    run.last_text = output.result
        return run.result

    async def write_tasks_snapshot(
        self, group: Group, tasks: Iterable[ScheduledTask]
    ) -> None:
        """Let the group's agent see what is scheduled, in ``current_tasks.json``.

        A reader sees the old file or the new one, never half of it.

        Args:
            group: Who is to see them.
            tasks: All tasks: main sees them all, another group only its own.

        Raises:
            UnsafePathError: If a place on the host cannot be trusted.
            RuntimeError: If the engine is closed.
        """
        folder = group.folder.casefold()
        visible = (
            task
            for task in tasks
            if group.is_main or task.group_folder.casefold() == folder
        )
        await self._write_snapshot(group, "current_tasks.json", encode_tasks(visible))

    async def write_groups_snapshot(
        self,
        group: Group,
        groups: Iterable[AvailableGroup],
        registered: Collection[str],
    ) -> None:
        """Let main's agent see which chats there are, in ``available_groups.json``.

        A reader sees the old file or the new one, never half of it.

        Args:
            group: Who is to see them: another group than main sees none.
            groups: All chats.
            registered: The JIDs of those that are groups already, besides the ones
                that say so themselves.

        Raises:
            UnsafePathError: If a place on the host cannot be trusted.
            RuntimeError: If the engine is closed.
        """
        visible = [
            attrs.evolve(
                chat, is_registered=chat.is_registered or chat.jid in registered
            )
            for chat in groups
            if group.is_main
        ]
        data = encode_groups(visible, datetime.now(UTC))
        await self._write_snapshot(group, "available_groups.json", data)

    async def _write_snapshot(self, group: Group, name: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._check_open()
        # Here and at once: a thread might outlive the directories that we hold.
        with self._places.open_ipc(group) as ipc:
            ipc.write(name, data, trash=self._places.trash, owner=self._places.owner)

    @asynccontextmanager
    async def open_requests(
        self, groups: Mapping[str, Group] | None = None
    ) -> AsyncIterator[Requests]:
        """Iterate over what agents ask for, and ``async with request:`` each.

        Args:
            groups: Which chat has which group; it may change. Mailboxes of others are
                left alone. By default those that had runs of this engine.
        """
        chats = self._chats if groups is None else groups
        requests = Requests(self._places, chats, self._offload, self._check_open)
        try:
            await trio.lowlevel.checkpoint()
            yield requests
        finally:
            requests.close()

    def statistics(self) -> EngineStatistics:
        """Return what it is doing."""
        live = self.runs
        return EngineStatistics(
            runs=tuple(run.statistics() for run in live),
            starting=len(self._runs.value) - len(live),
        )

    @asynccontextmanager
    async def open_events(self, max_buffer: int = 256) -> AsyncIterator[Events]:
        """Iterate over what happens in runs from now on, until the engine closes.

        Who reads slowly loses the oldest events, which :attr:`Events.lost` counts, and
        holds nobody up.

        Args:
            max_buffer: How many events may wait for the reader.

        Raises:
            ValueError: If *max_buffer* is below 1.
        """
        with self._events.open(max_buffer) as events:
            await trio.lowlevel.checkpoint()
            yield events

    async def plan(self, group: Group) -> list[str]:
        """Return the command line that would start a container of *group*.

        Raises:
            RuntimeUnavailableError: If its container could not reach the proxy.
            UnsafePathError: If a place on the host cannot be trusted.
        """
        with ExitStack() as stack:
            return list(self.runtime.argv(await self._outfitter.plan(group, stack)))

    async def _start(
        self, group: Group, container_input: ContainerInput, *, single_turn: bool
    ) -> Run:
        self._check_open()
        run_id = secrets.token_hex(6)
        logger = RunLogger(log, {"group": group.folder, "run": run_id})
        started = datetime.now(UTC)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._places.lock_group(group))
                check_space(self._places)
                outfit = await self._outfitter.fit_out(group, run_id, logger, stack)
                words = open_words(
                    encode_input(container_input),
                    self._places,
                    group,
                    run_id,
                    stack,
                )
                logs = stack.enter_context(self._places.open_logs(group))
            except OSError as exc:
                raise NotStartedError(f"cannot prepare the run: {exc}") from exc
            spec, access = outfit.spec, outfit.access
            run = Run(
                run_id=run_id,
                group=group,
                container_name=spec.name,
                settings=self.settings,
                runtime=self.runtime,
                turns=Turns(
                    container_input.prompt,
                    self._timeouts(group),
                    answers_then_waits=self.settings.stdin == "eof",
                ),
                words=words,
                open_port=self._outfitter.open_port(outfit),
                single_turn=single_turn,
                refused_mounts=outfit.refused,
                count_usage=lambda: access.ticket.usage if access else None,
                events=self._events,
                log_path=Path(logs.path, log_name(started, run_id)),
                logger=logger,
            )
            entry = LogEntry(
                started=started,
                group_name=group.name,
                is_main=group.is_main,
                container_name=spec.name,
                prompt_length=len(container_input.prompt),
                session_id=container_input.session_id,
                argv=partial(self.runtime.argv, spec),
                mounts=[held.mount for held in spec.mounts],
                input_text=(
                    encode_input(container_input).decode()
                    if self.settings.log_text
                    else None
                ),
                stdout=run.captures.stdout if self.settings.log_text else None,
                stderr=run.captures.stderr,
            )
            self._runs.value += (run,)
            try:
                container = await run.start(spec)
            except BaseException:
                self._forget(run)
                if not run.gone:
                    self._look_for(run)
                raise
            run.begin()
            # No checkpoint between the start and this: the container has an owner.
            keep = stack.pop_all()
            supervise = partial(
                self._supervise, entry=entry, logs=logs, keep=keep, logger=logger
            )
            self._nursery.start_soon(supervise, run, Supervised(container))
        logger.info("%s started by %s", spec.name, self.runtime.name)
        return run

    def _serve(self, access: Access, listener: trio.SocketListener) -> None:
        serve = partial(self._proxy.serve, listener, ticket=access.ticket)
        self._nursery.start_soon(serve)

    def _check_open(self) -> None:
        if self._closing:
            raise RuntimeError("the engine is closed")

    async def _supervise(
        self,
        run: Run,
        supervised: Supervised,
        *,
        entry: LogEntry,
        logs: Directory,
        keep: ExitStack,
        logger: RunLogger,
    ) -> None:
        async def conclude(result: RunResult) -> None:
            self._look_for(run)
            await self._offload(partial(self._write_log, entry, result, logs, logger))
            logger.info("%s, code %s", result.ending.value, result.exit_code)
            # Whoever sees the result can start the group's next run.
            keep.close()
            self._forget(run)
            self._nursery.start_soon(empty_trash, self._places, self._offload)

        with keep:
            try:
                await run.supervise(supervised, conclude)
            finally:
                # Long done, unless a runtime raised what it may not: then leaving the
                # engine must not wait for this run.
                self._forget(run)

    def _write_log(
        self, entry: LogEntry, result: RunResult, logs: Directory, logger: RunLogger
    ) -> None:
        try:
            logs.write(result.log_path.name, render_log(entry, result), mode=0o600)
            prune_logs(logs, self.settings.log_retention)
        except RUNTIME_FAILURES as exc:
            logger.warning("cannot write the run's log: %s", exc)

    async def _offload(self, fn: Callable[[], T]) -> T:
        """Call what may take a while in a thread, but under a mock clock here."""
        if not self.runtime.in_process:
            return await in_thread(fn)
        return fn()

    def _look_for(self, run: Run) -> None:
        self._janitor.look_for(run.id, run.container_name, insist=not run.gone)

    def _forget(self, run: Run) -> None:
        self._runs.value = tuple(live for live in self._runs.value if live is not run)

    def _timeouts(self, group: Group) -> Timeouts:
        return Timeouts(
            answer=group.container_config.timeout or self.settings.answer_timeout,
            idle=self.settings.idle_timeout,
            close=self.settings.close_grace,
        )

    async def close(self) -> bool:
        """Stop all runs and see them off; False if a container may be left."""
        self._closing = True
        for run in self._runs.value:
            run.leave()
        with trio.CancelScope(shield=True):
            await self._runs.wait_value(operator.not_)
        self._events.close()
        return await self._janitor.finish()


@asynccontextmanager
async def open_engine(
    settings: Settings | None = None, runtime: Runtime | None = None
) -> AsyncIterator[Engine]:
    """Open an engine for as long as the block takes; leaving the block stops all runs.

    An exception of the block comes out as itself. An exception group out of it is a
    bug in clawtrio.

    Args:
        settings: By default :meth:`Settings.load`.
        runtime: By default the one that the settings name.

    Raises:
        RuntimeUnavailableError: If containers cannot be run here.
        UnsafePathError: If an agent, or another user, could replace a root.
        SettingsError: If the settings make no sense.
    """
    settings = settings or Settings.load()
    runtime = runtime or choose_runtime(settings)
    credentials = CredentialFile(settings.root)
    with open_places(settings) as places:
        await ask_within(settings.command_timeout, runtime, runtime.check)
        try:
            await sweep(places, runtime)
        except RuntimeUnavailableError as exc:
            # What is left waits for the next sweep; the groups do not.
            log.warning("cannot sweep: %s", exc)
        engine_file = EngineFile(places.engines, runtime.name)
        labels = {LABEL_ROOT: places.root_id, LABEL_ENGINE: engine_file.engine_id}
        has_network = settings.network == "open"
        # A network whose making is cancelled may appear later: that is for a sweep.
        clean = not has_network

        async def make_network() -> None:
            nonlocal clean
            try:
                await runtime.open_network(labels)
            except RuntimeUnavailableError:
                clean = True
                raise

        try:
            if has_network:
                await ask_within(settings.command_timeout, runtime, make_network)
            async with (
                open_proxy(credentials, paths=settings.proxy_paths) as proxy,
                open_bare_nursery() as nursery,
            ):
                engine = Engine(
                    settings=settings,
                    runtime=runtime,
                    places=places,
                    credentials=credentials,
                    proxy=proxy,
                    labels=labels,
                    nursery=nursery,
                )
                if status := open_status(places.engines, engine_file.engine_id):
                    nursery.start_soon(serve_status, status, engine.statistics)
                try:
                    yield engine
                finally:
                    clean = await engine.close()  # noqa: ASYNC102 - shields itself
                    nursery.cancel_scope.cancel()
        finally:
            if has_network and not await _close_network(  # noqa: ASYNC102 - shielded
                settings, runtime, labels
            ):
                clean = False
            engine_file.release(clean=clean)


async def _close_network(
    settings: Settings, runtime: Runtime, labels: Mapping[str, str]
) -> bool:
    """Remove the engine's open network; False if it may be left."""
    with trio.CancelScope(shield=True):
        try:
            close = partial(runtime.close_network, labels)
            await ask_within(settings.command_timeout, runtime, close)
        except RUNTIME_FAILURES as exc:
            # It keeps what is in it apart all the same, until a sweep removes it.
            log.warning("cannot remove the network of the engine: %s", exc)
            return False
    return True


@asynccontextmanager
async def open_bare_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that does not put an exception of its block into a group."""
    with trio.CancelScope() as scope:
        manager = trio.open_nursery()
        nursery = await manager.__aenter__()
        try:
            yield nursery
        finally:
            # The nursery is told of no exception, so the block's own passes it by, nor
            # of a cancellation from outside, which it would put into a group. If a task
            # has crashed, the group with that is raised here, in place of the
            # cancellation that the block has got from it.
            scope.shield = True
            await manager.__aexit__(None, None, None)  # noqa: ASYNC102 - shielded
