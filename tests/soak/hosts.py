"""What a soak has beside its plain runs: other bots, and an API."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import trio

from clawtrio import (
    AgentOutput,
    Engine,
    Group,
    MemoryStore,
    RunResult,
    open_dispatcher,
    open_engine,
)
from tests.e2e.conftest import HERE, STUBBORN, Site, wait_until
from tests.upstream import Call

from .callers import Tally

CHATS: Final = 3
MESSAGES: Final = 9
#: Seconds that the callback takes.
SLOWNESS: Final = 0.02
#: Seconds for all messages: a few runs, one after the other, on a busy machine.
ANSWERED_WITHIN: Final = 120.0
#: Seconds in which what a killed host has left is gone: a sweep sees what comes late.
SWEPT_WITHIN: Final = 60.0


async def dispatch(
    engine: Engine, name: str, chance: random.Random, tally: Tally
) -> None:
    """Have a dispatcher answer messages whose agents fail now and then: each once."""
    chats = [f"{name}-{n}" for n in range(CHATS)]
    said: Counter[int] = Counter()
    failed: list[str] = []

    async def on_output(chat: str, output: AgentOutput, key: str) -> None:
        await trio.sleep(SLOWNESS)
        said[int(key.split("/")[1])] += 1

    async def on_failure(chat: str, texts: tuple[str, ...], result: RunResult) -> None:
        await trio.lowlevel.checkpoint()
        failed.append(f"{result.ending.value}: {result.error}")

    groups = {chat: Group(chat, chat) for chat in chats}
    # All chosen before anything happens: what is chosen must not hang on when.
    texts = [
        (chance.choice(chats), _ask(f"{name}-{n}", chance)) for n in range(MESSAGES)
    ]
    messages = []
    with trio.move_on_after(ANSWERED_WITHIN) as scope:
        async with open_dispatcher(
            engine, groups, on_output, on_failure, MemoryStore()
        ) as dispatcher:
            for chat, text in texts:
                messages.append(await dispatcher.submit(chat, text))
            # Statistics are all that tells of messages that have ended.
            await wait_until(
                lambda: dispatcher.statistics().answered + len(failed) >= MESSAGES
            )
    tally.deeds["messages dispatched"] += MESSAGES
    where = f"dispatcher {name} ({engine.runtime.name})"
    if scope.cancelled_caught:
        tally.problems.append(f"{where}: not over after {ANSWERED_WITHIN:g} s")
    if failed:
        tally.problems.append(f"{where}: failed: {failed}")
    if said != Counter(messages):
        tally.problems.append(f"{where}: not once each: {dict(said)}")


def _ask(name: str, chance: random.Random) -> str:
    """Write a message whose agent answers it, or fails once before."""
    steps: list[list[Any]] = [["listen"]]
    if chance.random() < 0.3:
        steps.insert(0, ["flaky", f"{name}-failed"])
    return json.dumps({"note": name, "steps": steps})


async def kill_host(site: Site, chance: random.Random, tally: Tally) -> None:
    """Kill a bot amidst runs of deaf agents; later engines remove what it has left."""
    wanted = {
        "settings": {
            "root": str(site.root),
            "runtime": site.runtime,
            "agent": "echo",
            "agent_command": site.agent(STUBBORN),
            "min_free_bytes": 0,
            "timezone": "UTC",
        },
        "groups": ["one", "two"],
        "prompt": "go",
        "single_turn": False,
    }
    moment = chance.uniform(0.3, 3)
    process = await trio.lowlevel.open_process(
        [sys.executable, str(HERE / "host.py"), json.dumps(wanted)],
        stdout=subprocess.DEVNULL,
    )
    try:
        await trio.sleep(moment)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
    tally.deeds["hosts killed"] += 1
    remains = partial(trio.to_thread.run_sync, site.remains)
    with trio.move_on_after(SWEPT_WITHIN):
        while True:
            async with open_engine(site.settings()):
                pass
            if not (left := await remains()):
                return
            await trio.sleep(1)
    where = f"host killed after {moment:.2f} s ({site.runtime})"
    tally.problems.append(f"{where}: left {left}")


async def echo(call: Call) -> None:
    """Answer as an API that has nothing of its own to say, in two pieces."""
    body = await call.read()
    half = len(body) // 2
    await call.head(200, [("content-length", str(len(body)))])
    await call.send(body[:half])
    await trio.sleep(len(body) % 100 / 1000)
    await call.send(body[half:])
    await call.end()


async def sweep_up(sites: Sequence[Site]) -> None:
    """Have later engines remove the files of those that were killed.

    The first sweep only marks them, and none removes them before command_timeout.
    """
    with trio.move_on_after(SWEPT_WITHIN):
        while any(any(site.root.glob("data/engines/[!.]*")) for site in sites):
            for site in sites:
                async with open_engine(site.settings()):
                    await trio.sleep(0.5)
