"""Agents that misbehave: each run ends as the table of endings says, in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from clawtrio import AgentOutput, Ending, RunResult, Settings, open_engine

from .conftest import RUNTIMES, STUBBORN, Site, facts, group, memory

MIB = 2**20

#: For what makes no difference to Podman, so that it all does not take too long.
TWO = pytest.mark.parametrize("runtime_name", RUNTIMES[::2], indirect=True)


class Ear:
    """A callback that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[str | None] = []

    async def __call__(self, output: AgentOutput) -> None:
        await trio.lowlevel.checkpoint()
        self.heard.append(output.result)


async def run(
    settings: Settings, *, prompt: str = "go", seconds: float = 30
) -> tuple[RunResult, list[str | None], float]:
    """Run an agent once: how it ended, what it said, and how long it took."""
    ear = Ear()
    with trio.fail_after(seconds):
        async with open_engine(settings) as engine:
            started = trio.current_time()
            result = await engine.run(
                group(), prompt, chat_jid="tg:1", on_output=ear, single_turn=False
            )
            took = trio.current_time() - started
    return result, ear.heard, took


async def test_failure(site: Site) -> None:
    """A code other than 0 is a failure, told by the end of stderr."""
    agent = 'hear(); emit("so far"); sys.exit("x" * 300 + " it broke")'

    result, heard, _ = await run(site.settings(agent))

    assert heard == ["so far"]
    assert result.error == f"Container exited with code 1: {'x' * 190} it broke\n"
    assert facts(result)[:3] == ("error", "FAILED", 1)
    assert result.unanswered == ()
    assert "it broke" in result.log_path.read_text()


@TWO
async def test_no_answer(site: Site) -> None:
    """Leaving with code 0 is not enough: there was no answer."""
    result, _, _ = await run(site.settings("hear()"))

    error = "Container exited without an answer"
    assert facts(result) == ("error", "EXITED", 0, error)
    assert result.unanswered == ("go",)


async def test_command_not_found(site: Site) -> None:
    """An agent that cannot be run is a failure which names it."""
    result, _, _ = await run(site.settings(agent_command=["no-such-agent"]))

    assert (result.ending, result.exit_code) == (Ending.FAILED, 127)
    assert "'no-such-agent': command not found" in (result.error or "")


@TWO
async def test_silence(site: Site) -> None:
    """Without an answer in time the agent is stopped, however it speaks otherwise."""
    agent = """
while True:
    print("noise", flush=True)
    print("complaint", file=sys.stderr, flush=True)
    time.sleep(0.1)
"""
    result, _, took = await run(site.settings(agent, answer_timeout=1.5))

    error = "Container timed out after 1.5 s"
    assert facts(result) == ("error", "TIMED_OUT", 0, error)
    assert 1.5 <= took < 10


async def test_idle(site: Site) -> None:
    """An agent that has answered and then stays silent is stopped, a success."""
    result, heard, took = await run(
        site.settings("hear(); emit('done'); stay()", answer_timeout=1)
    )

    assert heard == ["done"]
    assert facts(result) == ("success", "IDLE", 1, None)
    assert 1 <= took < 10


@TWO
async def test_waiting(site: Site) -> None:
    """An agent that waits is told to finish after idle_timeout, and leaves."""
    result, heard, took = await run(site.settings(idle_timeout=1))

    assert heard == ["go", None]
    assert facts(result) == ("success", "EXITED", 2, None)
    assert 1 <= took < 10


async def test_sigterm_ignored(site: Site) -> None:
    """An agent that ignores SIGTERM is killed after stop_grace; the clock ended it."""
    result, heard, took = await run(site.settings(STUBBORN, answer_timeout=1))

    assert heard == ["here"]
    assert facts(result) == ("success", "IDLE", 1, None)
    assert result.exit_code == 137
    assert 2 <= took < 10


async def test_last_words(site: Site) -> None:
    """Stop reaches the agent itself with SIGTERM, and its answer then counts."""
    agent = """
def say_goodbye(number, frame):
    emit("goodbye")
    time.sleep(0.2)
    emit("at last")
    os._exit(3)

hear()
signal.signal(signal.SIGTERM, say_goodbye)
emit("working", partial=True)
stay()
"""
    heard = []
    with trio.fail_after(30):
        async with (
            open_engine(site.settings(agent, stop_grace=5)) as engine,
            engine.open_run(group(), "go", chat_jid="tg:1") as live,
        ):
            async for output in live:
                heard.append(output.result)
                live.stop()

    assert heard == ["working", "goodbye", "at last"]
    assert facts(live.result) == ("success", "STOPPED", 3, None)
    assert live.result.exit_code == 3
    assert live.result.unanswered == ()


async def test_stopped_without_an_answer(site: Site) -> None:
    """What was asked of an agent that is stopped before is unanswered."""
    with trio.fail_after(30):
        async with (
            open_engine(site.settings("stay()")) as engine,
            engine.open_run(group(), "go", chat_jid="tg:1") as live,
        ):
            await live.send("and then")
            live.stop()
            result = await live.wait()

    error = "Container stopped without an answer"
    assert facts(result) == ("error", "STOPPED", 0, error)
    assert result.unanswered == ("go", "and then")


@pytest.mark.parametrize(
    ("then", "ending"),
    [("time.sleep(0.5)", Ending.EXITED), ("exit(3)", Ending.FAILED)],
)
async def test_stdout_closed_early(site: Site, then: str, ending: Ending) -> None:
    """A closed stdout ends no run; the exit does."""
    result, heard, _ = await run(
        site.settings(f"hear(); emit('all'); os.close(1); {then}")
    )

    assert heard == ["all"]
    assert result.ending is ending
    assert result.outputs == 1


async def test_stdout_closed_and_silent(site: Site) -> None:
    """An agent that closes its stdout and stays is stopped as a silent one."""
    agent = "hear(); emit('all'); os.close(1); stay()"

    result, heard, took = await run(site.settings(agent, answer_timeout=1))

    assert heard == ["all"]
    assert facts(result) == ("success", "IDLE", 1, None)
    assert 1 <= took < 10


@pytest.mark.parametrize("stdin", ["lifeline", "eof"])
async def test_stdin_never_read(site: Site, stdin: str) -> None:
    """A prompt that nobody reads holds up no output, no end and no writer."""
    agent = "emit('partly', partial=True); stay()"
    prompt = "x" * (5 * MIB)

    settings = site.settings(agent, answer_timeout=1, stdin=stdin)
    result, heard, took = await run(settings, prompt=prompt)

    assert heard == ["partly"]
    error = "Container timed out after 1 s"
    assert facts(result) == ("error", "TIMED_OUT", 1, error)
    assert result.unanswered == (prompt,)
    assert 1 <= took < 10


@TWO
async def test_stdin_closed(site: Site) -> None:
    """An agent that closes its stdin can answer all the same."""
    agent = "os.read(0, 1); os.close(0); emit('deaf'); time.sleep(0.2)"

    result, heard, _ = await run(site.settings(agent), prompt="x" * (5 * MIB))

    assert heard == ["deaf"]
    assert facts(result) == ("success", "EXITED", 1, None)


def forget_peak() -> None:
    """Have the peak of this process's memory start anew."""
    Path("/proc/self/clear_refs").write_text("5")


async def test_noise(site: Site) -> None:
    """100 MB of noise neither hide an output nor fill the memory."""
    agent = """
hear()
for number in range(100):
    os.write(1, b"-" * 400_000 + b"\\n" * 1000 + b"{" * 599_000)
    os.write(2, b"complaint " * 10_000)
emit("in between")
os.write(1, b"x" * 10_000_000)
emit("at the end")
"""
    settings = site.settings(agent, max_log_bytes=65536, log_text=True)
    forget_peak()
    before = memory("VmRSS")

    result, heard, _ = await run(settings, seconds=60)

    assert heard == ["in between", "at the end"]
    assert facts(result) == ("success", "EXITED", 2, None)
    assert result.stdout_truncated
    assert result.stderr_truncated
    assert memory("VmHWM") - before < 64 * MIB
    assert result.log_path.stat().st_size < 4 * 65536


async def test_large_output_in_small_writes(site: Site) -> None:
    """An output of 8 MiB that comes in writes of 4 KiB is one output."""
    agent = """
hear()
data = json.dumps({"status": "success", "result": "0123456789abcdef" * 2**19}).encode()
os.write(1, b"---NANOCLAW_OUTPUT_START---\\n")
for at in range(0, len(data), 4096):
    part = data[at:at + 4096]
    while part:
        part = part[os.write(1, part):]
os.write(1, b"\\n---NANOCLAW_OUTPUT_END---\\n")
"""
    result, heard, _ = await run(site.settings(agent))

    assert heard == ["0123456789abcdef" * 2**19]
    assert facts(result) == ("success", "EXITED", 1, None)


@TWO
async def test_frame_too_large(site: Site) -> None:
    """A frame over the limit is dropped and counted, and the run goes on."""
    agent = "hear(); emit('x' * 2000); emit('fits')"

    result, heard, _ = await run(site.settings(agent, max_frame_bytes=1000))

    assert heard == ["fits"]
    assert result.dropped_frames == 1
    assert facts(result) == ("success", "EXITED", 1, None)


async def test_grandchild_holds_the_pipes(site: Site) -> None:
    """A grandchild that keeps stdout and stderr open does not keep the run."""
    agent = """
hear()
subprocess.Popen(["sleep", "60"], start_new_session=True)
emit("done")
"""
    result, heard, took = await run(site.settings(agent))

    assert heard == ["done"]
    assert facts(result) == ("success", "EXITED", 1, None)
    assert took < 8


@pytest.mark.parametrize("runtime_name", RUNTIMES[:2], indirect=True)
async def test_out_of_memory(site: Site) -> None:
    """An agent that eats too much is killed, and the failure names the limit."""
    agent = """
hear()
emit("hungry")
eaten = []
while True:
    eaten.append(os.urandom(2**20))
"""
    result, heard, _ = await run(site.settings(agent, memory="64M"))

    assert heard == ["hungry"]
    assert (result.ending, result.exit_code) == (Ending.FAILED, 137)
    assert "out of memory (limit 64 MiB)" in (result.error or "")
