"""kill -9 of whatever takes part in a run: it ends, and nothing stays behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from clawtrio import Ending, open_engine

from .conftest import HERE, STUBBORN, Site, group, nothing_left, wait_until

LISTENING = "hear(); sys.stdin.read()"

log = logging.getLogger(__name__)


def victim(site: Site, which: str) -> int:
    """Return the pid of the agent, of the container's first process, or the client."""
    if which == "client":
        (client,) = site.clients()
        return client.pid
    (agent,) = site.agents()
    return agent.pid if which == "agent" else agent.parent


@pytest.mark.parametrize("which", ["agent", "init", "client"])
async def test_killed(site: Site, which: str) -> None:
    """Whichever process of a run is killed, it has FAILED, at once."""
    with trio.fail_after(30):
        async with open_engine(site.settings(STUBBORN)) as engine:
            async with engine.open_run(group(), "go", chat_jid="tg:1") as live:
                first = await anext(live)
                os.kill(victim(site, which), signal.SIGKILL)
                killed = trio.current_time()
                rest = [output async for output in live]
            took = trio.current_time() - killed

    assert (first.result, rest) == ("here", [])
    assert (live.result.ending, live.result.exit_code) == (Ending.FAILED, 137)
    assert live.result.unanswered == ()
    assert "Container exited with code 137: killed" in (live.result.error or "")
    assert took < 5


async def test_client_killed_while_it_starts(site: Site) -> None:
    """A client that is killed before there is an agent leaves no container either."""

    async def start_and_kill(folder: str, seconds: float) -> None:
        async with engine.open_run(group(folder), "go", chat_jid="tg:1") as live:
            await trio.sleep(seconds)
            before = {process.pid for process in site.clients()}
            for process in site.clients():
                if live.container_name in process.argv or site.runtime == "bwrap":
                    os.kill(process.pid, signal.SIGKILL)
            assert before
            result = await live.wait()
            assert result.ending in {Ending.FAILED, Ending.NOT_STARTED}

    with trio.fail_after(60):
        async with open_engine(site.settings(STUBBORN)) as engine:
            for number in range(5):
                await start_and_kill(f"g{number}", 0.05 * number)


@attrs.define
class Host:
    """A bot in a process of its own.

    Attributes:
        process: The process.
        stdout: What it prints.
    """

    process: trio.Process
    stdout: trio.abc.ReceiveStream
    _seen: bytes = b""

    async def hear_from(self, *folders: str) -> None:
        """Wait until the agents of these groups have said something."""
        while not all(f'"group": "{f}"'.encode() in self._seen for f in folders):
            chunk = await self.stdout.receive_some()
            assert chunk, "the host left"
            self._seen += chunk

    async def kill(self) -> None:
        """Kill it without a warning, and wait until it is gone."""
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def host(site: Site, agent: str | None, **changes: Any) -> AsyncIterator[Host]:
    """Run a bot in a process of its own."""
    wanted = {
        "settings": {
            "root": str(site.root),
            "runtime": site.runtime,
            "agent": "echo",
            "agent_command": None if agent is None else site.agent(agent),
            "min_free_bytes": 0,
            "timezone": "UTC",
            "stop_grace": 1,
        },
        "groups": ["one", "two", "three"],
        "prompt": "go",
        "single_turn": False,
        **changes,
    }
    process = await trio.lowlevel.open_process(
        [sys.executable, str(HERE / "host.py"), json.dumps(wanted)],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield Host(process, process.stdout)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def test_host_killed(site: Site) -> None:
    """SIGKILL of the host leaves no container of an agent that has a lifeline."""
    with trio.fail_after(60):
        async with host(site, None) as bot:
            await bot.hear_from("one", "two", "three")
            assert len(site.containers()) >= 3
            await bot.kill()
            killed = time.monotonic()
            with trio.fail_after(10):
                await wait_until(lambda: not site.containers())
        log.info("%s: gone %.2f s after", site.runtime, time.monotonic() - killed)
        assert len(site.engine_files()) == 1
        async with open_engine(site.settings()) as engine:
            result = await engine.run(group("one"), "again", chat_jid="tg:1")

    assert result.result == "again"


@pytest.mark.parametrize("seconds", [0.0, 0.1])
async def test_host_killed_while_it_starts(site: Site, seconds: float) -> None:
    """SIGKILL of the host leaves nothing of what was about to be a container."""
    with trio.fail_after(60):
        async with host(site, LISTENING) as bot:
            await wait_until(site.strays)
            await trio.sleep(seconds)
            await bot.kill()
        with trio.fail_after(10):
            await wait_until(lambda: not site.containers() and not site.strays())
        async with open_engine(site.settings()) as engine:
            await engine.run(group("one"), "again", chat_jid="tg:1")


async def test_host_killed_with_deaf_agents(site: Site, tmp_path: Path) -> None:
    """The next start removes what a dead engine left, and what no other engine has."""
    elsewhere = attrs.evolve(site, root=tmp_path / "elsewhere")
    elsewhere.root.mkdir()
    with trio.fail_after(60), nothing_left(elsewhere):
        async with (
            open_engine(site.settings()) as same_root,
            open_engine(elsewhere.settings()) as other_root,
            same_root.open_run(group("mine"), "go", chat_jid="tg:1") as mine,
            other_root.open_run(group("theirs"), "go", chat_jid="tg:2") as theirs,
        ):
            for live in (mine, theirs):
                assert (await anext(live)).result == "go"
            alive = set(site.containers())
            assert alive
            async with host(site, STUBBORN) as bot:
                await bot.hear_from("one", "two", "three")
                await bot.kill()
            started = time.monotonic()
            async with open_engine(site.settings()) as next_one:
                swept = time.monotonic() - started
                assert set(site.containers()) == alive
                assert len(site.engine_files()) == 2
                await next_one.run(group("one"), "again", chat_jid="tg:1")
            log.info("%s: swept in %.2f s", site.runtime, swept)
            for live in (mine, theirs):
                await live.send("still there?")
                live.finish()
                heard = [output.result async for output in live]
                assert "still there?" in heard
                assert live.result.ending is Ending.EXITED
