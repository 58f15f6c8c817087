"""``clawtrio chat``: the terminal as a bot, with one chat and its dispatcher."""

from __future__ import annotations

import math
from functools import partial
from typing import Final

import trio

from ._cli_runs import SessionStore, open_sessions, problem_of, remember, tell
from ._cli_terminal import Interrupts, Lines, complain, is_interactive, note, write
from ._dispatcher import Dispatcher, open_dispatcher
from ._engine import open_engine
from ._models import AgentOutput, Ending, Group, RunResult
from ._settings import Settings
from ._store import Change, Contents, MemoryStore

_QUIT: Final = "/quit"
_STOP: Final = "/stop"
_READY: Final = "> "


class _TerminalStore(MemoryStore):
    """Keeps the session, which ``clawtrio run`` shares, and nothing else.

    Who types sees what was not answered, and can say it again.
    """

    def __init__(
        self, sessions: SessionStore, group: Group, *, new_session: bool
    ) -> None:
        known = None if new_session else sessions.load()
        self.resumes = known is not None
        folder = group.folder.casefold()
        super().__init__(Contents(sessions={folder: known} if known else {}))
        self._sessions = sessions

    async def write(self, change: Change) -> None:
        await super().write(change)
        for session_id in change.sessions.values():
            remember(self._sessions, session_id)


class _Chat:
    """What is said at the terminal, by whom ever.

    Attributes:
        code: The exit code: 1 once something was not answered.
        lost: What came of writing to the terminal, if that failed.
    """

    def __init__(self, jid: str, *, resumes: bool) -> None:
        self.code = 0
        self.lost: OSError | None = None
        self._jid = jid
        self._resumes = resumes
        self._reading = trio.CancelScope()

    async def answer(self, _: str, output: AgentOutput, _key: str) -> None:
        """Tell what the agent says."""
        try:
            await tell(output)
            if not output.partial:
                self.invite()
        except OSError as exc:
            # Nobody reads any more; the dispatcher stops the run.
            self.lost = exc
            self._reading.cancel()
            raise

    async def regret(self, _: str, __: tuple[str, ...], result: RunResult) -> None:
        """Tell why messages get no answer."""
        self.code = 1
        if self.lost is None and result.ending is not Ending.STOPPED:
            complain(problem_of(result, resumed=self._resumes))
            self.invite()

    def invite(self) -> None:
        """Show a person that it is their turn."""
        if is_interactive():
            write(_READY)

    def leave(self, dispatcher: Dispatcher) -> None:
        """Stop the agent, and take no more messages."""
        self._reading.cancel()
        dispatcher.stop(self._jid)

    async def read(self, dispatcher: Dispatcher) -> None:
        """Pass on what a person says, until they leave."""
        lines = Lines()
        with self._reading:
            while (line := await lines.next()) is not None and line.strip() != _QUIT:
                if line.strip() == _STOP:
                    dispatcher.stop(self._jid)
                    note("stopped")
                    self.invite()
                elif line.strip():
                    await dispatcher.submit(self._jid, line)
                else:
                    self.invite()


async def chat(
    settings: Settings, group: Group, interrupts: Interrupts, *, new_session: bool
) -> int:
    """Hold a conversation, one message a line."""
    jid = f"cli:{group.folder}"
    async with open_engine(settings) as engine:
        if is_interactive():
            note(f"group {group.folder}, {engine.runtime.name}: a message a line")
            note(f"{_QUIT} leaves after the answers, {_STOP} stops the agent")
        with open_sessions(settings, group) as sessions:
            store = _TerminalStore(sessions, group, new_session=new_session)
            chat = _Chat(jid, resumes=store.resumes)
            async with open_dispatcher(
                engine,
                {jid: group},
                chat.answer,
                chat.regret,
                store,
                # Who waits at a terminal wants to know at once.
                max_retries=0,
                shutdown_timeout=math.inf,
            ) as dispatcher:
                interrupts.stop = partial(chat.leave, dispatcher)
                chat.invite()
                await chat.read(dispatcher)
                await dispatcher.wait_idle()
            interrupts.stop = interrupts.scope.cancel
    if chat.lost is not None:
        raise chat.lost
    return chat.code
