"""The Telegram bot: in this process with fake containers, and as it is started."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx  # noqa: ASYNC127 - triogram's
import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import MockClock

from clawtrio import (
    AdditionalMount,
    ContainerConfig,
    Ending,
    Group,
    SettingsError,
)
from clawtrio.bots import telegram as telegram_module
from clawtrio.bots._telegram_client import API_URL, Client, TelegramError, open_client
from clawtrio.bots._telegram_state import State, dump, load, write
from clawtrio.bots._telegram_text import (
    MAX_ANSWER,
    MAX_UNITS,
    command_of,
    is_call,
    line_of,
    messages_of,
    with_trigger,
    words_of,
)
from clawtrio.testing import AgentPipes, FakeRuntime, scripted_agent
from tests.helpers import echoing, frame, result_of, settings_for
from tests.upstream import PATIENCE, until

from .telegram_api import (
    MAIN,
    NAME,
    NOW,
    TOKEN,
    Telegram,
    open_bot,
    open_telegram,
)

pytestmark = pytest.mark.telegram

FAMILY: Final = -1001
STRANGERS: Final = -1002


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the token, and nothing else of the host's wishes."""
    for name in list(os.environ):
        if name.startswith("CLAWTRIO_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", TOKEN)


@pytest.fixture
async def telegram() -> AsyncIterator[Telegram]:
    """Have a Telegram."""
    async with open_telegram() as opened:
        yield opened


def register(root: Path, **options: Any) -> None:
    """Have the chat of a family registered."""
    data = root / "data"
    data.mkdir()
    group = Group("Family", "family", **options)
    write(data / "telegram.json", dump(State(), {f"tg:{FAMILY}": group}))


def post(root: Path, box: str, **fields: Any) -> None:
    """Write a request of main's agent."""
    new = root / "request"
    new.write_text(json.dumps(fields))
    new.rename(root / "data/ipc/main" / box / f"{fields['type']}.json")


def line(text: str) -> str:
    """Return how an agent sees what Ada says."""
    return f'<message sender="Ada" time="Nov 5, 2026, 9:07 AM">{text}</message>'


async def test_main_is_answered(tmp_path: Path, telegram: Telegram) -> None:
    """What main says reaches its agent as NanoClaw writes it, and is answered."""
    async with open_bot(tmp_path, telegram) as runtime:
        update = telegram.write('1 < 2 & "3"')
        chat, text = await telegram.hear()
        await telegram.confirmed(update)

    assert chat == MAIN
    assert text.splitlines() == [
        '<context timezone="UTC" />',
        "<messages>",
        line("1 &lt; 2 &amp; &quot;3&quot;"),
        "</messages>",
    ]
    assert TOKEN not in repr(runtime.specs)


async def test_nobody_works_for_strangers(tmp_path: Path, telegram: Telegram) -> None:
    """A chat that nobody has registered can ask for its id, and for nothing else."""
    async with open_bot(tmp_path, telegram) as runtime:
        for text in ("@Andy hello", "/stop", "/unknown", "/chatid@another_bot"):
            telegram.write(text, STRANGERS)
        telegram.update(poll={})
        telegram.write(f"/chatid@{NAME}", STRANGERS)
        heard = await telegram.hear()

    assert heard == (STRANGERS, f"Chat ID: tg:{STRANGERS}")
    assert runtime.specs == []


async def test_what_was_said_in_between(tmp_path: Path, telegram: Telegram) -> None:
    """A group's agent is asked when somebody calls it, and told what it has missed."""
    register(tmp_path)
    async with open_bot(tmp_path, telegram):
        for text in ("Lunch?", "Andy is not called", "@Andyman neither"):
            telegram.write(text, FAMILY)
        await telegram.confirmed(telegram.write("", FAMILY, photo=[{}]))
    async with open_bot(tmp_path, telegram):
        telegram.write("@andy, where?", FAMILY)
        _, first = await telegram.hear()
        telegram.write(f"And @{NAME}, when?", FAMILY)
        _, second = await telegram.hear()

    said = ("Lunch?", "Andy is not called", "@Andyman neither", "[Photo]")
    assert first.splitlines()[2:-1] == [*map(line, said), line("@andy, where?")]
    assert second.splitlines()[2:-1] == [line(f"@Andy And @{NAME}, when?")]


async def test_a_group_without_trigger(tmp_path: Path, telegram: Telegram) -> None:
    """A group that needs no trigger is answered whatever it says."""
    register(tmp_path, requires_trigger=False)
    async with open_bot(tmp_path, telegram, main=None):
        telegram.write("hello", FAMILY)
        chat, text = await telegram.hear()

    assert chat == FAMILY
    assert line("hello") in text


async def test_typing_and_stop(tmp_path: Path, telegram: Telegram) -> None:
    """People see that an agent works, and can stop it."""

    async with open_bot(tmp_path, telegram, scripted_agent()):
        telegram.write("think")
        await until(lambda: len(telegram.typing) > 1)
        telegram.write("/stop")
        heard = {await telegram.hear(), await telegram.hear()}

    assert heard == {
        (MAIN, "Stopping."),
        (MAIN, "Sorry, no answer: it was stopped."),
    }


async def test_what_reaches_a_chat(tmp_path: Path, telegram: Telegram) -> None:
    """All that an agent says, in order, but nothing empty, nor what is for itself."""

    async def agent(pipes: AgentPipes) -> int:
        await pipes.stdin.receive_some()
        for text in ("", "<internal>hm</internal>", "Hi<internal>a\nb</internal>!"):
            await pipes.stdout.send_all(frame(text, partial=True))
        await pipes.stdout.send_all(frame("Bye"))
        return 0

    async with open_bot(tmp_path, telegram, agent):
        telegram.write("hello")
        assert await telegram.hear() == (MAIN, "Hi!")
        assert await telegram.hear() == (MAIN, "Bye")


async def test_requests_of_agents(tmp_path: Path, telegram: Telegram) -> None:
    """Main's agent can speak anywhere, register a chat it is shown, and plan tasks."""
    shown = tmp_path / "data/ipc/main/available_groups.json"
    async with open_bot(tmp_path, telegram):
        await telegram.confirmed(telegram.write("hello", FAMILY))
        before = json.loads(shown.read_text())["groups"]
        post(tmp_path, "messages", type="message", chatJid="x:1", text="lost")
        family = {"jid": f"tg:{FAMILY}", "folder": "family", "trigger": "@Andy"}
        post(tmp_path, "tasks", type="register_group", name="Family", **family)
        await until(lambda: json.loads(shown.read_bytes())["groups"][0]["isRegistered"])
        fields = {"chatJid": f"tg:{FAMILY}", "sender": "Eve"}
        post(tmp_path, "messages", type="message", text="hi", **fields)
        assert await telegram.hear() == (FAMILY, "Eve: hi")
        post(tmp_path, "tasks", type="refresh_groups")
        task = {"schedule_type": "once", "schedule_value": "2020-01-01T00:00:00Z"}
        target = {"targetJid": f"tg:{FAMILY}", "prompt": "remind"}
        post(tmp_path, "tasks", type="schedule_task", **task, **target)
        assert await telegram.hear() == (FAMILY, "remind")

    _, groups = load(tmp_path / "data/telegram.json")
    assert [(chat["jid"], chat["isRegistered"]) for chat in before] == [
        (f"tg:{FAMILY}", False)
    ]
    assert list(groups) == [f"tg:{FAMILY}"]
    assert groups[f"tg:{FAMILY}"].folder == "family"


async def test_main_s_mailbox_cannot_be_trusted(
    tmp_path: Path, telegram: Telegram, caplog: pytest.LogCaptureFixture
) -> None:
    """The bot goes on where it cannot show main its groups."""
    (tmp_path / "data/ipc").mkdir(parents=True)
    (tmp_path / "data/ipc/main").symlink_to(tmp_path)
    async with open_bot(tmp_path, telegram):
        telegram.write("/chatid")
        await telegram.hear()

    assert "main cannot see its groups" in caplog.text


async def test_an_update_counts_once_it_is_kept(
    tmp_path: Path, telegram: Telegram
) -> None:
    """Telegram is told that it may forget what outlives us, and repeats are known."""
    async with open_bot(tmp_path, telegram):
        update = telegram.write("once")
        await telegram.hear()
        await telegram.confirmed(update)
        state, _ = load(tmp_path / "data/telegram.json")
        repeated = {"ok": True, "result": telegram.updates[:1]}
        telegram.troubles["getUpdates"] = [(200, json.dumps(repeated).encode())]
        telegram.write("again")
        _, text = await telegram.hear()
        telegram.write("and again")
        _, last = await telegram.hear()

    assert state.offset == update + 1
    assert line("again") in text
    assert line("and again") in last


async def test_telegram_in_trouble(
    tmp_path: Path, telegram: Telegram, caplog: pytest.LogCaptureFixture
) -> None:
    """The bot goes on when Telegram does, and logs neither token nor texts."""
    caplog.set_level(logging.DEBUG)
    telegram.troubles["getUpdates"] = [(502, b"<html>")]
    telegram.troubles["sendChatAction"] = [(500, b"[]")]
    async with open_bot(tmp_path, telegram):
        telegram.write("the secret word")
        await telegram.hear()

    assert "getUpdates: JSONDecodeError" in caplog.text
    assert TOKEN not in caplog.text
    assert "the secret word" not in caplog.text


async def test_a_signal_ends_it_in_order(tmp_path: Path, telegram: Telegram) -> None:
    """SIGTERM lets it return, with what it knows on disk."""
    settings, runtime = settings_for(tmp_path), FakeRuntime(echoing())
    async with (
        open_client(str(tmp_path), telegram.url) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(telegram_module.serve, settings, client, MAIN, runtime)
        await telegram.confirmed(telegram.write("hello"))
        await telegram.hear()
        os.kill(os.getpid(), signal.SIGTERM)

    state, _ = load(tmp_path / "data/telegram.json")
    assert state.offset == 2


def error(description: str, status: int = 400) -> httpx.Response:
    """Make an error of Telegram."""
    body = {"ok": False, "description": description}
    return httpx.Response(status, json=body)


def client_of(*responses: httpx.Response | Exception) -> tuple[Client, list[float]]:
    """Make a client that gets these, and a list of the times at which it asked."""
    left, times = list(responses), []

    def respond(request: httpx.Request) -> httpx.Response:
        times.append(trio.current_time())
        response = left.pop(0)
        if isinstance(response, Exception):
            raise response
        return response

    transport = httpx.MockTransport(respond)
    return Client(httpx.AsyncClient(transport=transport, base_url=API_URL)), times


async def test_patience(autojump_clock: MockClock) -> None:
    """It waits as long as Telegram asks, else longer each time."""
    client, times = client_of(
        httpx.ConnectError(f"https://api/bot{TOKEN}"),
        error("Too Many Requests: retry after 30", 429),
        httpx.Response(502, text="<html>"),
        httpx.Response(200, json={"ok": True, "result": 7}),
    )

    assert await client.call("getMe") == 7
    assert times == [0, 1, 31, 35]


@pytest.mark.parametrize(
    ("response", "tries", "reason"),
    [
        (partial(httpx.ReadTimeout, f"/bot{TOKEN}"), 5, "ReadTimeout"),
        (partial(error, "Bad Request: chat not found"), 1, "chat not found"),
        (partial(error, "Unauthorized", 401), 1, "Unauthorized"),
        (partial(error, "Too Many: retry after 999", 429), 1, "retry after 999"),
    ],
)
async def test_the_end_of_patience(
    autojump_clock: MockClock,
    response: Callable[[], httpx.Response | Exception],
    tries: int,
    reason: str,
) -> None:
    """What cannot work is given up, at once or in the end, with the reason."""
    client, times = client_of(*(response() for _ in range(tries)))

    with pytest.raises(TelegramError, match=reason) as caught:
        await client.say("tg:1", "hello")

    assert len(times) == tries
    assert TOKEN not in repr(caught.getrepr(style="long", chain=True))
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("ending", "reason"),
    [(Ending.FAILED, "something went wrong"), (Ending.STOPPED, "it was stopped")],
)
async def test_an_apology_tells_nothing(ending: Ending, reason: str) -> None:
    """What went wrong inside stays there."""
    sent: list[Any] = []

    def respond(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json={"ok": True, "result": {}})

    http = httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url=API_URL)
    result = result_of(status="error", error="/root/secret", ending=ending, exit_code=1)

    await Client(http).regret("tg:1", ("hello",), result)

    assert sent == [{"chat_id": 1, "text": f"Sorry, no answer: {reason}."}]


@given(text=st.text(alphabet=st.sampled_from("a \n😀"), max_size=30_000))
def test_long_answers_are_split(text: str) -> None:
    """Each message is one that Telegram takes, and nothing to be seen is lost."""
    pieces = messages_of(text)

    assert all(len(p.encode("utf-16-le")) <= 2 * MAX_UNITS for p in pieces)
    assert all(piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("a" * 4096, [4096]),
        ("😀" * 2049, [2048, 1]),
        ("a" * 3000 + "\n" + "b c" * 1000, [3001, 3000]),
        ("a" * 3000 + " " + "b" * 3000, [3001, 3000]),
        ("a\n" + "b" * 4096, [4096, 2]),
        ("x" + " " * 2 * 4096 + "y", [4096, 2]),
        ("a" * MAX_ANSWER * 2, [4096] * 16 + [4]),
        ("<internal>never closed", []),
    ],
)
def test_where_answers_are_split(text: str, lengths: list[int]) -> None:
    """After a line, else after a word, if that is not too early."""
    assert [len(piece) for piece in messages_of(text)] == lengths


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"text": "hi"}, "hi"),
        ({"photo": [], "caption": "us"}, "[Photo] us"),
        ({"voice": {}}, "[Voice message]"),
        ({"new_chat_title": "x"}, ""),
    ],
)
def test_what_a_message_says(message: dict[str, object], words: str) -> None:
    """What is no text has a placeholder."""
    assert words_of(message) == words


def test_who_says_it() -> None:
    """People have the name that they gave, else their user name, if they have any."""
    names = [{"first_name": "A", "username": "b"}, {"username": "b"}, {}]
    lines = [line_of({"from": n, "date": NOW}, "", "Asia/Tokyo") for n in names]

    assert [sender for sender, _, _ in lines] == ["A", "b", "Unknown"]
    assert lines[0][1] == "Nov 5, 2026, 6:07 PM"


def test_calls_and_commands() -> None:
    """Who is called is in the first word; a mention of the bot counts."""
    assert is_call("@ANDY!", "@Andy")
    assert not is_call("@Andyman", "@Andy")
    assert with_trigger(f"hey @{NAME.upper()}", "@Andy", NAME).startswith("@Andy hey")
    assert with_trigger(f"@Andy @{NAME}", "@Andy", NAME) == f"@Andy @{NAME}"
    assert with_trigger(f"a@{NAME}", "@Andy", NAME) == f"a@{NAME}"
    assert command_of(f"/stop@{NAME} now", NAME) == "stop"
    assert command_of("/stop@other", NAME) == command_of("/", NAME) == ""


def test_what_is_kept_is_bounded() -> None:
    """Of a talkative chat, and of many chats, the newest are kept."""
    state = State()
    for number in range(60):
        state.keep("tg:1", ("Ada", "now", str(number)))
        state.keep("tg:2", ("Ada", "now", "x" * 10_000))
    for number in range(300):
        assert state.note_chat(f"tg:{number}", "Chat", "now")

    assert [text for _, _, text in state.context["tg:1"]] == [
        str(number) for number in range(10, 60)
    ]
    assert len(state.context["tg:2"]) == 3
    assert not state.note_chat("tg:299", "Chat", "later")
    assert state.note_chat("tg:299", "Renamed", "later")
    assert len(state.available()) == 200


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    """A group is read as it was written, to its mounts, by nobody else."""
    path = tmp_path / "telegram.json"
    mounts = [AdditionalMount("/a", readonly=False)]
    config = ContainerConfig(mounts, timeout=7.5)
    groups = {"tg:1": Group("Family", "family", "@X", container_config=config)}
    state = State(offset=3, context={"tg:1": [("Ada", "now", "hi")]})

    write(path, dump(state, groups))
    read, found = load(path)

    assert found == groups
    assert (read.offset, read.context) == (3, state.context)
    assert path.stat().st_mode & 0o777 == 0o600


GOOD: Final = {
    "name": "Family",
    "folder": "family",
    "trigger": "@Andy",
    "added_at": "2026-01-01T00:00:00Z",
    "requires_trigger": True,
    "container_config": {"additional_mounts": [], "timeout": None},
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": 5}, "name"),
        ({"folder": "../up"}, "folder"),
        ({"folder": "Main"}, "main's"),
        ({"added_at": "yesterday"}, "added_at"),
        ({"requires_trigger": "no"}, "requires_trigger"),
        ({"container_config": {}}, "additional_mounts"),
        ({"container_config": {"additional_mounts": [], "timeout": "1"}}, "timeout"),
        ({"container_config": {"additional_mounts": [{}], "timeout": 1}}, "host_path"),
        ({"container_config": {"additional_mounts": [], "timeout": 0}}, "timeout"),
    ],
)
def test_a_state_that_makes_no_sense(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    """What somebody has edited wrongly is named, and never guessed."""
    path = tmp_path / "telegram.json"
    path.write_text(json.dumps({"groups": {"tg:1": GOOD | change}}))

    with pytest.raises(SettingsError, match=complaint):
        load(path)


@pytest.mark.parametrize(
    ("token", "url", "complaint"),
    [
        ("", API_URL, "TELEGRAM_BOT_TOKEN: must be the token"),
        ("1:a b", API_URL, "TELEGRAM_BOT_TOKEN: must be the token"),
        (TOKEN, "http://x:port", "--api-url: must be a URL"),
    ],
)
async def test_a_client_needs_a_token(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    url: str,
    complaint: str,
) -> None:
    """What is missing is said, and the token is not."""
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", token)

    with pytest.raises(SettingsError, match=complaint) as caught:
        async with open_client(str(tmp_path), url):
            pass

    assert TOKEN not in str(caught.value)


async def test_the_token_of_the_env_file(
    tmp_path: Path, telegram: Telegram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token may be in the root's .env."""
    monkeypatch.delenv("TELEGRAM_BOT_TOKEN")
    (tmp_path / ".env").write_text(f"TELEGRAM_BOT_TOKEN={TOKEN}\n")

    async with open_client(str(tmp_path), telegram.url) as client:
        assert (await client.call("getMe"))["username"] == NAME


SPY: Final = """
import glob, json, os, sys
given = json.loads(sys.stdin.readline())
found = [dict(os.environ), sorted(os.listdir("/workspace/project"))]
print("---NANOCLAW_OUTPUT_START---")
print(json.dumps({"status": "success", "result": json.dumps(found)}))
print("---NANOCLAW_OUTPUT_END---", flush=True)
"""


@pytest.mark.bwrap
async def test_a_real_agent_has_no_token(tmp_path: Path, telegram: Telegram) -> None:
    """In main's sandbox there is neither the token nor what it is in."""
    root = tmp_path / "bot"
    root.mkdir()
    (root / ".env").write_text(f"TELEGRAM_BOT_TOKEN={TOKEN}\n")
    command = ("python3", "-c", SPY)
    settings = settings_for(root, runtime="bwrap", agent_command=command)
    async with (
        open_client(str(root), telegram.url) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(telegram_module.serve, settings, client, MAIN)
        telegram.write("what do you see?")
        _, text = await telegram.hear()
        nursery.cancel_scope.cancel()

    variables, places = json.loads(text)
    assert variables["HOME"] == "/home/node"
    assert TOKEN not in text
    assert not {".env", "data"} & set(places)


@pytest.mark.bwrap
async def test_as_it_is_started(tmp_path: Path, telegram: Telegram) -> None:
    """The command answers, and SIGTERM ends it in order; it never says the token."""
    root = tmp_path / "bot"
    root.mkdir()
    environment = {"CLAWTRIO_AGENT": "echo", "CLAWTRIO_RUNTIME": "bwrap"}
    command = [sys.executable, "-m", "clawtrio.bots.telegram", f"--root={root}"]
    process = await trio.lowlevel.open_process(
        [*command, f"--main={MAIN}", f"--api-url={telegram.url}"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
    )
    telegram.write("hello")
    heard = [await telegram.hear() for _ in range(4)]
    process.terminate()
    assert process.stderr is not None
    with trio.fail_after(PATIENCE):
        said = b"".join([chunk async for chunk in process.stderr])
        code = await process.wait()

    assert (MAIN, line("hello")) in heard
    assert code == 0
    assert f"@{NAME} is there" in said.decode()
    assert TOKEN not in said.decode()
    assert b"hello" not in said


@pytest.mark.parametrize("argv", [["--main=1"], []])
def test_it_does_not_start_without_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    """Whoever starts it is told what is missing."""
    monkeypatch.delenv("TELEGRAM_BOT_TOKEN")
    monkeypatch.setattr("sys.argv", ["telegram", f"--root={tmp_path}", *argv])

    with pytest.raises(SystemExit, match="must be the token that BotFather gave you"):
        telegram_module.main()
