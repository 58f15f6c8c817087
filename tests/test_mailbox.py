"""What agents ask for, and what hostile ones try."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio.testing import MockClock

from clawtrio import (
    CancelTask,
    Group,
    MemoryStore,
    PauseTask,
    RefreshGroups,
    RegisterGroup,
    Request,
    Requests,
    ResumeTask,
    ScheduleTask,
    SendMessage,
    UpdateTask,
    _mailbox as module,
    open_scheduler,
)
from clawtrio._hostfs import Directory
from clawtrio.testing import FakeRuntime, scripted_agent

from .helpers import OwnRuntime, engine_on, frame
from .test_dispatcher import Bot, answer_at_once, bot_of, quiet

MAIN: Final = Group("Main", "main", is_main=True)
OTHER: Final = Group("Other", "other")
GROUPS: Final = {"m": MAIN, "o": OTHER}
MESSAGE: Final = {"type": "message", "chatJid": "o", "text": "Hi"}
SCHEDULE: Final = {
    "type": "schedule_task",
    "prompt": "p",
    "schedule_type": "interval",
    "schedule_value": "60000",
    "targetJid": "o",
}
REGISTER: Final = {
    "type": "register_group",
    "jid": "n",
    "name": "New",
    "folder": "new",
    "trigger": "@A",
}


def box_of(root: Path, folder: str, box: str) -> Path:
    """Return a directory of a mailbox, made if need be."""
    path = root / "data" / "ipc" / folder / box
    path.mkdir(parents=True, exist_ok=True)
    return path


def put(root: Path, folder: str, fields: Any, name: str = "1") -> Path:
    """Write what an agent writes, where it does."""
    message = isinstance(fields, dict) and fields.get("type") == "message"
    path = box_of(root, folder, "messages" if message else "tasks") / f"{name}.json"
    path.write_text(json.dumps(fields))
    return path


@asynccontextmanager
async def requests_of(root: Path, groups: Any = GROUPS) -> AsyncIterator[Requests]:
    """Open the requests of an engine."""
    async with (
        engine_on(root, FakeRuntime(scripted_agent())) as engine,
        engine.open_requests(groups) as requests,
    ):
        yield requests


async def all_of(requests: Requests) -> list[Request]:
    """Return what there is, and leave it unsettled."""
    found: list[Request] = []
    with trio.move_on_after(20):
        while True:
            found.append(await anext(requests))
    return found


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (MESSAGE, SendMessage(group=MAIN, chat_jid="o", text="Hi")),
        (
            {**MESSAGE, "chatJid": "x", "sender": "S", "groupFolder": "other"},
            SendMessage(group=MAIN, chat_jid="x", text="Hi", sender="S"),
        ),
        (
            {**SCHEDULE, "taskId": "t", "context_mode": "group"},
            ScheduleTask(
                group=MAIN,
                task_id="t",
                prompt="p",
                schedule_type="interval",
                schedule_value="60000",
                context_mode="group",
                target_jid="o",
            ),
        ),
        ({"type": "pause_task", "taskId": "t"}, PauseTask(group=MAIN, task_id="t")),
        ({"type": "resume_task", "taskId": "t"}, ResumeTask(group=MAIN, task_id="t")),
        ({"type": "cancel_task", "taskId": "t"}, CancelTask(group=MAIN, task_id="t")),
        (
            {"type": "update_task", "taskId": "t", "prompt": "q"},
            UpdateTask(group=MAIN, task_id="t", prompt="q"),
        ),
        ({"type": "refresh_groups"}, RefreshGroups(group=MAIN)),
    ],
)
async def test_agents_ask_as_in_nanoclaw(
    fields: dict[str, Any],
    expected: Request,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """Each kind of file is a kind of request; a file goes when it was dealt with."""
    path = put(tmp_path, "main", fields)
    async with requests_of(tmp_path) as requests:
        async for request in requests:
            async with request:
                assert request == expected
                assert path.exists()
            assert not path.exists()
            break
        assert await all_of(requests) == []


async def test_a_group_is_registered_and_never_main(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Whatever an agent writes of is_main, in whatever spelling."""
    mount = {"hostPath": "/srv", "containerPath": "srv", "readonly": False}
    config = {"additionalMounts": [mount], "timeout": 60000}
    claims = {"isMain": True, "is_main": True, "requiresTrigger": False}
    put(tmp_path, "main", {**REGISTER, **claims, "containerConfig": config})
    async with requests_of(tmp_path) as requests:
        (request,) = await all_of(requests)

    assert isinstance(request, RegisterGroup)
    assert request.jid == "n"
    group = request.new_group
    assert (group.name, group.folder, group.trigger) == ("New", "new", "@A")
    assert (group.is_main, group.requires_trigger) == (False, False)
    assert group.container_config.timeout == 60
    assert not group.container_config.additional_mounts[0].readonly


@pytest.mark.parametrize(
    ("folder", "fields"),
    [
        ("other", {**MESSAGE, "chatJid": "m"}),
        ("other", {**MESSAGE, "chatJid": "x", "isMain": True, "groupFolder": "main"}),
        ("other", {**SCHEDULE, "targetJid": "m", "createdBy": "main"}),
        ("other", {"type": "refresh_groups", "isMain": True}),
        ("other", REGISTER),
        ("main", {**REGISTER, "jid": "m"}),
        ("main", {**REGISTER, "folder": "MAIN"}),
    ],
)
async def test_what_a_group_may_not_do_is_refused(
    folder: str,
    fields: dict[str, Any],
    tmp_path: Path,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The group is that of the mailbox, whoever the file says it is."""
    path = put(tmp_path, folder, fields)
    async with requests_of(tmp_path) as requests:
        assert await all_of(requests) == []

    assert not path.exists()
    assert f"[{folder}] refused a request" in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        *({}, [], None, "text", {"type": ["x"]}, {"type": "unknown"}),
        {**SCHEDULE, "prompt": ""},
        {**SCHEDULE, "taskId": "x" * 257},
        {**MESSAGE, "text": 5},
        {"type": "pause_task", "taskId": "a\nb"},
        {"type": "pause_task"},
        {**REGISTER, "folder": "../main"},
        {**REGISTER, "folder": "a/b"},
        {**REGISTER, "folder": "errors"},
        {**REGISTER, "containerConfig": "x"},
        {**REGISTER, "containerConfig": {"timeout": -1}},
        {**REGISTER, "containerConfig": {"timeout": 10**400}},
        {**REGISTER, "containerConfig": {"additionalMounts": [{}]}},
    ],
)
async def test_what_makes_no_sense_is_moved_away(
    fields: Any, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It is kept where no group can be, for the operator to look at."""
    path = put(tmp_path, "main", fields)
    async with requests_of(tmp_path) as requests:
        assert await all_of(requests) == []

    assert not path.exists()
    (kept,) = (tmp_path / "data" / "errors").iterdir()
    assert kept.name.endswith("-1.json")


async def test_what_is_no_small_file_is_moved_away_unread(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A gibibyte, a FIFO, a link, a directory, a deep or a strange text harm nobody."""
    secret = tmp_path / "secret"
    secret.write_text(json.dumps(MESSAGE))
    box = box_of(tmp_path, "other", "messages")
    with (box / "0.json").open("wb") as large:
        large.truncate(2**30)
    os.mkfifo(box / "1.json")
    (box / "2.json").symlink_to(secret)
    (box / "3.json").mkdir()
    (box / "4.json").write_text("[" * 100_000)
    (box / "5.json").write_bytes(b"\xff")
    (box_of(tmp_path, "other", "tasks") / "6.json").write_text(json.dumps(MESSAGE))
    (box / "..json").write_text("")
    put(tmp_path, "other", MESSAGE, "9")
    async with requests_of(tmp_path) as requests:
        (request,) = await all_of(requests)

    assert request == SendMessage(group=OTHER, chat_jid="o", text="Hi")
    assert len(list((tmp_path / "data" / "errors").iterdir())) == 8
    assert secret.exists()


async def test_errors_are_kept_in_bounds(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent can write any number of malformed files; a few are enough to look at."""
    monkeypatch.setattr(module, "_MAX_ERRORS", 3)
    for n in range(10):
        put(tmp_path, "other", {}, f"{n}")
    async with requests_of(tmp_path) as requests:
        assert await all_of(requests) == []

    assert len(list((tmp_path / "data" / "errors").iterdir())) == 3
    assert list(box_of(tmp_path, "other", "tasks").iterdir()) == []


async def test_a_full_mailbox_holds_up_no_other(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """With 100,000 files in one, the other's turn comes soon; junk is thrown away."""
    box = box_of(tmp_path, "main", "messages")
    for n in range(100_000):
        os.close(os.open(box / f"{n}.junk", os.O_CREAT | os.O_WRONLY))
    for n in range(200):
        put(tmp_path, "main", {"type": "pause_task", "taskId": "t"}, f"{n}")
    put(tmp_path, "other", MESSAGE)
    seen = 0
    async with requests_of(tmp_path) as requests:
        async for request in requests:
            seen += 1
            if request.group == OTHER:
                break

    assert seen <= module._BATCH + 1
    assert len(list(box.iterdir())) < 100_000


async def test_a_request_that_was_not_dealt_with_comes_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Not at once, in a circle, but when requests are opened the next time."""
    put(tmp_path, "other", MESSAGE)
    async with requests_of(tmp_path) as requests:
        request = await anext(requests)
        with pytest.raises(KeyError):
            async with request:
                raise KeyError
        assert await all_of(requests) == []
    async with requests_of(tmp_path) as requests:
        (request,) = await all_of(requests)
        # Meanwhile, the agent has put something else there.
        path = box_of(tmp_path, "other", "messages") / "1.json"
        path.unlink()
        path.mkdir()
        async with request:
            pass
    assert not path.exists()


async def test_a_request_that_cannot_be_removed_is_said_once(
    tmp_path: Path,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An agent that shuts its mailbox hears nothing twice, and ends no loop."""
    put(tmp_path, "other", MESSAGE)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    async with requests_of(tmp_path) as requests:
        request = await anext(requests)
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "remove", refuse)
            patch.setattr(Directory, "discard", refuse)
            async with request:
                pass
        assert await all_of(requests) == []

    assert "[other] cannot remove a request" in caplog.text


async def test_half_a_character_is_replaced(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What the bot cannot encode would come again and again."""
    put(tmp_path, "other", {**MESSAGE, "text": "\ud83d!"})

    async with requests_of(tmp_path) as requests:
        (request,) = await all_of(requests)

    assert isinstance(request, SendMessage)
    assert request.text == "\ufffd!"


async def test_a_closed_engine_has_no_requests(tmp_path: Path) -> None:
    """Its directories are not held any more, and nothing else is read."""
    async with requests_of(tmp_path) as requests:
        pass

    with pytest.raises(RuntimeError, match="closed"):
        await anext(requests)


async def test_mailboxes_of_nobody_are_left_alone(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """By default, a group is known once it had a run."""
    path = put(tmp_path, "other", MESSAGE)
    runtime = FakeRuntime(scripted_agent(frame(), exit_code=0))
    async with (
        engine_on(tmp_path, runtime) as engine,
        engine.open_requests() as requests,
    ):
        assert await all_of(requests) == []
        assert path.exists()
        await engine.run(OTHER, "Hi", chat_jid="o")
        assert len(await all_of(requests)) == 1


async def test_a_group_may_have_many_chats_and_lose_its_files(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mailbox is read once, and what is gone again by then is nothing."""
    put(tmp_path, "other", MESSAGE)
    names = Directory.names

    def more(box: Directory, limit: int | None = 1000) -> list[str]:
        return ["gone.json", *names(box, limit)]

    monkeypatch.setattr(Directory, "names", more)
    async with requests_of(tmp_path, {**GROUPS, "p": OTHER}) as requests:
        assert len(await all_of(requests)) == 1


async def test_a_mailbox_that_cannot_be_opened_is_warned_about_once(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are looked into all the same."""
    put(tmp_path, "other", MESSAGE)
    (tmp_path / "data" / "ipc" / "main").write_text("")
    async with requests_of(tmp_path) as requests:
        assert len(await all_of(requests)) == 1

    assert caplog.text.count("[main] cannot look into its mail") == 1


async def test_a_request_is_there_at_once(tmp_path: Path) -> None:
    """In real time, the kernel tells: nobody waits for the next poll."""
    runtime = OwnRuntime(quiet, in_process=False)
    async with (
        engine_on(tmp_path, runtime) as engine,
        engine.open_requests(GROUPS) as requests,
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            await trio.sleep(0.3)
            put(tmp_path, "other", MESSAGE)

        nursery.start_soon(ask)
        started = trio.current_time()
        request = await anext(requests)

    assert request == SendMessage(group=OTHER, chat_jid="o", text="Hi")
    assert trio.current_time() - started < module._POLL_INTERVAL


async def test_without_events_there_is_a_poll(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no more watches are to be had, a request takes a few seconds."""
    watch = module._Watch()
    watch.close()
    watch.fd = -1
    monkeypatch.setattr(module, "_Watch", lambda: watch)
    async with requests_of(tmp_path) as requests, trio.open_nursery() as nursery:

        async def ask() -> None:
            await trio.sleep(1)
            put(tmp_path, "other", MESSAGE)

        nursery.start_soon(ask)
        await anext(requests)
        assert trio.current_time() == module._POLL_INTERVAL


async def test_tasks_are_scheduled_for_agents(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The scheduler does what is asked about tasks, as far as the group may."""
    store = MemoryStore()
    async with (
        bot_of(tmp_path, answer_at_once, store=store, groups=GROUPS, bot=Bot()) as (
            dispatcher,
            _,
        ),
        open_scheduler(dispatcher) as scheduler,
    ):

        async def apply(kind: Any, group: Group, **fields: Any) -> bool:
            return await scheduler.apply(kind(group=group, **fields))

        schedule = {
            "prompt": "p",
            "schedule_type": "interval",
            "schedule_value": "60000",
            "context_mode": "group",
        }
        for task_id, chat in [("t", "o"), (None, "m")]:
            more = {"task_id": task_id, "target_jid": chat}
            assert await apply(ScheduleTask, MAIN, **schedule, **more)
        first, second = scheduler.tasks
        assert (first.id, first.group_folder, first.context_mode) == (
            *("t", "other", "group"),
        )
        assert second.id.startswith("task-")
        for kind in (PauseTask, CancelTask, UpdateTask):
            assert await apply(kind, OTHER, task_id=second.id)
        assert scheduler.find(second.id) == second
        assert caplog.text.count("refused other a request: UnknownTaskError") == 3

        assert await apply(PauseTask, OTHER, task_id="t")
        assert scheduler.find("t").status == "paused"
        assert await apply(ResumeTask, MAIN, task_id="t")
        assert scheduler.find("t").status == "active"
        assert await apply(UpdateTask, OTHER, task_id="t", prompt="q")
        assert scheduler.find("t").prompt == "q"
        assert await apply(UpdateTask, OTHER, task_id="t", schedule_value="x")
        assert "refused other a request: ScheduleError" in caplog.text
        assert await apply(CancelTask, OTHER, task_id="t")
        assert scheduler.tasks == (second,)
        assert not await apply(RefreshGroups, MAIN)
