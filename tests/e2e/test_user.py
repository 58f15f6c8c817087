"""bwrap needs no root and no system Python: whole runs as a user, and out of a home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest
import trio

from clawtrio import open_engine
from clawtrio._bwrap import BwrapRuntime

from .conftest import HERE, Site, group, nothing_left, wait_until

pytestmark = pytest.mark.bwrap

UID = 1000
WHO = ["--reuid", str(UID), "--regid", str(UID), "--clear-groups"]

#: Says where it is, and of what it is made.
TELLING = """
emit(f"{sys.executable} {sys.prefix} {os.getuid()} {os.getcwd()}")
"""


def as_user(*argv: str) -> list[str]:
    """Return the command line by which an ordinary user runs *argv*."""
    # What setpriv itself executes is still found with root's capabilities.
    return [*(["setpriv", *WHO] if os.geteuid() == 0 else []), "env", *argv]


def environment() -> dict[str, str]:
    """Return an environment in which a bare Python finds what ours does."""
    paths = [path for path in sys.path if path.endswith(("-packages", "src"))]
    return {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(paths), "HOME": "/"}


@pytest.fixture(scope="module")
def python() -> str:
    """A Python of our version that any user can run: ours may be in root's home."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}")
    for candidate in candidates:
        argv = as_user(candidate, "-c", "import clawtrio")
        try:
            done = subprocess.run(
                argv, env=environment(), capture_output=True, check=False, cwd="/"
            )
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            return candidate
    pytest.skip(f"no {version} that an ordinary user could run")


@pytest.fixture
def site() -> Iterator[Site]:
    """A root that belongs to an ordinary user."""
    home = Path(mkdtemp(prefix="clawtrio-e2e-"))
    root = home / "root"
    root.mkdir()
    if os.geteuid() == 0:
        for place in (home, root):
            os.chown(place, UID, UID)
    try:
        site = Site("bwrap", root)
        with nothing_left(site):
            yield site
    finally:
        shutil.rmtree(home)


def wanted(site: Site, **changes: object) -> str:
    """Return what host.py is to do."""
    settings = {
        "root": str(site.root),
        "runtime": "bwrap",
        "agent": "echo",
        "min_free_bytes": 0,
    }
    return json.dumps(
        {
            "settings": settings,
            "groups": ["one", "two"],
            "prompt": "Who am I?\nWho are you?",
            "single_turn": True,
            **changes,
        }
    )


async def test_as_user(site: Site, python: str) -> None:
    """An ordinary user's engine runs agents to their end."""
    with trio.fail_after(30):
        done = await trio.run_process(
            as_user(python, str(HERE / "host.py"), wanted(site)),
            env=environment(),
            cwd="/",
            capture_stdout=True,
        )

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for folder in ("one", "two"):
        said = [line for line in lines if line["group"] == folder]
        assert [line.get("result") for line in said[:2]] == [
            "Who am I?",
            "Who are you?",
        ]
        assert said[-1] == {"group": folder, "ending": "EXITED", "status": "success"}


async def test_killed_as_user(site: Site, python: str) -> None:
    """SIGKILL of an ordinary user's bot leaves no sandbox."""
    argv = as_user(python, str(HERE / "host.py"), wanted(site, single_turn=False))
    with trio.fail_after(30):
        process = await trio.lowlevel.open_process(
            argv, env=environment(), cwd="/", stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        async with process.stdout:
            seen = b""
            while not (b'"one"' in seen and b'"two"' in seen):
                chunk = await process.stdout.receive_some()
                assert chunk, seen
                seen += chunk
            assert site.containers() != []
            process.kill()
            await process.wait()
        with trio.fail_after(10):
            await wait_until(lambda: not site.containers())
        assert len(site.engine_files()) == 1
        await trio.run_process(
            as_user(python, str(HERE / "host.py"), wanted(site, groups=[])),
            env=environment(),
            cwd="/",
        )


async def test_python_in_a_home(tmp_path: Path) -> None:
    """A Python outside /usr, in a place that agents cannot enter, runs them."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    venv.create(home / "venv", symlinks=True)
    python = str(home / "venv/bin/python")
    root = tmp_path / "root"
    root.mkdir()
    site = Site("bwrap", root)
    argv = (python, *site.agent(TELLING)[1:])
    with trio.fail_after(30), nothing_left(site):
        settings = site.settings(agent_command=argv)
        async with open_engine(settings, BwrapRuntime(python=python)) as engine:
            told = await engine.run(group(), "go", chat_jid="tg:1")
            echo = site.settings()
        async with open_engine(echo, BwrapRuntime(python=python)) as engine:
            said = await engine.run(group(), "go", chat_jid="tg:1")

    uid = UID if os.geteuid() == 0 else os.getuid()
    assert told.result == f"{python} {home / 'venv'} {uid} /workspace/group"
    assert said.result == "go"
