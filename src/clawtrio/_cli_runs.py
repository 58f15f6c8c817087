"""``clawtrio run`` and ``clawtrio chat``: an agent at the terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import attrs
import trio

from ._cli_terminal import (
    Interrupts,
    Lines,
    complain,
    is_interactive,
    note,
    read_all,
    say,
    say_json,
    write,
)
from ._codec import output_to_wire
from ._engine import Engine, open_engine
from ._errors import FollowUpRefusedError, RunClosedError, UnsafePathError
from ._groups import Places
from ._hostfs import Directory
from ._models import AgentOutput, Ending, Group, RunResult
from ._run import Run
from ._settings import Settings

#: What a session id may be, as in an agent's frames.
_MAX_SESSION_ID: Final = 256
_MAX_SESSION_FILE: Final = 2**14

_MAIN: Final = "main"

#: The prompt that stands for what comes on stdin; nobody can type it.
STDIN: Final = "\0"

_QUIT: Final = "/quit"
_STOP: Final = "/stop"
_READY: Final = "> "


class UsageError(Exception):
    """Something on the command line makes no sense."""


def group_of(folder: str) -> Group:
    """Return the group of a folder; ``main`` alone is the main one."""
    return Group(name=folder, folder=folder, is_main=folder == _MAIN)


class SessionStore:
    """The sessions that a group had last at this command line, one for each agent.

    The file is in ``data/cli``, which no container sees. What is in it was said by
    agents all the same.

    Args:
        directory: Where the file is.
        settings: Which agent it is.
        group: Whose session.
    """

    def __init__(self, directory: Directory, settings: Settings, group: Group) -> None:
        self._directory = directory
        self._name = f"{group.folder.casefold()}.session"
        # No agent can resume the session of another one.
        self._agent = "command" if settings.agent_command else settings.agent

    def load(self) -> str | None:
        """Return the session to resume, if there is one."""
        return self._read().get(self._agent)

    def save(self, session_id: str | None) -> None:
        """Remember a session, if that is a new one."""
        known = self._read()
        if session_id is not None and session_id != known.get(self._agent):
            known[self._agent] = session_id
            data = json.dumps(known).encode()
            self._directory.write(self._name, data, mode=0o600)

    def forget(self) -> bool:
        """Forget the sessions with every agent; False if there were none."""
        is_there = bool(self._read())
        self._directory.remove(self._name)
        return is_there

    def _read(self) -> dict[str, str]:
        try:
            data = self._directory.read(self._name, limit=_MAX_SESSION_FILE)
            sessions = json.loads(data or b"{}")
        except (UnsafePathError, ValueError, RecursionError):
            return {}
        if not isinstance(sessions, dict):
            return {}
        return {agent: one for agent, one in sessions.items() if _is_session_id(one)}


def _is_session_id(value: object) -> bool:
    return (
        isinstance(value, str)
        and 0 < len(value) <= _MAX_SESSION_ID
        and value.isprintable()
    )


@contextmanager
def open_sessions(settings: Settings, group: Group) -> Iterator[SessionStore]:
    """Open a group's sessions, in a data directory that was checked by who calls."""
    with (
        Directory.at(settings.data_dir) as data,
        data.subdirectory("cli", mode=0o700) as directory,
    ):
        yield SessionStore(directory, settings, group)


def reset(places: Places, group: Group) -> bool:
    """Forget a group's session; False if it had none.

    Raises:
        GroupBusyError: If it has a live run, which would remember it again.
    """
    with places.lock_group(group), open_sessions(places.settings, group) as sessions:
        return sessions.forget()


class Conversation:
    """One run at the terminal: what is told of it, and what is remembered.

    Args:
        engine: Where it runs.
        group: Whose agent.
        as_json: Whether to tell it in JSON.
        new_session: Whether to begin a new session.
    """

    def __init__(
        self, engine: Engine, group: Group, *, as_json: bool, new_session: bool
    ) -> None:
        self._engine = engine
        self._group = group
        self._as_json = as_json
        self._new_session = new_session
        # Whether a person has said that this is the end.
        self._finished = False

    async def hold(
        self,
        prompt: str,
        interrupts: Interrupts,
        lines: trio.MemoryReceiveChannel[str] | None = None,
    ) -> int:
        """Ask, tell what the agent says, and return the exit code.

        Args:
            prompt: What to ask first.
            interrupts: What stops the run.
            lines: What else a person says; None ends after the first answer.
        """
        self._finished = lines is None
        with open_sessions(self._engine.settings, self._group) as sessions:
            resumed = None if self._new_session else sessions.load()
            async with self._engine.open_run(
                self._group,
                prompt,
                chat_jid=f"cli:{self._group.folder}",
                session_id=resumed,
                single_turn=self._finished,
            ) as run:
                interrupts.stop = run.stop
                async with trio.open_nursery() as nursery:
                    if lines is not None:
                        nursery.start_soon(self._follow_up, run, lines)
                    async for output in run:
                        _remember(sessions, output.new_session_id)
                        await self._tell(output)
                    nursery.cancel_scope.cancel()
            interrupts.stop = interrupts.scope.cancel
            _remember(sessions, run.result.new_session_id)
        if self._as_json:
            await say_json(result_to_wire(run.result))
        self._conclude(run.result, resumed)
        return 0 if run.result.status == "success" else 1

    async def _follow_up(self, run: Run, lines: trio.MemoryReceiveChannel[str]) -> None:
        """Pass on to the run what else is said."""
        async for line in lines:
            if line.strip() == _STOP:
                self._finished = True
                run.stop()
                return
            try:
                await run.send(line)
            except (FollowUpRefusedError, RunClosedError) as exc:
                complain(exc)
        self._finished = True
        run.finish()

    async def _tell(self, output: AgentOutput) -> None:
        if self._as_json:
            await say_json(output_to_wire(output))
            return
        if output.result is not None:
            await say(output.result)
        if output.status == "error":
            complain(f"the agent reports: {output.error or 'an error'}")
        elif output.result is None and not self._finished and is_interactive():
            write(_READY)

    def _conclude(self, result: RunResult, resumed: str | None) -> None:
        if result.ending is Ending.STOPPED:
            note("stopped")
        elif result.status == "error":
            hint = "; --new-session would not resume the last one" if resumed else ""
            error = str(result.error).rstrip(": \n")
            complain(f"{error} (log: {result.log_path}{hint})")
        elif not self._finished:
            note(f"the run is over ({result.ending.value}); chat again to resume it")


def _remember(sessions: SessionStore, session_id: str | None) -> None:
    try:
        sessions.save(session_id)
    except OSError as exc:
        # The answers are worth more than that.
        complain(f"the session cannot be remembered: {exc.strerror}")


def result_to_wire(result: RunResult) -> dict[str, Any]:
    """Name a result's fields as an output's are; ``type`` tells it from those."""
    return {
        "type": "result",
        "status": result.status,
        "ending": result.ending.name.lower(),
        "error": result.error,
        "newSessionId": result.new_session_id,
        "exitCode": result.exit_code,
        "duration": round(result.duration, 3),
        "outputs": result.outputs,
        "droppedFrames": result.dropped_frames,
        "unanswered": result.unanswered,
        "refusedMounts": [
            {**attrs.asdict(mount), "reason": reason}
            for mount, reason in result.refused_mounts
        ],
        "usage": attrs.asdict(result.usage) if result.usage else None,
        "logPath": str(result.log_path),
    }


async def run_prompt(
    settings: Settings,
    group: Group,
    prompt: str,
    interrupts: Interrupts,
    *,
    as_json: bool,
    new_session: bool,
) -> int:
    """Ask one thing; :data:`STDIN` is what comes there."""
    if prompt == STDIN:
        prompt = await read_all()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    async with open_engine(settings) as engine:
        conversation = Conversation(
            engine, group, as_json=as_json, new_session=new_session
        )
        return await conversation.hold(prompt, interrupts)


async def plan_run(settings: Settings, group: Group) -> int:
    """Print what would be run."""
    async with open_engine(settings) as engine:
        await say(shlex.join(await engine.plan(group)))
    return 0


async def chat(
    settings: Settings, group: Group, interrupts: Interrupts, *, new_session: bool
) -> int:
    """Hold a conversation, one message a line."""
    async with open_engine(settings) as engine:
        conversation = Conversation(
            engine, group, as_json=False, new_session=new_session
        )
        if is_interactive():
            note(f"group {group.folder}, {engine.runtime.name}: a message a line")
            note(f"{_QUIT} leaves after the answers, {_STOP} at once")
            write(_READY)
        # No buffer: who reads waits until the message is on its way.
        send, receive = trio.open_memory_channel[str](0)
        code = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_messages, send)
            with receive:
                with suppress(trio.EndOfChannel):
                    prompt = await receive.receive()
                    if prompt.strip() != _STOP:
                        code = await conversation.hold(prompt, interrupts, receive)
                nursery.cancel_scope.cancel()
        return code


async def _read_messages(send: trio.MemorySendChannel[str]) -> None:
    """Pass on what a person says, until the end."""
    lines = Lines()
    with send:
        while (line := await lines.next()) is not None and line.strip() != _QUIT:
            if line.strip():
                await send.send(line)
