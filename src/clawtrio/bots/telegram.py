"""A Telegram bot, as a model for others: docs/telegram.md says what it does."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio

import clawtrio
from clawtrio import Group, Requests, Runtime, Scheduler, Settings

from . import _telegram_text as texts
from ._telegram_client import API_URL, Client, TelegramError, chat_id, open_client
from ._telegram_state import State, dump, load, main_group, write

log = logging.getLogger("clawtrio.bots.telegram")

_REST: Final = 5.0  # seconds until we ask again, after a failure
_TYPING: Final = 4.0  # seconds; Telegram shows it for five


@attrs.define(eq=False)
class Bot:
    """Goes between people and agents."""

    name: str  # by which people mention it
    client: Client
    groups: dict[str, Group]
    state: State
    path: Path
    dispatcher: clawtrio.Dispatcher
    nursery: trio.Nursery
    _saving: trio.Lock = attrs.field(factory=trio.Lock, init=False)

    async def poll(self) -> None:
        """Deal with updates, one after the other."""
        while True:
            # Telegram forgets what is before the offset. That is in a store by then:
            # the dispatcher's, or ours. A crash between the two has a message asked
            # twice; what else comes again is recognised by its id.
            try:
                updates = await self.client.updates(self.state.offset)
            except TelegramError as exc:
                log.warning("%s", exc)
                await trio.sleep(_REST)
                continue
            for update in updates:
                if update["update_id"] >= self.state.offset:
                    with trio.CancelScope(shield=True):  # half of it would be twice
                        await self._take(update)

    async def _take(self, update: Mapping[str, Any]) -> None:
        if message := update.get("message"):
            await self._hear(message, f"tg:{message['chat']['id']}")
        self.state.offset = update["update_id"] + 1
        await self._save()

    async def _hear(self, message: Mapping[str, Any], jid: str) -> None:
        chat, text = message["chat"], texts.words_of(message)
        if text.startswith("/"):
            self._obey_person(texts.command_of(text, self.name), jid)
            return
        if chat["type"] in {"group", "supergroup"}:
            now = datetime.now(UTC).isoformat()
            if self.state.note_chat(jid, chat["title"], now):
                await self.show_groups()
        group = self.groups.get(jid)
        if group is None or not text:
            return  # no agent works for strangers
        zone = self.dispatcher.engine.settings.timezone
        text = texts.with_trigger(text, group.trigger, self.name)
        self.state.keep(jid, texts.line_of(message, text, zone))
        if not group.requires_trigger or texts.is_call(text, group.trigger):
            prompt = texts.prompt_of(self.state.context[jid], zone)
            await self.dispatcher.submit(jid, prompt)
            del self.state.context[jid]
            self._attempt(jid, "sendChatAction", action="typing")

    def _obey_person(self, command: str, jid: str) -> None:
        if command == "stop" and jid in self.groups:
            self.dispatcher.stop(jid)
        elif command != "chatid":
            return
        text = f"Chat ID: {jid}" if command == "chatid" else "Stopping."
        self._attempt(jid, "sendMessage", text=text)

    async def obey(self, requests: Requests, scheduler: Scheduler) -> None:
        """Do what agents ask for."""
        async for request in requests:
            async with request:
                try:
                    if not await scheduler.apply(request):
                        await self._obey_agent(request)
                except TelegramError as exc:
                    log.warning("[%s] %s", request.group.folder, exc)

    async def _obey_agent(self, request: clawtrio.Request) -> None:
        if isinstance(request, clawtrio.SendMessage):
            await self.client.say(request.chat_jid, request.text, request.sender)
            return
        if isinstance(request, clawtrio.RegisterGroup):
            chat_id(request.jid)  # that of another network is refused
            self.groups[request.jid] = request.new_group
            await self._save()
        await self.show_groups()

    async def show_groups(self) -> None:
        """Let main's agent see which chats there are."""
        engine, chats = self.dispatcher.engine, self.state.available()
        try:
            for group in [group for group in self.groups.values() if group.is_main]:
                await engine.write_groups_snapshot(group, chats, self.groups)
        except (OSError, clawtrio.UnsafePathError) as exc:
            log.warning("main cannot see its groups: %s", exc)

    async def show_typing(self) -> None:
        """Show in chats that their agents work, while they do."""
        while True:
            runs = self.dispatcher.engine.statistics().runs
            busy = {run.group for run in runs if run.state == "working"}
            for jid, group in self.groups.items():
                if group.folder in busy:
                    self._attempt(jid, "sendChatAction", action="typing")
            await trio.sleep(_TYPING)

    def _attempt(self, jid: str, method: str, **parameters: str) -> None:
        """Start what nobody waits for, so that a slow Telegram holds nobody up."""
        attempt = partial(self.client.attempt, jid, method, **parameters)
        self.nursery.start_soon(attempt)

    async def _save(self) -> None:
        async with self._saving:
            data = dump(self.state, self.groups)
            await trio.to_thread.run_sync(write, self.path, data)


async def serve(
    settings: Settings, client: Client, main: int | None, runtime: Runtime | None = None
) -> None:
    """Be the bot, with the chat *main* as main, until a signal comes."""
    path = Path(settings.data_dir, "telegram.json")
    state, groups = load(path)
    if main is not None:
        groups[f"tg:{main}"] = main_group(f"@{settings.assistant_name}")
    store = clawtrio.SqliteStore(path.with_suffix(".db"))
    name = (await client.call("getMe"))["username"]
    async with (
        clawtrio.open_engine(settings, runtime) as engine,
        clawtrio.open_dispatcher(
            engine, groups, client.answer, client.regret, store
        ) as dispatcher,
        clawtrio.open_scheduler(dispatcher) as scheduler,
        engine.open_requests(groups) as requests,
        trio.open_nursery() as nursery,
    ):
        bot = Bot(name, client, groups, state, path, dispatcher, nursery)
        await bot.show_groups()
        # Once left, a second signal ends the process, without waiting for agents.
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            nursery.start_soon(bot.poll)
            nursery.start_soon(bot.show_typing)
            nursery.start_soon(bot.obey, requests, scheduler)
            log.info("@%s is there", name)
            await anext(aiter(signals))
        nursery.cancel_scope.cancel()


def main() -> None:
    """Be the bot that the command line and the environment describe."""
    parser = argparse.ArgumentParser(prog="python -m clawtrio.bots.telegram")
    parser.add_argument("--root", help="the bot's directory")
    parser.add_argument("--main", type=int, help="main's chat id: ask it by /chatid")
    parser.add_argument("--api-url", default=API_URL, help="a Bot API server")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    async def run() -> None:
        # What was said cannot grow any more.
        settings = attrs.evolve(Settings.load(given.root), partial_text=False)
        async with open_client(settings.root, given.api_url) as client:
            await serve(settings, client, given.main)

    try:
        trio.run(run)
    except (clawtrio.ClawtrioError, TelegramError) as exc:
        raise SystemExit(f"clawtrio: {exc}") from None


if __name__ == "__main__":
    main()
