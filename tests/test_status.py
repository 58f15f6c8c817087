"""What other processes see of an engine, over its socket."""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from clawtrio import Settings, _cli_top
from clawtrio._cli import execute
from clawtrio._cli_top import measure_memory, top
from clawtrio._groups import open_places
from clawtrio._status import ask_status, open_status, serve_status
from clawtrio._sweep import EngineFile, sweep
from clawtrio.testing import FakeRuntime, scripted_agent

from .helpers import GROUP, JID, engine_of, frame, settings_for

NAME: Final = "0" * 32


async def test_top_shows_live_runs(
    tmp_path: Path, autojump_clock: MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each has a line: group, run, state, age, silence, outputs, tokens, memory."""
    async with engine_of(tmp_path, scripted_agent(frame("secret"))) as engine:
        (path,) = (tmp_path / "data/engines").glob("*.sock")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with engine.open_run(GROUP, "secret", chat_jid=JID) as run:
            await anext(run)
            await trio.sleep(9)
            assert await top(engine.settings) == 0
            with pytest.MonkeyPatch.context() as patch, trio.move_on_after(1.5):
                patch.setattr(_cli_top, "is_interactive", lambda: True)
                await top(engine.settings)
    assert not path.exists()

    first, *shown = capfd.readouterr().out.split("\x1b[H\x1b[J")
    assert len(shown) == 2
    header, row = (line.split() for line in first.splitlines())
    columns = "GROUP RUN STATE AGE IDLE OUTPUTS TOKENS MEMORY"
    assert header == columns.split()
    assert row == ["family", run.id, "answered", *("9", "s", "9", "s", "1", "0", "-")]


def test_memory_of_whom_it_cannot_be_told() -> None:
    """What has no namespace of its own, or is gone, is left out."""
    assert measure_memory([os.getpid(), 2**22 - 1]) == {}


def test_top_where_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It says so, and makes nothing."""
    monkeypatch.chdir(tmp_path)
    assert execute(["top"]) == 0
    assert "nothing has run here yet" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@attrs.frozen
class _Long:
    text: str = "x" * 10**7


async def test_watchers_harm_no_engine(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are eight at most; who does not read is let go, who leaves is forgotten."""
    with open_places(Settings(root=str(tmp_path))) as places:
        listener = open_status(places.engines, NAME)
        assert listener is not None
        # The whole path may be too long for an address.
        monkeypatch.chdir(places.engines.path)
        path = f"{NAME}.sock"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_status, listener, _Long)
            streams = [await trio.open_unix_socket(path) for _ in range(8)]
            await wait_all_tasks_blocked()
            # Turned away: the line is no JSON.
            assert await ask_status(places.engines) == []
            await streams[0].aclose()
            await trio.sleep(3)
            assert await ask_status(places.engines) == [{"text": _Long().text}]
            for stream in streams:
                await stream.aclose()
            nursery.cancel_scope.cancel()


async def test_an_engine_without_a_socket(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It works all the same, and a warning says so."""
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("clawtrio._access.socket.socket.bind", _refuse)
        async with engine_of(tmp_path, scripted_agent(frame("Hi"))) as engine:
            result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert result.result == "Hi"
    assert "nobody can watch" in caplog.text


def _refuse(opened: socket.socket, address: str) -> None:
    raise OSError(f"no {opened} at {address}")


async def test_a_dead_engine_s_socket_goes_with_its_file(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A sweep is not confused by sockets, and removes those of the dead."""
    runtime = FakeRuntime(scripted_agent())
    with open_places(settings_for(tmp_path, command_timeout=0.001)) as places:
        engine = EngineFile(places.engines, runtime.name)
        listener = open_status(places.engines, engine.engine_id)
        assert listener is not None
        await sweep(places, runtime)
        assert len(places.engines.names()) == 2
        assert await ask_status(places.engines) == []
        await listener.aclose()
        engine._held.close()
        await sweep(places, runtime)
        os.utime(tmp_path / "data/engines" / engine.engine_id, (0, 0))
        await sweep(places, runtime)
        assert places.engines.names() == []
