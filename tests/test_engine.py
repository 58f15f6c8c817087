"""The engine: what comes out of it, what it leaves, and what others may do to it.

Times are virtual, but where another process takes part; see test_run.py for them.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import clawtrio
from clawtrio import (
    AgentOutput,
    Ending,
    Engine,
    Group,
    GroupBusyError,
    NotStartedError,
    Run,
    RunResult,
    RuntimeUnavailableError,
    SettingsError,
    UnsafePathError,
    open_engine,
)
from clawtrio._agent import agent_python
from clawtrio._bwrap import BwrapRuntime
from clawtrio._docker import DockerRuntime
from clawtrio._engine import choose_runtime
from clawtrio._hostfs import Directory
from clawtrio.testing import AgentPipes, FakeRuntime, framed, scripted_agent

from .helpers import (
    FOREVER,
    GROUP,
    HEARTBEAT,
    JID,
    WAITS,
    OwnContainer,
    OwnRuntime,
    echoing,
    engine_of,
    engine_on,
    frame,
    hang,
    nothing,
    open_descriptors,
    open_threads,
    raising,
    settings_for,
)

#: The whole ladder: stop_grace and 3 times command_timeout.
LADDER = 5 + 3 * 10
#: What a client gets to notice that its container is gone.
MOMENT = 1


class Oops(BaseException):
    """What nobody expects."""


def errors() -> list[BaseException]:
    """List exceptions that could get lost, changed or wrapped."""
    return [
        ValueError("x"),
        Oops(),
        StopAsyncIteration(),
        GeneratorExit(),
        KeyboardInterrupt(),
        trio.EndOfChannel(),
        trio.BusyResourceError(),
        GroupBusyError("x"),
        ExceptionGroup("of the caller", [ValueError("x")]),
        BaseExceptionGroup("of the caller", [Oops()]),
    ]


each_error = pytest.mark.parametrize("error", errors(), ids=lambda e: type(e).__name__)


async def quiet(container: OwnContainer) -> None:
    """Be an agent that does nothing."""


async def answering(container: OwnContainer) -> None:
    """Be an agent that answers, then waits to be stopped."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await container.agent_stdin.receive_some()
        await container.agent_stdout.send_all(frame())


# What comes out.


@each_error
async def test_an_exception_of_the_run_block_comes_out_as_itself(
    error: BaseException, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What the block of open_run raises is what its caller catches, container gone."""
    runtime = FakeRuntime(scripted_agent(frame()))
    async with engine_on(tmp_path, runtime) as engine:
        with pytest.raises(type(error)) as caught:
            async with engine.open_run(GROUP, "Hi", chat_jid=JID):
                raise error

        assert caught.value is error
        assert engine.runs == ()
        assert await runtime.find({}) == []
        # The group is free at once.
        result = await engine.run(GROUP, "Hi", chat_jid=JID)
        assert result.status == "success"


@each_error
async def test_an_exception_of_the_callback_comes_out_as_itself(
    error: BaseException, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What the callback raises is what the caller of engine.run catches."""
    runtime = FakeRuntime(scripted_agent(frame(), frame(), frame()), ignores_stop=True)
    seen: list[AgentOutput] = []
    before = 0

    async def broken(output: AgentOutput) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(output)
        raise error

    async with engine_on(tmp_path, runtime) as engine:
        before = open_descriptors()
        with pytest.raises(type(error)) as caught:
            await engine.run(GROUP, "Hi", chat_jid=JID, on_output=broken)

        assert caught.value is error
        assert len(seen) == 1
        assert await runtime.find({}) == []
        assert open_descriptors() == before
    assert trio.current_time() == 5


@each_error
@pytest.mark.parametrize("runs", [0, 1, 3])
async def test_an_exception_of_the_engine_block_comes_out_as_itself(
    error: BaseException, runs: int, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It passes the engine by, whose live runs in other tasks are stopped."""
    runtime = FakeRuntime(scripted_agent(frame()))
    results: list[RunResult] = []

    async def run(engine: Engine, number: int) -> None:
        group = Group("G", f"g{number}")
        results.append(await engine.run(group, "Hi", chat_jid=JID, single_turn=False))

    async with trio.open_nursery() as nursery:
        with pytest.raises(type(error)) as caught:  # noqa: PT012
            async with engine_on(tmp_path, runtime) as engine:
                for number in range(runs):
                    nursery.start_soon(run, engine, number)  # noqa: ASYNC111
                await trio.sleep(1)
                raise error
        assert caught.value is error
        assert await runtime.find({}) == []

    assert [result.ending for result in results] == [Ending.STOPPED] * runs
    assert [result.status for result in results] == ["success"] * runs


async def test_an_exception_in_the_midst_of_a_cancellation_comes_out(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A block that answers cancellation with an error is heard."""
    error = ValueError("x")
    with (  # noqa: PT012
        pytest.raises(ValueError, match="x") as caught,
        trio.move_on_after(5),
    ):
        async with engine_of(tmp_path, scripted_agent()) as engine:
            try:
                await engine.run(GROUP, "Hi", chat_jid=JID)
            finally:
                raise error

    assert caught.value is error


@pytest.mark.parametrize("where", ["run", "open_run", "loop", "engine", "callback"])
@pytest.mark.parametrize("ignores_stop", [False, True])
async def test_a_cancellation_comes_out_as_itself(
    *,
    where: str,
    ignores_stop: bool,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """A cancelled caller sees Cancelled, bare, once the container is gone."""
    runtime = FakeRuntime(scripted_agent(frame()), ignores_stop=ignores_stop)
    seen: list[BaseException] = []

    async def on_output(_: AgentOutput) -> None:
        await trio.sleep(math.inf if where == "callback" else 0)

    with trio.move_on_after(3) as scope:
        try:
            async with open_engine(settings_for(tmp_path), runtime) as engine:
                try:
                    if where in {"run", "callback"}:
                        await engine.run(
                            GROUP,
                            "Hi",
                            chat_jid=JID,
                            on_output=on_output,
                            single_turn=False,
                        )
                    elif where == "engine":
                        await trio.sleep_forever()
                    else:
                        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
                            if where == "open_run":
                                await trio.sleep_forever()
                            async for _ in run:
                                pass
                except BaseException as exc:
                    seen.append(exc)
                    assert engine.runs == ()
                    raise
        except BaseException as exc:
            seen.append(exc)
            raise

    assert scope.cancelled_caught
    assert [type(exc) for exc in seen] == [trio.Cancelled] * 2
    assert seen[0] is seen[1]
    assert await runtime.find({}) == []
    assert trio.current_time() == 3 + 5 * (ignores_stop and where != "engine")


async def test_cancelling_one_run_leaves_the_others(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Of several runs in nested nurseries, only the cancelled one ends."""
    agent = scripted_agent(20.0, frame(), exit_code=0)
    results = []

    async with engine_of(tmp_path, agent) as engine:

        async def run(folder: str) -> None:
            group = Group("G", folder)
            results.append(await engine.run(group, "Hi", chat_jid=JID))

        async with trio.open_nursery() as outer:
            outer.start_soon(run, "other")
            async with trio.open_nursery() as inner:
                inner.start_soon(run, "cancelled")
                await trio.sleep(5)
                inner.cancel_scope.cancel()
            assert [run.group.folder for run in engine.runs] == ["other"]

    assert [result.ending for result in results] == [Ending.EXITED]


async def test_leaving_the_engine_stops_all_runs(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Whoever still waits for a run gets its result, even amid a slow callback."""
    runtime = FakeRuntime(scripted_agent(frame(), frame()), ignores_stop=True)
    results: list[RunResult] = []

    async def slow(_: AgentOutput) -> None:
        await trio.sleep(10_000)

    async def run(engine: Engine, number: int) -> None:
        group = Group("G", f"g{number}")
        on_output = slow if number % 2 else None
        results.append(await engine.run(group, "Hi", chat_jid=JID, on_output=on_output))

    async with trio.open_nursery() as nursery:
        async with engine_on(tmp_path, runtime) as engine:
            for number in range(10):
                nursery.start_soon(run, engine, number)  # noqa: ASYNC111
            await trio.sleep(1)
            assert len(engine.runs) == 10
        # The janitor has a look at them.
        assert 6 <= trio.current_time() <= 7
        assert engine.runs == ()
        assert await runtime.find({}) == []
        with pytest.raises(RuntimeError, match="closed"):
            await engine.run(GROUP, "Hi", chat_jid=JID)

    assert [result.ending for result in results] == [Ending.STOPPED] * 10
    assert [result.outputs for result in results] == [2] * 5 + [1] * 5


async def test_a_closed_engine_opens_no_run(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """After its block, and while it is being left, an engine takes no more runs."""
    runtime = FakeRuntime(scripted_agent(), ignores_stop=True)

    async def late(engine: Engine) -> None:
        with suppress(NotStartedError):
            await engine.run(GROUP, "Hi", chat_jid=JID)
        with pytest.raises(RuntimeError, match="closed"):
            await engine.run(GROUP, "Hi", chat_jid=JID)

    async with trio.open_nursery() as nursery, engine_on(tmp_path, runtime) as engine:
        nursery.start_soon(late, engine)  # noqa: ASYNC111
        await trio.sleep(1)
    with pytest.raises(RuntimeError, match="closed"):
        async with engine.open_run(GROUP, "Hi", chat_jid=JID):
            pass  # pragma: no cover

    assert len(runtime.specs) == 1


async def test_runs_are_listed_while_they_live(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """engine.runs holds the live runs, the oldest first."""
    async with engine_of(tmp_path, scripted_agent()) as engine:
        assert list(engine.runs) == []
        async with (
            engine.open_run(Group("B", "b"), "Hi", chat_jid=JID) as first,
            engine.open_run(Group("A", "a"), "Hi", chat_jid=JID) as second,
        ):
            assert list(engine.runs) == [first, second]
            first.stop()
            await first.wait()
            assert list(engine.runs) == [second]
            assert repr(second) == f"<Run {second.id} of a>"
        assert list(engine.runs) == []


async def test_the_start_is_told_once_the_client_runs(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """nursery.start gives the live run as soon as there is one, and no sooner."""
    runtime = OwnRuntime(answering, start=partial(trio.sleep, 3))
    async with engine_on(tmp_path, runtime) as engine, trio.open_nursery() as nursery:
        run = await nursery.start(partial(engine.run, GROUP, "Hi", chat_jid=JID))

        assert trio.current_time() == 3
        assert isinstance(run, Run)
        assert engine.runs == (run,)
        assert list(runtime.live) == [run.container_name]
        result = await run.wait()
        assert result.status == "success"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (NotStartedError("no docker"), NotStartedError),
        (UnsafePathError("/x", "is odd"), UnsafePathError),
        (FileNotFoundError("docker"), NotStartedError),
    ],
)
async def test_a_failed_start_is_raised_bare_to_who_awaits_it(
    failure: Exception,
    expected: type[Exception],
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """A start that fails raises, in no group, and leaves nothing."""
    runtime = OwnRuntime(quiet, start=raising(failure))
    async with engine_on(tmp_path, runtime) as engine:
        before = open_descriptors()
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                with pytest.raises(expected):
                    await nursery.start(partial(engine.run, GROUP, "Hi", chat_jid=JID))
            with pytest.raises(expected):
                await engine.run(GROUP, "Hi", chat_jid=JID)
            with pytest.raises(expected):
                async with engine.open_run(GROUP, "Hi", chat_jid=JID):
                    pass  # pragma: no cover
        assert engine.runs == ()
        assert open_descriptors() == before


async def test_a_start_that_hangs_fails_in_time(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A runtime that does not get on has command_timeout, and is looked after."""
    runtime = OwnRuntime(quiet, start=hang)
    async with engine_on(tmp_path, runtime) as engine:
        with pytest.raises(NotStartedError, match="within 10 s"):
            await engine.run(GROUP, "Hi", chat_jid=JID)
        assert trio.current_time() == 10
        await trio.sleep(5)
        looks = len(runtime.looks)
        assert looks >= 3
        await trio.sleep(5)
        assert len(runtime.looks) == looks


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_a_run_can_be_ended_while_it_starts(
    how: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nobody has to wait for a start that hangs to be rid of it."""
    runtime = OwnRuntime(quiet, start=hang)
    outcomes: list[type[BaseException]] = []

    async def run(engine: Engine) -> None:
        try:
            await engine.run(GROUP, "Hi", chat_jid=JID)
        except trio.Cancelled:
            outcomes.append(trio.Cancelled)
            raise
        except NotStartedError:
            outcomes.append(NotStartedError)

    async with trio.open_nursery() as nursery:
        async with engine_on(tmp_path, runtime) as engine:
            nursery.start_soon(run, engine)  # noqa: ASYNC111
            await trio.sleep(2)
            assert engine.runs == ()
            if how == "cancel":
                nursery.cancel_scope.cancel()
                await trio.lowlevel.cancel_shielded_checkpoint()
        assert trio.current_time() < 2 + MOMENT

    expected = trio.Cancelled if how == "cancel" else NotStartedError
    assert outcomes == [expected]
    # Nobody knows what was begun.
    assert runtime.looks


async def test_a_stop_that_comes_as_the_container_starts_stops_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A start that cannot be interrupted any more is followed by the ladder."""

    async def start() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)

    runtime = OwnRuntime(quiet, start=start)
    results = []

    async def run(engine: Engine) -> None:
        results.append(await engine.run(GROUP, "Hi", chat_jid=JID))

    async with (
        trio.open_nursery() as nursery,
        engine_on(tmp_path, runtime) as engine,
    ):
        nursery.start_soon(run, engine)  # noqa: ASYNC111
        await trio.sleep(1)

    assert [result.ending for result in results] == [Ending.STOPPED]
    assert runtime.live == {}
    assert runtime.started[0].asked == ["stop"]


# One live run per group.


@pytest.mark.parametrize("other", ["family", "FAMILY", "Family"])
async def test_a_group_has_one_live_run(
    other: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A second run of a group is refused, in any engine, until the first is over."""
    settings = settings_for(tmp_path)
    runtime = FakeRuntime(scripted_agent(frame()))
    async with (
        open_engine(settings, runtime) as engine,
        open_engine(settings, runtime) as twin,
    ):
        before = open_descriptors()
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            for place in (engine, twin):
                with pytest.raises(GroupBusyError) as refusal:
                    await place.run(Group("Again", other), "Hi", chat_jid=JID)
                assert refusal.value.folder == other
                async with trio.open_nursery() as nursery:
                    with pytest.raises(GroupBusyError):
                        await nursery.start(
                            partial(place.run, Group("A", other), "", chat_jid=JID)
                        )
            # Other groups do not mind.
            await twin.run(Group("Other", "family-2"), "Hi", chat_jid=JID)
            run.stop()
            await run.wait()
            # At once, though the block is not left.
            await twin.run(Group("Again", other), "Hi", chat_jid=JID)
        assert open_descriptors() == before
    assert len(runtime.specs) == 3


HOLDER = """
import sys, trio, clawtrio
from clawtrio.testing import FakeRuntime, scripted_agent

async def main(root):
    settings = clawtrio.Settings(root=root, agent="echo", min_free_bytes=0)
    async with clawtrio.open_engine(settings, FakeRuntime(scripted_agent())) as engine:
        group = clawtrio.Group("Family", "Family")
        async with engine.open_run(group, "Hi", chat_jid="x") as run:
            print(run.id, flush=True)
            await run.wait()

trio.run(main, sys.argv[1])
"""


async def test_a_group_has_one_live_run_across_processes(tmp_path: Path) -> None:
    """The lock holds against another process, and goes with it, even by SIGKILL."""
    async with engine_of(tmp_path, scripted_agent(frame(), exit_code=0)) as engine:
        holder = await trio.lowlevel.open_process(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        try:
            with trio.fail_after(60):
                assert await holder.stdout.receive_some()
            with pytest.raises(GroupBusyError):
                await engine.run(GROUP, "Hi", chat_jid=JID)
        finally:
            holder.kill()
            with trio.move_on_after(10, shield=True):
                await holder.wait()
                await holder.stdout.aclose()
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert result.status == "success"


# What is left on the host: logs.


def read_log(result: RunResult) -> tuple[str, dict[str, str]]:
    """Return a run log's title and its sections."""
    title, *sections = result.log_path.read_text().split("=== ")[1:]
    parts = [section.split(" ===\n", 1) for section in sections]
    return title, {name: body.strip() for name, body in parts}


async def collect(
    root: Path, steps: list[bytes | float], code: int | None, **changes: Any
) -> RunResult:
    """Run an agent that also speaks of secrets."""

    async def agent(pipes: AgentPipes) -> int:
        await pipes.stderr.send_all(b"stderr-secret \x1b[31m\n")
        return await scripted_agent(*steps, exit_code=code)(pipes)

    async with engine_of(root, agent, **changes) as engine:
        return await engine.run(
            GROUP, "prompt-secret", chat_jid=JID, session_id="session-1"
        )


ANSWER = frame("output-secret")


@pytest.mark.parametrize(
    ("steps", "code", "title", "facts", "with_stderr"),
    [
        ([ANSWER], 0, "Container Run Log", ["Ending: exited", "Exit Code: 0"], False),
        ([], 0, "Container Run Log", ["Status: error", "Unanswered: 1"], True),
        ([ANSWER], 3, "Container Run Log", ["Ending: failed", "Exit Code: 3"], True),
        (
            [ANSWER],
            None,
            "Container Run Log (TIMEOUT)",
            ["Ending: idle", "Duration: 7000ms"],
            True,
        ),
        (
            [HEARTBEAT],
            None,
            "Container Run Log (TIMEOUT)",
            ["Ending: timed out", "Duration: 100000ms", "Exit Code: 143"],
            True,
        ),
    ],
)
async def test_each_run_has_a_log_file(
    *,
    steps: list[bytes | float],
    code: int | None,
    title: str,
    facts: list[str],
    with_stderr: bool,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """The log says how it went, on errors with stderr, and by default no texts."""
    result = await collect(tmp_path, steps, code)

    head, sections = read_log(result)
    assert result.log_path.parent == tmp_path / "data/logs/family"
    assert head.startswith(f"{title} ===")
    for fact in ["Group: Family", "IsMain: false", *facts]:
        assert f"\n{fact}\n" in head
    assert sections["Input Summary"] == "Prompt length: 13 chars\nSession ID: session-1"
    assert "/workspace/group" in sections["Mounts"]
    assert ("Stderr" in sections) == with_stderr
    assert ("Container Args" in sections) == with_stderr
    text = result.log_path.read_text()
    assert ("stderr-secret" in text) == with_stderr
    assert "prompt-secret" not in text
    assert "output-secret" not in text
    # What an agent writes does nothing to a terminal that shows it.
    assert "\x1b" not in text


async def test_a_log_has_the_texts_on_demand(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """With log_text, input and stdout are in the log, cut to max_log_bytes."""
    noise = b"a" * 500 + b"m" * 500 + b"z" * 500 + b"\n"

    whole = await collect(tmp_path, [ANSWER], 0, log_text=True)
    cut = await collect(tmp_path, [ANSWER, noise], 1, log_text=True, max_log_bytes=100)

    _, sections = read_log(whole)
    assert "prompt-secret" in sections["Input"]
    assert "output-secret" in sections["Stdout"]
    assert not whole.stdout_truncated
    _, sections = read_log(cut)
    assert "m" * 400 not in sections["Stdout (TRUNCATED)"]
    assert "bytes left out" in sections["Stdout (TRUNCATED)"]
    assert (cut.stdout_truncated, cut.stderr_truncated) == (True, False)


@pytest.mark.parametrize("how", ["leave", "raise", "cancel", "close", "callback"])
async def test_a_run_that_the_caller_ends_has_a_log_file_too(
    how: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A log is written on every way that a run can end."""
    paths: list[Path] = []

    async def broken(_: AgentOutput) -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError

    async def wait(run: Run) -> None:
        await run.wait()

    async with trio.open_nursery() as nursery:
        async with engine_of(tmp_path, scripted_agent(frame())) as engine:
            with suppress(ValueError), trio.move_on_after(3):
                if how == "callback":
                    await engine.run(GROUP, "Hi", chat_jid=JID, on_output=broken)
                elif how == "close":
                    start = partial(
                        engine.run, GROUP, "Hi", chat_jid=JID, single_turn=False
                    )
                    await nursery.start(start)
                else:
                    async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
                        if how == "raise":
                            raise ValueError
                        if how == "cancel":
                            await wait(run)
        paths.extend((tmp_path / "data/logs/family").iterdir())

    (path,) = paths
    assert "Ending: stopped" in path.read_text()
    assert list((tmp_path / "groups/family").iterdir()) == []


async def test_a_run_without_an_agent_has_a_log_file(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The runtime's own complaint is in the log."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stderr.send_all(b"docker: no space left\n")
        container.exit(125)

    runtime = OwnRuntime(agent, start_failure="no space left")
    async with engine_on(tmp_path, runtime) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    head, sections = read_log(result)
    assert "Ending: not started" in head
    assert sections["Stderr"] == "docker: no space left"


async def test_old_logs_are_pruned(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Logs that are older than log_retention go when a new one comes."""
    async with engine_of(
        tmp_path, scripted_agent(frame(), exit_code=0), log_retention=3600
    ) as engine:
        results = [await engine.run(GROUP, "Hi", chat_jid=JID) for _ in range(3)]
        old, older, young = (result.log_path for result in results)
        for path, hours in ((old, 1.1), (older, 100), (young, 0.9)):
            moment = time.time() - 3600 * hours
            os.utime(path, (moment, moment))
        last = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert sorted(old.parent.iterdir()) == sorted([young, last.log_path])


async def test_a_log_that_cannot_be_written_is_no_ending(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its log, a run is as good as with it."""

    async def agent(pipes: AgentPipes) -> int:
        directory = tmp_path / "data/logs/family"
        directory.rmdir()
        await pipes.stdout.send_all(frame())
        return 0

    async with engine_of(tmp_path, agent) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert result.status == "success"
    assert "cannot write the run's log" in caplog.text


# What others see: log records.


@pytest.mark.parametrize("stdin", ["lifeline", "eof"])
@pytest.mark.parametrize("code", [0, 3, None])
async def test_records_carry_group_and_run_and_no_texts(
    stdin: str,
    code: int | None,
    tmp_path: Path,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Above DEBUG there is no text of anybody, and each record says whose it is."""
    caplog.set_level(logging.DEBUG)
    steps: list[bytes | float] = [
        b"noise-secret\n",
        b'---NANOCLAW_OUTPUT_START---\n{"result":"dropped-secret"}\n',
        frame("output-secret"),
        frame(None, "error", error="error-secret"),
    ]

    result = await collect(tmp_path, steps, code, stdin=stdin)

    records = [r for r in caplog.records if r.name.startswith("clawtrio")]
    loud = [r.getMessage() for r in records if r.levelno > logging.DEBUG]
    run_id = result.log_path.stem.rsplit("-", 1)[1]
    assert len(loud) >= 3
    assert "secret" not in "".join(loud)
    assert {(vars(r)["group"], vars(r)["run"]) for r in records} == {("family", run_id)}
    assert all(run_id in message and "family" in message for message in loud)
    # An operator who asks for it gets stderr, but nothing for the terminal to obey.
    quiet_text = "".join(r.getMessage() for r in records if r.levelno == logging.DEBUG)
    assert "stderr-secret" in quiet_text
    assert "\x1b" not in quiet_text
    assert "prompt-secret" not in quiet_text
    for record in records:
        assert "prompt-secret" not in repr(vars(record))
        assert "output-secret" not in repr(vars(record))


def test_no_handler_is_installed_that_writes() -> None:
    """A library leaves it to the application where its records go."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    ours = [logger for logger in loggers if logger.name.split(".")[0] == "clawtrio"]
    handlers = {handler for logger in ours for handler in logger.handlers}

    assert {type(handler) for handler in handlers} <= {logging.NullHandler}
    assert all(logger.level == logging.NOTSET and logger.propagate for logger in ours)


# Space.


def with_space(
    monkeypatch: pytest.MonkeyPatch, free: int, inodes: int = 10**6, files: int = 10**7
) -> None:
    """Let the disk look as if so much were free."""
    status = SimpleNamespace(
        f_bavail=free // 4096, f_frsize=4096, f_favail=inodes, f_files=files
    )
    monkeypatch.setattr(os, "statvfs", lambda _: status)


async def test_without_space_no_run_starts(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under min_free_bytes a run is refused, and its group stays free."""
    runtime = FakeRuntime(scripted_agent(frame(), exit_code=0))
    async with engine_on(tmp_path, runtime, min_free_bytes="1G") as engine:
        before = open_descriptors()
        with_space(monkeypatch, 2**30 - 4096)
        with pytest.raises(NotStartedError, match="min_free_bytes"):
            await engine.run(GROUP, "Hi", chat_jid=JID)
        with_space(monkeypatch, 2**40, inodes=10)
        with pytest.raises(NotStartedError, match="10 inodes"):
            await engine.run(GROUP, "Hi", chat_jid=JID)
        assert (runtime.specs, open_descriptors()) == ([], before)
        # btrfs counts none.
        with_space(monkeypatch, 2**30, inodes=0, files=0)
        assert (await engine.run(GROUP, "Hi", chat_jid=JID)).status == "success"


async def test_without_space_live_runs_are_stopped(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that may be filling the disk are stopped before it is full."""
    results = []
    async with engine_of(tmp_path, scripted_agent(), min_free_bytes="1G") as engine:
        with_space(monkeypatch, 2**40)

        async def run(folder: str) -> None:
            group = Group("G", folder)
            results.append(await engine.run(group, "Hi", chat_jid=JID))

        async with trio.open_nursery() as nursery:
            for folder in ("a", "b"):
                nursery.start_soon(run, folder)
            await trio.sleep(30)
            with_space(monkeypatch, 2**20)

    assert [result.ending for result in results] == [Ending.STOPPED] * 2
    assert 30 <= results[0].duration <= 35


async def test_space_that_cannot_be_told_is_no_end_of_the_engine(
    tmp_path: Path,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file system that does not answer is a warning."""

    def statvfs(_: str) -> object:
        raise OSError("stale")

    agent = scripted_agent(30.0, frame(), exit_code=0)
    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await trio.sleep(1)
        monkeypatch.setattr(os, "statvfs", statvfs)
        async for _ in run:
            pass
        with pytest.raises(NotStartedError, match="stale"):
            await engine.run(Group("B", "b"), "Hi", chat_jid=JID)

    assert run.result.status == "success"
    assert "stale" in caplog.text


# Many at once.


async def test_200_runs_at_once_lose_nothing_and_leave_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Each of 200 runs gets its 50 outputs in order, and nothing is left of it."""

    async def agent(pipes: AgentPipes) -> int:
        for number in range(50):
            text = f"{pipes.spec.labels['clawtrio.run']} {number}"
            await pipes.stdout.send_all(frame(text))
            if number % 7 == 0:
                await trio.sleep(number % 3)
        return 0

    threads = open_threads()
    descriptors = open_descriptors()
    tasks = trio.lowlevel.current_statistics().tasks_living
    seen: dict[int, list[str | None]] = {}
    runs: dict[int, Run] = {}

    async def run(engine: Engine, number: int) -> None:
        group = Group("G", f"g{number}")
        seen[number] = []
        async with engine.open_run(group, "Hi", chat_jid=JID) as run:
            runs[number] = run
            async for output in run:
                seen[number].append(output.result)
                await trio.sleep((number % 5) / 10)
                assert open_threads() <= threads

    async with engine_of(tmp_path, agent) as engine:
        within = open_descriptors()
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(run, engine, number)
        assert open_descriptors() == within
        assert engine.runs == ()

    assert seen == {
        number: [f"{run.id} {i}" for i in range(50)] for number, run in runs.items()
    }
    assert len(runs) == 200
    assert {run.result.ending for run in runs.values()} == {Ending.EXITED}
    assert {run.result.status for run in runs.values()} == {"success"}
    await trio.testing.wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert open_descriptors() == descriptors
    assert open_threads() <= threads


@pytest.mark.parametrize("stdin", ["lifeline", "eof"])
@pytest.mark.parametrize("steps", [[], [frame()], [WAITS]])
@pytest.mark.parametrize("code", [0, 1, None])
async def test_no_run_leaves_anything(
    stdin: str,
    steps: list[bytes],
    code: int | None,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """After any ending, tasks, threads, descriptors and containers are as before."""
    runtime = FakeRuntime(scripted_agent(*steps, exit_code=code))
    async with engine_on(tmp_path, runtime, stdin=stdin) as engine:
        await trio.testing.wait_all_tasks_blocked()
        before = (
            trio.lowlevel.current_statistics().tasks_living,
            open_threads(),
            open_descriptors(),
        )
        for _ in range(3):
            await engine.run(GROUP, "Hi", chat_jid=JID)
        await trio.testing.wait_all_tasks_blocked()
        assert await runtime.find({}) == []
        assert before == (
            trio.lowlevel.current_statistics().tasks_living,
            open_threads(),
            open_descriptors(),
        )
        await trio.sleep(60)


# Runtimes that misbehave.

Behaviour = dict[str, Callable[[], Awaitable[object]]]


@pytest.mark.parametrize(
    ("futile", "behaviour", "asked", "code", "at"),
    [
        ([], {}, ["stop"], 143, 0),
        (["stop"], {}, ["stop", "kill"], 143, 1),
        (["stop"], {"stop": hang}, ["stop", "kill"], 143, 15),
        (["stop"], {"stop": raising(OSError("x"))}, ["stop", "kill"], 143, 1),
        (["stop", "kill"], {}, ["stop", "kill"], 137, 2),
        (["stop", "kill"], {"stop": hang}, ["stop", "kill"], 137, 16),
        (["stop", "kill"], {"stop": hang, "kill": hang}, ["stop", "kill"], 137, 25),
        ([], {"stop": hang, "kill": hang}, ["stop", "kill"], 137, 25),
    ],
)
async def test_the_ladder_ends_what_does_not_listen(
    *,
    futile: list[str],
    behaviour: Behaviour,
    asked: list[str],
    code: int,
    at: float,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """Each rung has its time, and the next one follows: stop, kill, remove."""
    runtime = OwnRuntime(answering, futile=futile)
    runtime.behaviour |= behaviour
    async with engine_on(tmp_path, runtime) as engine:
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            await anext(run)

        assert runtime.started[0].asked == asked
        assert run.result.exit_code == code
        assert run.result.ending is Ending.STOPPED
        assert run.result.duration == at
        assert runtime.live == {}
    assert trio.current_time() == at


@pytest.mark.parametrize("dies", [True, False])
async def test_what_cannot_be_stopped_is_named_at_the_end(
    *,
    dies: bool,
    tmp_path: Path,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A container that defies everything takes bounded time and one ERROR."""
    futile = ["stop", "kill", "remove", *([] if dies else ["kill_client"])]
    runtime = OwnRuntime(answering, futile=futile, stop=hang, kill=hang, remove=hang)
    async with engine_on(tmp_path, runtime) as engine:
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            await anext(run)
        # Pipes that nobody closes are drained.
        assert LADDER <= trio.current_time() <= LADDER + MOMENT + 2
        assert run.result.exit_code == (137 if dies else None)
        assert run.result.ending is Ending.STOPPED
        # The group is free, and other runs go on.
        assert engine.runs == ()
        left = trio.current_time()
    assert trio.current_time() <= left + 10

    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert run.container_name in errors[0]
    # A later engine may find it.
    assert len(list((tmp_path / "data/engines").iterdir())) == 1


async def test_the_janitor_removes_what_the_ladder_left(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A runtime that recovers is asked again, until the container is gone."""

    async def unwell() -> None:
        await trio.lowlevel.checkpoint()
        if 1 < trio.current_time() < 200:
            raise RuntimeUnavailableError("own", "is down", "Start it.")

    futile = ["stop", "kill"]
    runtime = OwnRuntime(
        answering, futile=futile, stop=unwell, kill=unwell, find=unwell, remove=unwell
    )
    async with engine_on(tmp_path, runtime) as engine:
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            await anext(run)
            await trio.sleep(5)
        assert trio.current_time() <= 5 + LADDER + MOMENT + 2
        assert list(runtime.live) == [run.container_name]
        await trio.sleep(200)
        assert runtime.live == {}
        looks = len(runtime.looks)
        await trio.sleep(100)
        assert len(runtime.looks) == looks

    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert list((tmp_path / "data/engines").iterdir()) == []


async def test_one_container_that_stays_does_not_keep_the_others(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The janitor removes what it can, whatever else it cannot."""

    class Picky(OwnRuntime):
        async def remove(self, container_id: str) -> None:
            if container_id == runs[0].container_name:
                await hang()
            elif container_id == runs[1].container_name:
                raise RuntimeUnavailableError("own", "is stubborn", "Wait.")
            await super().remove(container_id)

    runs: list[Run] = []
    runtime = Picky(quiet, futile=["stop", "kill"], stop=hang, kill=hang, remove=hang)
    async with engine_on(tmp_path, runtime) as engine:
        for folder in ("a", "b", "c", "d"):
            group = Group("G", folder)
            async with engine.open_run(group, "Hi", chat_jid=JID) as run:
                runs.append(run)
        assert len(runtime.live) == 4
        runtime.behaviour["remove"] = nothing
        await trio.sleep(60)
        assert list(runtime.live) == [run.container_name for run in runs[:2]]

    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(messages) == 1
    for run in runs:
        assert (run.container_name in messages[0]) == (run in runs[:2])


async def test_a_container_that_appears_late_is_removed(tmp_path: Path) -> None:
    """After the ladder, a container is looked for until it is twice absent."""
    appeared: list[float] = []

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdin.receive_some()
        await trio.sleep(0.1)
        container.exit(137)
        # Its client was killed while it was being created.
        await trio.sleep(0.3)
        container.runtime.live[container.spec.name] = container
        appeared.append(trio.current_time())

    runtime = OwnRuntime(
        agent, in_process=False, futile=["stop"], stop=partial(trio.sleep, 0.2)
    )
    async with (
        engine_on(tmp_path, runtime) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        run.stop()
        await run.wait()
        assert len(appeared) == 1
        assert runtime.live == {}
        pauses = [b - a for a, b in pairwise(runtime.looks)]
        assert sum(pause >= 0.5 for pause in pauses) >= 2


async def test_an_ordinary_exit_is_looked_after_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """After an exit the janitor looks once, and holds nothing up."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdin.receive_some()
        await container.agent_stdout.send_all(frame())
        container.exit(0)

    runtime = OwnRuntime(agent)
    async with engine_on(tmp_path, runtime) as engine:
        runtime.behaviour["find"] = partial(trio.sleep, 3)
        before = len(runtime.looks)
        result = await engine.run(GROUP, "Hi", chat_jid=JID)
        assert (result.duration, trio.current_time()) == (0, 0)
        await trio.sleep(60)
        assert len(runtime.looks) == before + 1


async def test_a_runtime_that_does_not_answer_is_unavailable(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """No engine opens on a runtime that hangs or complains."""
    complaint = RuntimeUnavailableError("own", "is down", "Start it.")
    before = open_descriptors()

    with pytest.raises(RuntimeUnavailableError, match="within 10 s"):
        async with engine_on(tmp_path, OwnRuntime(quiet, check=hang)):
            pass  # pragma: no cover
    assert trio.current_time() == 10
    with pytest.raises(RuntimeUnavailableError) as caught:
        async with engine_on(tmp_path, OwnRuntime(quiet, check=raising(complaint))):
            pass  # pragma: no cover
    assert caught.value is complaint
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("find", "at"),
    [(raising(RuntimeUnavailableError("own", "is down", "Start it.")), 0), (hang, 10)],
)
async def test_a_sweep_that_fails_is_a_warning(
    find: Callable[[], Awaitable[object]],
    at: float,
    tmp_path: Path,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the dead left can wait; the living cannot."""
    runtime = OwnRuntime(answering, find=find)
    async with engine_on(tmp_path, runtime) as engine:
        assert trio.current_time() == at
        assert "cannot sweep" in caplog.text
        runtime.behaviour["find"] = nothing
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert result.status == "success"


@pytest.mark.parametrize(
    ("verify", "words", "at"),
    [
        (raising(UnsafePathError("/srv/x", "was replaced")), "/srv/x", 0),
        (hang, "within 10 s", 10),
    ],
)
async def test_a_container_that_sees_something_else_is_not_used(
    verify: Callable[[], Awaitable[object]],
    words: str,
    at: float,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """What could not be verified gets no input, and was not started."""
    got: list[bytes] = []

    async def agent(container: OwnContainer) -> None:
        with suppress(trio.ClosedResourceError):
            got.append(bytes(await container.agent_stdin.receive_some()))

    async with engine_on(tmp_path, OwnRuntime(agent, verify=verify)) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert (result.ending, result.status) == (Ending.NOT_STARTED, "error")
    assert result.error is not None
    assert words in result.error
    assert result.duration == at
    assert result.unanswered == ("Hi",)
    assert got == [b""]


async def test_descriptors_that_are_not_given_back_do_not_hold_up_the_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A container whose aclose hangs is let go of."""
    runtime = OwnRuntime(answering, aclose=hang)
    async with engine_on(tmp_path, runtime) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

        assert result.status == "success"
        assert trio.current_time() == 7 + 10


@pytest.mark.parametrize("method", ["wait", "aclose"])
async def test_a_bug_comes_out_in_a_group_and_nothing_hangs(
    method: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What a runtime may not raise ends the engine, but in bounded time."""
    runtime = OwnRuntime(answering)
    runtime.behaviour[method] = raising(ZeroDivisionError())
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with engine_on(tmp_path, runtime) as engine:
            await engine.run(GROUP, "Hi", chat_jid=JID)

    assert trio.current_time() < FOREVER / 1000


async def test_two_engines_on_one_root_leave_each_other_alone(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An engine that opens, or closes, removes nothing of a live one's."""
    runtime = OwnRuntime(quiet)
    async with (
        engine_on(tmp_path, runtime) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        async with engine_on(tmp_path, runtime) as other:
            assert other.runs == ()
            assert list(runtime.live) == [run.container_name]
        assert list(runtime.live) == [run.container_name]
        assert engine.runs == (run,)


async def test_what_a_dead_engine_left_is_swept(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What could not be removed by one engine, the next one of the root removes."""
    runtime = OwnRuntime(quiet, futile=["stop", "kill", "remove"])
    async with (
        engine_on(tmp_path, runtime) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID),
    ):
        pass
    assert len(runtime.live) == 1
    runtime.futile = []

    async with engine_on(tmp_path, runtime):
        assert runtime.live == {}


async def test_the_container_is_told_what_it_must_know(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Name, labels, mounts and environment of a container are the contract's."""
    runtime = FakeRuntime(echoing())
    async with engine_on(
        tmp_path, runtime, timezone="Europe/Berlin", agent_env={"COLOUR": "no"}
    ) as engine:
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            pass
        plan = await engine.plan(GROUP)

    (spec,) = runtime.specs
    assert spec.name == run.container_name == f"clawtrio-family-{run.id}"
    assert set(spec.labels) == {"clawtrio.root", "clawtrio.engine", "clawtrio.run"}
    assert spec.labels["clawtrio.run"] == run.id
    assert spec.environment["TZ"] == "Europe/Berlin"
    assert spec.environment["HOME"] == "/home/node"
    assert spec.environment["COLOUR"] == "no"
    mounts = {held.mount.container_path: held.mount for held in spec.mounts}
    assert mounts["/workspace/group"].host_path == str(tmp_path / "groups/family")
    assert not mounts["/workspace/group"].readonly
    assert mounts["/app/src"].readonly
    assert spec.uid != 0
    assert plan[0] == "clawtrio-family-" + "0" * 12


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"agent": "claude"}, {}),
        (
            {"agent": "claude", "model": "m", "partial_text": True},
            {"CLAWTRIO_MODEL": "m", "CLAWTRIO_PARTIAL_TEXT": "1"},
        ),
        ({"agent": "echo", "model": "m", "partial_text": True}, {}),
        ({"agent": "claude", "model": "m", "agent_command": ["own"]}, {}),
    ],
)
async def test_claude_is_told_of_its_settings(
    settings: dict[str, Any],
    told: dict[str, str],
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """The model, and whether text is wanted while it grows, are for Claude alone."""
    runtime = FakeRuntime(echoing())
    credentials = tmp_path / ".env"
    credentials.write_text("ANTHROPIC_API_KEY=sk-ant-test\n")
    async with (
        engine_on(tmp_path, runtime, **settings) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID),
    ):
        pass

    (spec,) = runtime.specs
    ours = {k: v for k, v in spec.environment.items() if k in OF_CLAUDE}
    assert ours == told


OF_CLAUDE = ("CLAWTRIO_MODEL", "CLAWTRIO_PARTIAL_TEXT")


@pytest.mark.parametrize(
    ("changes", "own_python"),
    [
        ({"agent": "claude"}, True),
        ({"agent": "echo"}, False),
        ({"agent": "claude", "agent_command": ["own"]}, False),
    ],
)
def test_bwrap_runs_claude_on_its_own_python(
    changes: dict[str, Any], *, own_python: bool, tmp_path: Path
) -> None:
    """Claude has the environment that was installed for it; others have ours."""
    runtime = choose_runtime(settings_for(tmp_path, runtime="bwrap", **changes))
    assert isinstance(runtime, BwrapRuntime)
    assert runtime._python == (agent_python() if own_python else sys.executable)


@pytest.mark.parametrize(
    ("changes", "agent"),
    [
        ({"agent": "claude"}, "claude"),
        ({"agent": "echo"}, None),
        ({"agent": "claude", "agent_command": ["own"]}, None),
    ],
)
def test_an_image_must_have_claude(
    changes: dict[str, Any], agent: str | None, tmp_path: Path
) -> None:
    """The image is looked at for Claude, and for nothing where that is not run."""
    runtime = choose_runtime(settings_for(tmp_path, runtime="docker", **changes))
    assert isinstance(runtime, DockerRuntime)
    assert runtime._agent == agent


@pytest.mark.parametrize(
    ("installed", "wanted", "name"),
    [
        ((), "auto", "bwrap"),
        (("docker",), "auto", "docker"),
        (("podman",), "auto", "podman"),
        (("docker", "podman"), "auto", "docker"),
        (("docker", "podman"), "bwrap", "bwrap"),
        (("docker",), "podman", "podman"),
    ],
)
def test_the_runtime_is_chosen_by_what_is_installed(
    installed: tuple[str, ...],
    wanted: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """auto takes a weaker sandbox only where nothing better is installed."""
    for program in installed:
        (tmp_path / program).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert choose_runtime(settings_for(tmp_path, runtime=wanted)).name == name


async def test_what_was_thrown_away_is_deleted(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """However much an agent left in its inbox, it is gone soon."""
    inbox = tmp_path / "data/ipc/family/input"
    inbox.mkdir(parents=True)
    for number in range(5500):
        (inbox / str(number)).touch()
    runtime = FakeRuntime(scripted_agent(frame(), exit_code=0))
    async with engine_on(tmp_path, runtime, stdin="eof") as engine:
        await engine.run(GROUP, "Hi", chat_jid=JID)
        await trio.sleep(1)
        assert list((tmp_path / "data/trash").iterdir()) == []


async def test_trash_that_cannot_be_emptied_is_a_warning(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A host directory that somebody removed is no end of the engine."""

    async def agent(pipes: AgentPipes) -> int:
        shutil.rmtree(tmp_path / "data/locks")
        await pipes.stdout.send_all(frame())
        return 0

    async with engine_of(tmp_path, agent) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)
        assert result.status == "success"
        await trio.sleep(1)
        with pytest.raises(NotStartedError):
            await engine.run(GROUP, "Hi", chat_jid=JID)

    assert "cannot empty" in caplog.text


async def test_a_fake_agent_may_return_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent of a test that just ends has left with 0."""

    async def agent(pipes: AgentPipes) -> Any:
        await pipes.stdout.send_all(frame())

    async with engine_of(tmp_path, agent) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert (result.ending, result.exit_code) == (Ending.EXITED, 0)


async def test_an_agent_command_is_run_in_place_of_ours(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """With agent_command, the runner is told to run that."""
    runtime = FakeRuntime(scripted_agent(frame(), exit_code=0))
    command = ["python3", "bot.py"]
    async with engine_on(tmp_path, runtime, agent_command=command) as engine:
        await engine.run(GROUP, "Hi", chat_jid=JID)

    assert runtime.specs[0].arguments == ("--", "python3", "bot.py")


async def test_the_agent_is_told_the_truth_about_its_group(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The input is made of the group, so nobody can claim to be another one."""
    told: list[bytes] = []

    async def agent(pipes: AgentPipes) -> int:
        told.append(bytes(await pipes.stdin.receive_some()))
        return 0

    main = Group("Main", "main", is_main=True)
    async with engine_of(tmp_path, agent, assistant_name="Eva") as engine:
        for group in (GROUP, main):
            await engine.run(
                group, "Hi", chat_jid=JID, session_id="s", is_scheduled_task=True
            )

    for line, folder, is_main in zip(
        told, ("family", "main"), ("false", "true"), strict=True
    ):
        assert line.decode() == (
            f'{{"prompt":"Hi","sessionId":"s","groupFolder":"{folder}",'
            f'"chatJid":"{JID}","isMain":{is_main},"isScheduledTask":true,'
            '"assistantName":"Eva","lifeline":true}\n'
        )


async def test_an_engine_opens_with_the_settings_of_the_environment(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without settings, those of the environment are loaded."""
    monkeypatch.setenv("CLAWTRIO_ROOT", str(tmp_path))
    monkeypatch.setenv("CLAWTRIO_MIN_FREE_BYTES", "0")
    async with open_engine(runtime=FakeRuntime(scripted_agent())) as engine:
        assert engine.settings.root == str(tmp_path)
    monkeypatch.setenv("CLAWTRIO_ANSWER_TIMEOUT", "0")
    with pytest.raises(SettingsError):
        async with clawtrio.open_engine(runtime=FakeRuntime(scripted_agent())):
            pass  # pragma: no cover


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
async def test_an_agent_that_does_not_let_itself_be_closed(
    tmp_path: Path,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who keeps us from telling it to finish is stopped, and harms nobody else."""
    really_write = Directory.write

    def write(directory: Directory, name: str, *args: Any, **options: Any) -> None:
        if name == "_close":
            raise UnsafePathError(name, "must be a file, and does not stay one")
        really_write(directory, name, *args, **options)

    monkeypatch.setattr(Directory, "write", write)
    agent = scripted_agent(frame("hi"))
    async with engine_on(tmp_path, FakeRuntime(agent), stdin="eof") as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert result.ending is Ending.IDLE
    assert "cannot tell the agent to finish" in caplog.text


async def test_a_closed_engine_plans_nothing(tmp_path: Path) -> None:
    """Its directories are not held any more."""
    async with engine_on(tmp_path, FakeRuntime(scripted_agent())) as engine:
        pass

    with pytest.raises(RuntimeError, match="closed"):
        await engine.plan(GROUP)


async def test_an_inbox_that_cannot_be_cleared_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What keeps us from clearing it ends neither the engine nor the run."""
    inbox = tmp_path / "data" / "ipc" / "family" / "input"

    async def agent(pipes: AgentPipes) -> int:
        await trio.run_process(["mount", "-t", "tmpfs", "clawtrio-test", str(inbox)])
        await pipes.stdout.send_all(frame("hi"))
        return 0

    try:
        async with engine_on(tmp_path, FakeRuntime(agent), stdin="eof") as engine:
            result = await engine.run(GROUP, "Hi", chat_jid=JID)
            assert result.status == "success"
            assert "cannot clear" in caplog.text
            # It is refused for as long as that lasts, but said so.
            with pytest.raises(NotStartedError):
                await engine.run(GROUP, "Hi", chat_jid=JID)
    finally:
        with trio.move_on_after(10, shield=True):
            await trio.run_process(["umount", str(inbox)])


async def test_threads_of_the_application_are_not_needed(tmp_path: Path) -> None:
    """A bot that has all its threads wait for runs still sees them end."""
    runtime = OwnRuntime(quiet)
    runtime.in_process = False
    settings = settings_for(tmp_path)
    limiter = trio.to_thread.current_default_thread_limiter()
    with trio.fail_after(30):
        async with (
            clawtrio.open_engine(settings, runtime) as engine,
            engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
        ):
            before, limiter.total_tokens = limiter.total_tokens, 1
            async with limiter:
                run.stop()
                result = await run.wait()
            limiter.total_tokens = before

    assert result.log_path.is_file()


@pytest.mark.parametrize("method", ["verify", "wait"])
async def test_an_os_error_of_a_container_is_the_run_s(
    method: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What a runtime may raise ends one run, not the engine."""
    behaviour: dict[str, Any] = {method: raising(OSError("boom"))}
    runtime = OwnRuntime(quiet, **behaviour)
    async with engine_on(tmp_path, runtime) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    expected = Ending.NOT_STARTED if method == "verify" else Ending.FAILED
    assert result.ending is expected
    assert "boom" in (result.error or "")
    assert runtime.live == {}


async def test_dropped_frames_do_not_fill_the_log(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one is a warning; all are counted."""
    agent = scripted_agent(frame("hi") + b"".join([framed(b"{}")] * 100), exit_code=0)
    async with engine_on(tmp_path, FakeRuntime(agent)) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert result.dropped_frames == 100
    warnings = [r for r in caplog.records if "frame dropped" in r.getMessage()]
    assert [r.levelno for r in warnings if r.levelno > logging.DEBUG] == [
        logging.WARNING
    ]
