"""Claude in real containers, run by the engine: what it says and does comes out.

The API is a Unix socket in the group's folder: the containers have no network.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from clawtrio import RunResult, open_engine
from clawtrio._agent import agent_python
from clawtrio._bwrap import BwrapRuntime
from tests.anthropic_api import Api, Text, ToolUse, serve_api
from tests.e2e.conftest import RUNTIMES, Site, facts, group, nothing_left

# The way in that the engine has for Claude, and the way to the API, which is ours.
START = """
export CLAWTRIO_PROXY=/workspace/group/api.sock
export ANTHROPIC_BASE_URL=http://127.0.0.1:3001 ANTHROPIC_API_KEY=token
exec "$0" /app/src claude
"""

# Far more than it takes; a hang is what fails.
BOUND = 60


@pytest.fixture(params=RUNTIMES)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A root for each runtime; afterwards nothing may be left."""
    site = Site(request.param, tmp_path / "root")
    folder = site.root / "groups" / "chat"
    folder.mkdir(parents=True)
    os.chown(folder, 1000, 1000)
    with nothing_left(site):
        yield site


@asynccontextmanager
async def api_for(site: Site, *script: Text | ToolUse) -> AsyncIterator[Api]:
    """Serve the API where the container finds it."""
    path = trio.Path(site.root, "groups", "chat", "api.sock")
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        # A path that is too long for a socket has a short name, too.
        folder = os.open(path.parent, os.O_PATH)
        await sock.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
        await path.chmod(0o666)
        sock.listen()
        async with serve_api(Api(list(script)), [trio.SocketListener(sock)]) as api:
            yield api
    await path.unlink()


async def ask(
    site: Site, *prompts: str, session_id: str | None = None
) -> tuple[list[str], RunResult]:
    """Ask one thing after the other in one run, and give the answers."""
    runtime, python = None, "python3"
    if site.runtime == "bwrap":
        python = agent_python()
        runtime = BwrapRuntime(python=python)
    settings = site.settings(agent_command=("sh", "-c", START, python))
    answers: list[str] = []
    with trio.fail_after(BOUND):
        async with (
            open_engine(settings, runtime) as engine,
            engine.open_run(
                group(), prompts[0], chat_jid="tg:1", session_id=session_id
            ) as run,
        ):
            async for output in run:
                if output.result is None:
                    continue
                answers.append(output.result)
                if len(answers) < len(prompts):
                    await run.send(prompts[len(answers)])
                else:
                    run.finish()
    return answers, run.result


def written(root: Path) -> tuple[str, int, str]:
    """Give the file that Claude wrote, its owner, and the text of its message."""
    file = root / "groups" / "chat" / "a.txt"
    (message,) = (root / "data" / "ipc" / "chat" / "messages").iterdir()
    text = json.loads(message.read_bytes())["text"]
    return file.read_text(), file.stat().st_uid, text


async def test_claude_in_a_container(site: Site) -> None:
    """It answers, follows up, writes as the group's user, and goes on the next time."""
    steps = (
        ToolUse("Bash", {"command": "echo A > a.txt"}),
        ToolUse("mcp__nanoclaw__send_message", {"text": "half-way"}),
        Text(("done",)),
        Text(("and more",)),
    )
    async with api_for(site, *steps):
        answers, result = await ask(site, "write", "more")
    assert answers == ["done", "and more"]
    assert facts(result) == ("success", "EXITED", result.outputs, None)
    assert result.unanswered == ()

    assert written(site.root) == ("A\n", 1000, "half-way")

    async with api_for(site, Text(("I know",))) as api:
        answers, again = await ask(site, "go on", session_id=result.new_session_id)
        assert "half-way" in json.dumps(api.turns[0].body["messages"])
    assert answers == ["I know"]
    assert again.new_session_id == result.new_session_id
