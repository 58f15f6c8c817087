"""The fakes that bots test with."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from clawtrio import (
    AgentOutput,
    Container,
    ContainerSpec,
    MarkerParser,
    Runtime,
    RuntimeUnavailableError,
)
from clawtrio.testing import AgentPipes, FakeAgent, FakeRuntime, framed, scripted_agent

FRAME = framed(b'{"status":"success","result":"hi"}')


def spec_of(name: str = "clawtrio-family-1f", **labels: str) -> ContainerSpec:
    """Specify a container, labelled clawtrio.<name>."""
    return ContainerSpec(
        name=name,
        labels={f"clawtrio.{label}": value for label, value in labels.items()},
        mounts=(),
        environment={},
        arguments=("echo", "x"),
        uid=1000,
        gid=1000,
        memory=2**30,
        cpus=1.0,
        pids=10,
    )


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Read to the end."""
    return b"".join([bytes(chunk) async for chunk in stream])


async def start(agent: FakeAgent, *, ignores_stop: bool = False) -> Container:
    """Start one container."""
    runtime: Runtime = FakeRuntime(agent, ignores_stop=ignores_stop)
    return await runtime.start(spec_of())


def test_framed_is_what_an_agent_writes() -> None:
    """A framed object is one output, wherever it stands."""
    parser = MarkerParser()
    outputs = [*parser.feed(b"noise" + FRAME + FRAME), *parser.close()]

    assert outputs == [AgentOutput("success", "hi")] * 2


# -- scripted agents -------------------------------------------------------------------


async def test_a_script(autojump_clock: MockClock) -> None:
    """Bytes are written and seconds slept, in order; then it leaves with its code."""
    container = await start(scripted_agent(b"one", 10, b"two", 0.5, exit_code=3))
    assert await container.stdout.receive_some() == b"one"
    assert await container.stdout.receive_some() == b"two"
    assert trio.current_time() == 10

    assert await container.wait() == 3
    assert trio.current_time() == 10.5
    assert await container.stdout.receive_some() == b""


async def test_a_script_that_leaves_with_0(autojump_clock: MockClock) -> None:
    """Zero is an exit code, and not none."""
    container = await start(scripted_agent(exit_code=0))

    with trio.fail_after(1):
        assert await container.wait() == 0


async def test_a_script_without_a_code_stays(autojump_clock: MockClock) -> None:
    """Without an exit code an agent is quiet until it is stopped."""
    container = await start(scripted_agent(b"one"))
    with trio.move_on_after(3600) as scope:
        await container.wait()
    assert scope.cancelled_caught

    await container.kill()
    assert await container.wait() == 137


# -- containers ------------------------------------------------------------------------


async def test_an_agent_has_pipes_and_its_container_s_spec(
    autojump_clock: MockClock,
) -> None:
    """An agent reads what the engine writes, and writes to both outputs."""

    async def agent(pipes: AgentPipes) -> int:
        words = await pipes.stdin.receive_some()
        await pipes.stdout.send_all(words.upper())
        await pipes.stderr.send_all(pipes.spec.name.encode())
        assert await pipes.stdin.receive_some() == b""
        return 5

    container = await start(agent)
    await container.stdin.send_all(b"words")
    assert await container.stdout.receive_some() == b"WORDS"
    await container.stdin.aclose()

    assert await read_all(container.stdout) == b""
    assert await read_all(container.stderr) == b"clawtrio-family-1f"
    assert await container.wait() == 5
    assert await container.wait() == 5


async def test_an_agent_that_raises_has_crashed(autojump_clock: MockClock) -> None:
    """A traceback on stderr and the code 1 are what is left of a bug."""

    async def agent(pipes: AgentPipes) -> int:
        await pipes.stdout.send_all(b"one")
        return 1 // 0

    container = await start(agent)

    assert await container.wait() == 1
    assert await read_all(container.stdout) == b"one"
    assert b"ZeroDivisionError" in await read_all(container.stderr)


@pytest.mark.parametrize("theirs", [True, False])
async def test_an_agent_that_cannot_even_complain(
    autojump_clock: MockClock, *, theirs: bool
) -> None:
    """A crash after stderr was closed, by either side, crashes nothing else."""

    async def agent(pipes: AgentPipes) -> int:
        if theirs:
            await pipes.stderr.aclose()
        await trio.sleep(1)
        raise ValueError

    container = await start(agent)
    await wait_all_tasks_blocked()
    if not theirs:
        await container.aclose()

    assert await container.wait() == 1


async def test_an_agent_whose_tasks_crash_when_it_is_stopped(
    autojump_clock: MockClock,
) -> None:
    """What goes wrong in an agent's nursery while it dies stays in the agent."""

    async def task() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError

    async def agent(pipes: AgentPipes) -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            await trio.sleep_forever()
        raise AssertionError

    container = await start(agent)
    await wait_all_tasks_blocked()
    await container.kill()

    assert await container.wait() == 137
    assert b"ValueError" in await read_all(container.stderr)


async def test_stopping(autojump_clock: MockClock) -> None:
    """SIGTERM ends an agent; the rest of the grace passes in vain."""
    container = await start(scripted_agent(b"one"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(container.stop, 10)
        assert await container.wait() == 143
        assert trio.current_time() == 0

    assert trio.current_time() == 10
    assert await container.wait() == 143


async def test_an_agent_that_ignores_stopping_is_killed_after_its_grace(
    autojump_clock: MockClock,
) -> None:
    """SIGKILL follows SIGTERM as with any runtime."""
    container = await start(scripted_agent(), ignores_stop=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(container.stop, 10)
        assert await container.wait() == 137

    assert trio.current_time() == 10


async def test_an_agent_may_clean_up_when_it_is_stopped(
    autojump_clock: MockClock,
) -> None:
    """Being stopped is a cancellation, in which an agent can have last words."""

    async def agent(pipes: AgentPipes) -> int:
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(5, shield=True):
                await trio.sleep(3)
                await pipes.stdout.send_all(b"last words")

    container = await start(agent)
    await wait_all_tasks_blocked()
    with trio.move_on_after(1):
        await container.stop(10)

    assert await read_all(container.stdout) == b"last words"
    assert await container.wait() == 143
    assert trio.current_time() == 3


async def test_killing_the_client_ends_the_agent(autojump_clock: MockClock) -> None:
    """A fake container and its client are one."""
    container = await start(scripted_agent(), ignores_stop=True)
    container.kill_client()
    assert await container.wait() == 137
    container.kill_client()
    await container.kill()
    await container.stop(0)

    assert await container.wait() == 137


async def test_an_agent_that_left_is_not_killed(autojump_clock: MockClock) -> None:
    """Its code stays its own."""
    container = await start(scripted_agent(exit_code=4))
    await container.wait()
    container.kill_client()

    assert await container.wait() == 4


async def test_a_fake_container_always_starts(autojump_clock: MockClock) -> None:
    """Nothing is mounted that could be another place, and no code is a client's."""
    container = await start(scripted_agent(exit_code=125))
    await container.verify()
    code = await container.wait()

    assert container.start_failure(code, "docker: no such image") is None


async def test_a_container_outlives_who_started_it(autojump_clock: MockClock) -> None:
    """As with a real one, cancelling the task that started it does not end it."""
    runtime = FakeRuntime(scripted_agent())
    with trio.CancelScope() as scope:
        await runtime.start(spec_of())
        scope.cancel()
    await trio.sleep(100)
    (found,) = await runtime.find({})

    await runtime.remove(found.id)


async def test_a_closed_container_gives_back_its_pipes(
    autojump_clock: MockClock,
) -> None:
    """After aclose() the agent sees the end of its stdin."""
    ended = trio.Event()

    async def agent(pipes: AgentPipes) -> int:
        assert await pipes.stdin.receive_some() == b""
        ended.set()
        return 0

    container = await start(agent)
    await container.aclose()
    with trio.fail_after(1):
        await ended.wait()

    assert await container.wait() == 0


# -- the runtime -----------------------------------------------------------------------


async def test_a_fake_runtime_is_a_runtime(autojump_clock: MockClock) -> None:
    """It is there, says what it would run, and remembers what it ran."""
    runtime = FakeRuntime(scripted_agent(exit_code=0))
    checked: Runtime = runtime
    await checked.check()

    assert checked.name == "fake"
    assert checked.in_process
    assert checked.takes_runner
    assert checked.compares_mounts
    assert checked.argv(spec_of()) == ("clawtrio-family-1f", "echo", "x")
    assert runtime.specs == []
    for name in ("a", "b"):
        await (await runtime.start(spec_of(name))).wait()
    assert runtime.specs == [spec_of("a"), spec_of("b")]


async def test_containers_are_found_by_their_labels(autojump_clock: MockClock) -> None:
    """All labels must fit; a container that left is not found."""
    runtime = FakeRuntime(scripted_agent(10, exit_code=0))
    for name, labels in {
        "a": {"root": "r", "run": "1"},
        "b": {"root": "r", "run": "2"},
        "c": {"root": "s"},
    }.items():
        await runtime.start(spec_of(name, **labels))

    async def names(**labels: str) -> list[str]:
        found = await runtime.find({f"clawtrio.{n}": v for n, v in labels.items()})
        return [container.id for container in found]

    assert await names() == ["a", "b", "c"]
    assert await names(root="r") == ["a", "b"]
    assert await names(root="r", run="2") == ["b"]
    assert await names(root="s", run="2") == []
    (found,) = await runtime.find({"clawtrio.run": "1"})
    assert found.labels == {"clawtrio.root": "r", "clawtrio.run": "1"}
    await trio.sleep(10)
    await wait_all_tasks_blocked()
    assert await names() == []


async def test_removing(autojump_clock: MockClock) -> None:
    """Removing kills; one that is gone is no error."""
    runtime = FakeRuntime(scripted_agent(), ignores_stop=True)
    container = await runtime.start(spec_of("a"))
    await runtime.remove("a")

    assert await container.wait() == 137
    assert await runtime.find({}) == []
    await runtime.remove("a")
    await runtime.remove("never was")


async def test_no_network_of_its_own() -> None:
    """Opening and closing one does nothing; a port inside, or a gateway, there is not.

    An agent that is a task would find the port on the real host, where all see it.
    """
    runtime = FakeRuntime(scripted_agent(exit_code=0))
    labels = {"clawtrio.root": "r", "clawtrio.engine": "e"}
    await runtime.open_network(labels)
    await runtime.close_network(labels)
    container = await runtime.start(spec_of())

    with pytest.raises(RuntimeUnavailableError, match="docker, podman or bwrap"):
        await runtime.gateway(labels)
    with pytest.raises(RuntimeUnavailableError, match="no network of their own"):
        await container.listen(4000)
    await container.wait()


NETWORK = ("open_network", "close_network", "gateway")


@pytest.mark.parametrize("method", ["check", "find", "remove", "start", *NETWORK])
async def test_every_method_is_a_checkpoint(
    autojump_clock: MockClock, method: str
) -> None:
    """Whoever is cancelled is cancelled in a fake, too, and nothing is begun."""
    runtime = FakeRuntime(scripted_agent())
    with trio.CancelScope() as scope:
        scope.cancel()
        match method:
            case "check":
                await runtime.check()
            case "find":
                await runtime.find({})
            case "remove":
                await runtime.remove("x")
            case "start":
                await runtime.start(spec_of())
            case _:
                await getattr(runtime, method)({})

    assert scope.cancelled_caught
    assert await runtime.find({}) == []
