"""Agents that behave: what they say arrives, whole and in order."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from clawtrio import AgentOutput, open_engine

from .conftest import Site, facts, group


@pytest.mark.parametrize("stdin", ["lifeline", "eof"])
async def test_conversation(site: Site, stdin: str) -> None:
    """The echo agent answers a prompt, then a follow-up, then closes."""
    heard = []
    settings = site.settings(stdin=stdin)
    with trio.fail_after(30):
        async with open_engine(settings) as engine:
            async with engine.open_run(group(), "one\ntwo", chat_jid="tg:1") as run:
                async for output in run:
                    if output.result is None:
                        continue
                    heard.append(output.result)
                    if heard == ["one", "two"]:
                        await run.send("and three?")
                    elif heard == ["one", "two", "and three?"]:
                        run.finish()
            assert engine.runs == ()

    assert heard == ["one", "two", "and three?"]
    assert facts(run.result) == ("success", "EXITED", run.result.outputs, None)
    assert run.result.exit_code == 0
    assert run.result.unanswered == ()
    assert run.result.new_session_id is not None
    assert "exited" in run.result.log_path.read_text().lower()


@pytest.mark.parametrize("stdin", ["lifeline", "eof"])
async def test_single_turn(site: Site, stdin: str) -> None:
    """engine.run returns the last text, and the agent has left by itself."""
    with trio.fail_after(30):
        async with open_engine(site.settings(stdin=stdin)) as engine:
            result = await engine.run(group(), "Hello?", chat_jid="tg:1")

    assert (result.status, result.ending.name) == ("success", "EXITED")
    assert result.result == "Hello?"


async def test_own_agent(site: Site) -> None:
    """A command of the user's own runs in place of ours, in the group's directory."""
    agent = """
given = hear()
open("note", "w").write(given["prompt"])
emit(os.getcwd(), newSessionId="s1")
emit(f"{os.getuid()} {os.environ['HOME']} {os.environ['WORD']}")
"""
    settings = site.settings(agent, agent_env={"WORD": "a, b=c"})
    heard: list[str | None] = []

    async def on_output(output: AgentOutput) -> None:
        await trio.lowlevel.checkpoint()
        heard.append(output.result)

    with trio.fail_after(30):
        async with open_engine(settings) as engine:
            result = await engine.run(
                group(), "remember", chat_jid="tg:1", on_output=on_output
            )

    assert heard == ["/workspace/group", "1000 /home/node a, b=c"]
    assert facts(result) == ("success", "EXITED", 2, None)
    assert result.new_session_id == "s1"
    note = trio.Path(site.root, "groups", "chat", "note")
    assert await note.read_text() == "remember"


async def test_large_both_ways(site: Site) -> None:
    """A prompt of 5 MiB arrives whole, and so does an answer of that size."""
    text = "häuser " * (5 * 2**20 // 8)
    with trio.fail_after(30):
        async with open_engine(site.settings()) as engine:
            result = await engine.run(group(), text, chat_jid="tg:1")

    assert result.status == "success"
    assert result.result == text


@pytest.mark.parametrize(
    ("runtime_name", "runs"),
    [
        pytest.param("docker", 5, marks=pytest.mark.docker),
        pytest.param("podman", 5, marks=pytest.mark.podman),
        pytest.param("bwrap", 50, marks=pytest.mark.bwrap),
    ],
)
async def test_many_at_once(site: Site, runs: int) -> None:
    """Of many runs at once, each with 50 outputs, all arrive in order."""
    heard: dict[str, list[str | None]] = {f"g{number}": [] for number in range(runs)}

    async def ask(folder: str) -> None:
        async def on_output(output: AgentOutput) -> None:
            await trio.lowlevel.checkpoint()
            if output.result is not None:
                heard[folder].append(output.result)

        prompt = "\n".join(f"{folder} {number}" for number in range(50))
        result = await engine.run(
            group(folder), prompt, chat_jid="tg:1", on_output=on_output
        )
        assert (result.status, result.ending.name) == ("success", "EXITED")

    with trio.fail_after(100):
        async with open_engine(site.settings()) as engine, trio.open_nursery() as all_:
            for folder in heard:
                all_.start_soon(partial(ask, folder))

    for folder, lines in heard.items():
        assert lines == [f"{folder} {number}" for number in range(50)]
