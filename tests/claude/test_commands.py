"""Claude at the terminal: ``clawtrio run`` and ``clawtrio chat`` as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.anthropic_api import Text
from tests.e2e.conftest import Site

from .conftest import BOUND, api_for


def environment() -> dict[str, str]:
    """Return what a shell has, without settings of ours: the agent is Claude."""
    return {k: v for k, v in os.environ.items() if not k.startswith("CLAWTRIO_")}


@asynccontextmanager
async def command(site: Site, *arguments: str) -> AsyncIterator[trio.Process]:
    """Run clawtrio in the bot's directory, and see that it goes well."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "clawtrio", *arguments, "--runtime", site.runtime],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=site.root,
        env=environment(),
    )
    try:
        with trio.fail_after(BOUND):
            yield process
            assert await process.wait() == 0
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()


async def read_until(process: trio.Process, text: str) -> str:
    """Read what it prints, up to *text*."""
    assert process.stdout is not None
    seen = b""
    while text.encode() not in seen:
        chunk = await process.stdout.receive_some()
        assert chunk, seen
        seen += chunk
    return seen.decode()


async def test_run_goes_on(site: Site) -> None:
    """One question, one answer; the next run knows of it."""
    async with api_for(site, Text(("The first.",)), Text(("The second.",))) as api:
        async with command(site, "run", "one") as process:
            assert await read_until(process, "first.\n") == "The first.\n"
        async with command(site, "run", "--json", "two") as process:
            lines = (await read_until(process, '"type": "result"')).splitlines()
        requests = [json.dumps(turn.body["messages"]) for turn in api.turns]

    texts = [json.loads(line).get("result") for line in lines[:-1]]
    assert "The second." in texts
    assert json.loads(lines[-1])["status"] == "success"
    assert "The first." not in requests[0]
    assert "The first." in requests[1]


async def test_chat(site: Site) -> None:
    """Each line is answered in the same run, until the end of the input."""
    async with api_for(site, Text(("The first.",)), Text(("The second.",))) as api:
        async with command(site, "chat") as process:
            assert process.stdin is not None
            await process.stdin.send_all(b"Feed the cat.\n")
            assert await read_until(process, "first.\n") == "The first.\n"
            await process.stdin.send_all(b"And the dog.\n")
            assert await read_until(process, "second.\n") == "The second.\n"
            await process.stdin.aclose()
        first, second = (json.dumps(turn.body["messages"]) for turn in api.turns)
    assert "Feed the cat." in first
    assert "And the dog." not in first
    assert "And the dog." in second
    assert len(list((site.root / "data" / "logs" / "main").iterdir())) == 1
