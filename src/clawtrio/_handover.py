"""Outputs on their way from a run to whoever asks for them: one at a time.

A memory channel's ``send()`` returns when a value has been handed over, not when the
receiver has dealt with it; here an output is dealt with once the receiver asks for the
next one. And there may be no receiver: an output that nobody will ever ask for must
not hold up the run's end.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from ._models import AgentOutput


class Handover:
    """A rendezvous with an acknowledgement."""

    def __init__(self) -> None:
        # With each output goes the event by which it, and no other, is dealt with.
        self._send, self._receive = trio.open_memory_channel[
            tuple[AgentOutput, trio.Event]
        ](0)
        self._dealt_with = trio.Event()
        self._giving = trio.CancelScope()
        self._taker: trio.lowlevel.Task | None = None
        self._taking = False
        self._waiters = 0
        self._abandoned = False
        self.begun = 0
        """How many outputs were handed over."""

    async def give(self, output: AgentOutput) -> None:
        """Hand an output over, and return once it has been dealt with or discarded."""
        dealt_with = trio.Event()
        with trio.CancelScope() as self._giving:
            self.discard_if_unwanted()
            await self._send.send((output, dealt_with))
            self.begun += 1
            await dealt_with.wait()

    async def take(self) -> AgentOutput:
        """Return the next output; the one before has been dealt with.

        Raises:
            trio.EndOfChannel: If there are no more.
            trio.BusyResourceError: If someone else is asking.
        """
        if self._taking:
            raise trio.BusyResourceError("another task iterates over this run")
        self._taker = trio.lowlevel.current_task()
        self._taking = True
        self._dealt_with.set()
        try:
            output, self._dealt_with = await self._receive.receive()
        finally:
            self._taking = False
        return output

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Be someone who waits for the end: outputs that nobody asks for can go."""
        if self._taker is trio.lowlevel.current_task():
            # Who waits has left the loop over the outputs.
            self._taker = None
        self._waiters += 1
        self.discard_if_unwanted()
        try:
            yield
        finally:
            self._waiters -= 1

    def abandon(self) -> None:
        """Discard what comes: nobody will ask again."""
        self._abandoned = True
        self._giving.cancel()

    def close(self) -> None:
        """End the outputs."""
        self._send.close()

    def discard_if_unwanted(self) -> None:
        """Let go of an output that is on offer, if nobody will take it."""
        if self._abandoned or (self._waiters and not self._may_be_asked_for()):
            self._giving.cancel()

    def _may_be_asked_for(self) -> bool:
        """Tell whether the last one to ask may ask again: its task is still there."""
        if self._taker is None:
            return False
        return inspect.getcoroutinestate(self._taker.coro) != inspect.CORO_CLOSED
