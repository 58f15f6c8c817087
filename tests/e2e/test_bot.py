"""What a bot has around the engine, with agents in real containers."""

from __future__ import annotations

import re

import pytest
import trio

from clawtrio import (
    AgentOutput,
    Group,
    MemoryStore,
    Request,
    RunResult,
    ScheduleTask,
    SendMessage,
    open_dispatcher,
    open_engine,
    open_scheduler,
)
from clawtrio._cli_top import measure_memory, top
from clawtrio._settings import MIB

from .conftest import Site, group

GROUPS: dict[str, Group] = {
    "tg:1": group("main", is_main=True),
    "tg:2": group("chat"),
    "tg:3": group("other"),
}

#: Asks for things as NanoClaw's tools do, and for what is not its to ask.
ASK = """
def ask(kind, number, **fields):
    path = f"/workspace/ipc/{kind}/{number}.json"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "w") as file:
        json.dump(fields, file)
    os.rename(f"{path}.tmp", path)

while (given := hear()) and given.get("type") != "close":
    text = given.get("prompt") or given["text"]
    if text == "ask":
        forged = {"groupFolder": "main", "isMain": True, "is_main": True}
        task = {"schedule_type": "once", "schedule_value": "2020-01-01T00:00:00Z"}
        ask("messages", 1, type="message", chatJid="tg:2", text="mine", **forged)
        ask("messages", 2, type="message", chatJid="tg:3", text="not mine", **forged)
        ask("tasks", 3, type="schedule_task", prompt="due", targetJid="tg:2", **task)
        ask("tasks", 4, type="schedule_task", prompt="no", targetJid="tg:3", **task)
        ask("tasks", 5, type="register_group", jid="tg:4", name="N", folder="n",
            trigger="@A", **forged)
    emit(f"re: {text}", answers=given.get("id", 0))
"""


async def test_agents_ask_for_what_is_theirs(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """A message and a task of the group's own come through; nothing else does."""
    said: list[tuple[str, str | None]] = []
    asked: list[Request] = []
    news = trio.Event()

    async def say(chat: str, output: AgentOutput, _: str) -> None:
        await trio.lowlevel.checkpoint()
        said.append((chat, output.result))
        if output.result == "re: due":
            news.set()

    async def regret(chat: str, texts: tuple[str, ...], result: RunResult) -> None:
        raise AssertionError(chat, texts, result)

    with trio.fail_after(60):
        async with (
            open_engine(site.settings(ASK)) as engine,
            open_dispatcher(engine, GROUPS, say, regret, MemoryStore()) as dispatcher,
            open_scheduler(dispatcher) as scheduler,
            engine.open_requests(GROUPS) as requests,
            trio.open_nursery() as nursery,
        ):

            async def obey() -> None:
                async for request in requests:
                    async with request:
                        asked.append(request)
                        await scheduler.apply(request)

            nursery.start_soon(obey)
            await dispatcher.submit("tg:2", "ask")
            await news.wait()
            while len(asked) < 2:  # noqa: ASYNC110 - whichever box is looked at first
                await trio.sleep(0.02)
            nursery.cancel_scope.cancel()

    assert said == [("tg:2", "re: ask"), ("tg:2", "re: due")]
    assert {(type(request), request.group.folder) for request in asked} == {
        (SendMessage, "chat"),
        (ScheduleTask, "chat"),
    }
    mailbox = site.root / "data" / "ipc" / "chat"
    assert [*mailbox.glob("messages/*"), *mailbox.glob("tasks/*.json")] == []
    assert "refused" in caplog.text


async def test_memory_is_measured(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is that of all processes in the container, and of no other; top shows it."""
    agent = f"""
hear()
child = subprocess.Popen(["sleep", "60"])
large = b"x" * {64 * MIB}
emit("large")
hear()
child.kill()
"""
    with trio.fail_after(30):
        async with (
            open_engine(site.settings(agent)) as engine,
            engine.open_run(group(), "Hi", chat_jid="tg:2") as run,
        ):
            await anext(run)
            process = run.statistics().process
            assert process is not None
            memory = measure_memory([process])
            assert await top(engine.settings) == 0
            run.finish()

    assert list(memory) == [process]
    assert 64 * MIB < memory[process] < 128 * MIB
    assert re.search(r" \d{2,3} MiB\n$", capfd.readouterr().out)
