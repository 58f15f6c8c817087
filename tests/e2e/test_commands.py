"""Clients that hang: the engine goes on in time, and says what may be left."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from clawtrio import Ending, open_engine

from .conftest import RUNTIMES, STUBBORN, Site, facts, group

BOTH = pytest.mark.parametrize("runtime_name", RUNTIMES[:2], indirect=True)
#: It all takes ten seconds, and is the same to Podman.
DOCKER = pytest.mark.parametrize("runtime_name", RUNTIMES[:1], indirect=True)

LISTENING = "hear(); emit('here'); sys.stdin.read()"

Hang = Callable[[str], None]


@pytest.fixture
def hang(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hang:
    """Have the client hang, from now on, if a shell's pattern fits its command."""
    real = shutil.which(site.runtime)
    wrapper = tmp_path / "bin" / site.runtime
    wrapper.parent.mkdir()

    def hang(pattern: str) -> None:
        wrapper.write_text(
            f'#!/bin/bash\nshopt -s extglob\ncase "$1" in\n'
            f'{pattern}) exec sleep 600 ;;\nesac\nexec {real} "$@"\n'
        )
        wrapper.chmod(0o755)

    hang("nothing")
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    return hang


@BOTH
@pytest.mark.parametrize(
    ("agent", "least", "most"),
    [(LISTENING, 0, 3), (STUBBORN, 3, 6)],
    ids=["listening", "stubborn"],
)
async def test_stop_hangs(
    site: Site, hang: Hang, agent: str, least: float, most: float
) -> None:
    """A stop that hangs is followed by the kill, or not needed for who listens."""
    with trio.fail_after(30):
        async with open_engine(site.settings(agent, command_timeout=2)) as engine:
            async with engine.open_run(group(), "go", chat_jid="tg:1") as live:
                assert (await anext(live)).result == "here"
                hang("stop")
                started = trio.current_time()
                live.stop()
                await live.wait()
                took = trio.current_time() - started
            assert live.gone

    assert facts(live.result) == ("success", "STOPPED", 1, None)
    assert least <= took < most


@pytest.mark.slow
@DOCKER
async def test_all_but_run_hangs(
    site: Site, hang: Hang, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no command answers, one ERROR names in time what the next start removes."""
    with trio.fail_after(40):
        async with open_engine(site.settings(STUBBORN, command_timeout=2)) as engine:
            async with engine.open_run(group(), "go", chat_jid="tg:1") as live:
                assert (await anext(live)).result == "here"
                hang("!(run)")
                started = trio.current_time()
                live.stop()
                await live.wait()
                took = trio.current_time() - started
            started = trio.current_time()
        closing = trio.current_time() - started

        assert facts(live.result) == ("success", "STOPPED", 1, None)
        assert took < 1 + 3 * 2 + 2
        assert closing < 4
        errors = [r.message for r in caplog.records if r.levelno >= logging.ERROR]
        assert len(errors) == 1
        assert live.container_name in errors[0]
        assert len(site.engine_files()) == 1

        hang("nothing")
        assert len(site.containers()) == 1
        async with open_engine(site.settings()):
            assert site.containers() == []


@BOTH
async def test_look_hangs(site: Site, hang: Hang) -> None:
    """A run whose mounts cannot be looked at is not given its input."""
    with trio.fail_after(30):
        async with open_engine(site.settings(command_timeout=2)) as engine:
            hang("container|inspect")
            result = await engine.run(group(), "go", chat_jid="tg:1")

    assert result.ending is Ending.NOT_STARTED
    assert "could not be looked at within 2 s" in (result.error or "")
    assert result.unanswered == ("go",)
