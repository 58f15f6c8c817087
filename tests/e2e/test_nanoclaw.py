"""An agent in JavaScript that knows NanoClaw's protocol alone, driven by our engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from clawtrio import open_engine

from .conftest import Site, facts, group, nothing_left

AGENT = Path(__file__).parents[1] / "nanoclaw_agent.js"

# Where the sandbox has node: in the host's /usr.
pytestmark = [pytest.mark.bwrap, pytest.mark.node]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Site]:
    """Give a root in which that agent is in the group's folder."""
    site = Site("bwrap", tmp_path / "root")
    folder = site.root / "groups" / "chat"
    folder.mkdir(parents=True)
    shutil.copy(AGENT, folder / "agent.js")
    with nothing_left(site):
        yield site


async def test_it_talks(node: Site) -> None:
    """Prompt, follow-up and close go to and fro, though it knows no lifeline."""
    settings = node.settings(
        stdin="eof", agent_command=("node", "/workspace/group/agent.js")
    )
    heard: list[str | None] = []
    with trio.fail_after(30):
        async with (
            open_engine(settings) as engine,
            engine.open_run(group(), "hello", chat_jid="tg:1", session_id="old") as run,
        ):
            async for output in run:
                heard.append(output.result)
                if heard == ["You said: hello", None]:
                    await run.send("more")
                elif len(heard) == 4:
                    run.finish()

    assert heard == ["You said: hello", None, "You said: more", None]
    assert facts(run.result) == ("success", "EXITED", 4, None)
    assert run.result.new_session_id == "old"
    assert run.result.unanswered == ()
    assert run.result.dropped_frames == 0
