"""Callers that raise, dawdle or are cancelled: the container goes first."""

from __future__ import annotations

import logging
import random
from functools import partial

import pytest
import trio

from clawtrio import (
    AgentOutput,
    ContainerConfig,
    Ending,
    Engine,
    GroupBusyError,
    Run,
    open_engine,
)

from .conftest import RUNTIMES, STUBBORN, Site, facts, group

log = logging.getLogger(__name__)

COUNT = """
hear()
for number in range(3):
    emit(str(number))
"""
TALKATIVE = """
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
for number in range(10**9):
    emit(str(number), partial=True)
    time.sleep(0.001)
"""


async def test_callback_raises(site: Site) -> None:
    """An error in the callback comes out as itself, after the container is gone."""
    heard = []

    async def on_output(output: AgentOutput) -> None:
        await trio.lowlevel.checkpoint()
        heard.append(output.result)
        if output.result == "1":
            raise LookupError("of the callback")

    with trio.fail_after(30):
        async with open_engine(site.settings(TALKATIVE)) as engine:
            with pytest.raises(LookupError, match="of the callback"):
                await engine.run(group(), "go", chat_jid="tg:1", on_output=on_output)
            assert site.containers() == []
            assert engine.runs == ()

    assert heard == ["0", "1"]


async def test_block_raises(site: Site) -> None:
    """An error in the block comes out as itself, after the container is gone."""
    runs: list[Run] = []

    async def raise_in_block(engine: Engine) -> None:
        async with engine.open_run(group(), "go", chat_jid="tg:1") as live:
            runs.append(live)
            async for _ in live:
                raise LookupError("of the block")

    with trio.fail_after(30):
        async with open_engine(site.settings(STUBBORN)) as engine:
            with pytest.raises(LookupError, match="of the block"):
                await raise_in_block(engine)
            assert site.containers() == []

    assert facts(runs[0].result) == ("success", "STOPPED", 1, None)


async def test_engine_block_raises(site: Site) -> None:
    """An error beside live runs comes out of the engine's block as itself."""
    runs: list[Run] = []

    async def raise_in_block() -> None:
        async with (
            open_engine(site.settings(TALKATIVE)) as engine,
            engine.open_run(group("one"), "go", chat_jid="tg:1") as one,
            engine.open_run(group("two"), "go", chat_jid="tg:2") as two,
        ):
            runs.extend([one, two])
            await anext(one)
            raise LookupError("beside")

    with trio.fail_after(30), pytest.raises(LookupError, match="beside"):
        await raise_in_block()

    assert [live.result.ending for live in runs] == [Ending.STOPPED, Ending.STOPPED]
    assert site.containers() == []


async def test_all_is_cancelled(site: Site) -> None:
    """A bot that is cancelled as a whole is gone within the ladder's bound."""
    with trio.fail_after(30):
        with trio.CancelScope() as scope:
            async with (
                open_engine(site.settings(STUBBORN)) as engine,
                trio.open_nursery() as nursery,
            ):
                for folder in ("one", "two", "three"):
                    ask = partial(engine.run, group(folder), "go", chat_jid="tg:1")
                    await nursery.start(ask)
                await trio.sleep(0.5)
                scope.cancel()
                cancelled = trio.current_time()
        took = trio.current_time() - cancelled

    assert scope.cancelled_caught
    assert site.containers() == []
    assert took < 10


@pytest.mark.parametrize("runtime_name", RUNTIMES[::2], indirect=True)
async def test_callback_sleeps(site: Site) -> None:
    """What a callback takes longer than answer_timeout is not the agent's fault."""
    heard = []

    async def on_output(output: AgentOutput) -> None:
        await trio.sleep(2.2 if output.result == "1" else 0)
        heard.append(output.result)

    with trio.fail_after(30):
        async with open_engine(site.settings(COUNT)) as engine:
            result = await engine.run(
                group(container_config=ContainerConfig(timeout=2)),
                "go",
                chat_jid="tg:1",
                on_output=on_output,
                single_turn=False,
            )

    assert heard == ["0", "1", "2"]
    assert facts(result) == ("success", "EXITED", 3, None)


async def test_callback_is_cancelled(site: Site) -> None:
    """Cancelled in its callback, a caller goes on when the container is gone."""
    heard = []

    async def on_output(output: AgentOutput) -> None:
        heard.append(output.result)
        if output.result == "2":
            scope.cancel()
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()

    with trio.fail_after(30):
        async with open_engine(site.settings(TALKATIVE)) as engine:
            with trio.CancelScope() as scope:
                await engine.run(group(), "go", chat_jid="tg:1", on_output=on_output)
            assert scope.cancelled_caught
            assert site.containers() == []

    assert heard == ["0", "1", "2"]


async def test_group_is_busy_until_the_end(site: Site) -> None:
    """A group has one run, and can have the next once that is over."""
    with trio.fail_after(30):
        async with open_engine(site.settings()) as engine:
            async with engine.open_run(group(), "go", chat_jid="tg:1"):
                with pytest.raises(GroupBusyError):
                    await engine.run(group("Chat"), "go", chat_jid="tg:1")
            result = await engine.run(group(), "again", chat_jid="tg:1")

    assert result.result == "again"


async def test_cancelled_at_any_moment(site: Site) -> None:
    """Whenever a caller is cancelled, it goes on in time, and the container is gone."""
    # Every other one is deaf to SIGTERM and to the end of its lifeline.
    agent = """
if int(hear()["groupFolder"][1:]) % 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
for number in range(10**9):
    emit(str(number), partial=True)
    time.sleep(0.01)
"""
    moments = random.Random(20)
    took: list[float] = []
    limit = trio.CapacityLimiter(5)

    async def cancel_after(seconds: float, folder: str) -> None:
        heard: list[str | None] = []
        live: Run | None = None
        async with limit:
            with trio.CancelScope() as scope:
                scope.deadline = trio.current_time() + seconds
                async with engine.open_run(group(folder), "go", chat_jid="t") as live:
                    async for output in live:
                        heard += [output.result]
            took.append(trio.current_time() - scope.deadline)
        assert scope.cancelled_caught
        assert heard == [str(number) for number in range(len(heard))]
        if live is not None:
            assert live.result.ending is Ending.STOPPED
            assert live.result.outputs - len(heard) in {0, 1}

    with trio.fail_after(60):
        async with open_engine(site.settings(agent, stop_grace=0.3)) as engine:
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    moment = moments.uniform(0, 0.5)
                    nursery.start_soon(cancel_after, moment, f"g{number}")
            assert site.containers() == []

    log.info("%s: gone %.2f to %.2f s after", site.runtime, min(took), max(took))
    assert max(took) < 10
