"""Processes that Podman forgets; conmon is acted by a Python of that name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from clawtrio import RuntimeUnavailableError, _docker_conmon
from clawtrio._docker import DockerRuntime
from clawtrio._docker_conmon import end_monitor
from clawtrio._flavours import PODMAN

#: Waits for a child that waits for leave which never comes.
HOLDS = """
import subprocess
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
child.wait()
"""
LEAVES = "print(0, flush=True); import time; time.sleep(0.3)"

Conmon = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def conmon(tmp_path: Path) -> Iterator[Conmon]:
    """Start one, which says what is below it once it is there."""
    program = tmp_path / "conmon"
    program.symlink_to(sys.executable)
    started = []

    def start(body: str, *arguments: str) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        script.write_text(body)
        process = subprocess.Popen(
            [program, script, *arguments], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def child_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path("/proc", process.stdout.readline().strip())


@pytest.mark.parametrize("option", ["-c", "-n"])
async def test_what_is_forgotten_is_ended(conmon: Conmon, option: str) -> None:
    """What is below it first; another container's is let alone."""
    forgotten = conmon(HOLDS, option, "abc")
    other = conmon(HOLDS, option, "abcd", "-x", "abc")
    below, others = child_of(forgotten), child_of(other)

    assert await end_monitor("abc")

    assert forgotten.wait() == 0
    assert not below.exists()
    assert other.poll() is None
    (others / "stat").read_text()
    assert await end_monitor("abcd")
    assert not others.exists()


async def test_one_that_leaves_is_not_hurried(conmon: Conmon) -> None:
    """It has its own ending to see to."""
    leaving = conmon(LEAVES, "-n", "abc")
    child_of(leaving)

    assert await end_monitor("abc")

    assert leaving.wait() == 0


async def test_an_agent_that_calls_itself_conmon(
    conmon: Conmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's process is none of ours, whatever its name."""
    forged = conmon(HOLDS, "-n", "abc")
    below = child_of(forged)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)

    assert await end_monitor("abc")

    monkeypatch.undo()
    assert below.exists()
    assert forged.poll() is None
    assert await end_monitor("abc")
    assert forged.wait() == 0
    assert not _docker_conmon._is_ours(2**22 + 1)


async def test_one_that_stays_is_told(
    conmon: Conmon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then the container counts as not removed."""
    client = tmp_path / "podman"
    client.write_text("#!/bin/sh\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stays = conmon(HOLDS, "-n", "abc")
    below = child_of(stays)
    monkeypatch.setattr(_docker_conmon, "open_process", lambda _: None)
    runtime = DockerRuntime(PODMAN, image="x")

    with trio.fail_after(20), pytest.raises(RuntimeUnavailableError, match="conmon"):
        await runtime.remove("abc")

    assert below.exists()
    monkeypatch.undo()
    assert await end_monitor("abc")
    assert not below.exists()
