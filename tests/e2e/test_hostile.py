"""An agent that attacks the host through the places in which both of them write."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from clawtrio import (
    AvailableGroup,
    Engine,
    FollowUpRefusedError,
    ScheduledTask,
    UnsafePathError,
    open_engine,
)

from .conftest import Site, group

HOSTILE = group("hostile", is_main=True)
TASKS = [ScheduledTask("1", "hostile", "x", "once", "2030-01-01")]
CHATS = [AvailableGroup("1@g.us", "Family", "")]

#: In the place of each of them the agent puts each of its traps.
PLACES = (
    *("/workspace/group/logs", "/workspace/group/conversations"),
    *("/workspace/ipc/current_tasks.json", "/workspace/ipc/available_groups.json"),
    *("/workspace/ipc/input", "/workspace/ipc/messages", "/workspace/ipc/tasks"),
    *("/home/node/.claude/settings.json", "/home/node/.claude/skills"),
    *("/home/node/.claude/skills/useful", "/home/node/.claude/skills/useful/SKILL.md"),
)

#: How a trap is laid; ``target`` is a file, or a directory, on the host.
TRAPS = """
import shutil

def clear(path):
    try:
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) \\
            else os.remove(path)
    except OSError:
        pass

def trap(kind, path, target):
    clear(path)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if kind == "symlink":
            os.symlink(target, path)
        elif kind == "dangling":
            os.symlink(target + "/made", path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            os.mknod(path, 0o20666, os.makedev(1, 5))
        elif kind == "hard link":
            os.link("/app/src/__main__.py", path)
        elif kind == "socket":
            import socket
            socket.socket(socket.AF_UNIX).bind(path)
        elif kind == "directory":
            os.makedirs(path + "/full")
        elif kind == "shut":
            os.makedirs(path)
            os.chmod(path, 0)
        elif kind == "names":
            os.makedirs(path)
            odd = b"a\\xffb", b"a\\nb", b"a\\r", b"..:,", b"-rf", b"\\xe2"
            for name in (b"n" * 255, *odd):
                open(os.path.join(path.encode(), name), "w").close()
        elif kind == "many":
            os.makedirs(path)
            for number in range(1200):
                open(f"{path}/{number}", "w").close()
        elif kind == "deep":
            os.makedirs(path)
            there = os.open(path, os.O_RDONLY)
            for _ in range(500):
                os.mkdir("d", dir_fd=there)
                inner = os.open("d", os.O_RDONLY, dir_fd=there)
                os.close(there)
                there = inner
            os.close(there)
        else:
            raise SystemExit(f"no trap: {kind}")
    except OSError:
        # What the sandbox denies is no attack.
        pass
"""
KINDS = (
    *("symlink", "dangling", "fifo", "device", "hard link", "socket", "directory"),
    *("shut", "names", "many", "deep"),
)

LAY = """
given = json.loads(hear()["prompt"])
for path in reversed(given["places"]):
    trap(given["kind"], path, given["target"])
emit("laid")
"""

SWAP = """
import itertools

given = json.loads(hear()["prompt"])
places = [path for path in given["places"] if path.startswith("/workspace/ipc")]

def swap():
    kinds = itertools.cycle(["symlink", "fifo", "directory", "dangling", "socket"])
    for kind in kinds:
        for path in places:
            trap(kind, path, given["target"])

threading.Thread(target=swap, daemon=True).start()
emit("swapping", partial=True)
end = time.monotonic() + given["seconds"]
while time.monotonic() < end:
    time.sleep(0.1)
    emit(None, partial=True)
emit("swapped")
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory of the host's that nobody may touch, with files in it."""
    place = tmp_path / "outside"
    (place / "directory").mkdir(parents=True)
    for name in ("settings.json", "SKILL.md", "directory/file"):
        (place / name).write_text(f"canary of {name}")
    os.chown(place, 1000, 1000)
    return place


def state_of(place: Path) -> dict[str, object]:
    """Return all that could have been changed in a place."""
    return {
        str(path.relative_to(place)): (
            path.lstat().st_mode,
            path.lstat().st_uid,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in (place, *place.rglob("*"))
    }


async def use(engine: Engine) -> None:
    """Do to the group's places all that a host does."""
    await engine.write_tasks_snapshot(HOSTILE, TASKS)
    await engine.write_groups_snapshot(HOSTILE, CHATS, {"1@g.us"})


async def attack(
    engine: Engine, outside: Path, kind: str, places: Sequence[str]
) -> None:
    prompt = {"kind": kind, "places": places, "target": str(outside)}
    result = await engine.run(HOSTILE, json.dumps(prompt), chat_jid="tg:1")
    assert (result.result, result.ending.name) == ("laid", "EXITED"), result.error


@pytest.fixture
async def engine(site: Site) -> AsyncIterator[Engine]:
    """Open an engine whose agents lay traps; the host syncs a skill at each start."""
    skill = site.root / "container" / "skills" / "useful"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text("useful")
    stdin = "eof" if site.runtime == "podman" else "lifeline"
    settings = site.settings(TRAPS + LAY, stdin=stdin)
    with trio.fail_after(120):
        async with open_engine(settings) as engine:
            yield engine


async def test_traps(site: Site, engine: Engine, outside: Path) -> None:
    """Whatever an agent leaves in our places, the next run starts, and only there."""
    before = state_of(outside)

    for kind in KINDS:
        # What takes long to make and to delete is made in few places.
        places = PLACES[4:8] if kind in {"many", "deep"} else PLACES
        with trio.fail_after(20):
            await attack(engine, outside, kind, places)
            await use(engine)

    with trio.fail_after(20):
        await attack(engine, outside, "fifo", PLACES)
    assert state_of(outside) == before
    # The traps of the last run are there yet.
    claude = site.root / "data" / "sessions" / "hostile" / ".claude"
    assert (claude / "settings.json").is_fifo()


@pytest.mark.parametrize("stdin", ["lifeline", "eof"])
async def test_swaps(
    site: Site, outside: Path, stdin: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While an agent swaps our places in a tight loop, nothing outside is touched."""
    # Each swap that is noticed is a warning.
    caplog.set_level(logging.ERROR, logger="clawtrio")
    before = state_of(outside)
    prompt = {"places": PLACES, "target": str(outside), "seconds": 3}
    used = 0

    with trio.fail_after(60):
        async with (
            open_engine(site.settings(TRAPS + SWAP, stdin=stdin)) as engine,
            engine.open_run(
                HOSTILE, json.dumps(prompt), chat_jid="tg:1", single_turn=True
            ) as run,
            trio.open_nursery() as nursery,
        ):

            async def follow() -> None:
                nonlocal used
                while True:
                    # An agent as fast as we are may well win its own mailbox.
                    with suppress(UnsafePathError):
                        await use(engine)
                        used += 1
                    with suppress(FollowUpRefusedError):
                        await run.send("more")
                    await trio.sleep(0.001)

            await anext(run)
            nursery.start_soon(follow)
            await anext(run)
            nursery.cancel_scope.cancel()

    assert used > 50
    assert state_of(outside) == before
