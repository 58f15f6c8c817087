"""Claude in real containers, run by the engine: what it says and does comes out.

All is as an operator has it: the real CLI, and the credential proxy on the way to the
API, whose key is in ``.env``. The API alone is a fake, on loopback.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import trio

from clawtrio import AgentOutput, RunResult, Usage, open_engine
from tests.anthropic_api import Api, Text, ToolUse
from tests.e2e.conftest import Site, facts, group

from .conftest import BOUND, KEY, api_for, settings_for

# Whatever an agent can find out of its own place.
LOOK = "echo A > a.txt; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline > seen.txt"


async def ask(
    site: Site, *prompts: str, session_id: str | None = None, **changes: Any
) -> tuple[list[AgentOutput], RunResult]:
    """Ask one thing after the other in one run, and give all outputs."""
    outputs: list[AgentOutput] = []
    follow_ups = list(prompts[1:])
    with trio.fail_after(BOUND):
        async with (
            open_engine(settings_for(site, **changes)) as engine,
            engine.open_run(
                group(), prompts[0], chat_jid="tg:1", session_id=session_id
            ) as run,
        ):
            async for output in run:
                outputs.append(output)
                # With null it waits.
                if output.result is None and not output.partial:
                    if follow_ups:
                        await run.send(follow_ups.pop(0))
                    else:
                        run.finish()
    return outputs, run.result


def answers(outputs: list[AgentOutput]) -> list[str]:
    """Return the texts of whole answers."""
    return [o.result for o in outputs if o.result is not None and not o.partial]


def sent(site: Site, kind: str) -> list[dict[str, Any]]:
    """Return what the agent has put into its mailbox."""
    mailbox = site.root / "data" / "ipc" / "chat" / kind
    return [json.loads(path.read_bytes()) for path in sorted(mailbox.iterdir())]


def counted(api: Api) -> Usage:
    """Return what should have been counted of what the API was asked."""
    asked = [r for r in api.requests if r.target.startswith("/v1/messages?")]
    return Usage(
        requests=len(api.requests),
        statuses=((200, len(api.requests)),),
        input_tokens=10 * len(asked),
        output_tokens=5 * len(asked),
    )


def files_of(site: Site) -> Iterator[Path]:
    """Yield all files that an agent can see."""
    for place in ("groups", "data/ipc", "data/sessions"):
        yield from (p for p in (site.root / place).rglob("*") if p.is_file())


async def test_claude_in_a_container(site: Site) -> None:
    """It answers in pieces, follows up, works as its user, and goes on later."""
    daily = {
        "prompt": "water the plants",
        "schedule_type": "cron",
        "schedule_value": "0 9 * * 1",
    }
    steps = (
        ToolUse("Bash", {"command": LOOK}),
        ToolUse("mcp__nanoclaw__send_message", {"text": "half-way"}),
        ToolUse("mcp__nanoclaw__schedule_task", daily),
        Text(("do", "ne"), pause=0.1),
        Text(("and more",)),
    )
    async with api_for(site, *steps) as api:
        outputs, result = await ask(site, "write", "more", partial_text=True)
    assert answers(outputs) == ["done", "and more"]
    pieces = [output.result for output in outputs if output.partial]
    assert [p for p in pieces if p is not None] == ["do", "ne", "and more"]
    assert facts(result) == ("success", "EXITED", result.outputs, None)
    assert result.unanswered == ()

    made = (site.root / "groups" / "chat" / "a.txt").stat()
    assert (made.st_uid, made.st_gid) == (os.geteuid() or 1000, os.getegid() or 1000)
    (message,) = sent(site, "messages")
    assert (message["text"], message["chatJid"]) == ("half-way", "tg:1")
    (task,) = sent(site, "tasks")
    assert (task["type"], task["prompt"]) == ("schedule_task", "water the plants")

    assert {request.headers["x-api-key"] for request in api.turns} == {KEY}
    seen = (site.root / "groups" / "chat" / "seen.txt").read_bytes()
    assert b"ANTHROPIC_API_KEY=" in seen
    assert not [p for p in files_of(site) if KEY.encode() in p.read_bytes()]

    usage = result.usage
    assert usage is not None
    assert usage.request_bytes > 10_000
    assert usage.response_bytes > 500
    assert attrs.evolve(usage, request_bytes=0, response_bytes=0) == counted(api)

    async with api_for(site, Text(("I know",))) as api:
        outputs, again = await ask(site, "go on", session_id=result.new_session_id)
        assert "half-way" in json.dumps(api.turns[0].body["messages"])
    assert answers(outputs) == ["I know"]
    assert again.new_session_id == result.new_session_id
    assert again.usage is not None
    assert again.usage.requests == len(api.requests)
