"""Outputs on their way to whoever asks for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from clawtrio import AgentOutput
from clawtrio._handover import Handover


def numbered(number: int) -> AgentOutput:
    """Make an output that can be told from others."""
    return AgentOutput("success", f"{number}")


async def in_a_task_of_its_own(fn: Callable[[], Awaitable[object]]) -> None:
    """Have a task come and go."""
    gone = trio.Event()

    async def task() -> None:
        await fn()
        gone.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        await gone.wait()


class Agent:
    """Gives outputs, and notes when each was dealt with."""

    def __init__(self, handover: Handover, count: int) -> None:
        self.handover = handover
        self.count = count
        self.dealt_with: list[float] = []

    async def run(self) -> None:
        """Give them all, then end."""
        for number in range(self.count):
            await self.handover.give(numbered(number))
            self.dealt_with.append(trio.current_time())
        self.handover.close()


async def take_all(handover: Handover, seconds: float = 0.0) -> list[str | None]:
    """Take outputs to the end, and be busy with each for a while."""
    taken: list[str | None] = []
    while True:
        try:
            output = await handover.take()
        except trio.EndOfChannel:
            return taken
        taken.append(output.result)
        await trio.sleep(seconds)


@pytest.mark.parametrize("late", [0, 5])
async def test_an_output_is_dealt_with_when_the_next_is_asked_for(
    autojump_clock: MockClock, late: int
) -> None:
    """However late the first is asked for, each is over when its callback is."""
    handover = Handover()
    agent = Agent(handover, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        await trio.sleep(late)
        taken = await take_all(handover, 10)

    assert taken == ["0", "1", "2"]
    assert agent.dealt_with == [late + 10, late + 20, late + 30]
    assert handover.begun == 3


async def test_a_taker_waits_for_an_output(autojump_clock: MockClock) -> None:
    """Who asks early gets each output at once, and is waited for all the same."""
    handover = Handover()
    taken: list[tuple[float, str | None]] = []

    async def consume() -> None:
        for _ in range(2):
            taken.append((trio.current_time(), (await handover.take()).result))
            await trio.sleep(10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        await trio.sleep(1)
        await handover.give(numbered(0))
        assert trio.current_time() == 11
        await trio.sleep(1)
        nursery.start_soon(handover.give, numbered(1))
        await trio.sleep(20)
        nursery.cancel_scope.cancel()

    assert [number for _, number in taken] == ["0", "1"]


async def test_a_second_iterator_is_refused(autojump_clock: MockClock) -> None:
    """While one task asks, another one is told so, and the first is not disturbed."""
    handover = Handover()
    taken: list[str | None] = []

    async def consume() -> None:
        taken.append((await handover.take()).result)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await handover.take()
        nursery.start_soon(handover.give, numbered(0))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert taken == ["0"]


async def test_one_iterator_after_another(autojump_clock: MockClock) -> None:
    """Outputs may be asked for from one task, then from another one."""
    handover = Handover()
    taken: list[str | None] = []

    async def consume() -> None:
        taken.append((await handover.take()).result)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Agent(handover, 3).run)
        for _ in range(3):
            await in_a_task_of_its_own(consume)
        with pytest.raises(trio.EndOfChannel):
            await handover.take()

    assert taken == ["0", "1", "2"]


async def test_a_cancelled_taker_loses_nothing(autojump_clock: MockClock) -> None:
    """Who gives up asking has not got the output that comes next."""
    handover = Handover()
    agent = Agent(handover, 2)
    with trio.move_on_after(5) as scope:
        await handover.take()
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        assert (await handover.take()).result == "0"
        with trio.CancelScope() as scope:
            scope.cancel()
            await handover.take()
        assert scope.cancelled_caught
        taken = await take_all(handover)

    assert taken == ["1"]
    assert handover.begun == 2


async def test_a_taker_that_is_cancelled_as_the_output_comes(
    autojump_clock: MockClock,
) -> None:
    """An output that was handed over arrives, though its taker is being cancelled."""
    handover = Handover()
    taken: list[str | None] = []
    scope = trio.CancelScope()

    async def consume() -> None:
        with scope:
            taken.append((await handover.take()).result)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        await wait_all_tasks_blocked()
        nursery.start_soon(handover.give, numbered(0))
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert len(taken) == handover.begun == 1


async def test_without_a_waiter_an_output_waits(autojump_clock: MockClock) -> None:
    """Nothing is discarded as long as somebody may still come and ask."""
    handover = Handover()
    with trio.move_on_after(3600) as scope:
        await handover.give(numbered(0))

    assert scope.cancelled_caught
    assert handover.begun == 0


async def test_a_waiter_lets_go_of_what_nobody_asks_for(
    autojump_clock: MockClock,
) -> None:
    """Who only waits for the end has no use for outputs, those on offer included."""
    handover = Handover()
    agent = Agent(handover, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        await trio.sleep(5)
        assert agent.dealt_with == []
        with handover.waiting():
            await wait_all_tasks_blocked()

    assert agent.dealt_with == [5, 5, 5]
    assert handover.begun == 0


async def test_a_waiter_discards_only_while_it_waits(autojump_clock: MockClock) -> None:
    """Who gave up waiting can ask again, for what came since."""
    handover = Handover()
    with handover.waiting():
        await handover.give(numbered(0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handover.give, numbered(1))
        output = await handover.take()
        nursery.cancel_scope.cancel()

    assert output.result == "1"


async def test_a_waiter_leaves_the_iterator_its_outputs(
    autojump_clock: MockClock,
) -> None:
    """While one task iterates, slowly, another one that waits takes nothing away."""
    handover = Handover()
    over = trio.Event()
    taken: list[str | None] = []

    async def wait() -> None:
        with handover.waiting():
            await over.wait()

    async def iterate() -> None:
        taken.extend(await take_all(handover, 10))
        over.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(iterate)
        await wait_all_tasks_blocked()
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        nursery.start_soon(Agent(handover, 3).run)

    assert taken == ["0", "1", "2"]


async def test_to_break_and_then_wait_discards_the_rest(
    autojump_clock: MockClock,
) -> None:
    """A task that left its loop and waits for the end will not ask again."""
    handover = Handover()
    agent = Agent(handover, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        assert (await handover.take()).result == "0"
        await trio.sleep(5)
        with handover.waiting():
            await wait_all_tasks_blocked()

    assert agent.dealt_with == [5, 5, 5]
    assert handover.begun == 1


async def test_a_taker_that_died_will_not_ask_again(autojump_clock: MockClock) -> None:
    """With its task gone, a loop's outputs go, if only somebody waits."""
    handover = Handover()
    agent = Agent(handover, 2)

    async def take_one() -> None:
        await handover.take()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        await in_a_task_of_its_own(take_one)
        await trio.sleep(5)
        assert agent.dealt_with == []
        with handover.waiting():
            await wait_all_tasks_blocked()

    assert agent.dealt_with == [5, 5]
    assert handover.begun == 1


async def test_a_taker_that_dies_while_somebody_waits(
    autojump_clock: MockClock,
) -> None:
    """A waiter that looks again now and then finds that the iterating task died."""
    handover = Handover()
    agent = Agent(handover, 2)

    async def take_one() -> None:
        await handover.take()
        await trio.sleep(5)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_one)
        await wait_all_tasks_blocked()
        nursery.start_soon(agent.run)
        with handover.waiting():
            await trio.sleep(4)
            handover.discard_if_unwanted()
            await wait_all_tasks_blocked()
            assert agent.dealt_with == []
            await trio.sleep(2)
            handover.discard_if_unwanted()
            await wait_all_tasks_blocked()

    assert agent.dealt_with == [6, 6]


async def test_several_may_wait(autojump_clock: MockClock) -> None:
    """As long as one of them waits, outputs that nobody asks for can go."""
    handover = Handover()
    with handover.waiting():
        with handover.waiting():
            pass
        await handover.give(numbered(0))

    assert handover.begun == 0


@pytest.mark.parametrize("handed_over", [False, True])
async def test_who_leaves_gets_nothing_more(
    autojump_clock: MockClock, *, handed_over: bool
) -> None:
    """After abandon() outputs are discarded, the one under way as well."""
    handover = Handover()
    agent = Agent(handover, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        if handed_over:
            await handover.take()
        await trio.sleep(5)
        handover.abandon()

    assert agent.dealt_with == [5, 5, 5]
    assert handover.begun == handed_over


async def test_the_end_is_told_to_whoever_asks(autojump_clock: MockClock) -> None:
    """Closing ends a taker that waits, and each that comes later."""
    handover = Handover()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_all, handover)
        await wait_all_tasks_blocked()
        handover.close()
    with pytest.raises(trio.EndOfChannel):
        await handover.take()
