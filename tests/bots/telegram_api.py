"""A fake of Telegram's Bot API on loopback, and a bot that talks to it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from clawtrio.bots._telegram_client import open_client
from clawtrio.bots.telegram import serve
from clawtrio.testing import FakeAgent, FakeRuntime
from tests.helpers import echoing, settings_for
from tests.upstream import Call, open_api, until

TOKEN: Final = "123456:the-real-one_8f3a"
NAME: Final = "andy_ai_bot"
MAIN: Final = 42
#: 9:07 AM on 5 November 2026, in UTC.
NOW: Final = 1793869620
#: Seconds for what takes milliseconds, on a busy machine.
PATIENCE: Final = 30.0


class Telegram:
    """What people do, and what the bot does.

    Attributes:
        url: Where it is.
        offset: From where on the bot has asked for updates last.
        typing: In which chats it has shown that it types.
        updates: What has happened, in order.
        troubles: Answers to give before things work, by method: status and body.
    """

    def __init__(self) -> None:
        self.url = ""
        self.offset = 0
        self.typing: list[int] = []
        self.troubles: dict[str, list[tuple[int, bytes]]] = {}
        self.updates: list[dict[str, Any]] = []
        self._news = trio.Event()
        self._said, self._to_hear = trio.open_memory_channel[dict[str, Any]](1000)

    def write(self, text: str, chat: int = MAIN, **fields: Any) -> int:
        """Have somebody write something; return the update's id."""
        kind = "private" if chat > 0 else "supergroup"
        message = {
            "chat": {"id": chat, "type": kind, "title": f"Chat {chat}"},
            "date": NOW,
            "from": {"id": 7, "first_name": "Ada"},
            "text": text,
            **fields,
        }
        return self.update(message=message)

    def update(self, **fields: Any) -> int:
        """Have something happen; return the update's id."""
        self.updates.append({"update_id": len(self.updates) + 1, **fields})
        self._news.set()
        return len(self.updates)

    async def hear(self) -> tuple[int, str]:
        """Return the next message of the bot: its chat, and the text."""
        with trio.fail_after(PATIENCE):
            said = await self._to_hear.receive()
        return said["chat_id"], said["text"]

    async def confirmed(self, update: int) -> None:
        """Wait until the bot wants an update never again."""
        await until(lambda: self.offset > update)

    async def serve(self, call: Call) -> None:
        """Answer a call."""
        parameters = json.loads(await call.read() or b"{}")
        path, _, method = call.target.rpartition("/")
        assert path == f"/bot{TOKEN}"
        if self.troubles.get(method):
            status, body = self.troubles[method].pop(0)
            await call.reply(body, status)
            return
        result = await self._result(method, parameters)
        await call.reply(json.dumps({"ok": True, "result": result}).encode())

    async def _result(self, method: str, parameters: dict[str, Any]) -> object:
        if method == "getMe":
            return {"username": NAME}
        if method == "getUpdates":
            return await self._get_updates(parameters["offset"])
        if method == "sendChatAction":
            self.typing.append(parameters["chat_id"])
        else:
            assert method == "sendMessage"
            assert set(parameters) == {"chat_id", "text"}
            await self._said.send(parameters)
        return True

    async def _get_updates(self, offset: int) -> list[dict[str, Any]]:
        self.offset = offset
        with trio.move_on_after(1):
            while len(self.updates) < offset or not self.updates:
                self._news = trio.Event()
                await self._news.wait()
        return [update for update in self.updates if update["update_id"] >= offset]


@asynccontextmanager
async def open_telegram() -> AsyncIterator[Telegram]:
    """Have a Telegram."""
    telegram = Telegram()
    async with open_api(telegram.serve) as api:
        telegram.url = f"http://127.0.0.1:{api.port}"
        yield telegram


@asynccontextmanager
async def open_bot(
    root: Path,
    telegram: Telegram,
    agent: FakeAgent | None = None,
    main: int | None = MAIN,
    **changes: Any,
) -> AsyncIterator[FakeRuntime]:
    """Have a bot whose containers are *agent*, which by default repeats all."""
    runtime = FakeRuntime(agent or echoing())
    settings = settings_for(root, timezone="UTC", **changes)
    async with (
        open_client(str(root), telegram.url) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(serve, settings, client, main, runtime)  # noqa: ASYNC113 - it is heard of
        yield runtime
        nursery.cancel_scope.cancel()
