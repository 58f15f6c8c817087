"""Installing the agent for bwrap, with a Python that only pretends to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio

from clawtrio import _agent, _cli
from clawtrio._agent import agent_python, install_agent
from clawtrio._errors import RuntimeUnavailableError

# Makes a "virtual environment" whose Python writes down what it is asked.
PYTHON = """#!/bin/sh
echo "$@" >>"{log}"
if [ "$2" = venv ]; then {venv}; else {pip}; fi
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a directory of the user's data that is empty."""
    monkeypatch.setenv("XDG_DATA_HOME", os.fspath(tmp_path / "data"))
    return tmp_path / "data" / "clawtrio"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Give the file that the pretended Python writes to."""
    return tmp_path / "log"


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    log: Path,
    *,
    venv: str = 'mkdir "$3/bin" && cp "$0" "$3/bin/python"',
    pip: str = "echo installing",
) -> None:
    """Have a Python of ours that does this."""
    python = log.with_name("python")
    python.write_text(PYTHON.format(log=log, venv=venv, pip=pip))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", os.fspath(python))


def install() -> list[str]:
    """Install the agent, and give what is said meanwhile."""
    lines: list[str] = []

    async def work() -> None:
        with trio.fail_after(30):
            assert await install_agent(lines.append) == agent_python()

    trio.run(work)
    return lines


def test_install(home: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment is made and filled with what is pinned, at its place, once."""
    pretend(monkeypatch, log)

    assert install() == ["installing"]

    venv, pip = log.read_text().splitlines()
    assert venv.startswith(f"-m venv {home}/agent-{sys.implementation.cache_tag}-")
    assert pip.startswith("-m pip install ")
    requirements = Path(pip.rpartition(" ")[2]).read_text()
    assert "claude-agent-sdk==" in requirements
    assert [f"{path}/bin/python" for path in home.iterdir()] == [agent_python()]
    assert Path(agent_python()).parents[1].stat().st_mode & 0o777 == 0o755

    assert install() == []
    assert len(log.read_text().splitlines()) == 2


def test_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without XDG_DATA_HOME it is where that would be."""
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert agent_python().startswith("/home/somebody/.local/share/clawtrio/agent-")


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"venv": "echo no ensurepip >&2; exit 1"}, "no ensurepip"),
        ({"pip": "echo 'a\\033b'; exit 2"}, "a\\x1bb"),
        ({"venv": "true"}, "cannot run"),
    ],
)
def test_what_fails_leaves_nothing(
    home: Path,
    log: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: dict[str, str],
    problem: str,
) -> None:
    """A failure is told in its own words, and the next try begins anew."""
    pretend(monkeypatch, log, **broken)
    with pytest.raises(RuntimeUnavailableError) as caught:
        install()
    assert problem in caught.value.problem
    assert list(home.iterdir()) == []


def test_command(
    home: Path,
    log: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command says what pip says, and where the Python is."""
    pretend(monkeypatch, log)
    assert _cli.execute(["agent", "install"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "installing"
    assert said[1].startswith(f"{agent_python()} is there, after ")


def test_requirements_are_pinned() -> None:
    """Whoever installs the agent tomorrow gets the SDK that was tested."""
    assert "claude-agent-sdk==" in _agent._requirements().read_text()
