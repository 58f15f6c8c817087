"""What happens in runs, for whoever watches; watching never holds a run up.

No event has a text in it, nor a secret.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import trio

from ._models import Ending, Status


@attrs.frozen(kw_only=True)
class RunEvent:
    """Something that happened in a run.

    Attributes:
        group: The folder of its group.
        run: Its id.
        time: When, in seconds of Trio's clock.
    """

    group: str
    run: str
    time: float


@attrs.frozen(kw_only=True)
class RunStarted(RunEvent):
    """Its client process runs."""


@attrs.frozen(kw_only=True)
class RunOutput(RunEvent):
    """Its agent gave an output, which is about to be delivered.

    Attributes:
        status: The output's.
        partial: Whether it is a part of an answer.
    """

    status: Status
    partial: bool


@attrs.frozen(kw_only=True)
class RunFollowUp(RunEvent):
    """Its agent is asked something more.

    Attributes:
        number: Of the follow-up; the prompt's is 0.
    """

    number: int


@attrs.frozen(kw_only=True)
class RunDeadlineMoved(RunEvent):
    """Its agent has a new deadline for the next sign of life.

    Attributes:
        deadline: In seconds of Trio's clock; ``inf`` while an output is dealt with.
    """

    deadline: float


@attrs.frozen(kw_only=True)
class RunStopping(RunEvent):
    """It is brought to its end from outside.

    Attributes:
        ending: What it ends as.
    """

    ending: Ending


@attrs.frozen(kw_only=True)
class RunEnded(RunEvent):
    """It is over, and its container gone.

    Attributes:
        ending: Why.
        status: Whether it was a success.
    """

    ending: Ending
    status: Status


class Events:
    """Iterates over what happens from now on, until the engine closes.

    Attributes:
        lost: How many events the reader was too slow for: the oldest ones.
    """

    def __init__(self, max_buffer: int) -> None:
        if max_buffer < 1:
            raise ValueError(f"max_buffer must be at least 1, not {max_buffer}")
        self._buffer: deque[RunEvent] = deque(maxlen=max_buffer)
        self._readers = trio.lowlevel.ParkingLot()
        self._closed = False
        self.lost = 0

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> RunEvent:
        await trio.lowlevel.checkpoint()
        while not self._buffer:
            if self._closed:
                raise StopAsyncIteration
            await self._readers.park()
        return self._buffer.popleft()

    # From here on, what only the hub calls.

    def put(self, event: RunEvent) -> None:
        """Add an event, in place of the oldest if there are too many."""
        self.lost += len(self._buffer) == self._buffer.maxlen
        self._buffer.append(event)
        self._readers.unpark_all()

    def close(self) -> None:
        """End the iteration after what is there already."""
        self._closed = True
        self._readers.unpark_all()


class EventHub:
    """Passes on what happens to all who watch."""

    def __init__(self) -> None:
        self._watchers: list[Events] = []
        self._closed = False

    @contextmanager
    def open(self, max_buffer: int) -> Iterator[Events]:
        """Watch for as long as the block takes."""
        events = Events(max_buffer)
        self._watchers.append(events)
        if self._closed:
            events.close()
        try:
            yield events
        finally:
            self._watchers.remove(events)
            events.close()

    def emit(self, make: Callable[[float], RunEvent]) -> None:
        """Tell of an event, made from the time if anybody wants to know."""
        if self._watchers:
            event = make(trio.current_time())
            for events in self._watchers:
                events.put(event)

    def close(self) -> None:
        """End what is being watched."""
        self._closed = True
        for events in self._watchers:
            events.close()
