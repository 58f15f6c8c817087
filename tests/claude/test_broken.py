"""What breaks between Claude and its API, or the host: in containers, by the proxy."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import pytest
import trio

from clawtrio import AgentOutput, _engine, open_engine
from clawtrio._proxy import open_proxy
from clawtrio._proxy_rules import ProxyLimits
from tests.anthropic_api import Broken, Failure, Silence, Step, Text
from tests.e2e.conftest import RUNTIMES, Site, facts, group, processes, wait_until
from tests.e2e.test_killed import host

from .conftest import BOUND, ENDLESS, KEY, api_for, settings_for

#: Seconds for an error, start and retry included, on a busy machine.
SOON = 20
#: A mark in the environment of all that runs in a container.
MARK = "MARK_OF_THE_TEST"

log = logging.getLogger(__name__)


@pytest.mark.parametrize("runtime_name", RUNTIMES[2:], indirect=True)
@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (Failure(401), "401"),
        (Failure(429), "429"),
        (Failure(500), "500"),
        (Failure(529), "529"),
        (Broken("half of it", pause=0.1), "API"),
        (Silence(60), "timed out"),
        (Silence(60, begun=True), "API"),
    ],
    ids=["401", "429", "500", "529", "broken", "silent", "falls-silent"],
)
async def test_api_fails(
    site: Site, step: Step, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the API fails with is an error soon, no answer, and not the run's end."""
    limits = ProxyLimits(stream_timeout=1)
    monkeypatch.setattr(_engine, "open_proxy", partial(open_proxy, limits=limits))
    settings = settings_for(site, agent_env={"API_TIMEOUT_MS": "1000"})
    outputs: list[AgentOutput] = []
    took: list[float] = []
    async with api_for(site, step) as api:
        with trio.fail_after(BOUND):
            async with open_engine(settings) as engine:
                started = trio.current_time()
                async with engine.open_run(group(), "one", chat_jid="tg:1") as run:
                    async for output in run:
                        outputs.append(output)
                        if output.status == "error":
                            took.append(trio.current_time() - started)
                            api.script[:] = [Text(("back",))]
                            await run.send("two")
                        elif output.result is not None:
                            run.finish()

    assert took[0] < SOON
    log.info("%s: an error after %.1f s", step, took[0])
    (error,) = [output.error for output in outputs if output.status == "error"]
    assert error is not None
    assert problem.lower() in error.lower()
    assert KEY not in error
    assert [o.result for o in outputs if o.result is not None] == ["back"]
    assert facts(run.result) == ("success", "EXITED", len(outputs), None)


def marked(mark: str) -> list[str]:
    """Name the programs of the processes that have *mark* in their environment."""
    found = []
    for process in processes():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment.split(b"\0"):
            found.append(Path(process.argv[0]).name)
    return found


@pytest.mark.parametrize("runtime_name", RUNTIMES, indirect=True)
async def test_host_killed_during_a_turn(site: Site) -> None:
    """SIGKILL of the host while a tool works leaves no container, nor any CLI."""
    settings = {
        "root": str(site.root),
        "runtime": site.runtime,
        "agent": "claude",
        "agent_env": {MARK: site.token},
        "min_free_bytes": 0,
        "timezone": "UTC",
    }
    async with api_for(site, ENDLESS) as api:
        with trio.fail_after(BOUND):
            async with host(site, None, settings=settings, groups=["one"]) as bot:
                await api.wait_turns(1)
                await wait_until(lambda: "tail" in marked(site.token))
                assert "claude" in marked(site.token)
                assert site.containers()
                await bot.kill()
                killed = time.monotonic()
                with trio.fail_after(10):
                    await wait_until(
                        lambda: not marked(site.token) and not site.containers()
                    )
    log.info("%s: gone %.2f s after", site.runtime, time.monotonic() - killed)
    # What it held is for the next one to sweep.
    assert len(site.engine_files()) == 1
    async with open_engine(site.settings()):
        assert len(site.engine_files()) == 1
