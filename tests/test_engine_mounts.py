"""The engine and a group's wishes for more directories: granted, refused, held up."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

import clawtrio
from clawtrio import AdditionalMount, ContainerConfig, Ending, Group
from clawtrio.testing import FakeRuntime, framed, scripted_agent

from .helpers import (
    JID,
    OwnContainer,
    OwnRuntime,
    engine_on,
    open_descriptors,
)

ANSWER = framed(b'{"status":"success","result":"hi"}')


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with an allowed root in it, and one that is not allowed."""
    place = tmp_path / "host"
    for name in ("allowed/docs", "allowed/shared", "other"):
        (place / name).mkdir(parents=True)
    (place / "list.json").write_text(
        json.dumps(
            {
                "allowedRoots": [
                    {"path": str(place / "allowed"), "allowReadWrite": True}
                ],
                "blockedPatterns": [],
                "nonMainReadOnly": True,
            }
        )
    )
    (tmp_path / "bot").mkdir()
    return place


def group_of(*mounts: AdditionalMount, **changes: Any) -> Group:
    config = ContainerConfig(additional_mounts=mounts)
    return Group("Family", "family", container_config=config, **changes)


def wish(place: Path, name: str, *, rw: bool = False) -> AdditionalMount:
    return AdditionalMount(str(place / name), readonly=not rw)


async def test_what_is_granted_is_mounted_and_the_rest_is_told(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused mount does not stop the run: a warning, and the result has it."""
    wishes = (
        wish(place, "allowed/docs", rw=True),
        wish(place, "other"),
        wish(place, "allowed/missing"),
    )
    runtime = FakeRuntime(scripted_agent(ANSWER, exit_code=0))
    before = open_descriptors()

    async with engine_on(
        place.parent / "bot", runtime, allowlist_path=str(place / "list.json")
    ) as engine:
        result = await engine.run(group_of(*wishes), "hi", chat_jid=JID)
        main = await engine.run(group_of(*wishes, is_main=True), "hi", chat_jid=JID)

    assert result.ending is main.ending is Ending.EXITED
    shown = [
        [held.mount for held in spec.mounts if "extra" in held.mount.container_path]
        for spec in runtime.specs
    ]
    docs = clawtrio.VolumeMount(
        str(place / "allowed" / "docs"), "/workspace/extra/docs", readonly=True
    )
    assert shown == [[docs], [attrs.evolve(docs, readonly=False)]]
    assert [refused for refused, _ in result.refused_mounts] == list(wishes[1:])
    reasons = [reason for _, reason in result.refused_mounts]
    assert "not in an allowed root" in reasons[0]
    assert "does not exist" in reasons[1]
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.getMessage().partition("refused: ")[2] for r in warnings[:2]] == reasons
    assert open_descriptors() == before


async def test_a_malformed_allowlist_refuses_all(place: Path) -> None:
    """The reason names the place in the file; a correction counts for the next run."""
    path = place / "list.json"
    good = path.read_text()
    path.write_text(good.replace("true", '"yes"', 1))
    group = group_of(wish(place, "allowed/docs"))
    runtime = FakeRuntime(scripted_agent(ANSWER, exit_code=0))

    async with engine_on(
        place.parent / "bot", runtime, allowlist_path=str(path)
    ) as engine:
        result = await engine.run(group, "hi", chat_jid=JID)
        path.write_text(good + " ")
        mended = await engine.run(group, "hi", chat_jid=JID)

    [(_, reason)] = result.refused_mounts
    assert "$.allowedRoots[0].allowReadWrite" in reason
    assert result.status == "success"
    assert mended.refused_mounts == ()


async def answer(container: OwnContainer) -> None:
    await container.agent_stdout.send_all(ANSWER)
    container.exit(0)


@pytest.mark.parametrize("end", ["in time", "too late", "cancelled"])
async def test_a_place_that_hangs_holds_up_no_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A file system that does not answer costs its mount, and no descriptor."""
    go_on = threading.Event()
    looked = trio.Event()
    done = threading.Event()
    token = trio.lowlevel.current_trio_token()
    really_open, really_close = os.open, os.close
    opened: list[int] = []
    closed: list[int] = []

    def slow(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).endswith("/docs"):
            token.run_sync_soon(looked.set)
            go_on.wait(10)
            fd = really_open(path, flags, *args, **options)
            opened.append(fd)
            return fd
        return really_open(path, flags, *args, **options)

    def close(fd: int) -> None:
        really_close(fd)
        if fd in opened:
            closed.append(fd)
            done.set()

    monkeypatch.setattr(os, "open", slow)
    monkeypatch.setattr(os, "close", close)
    if end == "in time":
        go_on.set()
    group = group_of(wish(place, "allowed/docs"))
    runtime = OwnRuntime(answer, in_process=False)
    runtime.compares_mounts = True
    results = []

    with trio.fail_after(20):
        async with (
            engine_on(
                place.parent / "bot",
                runtime,
                allowlist_path=str(place / "list.json"),
                command_timeout=0.3,
            ) as engine,
            trio.open_nursery() as nursery,
        ):

            async def run() -> None:
                results.append(await engine.run(group, "hi", chat_jid=JID))

            nursery.start_soon(run)
            await looked.wait()
            if end == "cancelled":
                nursery.cancel_scope.cancel()
        go_on.set()
        await trio.to_thread.run_sync(done.wait)

    assert opened == closed
    if end == "cancelled":
        assert results == []
    else:
        [result] = results
        reasons = [reason for _, reason in result.refused_mounts]
        late = ["could not be looked at within 0.3 s"]
        assert reasons == (late if end == "too late" else [])
