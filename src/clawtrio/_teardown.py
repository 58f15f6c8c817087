"""How a container is brought down, and what is done about one that will not go."""

from __future__ import annotations

import logging
import operator
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeAlias

import attrs
import trio
from trio_util import AsyncBool, wait_any

from ._runtimes import (
    LABEL_ENGINE,
    LABEL_RUN,
    RUNTIME_FAILURES,
    Container,
    Runtime,
)
from ._settings import Settings
from ._text import one_line

log = logging.getLogger(__name__)
Log: TypeAlias = "logging.LoggerAdapter[logging.Logger]"

#: Seconds that a client gets to notice that its container is gone.
_SETTLE: Final = 1.0
#: Seconds between two looks for a container: one whose client was killed while it was
#: being created has been seen to appear a second later.
LOOK_INTERVAL: Final = 0.5
#: Seconds between two looks of the janitor, where they fail.
_LONGEST_PAUSE: Final = 30.0
#: A container counts as gone when it was absent that often, so far apart.
_ABSENCES: Final = 2


@attrs.define
class Supervised:
    """A container, and what became of its client.

    Attributes:
        container: The container.
        exit_code: What the client exited with, once it has.
        lost: Why it cannot be told any more, if so.
    """

    container: Container
    exit_code: int | None = None
    lost: str | None = None

    async def wait(self) -> None:
        """Wait until the client has exited, or is lost: then, once more, for ever."""
        if self.lost is not None:
            await trio.sleep_forever()
        try:
            self.exit_code = await self.container.wait()
        except RUNTIME_FAILURES as exc:
            self.lost = one_line(str(exc))


async def bring_down(
    supervised: Supervised,
    runtime: Runtime,
    run_id: str,
    settings: Settings,
    logger: Log,
) -> bool:
    """Stop a container, ever harder, and make sure that it is gone.

    Takes at most ``stop_grace`` + 3 ``command_timeout``, and a moment; not cancelled.

    Returns:
        False if it may still be there.
    """
    container = supervised.container
    patience = settings.command_timeout
    gone = False

    async def remove() -> None:
        for found in await runtime.find({LABEL_RUN: run_id}):
            await runtime.remove(found.id)

    rungs: Sequence[tuple[str, Callable[[], Awaitable[None]], float]] = (
        (
            "stop",
            partial(container.stop, settings.stop_grace),
            settings.stop_grace + patience,
        ),
        ("kill", container.kill, patience),
        ("remove", remove, patience),
    )
    try:
        with trio.move_on_after(settings.stop_grace + 3 * patience, shield=True):
            # An agent that listens sees the end of its lifeline before the signal.
            await trio.aclose_forcefully(container.stdin)
            for name, act, seconds in rungs:
                attempt = partial(_attempt, name, act, logger)
                with trio.move_on_after(seconds) as scope:
                    await wait_any(supervised.wait, attempt)
                if supervised.exit_code is not None:
                    break
                how = "hangs" if scope.cancelled_caught else "was not enough"
                logger.warning("%s %s", name, how)
            if supervised.exit_code is None:
                container.kill_client()
            gone = await _look_until_gone(runtime, run_id, logger)
    finally:
        # Where there was no time left, or a runtime has a bug: the client is ours.
        container.kill_client()
    with trio.move_on_after(_SETTLE, shield=True):
        await supervised.wait()
    return gone


async def _attempt(name: str, act: Callable[[], Awaitable[None]], logger: Log) -> None:
    try:
        await act()
    except RUNTIME_FAILURES as exc:
        logger.warning("%s failed: %s", name, one_line(str(exc)))
    await trio.sleep(_SETTLE)


async def _look_until_gone(runtime: Runtime, run_id: str, logger: Log) -> bool:
    # A container that is a task of ours cannot appear later.
    needed = 1 if runtime.in_process else _ABSENCES
    absences = 0
    while True:
        try:
            found = await runtime.find({LABEL_RUN: run_id})
            absences = 0 if found else absences + 1
            for container in found:
                logger.warning("still there: removing %s", one_line(container.id))
                await runtime.remove(container.id)
        except RUNTIME_FAILURES as exc:
            logger.warning("cannot look for it: %s", one_line(str(exc)))
        if absences == needed:
            return True
        await trio.sleep(LOOK_INTERVAL)


class Janitor:
    """The engine's own task: looks for containers that should be gone.

    Args:
        runtime: Whose containers.
        engine_id: Which of them are ours.
        command_timeout: Seconds that a look may take.
    """

    def __init__(
        self, runtime: Runtime, engine_id: str, command_timeout: float
    ) -> None:
        self._runtime = runtime
        self._engine_id = engine_id
        self._command_timeout = command_timeout
        # By run, how many more times it has to be absent.
        self._suspects: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._busy = AsyncBool(value=False)
        # When the engine is cancelled there is most to look for: finish() ends it.
        self._working = trio.CancelScope(shield=True)
        self._finishing = trio.Event()

    def look_for(
        self, run_id: str, name: str | None = None, *, insist: bool = False
    ) -> None:
        """Look for what a run may have left.

        Args:
            run_id: Which run.
            name: What its container is called.
            insist: Look until it is gone for sure, rather than gone at a glance.
        """
        self._suspects[run_id] = _ABSENCES if insist else 1
        self._names[run_id] = name or run_id
        self._busy.value = True

    async def work(self) -> None:
        """Look, whenever there is something to look for, until :meth:`finish`."""
        pause = LOOK_INTERVAL
        with self._working:
            while True:
                await self._busy.wait_value(bool)
                # A daemon that is down is asked, and complained of, ever less often.
                pause = min(2 * pause, _LONGEST_PAUSE)
                with trio.move_on_after(self._command_timeout) as scope:
                    try:
                        await self._look()
                        pause = LOOK_INTERVAL
                    except RUNTIME_FAILURES as exc:
                        log.warning("janitor: %s", one_line(str(exc)))
                if scope.cancelled_caught:
                    log.warning("janitor: %s does not answer", self._runtime.name)
                self._busy.value = bool(self._suspects)
                if self._suspects:
                    await self._wait(pause)

    async def _wait(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._finishing.wait()
            # With little time left, there is no patience.
            await trio.sleep(LOOK_INTERVAL)

    async def _look(self) -> None:
        looked_for = list(self._suspects)
        found = await self._runtime.find({LABEL_ENGINE: self._engine_id})
        by_run = {container.labels.get(LABEL_RUN): container for container in found}
        # At once: one that cannot be removed is no reason to leave the others.
        async with trio.open_nursery() as nursery:
            for run_id in looked_for:
                if container := by_run.get(run_id):
                    self._suspects[run_id] = _ABSENCES
                    nursery.start_soon(self._remove, run_id, container.id)
                else:
                    self._suspects[run_id] -= 1
                    if not self._suspects[run_id]:
                        del self._suspects[run_id], self._names[run_id]

    async def _remove(self, run_id: str, container_id: str) -> None:
        log.warning("janitor: removing %s of run %s", one_line(container_id), run_id)
        try:
            await self._runtime.remove(container_id)
        except RUNTIME_FAILURES as exc:
            log.warning("janitor: %s", one_line(str(exc)))

    async def finish(self) -> bool:
        """Wait until there is nothing left; if that takes too long, say so: False."""
        self._finishing.set()
        with trio.move_on_after(self._command_timeout, shield=True):
            await self._busy.wait_value(operator.not_)
        self._working.cancel()
        if self._suspects:
            names = ", ".join(self._names.values())
            log.error("%s: these may be left: %s", self._runtime.name, names)
        return not self._suspects
