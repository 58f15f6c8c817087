"""The backend ``claude``: the Claude Agent SDK, run by Trio.

What is said stands in ``dialogue.py``, what Claude is started with in ``options.py``,
what it can ask of the host in ``tools.py``. This joins them:

- Frames are written in a thread, one after the other: a host that does not read holds
  up Claude, but no signal.
- The SDK gives its CLI five seconds to leave when it is closed. Only a close has them;
  whatever else ends us kills what we have started.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import children
import dialogue as said
import options
import tools
import trio
import wire
from archive import archive
from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    ClaudeSDKError,
    HookMatcher,
    ResultMessage,
    StreamEvent,
    SystemMessage,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
    create_sdk_mcp_server,
    tool,
)

#: Seconds between two signs of life, below any sensible timeout of the host.
HEARTBEAT: Final = 15.0
#: Seconds for the CLI to save its session after SIGTERM.
TERM_GRACE: Final = 3.0


def run(session: wire.Session, workspace: options.Workspace = options.WORKSPACE) -> int:
    """Answer the prompt and what follows, until the close."""
    return trio.run(_Talk(session, workspace).hold)


class _Talk:
    def __init__(self, session: wire.Session, workspace: options.Workspace) -> None:
        self._session = session
        self._workspace = workspace
        self._dialogue = said.Dialogue()
        self._closing = False
        self._failure: str | None = None
        self._last_words = ""
        self._over = trio.Event()
        self._cli_gone = trio.Event()

    async def hold(self) -> int:
        """Talk until the close, or until Claude is broken; return the exit code."""
        post, inbox = trio.open_memory_channel[wire.Message | None](math.inf)
        token = trio.lowlevel.current_trio_token()
        self._session.listen(
            lambda message: token.run_sync_soon(post.send_nowait, message)
        )
        given = self._session.input
        prompt = wire.Message(options.first_prompt(given), id=0)
        self._dialogue.put(prompt, trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._obey_signals)
            nursery.start_soon(self._show_life)
            client = await self._connect(given.session_id)
            if client is not None:
                async with trio.open_nursery() as talking:
                    talking.start_soon(self._send, client, inbox)
                    talking.start_soon(self._receive, client)
                    await self._over.wait()
                    talking.cancel_scope.cancel()
                await client.disconnect()
            if self._failure is not None:
                await _emit(self._dialogue.fail(self._failure))
            nursery.cancel_scope.cancel()
        return 0 if self._failure is None else 1

    async def _connect(self, session_id: str | None) -> ClaudeSDKClient | None:
        """Start the CLI, in that session if that is there."""
        try:
            return await self._start_cli(session_id)
        except ClaudeSDKError as exc:
            self._failure = self._explain(exc)
        if session_id is None:
            return None
        problem = f"session {session_id!r} cannot be resumed: {self._failure}"
        wire.say(problem)
        self._failure = None
        self._dialogue.note = f"{problem}; this is a new one"
        return await self._connect(None)

    async def _start_cli(self, session_id: str | None) -> ClaudeSDKClient:
        given = options.arguments(self._session.input, self._workspace, os.environ)
        client = ClaudeSDKClient(
            ClaudeAgentOptions(
                **given,
                resume=session_id,
                mcp_servers={"nanoclaw": self._tools()},
                hooks={"PreCompact": [HookMatcher(hooks=[self._archive])]},
                stderr=self._hear_stderr,
            )
        )
        await client.connect()
        return client

    async def _send(
        self,
        client: ClaudeSDKClient,
        inbox: trio.MemoryReceiveChannel[wire.Message | None],
    ) -> None:
        try:
            for key, text in self._dialogue.unanswered:
                await client.query(_as_input(key, text))
            async for message in inbox:
                if message is None:
                    self._closing = True
                    self._leave_if_done()
                    continue
                key = self._dialogue.put(message, trio.current_time())
                await client.query(_as_input(key, message.text))
        except ClaudeSDKError as exc:
            # Whoever receives knows why.
            wire.say(f"cannot tell Claude anything: {exc}")

    async def _receive(self, client: ClaudeSDKClient) -> None:
        try:
            async for message in client.receive_messages():
                events: list[said.Event | None] = [*_events_in(message)]
                for event in events or [None]:
                    for frame in self._dialogue.hear(event, trio.current_time()):
                        await _emit(frame)
                self._leave_if_done()
            self._failure = "Claude left without being told to"
        except ClaudeSDKError as exc:
            self._failure = self._explain(exc)
        self._cli_gone.set()
        self._over.set()

    def _hear_stderr(self, line: str) -> None:
        self._last_words = line
        wire.say(f"claude: {line}")

    def _explain(self, exc: ClaudeSDKError) -> str:
        """Return what broke, in a line: the SDK refers to what the CLI has said."""
        problem, *_ = str(exc).splitlines() or [repr(exc)]
        if not self._last_words or self._last_words in problem:
            return problem
        return f"{problem}: {self._last_words}"

    def _leave_if_done(self) -> None:
        if self._closing and self._dialogue.idle:
            self._over.set()

    async def _show_life(self) -> None:
        while True:
            await trio.sleep(HEARTBEAT)
            if self._dialogue.is_alive(trio.current_time()):
                await _emit({"partial": True})

    async def _obey_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            number = await anext(signals)
            children.signal_all(signal.SIGTERM)
            with trio.move_on_after(TERM_GRACE):
                await self._cli_gone.wait()
            wire.leave(f"ended by {signal.Signals(number).name}", 128 + number)

    def _tools(self) -> Any:
        given = self._session.input
        mailbox = tools.Mailbox(
            self._workspace.ipc, given.chat_jid, given.group_folder, given.is_main
        )
        return create_sdk_mcp_server(
            "nanoclaw", tools=[_as_tool(t, mailbox) for t in tools.offered(mailbox)]
        )

    async def _archive(
        self, given: Any, _tool_use_id: str | None, _context: Any
    ) -> dict[str, Any]:
        """Keep the transcript before it is compacted; without one, go on."""
        try:
            path = await trio.to_thread.run_sync(
                partial(
                    archive,
                    Path(given["transcript_path"]),
                    self._workspace.conversations,
                    session_id=given["session_id"],
                    assistant=self._session.input.assistant_name or "Assistant",
                    now=datetime.now(),  # noqa: DTZ005 - for people, in their zone
                )
            )
        except OSError as exc:
            wire.say(f"the conversation cannot be archived: {exc}")
        else:
            wire.say(f"archived the conversation: {path}")
        return {}


def _as_tool(offered: tools.Tool, mailbox: tools.Mailbox) -> Any:
    async def use(given: dict[str, Any]) -> dict[str, Any]:
        try:
            text = await trio.to_thread.run_sync(offered.use, mailbox, given)
        except tools.ToolError as exc:
            return {"content": [{"type": "text", "text": str(exc)}], "is_error": True}
        return {"content": [{"type": "text", "text": text}]}

    return tool(offered.name, offered.description, offered.schema)(use)


async def _as_input(key: str, text: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the one message that *text* is to the CLI."""
    await trio.lowlevel.checkpoint()
    yield {
        "type": "user",
        "message": {"role": "user", "content": text},
        "parent_tool_use_id": None,
        "uuid": key,
    }


def _events_in(message: object) -> Iterator[said.Event]:
    """Translate a message of the SDK; a subagent's are its own business."""
    if getattr(message, "parent_tool_use_id", None) is not None:
        return
    match message:
        case SystemMessage(subtype="init", data=data):
            yield said.Began(data["session_id"])
        case StreamEvent(event={"delta": {"type": "text_delta", "text": str(text)}}):
            yield said.Grew(text)
        case AssistantMessage(content=blocks) | UserMessage(content=list(blocks)):
            for block in blocks:
                if isinstance(block, ToolUseBlock):
                    yield said.ToolBegan(block.id)
                elif isinstance(block, ToolResultBlock):
                    yield said.ToolEnded(block.tool_use_id)
        case ResultMessage():
            yield _ended(message)


def _ended(result: ResultMessage) -> said.Ended:
    error = None
    if result.is_error:
        error = result.result or "; ".join(result.errors or [result.subtype])
    return said.Ended(
        text=None if result.is_error else result.result,
        error=error,
        uuids=tuple(result.user_message_uuids or ()),
        ours=result.origin is None,
    )


async def _emit(frame: said.Frame) -> None:
    try:
        await trio.to_thread.run_sync(partial(wire.emit, **frame))
    except BrokenPipeError:
        wire.leave("stdout is closed, so nobody reads the answers", 1)
