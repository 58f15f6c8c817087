"""Talking to Telegram, with patience, and without a word of the token."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx  # noqa: ASYNC127 - triogram's
import trio
import triogram
from dotenv import dotenv_values

from clawtrio import AgentOutput, Ending, RunResult, SettingsError

from ._telegram_text import messages_of

log = logging.getLogger("clawtrio.bots.telegram")

API_URL: Final = "https://api.telegram.org"
_TOKEN: Final = "TELEGRAM_BOT_TOKEN"  # noqa: S105 - the name of its variable
#: Seconds that Telegram may wait for something to tell, and that we wait for Telegram.
_POLL, _TIMEOUT = 25, 50.0
#: Tries of what may only have failed by chance.
_ATTEMPTS: Final = 5
#: The longest wait, in seconds, that Telegram may ask of us.
_MAX_WAIT: Final = 120.0
#: triogram keeps of an error its description alone.
_RETRY_AFTER: Final = re.compile(r"retry after (\d+)")
_REFUSALS: Final = ("Bad Request", "Forbidden", "Unauthorized", "Not Found")
#: What a network or a server in trouble leads to. Their texts may hold the token.
_TROUBLE: Final = (httpx.HTTPError, ValueError, LookupError, TypeError)


class TelegramError(Exception):
    """Telegram did not do what it was asked. The text says why, without the token."""


class Client:
    """Asks things of Telegram. Made by :func:`open_client`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._api = triogram.Api(http)

    async def call(
        self, method: str, *, attempts: int = _ATTEMPTS, **parameters: object
    ) -> Any:
        """Call a method of the Bot API, again if that may help; return its result.

        Raises:
            TelegramError: If it was refused, or did not work in the end.
        """
        wait, reason = 0.0, ""
        for attempt in range(attempts):
            await trio.sleep(wait)
            try:
                return await self._api(method, json=parameters)
            except triogram.ApiError as exc:
                reason, wait = str(exc), 2.0**attempt
            except _TROUBLE as exc:
                reason, wait = type(exc).__name__, 2.0**attempt
            if asked := _RETRY_AFTER.search(reason):
                wait = float(asked[1])
            if wait > _MAX_WAIT or reason.startswith(_REFUSALS):
                break
        # Out of the except clauses: no traceback leads to an exception with a URL.
        raise TelegramError(f"{method}: {reason}")

    async def updates(self, offset: int) -> list[dict[str, Any]]:
        """Wait for messages, not for ever, and return the updates from *offset* on.

        Raises:
            TelegramError: If that did not work.
        """
        found: list[dict[str, Any]] = await self.call(
            "getUpdates",
            attempts=1,
            offset=offset,
            timeout=_POLL,
            allowed_updates=["message"],
        )
        return found

    async def attempt(self, jid: str, method: str, **parameters: object) -> None:
        """Call a method for a chat once; nobody depends on its success."""
        try:
            await self.call(method, attempts=1, chat_id=chat_id(jid), **parameters)
        except TelegramError as exc:
            log.info("%s", exc)

    async def say(self, jid: str, text: str, sender: str | None = None) -> None:
        """Say in a chat what of an agent's text is for people.

        Raises:
            TelegramError: If Telegram does not take it.
        """
        for message in messages_of(f"{sender}: {text}" if sender else text):
            await self.call("sendMessage", chat_id=chat_id(jid), text=message)

    async def answer(self, jid: str, output: AgentOutput, _: str) -> None:
        """Say what an agent says; see :func:`clawtrio.open_dispatcher`."""
        # Said again after a crash it does no harm, so nobody remembers the key.
        if output.result:
            await self.say(jid, output.result)

    async def regret(self, jid: str, _: tuple[str, ...], result: RunResult) -> None:
        """Say that there is no answer. The reason in full is for the run's log."""
        stopped = result.ending is Ending.STOPPED
        reason = "it was stopped" if stopped else "something went wrong"
        await self.say(jid, f"Sorry, no answer: {reason}.")


def chat_id(jid: str) -> int:
    """Return Telegram's id of a chat.

    Raises:
        TelegramError: If it is none of Telegram's chats.
    """
    if not re.fullmatch(r"tg:-?[0-9]{1,19}", jid):
        raise TelegramError("not a chat of Telegram")
    return int(jid.removeprefix("tg:"))


@asynccontextmanager
async def open_client(root: str, api_url: str) -> AsyncIterator[Client]:
    """Open a client, with the token of the environment or of ``.env`` in *root*.

    Raises:
        SettingsError: If there is no token, or *api_url* is no URL.
    """
    lines = dotenv_values(Path(root, ".env"), interpolate=False)
    token = os.environ.get(_TOKEN) or lines.get(_TOKEN) or ""
    if not re.fullmatch(r"\d+:[\w-]+", token, re.ASCII):
        raise SettingsError(_TOKEN, "must be the token that BotFather gave you")
    if not re.fullmatch(r"https?://[\w.-]+(:\d{1,5})?", api_url, re.ASCII):
        raise SettingsError("--api-url", "must be a URL such as http://localhost:8081")
    # httpx logs URLs, which have the token in them, and triogram what people say.
    for name in ("httpx", "httpcore", "triogram"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    async with triogram.make_http(token, api_url, _TIMEOUT) as http:
        yield Client(http)
