"""``clawtrio run``: one question at the terminal, and what is remembered of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs

from ._cli_terminal import (
    Interrupts,
    complain,
    note,
    read_all,
    say,
    say_json,
)
from ._codec import output_to_wire
from ._engine import open_engine
from ._errors import UnsafePathError
from ._groups import Places
from ._hostfs import Directory
from ._models import AgentOutput, Ending, Group, RunResult
from ._settings import Settings

#: What a session id may be, as in an agent's frames.
_MAX_SESSION_ID: Final = 256
_MAX_SESSION_FILE: Final = 2**14

_MAIN: Final = "main"

#: The prompt that stands for what comes on stdin; nobody can type it.
STDIN: Final = "\0"


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


async def tell(output: AgentOutput) -> None:
    """Tell a person what an agent says."""
    if output.result is not None:
        await say(output.result)
    if output.status == "error":
        complain(problem_of(output))


def problem_of(outcome: AgentOutput | RunResult, *, resumed: bool = False) -> str:
    """Say in a line why there is no answer, and what a person may look at."""
    if isinstance(outcome, AgentOutput):
        return f"the agent reports: {outcome.error or 'an error'}"
    hint = "; --new-session would not resume the last one" if resumed else ""
    error = str(outcome.error).rstrip(": \n")
    return f"{error} (log: {outcome.log_path}{hint})"


def remember(sessions: SessionStore, session_id: str | None) -> None:
    """Remember a session as well as may be."""
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
    """Ask one thing, tell what the agent says, and return the exit code.

    :data:`STDIN` asks what comes there.
    """
    if prompt == STDIN:
        prompt = await read_all()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    async with open_engine(settings) as engine:
        with open_sessions(settings, group) as sessions:
            known = None if new_session else sessions.load()
            async with engine.open_run(
                group,
                prompt,
                chat_jid=f"cli:{group.folder}",
                session_id=known,
                single_turn=True,
            ) as run:
                interrupts.stop = run.stop
                async for output in run:
                    remember(sessions, output.new_session_id)
                    if as_json:
                        await say_json(output_to_wire(output))
                    else:
                        await tell(output)
            interrupts.stop = interrupts.scope.cancel
            remember(sessions, run.result.new_session_id)
        if as_json:
            await say_json(result_to_wire(run.result))
        if run.result.ending is Ending.STOPPED:
            note("stopped")
        elif run.result.status == "error":
            complain(problem_of(run.result, resumed=known is not None))
    return 0 if run.result.status == "success" else 1


async def plan_run(settings: Settings, group: Group) -> int:
    """Print what would be run."""
    async with open_engine(settings) as engine:
        await say(shlex.join(await engine.plan(group)))
    return 0
