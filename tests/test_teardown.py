"""How a container is brought down, and what is done about one that will not go."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import pytest
import trio
from trio.testing import MockClock, memory_stream_one_way_pair, wait_all_tasks_blocked

from clawtrio import (
    Container,
    ContainerSpec,
    FoundContainer,
    RuntimeUnavailableError,
    Settings,
)
from clawtrio._run import RunLogger
from clawtrio._teardown import Janitor, Supervised, bring_down

GRACE, TIMEOUT = 10, 15
BOUND = GRACE + 3 * TIMEOUT
SETTINGS = Settings(stop_grace=GRACE, command_timeout=TIMEOUT)
LOG = RunLogger(logging.getLogger("clawtrio.test"), {"group": "family", "run": "1f"})

Act = Callable[[], Awaitable[object]]


async def works() -> None:
    """Do what was asked, and have it done."""
    await trio.lowlevel.checkpoint()


async def hangs() -> None:
    """Never come to an end."""
    await trio.sleep_forever()


async def fails() -> None:
    """Say why it cannot be done."""
    await trio.lowlevel.checkpoint()
    raise RuntimeUnavailableError("fake", "the daemon\nis down", "Start it.")


async def breaks() -> None:
    """Fail as the operating system does."""
    await trio.lowlevel.checkpoint()
    raise OSError(5, "Input/output error")


async def nothing() -> None:
    """Say that it was done, to no effect."""
    await trio.lowlevel.checkpoint()


class World:
    """One container, its client, and the runtime: only what each test lets work works.

    Args:
        acts: What the methods do, by name. Those that are ``works`` have the effect
            that they should have.
        in_process: Whether the container is a task of ours.
    """

    name = "fake"
    takes_runner = True
    compares_mounts = True
    process = None

    def __init__(self, *, in_process: bool = False, **acts: Act) -> None:
        self.in_process = in_process
        self.acts = dict.fromkeys(("stop", "kill", "find", "remove"), nothing) | acts
        self.calls: list[tuple[str, float]] = []
        self.there = True
        self.client = trio.Event()
        self.code = 0
        self.immortal = False
        self.stdin, self.agent_stdin = memory_stream_one_way_pair()
        self.agent_stdout, self.stdout = memory_stream_one_way_pair()
        self.agent_stderr, self.stderr = memory_stream_one_way_pair()

    @property
    def order(self) -> list[str]:
        """What was called, but for looks."""
        return [name for name, _ in self.calls if name != "find"]

    @property
    def looks(self) -> list[float]:
        """When it was looked for."""
        return [when for name, when in self.calls if name == "find"]

    async def _act(self, name: str) -> None:
        self.calls.append((name, trio.current_time()))
        await self.acts[name]()

    def end(self, code: int) -> None:
        """End container and client."""
        self.there = False
        self.end_client(code)

    def end_client(self, code: int) -> None:
        """End the client alone."""
        if not self.client.is_set():
            self.code = code
            self.client.set()

    # A container.

    async def verify(self) -> None:
        raise NotImplementedError

    async def listen(self, port: int) -> trio.SocketListener:
        raise NotImplementedError

    async def wait(self) -> int:
        await self.client.wait()
        return self.code

    async def stop(self, grace: float) -> None:
        assert grace == GRACE
        await self._act("stop")
        if self.acts["stop"] is works:
            self.end(143)

    async def kill(self) -> None:
        await self._act("kill")
        if self.acts["kill"] is works:
            self.end(137)

    def kill_client(self) -> None:
        self.calls.append(("kill_client", trio.current_time()))
        if not self.immortal:
            self.end_client(137)

    def start_failure(self, exit_code: int, stderr: str) -> str | None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    # A runtime.

    async def check(self) -> None:
        raise NotImplementedError

    async def open_network(self, labels: Mapping[str, str]) -> None:
        raise NotImplementedError(labels)

    async def close_network(self, labels: Mapping[str, str]) -> None:
        raise NotImplementedError

    async def gateway(self, labels: Mapping[str, str]) -> tuple[str, str]:
        raise NotImplementedError(labels)

    def argv(self, spec: ContainerSpec) -> Sequence[str]:
        raise NotImplementedError

    async def start(self, spec: ContainerSpec) -> Container:
        raise NotImplementedError

    async def find(self, labels: Mapping[str, str]) -> Sequence[FoundContainer]:
        await self._act("find")
        assert labels in ({"clawtrio.run": "1f"}, {"clawtrio.engine": "e"})
        has = {"clawtrio.run": "1f", "clawtrio.engine": "e"}
        return [FoundContainer("id\n1", has)] if self.there else []

    async def remove(self, container_id: str) -> None:
        assert container_id == "id\n1"
        await self._act("remove")
        if self.acts["remove"] is works:
            self.end(137)


async def down(world: World) -> tuple[bool, float, Supervised]:
    """Bring it down; say whether it is gone, and how long it took."""
    supervised = Supervised(world)
    started = trio.current_time()
    with trio.fail_after(10 * BOUND):
        gone = await bring_down(supervised, world, "1f", SETTINGS, LOG)
    return gone, trio.current_time() - started, supervised


# -- the ladder ------------------------------------------------------------------------


async def test_an_agent_that_sees_its_lifeline_end_leaves_first(
    autojump_clock: MockClock,
) -> None:
    """Closing stdin comes before any signal, and may be enough."""
    world = World(stop=hangs)

    async def leave() -> None:
        assert await world.agent_stdin.receive_some() == b""
        world.end(0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        gone, seconds, supervised = await down(world)

    assert gone
    assert supervised.exit_code == 0
    assert world.order in (["stop", "kill_client"], ["kill_client"])
    # Twice absent, half a second apart.
    assert seconds == 0.5


@pytest.mark.parametrize(("in_process", "looks"), [(False, 2), (True, 1)])
async def test_a_container_that_stops(
    autojump_clock: MockClock, *, in_process: bool, looks: int
) -> None:
    """After the first rung that works it is only looked for: twice, if it is real."""
    world = World(in_process=in_process, stop=works)

    gone, seconds, supervised = await down(world)

    assert gone
    assert supervised.exit_code == 143
    assert world.order == ["stop", "kill_client"]
    assert world.looks == [n * 0.5 + world.looks[0] for n in range(looks)]
    assert seconds == 0.5 * (looks - 1)


@pytest.mark.parametrize("stop", [nothing, fails, breaks])
async def test_kill_follows_a_stop_that_was_not_enough(
    autojump_clock: MockClock, stop: Act
) -> None:
    """A stop that fails, or has no effect, does not hold up the next rung for long."""
    gone, seconds, supervised = await down(world := World(stop=stop, kill=works))

    assert gone
    assert supervised.exit_code == 137
    assert world.order == ["stop", "kill", "kill_client"]
    assert seconds == 1 + 0.5


async def test_a_stop_that_hangs_is_given_up(autojump_clock: MockClock) -> None:
    """A stop has the agent's grace and a command's time, a kill the latter."""
    world = World(stop=hangs, kill=hangs, remove=works)

    gone, seconds, supervised = await down(world)

    assert gone
    assert supervised.exit_code == 137
    assert [when for name, when in world.calls if name != "kill_client"][:3] == [
        0,
        GRACE + TIMEOUT,
        GRACE + 2 * TIMEOUT,
    ]
    assert seconds == GRACE + 2 * TIMEOUT + 0.5


ACTS = [works, nothing, fails, breaks, hangs]


@pytest.mark.parametrize("find", [nothing, fails, hangs], ids=lambda act: act.__name__)
@pytest.mark.parametrize(
    ("stop", "kill", "remove"),
    list(itertools.product(ACTS, repeat=3)),
    ids=lambda act: act.__name__,
)
@pytest.mark.parametrize("immortal", [False, True])
async def test_whatever_hangs_or_fails_it_ends_in_time(
    autojump_clock: MockClock,
    *,
    stop: Act,
    kill: Act,
    remove: Act,
    find: Act,
    immortal: bool,
) -> None:
    """Within stop_grace + 3 command_timeout, and a second for our client to be reaped.

    What is gone is known to be gone; what may be there is never said to be gone; and
    our client does not outlive it.
    """
    world = World(stop=stop, kill=kill, remove=remove, find=find)
    world.immortal = immortal

    gone, seconds, supervised = await down(world)

    assert seconds <= BOUND + 1
    assert not (gone and world.there)
    if find is nothing:
        assert gone is (works in {stop, kill, remove})
    assert world.order[-1] == "kill_client"
    assert (supervised.exit_code is None) is (not world.client.is_set())
    assert world.client.is_set() or immortal


async def test_cancelling_changes_nothing(autojump_clock: MockClock) -> None:
    """A container is brought down in order, though the engine is being cancelled."""
    world = World(stop=works)
    with trio.CancelScope() as scope:
        scope.cancel()
        gone, _, supervised = await down(world)

    assert gone
    assert supervised.exit_code == 143


async def test_a_container_that_outlives_its_client_is_removed(
    autojump_clock: MockClock,
) -> None:
    """The client's exit is not taken for the container's."""
    world = World(remove=works)

    async def stop() -> None:
        await trio.lowlevel.checkpoint()
        world.end_client(0)

    world.acts["stop"] = stop
    gone, seconds, supervised = await down(world)

    assert gone
    assert supervised.exit_code == 0
    assert world.order == ["stop", "remove", "kill_client"]
    assert seconds == 1.0


async def test_a_container_that_appears_late_is_found(
    autojump_clock: MockClock,
) -> None:
    """A client that is killed during create leaves a container half a second later."""
    world = World(stop=works, remove=works)
    world.there = False

    async def appear() -> None:
        world.there = len(world.looks) == 2
        await trio.lowlevel.checkpoint()

    world.acts["find"] = appear
    gone, _, _ = await down(world)

    assert gone
    assert world.order == ["stop", "remove", "kill_client"]
    assert world.looks == [0, 0.5, 1.0, 1.5]


async def test_an_absence_before_it_appeared_does_not_count(
    autojump_clock: MockClock,
) -> None:
    """Though removing it fails once, it has to be twice absent after it was seen."""
    world = World(stop=works)
    there = iter([False, True, False, True, False, False])

    async def look() -> None:
        world.there = next(there)
        await trio.lowlevel.checkpoint()

    world.acts["find"] = look
    world.acts["remove"] = fails
    gone, _, _ = await down(world)

    assert gone
    assert len(world.looks) == 6


async def test_a_look_that_fails_is_repeated(autojump_clock: MockClock) -> None:
    """A daemon that is busy for a moment is asked again."""
    world = World(stop=works)
    answers = iter([fails, breaks, nothing, nothing])

    async def look() -> None:
        await next(answers)()

    world.acts["find"] = look
    gone, _, _ = await down(world)

    assert gone
    assert len(world.looks) == 4


async def test_a_client_without_a_container_is_killed(
    autojump_clock: MockClock,
) -> None:
    """When no rung brought the client to exit, it is killed, and its code known."""
    world = World()
    world.there = False

    gone, _, supervised = await down(world)

    assert gone
    assert supervised.exit_code == 137


async def test_what_goes_wrong_is_a_warning_in_one_line(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Each rung that was not enough is told, with its run, whatever a daemon says."""
    world = World(stop=fails, kill=hangs, remove=works, find=fails)

    await down(world)

    said = [record.getMessage() for record in caplog.records]
    assert any("stop failed: fake: the daemon\\nis down" in text for text in said)
    assert any("kill hangs" in text for text in said)
    assert all(text.startswith("[family 1f] ") for text in said)
    assert not any("\n" in text for text in said)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


async def test_a_bug_of_a_runtime_comes_out(autojump_clock: MockClock) -> None:
    """What no runtime may raise comes out, and the client is killed all the same."""

    async def bug() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    world = World(stop=bug)
    with pytest.raises((ZeroDivisionError, ExceptionGroup)):
        await down(world)

    assert world.client.is_set()


# -- the janitor -----------------------------------------------------------------------


class Crowd(World):
    """A runtime with any number of containers."""

    def __init__(self, **containers: Act) -> None:
        super().__init__()
        self.containers = dict(containers)

    async def find(self, labels: Mapping[str, str]) -> Sequence[FoundContainer]:
        await self._act("find")
        assert labels == {"clawtrio.engine": "e"}
        return [
            FoundContainer(f"id-{run}", {"clawtrio.run": run, "clawtrio.engine": "e"})
            for run in self.containers
        ]

    async def remove(self, container_id: str) -> None:
        run = container_id.removeprefix("id-")
        self.calls.append((run, trio.current_time()))
        act = self.containers[run]
        await act()
        if act is works:
            del self.containers[run]


async def cleaned(
    world: World, *suspects: str, insist: bool = True, busy: float = 0
) -> tuple[bool, float]:
    """Have a janitor look for suspects, then finish; say how it went, and how long."""
    janitor = Janitor(world, "e", TIMEOUT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(janitor.work)
        await wait_all_tasks_blocked()
        for run_id in suspects:
            janitor.look_for(run_id, insist=insist)
        await trio.sleep(busy)
        started = trio.current_time()
        with trio.fail_after(10 * BOUND):
            clean = await janitor.finish()
        seconds = trio.current_time() - started
        nursery.cancel_scope.cancel()
    return clean, seconds


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """List the records of level ERROR."""
    found: list[str] = []
    yield found
    assert [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR
    ] == found


async def test_a_janitor_without_work_is_done(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    """Nothing was left, nothing is looked for."""
    assert await cleaned(world := World()) == (True, 0)
    assert world.looks == []


@pytest.mark.parametrize(("insist", "looks"), [(False, 1), (True, 2)])
async def test_a_janitor_looks_as_often_as_need_be(
    autojump_clock: MockClock, errors: list[str], *, insist: bool, looks: int
) -> None:
    """After an ordinary exit one look is enough, else it is twice absent."""
    world = World()
    world.there = False

    assert await cleaned(world, "1f", insist=insist) == (True, 0.5 * (looks - 1))
    assert world.looks == [0.5 * n for n in range(looks)]


@pytest.mark.parametrize("insist", [False, True])
async def test_a_janitor_removes_what_is_left(
    autojump_clock: MockClock, errors: list[str], *, insist: bool
) -> None:
    """What is still there is removed, then has to be twice absent."""
    world = World(remove=works)

    assert await cleaned(world, "1f", insist=insist) == (True, 1.0)
    assert world.looks == [0, 0.5, 1.0]
    assert world.order == ["remove"]


@pytest.mark.parametrize(
    "acts",
    [
        {"find": fails},
        {"find": breaks},
        {"find": hangs},
        {"remove": nothing},
        {"remove": fails},
        {"remove": hangs},
    ],
    ids=lambda acts: "-".join(f"{name}-{act.__name__}" for name, act in acts.items()),
)
async def test_a_janitor_that_cannot_finish_says_what_is_left(
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    errors: list[str],
    acts: dict[str, Act],
) -> None:
    """Leaving takes command_timeout at most; then one ERROR names what is left."""
    world = World()
    world.acts.update(acts)
    clean, seconds = await cleaned(world, "1f", busy=100)

    errors += [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert not clean
    assert seconds == TIMEOUT
    assert len(errors) == 1
    assert "1f" in errors[0]
    assert "fake" in errors[0]
    messages = [record.getMessage() for record in caplog.records]
    assert ("janitor: fake does not answer" in messages) == (hangs in acts.values())
    assert not any("\n" in message for message in messages)


async def test_what_is_left_is_called_by_its_name(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The ERROR names containers as docker ps does, so that they can be removed."""
    janitor = Janitor(World(), "e", TIMEOUT)
    janitor.look_for("1f", "clawtrio-family-1f", insist=True)
    janitor.look_for("2f", "clawtrio-other-2f", insist=True)

    assert not await janitor.finish()
    (record,) = caplog.records
    assert "clawtrio-family-1f, clawtrio-other-2f" in record.getMessage()


@pytest.mark.parametrize("first", [hangs, fails, breaks], ids=lambda act: act.__name__)
async def test_one_that_is_stuck_does_not_hold_up_the_others(
    autojump_clock: MockClock, first: Act
) -> None:
    """Each is removed, whatever becomes of those before it."""
    world = Crowd(a=first, b=works, c=works)

    clean, _ = await cleaned(world, "a", "b", "c")

    assert not clean
    assert world.containers.keys() == {"a"}


async def test_live_runs_are_left_alone(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    """Only what it was told to look for is removed."""
    world = Crowd(live=works, left=works)

    clean, _ = await cleaned(world, "left")

    assert clean
    assert world.containers.keys() == {"live"}


async def test_a_janitor_is_told_of_more_while_it_looks(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    """A suspect that comes during a look is not judged by that look."""
    world = Crowd()

    async def slow() -> None:
        await trio.sleep(1)

    world.acts["find"] = slow
    janitor = Janitor(world, "e", TIMEOUT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(janitor.work)
        janitor.look_for("a")
        await trio.sleep(0.5)
        janitor.look_for("b")
        assert await janitor.finish()
        nursery.cancel_scope.cancel()

    assert world.looks == [0, 1.5]


async def test_a_janitor_waits_for_more_work(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    """It looks whenever there is something to look for, and not in between."""
    world = World()
    world.there = False
    janitor = Janitor(world, "e", TIMEOUT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(janitor.work)
        for _ in range(3):
            await trio.sleep(100)
            janitor.look_for("1f")
        assert await janitor.finish()
        nursery.cancel_scope.cancel()

    assert world.looks == [100, 200, 300]


async def test_a_cancelled_engine_s_janitor_goes_on(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    """When all is cancelled there is most to look for; it is done, and soon."""
    world = World(remove=works)
    janitor = Janitor(world, "e", TIMEOUT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(janitor.work)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        janitor.look_for("1f", insist=True)
        assert await janitor.finish()

    assert not world.there
    assert trio.current_time() < 2


async def test_a_janitor_ends_when_it_is_finished(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    """Nobody has to cancel it."""
    janitor = Janitor(World(), "e", TIMEOUT)
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(janitor.work)
            await wait_all_tasks_blocked()
            assert await janitor.finish()


async def test_a_janitor_is_patient_with_a_runtime_that_is_down(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    """It asks ever less often, but soon again when the engine is about to close."""
    world = World()
    world.there = False
    world.acts["find"] = fails
    janitor = Janitor(world, "e", TIMEOUT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(janitor.work)
        janitor.look_for("1f")
        await trio.sleep(100)
        assert world.looks == [0, 1, 3, 7, 15, 31, 61, 91]
        world.acts["find"] = nothing
        assert await janitor.finish()

    assert trio.current_time() == 100.5
