"""The dispatcher, in virtual time; test_dispatcher_promise.py has what it promises."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from trio.testing import MockClock

from clawtrio import (
    AgentOutput,
    Change,
    Dispatcher,
    DispatcherStatistics,
    Ending,
    Engine,
    Group,
    MemoryStore,
    Run,
    RunResult,
    RuntimeUnavailableError,
    ScheduledTask,
    Store,
    StoreBusyError,
    UnknownChatError,
    open_dispatcher,
)
from clawtrio.testing import AgentPipes, FakeAgent, FakeRuntime

from .helpers import (
    FOREVER,
    OwnContainer,
    OwnRuntime,
    Reader,
    engine_on,
    frame,
    raising,
)

GROUPS: Final = {name: Group(name.upper(), name) for name in "abc"}
#: When a message is tried: after 5, 10, 20, 40 and 80 seconds more.
TRIES: Final = [0, 5, 15, 35, 75, 155]

Act = Callable[["Turn"], Awaitable[object]]


@attrs.define
class Turn:
    """What an agent is asked, and what it asks with."""

    run: int
    number: int
    text: str
    line: dict[str, Any]
    stdout: trio.abc.SendStream

    async def say(self, result: str | None, **fields: Any) -> None:
        await self.stdout.send_all(frame(result, **fields))


class LeaveError(Exception):
    """An agent leaves at once."""


@attrs.define
class Bot:
    """What a bot has seen, and does."""

    said: list[tuple[float, str, str]] = attrs.field(factory=list)
    "When, the text, and its key."
    failed: list[tuple[float, str, tuple[str, ...], RunResult]] = attrs.field(
        factory=list
    )
    asked: list[tuple[float, int, str]] = attrs.field(factory=list)
    "What agents were asked: when, in which run, and what."
    prompts: list[dict[str, Any]] = attrs.field(factory=list)
    hears: Callable[[str], Awaitable[object]] | None = None
    fails: Exception | None = None
    news: trio.Event = attrs.field(factory=trio.Event)

    async def on_output(self, chat: str, output: AgentOutput, key: str) -> None:
        await trio.lowlevel.checkpoint()
        assert output.result is not None
        assert key.startswith(f"{chat}/")
        self.said.append((trio.current_time(), output.result, key))
        self.news.set()
        if self.hears is not None:
            await self.hears(output.result)

    async def on_failure(
        self, chat: str, messages: tuple[str, ...], result: RunResult
    ) -> None:
        await trio.lowlevel.checkpoint()
        self.failed.append((trio.current_time(), chat, messages, result))
        self.news.set()
        if self.fails is not None:
            raise self.fails

    def agent(self, act: Act) -> FakeAgent:
        """Make an agent that does *act* about each line."""
        runs = 0

        async def agent(pipes: AgentPipes) -> int:
            nonlocal runs
            run, runs = runs, runs + 1
            reader = Reader(pipes.stdin)
            while (line := await reader.line()) and line.get("type") != "close":
                if "prompt" in line:
                    self.prompts.append(line)
                text = line.get("prompt") or line["text"]
                self.asked.append((trio.current_time(), run, text))
                try:
                    await act(Turn(run, line.get("id", 0), text, line, pipes.stdout))
                except LeaveError:
                    return 1
            return 0

        return agent

    @property
    def texts(self) -> list[str]:
        """What was said."""
        return [text for _, text, _ in self.said]

    async def wait_for(self, count: int) -> None:
        """Wait until so many messages were said or have failed."""
        with trio.fail_after(20_000):
            while len(self.said) + len(self.failed) < count:
                self.news = trio.Event()
                await self.news.wait()


async def answer(turn: Turn) -> None:
    """Answer after a second."""
    await trio.sleep(1)
    await turn.say(f"re: {turn.text}", answers=turn.number)


async def answer_at_once(turn: Turn) -> None:
    """Answer at once."""
    await turn.say(f"re: {turn.text}", answers=turn.number)


async def quiet(container: OwnContainer) -> None:
    """Be an agent that does nothing."""


async def leave(turn: Turn) -> None:
    """Leave without an answer."""
    raise LeaveError


async def ponder(turn: Turn) -> None:
    """Never answer."""
    await trio.sleep_forever()


@asynccontextmanager
async def bot_of(
    root: Path,
    act: Act,
    *,
    store: Store | None = None,
    groups: Mapping[str, Group] = GROUPS,
    bot: Bot | None = None,
    **changes: Any,
) -> AsyncIterator[tuple[Dispatcher, Bot]]:
    """Open a dispatcher whose agents do *act*."""
    bot = bot or Bot()
    async with (
        engine_on(root, FakeRuntime(bot.agent(act)), **changes) as engine,
        dispatcher_on(engine, bot, store, groups) as dispatcher,
    ):
        yield dispatcher, bot


def dispatcher_on(
    engine: Engine,
    bot: Bot,
    store: Store | None = None,
    groups: Mapping[str, Group] = GROUPS,
    **options: Any,
) -> Any:
    """Open a dispatcher for a bot."""
    store = store or MemoryStore()
    on_output, on_failure = bot.on_output, bot.on_failure
    return open_dispatcher(engine, groups, on_output, on_failure, store, **options)


def task_of(name: str, chat: str = "a", **fields: Any) -> ScheduledTask:
    """Make a task that asks for its name."""
    return ScheduledTask(name, chat, name, "once", "", chat_jid=chat, **fields)


# Messages and runs.


async def test_messages_are_in_the_store_before_submit_returns(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What was accepted survives whatever comes, until it has ended."""
    store = MemoryStore()
    async with bot_of(tmp_path, answer, store=store) as (dispatcher, bot):
        message_id = await dispatcher.submit("a", "Hi \ud83d")

        assert store.contents.messages[message_id].text == "Hi \ufffd"
        await bot.wait_for(1)

        assert bot.said == [(1, "re: Hi \ufffd", f"a/{message_id}/0")]
    assert store.contents.messages == {}
    assert store.contents.next_id == message_id + 1


async def test_messages_go_into_the_live_run(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """While nobody else needs the slot, a chat has one run, and one agent."""
    async with bot_of(tmp_path, answer) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await trio.sleep(0.5)
        await dispatcher.submit("a", "2")
        await bot.wait_for(2)
        await trio.sleep(10)
        await dispatcher.submit("a", "3")
        await bot.wait_for(3)

    assert [run for _, run, _ in bot.asked] == [0, 0, 0]
    assert [key for _, _, key in bot.said] == ["a/1/0", "a/2/0", "a/3/0"]


async def test_all_that_waits_goes_into_one_run(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Messages that came while another group had the slot are asked together."""
    async with bot_of(tmp_path, answer, max_concurrent=1) as (dispatcher, bot):
        for chat, text in [("a", "1"), ("b", "2"), ("b", "3"), ("c", "4"), ("b", "5")]:
            await dispatcher.submit(chat, text)
        await bot.wait_for(5)

    assert [(run, text) for _, run, text in bot.asked] == [
        *((0, "1"), (1, "2"), (1, "3"), (1, "5"), (2, "4")),
    ]
    # One slot, given up as soon as its run has answered.
    assert bot.said[-1][0] == 5


async def test_a_talkative_chat_makes_room(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A chat where people never stop talking does not keep others waiting."""
    async with bot_of(tmp_path, answer, max_concurrent=1) as (dispatcher, bot):
        for n in range(10):
            await dispatcher.submit("a", f"a{n}")
            await trio.sleep(0.25)
            if n == 3:
                await dispatcher.submit("b", "b")
            await trio.sleep(0.25)
        await bot.wait_for(11)

    # What was in the run then, then b, then the others.
    order = [text for _, _, text in bot.asked]
    assert order == ["a0", "a1", "a2", "a3", "b", *(f"a{n}" for n in range(4, 10))]


async def test_chats_of_one_group_take_turns(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A group has one run, whichever of its chats it is for."""
    groups = {"x": Group("A", "a"), "y": Group("A", "A")}
    async with bot_of(tmp_path, answer, groups=groups) as (dispatcher, bot):
        await dispatcher.submit("x", "1")
        await trio.sleep(0.5)
        await dispatcher.submit("y", "2")
        await dispatcher.submit("x", "3")
        await bot.wait_for(3)

    assert [(run, text) for _, run, text in bot.asked] == [(0, "1"), (1, "2"), (2, "3")]
    assert [line["chatJid"] for line in bot.prompts] == ["x", "y", "x"]


async def test_too_large_a_follow_up_gets_a_run_of_its_own(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What a live run cannot take is the prompt of the next."""

    class Lagging(MemoryStore):
        async def write(self, change: Change) -> None:
            await trio.sleep(0.1)
            await super().write(change)

    async with bot_of(tmp_path, answer, store=Lagging()) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await trio.sleep(0.5)
        # They are there at the same moment: the second does not overtake the first.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dispatcher.submit, "a", "x" * 2**20)
            nursery.start_soon(dispatcher.submit, "a", "x" * 2**20)
        await bot.wait_for(3)

    asked = [(run, text[0]) for _, run, text in bot.asked]
    assert asked == [(0, "1"), (1, "x"), (2, "x")]


# Texts, and what they answer.


async def test_an_answer_may_be_of_many_texts(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Each text has a key, by the turn that it belongs to and its place in that."""

    async def act(turn: Turn) -> None:
        await turn.say("part", partial=True)
        await turn.say("whole", answers=turn.number)
        await turn.say("postscript", answers=turn.number)
        await turn.say(None)

    async with bot_of(tmp_path, act) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await bot.wait_for(3)
        await dispatcher.submit("a", "2")
        await bot.wait_for(6)

    keys = [key for _, _, key in bot.said]
    assert keys == ["a/1/0", "a/1/1", "a/1/2", "a/2/0", "a/2/1", "a/2/2"]


async def test_a_text_before_any_answer_belongs_to_the_first_turn(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Text that answers nothing yet has reached the chat all the same."""

    async def act(turn: Turn) -> None:
        await turn.say("well", answers=-1)
        raise LeaveError

    async with bot_of(tmp_path, act) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await bot.wait_for(2)

    assert bot.said == [(0, "well", "a/1/0")]
    assert [messages for _, _, messages, _ in bot.failed] == [("1",)]


async def test_part_of_an_answer_says_what_it_answers(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What waits behind the message that a part is about is tried again."""

    async def act(turn: Turn) -> None:
        if turn.run == 0:
            await trio.sleep(1)
            await turn.say("part", partial=True, answers=0)
            raise LeaveError
        await answer(turn)

    async with bot_of(tmp_path, act) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await dispatcher.submit("a", "2")
        await bot.wait_for(3)

    assert bot.texts == ["part", "re: 2"]
    assert [messages for _, _, messages, _ in bot.failed] == [("1",)]


async def test_silence_can_be_an_answer(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that is done without a word has answered."""
    store = MemoryStore()

    async def act(turn: Turn) -> None:
        await turn.say(None, newSessionId="s")

    async with bot_of(tmp_path, act, store=store) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await trio.sleep(1)

        assert store.contents.messages == {}
        assert store.contents.sessions == {"a": "s"}
        assert dispatcher.statistics().answered == 1
    assert (bot.said, bot.failed) == ([], [])


# Failures.


async def test_a_message_fails_after_five_retries(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It is tried again after 5, 10, 20, 40 and 80 seconds, then never again."""
    store = MemoryStore()
    async with bot_of(tmp_path, leave, store=store) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await bot.wait_for(1)

        assert [time for time, _, _ in bot.asked] == TRIES
        ((time, chat, messages, result),) = bot.failed
        assert (time, chat, messages) == (155, "a", ("1",))
        assert result.ending is Ending.FAILED
        await trio.sleep(1)
        assert store.contents.messages == {}
        assert dispatcher.statistics() == DispatcherStatistics(
            runs=0,
            idle_runs=0,
            waiting_chats=0,
            waiting=0,
            in_flight=0,
            answered=0,
            failed=1,
            retries=5,
        )


async def test_who_waits_for_an_answer_may_want_no_retries(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """How often a message is tried again can be set, down to never."""
    bot = Bot()
    async with engine_on(tmp_path, FakeRuntime(bot.agent(leave))) as engine:
        async with dispatcher_on(engine, bot, max_retries=0) as dispatcher:
            await dispatcher.submit("a", "1")
            await dispatcher.wait_idle()
        assert [messages for _, _, messages, _ in bot.failed] == [("1",)]
        assert trio.current_time() == 0

        with pytest.raises(ValueError, match="max_retries must be at least 0, not -1"):
            async with dispatcher_on(engine, bot, max_retries=-1):
                raise AssertionError


async def test_a_message_that_agents_fail_with_is_tried_alone(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What makes an agent leave does not make others fail."""

    async def act(turn: Turn) -> None:
        if turn.text == "poison":
            raise LeaveError
        await answer(turn)

    async with bot_of(tmp_path, act, max_concurrent=1) as (dispatcher, bot):
        await dispatcher.submit("b", "0")
        for text in ("poison", "1", "2"):
            await dispatcher.submit("a", text)
        await bot.wait_for(4)

    assert sorted(bot.texts) == ["re: 0", "re: 1", "re: 2"]
    assert [messages for _, _, messages, _ in bot.failed] == [("poison",)]


async def test_an_error_without_a_text_is_tried_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What the agent could not do fails; what it said of it counts as an answer."""

    async def act(turn: Turn) -> None:
        text = None if turn.run == 0 else "sorry"
        await turn.say(text, status="error", error="overloaded", answers=turn.number)

    async with bot_of(tmp_path, act) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await bot.wait_for(1)

    assert bot.said == [(5, "sorry", "a/1/0")]
    assert bot.failed == []


async def test_a_message_may_fail_in_a_run_that_goes_well(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The result that on_failure gets is that of the message."""

    async def act(turn: Turn) -> None:
        if turn.text == "half":
            await turn.say("half", partial=True, answers=turn.number)
            error = {"status": "error", "error": "overloaded"}
            await turn.say(None, answers=turn.number, **error)
        else:
            await answer(turn)

    async with bot_of(tmp_path, act, max_concurrent=1) as (dispatcher, bot):
        await dispatcher.submit("b", "0")
        await trio.sleep(0.1)
        await dispatcher.submit("a", "half")
        await dispatcher.submit("a", "1")
        await bot.wait_for(4)

    ((_, _, messages, result),) = bot.failed
    assert messages == ("half",)
    assert (result.status, result.error) == ("error", "overloaded")


async def test_a_message_is_not_asked_again_once_text_was_said(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Half an answer is the end of it."""

    async def act(turn: Turn) -> None:
        await turn.say("half", partial=True)
        raise LeaveError

    async with bot_of(tmp_path, act) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await bot.wait_for(2)
        await trio.sleep(1000)

    assert bot.texts == ["half"]
    assert [messages for _, _, messages, _ in bot.failed] == [("1",)]


async def test_groups_that_cannot_run_are_tried_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What waits is tried together, since no agent has had any of it."""
    async with (
        bot_of(tmp_path, answer) as (dispatcher, bot),
        dispatcher.engine.open_run(GROUPS["a"], "Hi", chat_jid="a"),
    ):
        await dispatcher.submit("a", "1")
        await trio.sleep(0.1)
        await dispatcher.submit("a", "2")
        await dispatcher.submit("b", "3")
        await bot.wait_for(1)
        assert bot.texts == ["re: 3"]
        await bot.wait_for(3)

    failed = [(time, messages) for time, _, messages, _ in bot.failed]
    assert failed == [(155, ("1",)), (235, ("2",))]
    result = bot.failed[0][-1]
    assert result.ending is Ending.NOT_STARTED
    assert result.error == "group 'a' has a live run already"
    assert result.log_path == Path(tmp_path, "data", "logs", "a")


async def test_a_chat_may_lose_its_group(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Messages of a chat that is none any more fail in the end."""
    groups = dict(GROUPS)
    async with bot_of(tmp_path, leave, groups=groups) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await trio.sleep(1)
        del groups["a"]
        await bot.wait_for(1)

    ((_, _, _, result),) = bot.failed
    assert result.error == "no group belongs to chat 'a'"
    assert result.log_path == Path(tmp_path, "data", "logs")


async def test_an_exception_of_the_callback_fails_the_message(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is stopped, on_failure hears of it, and other groups go on."""
    caplog.set_level(logging.INFO)

    async def hears(text: str) -> None:
        await trio.lowlevel.checkpoint()
        if text == "re: 1":
            raise ValueError("secret")

    bot = Bot(hears=hears, fails=ValueError("secret"))
    async with bot_of(tmp_path, answer, bot=bot) as (dispatcher, _):
        for chat, text in [("a", "1"), ("b", "2"), ("a", "3")]:
            await dispatcher.submit(chat, text)
        await bot.wait_for(4)

    assert sorted(bot.texts) == ["re: 1", "re: 2", "re: 3"]
    ((_, chat, messages, result),) = bot.failed
    assert (chat, messages, result.ending) == ("a", ("1",), Ending.STOPPED)
    assert result.status == "error"
    assert result.error == "on_output raised ValueError('secret')"
    assert "on_output raised ValueError" in caplog.text
    assert "on_failure raised ValueError" in caplog.text
    assert "secret" not in caplog.text


async def test_on_failure_hears_of_every_exception_of_the_callback(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """There may be no message that failed, for all were answered."""

    async def act(turn: Turn) -> None:
        await answer(turn)
        await turn.say("postscript", answers=turn.number)

    async def hears(text: str) -> None:
        await trio.lowlevel.checkpoint()
        if text == "postscript":
            raise ValueError

    async with bot_of(tmp_path, act, bot=Bot(hears=hears)) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await bot.wait_for(3)

    assert [messages for _, _, messages, _ in bot.failed] == [()]


# Stop.


async def test_stop_ends_all_that_a_chat_waits_for(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What runs and what waits fails, and what comes later is answered."""

    async def act(turn: Turn) -> None:
        if turn.text != "later":
            await ponder(turn)
        await answer(turn)

    async with bot_of(tmp_path, act, max_concurrent=1) as (dispatcher, bot):
        for chat, text in [("a", "1"), ("b", "2"), ("b", "3"), ("a", "4")]:
            await dispatcher.submit(chat, text)
        await trio.sleep(1)
        dispatcher.stop("b")
        dispatcher.stop("a")
        dispatcher.stop("c")
        await bot.wait_for(3)
        await dispatcher.submit("a", "later")
        await bot.wait_for(4)

    failed = {(chat, messages) for _, chat, messages, _ in bot.failed}
    assert failed == {("b", ("2", "3")), ("a", ("4",)), ("a", ("1",))}
    assert {result.ending for *_, result in bot.failed} == {Ending.STOPPED}
    assert bot.texts == ["re: later"]


async def test_a_run_can_be_stopped_while_it_starts(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A stop is heard, also where there is no run yet to stop."""

    async def slow() -> None:
        await trio.sleep(3)

    bot = Bot()
    runtime = OwnRuntime(quiet, start=slow)
    async with (
        engine_on(tmp_path, runtime) as engine,
        dispatcher_on(engine, bot) as dispatcher,
    ):
        await dispatcher.submit("a", "1")
        await trio.sleep(1)
        dispatcher.stop("a")
        await bot.wait_for(1)

    assert [(time, messages) for time, _, messages, _ in bot.failed] == [(3, ("1",))]


@pytest.mark.parametrize("lacks", ["credential", "runtime"])
async def test_what_a_run_lacks_fails_the_message_and_not_the_bot(
    tmp_path: Path,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    lacks: str,
) -> None:
    """It is tried again, since it may come; then on_failure says what it is."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    bot = Bot()
    broken = RuntimeUnavailableError("own", "it is down", "Start it.")
    runtime = OwnRuntime(quiet, start=raising(broken))
    agent = "claude" if lacks == "credential" else "echo"
    async with (
        engine_on(tmp_path, runtime, agent=agent) as engine,
        dispatcher_on(engine, bot) as dispatcher,
    ):
        await dispatcher.submit("a", "1")
        await bot.wait_for(1)
        await dispatcher.submit("b", "2")
        await bot.wait_for(2)

    assert [messages for _, _, messages, _ in bot.failed] == [("1",), ("2",)]
    errors = [result.error for _, _, _, result in bot.failed]
    word = "ANTHROPIC_API_KEY" if lacks == "credential" else "it is down"
    assert all(word in (error or "") for error in errors)


# Tasks.


async def test_tasks_go_before_messages_in_runs_of_their_own(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A chat's run makes room for a task, and the task's run takes no message."""
    async with bot_of(tmp_path, answer) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await trio.sleep(0.5)
        await dispatcher.submit_task(task_of("t"))
        await dispatcher.submit("a", "2")
        await dispatcher.submit_task(task_of("u"))
        await trio.sleep(1)
        await dispatcher.submit("a", "3")
        await bot.wait_for(5)

    assert [(run, text) for _, run, text in bot.asked] == [
        *((0, "1"), (1, "t"), (2, "u"), (3, "2"), (3, "3")),
    ]
    scheduled = [line.get("isScheduledTask") for line in bot.prompts]
    assert scheduled == [None, True, True, None]


async def test_a_chat_is_not_mute_while_tasks_keep_coming(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Tasks overtake a message once; those that come meanwhile wait behind it."""
    async with bot_of(tmp_path, answer) as (dispatcher, bot):
        await dispatcher.submit_task(task_of("t0"))
        await trio.sleep(0.1)
        await dispatcher.submit("a", "1")
        for n in range(1, 6):
            await dispatcher.submit_task(task_of(f"t{n}"))
            await trio.sleep(0.8)
        await bot.wait_for(7)

    order = [text for _, _, text in bot.asked]
    assert order == ["t0", "t1", "t2", "1", "t3", "t4", "t5"]


async def test_a_task_is_not_queued_twice(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A task that waits or runs is enough; what becomes of it is kept all the same."""
    store = MemoryStore()
    async with bot_of(tmp_path, answer, store=store) as (dispatcher, bot):
        task = ScheduledTask("t", "A", "t", "once", "")
        for n in range(3):
            then = attrs.evolve(task, next_run=str(n))
            await dispatcher.submit_task(task, then=then)
            assert store.contents.tasks == dispatcher.tasks == {"t": then}
            await trio.sleep(0.4)
        await bot.wait_for(1)
        await trio.sleep(1)
        await dispatcher.write_tasks({"t": None})
        assert store.contents.tasks == dispatcher.tasks == {}

    assert bot.texts == ["re: t"]


async def test_a_task_fails_as_messages_do(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It is tried again, while the chat's messages go before it."""

    async def act(turn: Turn) -> None:
        if turn.text == "t":
            raise LeaveError
        await answer(turn)

    async with bot_of(tmp_path, act) as (dispatcher, bot):
        await dispatcher.submit_task(task_of("t"))
        await trio.sleep(1)
        await dispatcher.submit("a", "1")
        await bot.wait_for(2)

    assert bot.said[0][0] == 2
    assert bot.failed[0][2] == ("t",)


# Sessions.


async def test_a_group_goes_on_with_its_session(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The last session that knows of an answer is resumed, also by another host."""
    store = MemoryStore()
    bot = Bot()

    async def act(turn: Turn) -> None:
        await turn.say("yes", newSessionId=f"s{turn.text}", answers=turn.number)

    for text in "12":
        bot = Bot()
        async with bot_of(tmp_path, act, store=store, bot=bot) as (dispatcher, _):
            await dispatcher.submit("a", text)
            await bot.wait_for(1)
            isolated, sharing = task_of("8"), task_of("9", context_mode="group")
            await dispatcher.submit_task(isolated)
            await bot.wait_for(2)
            await dispatcher.submit_task(sharing)
            await bot.wait_for(3)

    found = [line.get("sessionId") for line in bot.prompts]
    assert found == ["s9", None, "s2"]
    assert store.contents.sessions == {"a": "s9"}


async def test_a_session_that_cannot_be_resumed_is_given_up(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """After three tries a message is asked in a new session."""
    store = MemoryStore()

    async def act(turn: Turn) -> None:
        if "sessionId" in turn.line:
            raise LeaveError
        await turn.say("yes", newSessionId=f"s{turn.text}")

    async with bot_of(tmp_path, act, store=store) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await bot.wait_for(1)
        dispatcher.stop("a")
        await trio.sleep(1)
        await dispatcher.submit("a", "2")
        await bot.wait_for(2)

    assert bot.said[1][0] - bot.said[0][0] > TRIES[3]
    assert store.contents.sessions == {"a": "s2"}


async def test_a_session_may_be_named_when_all_is_said(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What names the session need not be an output that is delivered."""
    store = MemoryStore()

    async def act(turn: Turn) -> None:
        await turn.say("yes", answers=0)
        await turn.say(None, partial=True, newSessionId="s")

    async with bot_of(tmp_path, act, store=store) as (dispatcher, bot):
        await dispatcher.submit("a", "1")
        await bot.wait_for(1)

    assert store.contents.sessions == {"a": "s"}


# Beginnings and ends.


async def test_leaving_lets_agents_answer_for_a_while(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What was asked may be answered; what was not, stays in the store."""
    store = MemoryStore()

    async def act(turn: Turn) -> None:
        if turn.text == "slow":
            await ponder(turn)
        await answer(turn)

    bot = Bot()
    opened = partial(bot_of, tmp_path, store=store, bot=bot, max_concurrent=2)
    async with opened(act) as (dispatcher, _):
        await dispatcher.submit("a", "1")
        await dispatcher.submit("b", "slow")
        await dispatcher.submit("c", "3")
        await trio.sleep(0.5)
    # close_grace, for the slow one, and the ladder.
    assert trio.current_time() == 7.5
    assert bot.texts == ["re: 1"]
    assert [m.text for m in store.contents.messages.values()] == ["slow", "3"]
    assert {m.attempts for m in store.contents.messages.values()} == {0}

    async with opened(answer):
        await bot.wait_for(3)
    assert sorted(bot.texts) == ["re: 1", "re: 3", "re: slow"]


async def test_a_run_that_starts_while_all_ends_answers(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A run that was begun gets its chance."""

    async def slow() -> None:
        await trio.sleep(3)

    async def act(container: OwnContainer) -> None:
        line = json.loads(await container.agent_stdin.receive_some())
        await container.agent_stdout.send_all(frame(line["prompt"]))
        await container.agent_stdin.receive_some()
        container.exit(0)

    bot = Bot()
    async with engine_on(tmp_path, OwnRuntime(act, start=slow)) as engine:
        async with dispatcher_on(engine, bot) as dispatcher:
            await dispatcher.submit("a", "1")
            await trio.sleep(1)

        assert trio.current_time() == 3
    assert bot.texts == ["1"]


async def test_a_callback_that_was_cut_short_is_not_repeated(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nobody knows how much of it was said: the message has failed."""
    store = MemoryStore()

    async def hears(text: str) -> None:
        await trio.sleep(1000)

    async with bot_of(tmp_path, answer, store=store, bot=Bot(hears=hears)) as (d, bot):
        await d.submit("a", "1")
        await bot.wait_for(1)
    async with bot_of(tmp_path, answer, store=store) as (_, later):
        await later.wait_for(1)

    assert later.said == []
    ((_, _, messages, result),) = later.failed
    assert messages == ("1",)
    assert result.error == "The host ended before the answer"


async def test_messages_wait_for_their_chat_to_have_a_group(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """What the store holds for an unknown chat comes first once that is known."""
    store = MemoryStore()
    async with bot_of(tmp_path, ponder, store=store) as (dispatcher, _):
        await dispatcher.submit("a", "1")
    groups: dict[str, Group] = {}
    async with bot_of(tmp_path, answer, store=store, groups=groups) as (
        dispatcher,
        bot,
    ):
        await trio.sleep(10)
        assert "a chat that no group belongs to" in caplog.text
        groups |= GROUPS
        await dispatcher.submit("a", "2")
        await bot.wait_for(2)

    assert bot.texts == ["re: 1", "re: 2"]


async def test_unknown_chats_are_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nothing is taken for a chat that has no group, nor after the end."""
    async with bot_of(tmp_path, answer) as (dispatcher, _):
        with pytest.raises(UnknownChatError) as caught:
            await dispatcher.submit("x", "Hi")
        assert caught.value.chat_jid == "x"
        with pytest.raises(UnknownChatError):
            dispatcher.stop("x")
        with pytest.raises(UnknownChatError) as caught:
            await dispatcher.submit_task(ScheduledTask("t", "x", "Hi", "once", ""))
        assert str(caught.value) == "no group belongs to chat 'x'"
    with pytest.raises(RuntimeError):
        await dispatcher.submit("a", "Hi")


async def test_a_store_has_one_dispatcher(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A second one would answer everything once more."""
    store = MemoryStore()
    async with bot_of(tmp_path, answer, store=store) as (dispatcher, _):
        with pytest.raises(StoreBusyError):
            async with dispatcher_on(dispatcher.engine, Bot(), store):
                raise AssertionError


async def test_an_exception_of_the_block_comes_out_as_itself(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Runs are stopped at once."""
    runtime = FakeRuntime(Bot().agent(ponder))
    async with engine_on(tmp_path, runtime) as engine:
        with pytest.raises(KeyError):  # noqa: PT012 - the block raises it
            async with dispatcher_on(engine, Bot()) as dispatcher:
                await dispatcher.submit("a", "1")
                await trio.sleep(1)
                raise KeyError
        assert trio.current_time() == 1
        assert engine.runs == ()


async def test_the_time_to_leave_can_be_set(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An application may be in more of a hurry than close_grace says."""
    bot = Bot()
    async with engine_on(tmp_path, FakeRuntime(bot.agent(ponder))) as engine:
        async with dispatcher_on(engine, bot, shutdown_timeout=3) as dispatcher:
            await dispatcher.submit("a", "1")
            await trio.sleep(1)
        assert trio.current_time() == 4


async def test_one_can_wait_until_all_is_answered(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Whether it waits, runs, failed once or is given up."""
    bot = Bot()

    async def act(turn: Turn) -> None:
        await answer(turn) if turn.run else await leave(turn)

    async with bot_of(tmp_path, act, bot=bot, max_concurrent=1) as (dispatcher, _):
        with trio.fail_after(1):
            await dispatcher.wait_idle()
        for chat, text in [("a", "1"), ("b", "2"), ("a", "3")]:
            await dispatcher.submit(chat, text)
        await dispatcher.submit_task(task_of("t", "c"))
        await dispatcher.wait_idle()

        assert sorted(bot.texts) == ["re: 1", "re: 2", "re: 3", "re: t"]
        assert dispatcher.statistics().idle_runs == 1
        dispatcher.stop("b")
        await dispatcher.submit("b", "4")
        dispatcher.stop("b")
        await dispatcher.wait_idle()
        assert [messages for _, _, messages, _ in bot.failed] == [("4",)]


async def test_a_message_that_is_being_sent_is_not_forgotten(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is still to be answered, also if its run ends in that moment."""
    send = Run.send

    async def late(run: Run, text: str) -> None:
        run.finish()
        while dispatcher.statistics().runs:  # noqa: ASYNC110 - nobody tells us
            await trio.lowlevel.checkpoint()
        await send(run, text)

    monkeypatch.setattr(Run, "send", late)
    async with bot_of(tmp_path, answer_at_once) as (dispatcher, bot):
        for text in ("1", "2"):
            await dispatcher.submit("a", text)
            await dispatcher.wait_idle()

        assert bot.texts == ["re: 1", "re: 2"]


async def test_stop_is_heard_while_all_ends(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A person need not wait for agents that have as long as they like."""
    bot = Bot()

    async def leave_block(engine: Engine, opened: list[Dispatcher]) -> None:
        async with dispatcher_on(engine, bot, shutdown_timeout=1000) as dispatcher:
            await dispatcher.submit("a", "1")
            await trio.sleep(1)
            opened.append(dispatcher)

    async with (
        engine_on(tmp_path, FakeRuntime(bot.agent(ponder))) as engine,
        trio.open_nursery() as nursery,
    ):
        opened: list[Dispatcher] = []
        nursery.start_soon(leave_block, engine, opened)
        await trio.sleep(3)
        opened[0].stop("a")
    assert [messages for _, _, messages, _ in bot.failed] == [("1",)]


async def test_a_store_that_fails_ends_the_dispatcher(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Without it nothing can be promised; what it has, it has."""

    class Broken(MemoryStore):
        async def write(self, change: Change) -> None:
            if change.ended:
                raise OSError
            await super().write(change)

    store = Broken()
    with pytest.RaisesGroup(OSError, flatten_subgroups=True):
        async with bot_of(tmp_path, answer, store=store) as (dispatcher, _):
            await dispatcher.submit("a", "1")
            await trio.sleep(FOREVER / 2)
    assert [m.state for m in store.contents.messages.values()] == ["reached"]


async def test_statistics_say_what_goes_on(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Every message is counted in one place."""
    async with bot_of(tmp_path, answer, max_concurrent=1) as (dispatcher, bot):
        for chat, text in [("a", "1"), ("a", "2"), ("b", "3"), ("b", "4")]:
            await dispatcher.submit(chat, text)
            await trio.sleep(0.1)
        await dispatcher.submit_task(task_of("t", "b"))

        statistics = dispatcher.statistics()
        assert statistics == DispatcherStatistics(
            runs=1,
            idle_runs=0,
            waiting_chats=1,
            waiting=3,
            in_flight=2,
            answered=0,
            failed=0,
            retries=0,
        )
        await bot.wait_for(5)
        await trio.sleep(1)
        assert dispatcher.statistics().idle_runs == 1
