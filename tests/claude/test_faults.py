"""What goes wrong: the API, the CLI, the host."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.anthropic_api import Broken, Failure, Silence, Step, Text, ToolUse

from .conftest import ENDLESS, Talk, Talking

WAITS = 5


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (Failure(401), "401"),
        (Failure(429), "429"),
        (Failure(500), "500"),
        (Failure(529), "529"),
        (Broken("half of it", pause=0.1), "API"),
        (Silence(60), "timed out"),
    ],
)
async def test_error_is_an_error(talking: Talking, step: Step, problem: str) -> None:
    """What the API fails with is an error within seconds, and never an answer."""
    async with talking(step, API_TIMEOUT_MS="1000") as talk:
        await talk.start()
        began, error, waits = await talk.agent.next(3)
        assert began["partial"]
        assert (error["status"], error["result"], error["answers"]) == (
            "error",
            None,
            0,
        )
        assert problem.lower() in error["error"].lower()
        assert (waits["status"], waits["result"]) == ("success", None)

        # And it goes on, once the API does.
        talk.api.script[:] = [Text(("back",))]
        await talk.tell("again", 1)
        assert (await talk.agent.next(2))[0]["result"] == "back"
        await talk.close()


@pytest.mark.parametrize("step", [Failure(529), Broken("half"), Silence(1)])
async def test_recovery(talking: Talking, step: Step) -> None:
    """What goes wrong once is tried again, and nobody hears of it."""
    async with talking(step, Text(("fine",))) as talk:
        await talk.start()
        assert (await talk.agent.next(2))[1]["result"] == "fine"
        await talk.close()
        # What is not streamed begins when it is whole, for which there is no time.
        assert all(turn.body["stream"] for turn in talk.api.turns)


async def busy(talk: Talk) -> list[int]:
    """Have Claude run a command, and name all processes below the agent."""
    await talk.start()
    await talk.agent.next(1)
    await talk.api.wait_turns(1)
    with trio.fail_after(WAITS):
        while not running(talk, "tail"):  # noqa: ASYNC110 - another process's doing
            await trio.sleep(0.05)
    return talk.children()


def running(talk: Talk, name: str) -> bool:
    """Tell whether a program of that name is below the agent."""
    return any(name_of(pid) == name for pid in talk.children())


def name_of(pid: int) -> str | None:
    """Name a live process."""
    try:
        head, _, rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")
    except OSError:
        return None
    return None if rest[:1] in b"ZX" else head.partition(b"(")[2].decode()


async def all_gone(pids: list[int]) -> None:
    """Wait until processes are dead: one that is killed may take a moment to die."""
    while any(map(name_of, pids)):  # noqa: ASYNC110 - nobody tells us
        await trio.sleep(0.01)


async def test_host_that_goes_ends_all(talking: Talking) -> None:
    """At the end of its lifeline the agent is gone within a second, the CLI too."""
    async with talking(ENDLESS) as talk:
        below = await busy(talk)
        assert len(below) >= 2
        await talk.agent.hang_up()
        with trio.fail_after(1):
            assert await talk.agent.process.wait() == 129
            await all_gone(below)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_all(talking: Talking, number: signal.Signals) -> None:
    """A signal ends the agent within five seconds, the CLI too."""
    async with talking(ENDLESS) as talk:
        below = await busy(talk)
        talk.agent.process.send_signal(number)
        with trio.fail_after(5):
            assert await talk.agent.process.wait() == 128 + number
            await all_gone(below)


async def test_signal_while_the_host_reads_nothing(talking: Talking) -> None:
    """A host that does not read holds up the answers, but no signal."""
    async with talking(Text(("x" * 2**20,))) as talk:
        await talk.start()
        await talk.agent.next(1)
        await talk.api.wait_turns(1)
        await trio.sleep(0.5)  # by now the pipe is full
        talk.agent.process.terminate()
        with trio.fail_after(5):
            assert await talk.agent.process.wait() == 128 + signal.SIGTERM


async def test_cli_that_dies(talking: Talking) -> None:
    """A CLI that is killed is an error that answers what was open, and the end."""
    async with talking(ENDLESS) as talk:
        begun = await busy(talk)
        for pid in begun:
            if name_of(pid) == "claude":
                kill(pid)
        (error,) = await talk.agent.rest()
        assert (error["status"], error["answers"]) == ("error", 0)
        assert talk.agent.process.returncode == 1
    # Its command lives on: here is no container that would end with it.
    for pid in begun:
        kill(pid)


def kill(pid: int) -> None:
    """Kill a process of the agent's, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def test_no_cli(talking: Talking) -> None:
    """Where the CLI does not start, that is an error, with its own words."""
    prelude = (
        "import claude_agent_sdk as sdk\n"
        "made = sdk.ClaudeAgentOptions\n"
        "sdk.ClaudeAgentOptions = lambda **o: made(cli_path='/bin/false', **o)\n"
    )
    async with talking(prelude=prelude) as talk:
        await talk.start()
        (error,) = await talk.agent.rest()
        assert error["status"] == "error"
        assert error["answers"] == 0
        assert talk.agent.process.returncode == 1


async def test_signs_of_life(talking: Talking) -> None:
    """While a tool works silently there are heartbeats; while it waits, none."""
    prelude = "import claude; claude.HEARTBEAT = 0.2"
    async with talking(
        ToolUse("Bash", {"command": "sleep 1.5"}), Text(("ok",)), prelude=prelude
    ) as talk:
        await talk.start()
        frames = await talk.agent.next(5)
        assert [f.get("partial") for f in frames[1:]] == [True] * 4
        assert [f["result"] for f in frames] == [None] * 5
        with trio.fail_after(10):
            while frames[-1].get("partial"):
                frames = await talk.agent.next(1)
        assert frames[-1]["result"] == "ok"
        await talk.agent.next(1)
        await trio.sleep(0.6)
        assert await talk.close() == []


async def test_stdout_that_is_closed(talking: Talking) -> None:
    """An agent that nobody listens to leaves, and takes the CLI along."""
    async with talking(ENDLESS) as talk:
        below = await busy(talk)
        assert talk.agent.process.stdout is not None
        await talk.agent.process.stdout.aclose()
        for pid in below:
            if name_of(pid) == "tail":
                kill(pid)
        assert await talk.agent.process.wait() == 1
        with trio.fail_after(5):
            await all_gone(below)
