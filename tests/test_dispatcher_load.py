"""The dispatcher under load, and killed without warning: real time, real files."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Final

import pytest
import trio
from trio.testing import MockClock

from clawtrio import AgentOutput, Group, MemoryStore, RunResult, open_dispatcher
from clawtrio.testing import AgentPipes

from .helpers import Reader, engine_of, frame

GROUPS: Final = 500
MESSAGES: Final = 5000
SLOTS: Final = 20


@pytest.mark.slow
async def test_many_groups_share_few_slots(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """5,000 messages of 500 groups are answered once, though 1 % of runs fail."""
    chance = random.Random(7)
    groups = {f"tg:{n}": Group(f"G{n}", f"g{n}") for n in range(GROUPS)}
    answers: Counter[str] = Counter()
    failed: list[str] = []
    done = trio.Event()
    live = most = 0

    async def agent(pipes: AgentPipes) -> int:
        nonlocal live, most
        live += 1
        most = max(most, live)
        # Somewhere on the way, one in a hundred is gone.
        left = chance.randrange(3) if chance.random() < 0.01 else -1
        reader = Reader(pipes.stdin)
        try:
            while (line := await reader.line()) and line.get("type") != "close":
                if left == 0:
                    return 1
                left -= 1
                await trio.sleep(chance.random())
                text = line.get("prompt") or line["text"]
                await pipes.stdout.send_all(frame(text, answers=line.get("id", 0)))
            return 0
        finally:
            live -= 1

    async def on_output(chat: str, output: AgentOutput, key: str) -> None:
        await trio.lowlevel.checkpoint()
        assert output.result is not None
        answers[output.result] += 1
        if len(answers) == MESSAGES:
            done.set()

    async def on_failure(chat: str, texts: tuple[str, ...], result: RunResult) -> None:
        await trio.lowlevel.checkpoint()
        failed.extend(texts)

    store = MemoryStore()
    started = time.perf_counter()
    tracemalloc.start()
    async with (
        engine_of(tmp_path, agent, max_concurrent=SLOTS) as engine,
        open_dispatcher(engine, groups, on_output, on_failure, store) as dispatcher,
    ):
        for n in range(MESSAGES):
            await dispatcher.submit(f"tg:{n % GROUPS}", f"m{n}")
        await done.wait()
        retries = dispatcher.statistics().retries
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(  # noqa: T201 - the figures are asked for
        f"\n{time.perf_counter() - started:.1f} s with tracemalloc, "
        f"{peak / 2**20:.1f} MiB at most, {trio.current_time():.0f} s of virtual time, "
        f"{retries} retries"
    )
    assert set(answers.values()) == {1}
    assert failed == []
    assert store.contents.messages == {}
    assert most == SLOTS
    assert retries > 0
    assert peak < 100 * 2**20


#: A bot: it appends to its log what is said, and what fails, before it returns.
BOT: Final = """
import os, sys
from pathlib import Path
import trio
import clawtrio
from clawtrio.testing import FakeRuntime
from tests.helpers import Reader, frame

root, count = Path(sys.argv[1]), int(sys.argv[2])
CHATS = 8
log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

async def agent(pipes):
    reader = Reader(pipes.stdin)
    while (line := await reader.line()) and line.get("type") != "close":
        text = line.get("prompt") or line["text"]
        await trio.sleep(0.005)
        if int(text) % 50 == 49:
            return 1
        await pipes.stdout.send_all(frame(text, answers=line.get("id", 0)))
    return 0

async def say(*words):
    os.write(log, (" ".join(words) + "\\n").encode())
    await trio.sleep(0.002)

async def on_output(chat, output, key):
    await say("said", output.result, key)

async def on_failure(chat, texts, result):
    for text in texts:
        await say("failed", text, "-")

async def main():
    clawtrio._dispatcher.RETRY_DELAY = 0.01
    groups = {f"c{n}": clawtrio.Group(f"C{n}", f"c{n}") for n in range(CHATS)}
    settings = clawtrio.Settings(
        root=str(root), agent="echo", min_free_bytes=0, max_concurrent=4
    )
    store = clawtrio.SqliteStore(root / "db")
    async with clawtrio.open_engine(settings, FakeRuntime(agent)) as engine:
        async with clawtrio.open_dispatcher(
            engine, groups, on_output, on_failure, store
        ) as dispatcher:
            await say("began", "-", "-")
            for n in range(count):
                text = str(int(sys.argv[3]) + n)
                message_id = await dispatcher.submit(f"c{n % CHATS}", text)
                await say("accepted", text, str(message_id))
            while True:
                found = dispatcher.statistics()
                if found.waiting == found.in_flight == 0:
                    await trio.sleep(0.1)
                    break
                await trio.sleep(0.01)
    await say("ended", "-", "-")

trio.run(main)
"""
KILLS: Final = 20
EACH: Final = 40


@pytest.mark.slow
def test_a_bot_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    """Killed twenty times, it answers or fails each message, and repeats few."""
    chance = random.Random(7)
    log = tmp_path / "log"

    def run(count: int, first: int, seconds: float | None) -> None:
        argv = [sys.executable, "-c", BOT, str(tmp_path), str(count), str(first)]
        began = log.read_text().count("began") if log.exists() else 0
        with subprocess.Popen(argv, cwd=Path(__file__).parents[1]) as bot:
            if seconds is not None:
                while not log.exists() or log.read_text().count("began") == began:
                    time.sleep(0.01)
                time.sleep(seconds)
                bot.send_signal(signal.SIGKILL)
            assert bot.wait(120) == (0 if seconds is None else -signal.SIGKILL)

    for n in range(KILLS):
        run(EACH, n * EACH, chance.uniform(0.05, 0.6))
    run(0, 0, None)

    lines = [line.split() for line in log.read_text().splitlines()]
    accepted = {text: number for word, text, number in lines if word == "accepted"}
    said = Counter(text for word, text, _ in lines if word == "said")
    failed = Counter(text for word, text, _ in lines if word == "failed")
    repeats = sum((said + failed).values()) - len(said | failed)
    print(  # noqa: T201 - the figures are asked for
        f"\n{len(accepted)} accepted, {len(said)} answered, {len(failed)} failed, "
        f"{repeats} repeats"
    )
    assert accepted.keys() <= said.keys() | failed.keys()
    assert len(accepted) > KILLS
    # A repeat is of the turn that a group was at when it was killed: one of 8.
    assert repeats <= KILLS * 8
    keys = {(text, key) for word, text, key in lines if word == "said"}
    assert len(keys) == len(said)
    assert {key.split("/")[1] for text, key in keys if text in accepted} <= {
        *accepted.values()
    }
    killed_between: Counter[str] = Counter()
    last: dict[str, int] = {}
    kills = 0
    for word, text, _ in lines:
        kills += word == "began"
        if word in {"said", "failed"}:
            # Without a kill in between, nothing is said twice.
            assert last.get(text) != kills
            killed_between[text] += text in last
            last[text] = kills
    assert max(killed_between.values()) <= 2
