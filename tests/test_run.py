"""One run, from the prompt to its result, under a virtual clock.

In these tests a run has 100 s for an answer, 40 s for waiting, 7 s for leaving, 5 s
for SIGTERM, 2 s for what a grandchild says, and 10 s for a command of the runtime.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import MockClock, memory_stream_one_way_pair

from clawtrio import (
    AgentOutput,
    ContainerConfig,
    Ending,
    FollowUpRefusedError,
    Group,
    MarkerParser,
    Run,
    RunClosedError,
    RunResult,
)
from clawtrio._run import _Pipe
from clawtrio.testing import (
    AgentPipes,
    FakeAgent,
    FakeRuntime,
    framed,
    scripted_agent,
)

from .helpers import (
    GROUP,
    HEARTBEAT,
    JID,
    NOISE,
    UNACCEPTABLE,
    WAITS,
    OwnContainer,
    OwnRuntime,
    Reader,
    echoing,
    engine_of,
    engine_on,
    frame,
    open_descriptors,
)

both_modes = pytest.mark.parametrize("stdin", ["lifeline", "eof"])

FOLLOW_UP = "and tomorrow?"


async def talk(
    root: Path,
    agent: FakeAgent,
    *,
    group: Group = GROUP,
    single_turn: bool = False,
    **changes: Any,
) -> tuple[list[str | None], RunResult]:
    """Run *agent* to its end; return the texts that it said, and the result."""
    async with (
        engine_of(root, agent, **changes) as engine,
        engine.open_run(group, "Hi", chat_jid=JID, single_turn=single_turn) as run,
    ):
        seen = [output.result async for output in run]
    return seen, run.result


def again(times: int, *steps: bytes | float) -> list[bytes | float]:
    """Repeat *steps*."""
    return list(steps) * times


def outcome(result: RunResult) -> tuple[Ending, str, str | None, float]:
    """Say what a test is mostly about."""
    return result.ending, result.status, result.error, result.duration


# The states: what silence leads to, and when.


@both_modes
@pytest.mark.parametrize("single_turn", [True, False])
async def test_silence_before_an_answer_times_out(
    *, stdin: str, single_turn: bool, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that says nothing is stopped after answer_timeout."""
    seen, result = await talk(
        tmp_path, scripted_agent(), single_turn=single_turn, stdin=stdin
    )

    error = "Container timed out after 100 s"
    assert outcome(result) == (Ending.TIMED_OUT, "error", error, 100)
    assert seen == []
    assert result.unanswered == ("Hi",)
    assert result.exit_code == 143


@pytest.mark.parametrize("text", ["hi", ""])
async def test_an_agent_that_has_answered_is_idle_after_answer_timeout(
    text: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Silence after an answer is no failure; the empty text is an answer, too."""
    seen, result = await talk(tmp_path, scripted_agent(30.0, frame(text)))

    assert outcome(result) == (Ending.IDLE, "success", None, 130)
    assert seen == [text]
    assert result.unanswered == ()


@pytest.mark.parametrize(
    ("stdin", "steps"),
    [
        ("lifeline", [WAITS]),
        ("lifeline", [frame("hi"), WAITS]),
        ("eof", [frame("hi")]),
        ("eof", [WAITS]),
        # It changes the state as a success with text does.
        ("eof", [frame("hi"), frame(None, "error", error="oh")]),
    ],
)
async def test_an_agent_that_waits_is_told_to_leave_after_idle_timeout(
    stdin: str, steps: list[bytes], tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A waiting agent is finished after idle_timeout, and close_grace later stopped."""
    _, result = await talk(tmp_path, scripted_agent(30.0, *steps), stdin=stdin)

    assert (result.ending, result.duration) == (Ending.IDLE, 30 + 40 + 7)


@pytest.mark.parametrize("fields", [{"error": "oh"}, {"result": "oh"}, {}])
async def test_an_error_answers_as_a_failure(
    fields: dict[str, str], tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An error frame answers, with or without a text, and leads to no waiting."""
    output = {"status": "error", "result": None, **fields}
    agent = scripted_agent(30.0, framed(json.dumps(output).encode()))

    seen, result = await talk(tmp_path, agent)

    error = "oh" if fields else "The agent reported an error"
    assert outcome(result) == (Ending.IDLE, "error", error, 130)
    assert seen == [fields.get("result")]
    assert result.unanswered == ()


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ([frame(None, "error", error="oh"), frame("well")], None),
        ([frame(None, "error", error="oh"), WAITS], "oh"),
        ([frame(None, "error", error="oh"), frame("we", partial=True)], "oh"),
        ([frame("well"), frame(None, "error", error="oh")], "oh"),
        (
            [frame(None, "error", error="oh"), frame(None, "error", error="no")],
            "no",
        ),
        ([frame("well"), frame(None, "error", error="oh", partial=True)], None),
        ([frame("well"), frame("x", "error", partial=True)], None),
    ],
)
async def test_the_last_turn_decides(
    steps: list[bytes], error: str | None, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A failed turn is made good for by an answer, not by waiting or partial text."""
    _, result = await talk(tmp_path, scripted_agent(*steps))

    assert result.status == ("error" if error else "success")
    assert result.error == error
    assert result.ending is Ending.IDLE


@both_modes
async def test_a_single_turn_is_finished_once_it_is_answered(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Without more to answer, an agent of a single turn has close_grace to leave."""
    agent = scripted_agent(30.0, HEARTBEAT, 30.0, frame("hi"))

    seen, result = await talk(tmp_path, agent, single_turn=True, stdin=stdin)

    assert outcome(result) == (Ending.IDLE, "success", None, 67)
    assert seen == ["hi"]


@pytest.mark.parametrize("status", ["success", "error"])
async def test_a_failed_turn_finishes_a_single_turn_too(
    status: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An error is an answer, so the run is over after close_grace."""
    agent = scripted_agent(frame(None, status, error="oh"))

    _, result = await talk(tmp_path, agent, single_turn=True)

    assert (result.ending, result.duration) == (Ending.IDLE, 7)
    assert result.status == status


@both_modes
@pytest.mark.parametrize("seconds", [20, 0.5, 12_345.5])
async def test_a_group_has_its_own_answer_timeout(
    stdin: str, seconds: float, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The timeout of a group overrides answer_timeout, downwards as well as upwards."""
    group = Group("Slow", "slow", container_config=ContainerConfig(timeout=seconds))

    _, result = await talk(tmp_path, scripted_agent(), group=group, stdin=stdin)

    error = f"Container timed out after {seconds} s"
    assert outcome(result) == (Ending.TIMED_OUT, "error", error, seconds)


async def test_the_groups_timeout_counts_after_an_answer_too(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The timeout of a group also counts after an answer, but not while waiting."""
    group = Group("Fast", "fast", container_config=ContainerConfig(timeout=20))

    _, answered = await talk(tmp_path, scripted_agent(frame()), group=group)
    _, waiting = await talk(tmp_path, scripted_agent(WAITS), group=group)

    assert (answered.duration, waiting.duration) == (20, 47)


@pytest.mark.parametrize("where", ["settings", "group"])
async def test_an_infinite_timeout_never_ends_a_run(
    where: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """With inf, an agent may think for days."""
    of_all, of_group = (math.inf, None) if where == "settings" else (100, math.inf)
    group = Group("Deep", "deep", container_config=ContainerConfig(timeout=of_group))
    agent = scripted_agent(20_000.0, frame("42"), exit_code=0)

    seen, result = await talk(tmp_path, agent, group=group, answer_timeout=of_all)

    assert seen == ["42"]
    assert outcome(result) == (Ending.EXITED, "success", None, 20_000)


async def test_an_infinite_idle_timeout_keeps_an_agent(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """With an idle_timeout of inf, an agent that waits is waited for."""
    agent = scripted_agent(WAITS, 20_000.0, exit_code=0)

    _, result = await talk(tmp_path, agent, idle_timeout=math.inf)

    assert outcome(result) == (Ending.EXITED, "success", None, 20_000)


@pytest.mark.parametrize(
    ("pusher", "delivered"),
    [
        (HEARTBEAT, 0),
        (frame("he", partial=True), 1),
        (frame("", partial=True), 1),
        (frame(None, "error", error="x", partial=True), 0),
    ],
)
@pytest.mark.parametrize(
    ("first", "ending", "silence"),
    [
        (b"", Ending.TIMED_OUT, 100),
        (frame("hi"), Ending.IDLE, 100),
        (WAITS, Ending.IDLE, 40 + 7),
    ],
)
async def test_partial_frames_push_the_deadline_and_change_no_state(
    *,
    pusher: bytes,
    delivered: int,
    first: bytes,
    ending: Ending,
    silence: float,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """A partial frame says that the agent lives; without a text it goes no further."""
    agent = scripted_agent(first, 30.0, pusher, 30.0, pusher, 30.0, pusher)

    seen, result = await talk(tmp_path, agent)

    assert (result.ending, result.duration) == (ending, 90 + silence)
    assert result.unanswered == (() if first else ("Hi",))
    assert result.outputs == len(seen) == 3 * delivered + bool(first)


@pytest.mark.parametrize("noise", [NOISE, UNACCEPTABLE, framed(b"x" * 2000)])
@pytest.mark.parametrize("first", [b"", frame("hi"), WAITS])
async def test_what_is_no_output_pushes_nothing(
    noise: bytes, first: bytes, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Noise and dropped frames do not make an agent look alive."""
    agent = scripted_agent(first, *again(20, noise, 11.0))
    silent = scripted_agent(first)

    _, result = await talk(tmp_path, agent, max_frame_bytes=1000)
    _, other = await talk(tmp_path, silent, max_frame_bytes=1000)

    dropped = 0 if noise is NOISE else math.ceil(result.duration / 11)
    assert result == attrs.evolve(
        other, dropped_frames=dropped, log_path=result.log_path
    )


async def test_stderr_pushes_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    """An agent that chatters on stderr gets no nearer to an answer."""

    async def agent(pipes: AgentPipes) -> int:
        while True:
            await pipes.stderr.send_all(b"still thinking\n")
            await trio.sleep(10)

    _, result = await talk(tmp_path, agent)

    assert (result.ending, result.duration) == (Ending.TIMED_OUT, 100)


@both_modes
async def test_each_output_pushes_the_deadline(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent with an output every 90 s outlives a timeout of 100 s."""
    agent = scripted_agent(*again(5, 90.0, frame("so", answers=-1)), exit_code=0)

    seen, result = await talk(tmp_path, agent, stdin=stdin)

    assert seen == ["so"] * 5
    assert (result.ending, result.duration) == (Ending.EXITED, 450)


@both_modes
async def test_a_follow_up_makes_an_agent_work_again(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """After a follow-up, answer_timeout counts anew, and its end is a failure."""
    async with (
        engine_of(tmp_path, scripted_agent(frame(), WAITS), stdin=stdin) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await anext(run)
        assert await anext(run) == AgentOutput("success")
        with trio.move_on_after(30):
            await anext(run)
        await run.send(FOLLOW_UP)
        async for _ in run:
            pass

    error = "Container timed out after 100 s"
    assert outcome(run.result) == (Ending.TIMED_OUT, "error", error, 130)
    assert run.result.unanswered == (FOLLOW_UP,)


@pytest.mark.parametrize("twice", [False, True])
async def test_finish_while_working_gives_no_more_time(
    *, twice: bool, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Only frames and questions set the clock of an agent that owes an answer."""
    async with (
        engine_of(tmp_path, scripted_agent()) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await trio.sleep(30)
        run.finish()
        if twice:
            await trio.sleep(30)
            run.finish()
        result = await run.wait()

    assert (result.ending, result.duration) == (Ending.TIMED_OUT, 100)


@both_modes
@pytest.mark.parametrize("first", [frame("hi"), WAITS])
async def test_finish_after_the_answer_starts_close_grace(
    stdin: str, first: bytes, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """From the moment of finish, the agent has close_grace to leave; not twice."""
    async with (
        engine_of(tmp_path, scripted_agent(first), stdin=stdin) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        with trio.move_on_after(30):
            async for _ in run:
                pass
        run.finish()
        with trio.move_on_after(3):
            await run.wait()
        run.finish()
        result = await run.wait()

    assert outcome(result) == (Ending.IDLE, "success", None, 37)


async def test_after_finish_the_answer_starts_close_grace(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that was finished while it worked may answer first."""
    async with (
        engine_of(tmp_path, scripted_agent(90.0, frame())) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        run.finish()
        async for _ in run:
            pass

    assert outcome(run.result) == (Ending.IDLE, "success", None, 97)


@both_modes
async def test_graces_of_0_grant_nothing(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """With graces of 0, an agent is killed at once, but what it said counts."""
    graces = {"close_grace": 0, "stop_grace": 0, "drain_grace": 0}
    agent = scripted_agent(30.0, frame("hi") * 20)

    async with engine_of(tmp_path, agent, ignores_stop=True, **graces) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert outcome(result) == (Ending.IDLE, "success", None, 30)
    assert (result.outputs, result.exit_code) == (20, 137)


# Our slowness is not the agent's.


@both_modes
@pytest.mark.parametrize("first", [frame("hi"), WAITS, frame("h", partial=True)])
async def test_the_clock_stands_still_in_the_callback(
    stdin: str, first: bytes, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A callback that takes hours costs the agent none of its time."""
    # The answers wait in the pipe meanwhile.
    agent = scripted_agent(first, 20.0, frame("2"), 20.0, frame("3"), exit_code=0)
    began: list[float] = []

    async def slow(_: AgentOutput) -> None:
        began.append(trio.current_time())
        await trio.sleep(10_000)

    async with engine_of(tmp_path, agent, stdin=stdin) as engine:
        result = await engine.run(
            GROUP, "Hi", chat_jid=JID, on_output=slow, single_turn=False
        )

    assert began == [0, 10_000, 20_000]
    assert outcome(result) == (Ending.EXITED, "success", None, 30_000)


async def test_the_clock_starts_anew_after_the_callback(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Once a slow callback has returned, the agent has all its time."""

    async def slow(_: AgentOutput) -> None:
        await trio.sleep(10_000)

    async with engine_of(tmp_path, scripted_agent(frame())) as engine:
        single = await engine.run(GROUP, "Hi", chat_jid=JID, on_output=slow)
        more = await engine.run(
            GROUP, "Hi", chat_jid=JID, on_output=slow, single_turn=False
        )

    assert (single.ending, single.duration) == (Ending.IDLE, 10_007)
    assert (more.ending, more.duration) == (Ending.IDLE, 10_100)


async def test_the_clock_stands_still_until_the_next_is_asked_for(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A loop body counts as a callback does, and so does not asking at all."""
    async with (
        engine_of(tmp_path, scripted_agent(10.0, frame("1"), frame("2"))) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await trio.sleep(1000)
        seen = []
        async for output in run:
            seen.append(output.result)
            await trio.sleep(1000)

    assert seen == ["1", "2"]
    assert (run.result.ending, run.result.duration) == (Ending.IDLE, 3100)


async def test_a_callback_that_finishes_or_sends_does_not_start_the_clock(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What a callback says to the agent starts no clock before the callback's end."""
    async with (
        engine_of(tmp_path, scripted_agent(frame("1"))) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        async for _ in run:
            await run.send(FOLLOW_UP)
            run.finish()
            await trio.sleep(1000)

    assert (run.result.ending, run.result.duration) == (Ending.TIMED_OUT, 1100)


# How it ended.


@both_modes
async def test_an_agent_that_leaves_with_0_has_exited(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An answer and exit code 0 are a success."""
    agent = scripted_agent(frame("hi", newSessionId="s1"), 3.0, exit_code=0)

    seen, result = await talk(tmp_path, agent, stdin=stdin)

    assert seen == ["hi"]
    assert result == RunResult(
        status="success",
        new_session_id="s1",
        ending=Ending.EXITED,
        exit_code=0,
        duration=3,
        outputs=1,
        dropped_frames=0,
        unanswered=(),
        stdout_truncated=False,
        stderr_truncated=False,
        log_path=result.log_path,
    )


@both_modes
@pytest.mark.parametrize(
    "steps", [[], [HEARTBEAT], [frame("h", partial=True)], [NOISE]]
)
async def test_an_exit_without_an_answer_is_an_error(
    stdin: str, steps: list[bytes], tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that leaves with 0, but owes an answer, has failed."""
    _, result = await talk(tmp_path, scripted_agent(*steps, exit_code=0), stdin=stdin)

    error = "Container exited without an answer"
    assert outcome(result) == (Ending.EXITED, "error", error, 0)
    assert result.unanswered == ("Hi",)


async def test_an_exit_after_an_error_is_an_error(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Exit code 0 does not make good for a failed turn."""
    agent = scripted_agent(frame(None, "error", error="no credit"), exit_code=0)

    _, result = await talk(tmp_path, agent)

    assert outcome(result) == (Ending.EXITED, "error", "no credit", 0)
    assert result.unanswered == ()


def failing(code: int, stderr: bytes, stdout: bytes = b"") -> FakeAgent:
    """Make an agent that says something, then leaves with *code*."""

    async def agent(pipes: AgentPipes) -> int:
        await pipes.stdout.send_all(stdout)
        await pipes.stderr.send_all(stderr)
        return code

    return agent


@pytest.mark.parametrize(
    ("stderr", "quoted"),
    [
        (b"", ""),
        (b"no such file\n", "no such file\n"),
        (b"x" * 300 + b"y" * 200, "y" * 200),
        ("\U0001f980".encode() * 5000, "\U0001f980" * 200),
        (b"\xff" * 5 + b"z", "\ufffd" * 5 + "z"),
    ],
)
@pytest.mark.parametrize("max_log_bytes", [1, 100, 500, 2**20])
async def test_another_code_has_failed_and_stderr_says_why(
    stderr: bytes,
    quoted: str,
    max_log_bytes: int,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """The error quotes the last 200 characters of stderr, whatever the log keeps."""
    agent = failing(3, stderr)

    async with (
        engine_of(tmp_path, agent, max_log_bytes=max_log_bytes) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        result = await run.wait()

    error = f"Container exited with code 3: {quoted}"
    assert outcome(result) == (Ending.FAILED, "error", error, 0)
    assert result.exit_code == 3
    assert result.stderr_truncated == (len(stderr) > max_log_bytes)
    assert len(run._last_stderr) == min(len(stderr), 4096)


@pytest.mark.parametrize("code", [128 + 11, -11])
async def test_a_crash_is_a_failure_but_no_lack_of_memory(
    code: int, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nor an ordinary end, if a runtime tells of signals as Python does."""
    _, result = await talk(tmp_path, failing(code, b"oh"))

    error = f"Container exited with code {code}: oh"
    assert outcome(result) == (Ending.FAILED, "error", error, 0)


@pytest.mark.parametrize("size", [499, 500, 501])
async def test_what_the_log_cannot_keep_of_stdout_is_truncated(
    size: int, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """As many bytes as max_log_bytes are whole."""
    agent = scripted_agent(b"x" * size, exit_code=0)

    _, result = await talk(tmp_path, agent, max_log_bytes=500)

    assert result.stdout_truncated == (size > 500)


async def test_a_failure_after_the_answer_has_nothing_to_retry(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What was answered before the failure is not among the unanswered."""
    seen, result = await talk(tmp_path, failing(1, b"", frame("hi")))

    assert seen == ["hi"]
    assert (result.ending, result.status) == (Ending.FAILED, "error")
    assert result.unanswered == ()


async def test_an_unasked_137_was_most_likely_out_of_memory(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A SIGKILL that nobody here sent is put down to the memory limit."""
    _, result = await talk(tmp_path, failing(137, b"x" * 300), memory="512m")

    assert result.ending is Ending.FAILED
    assert result.error is not None
    assert result.error.startswith("Container exited with code 137: ")
    assert "killed, most likely out of memory" in result.error
    assert "512 MiB" in result.error
    assert result.error.endswith(" " + "x" * 200)


async def test_an_agent_that_crashes_has_failed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A fake agent that raises looks like a program with a traceback on stderr."""

    async def agent(pipes: AgentPipes) -> int:
        await pipes.stdin.receive_some()
        raise ZeroDivisionError("once")

    _, result = await talk(tmp_path, agent)

    assert (result.ending, result.exit_code) == (Ending.FAILED, 1)
    assert result.error is not None
    assert result.error.endswith("ZeroDivisionError: once\n")


@pytest.mark.parametrize("code", [0, 3])
async def test_an_agent_that_leaves_after_finish_was_not_stopped(
    code: int, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """One that does as it was told is EXITED or FAILED, not IDLE."""
    seen, result = await talk(tmp_path, echoing(exit_code=code), single_turn=True)

    assert seen == ["Hi"]
    assert result.ending is (Ending.FAILED if code else Ending.EXITED)
    assert (result.exit_code, result.duration) == (code, 0)


@pytest.mark.parametrize("code", [0, 1, 137, 143, 255])
@pytest.mark.parametrize(
    ("steps", "ending"), [([], Ending.TIMED_OUT), ([frame()], Ending.IDLE)]
)
async def test_what_our_clock_stopped_may_exit_as_it_likes(
    code: int,
    steps: list[bytes],
    ending: Ending,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """TIMED_OUT and IDLE do not depend on the exit code."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdin.receive_some()
        for step in steps:
            await container.agent_stdout.send_all(step)

    async with engine_on(tmp_path, OwnRuntime(agent, stopped_code=code)) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID, single_turn=False)

    assert (result.ending, result.exit_code) == (ending, code)
    assert result.status == ("error" if ending is Ending.TIMED_OUT else "success")


@pytest.mark.parametrize(
    ("steps", "status", "error"),
    [
        ([], "error", "Container stopped without an answer"),
        ([frame("hi")], "success", None),
        ([WAITS], "success", None),
        ([frame(None, "error", error="oh")], "error", "oh"),
    ],
)
@both_modes
async def test_a_run_that_the_caller_stops(
    *,
    stdin: str,
    steps: list[bytes],
    status: str,
    error: str | None,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """Stopping is no failure, unless something was unanswered or had failed."""
    async with (
        engine_of(tmp_path, scripted_agent(*steps), stdin=stdin) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        with trio.move_on_after(3):
            async for _ in run:
                pass
        run.stop()
        run.stop()
        async for _ in run:
            pass

    assert outcome(run.result) == (Ending.STOPPED, status, error, 3)
    assert run.result.unanswered == (() if steps else ("Hi",))


async def test_leaving_the_block_stops_the_run(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A block that ends before the run does stops it."""
    async with engine_of(tmp_path, scripted_agent(frame())) as engine:
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            async for _ in run:
                break
        assert engine.runs == ()

    assert outcome(run.result) == (Ending.STOPPED, "success", None, 0)
    assert run.result.outputs == 1


async def test_leaving_the_block_at_once_stops_the_run(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A block that does nothing still leaves nothing."""
    async with (
        engine_of(tmp_path, scripted_agent()) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        pass

    error = "Container stopped without an answer"
    assert outcome(run.result) == (Ending.STOPPED, "error", error, 0)


@pytest.mark.parametrize("cause", ["stop", "silence"])
async def test_an_answer_during_the_stop_counts(
    cause: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What an agent says between SIGTERM and its end is delivered, and answers."""

    async def agent(pipes: AgentPipes) -> int:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(2)
                await pipes.stdout.send_all(frame("just so", newSessionId="s2"))

    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        if cause == "stop":
            await trio.sleep(90)
            run.stop()
        seen = [output.result async for output in run]

    stopped = cause == "stop"
    assert seen == ["just so"]
    assert run.result.ending is (Ending.STOPPED if stopped else Ending.TIMED_OUT)
    assert run.result.status == ("success" if stopped else "error")
    assert run.result.unanswered == ()
    assert run.result.new_session_id == "s2"
    assert run.result.duration == (92 if stopped else 102)


async def test_the_runtimes_own_failure_means_not_started(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A client that fails before there is an agent did not start one."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stderr.send_all(b"docker: no space left\n")
        container.exit(125)

    runtime = OwnRuntime(agent, start_failure="no space left")
    async with engine_on(tmp_path, runtime) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert outcome(result) == (Ending.NOT_STARTED, "error", "no space left", 0)
    assert (result.unanswered, result.exit_code) == (("Hi",), 125)


async def test_an_agent_that_wrote_was_started(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """With anything on stdout, the runtime's exit code is the agent's own."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdout.send_all(NOISE)
        container.exit(125)

    runtime = OwnRuntime(agent, start_failure="no space left")
    async with engine_on(tmp_path, runtime) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert (result.ending, result.exit_code) == (Ending.FAILED, 125)


# The number of the turn.


@both_modes
async def test_follow_ups_are_answered_in_order(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What is asked in the loop is answered in the loop, and finish ends it."""

    async def agent(pipes: AgentPipes) -> int:
        if stdin == "lifeline":
            return await echoing()(pipes)
        first = json.loads(await pipes.stdin.receive_some())
        await pipes.stdout.send_all(frame(first["prompt"]))
        assert await pipes.stdin.receive_some() == b""
        inbox = tmp_path / "data/ipc/family/input"
        while True:
            for path in sorted(inbox.glob("*.json")):
                line = json.loads(path.read_text())
                path.unlink()
                await pipes.stdout.send_all(frame(line["text"], answers=line["id"]))
            if (inbox / "_close").exists():
                return 0
            await trio.sleep(0.5)

    seen = []
    async with (
        engine_of(tmp_path, agent, stdin=stdin) as engine,
        engine.open_run(GROUP, "0", chat_jid=JID) as run,
    ):
        async for output in run:
            seen.append(output.result)
            if len(seen) < 5:
                await run.send(str(len(seen)))
            else:
                run.finish()

    assert seen == ["0", "1", "2", "3", "4"]
    assert (run.result.ending, run.result.status) == (Ending.EXITED, "success")
    assert run.result.unanswered == ()


@pytest.mark.parametrize(
    ("answers", "unanswered"),
    [
        ([0], ("b", "c")),
        ([1], ("c",)),
        ([2], ()),
        ([99], ()),
        ([2, 0], ()),
        ([0, 1], ("c",)),
        ([-1], ("a", "b", "c")),
        ([None], ()),
    ],
)
async def test_a_frame_may_say_what_it_answers(
    answers: list[int | None],
    unanswered: tuple[str, ...],
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """The number in "answers" is that of the last message which is answered."""

    async def agent(pipes: AgentPipes) -> int:
        reader = Reader(pipes.stdin)
        for _ in range(3):
            await reader.line()
        for number in answers:
            await pipes.stdout.send_all(frame("so", answers=number))
        return 0

    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "a", chat_jid=JID) as run,
    ):
        await run.send("b")
        await run.send("c")
        await run.wait()

    assert run.result.unanswered == unanswered
    assert run.result.status == ("error" if unanswered else "success")


@both_modes
async def test_a_follow_up_that_was_not_read_is_not_answered(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An output answers what was written, not what still waits for the agent."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdin.receive_some()
        await trio.sleep(10)
        await container.agent_stdout.send_all(frame("hi"))
        container.exit(0)

    async with (
        engine_on(tmp_path, OwnRuntime(agent), stdin=stdin) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await trio.sleep(1)
        await run.send(FOLLOW_UP)
        async for _ in run:
            pass

    error = "Container exited without an answer"
    assert outcome(run.result) == (Ending.EXITED, "error", error, 10)
    assert run.result.unanswered == (FOLLOW_UP,)


@both_modes
@pytest.mark.parametrize("second", [WAITS, frame("by the way")])
async def test_what_is_asked_about_an_output_is_not_answered_by_its_neighbour(
    stdin: str, second: bytes, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Of outputs that were read together, none answers what the first one led to."""
    agent = scripted_agent(frame("hi") + second)

    async with (
        engine_of(tmp_path, agent, stdin=stdin) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID, single_turn=True) as run,
    ):
        async for output in run:
            if output.result == "hi":
                await run.send(FOLLOW_UP)
                # Time enough for it to be written.
                await trio.sleep(50)

    assert run.result.unanswered == (FOLLOW_UP,)
    assert run.result.ending is Ending.TIMED_OUT
    assert run.result.duration == 150


@pytest.mark.parametrize(
    ("result", "unanswered"), [(None, ("Hi",)), ("I never listen", ())]
)
async def test_a_frame_before_the_prompt_was_written(
    tmp_path: Path,
    autojump_clock: MockClock,
    result: str | None,
    unanswered: tuple[str, ...],
) -> None:
    """Only text answers a prompt that was not told; being ready does not."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdout.send_all(frame(result))
        await trio.sleep(8)
        container.exit(0)

    runtime = OwnRuntime(agent, verify=partial(trio.sleep, 5))
    async with engine_on(tmp_path, runtime) as engine:
        ended = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert ended.unanswered == unanswered


async def test_a_frame_while_a_long_prompt_is_written_answers_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What an agent says before it has read all of the prompt is about the prompt."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdin.receive_some(10)
        await container.agent_stdout.send_all(frame("seen enough"))
        container.exit(0)

    async with engine_on(tmp_path, OwnRuntime(agent)) as engine:
        result = await engine.run(GROUP, "Hi" * 1000, chat_jid=JID)

    assert (result.status, result.unanswered) == ("success", ())


def read_all(root: Path) -> None:
    """Take the follow-ups away that are there as files, as an agent does."""
    for path in root.glob("data/ipc/family/input/*.json"):
        path.unlink()


@both_modes
async def test_a_callback_of_a_single_turn_may_ask_more(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A run of a single turn is finished when nothing is unanswered, not before."""
    agent = scripted_agent(frame("1"), 5.0, frame("2"))
    asked = False

    async with engine_of(tmp_path, agent, stdin=stdin) as engine:

        async def ask(output: AgentOutput) -> None:
            nonlocal asked
            if not asked:
                asked = True
                (run,) = engine.runs
                await run.send(FOLLOW_UP)
                read_all(tmp_path)

        result = await engine.run(GROUP, "Hi", chat_jid=JID, on_output=ask)

    assert outcome(result) == (Ending.IDLE, "success", None, 12)
    assert result.outputs == 2


# Follow-ups on their way.


async def test_send_is_refused_once_no_more_can_be_answered(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """After finish, stop or the end, a follow-up is refused."""
    async with engine_of(tmp_path, scripted_agent(frame())) as engine:
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            run.finish()
            with pytest.raises(RunClosedError) as refusal:
                await run.send(FOLLOW_UP)
        assert refusal.value.run_id == run.id
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            run.stop()
            with pytest.raises(RunClosedError):
                await run.send(FOLLOW_UP)
            await run.wait()
            with pytest.raises(RunClosedError):
                await run.send(FOLLOW_UP)
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            await run.wait()
            with pytest.raises(RunClosedError):
                await run.send(FOLLOW_UP)

    assert run.result.unanswered == ()


async def test_send_is_refused_while_the_agents_last_words_are_delivered(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that has left takes no follow-ups while its outputs still come."""
    async with (
        engine_of(tmp_path, scripted_agent(frame(), frame(), exit_code=0)) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        async for _ in run:
            await trio.sleep(1)
            with pytest.raises(RunClosedError):
                await run.send(FOLLOW_UP)
            run.finish()

    assert run.result.outputs == 2
    assert run.result.status == "success"


async def test_send_is_refused_while_the_agent_is_stopped_for_its_silence(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Once the clock has ended a run, follow-ups are too late."""
    agent = scripted_agent()
    async with (
        engine_of(tmp_path, agent, ignores_stop=True) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await trio.sleep(102)
        with pytest.raises(RunClosedError):
            await run.send(FOLLOW_UP)
        run.finish()
        run.stop()
        await run.wait()

    assert (run.result.ending, run.result.duration) == (Ending.TIMED_OUT, 105)
    assert run.result.unanswered == ("Hi",)


async def test_a_cancelled_send_sends_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Who is cancelled in send has queued nothing, and others' lines stay whole."""
    async with (
        engine_of(tmp_path, echoing()) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        with trio.CancelScope() as scope:
            scope.cancel()
            await run.send("not this")
        assert scope.cancelled_caught
        await run.send("but this")
        run.finish()
        seen = [output.result async for output in run]

    assert seen == ["Hi", "but this"]
    assert run.result.status == "success"


async def test_the_queue_has_a_limit_and_loses_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Beyond 1 MiB a follow-up is refused; the agent gets all that were accepted."""
    read: list[dict[str, Any]] = []

    async def agent(container: OwnContainer) -> None:
        await trio.sleep(50)
        reader = Reader(container.agent_stdin)
        while (line := await reader.line()) and line.get("type") != "close":
            read.append(line)
        await container.agent_stdout.send_all(frame("all", answers=read[-1]["id"]))
        container.exit(0)

    sent: list[str] = []
    async with (
        engine_on(tmp_path, OwnRuntime(agent)) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        with pytest.raises(FollowUpRefusedError):
            await run.send("x" * 2**20)
        while True:
            text = f"{len(sent):>1000}" * 100
            try:
                await run.send(text)
            except FollowUpRefusedError:
                break
            sent.append(text)
        with pytest.raises(FollowUpRefusedError):
            await run.send(text)
        await run.send("a little more")
        await trio.sleep(60)
        # There is room again.
        await run.send(text)
        run.finish()
        await run.wait()

    assert len(sent) == 10
    assert [line["text"] for line in read[1:]] == [*sent, "a little more", text]
    assert [line["id"] for line in read[1:]] == list(range(1, 13))
    assert (run.result.status, run.result.unanswered) == ("success", ())


async def test_the_queue_of_files_has_the_same_limit(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """In eof mode what counts is what the agent has not taken away."""
    inbox = tmp_path / "data/ipc/family/input"
    async with (
        engine_of(tmp_path, scripted_agent(frame()), stdin="eof") as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        for _ in range(10):
            await run.send("x" * 100_000)
        with pytest.raises(FollowUpRefusedError):
            await run.send("x" * 100_000)
        min(inbox.iterdir()).unlink()
        await run.send("x" * 100_000)
        run.stop()
        await run.wait()

    assert len(run.result.unanswered) == 11
    # Nothing of it is there for the next run.
    assert not inbox.exists()


async def test_more_files_than_a_listing_has_are_all_unread(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A follow-up among thousands is not taken for read."""
    async with (
        engine_of(tmp_path, scripted_agent(5.0, frame()), stdin="eof") as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        for number in range(1500):
            await run.send(str(number))
        await anext(run)

    assert run.result.unanswered == tuple(map(str, range(1500)))


async def test_files_that_cannot_be_written_are_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that spoils its inbox gets no follow-ups, and ends in time."""

    async def agent(pipes: AgentPipes) -> int:
        (tmp_path / "data/ipc/family/input").rmdir()
        await pipes.stdout.send_all(frame())
        return await scripted_agent()(pipes)

    async with (
        engine_of(tmp_path, agent, stdin="eof") as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await anext(run)
        with pytest.raises(FollowUpRefusedError):
            await run.send(FOLLOW_UP)
        run.finish()
        await run.wait()

    assert outcome(run.result) == (Ending.IDLE, "success", None, 7)
    assert run.result.unanswered == ()


async def test_a_loop_body_may_send_to_an_agent_that_writes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that reads nothing before it has written all does not block the body."""
    read: list[dict[str, Any] | None] = []

    async def agent(container: OwnContainer) -> None:
        for number in range(20):
            await container.agent_stdout.send_all(frame(str(number), answers=0))
        reader = Reader(container.agent_stdin)
        read.extend([await reader.line() for _ in range(22)])
        await container.agent_stdout.send_all(frame("all"))
        container.exit(0)

    async with (
        engine_on(tmp_path, OwnRuntime(agent)) as engine,
        engine.open_run(GROUP, "Hi" * 100_000, chat_jid=JID) as run,
    ):
        async for output in run:
            if output.result != "all":
                await run.send("x" * 10_000)
            if output.result == "19":
                run.finish()

    assert [line and line.get("id") for line in read] == [None, *range(1, 21), None]
    assert read[-1] == {"type": "close"}
    assert outcome(run.result) == (Ending.EXITED, "success", None, 0)


async def test_finish_says_close_once_and_is_synchronous(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """However often finish is called, the agent is told once."""
    lines: list[dict[str, Any] | None] = []

    async def agent(pipes: AgentPipes) -> int:
        reader = Reader(pipes.stdin)
        while line := await reader.line():
            lines.append(line)
            if line.get("type") == "close":
                await pipes.stdout.send_all(frame())
        lines.append(None)
        return 0

    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        for _ in range(3):
            run.finish()
        await run.wait()
        run.finish()
        run.stop()

    prompt, *rest = lines
    assert prompt is not None
    assert (prompt["prompt"], prompt["lifeline"]) == ("Hi", True)
    # The close, then the end of file that means that the host is gone.
    assert rest[0] == {"type": "close"}
    assert rest[1:] in ([], [None])


@both_modes
async def test_an_agent_that_closes_its_stdin_lives_on(
    stdin: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Broken stdin is no ending."""

    async def agent(pipes: AgentPipes) -> int:
        await pipes.stdin.aclose()
        await trio.sleep(50)
        await pipes.stdout.send_all(frame("deaf"))
        return 0

    async with (
        engine_of(tmp_path, agent, stdin=stdin) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await trio.sleep(1)
        await run.send(FOLLOW_UP)
        seen = [output.result async for output in run]

    assert seen == ["deaf"]
    assert run.result.ending is Ending.EXITED
    assert run.result.unanswered == (FOLLOW_UP,)


async def test_an_agent_that_closes_its_stdout_lives_on(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A closed stdout is no ending either: the clock or the exit is."""

    async def agent(pipes: AgentPipes) -> int:
        await pipes.stdout.send_all(frame("last words"))
        await pipes.stdout.aclose()
        await pipes.stderr.aclose()
        await trio.sleep(50)
        return 0

    seen, result = await talk(tmp_path, agent)

    assert seen == ["last words"]
    assert outcome(result) == (Ending.EXITED, "success", None, 50)


# Outputs on their way.


async def test_the_callback_runs_in_the_callers_task_one_at_a_time(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Callbacks never overlap, and belong to whoever awaits engine.run."""
    tasks = set()
    inside = 0
    seen = []

    async def on_output(output: AgentOutput) -> None:
        nonlocal inside
        assert inside == 0
        inside += 1
        await trio.sleep(1)
        inside -= 1
        tasks.add(trio.lowlevel.current_task())
        seen.append(output.result)

    texts = [str(number) for number in range(20)]
    agent = scripted_agent(b"".join(map(frame, texts)), exit_code=0)
    async with engine_of(tmp_path, agent) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID, on_output=on_output)

    assert seen == texts
    assert tasks == {trio.lowlevel.current_task()}
    assert (result.outputs, result.result) == (20, None)


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        ([frame("a"), frame("b"), WAITS], "b"),
        ([frame("a"), frame("b", partial=True)], "a"),
        ([frame("b", partial=True)], None),
        ([frame(""), WAITS], ""),
        ([frame("a"), frame("why", "error", error="x")], "why"),
        ([], None),
    ],
)
async def test_without_a_callback_the_last_text_is_the_result(
    steps: list[bytes], last: str | None, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """engine.run without a callback returns the last text that is not partial."""
    agent = scripted_agent(*steps, 1.0, exit_code=0)
    async with engine_of(tmp_path, agent) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

        # nursery.start drops what engine.run returns; the run has it, too.
        async with trio.open_nursery() as nursery:
            run = await nursery.start(partial(engine.run, GROUP, "Hi", chat_jid=JID))
            waited = await run.wait()

    assert result.result == waited.result == run.result.result == last
    assert result.outputs == waited.outputs == len(steps)


async def test_the_result_is_there_at_the_end_only(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """To ask for the result of a live run is a mistake."""
    async with (
        engine_of(tmp_path, scripted_agent(frame(), 1.0, exit_code=0)) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        async for _ in run:
            with pytest.raises(RuntimeError, match="not over"):
                _ = run.result
        assert run.result is run.result
        # From then on, nothing waits.
        assert await run.wait() is run.result
        with pytest.raises(StopAsyncIteration):
            await anext(run)
        assert run.group is GROUP
        assert run.container_name == f"clawtrio-family-{run.id}"
        assert aiter(run) is run


async def test_waiting_discards_what_nobody_asks_for(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Who only waits gets the result; the outputs are gone, but counted for nothing."""
    agent = scripted_agent(*again(5, frame("x", newSessionId="s"), 90.0), exit_code=0)
    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        result = await run.wait()

    assert outcome(result) == (Ending.EXITED, "success", None, 450)
    assert (result.outputs, result.new_session_id) == (0, "s")


async def test_a_loop_that_was_broken_out_of_does_not_hold_up_the_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Who leaves the loop and waits in its place discards the rest."""
    agent = scripted_agent(*again(5, frame(), 10.0), exit_code=0)
    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        async for _ in run:
            break
        result = await run.wait()

    assert outcome(result) == (Ending.EXITED, "success", None, 50)
    assert result.outputs == 1


async def test_a_loop_body_may_wait_for_the_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """wait() in the loop's body ends the loop."""
    async with (
        engine_of(
            tmp_path, scripted_agent(*again(3, frame(), 1.0), exit_code=0)
        ) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        async for _ in run:
            await run.wait()

    assert (run.result.outputs, run.result.duration) == (1, 3)


@pytest.mark.parametrize("broken", ["left", "died"])
async def test_an_iterator_whose_task_is_gone_does_not_hold_up_the_end(
    broken: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A task that took an output and ended leaves the rest to be discarded."""
    agent = scripted_agent(frame("1"), 1.0, frame("2"), 50.0, exit_code=0)

    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):

        async def take_one() -> None:
            async for _ in run:
                await trio.sleep(0.5)
                if broken == "left":
                    break
                raise ValueError

        async def waiting(results: list[RunResult]) -> None:
            results.append(await run.wait())

        results: list[RunResult] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiting, results)
            try:
                async with trio.open_nursery() as inner:  # noqa: ASYNC112
                    inner.start_soon(take_one)
            except* ValueError:
                pass

    assert [result.ending for result in results] == [Ending.EXITED]
    assert results[0].outputs == 1


async def test_others_may_wait_while_one_iterates(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Waiting takes nothing from whoever iterates, however slow that is."""
    agent = scripted_agent(*again(5, frame(), 1.0), exit_code=0)
    seen: list[AgentOutput] = []

    async def slow(output: AgentOutput) -> None:
        await trio.sleep(1000)
        seen.append(output)

    async with engine_of(tmp_path, agent) as engine, trio.open_nursery() as nursery:
        run = await nursery.start(
            partial(engine.run, GROUP, "Hi", chat_jid=JID, on_output=slow)
        )
        nursery.start_soon(run.wait)
        result = await run.wait()

    assert len(seen) == result.outputs == 5
    assert result.duration == 5000


async def test_a_wait_that_was_cancelled_discards_no_more(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """After a wait with a timeout, outputs go to whoever asks."""
    agent = scripted_agent(frame("1"), 10.0, frame("2"), 10.0, exit_code=0)
    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        with trio.move_on_after(5):
            await run.wait()
        seen = [output.result async for output in run]

    assert seen == ["2"]


async def test_a_second_concurrent_iterator_is_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """While one task waits for the next output, another one cannot."""
    async with (
        engine_of(tmp_path, scripted_agent(5.0, frame(), exit_code=0)) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        seen: list[AgentOutput] = []

        async def iterate() -> None:
            seen.extend([output async for output in run])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(iterate)
            await trio.sleep(1)
            with pytest.raises(trio.BusyResourceError):
                await anext(run)
            with pytest.raises(trio.BusyResourceError):
                async for _ in run:
                    pass  # pragma: no cover - there is nothing to get

    assert len(seen) == 1
    assert run.result.ending is Ending.EXITED


async def test_a_cancelled_iterator_loses_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Asking with a timeout, again and again, gets every output once."""
    texts = [str(number) for number in range(30)]
    steps: list[bytes | float] = [s for text in texts for s in (frame(text), 1.0)]
    seen = []
    async with (
        engine_of(tmp_path, scripted_agent(*steps, exit_code=0)) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        over = False
        while not over:
            with trio.move_on_after(0.4):
                try:
                    seen.append((await anext(run)).result)
                except StopAsyncIteration:
                    over = True

    assert seen == texts
    assert run.result.outputs == 30


async def test_the_iteration_may_go_on_in_another_task(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The run is its own iterator: who asks next gets the next."""
    agent = scripted_agent(frame("1"), frame("2"), frame("3"), exit_code=0)
    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        seen = [(await anext(run)).result]

        async def iterate() -> None:
            seen.extend([output.result async for output in run])

        async with trio.open_nursery() as nursery:  # noqa: ASYNC112
            nursery.start_soon(iterate)

    assert seen == ["1", "2", "3"]


async def test_stop_lets_the_outputs_before_it_through(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What was completed before the stop is still delivered to who goes on asking."""
    agent = scripted_agent(b"".join(frame(str(number)) for number in range(10)))
    async with (
        engine_of(tmp_path, agent) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        seen = []
        async for output in run:
            seen.append(output.result)
            run.stop()

    assert seen == [str(number) for number in range(10)]
    assert run.result.ending is Ending.STOPPED


async def test_an_agent_without_markers_may_answer_in_its_last_line(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Without START, the last line is the output, if the exit code is 0."""
    last = b'working...\n{"status":"success","result":"old","newSessionId":"s"}\n\n'

    seen, result = await talk(tmp_path, scripted_agent(last, 5.0, exit_code=0))

    assert seen == ["old"]
    assert outcome(result) == (Ending.EXITED, "success", None, 5)
    assert (result.new_session_id, result.outputs) == ("s", 1)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b'{"status":"success","result":"x"}', 1),
        (UNACCEPTABLE + b'{"status":"success","result":"x"}', 0),
        (b'{"status":"success","result":"x"}\nbye', 0),
    ],
)
async def test_the_last_line_counts_in_no_other_case(
    data: bytes, code: int, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """After a failure, a marker or more noise, the last line is noise."""
    seen, result = await talk(tmp_path, scripted_agent(data, exit_code=code))

    assert seen == []
    assert result.unanswered == ("Hi",)


async def test_a_frame_that_the_end_of_the_file_completes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that dies after its JSON, but before END, has answered."""
    whole = frame("hi")
    unfinished = whole[: whole.index(b"}") + 1]

    seen, result = await talk(tmp_path, scripted_agent(unfinished, exit_code=1))

    assert seen == ["hi"]
    assert (result.ending, result.unanswered) == (Ending.FAILED, ())


@pytest.mark.parametrize(
    ("steps", "session"),
    [
        ([frame(newSessionId="a"), frame(newSessionId="b")], "b"),
        ([frame(newSessionId="a"), frame()], "a"),
        ([frame(newSessionId="a"), frame(None, partial=True, newSessionId="b")], "b"),
        ([frame("x", "error", newSessionId="a")], "a"),
        ([frame(newSessionId="a"), frame(newSessionId="")], "a"),
        ([frame(newSessionId="a"), frame(newSessionId="x" * 257)], "a"),
        ([frame()], None),
    ],
)
@pytest.mark.parametrize("code", [0, 1, None])
async def test_the_last_session_counts_however_the_run_ends(
    steps: list[bytes],
    session: str | None,
    code: int | None,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """newSessionId counts in every frame, delivered or not, in every ending."""
    agent = scripted_agent(*steps, exit_code=code)
    async with engine_of(tmp_path, agent) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID, single_turn=False)
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            with trio.move_on_after(1):
                await run.wait()

    assert result.new_session_id == run.result.new_session_id == session


async def test_the_session_of_a_run_that_timed_out_is_known(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A heartbeat is enough to name the session of a run that never answers."""
    beat = frame(None, partial=True, newSessionId="s")

    _, result = await talk(tmp_path, scripted_agent(beat))

    assert (result.ending, result.new_session_id) == (Ending.TIMED_OUT, "s")


async def test_a_long_output_in_small_writes_arrives(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An output of 8 MiB, written 4 KiB at a time, is one output."""
    text = "ü" * 2**22
    data = frame(text)
    pieces = [data[i : i + 4096] for i in range(0, len(data), 4096)]

    seen, result = await talk(tmp_path, scripted_agent(*pieces, exit_code=0))

    assert seen == [text]
    assert result.stdout_truncated is (len(data) > 10 * 2**20)


async def test_much_noise_is_no_output_and_no_failure(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Between 100 MB of noise, every output is found."""
    noise = (b"x" * 999 + b"\n") * 1000
    steps = [step for number in range(100) for step in (noise, frame(str(number)))]

    seen, result = await talk(tmp_path, scripted_agent(*steps, exit_code=0))

    assert seen == [str(number) for number in range(100)]
    assert result.stdout_truncated


# What a grandchild keeps open.


@pytest.mark.parametrize(
    ("drain_grace", "silence", "number"), [(2, 0, 2), (2, 1.5, 1), (0, 0, 1)]
)
async def test_a_pipe_that_a_grandchild_holds_open_is_read_for_drain_grace(
    drain_grace: float,
    silence: float,
    number: int,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """After the exit, what comes within drain_grace is an output; then it is over."""
    texts = ["grandchild", "grandchild again", "too late"]

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdout.send_all(frame("child"))
        container.exit(0, close=False)
        await trio.sleep(silence)
        with suppress(trio.BrokenResourceError):
            for text in texts:
                await container.agent_stdout.send_all(frame(text))
                await trio.sleep(1.5)

    async with (
        engine_on(tmp_path, OwnRuntime(agent), drain_grace=drain_grace) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        seen = [output.result async for output in run]
        await trio.sleep(5)

    assert seen == ["child", *texts[:number]]
    assert run.result.ending is Ending.EXITED
    assert run.result.duration == pytest.approx(drain_grace)


async def test_the_callback_does_not_count_for_the_drain(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What is in the pipe after the exit is read, however long callbacks take."""
    texts = [str(number) for number in range(10)]

    async def agent(container: OwnContainer) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, container)
            await trio.sleep(0.5)
            container.exit(0, close=False)

    async def write(container: OwnContainer) -> None:
        for text in texts:
            await container.agent_stdout.send_all(frame(text))

    seen = []

    async def slow(output: AgentOutput) -> None:
        await trio.sleep(10_000)
        seen.append(output.result)

    async with engine_on(tmp_path, OwnRuntime(agent)) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID, on_output=slow)

    assert seen == texts
    assert outcome(result) == (Ending.EXITED, "success", None, 100_002)


async def test_a_grandchild_that_floods_does_not_hold_a_run_up(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Of a pipe that is always full, so much is read after the exit, and no more."""

    async def agent(container: OwnContainer) -> None:
        container.exit(0, close=False)
        with suppress(trio.BrokenResourceError):
            while True:
                await container.agent_stdout.send_all(b"x" * 999_983)

    async with engine_on(tmp_path, OwnRuntime(agent), drain_grace=0) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    assert result.ending is Ending.EXITED
    assert result.duration == 0


async def test_stderr_that_is_held_open_is_drained_too(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The end of a run does not wait for stderr any longer than for stdout."""

    async def agent(container: OwnContainer) -> None:
        container.exit(3, close=False)
        await container.agent_stdout.aclose()
        await container.agent_stderr.send_all(b"late, but in time")

    async with engine_on(tmp_path, OwnRuntime(agent)) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID)

    error = "Container exited with code 3: late, but in time"
    assert outcome(result) == (Ending.FAILED, "error", error, 2)


async def test_stop_while_draining_is_a_stop(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """How it ended is read after the last delivery, so a late stop counts."""
    async with (
        engine_of(tmp_path, scripted_agent(frame(), frame(), exit_code=0)) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        async for _ in run:
            await trio.sleep(1)
            run.stop()

    assert run.result.ending is Ending.STOPPED
    assert (run.result.status, run.result.outputs) == ("success", 2)
    assert run.result.exit_code == 0


async def test_an_exit_just_before_the_deadline_is_an_exit(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An agent that had left when its time was up was not stopped by the clock."""

    async def agent(container: OwnContainer) -> None:
        await container.agent_stdin.receive_some()
        await container.agent_stdout.send_all(frame())
        await trio.sleep(1)
        container.exit(0)
        # We are slow to hear of it.
        autojump_clock.jump(200)

    async with engine_on(tmp_path, OwnRuntime(agent)) as engine:
        result = await engine.run(GROUP, "Hi", chat_jid=JID, single_turn=False)

    assert outcome(result) == (Ending.EXITED, "success", None, 201)


async def test_a_deadline_that_is_moved_as_it_passes_has_moved(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Who is told to leave in the moment in which it would be stopped may leave."""
    endings = set()
    async with engine_of(tmp_path, echoing()) as engine, trio.open_nursery() as nursery:
        # Which of the two comes first is a matter of chance.
        for _ in range(20):
            start = partial(engine.run, single_turn=False, chat_jid=JID)
            run = await nursery.start(start, GROUP, "Hi")
            await trio.sleep(100)
            run.finish()
            endings.add((await run.wait()).ending)

    assert endings == {Ending.EXITED, Ending.IDLE}


async def test_a_deadline_that_passes_unseen_has_passed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An application that blocks the loop gives the agent no more time than that."""
    async with (
        engine_of(tmp_path, scripted_agent()) as engine,
        engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
    ):
        await trio.sleep(50)
        autojump_clock.jump(1000)
        result = await run.wait()

    assert result.ending is Ending.TIMED_OUT
    assert result.duration == 1050


async def test_a_run_of_a_cancelled_engine_has_a_result(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It is seen through to its end, and its log is written."""
    with trio.move_on_after(50):
        async with (
            engine_of(tmp_path, scripted_agent(frame())) as engine,
            engine.open_run(GROUP, "Hi", chat_jid=JID) as run,
        ):
            pending = [run.pending]
            await anext(run)
            pending.append(run.pending)
            await trio.sleep_forever()

    assert pending == [(0,), ()]
    assert run.result.ending is Ending.STOPPED
    assert run.result.log_path.exists()


# Whatever an agent and its caller do.


@attrs.define
class Script:
    """An agent: what it writes, how long it thinks, how it leaves."""

    steps: list[bytes | float]
    exit_code: int | None
    ignores_stop: bool
    written: bytes = b""

    async def __call__(self, pipes: AgentPipes) -> int:
        for step in self.steps:
            if isinstance(step, bytes):
                await pipes.stdout.send_all(step)
                self.written += step
            else:
                await trio.sleep(step)
        if self.exit_code is None:
            await trio.sleep_forever()
        return self.exit_code or 0


def outputs_in(data: bytes) -> list[AgentOutput]:
    """Parse what an agent wrote."""
    parser = MarkerParser()
    events = [*parser.feed(data), *parser.close()]
    return [event for event in events if isinstance(event, AgentOutput)]


@attrs.frozen
class Caller:
    """A caller: how slow it is, when it asks more, and how it ends the run."""

    delays: list[float]
    sends: frozenset[int]
    after: int
    end: str

    async def take(self, run: Run, number: int) -> bool:
        """Deal with an output; return whether to go on."""
        await trio.sleep(self.delays[number % len(self.delays)])
        if number in self.sends:
            with suppress(RunClosedError):
                await run.send(FOLLOW_UP)
        if number < self.after:
            return True
        match self.end:
            case "finish":
                run.finish()
            case "stop":
                run.stop()
            case "raise":
                raise ZeroDivisionError
            case "cancel":
                await trio.sleep_forever()
            case "wait":
                await run.wait()
        return self.end != "leave"


# None of their sums is a timeout: what comes first would be chance.
_pauses = st.sampled_from([0.0, 1.0137, 6.0251, 30.0719, 45.0317, 98.0433, 130.0571])
_frames = st.sampled_from(
    [
        frame("text"),
        frame("more", newSessionId="s1"),
        WAITS,
        frame(None, "error", error="oh"),
        frame("why", "error", newSessionId="s2"),
        frame("part", partial=True),
        HEARTBEAT,
        frame(None, partial=True, newSessionId="s3"),
        NOISE,
        UNACCEPTABLE,
    ]
)
_numbered = st.sampled_from([frame("zero", answers=0), frame("all", answers=99)])
scripts = st.builds(
    Script,
    st.lists(_pauses | _frames | _numbered, max_size=12),
    st.sampled_from([None, 0, 1, 137]),
    st.booleans(),
)
#: Ends that cost the caller outputs.
LOSSY = ("raise", "cancel", "wait", "leave")
callers = st.builds(
    Caller,
    st.lists(st.sampled_from([0.0, 1.0, 8.0, 500.0]), min_size=1, max_size=3),
    st.frozensets(st.integers(1, 6), max_size=3),
    st.integers(1, 6),
    st.sampled_from(["", "finish", "stop", *LOSSY]),
)
modes = st.sampled_from(["lifeline", "eof"])


def check_verdict(result: RunResult, said: list[AgentOutput]) -> None:
    """Compare a result with what the table of the contract says."""
    sessions = [output.new_session_id for output in said if output.new_session_id]
    assert result.new_session_id == (sessions[-1] if sessions else None)
    turns = [o for o in said if not o.partial and o != AgentOutput("success")]
    failure = turns[-1] if turns and turns[-1].status == "error" else None
    wrong = failure and (failure.error or failure.result)
    allowed = {wrong}
    match result.ending:
        case Ending.TIMED_OUT:
            allowed = {"Container timed out after 100 s"}
        case Ending.FAILED:
            assert result.exit_code
            assert result.error is not None
            code, _, _ = result.error.partition(": ")
            assert code == f"Container exited with code {result.exit_code}"
            allowed = {result.error}
        case Ending.EXITED if result.unanswered:
            allowed = {"Container exited without an answer"}
        case Ending.STOPPED if result.unanswered:
            allowed = {"Container stopped without an answer"}
        case _:
            assert not result.unanswered
            # Waiting makes good for a failure if it answers what was asked since.
            if AgentOutput("success") in said:
                allowed |= {None}
    assert result.error in allowed
    assert result.status == ("success" if result.error is None else "error")


async def live(
    root: Path, script: Script, caller: Caller, *, single_turn: bool, stdin: str
) -> None:
    """Let *script* and *caller* meet, and see what must hold in any case."""
    runtime = FakeRuntime(script, ignores_stop=script.ignores_stop)
    seen: list[AgentOutput] = []
    slow = 0.0
    async with engine_on(root, runtime, stdin=stdin) as engine:
        before = open_descriptors()
        opened = engine.open_run(GROUP, "Hi", chat_jid=JID, single_turn=single_turn)
        with trio.CancelScope() as scope, suppress(ZeroDivisionError):
            async with opened as run:
                if caller.end == "cancel":
                    scope.deadline = 50 * caller.after
                async for output in run:
                    seen.append(output)
                    slow -= trio.current_time()
                    try:
                        if not await caller.take(run, len(seen)):
                            break
                    finally:
                        slow += trio.current_time()

        # Nothing is left.
        assert await runtime.find({}) == []
        assert list(engine.runs) == []
        assert open_descriptors() == before

    result = run.result
    said = outputs_in(script.written)
    # Nothing is lost, nor told twice, nor in another order.
    told = [o for o in said if not o.partial or o.result is not None]
    assert seen == told[: len(seen)]
    assert result.outputs == len(seen)
    ended = caller.end in LOSSY and (
        scope.cancelled_caught or len(seen) >= caller.after
    )
    if not (ended and caller.end in LOSSY):
        assert seen == told
    check_verdict(result, said)
    # Nothing hangs.
    thinking = sum(step for step in script.steps if isinstance(step, float))
    assert result.duration <= thinking + slow + 100 + 100 + 40 + 7 + 5 + 0.1


@given(script=scripts, caller=callers, single_turn=st.booleans(), stdin=modes)
def test_whatever_they_do_nothing_is_lost_and_nothing_is_left(
    *,
    script: Script,
    caller: Caller,
    single_turn: bool,
    stdin: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Outputs come once and in order, every run ends in time, and then it is gone."""
    root = tmp_path_factory.getbasetemp()
    main = partial(live, root, script, caller, single_turn=single_turn, stdin=stdin)

    trio.run(main, clock=MockClock(autojump_threshold=0))


@attrs.define
class Expected:
    """The table of states, as simply as can be: for a run that is left alone."""

    single_turn: bool
    eof: bool
    now: float = 0.0
    unanswered: bool = True
    waiting: bool = False
    finished: bool = False
    deadline: float = 100.0
    ending: Ending | None = None

    def restart(self) -> None:
        """Start the clock, as the state wants it."""
        if self.single_turn and not self.unanswered:
            self.finished = True
        patience = 40 if self.waiting else 100
        if self.finished and not self.unanswered:
            patience = 7
        self.deadline = self.now + patience

    def pause(self, seconds: float) -> None:
        """Let the agent be silent."""
        until = self.now + seconds
        while self.ending is None and self.deadline < until:
            self.now = self.deadline
            if self.unanswered:
                self.ending = Ending.TIMED_OUT
            elif self.finished or not self.waiting:
                self.ending = Ending.IDLE
            else:
                self.finished = True
                self.restart()
        if self.ending is None:
            self.now = until

    def hear(self, output: AgentOutput) -> None:
        """Let the agent speak."""
        if not output.partial:
            self.unanswered = False
            said_so = output == AgentOutput("success")
            self.waiting = said_so or self.eof
        self.restart()


@given(
    steps=st.lists(_pauses | _frames, max_size=12),
    exit_code=st.sampled_from([None, 0, 3]),
    single_turn=st.booleans(),
    stdin=modes,
)
def test_a_run_that_is_left_alone_ends_as_the_tables_say(
    *,
    steps: list[bytes | float],
    exit_code: int | None,
    single_turn: bool,
    stdin: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """When it ends and how follows from what the agent wrote, and when."""
    expected = Expected(single_turn, stdin == "eof")
    for step in steps:
        if isinstance(step, float):
            expected.pause(step)
        elif expected.ending is None:
            for output in outputs_in(step):
                expected.hear(output)
    if exit_code is None:
        expected.pause(math.inf)
    stopped = expected.ending
    ending = stopped or (Ending.FAILED if exit_code else Ending.EXITED)
    agent = scripted_agent(*steps, exit_code=exit_code)

    _, result = trio.run(
        partial(
            talk,
            tmp_path_factory.getbasetemp(),
            agent,
            single_turn=single_turn,
            stdin=stdin,
        ),
        clock=MockClock(autojump_threshold=0),
    )

    assert result.ending is ending
    assert result.duration == pytest.approx(expected.now)
    assert result.exit_code == (143 if stopped else exit_code)
    assert bool(result.unanswered) == expected.unanswered


@pytest.mark.parametrize("drain_grace", [0, 0.05])
async def test_a_loop_that_stalls_loses_nothing(
    drain_grace: float, tmp_path: Path
) -> None:
    """Time that the application took from us is not held against the agent."""
    outputs = [frame(str(number)) for number in range(6)]
    noise = b"." * 50_000 + b"\n"
    agent = scripted_agent(noise.join(outputs), exit_code=0)

    async def stall() -> None:
        while True:
            time.sleep(drain_grace + 0.02)  # noqa: ASYNC251 - a bad neighbour
            await trio.lowlevel.checkpoint()

    async with (
        engine_on(tmp_path, FakeRuntime(agent), drain_grace=drain_grace) as engine,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(stall)
        async with engine.open_run(GROUP, "Hi", chat_jid=JID) as run:
            seen = [output.result async for output in run]
        nursery.cancel_scope.cancel()

    assert seen == list("012345")
    assert run.result.ending is Ending.EXITED


async def test_a_broken_pipe_is_at_its_end() -> None:
    """Nothing more comes out of a stream that broke, or was closed."""
    _, stream = memory_stream_one_way_pair()
    stream.close()

    assert await _Pipe(stream, 2).read() == b""
