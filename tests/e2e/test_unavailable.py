"""What is missing is said before a run starts, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from clawtrio import RuntimeUnavailableError, open_engine
from clawtrio._bwrap import BwrapRuntime

from .conftest import RUNTIMES, Site

ENGINES = pytest.mark.parametrize("runtime_name", RUNTIMES[:2], indirect=True)


@contextmanager
def unavailable(site: Site) -> Iterator[pytest.ExceptionInfo[RuntimeUnavailableError]]:
    """Expect the error, with everything in it."""
    with pytest.raises(RuntimeUnavailableError) as caught:
        yield caught
    assert caught.value.runtime == site.runtime
    assert caught.value.problem in str(caught.value)
    assert caught.value.remedy in str(caught.value)
    assert "\n" not in str(caught.value)


async def open_and_close(site: Site, **changes: Any) -> None:
    with trio.fail_after(20):
        async with open_engine(site.settings(**changes)):
            raise AssertionError("the engine was opened")


@ENGINES
async def test_no_image(site: Site) -> None:
    """A missing image is named, with the command that builds one."""
    with unavailable(site) as caught:
        await open_and_close(site, image="clawtrio-e2e-missing:1")

    assert "clawtrio-e2e-missing:1" in caught.value.problem
    assert "clawtrio image build" in caught.value.remedy


@ENGINES
async def test_no_daemon(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that does not answer is an error, and no other runtime is taken."""
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    # Podman has one only if it is told so.
    monkeypatch.setenv("CONTAINER_HOST", "unix:///nonexistent.sock")
    (tmp_path / "containers.conf").write_text("[engine]\nremote = true\n")
    monkeypatch.setenv("CONTAINERS_CONF", str(tmp_path / "containers.conf"))

    with unavailable(site) as caught:
        await open_and_close(site)

    assert "connect" in caught.value.problem
    assert "nonexistent.sock" in caught.value.problem


async def test_no_program(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is missing is named, with what to install."""
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")
        with unavailable(site) as caught:
            await open_and_close(site)

    assert "nstall" in caught.value.remedy


@pytest.mark.parametrize("runtime_name", RUNTIMES[2:], indirect=True)
async def test_no_bwrap(site: Site) -> None:
    """Without bubblewrap the error says which package has it."""
    runtime = BwrapRuntime(bwrap="/nonexistent/bwrap")
    with trio.fail_after(20), unavailable(site):
        async with open_engine(site.settings(), runtime):
            raise AssertionError("the engine was opened")


@ENGINES
async def test_daemon_hangs(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that hangs holds up the start for command_timeout."""
    program = tmp_path / "bin" / site.runtime
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(program.parent), prepend=":")
        started = trio.current_time()
        with unavailable(site) as caught:
            await open_and_close(site, command_timeout=0.5)

    assert caught.value.problem == "did not answer within 0.5 s"
    assert trio.current_time() - started < 5
