"""The snapshots that tell an agent which tasks and chats there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import trio

from clawtrio import (
    AvailableGroup,
    Engine,
    Group,
    ScheduledTask,
    UnsafePathError,
    open_engine,
)
from clawtrio._codec import encode_groups, encode_tasks
from clawtrio.testing import FakeRuntime, scripted_agent

from .helpers import GROUP, settings_for

MAIN = Group("Main", "main", is_main=True)
OTHER = Group("Other", "other")

TASKS = [
    ScheduledTask("1", GROUP.folder, "Say “hi”\n", "cron", "0 9 * * *"),
    ScheduledTask(
        "2", "other", "x", "once", "2026-01-01", "paused", "2026-01-01T00:00:00.000Z"
    ),
    ScheduledTask("3", GROUP.folder.upper(), "y", "interval", "60000"),
]
CHATS = [
    AvailableGroup("1@g.us", "Família", "2026-01-01T00:00:00.000Z"),
    AvailableGroup("2@g.us", "Work", "", is_registered=True),
    AvailableGroup("tg:3", "Other", ""),
]


def folder_of(root: Path, group: Group) -> Path:
    return root / "data" / "ipc" / group.folder


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """Open an engine that runs nothing."""
    async with open_engine(settings_for(tmp_path), FakeRuntime(scripted_agent())) as e:
        yield e


async def test_main_sees_all_tasks(engine: Engine, tmp_path: Path) -> None:
    """The names are NanoClaw's: one of them is camelCase."""
    await engine.write_tasks_snapshot(MAIN, TASKS)

    text = (folder_of(tmp_path, MAIN) / "current_tasks.json").read_text()
    assert json.loads(text)[:2] == [
        {
            "id": "1",
            "groupFolder": GROUP.folder,
            "prompt": "Say “hi”\n",
            "schedule_type": "cron",
            "schedule_value": "0 9 * * *",
            "status": "active",
            "next_run": None,
        },
        {
            "id": "2",
            "groupFolder": "other",
            "prompt": "x",
            "schedule_type": "once",
            "schedule_value": "2026-01-01",
            "status": "paused",
            "next_run": "2026-01-01T00:00:00.000Z",
        },
    ]
    assert [task["id"] for task in json.loads(text)] == ["1", "2", "3"]


async def test_another_group_sees_its_own_tasks(engine: Engine, tmp_path: Path) -> None:
    """Folders that differ in case are the same group's, as everywhere."""
    for group, expected in ((GROUP, ["1", "3"]), (OTHER, ["2"])):
        await engine.write_tasks_snapshot(group, iter(TASKS))

        text = (folder_of(tmp_path, group) / "current_tasks.json").read_text()
        assert [task["id"] for task in json.loads(text)] == expected


async def test_main_sees_all_chats(engine: Engine, tmp_path: Path) -> None:
    """A chat is registered if the caller's list or the chat itself says so."""
    before = datetime.now(UTC).replace(microsecond=0)

    await engine.write_groups_snapshot(MAIN, CHATS, {"tg:3"})

    found = json.loads(
        (folder_of(tmp_path, MAIN) / "available_groups.json").read_text()
    )
    assert list(found) == ["groups", "lastSync"]
    assert found["groups"][0] == {
        "jid": "1@g.us",
        "name": "Família",
        "lastActivity": "2026-01-01T00:00:00.000Z",
        "isRegistered": False,
    }
    assert [chat["isRegistered"] for chat in found["groups"]] == [False, True, True]
    assert before <= datetime.fromisoformat(found["lastSync"]) <= datetime.now(UTC)


async def test_another_group_sees_no_chats(engine: Engine, tmp_path: Path) -> None:
    """Only main can register groups."""
    await engine.write_groups_snapshot(GROUP, CHATS, {"tg:3"})

    text = (folder_of(tmp_path, GROUP) / "available_groups.json").read_text()
    assert json.loads(text)["groups"] == []


@pytest.mark.node
def test_the_bytes_are_those_of_javascript() -> None:
    """A snapshot is what JSON.stringify(value, null, 2) would have written."""
    odd = '\u2028é\x7f\x1f"\\/\U0001f600'
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, timezone(timedelta(hours=1)))
    documents = [
        encode_tasks([]),
        encode_tasks([ScheduledTask(odd, odd, odd, odd, odd, odd, odd), *TASKS]),
        encode_groups([], moment),
        encode_groups([AvailableGroup(odd, odd, odd, is_registered=True)], moment),
    ]
    program = """
        const texts = JSON.parse(require("fs").readFileSync(0, "utf8"));
        process.stdout.write(JSON.stringify(
            texts.map(text => JSON.stringify(JSON.parse(text), null, 2))));
    """
    node = shutil.which("node")
    assert node is not None

    done = subprocess.run(
        [node, "-e", program],
        input=json.dumps([document.decode() for document in documents]),
        capture_output=True,
        check=True,
        text=True,
    )

    assert [text.encode() for text in json.loads(done.stdout)] == documents
    assert b'"lastSync": "2026-01-02T02:04:05.678Z"' in documents[2]


def test_half_a_character_is_replaced() -> None:
    """What JavaScript passes on and UTF-8 cannot say does not stop a snapshot."""
    data = encode_tasks([ScheduledTask("1", "a", "\ud83d!", "once", "")])

    assert json.loads(data)[0]["prompt"] == "\ufffd!"


async def test_a_reader_never_sees_half_a_file(engine: Engine, tmp_path: Path) -> None:
    """While it is written over and over, whoever reads it reads all of it."""
    tasks = [ScheduledTask(str(i), "x", "p" * 200, "once", "") for i in range(200)]
    await engine.write_tasks_snapshot(MAIN, tasks)
    path = folder_of(tmp_path, MAIN) / "current_tasks.json"
    lengths = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            lengths.add(len(json.loads(path.read_text())))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, read)
        try:
            for number in range(300):
                await engine.write_tasks_snapshot(MAIN, tasks[: 100 + number % 100])
        finally:
            done.set()

    assert lengths
    assert min(lengths) >= 100


@pytest.mark.parametrize("name", ["current_tasks.json", "available_groups.json"])
@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "directory"])
async def test_nothing_outside_is_written(
    engine: Engine, tmp_path: Path, name: str, kind: str
) -> None:
    """What an agent has put in the file's place is replaced, not followed."""
    folder = folder_of(tmp_path, MAIN)
    folder.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_text("outside")
    place = folder / name
    match kind:
        case "symlink":
            place.symlink_to(outside)
        case "hard link":
            place.hardlink_to(outside)
        case "fifo":
            os.mkfifo(place)
        case _:
            (place / "full").mkdir(parents=True)

    with trio.fail_after(5):
        await engine.write_tasks_snapshot(MAIN, TASKS)
        await engine.write_groups_snapshot(MAIN, CHATS, ())

    assert outside.read_text() == "outside"
    assert place.is_file()
    assert not place.is_symlink()
    assert json.loads(place.read_text())
    assert not [path for path in folder.iterdir() if re.search("tmp", path.name)]


async def test_a_mailbox_swapped_in_a_tight_loop(
    engine: Engine, tmp_path: Path
) -> None:
    """A symlink that comes and goes in the file's place never leads outside."""
    folder = folder_of(tmp_path, MAIN)
    folder.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_text("outside")
    place = folder / "current_tasks.json"
    done = threading.Event()

    def swap() -> None:
        number = 0
        while not done.is_set():
            number += 1
            link = folder / f"link{number}"
            with suppress(OSError):
                link.symlink_to(outside)
                link.rename(place)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, swap)
        try:
            for _ in range(500):
                await engine.write_tasks_snapshot(MAIN, TASKS)
        finally:
            done.set()

    assert outside.read_text() == "outside"


async def test_a_mailbox_in_the_place_of_which_something_stands(
    engine: Engine, tmp_path: Path
) -> None:
    """No agent can put anything there, so it is an error, and nothing is written."""
    folder_of(tmp_path, MAIN).symlink_to(tmp_path)

    with pytest.raises(UnsafePathError):
        await engine.write_tasks_snapshot(MAIN, TASKS)

    assert not (tmp_path / "current_tasks.json").exists()


async def test_a_closed_engine_writes_nothing(tmp_path: Path) -> None:
    """Its directories are not held any more."""
    async with open_engine(
        settings_for(tmp_path), FakeRuntime(scripted_agent())
    ) as engine:
        pass

    with pytest.raises(RuntimeError, match="closed"):
        await engine.write_tasks_snapshot(MAIN, TASKS)
    with pytest.raises(RuntimeError, match="closed"):
        await engine.write_groups_snapshot(MAIN, CHATS, ())
