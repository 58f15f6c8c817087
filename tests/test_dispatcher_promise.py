"""The dispatcher's promise, against agents that fail in every way, and crashes.

A crash of the host is the store as it is at some moment, and nothing else of the
process: what it calls after that moment did not happen.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import trio
import trio.testing
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from trio.testing import MockClock

from clawtrio import (
    AgentOutput,
    Change,
    Contents,
    Dispatcher,
    Group,
    MemoryStore,
    RunResult,
    ScheduledTask,
    open_dispatcher,
)
from clawtrio.testing import AgentPipes

from .helpers import Reader, engine_of, frame

T = TypeVar("T")

SLOTS: Final = 2
LAG: Final = 0.3
#: Two chats share a group.
GROUPS: Final = {
    "a": Group("A", "a"),
    "b": Group("B", "b"),
    "b-too": Group("B", "b"),
    "c": Group("C", "c"),
}
#: What an agent may do about a message. The last two concern the callback.
DEEDS: Final = (
    *("answer", "parts", "silent", "error", "die", "half", "mute"),
    *("raise", "dawdle"),
)
chats = st.sampled_from(sorted(GROUPS))
moments = st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.5, 2.2, 6.0, 60.0])
#: By attempt; the last one is for all that follow.
deeds = st.lists(st.sampled_from(DEEDS), min_size=1, max_size=3)
TRIES: Final = 6


class LaggingStore(MemoryStore):
    """Takes a while for each change, so that crashes happen in between."""

    async def write(self, change: Change) -> None:
        await trio.sleep(LAG)
        await super().write(change)


@attrs.define
class Fate:
    """What became of a message."""

    chat: str
    deeds: list[str]
    accepted: bool = False
    stopped: bool = False
    begun: int = 0
    keys: list[tuple[int, int, str]] = attrs.field(factory=list)
    "Each text that was said: by which host, at which attempt, with which key."
    said_at: float = math.inf
    "When the callback with its last text has returned."
    answered: int = 0
    silent: int = 0
    failed: int = 0
    failing: bool = False
    "Whether its failure was said, or is being said, by this host."
    restarts: int = 0
    exposed: int = 0
    "In how many crashes something had been said that the store did not know."


class World:
    """Everything that outlives a host, and the host."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.clock = MockClock()
        self.fates: dict[str, Fate] = {}
        self.problems: list[str] = []
        self.live: Counter[str] = Counter()
        self.epoch = 0
        self.store = LaggingStore()
        self._opened = threading.Event()
        self._closing = trio.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._opened.wait()

    # -- the host, in a thread of its own ----------------------------------------------

    def _run(self) -> None:
        trio.run(self._main, clock=self.clock)

    async def _main(self) -> None:
        agent = engine_of(self.root, self.agent, max_concurrent=SLOTS)
        async with agent as self.engine, trio.open_nursery() as self.nursery:
            self.token = trio.lowlevel.current_trio_token()
            await self.start()
            self._opened.set()
            await self._closing.wait()
            await self.leave(abruptly=True)

    def do(self, work: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Do *work* in the host's thread."""
        return trio.from_thread.run(work, *args, trio_token=self.token)

    def close(self) -> None:
        """End it all."""
        trio.from_thread.run_sync(self._closing.set, trio_token=self.token)
        self._thread.join()
        shutil.rmtree(self.root)

    async def start(self) -> None:
        """Open a dispatcher on what the store holds."""
        for fate in self.fates.values():
            fate.restarts += 1
        self._left = trio.Event()
        self._gone = trio.Event()
        self._scope = trio.CancelScope()
        opened = trio.Event()
        epoch = self.epoch

        async def host() -> None:
            with self._scope:
                async with open_dispatcher(
                    self.engine,
                    GROUPS,
                    lambda *args: self.on_output(epoch, *args),
                    lambda *args: self.on_failure(epoch, *args),
                    self.store,
                ) as self.dispatcher:
                    opened.set()
                    await self._left.wait()
            self._gone.set()

        self.nursery.start_soon(host)
        await opened.wait()

    async def leave(self, *, abruptly: bool) -> None:
        """Leave the dispatcher's block."""
        if abruptly:
            self._scope.cancel()
        self._left.set()
        self.clock.autojump_threshold = 0
        await self._gone.wait()
        self.clock.autojump_threshold = float("inf")

    async def leave_and_return(self) -> None:
        """Leave the dispatcher's block, and open another on the same store."""
        await self.leave(abruptly=False)
        await self.start()

    async def restart(self) -> None:
        """Cancel the dispatcher's block, and open another on the same store."""
        await self.leave(abruptly=True)
        await self.start()

    async def crash(self) -> None:
        """Lose everything but what the store has."""
        contents = self.store.contents
        self._note_exposed(contents)
        self.epoch += 1
        await self.leave(abruptly=True)
        self.store = LaggingStore(contents)
        await self.start()

    def _note_exposed(self, contents: Contents) -> None:
        """Note whose words the store does not know of, one turn a group at most.

        It knows of them as soon as it had the time to.
        """
        states = {name(m.text): m.state for m in contents.messages.values()}
        exposed = defaultdict(list)
        for message, fate in self.fates.items():
            said = any(epoch == self.epoch for epoch, _, _ in fate.keys)
            unknown = said and (
                states.get(message) == "waiting"
                or (states.get(message) == "reached" and fate.answered > 0)
            )
            if unknown and trio.current_time() > fate.said_at + LAG:
                self.problems.append(f"{message} was said, and that not noted")
            if fate.failing and states.get(message, "failed") != "failed":
                self.problems.append(f"{message} failed, and that was not noted")
            if unknown or (fate.failing and message in states):
                fate.exposed += 1
            fate.failing = False
            if unknown:
                exposed[GROUPS[fate.chat].folder].append(message)
        for folder, messages in exposed.items():
            if len(messages) > 1:
                self.problems.append(f"{messages} of {folder} at once")

    async def advance(self, seconds: float) -> None:
        """Let time go by."""
        self.clock.autojump_threshold = 0
        await trio.sleep(seconds)
        self.clock.autojump_threshold = float("inf")

    async def settle(self) -> None:
        """Let time go by until everything has ended."""
        self.clock.autojump_threshold = 0
        # First, what is being submitted gets to the store.
        await trio.sleep(10)
        with trio.move_on_after(100_000):
            while self.store.contents.messages:  # noqa: ASYNC110 - a step of the test
                await trio.sleep(10)
        self.clock.autojump_threshold = float("inf")

    async def ask(self, chat: str, what: list[str], task: bool) -> None:  # noqa: FBT001
        """Submit a message, or a task, and do not wait until it is accepted."""
        message = f"m{len(self.fates)}"
        fate = self.fates[message] = Fate(chat, what)
        text = json.dumps({"message": message, "task": task})

        epoch = self.epoch

        async def submit(dispatcher: Dispatcher) -> None:
            with self._scope_of_host():
                if task:
                    await dispatcher.submit_task(
                        ScheduledTask(message, "", text, "once", "", chat_jid=chat)
                    )
                else:
                    await dispatcher.submit(chat, text)
                # Of a host that is gone, nobody heard.
                fate.accepted = epoch == self.epoch

        self.nursery.start_soon(submit, self.dispatcher)
        await trio.testing.wait_all_tasks_blocked()

    def _scope_of_host(self) -> trio.CancelScope:
        """Return a scope that ends with the host."""
        scope = trio.CancelScope()

        async def end(gone: trio.Event) -> None:
            await gone.wait()
            scope.cancel()

        self.nursery.start_soon(end, self._gone)
        return scope

    async def stop(self, chat: str) -> None:
        """Be a user who says stop."""
        for fate in self.fates.values():
            fate.stopped |= fate.chat == chat
        self.dispatcher.stop(chat)

    # -- the bot -----------------------------------------------------------------------

    async def on_output(
        self, epoch: int, chat: str, output: AgentOutput, key: str
    ) -> None:
        if epoch != self.epoch:
            return
        said = json.loads(output.result or "")
        fate = self.fates[said["message"]]
        if chat != fate.chat:
            self.problems.append(f"{said} went to {chat}")
        fate.said_at = math.inf
        fate.keys.append((epoch, said["attempt"], key))
        await trio.sleep(30 if said["deed"] == "dawdle" else 0.2)
        if epoch != self.epoch:
            return
        if said["deed"] == "raise":
            raise ValueError(key)
        fate.answered += not output.partial
        fate.said_at = trio.current_time()

    async def on_failure(
        self, epoch: int, chat: str, texts: tuple[str, ...], result: RunResult
    ) -> None:
        if epoch != self.epoch:
            return
        fates = [self.fates[name(text)] for text in texts]
        if any(chat != fate.chat for fate in fates):
            self.problems.append(f"{texts} failed in {chat}")
        if result.status != "error" and not all(fate.stopped for fate in fates):
            self.problems.append(f"{texts} failed with {result}")
        for fate in fates:
            fate.failing = True
        await trio.sleep(0.2)
        if epoch == self.epoch:
            for fate in fates:
                fate.failed += 1

    # -- the agents --------------------------------------------------------------------

    async def agent(self, pipes: AgentPipes) -> int:
        """Do about each message what it says."""
        folder = pipes.spec.name.split("-")[1]
        self.live[folder] += 1
        if self.live[folder] > 1:
            self.problems.append(f"two runs of {folder}")
        if self.live.total() > SLOTS:
            self.problems.append("too many runs")
        try:
            return await self._answer(Reader(pipes.stdin), pipes.stdout)
        finally:
            self.live[folder] -= 1

    async def _answer(self, reader: Reader, stdout: trio.abc.SendStream) -> int:
        said: list[bool] = []
        while (line := await reader.line()) and line.get("type") != "close":
            asked = json.loads(line.get("prompt") or line["text"])
            said.append(asked["task"])
            if any(said) and len(said) > 1:
                self.problems.append("a task shared a run")
            fate = self.fates[asked["message"]]
            attempt = fate.begun
            fate.begun += 1
            deed = fate.deeds[min(attempt, len(fate.deeds) - 1)]
            text: str | None = json.dumps({**asked, "attempt": attempt, "deed": deed})
            number = line.get("id", 0)
            await trio.sleep(1)
            if deed == "mute":
                await trio.sleep_forever()
            if deed in {"parts", "half"}:
                await stdout.send_all(frame(text, partial=True))
                await trio.sleep(1)
            if deed in {"die", "half"}:
                return 1
            if deed == "error":
                await stdout.send_all(frame(None, "error", answers=number))
                continue
            if deed == "silent":
                fate.silent += 1
                text = None
            await stdout.send_all(frame(text, answers=number))
        return 0


def name(text: str) -> str:
    """Return the name of a message."""
    return str(json.loads(text)["message"])


class Promise(RuleBasedStateMachine):
    """Messages, tasks, time, stops, restarts and crashes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(chat=chats, what=deeds, task=st.sampled_from([False, False, True]))
    def submit(self, chat: str, what: list[str], task: bool) -> None:  # noqa: FBT001
        """Somebody writes, or a task is due."""
        self.world.do(self.world.ask, chat, what, task)

    @rule(seconds=moments)
    def advance(self, seconds: float) -> None:
        """Time goes by."""
        self.world.do(self.world.advance, seconds)

    @rule(
        upset=st.sampled_from([World.crash, World.restart, World.leave_and_return]),
        seconds=moments,
    )
    def upset(self, upset: Callable[[World], Awaitable[None]], seconds: float) -> None:
        """The host ends one way or another, and comes back."""
        self.world.do(self.world.advance, seconds)
        self.world.do(upset, self.world)

    @rule(chat=chats)
    def stop(self, chat: str) -> None:
        """Somebody says stop."""
        self.world.do(self.world.stop, chat)

    def teardown(self) -> None:
        """In the end, everybody has got what was promised."""
        try:
            self.world.do(self.world.settle)
        finally:
            self.world.close()
        assert self.world.problems == []
        assert self.world.store.contents.messages == {}
        for message, fate in self.world.fates.items():
            check(message, fate)


def check(message: str, fate: Fate) -> None:
    """Make sure that a message ended as was promised, and so often as was."""
    story = (message, fate)
    ended = fate.answered + fate.failed
    if fate.accepted:
        assert ended or fate.silent, story
    assert fate.failed <= 1 + fate.exposed, story
    assert fate.answered <= 1 + fate.exposed, story
    if not fate.exposed:
        assert ended <= 1, story
        # What was said, and not to its end, is not said again.
        assert len({attempt for _, attempt, _ in fate.keys}) <= 1, story
    # Only a host that was gone could not count.
    assert fate.begun <= TRIES + fate.restarts, story
    keys = {key.rpartition("/")[0] for _, _, key in fate.keys}
    assert len(keys) <= 1, story
    for attempt in {attempt for _, attempt, _ in fate.keys}:
        numbers = [key.split("/")[-1] for _, a, key in fate.keys if a == attempt]
        assert numbers == [str(n) for n in range(len(numbers))], story


TestPromise = Promise.TestCase
TestPromise.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
