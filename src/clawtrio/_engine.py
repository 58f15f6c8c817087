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
    Sequence,
)
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import attrs
import trio
from trio_util import AsyncValue

from ._access import PORT, Access, open_socket, tell
from ._agent import agent_python
from ._allowlist import AllowlistFile
from ._bwrap import BwrapRuntime
from ._codec import ContainerInput, encode_groups, encode_input, encode_tasks
from ._credentials import CredentialFile
from ._docker import DockerRuntime
from ._errors import NotStartedError, RuntimeUnavailableError
from ._flavours import FLAVOURS
from ._forbidden import Forbidden
from ._grants import Grants, WritableSources, grant_mounts
from ._groups import Places, open_places
from ._hostfs import Directory
from ._models import AgentOutput, AvailableGroup, Group, RunResult, ScheduledTask
from ._mounts import container_directory, hold_mounts
from ._process import hold_in_thread, in_thread
from ._proxy import Proxy, open_proxy
from ._run import Run, RunLogger
from ._runlog import LogEntry, log_name, prune_logs, render_log
from ._runtimes import (
    HOME,
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    RUNTIME_FAILURES,
    ContainerSpec,
    HeldMount,
    Runtime,
    ask_within,
)
from ._settings import Settings
from ._stdin import FileWords, LifelineWords, Words
from ._sweep import EngineFile, sweep
from ._teardown import Janitor, Supervised
from ._turns import Timeouts, Turns

T = TypeVar("T")
OnOutput = Callable[[AgentOutput], Awaitable[object]]

log = logging.getLogger(__name__)

#: Seconds between two looks at the free space while agents may fill the disk.
_SPACE_INTERVAL: Final = 5.0
#: How many files are deleted in one go, well below a second.
_TRASH_BATCH: Final = 5000
#: A file system can be full of empty files, too.
MIN_FREE_INODES: Final = 1024


def choose_runtime(settings: Settings) -> Runtime:
    """Return the runtime that the settings name.

    ``auto`` is docker or podman, if installed, and bwrap only if neither is: a daemon
    that is down is an error to mend, and no reason for a weaker sandbox.
    """
    name = settings.runtime
    if name == "auto":
        name = next((n for n in ("docker", "podman") if shutil.which(n)), "bwrap")
    if name == "bwrap":
        claude = settings.agent == "claude" and settings.agent_command is None
        return BwrapRuntime(python=agent_python() if claude else None)
    return DockerRuntime(FLAVOURS[name], image=settings.image)


def _for_claude(settings: Settings) -> dict[str, str]:
    """Return what our backend for Claude reads of the settings."""
    variables = {}
    if settings.agent == "claude" and settings.agent_command is None:
        if settings.model is not None:
            variables["CLAWTRIO_MODEL"] = settings.model
        if settings.partial_text:
            variables["CLAWTRIO_PARTIAL_TEXT"] = "1"
    return variables


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
        engine_id: str,
        nursery: trio.Nursery,
    ) -> None:
        self.settings = settings
        self.runtime = runtime
        self._places = places
        self._proxy = proxy
        self._credentials = credentials
        self._id = engine_id
        self._nursery = nursery
        self._runs: AsyncValue[tuple[Run, ...]] = AsyncValue(())
        self._forbidden = Forbidden(settings, fixed=[str(container_directory())])
        self._allowlist = AllowlistFile(settings, self._forbidden)
        self._writable = WritableSources()
        self._closing = False
        self._janitor = Janitor(runtime, engine_id, settings.command_timeout)
        nursery.start_soon(self._janitor.work)
        nursery.start_soon(self._watch_space)
        nursery.start_soon(self._empty_trash)

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

    def plan(self, group: Group) -> list[str]:
        """Return the command line that would start a container of *group*.

        Raises:
            UnsafePathError: If a place on the host cannot be trusted.
        """
        with ExitStack() as stack:
            run_id = "0" * 12
            granted, _ = self._grant(group, log, stack)
            access = self._open_access(group, run_id, stack)
            if access and access.listener:
                stack.callback(access.listener.socket.close)
            spec = self._specify(group, run_id, granted, access, stack)
            return list(self.runtime.argv(spec))

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
                if self._needs_credential():
                    self._credentials.require()
                granted, refused = await self._grant_soon(group, logger, stack)
                self._check_open()
                self._check_space()
                access = self._open_access(group, run_id, stack)
                self._serve(access)
                spec = self._specify(group, run_id, granted, access, stack)
                words = self._words(container_input, group, run_id, stack)
                logs = stack.enter_context(self._places.open_logs(group))
            except OSError as exc:
                raise NotStartedError(f"cannot prepare the run: {exc}") from exc
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
                single_turn=single_turn,
                refused_mounts=refused,
                count_usage=lambda: access.ticket.usage if access else None,
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
            run.begun = True
            # No checkpoint between the start and this: the container has an owner.
            keep = stack.pop_all()
            supervise = partial(
                self._supervise, entry=entry, logs=logs, keep=keep, logger=logger
            )
            self._nursery.start_soon(supervise, run, Supervised(container))
        logger.info("%s started by %s", spec.name, self.runtime.name)
        return run

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
            self._nursery.start_soon(self._empty_trash)

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

    def _needs_credential(self) -> bool:
        """Whether a run is pointless without; a user's own agent may need none."""
        return self.settings.agent_command is None and self.settings.agent != "echo"

    def _open_access(
        self, group: Group, run_id: str, stack: ExitStack
    ) -> Access | None:
        """Give a run its way to the API; None if its agent does not know of one."""
        settings = self.settings
        if settings.agent_command is None and settings.agent == "echo":
            return None
        ticket = stack.enter_context(
            self._proxy.admit(
                group.folder,
                run_id,
                max_output_tokens=settings.max_output_tokens,
                max_requests=settings.max_requests,
            )
        )
        access = tell(ticket, self._credentials.current(), f"http://127.0.0.1:{PORT}")
        return open_socket(access, self._places, f"{self._id}-{run_id}", stack)

    def _serve(self, access: Access | None) -> None:
        if access and access.listener:
            serve = partial(self._proxy.serve, access.listener, ticket=access.ticket)
            self._nursery.start_soon(serve)

    async def _grant_soon(
        self, group: Group, logger: RunLogger, stack: ExitStack
    ) -> Grants:
        """Hold what is granted of the group's wishes; where it hangs, nothing is."""
        requests = group.container_config.additional_mounts
        grant = partial(self._grant, group, logger)
        if self.runtime.in_process or not requests:
            granted, refused = grant(stack)
        else:
            seconds = self.settings.command_timeout
            problem = f"could not be looked at within {seconds:g} s"
            granted, refused = [], [(request, problem) for request in requests]
            with trio.move_on_after(seconds):
                granted, refused = await hold_in_thread(grant, stack)
        for _, reason in refused:
            logger.warning("additional mount refused: %s", reason)
        return granted, refused

    def _grant(
        self, group: Group, logger: logging.Logger | RunLogger, stack: ExitStack
    ) -> Grants:
        requests = group.container_config.additional_mounts
        if not requests:
            return [], []
        return grant_mounts(
            requests,
            is_main=group.is_main,
            allowlist=self._allowlist,
            forbidden=self._forbidden,
            writable=self._writable,
            compares=self.runtime.compares_mounts,
            stack=stack,
            logger=logger,
        )

    def _specify(
        self,
        group: Group,
        run_id: str,
        granted: Sequence[HeldMount],
        access: Access | None,
        stack: ExitStack,
    ) -> ContainerSpec:
        settings = self.settings
        places = self._places
        arguments: tuple[str, ...] = ()
        if settings.agent_command is not None:
            # A foreign image starts that by our runner, too.
            arguments = ("--", *settings.agent_command)
        elif self.runtime.takes_runner:
            arguments = (settings.agent,)
        mounts = stack.enter_context(
            hold_mounts(places, group, self._forbidden, own_runner=bool(arguments))
        )
        way = (access.mount,) if access and access.mount else ()
        return ContainerSpec(
            name=f"clawtrio-{group.folder}-{run_id}",
            labels={
                LABEL_ROOT: places.root_id,
                LABEL_ENGINE: self._id,
                LABEL_RUN: run_id,
            },
            mounts=(*mounts, *way, *granted),
            environment={
                "TZ": settings.timezone,
                "HOME": HOME,
                "LANG": "C.UTF-8",
                **settings.agent_env,
                **(access.environment if access else {}),
                **_for_claude(settings),
            },
            arguments=arguments,
            uid=places.owner.uid,
            gid=places.owner.gid,
            memory=settings.memory,
            cpus=settings.cpus,
            pids=settings.pids,
        )

    def _words(
        self,
        container_input: ContainerInput,
        group: Group,
        run_id: str,
        stack: ExitStack,
    ) -> Words:
        line = encode_input(container_input)
        if container_input.lifeline:
            return LifelineWords(line)
        ipc = stack.enter_context(self._places.open_ipc(group))
        # What an earlier run has not read is not for this one, nor the other way round.
        ipc.discard("input", self._places.trash)
        stack.callback(self._clear_input, ipc)
        directory = stack.enter_context(self._places.open_in_ipc(ipc, "input"))
        return FileWords(
            line,
            directory,
            run_id,
            self._places.owner,
            trash=self._places.trash,
        )

    def _clear_input(self, ipc: Directory) -> None:
        try:
            ipc.discard("input", self._places.trash)
        except OSError as exc:
            # An agent of our own uid can forbid it; the next start tries again.
            log.warning("cannot clear %s/input: %s", ipc.path, exc)

    def _check_space(self) -> None:
        free, inodes = self._places.free()
        if free < self.settings.min_free_bytes:
            problem = (
                f"{free} bytes are free on the disk, min_free_bytes asks for "
                f"{self.settings.min_free_bytes}"
            )
            raise NotStartedError(problem)
        if inodes is not None and inodes < MIN_FREE_INODES:
            raise NotStartedError(f"only {inodes} inodes are free on the disk")

    async def _watch_space(self) -> None:
        """Stop the runs before one of them has filled the disk."""
        while True:
            await self._runs.wait_value(bool)
            try:
                self._check_space()
            except NotStartedError as exc:
                log.error("stopping all runs: %s", exc)  # noqa: TRY400 - no bug
                for run in self._runs.value:
                    run.stop()
            except OSError as exc:
                log.warning("cannot tell how much space is free: %s", exc)
            await trio.sleep(_SPACE_INTERVAL)

    async def _empty_trash(self) -> None:
        """Delete what was thrown away, a little at a time: an agent chose how much."""
        work = partial(self._places.empty_trash, _TRASH_BATCH)
        try:
            while not await self._offload(work):  # noqa: ASYNC110 - it is work, no wait
                await trio.lowlevel.checkpoint()
        except OSError as exc:
            log.warning("cannot empty %s: %s", self._places.trash.path, exc)

    async def close(self) -> bool:
        """Stop all runs and see them off; False if a container may be left."""
        self._closing = True
        for run in self._runs.value:
            run.leave()
        with trio.CancelScope(shield=True):
            await self._runs.wait_value(operator.not_)
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
        clean = True
        try:
            async with (
                open_proxy(credentials, paths=settings.proxy_paths) as proxy,
                _open_bare_nursery() as nursery,
            ):
                engine = Engine(
                    settings=settings,
                    runtime=runtime,
                    places=places,
                    credentials=credentials,
                    proxy=proxy,
                    engine_id=engine_file.engine_id,
                    nursery=nursery,
                )
                try:
                    yield engine
                finally:
                    clean = await engine.close()  # noqa: ASYNC102 - shields itself
                    nursery.cancel_scope.cancel()
        finally:
            engine_file.release(clean=clean)


@asynccontextmanager
async def _open_bare_nursery() -> AsyncIterator[trio.Nursery]:
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
