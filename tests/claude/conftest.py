"""The agent runner with the real Claude CLI, as a plain process, before a fake API."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from clawtrio import Settings
from clawtrio._agent import agent_python
from tests.anthropic_api import Api, Step, ToolUse, open_api
from tests.e2e.conftest import RUNTIMES, Site, nothing_left
from tests.test_agent_runner import INPUT, SOURCE, Agent, Frame, line, running

# Runs the program elsewhere than in a container.
RUN = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, {source!r})
import options
options.WORKSPACE = options.Workspace(Path({workspace!r}))
{prelude}
sys.argv = [{source!r}, "claude"]
runpy.run_path({source!r}, run_name="__main__")
"""

# What no container may ever see.
KEY = "sk-ant-the-real-key"

# Seconds for anything here: far more than it takes; a hang is what fails.
BOUND = 60

# Claude knows better than to wait for a sleep.
ENDLESS = ToolUse("Bash", {"command": "tail -f /dev/null"})

Talking = Callable[..., AbstractAsyncContextManager["Talk"]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that is in here needs the SDK."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.claude)


@attrs.frozen
class Talk:
    """A live agent, and the API that it talks to."""

    agent: Agent
    api: Api

    async def start(self, prompt: str = "hi", **others: Any) -> None:
        """Send the input, in lifeline mode."""
        given = {**INPUT, "lifeline": True, "prompt": prompt, **others}
        await self.agent.send(line(given))

    async def tell(self, text: str, number: int) -> None:
        """Send a follow-up."""
        await self.agent.send(line({"type": "message", "id": number, "text": text}))

    async def close(self) -> list[Frame]:
        """Tell it to leave, and give what it still says."""
        await self.agent.send(line({"type": "close"}))
        frames = await self.agent.rest()
        assert self.agent.process.returncode == 0
        return frames

    def children(self) -> list[int]:
        """Name all processes below the agent."""
        below = [self.agent.process.pid]
        for pid in below:
            below += _children(pid)
        return below[1:]


def _children(pid: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_bytes().rpartition(b") ")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in b"ZX":
            yield int(path.parent.name)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Make the places that are mounts in a container."""
    for name in ("group", "ipc", "global", "extra"):
        (tmp_path / "workspace" / name).mkdir(parents=True)
    return tmp_path / "workspace"


@pytest.fixture
def talking(tmp_path: Path, workspace: Path) -> Talking:
    """Give what runs an agent before an API with this script."""
    home = tmp_path / "home"
    home.mkdir()

    @asynccontextmanager
    async def talk(
        *script: Step, prelude: str = "", **environment: str
    ) -> AsyncIterator[Talk]:
        source = RUN.format(
            source=str(SOURCE), workspace=str(workspace), prelude=prelude
        )
        async with (
            open_api(*script) as api,
            running(
                [agent_python(), "-c", source],
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(home),
                    "ANTHROPIC_API_KEY": "token",
                    "ANTHROPIC_BASE_URL": api.url,
                    "CLAUDE_CODE_MAX_RETRIES": "1",
                    **environment,
                },
            ) as agent,
        ):
            yield Talk(agent, api)

    return talk


@pytest.fixture(params=RUNTIMES)
def runtime_name(request: pytest.FixtureRequest) -> str:
    """Each runtime in turn."""
    name: str = request.param
    return name


@pytest.fixture
def site(runtime_name: str, tmp_path: Path) -> Iterator[Site]:
    """A root for a runtime; afterwards nothing may be left of what ran for it."""
    root = tmp_path / "root"
    root.mkdir()
    site = Site(runtime_name, root)
    with nothing_left(site):
        yield site


@asynccontextmanager
async def api_for(site: Site, *script: Step) -> AsyncIterator[Api]:
    """Serve the API, and let the bot know of it as its operator would."""
    async with open_api(*script) as api:
        lines = f"ANTHROPIC_API_KEY={KEY}\nANTHROPIC_BASE_URL={api.url}\n"
        await trio.Path(site.root, ".env").write_text(lines)
        yield api


def settings_for(site: Site, **changes: Any) -> Settings:
    """Return settings for Claude, which tries again but once."""
    env = {"CLAUDE_CODE_MAX_RETRIES": "1", **changes.pop("agent_env", {})}
    settings = site.settings(agent_env=env, **changes)
    return attrs.evolve(settings, agent="claude")
