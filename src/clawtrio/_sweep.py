"""What engines that died have left behind, and how one is known to be dead.

Each engine holds a lock on a file of its own, which the kernel lets go of when the
process dies. Containers say by their labels which engine they are of. So what has a
dead engine of this root may be removed, and nothing else.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import ExitStack
from functools import partial

from ._errors import RuntimeUnavailableError
from ._groups import Places
from ._hostfs import Directory
from ._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    FoundContainer,
    Runtime,
    ask_within,
)
from ._text import one_line

log = logging.getLogger(__name__)


class EngineFile:
    """The locked file by which others see that an engine lives.

    Args:
        engines: Where engines have their files.
        runtime: The name of the runtime that it uses.

    Attributes:
        engine_id: Random.
    """

    def __init__(self, engines: Directory, runtime: str) -> None:
        self.engine_id = secrets.token_hex(16)
        self._engines = engines
        self._held = ExitStack()
        self._held.enter_context(engines.claim(self.engine_id, runtime.encode()))

    def release(self, *, clean: bool) -> None:
        """Let go; the file stays for the next sweep if there is something to sweep."""
        if clean:
            self._engines.remove(self.engine_id)
        self._held.close()


async def sweep(places: Places, runtime: Runtime) -> list[FoundContainer]:
    """Remove what dead engines of this root left in a runtime.

    Returns:
        What was removed.

    Raises:
        RuntimeUnavailableError: If the runtime cannot be asked, or not soon; or could
            not remove something, after the rest was tried. The next sweep finds that.
    """
    engines = places.engines
    removed = []
    failure: RuntimeUnavailableError | None = None
    with ExitStack() as locks:
        # Containers of another runtime are for a sweep of that one to find.
        dead = {
            engine_id
            for engine_id in engines.names()
            if engines.read(engine_id) == runtime.name.encode()
            and _take_over(engines, engine_id, locks)
        }
        kept: set[str] = set()
        ask = partial(ask_within, places.settings.command_timeout, runtime)
        for container in await ask(partial(runtime.find, {LABEL_ROOT: places.root_id})):
            engine_id = container.labels.get(LABEL_ENGINE, "")
            if engine_id not in dead:
                continue
            try:
                await ask(partial(runtime.remove, container.id))
            except RuntimeUnavailableError as exc:
                failure = failure or exc
                kept.add(engine_id)
            else:
                name = one_line(container.id)
                log.warning("removed %s, left by a dead engine", name)
                removed.append(container)
        for engine_id in dead - kept:
            engines.remove(engine_id)
    if failure is not None:
        raise failure
    return removed


def _take_over(engines: Directory, engine_id: str, locks: ExitStack) -> bool:
    """Lock a dead engine's file for the time of a sweep; False if it lives."""
    try:
        locks.enter_context(engines.lock(engine_id))
    except BlockingIOError:
        return False
    return True
