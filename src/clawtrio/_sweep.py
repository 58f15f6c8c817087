"""What engines that died have left behind, and how one is known to be dead.

Each engine holds a lock on a file of its own, which the kernel lets go of when the
process dies. Containers say by their labels which engine they are of. So what has a
dead engine of this root may be removed, and nothing else.

A runtime may go on making a container when the engine that asked for it has died, and
show it only after a sweep has looked. So the sweep that first finds an engine dead
marks its file, and leaves it. A later one removes the file, once the command that made
the container must have ended: after ``command_timeout``. When it was marked is the
file's time. One in the future is of a clock that was set back, and counts as long ago.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Final

from ._errors import RuntimeUnavailableError
from ._groups import Places
from ._hostfs import MAX_FILE_BYTES, Directory
from ._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    FoundContainer,
    Runtime,
    ask_within,
)
from ._status import SUFFIX
from ._text import one_line

log = logging.getLogger(__name__)

#: Follows the runtime's name in the file of an engine that was found dead.
_DEAD: Final = b"\ndead\n"


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
        self._engines.remove(self.engine_id + SUFFIX)
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
    removed = []
    failure: RuntimeUnavailableError | None = None
    with ExitStack() as locks:
        dead = _find_dead(places, runtime, locks)
        ask = partial(ask_within, places.settings.command_timeout, runtime)
        for container in await ask(partial(runtime.find, {LABEL_ROOT: places.root_id})):
            engine_id = container.labels.get(LABEL_ENGINE, "")
            if engine_id not in dead:
                continue
            try:
                await ask(partial(runtime.remove, container.id))
            except RuntimeUnavailableError as exc:
                failure = failure or exc
                dead[engine_id] = False
            else:
                name = one_line(container.id)
                log.warning("removed %s, left by a dead engine", name)
                removed.append(container)
        for engine_id in dead:
            labels = {LABEL_ROOT: places.root_id, LABEL_ENGINE: engine_id}
            try:
                await ask(partial(runtime.close_network, labels))
            except RuntimeUnavailableError as exc:
                failure = failure or exc
                dead[engine_id] = False
        _forget(places, dead)
    if failure is not None:
        raise failure
    return removed


def _find_dead(places: Places, runtime: Runtime, locks: ExitStack) -> dict[str, bool]:
    """Lock the files of dead engines that used *runtime*; tell of each if it is done.

    Those of another runtime are for a sweep of that one to find.
    """
    return {
        engine_id: _is_done(fd, places.settings.command_timeout)
        for engine_id in places.engines.names()
        if not engine_id.endswith(SUFFIX)
        and _runtime_of(places.engines.read(engine_id) or b"") == runtime.name
        and (fd := _take_over(places.engines, engine_id, locks)) is not None
    }


def _forget(places: Places, dead: Mapping[str, bool]) -> None:
    """Remove what dead engines have here; of those with more to come, the sockets."""
    for name in places.sockets.names(None):
        if name.partition("-")[0] in dead:
            places.sockets.discard(name, places.trash)
    for engine_id in (name for name, done in dead.items() if done):
        places.engines.remove(engine_id + SUFFIX)
        places.engines.remove(engine_id)


def _runtime_of(content: bytes) -> str:
    """Return the name of the runtime that an engine used, from its file."""
    return content.split(b"\n")[0].decode("ascii", errors="replace")


def _take_over(engines: Directory, engine_id: str, locks: ExitStack) -> int | None:
    """Lock a dead engine's file for the time of a sweep; None if it lives."""
    try:
        return locks.enter_context(engines.lock(engine_id))
    except BlockingIOError:
        return None


def _is_done(fd: int, command_timeout: float) -> bool:
    """Tell whether a dead engine can have left nothing that is still to come.

    Args:
        fd: Its locked file, which is marked if it was not.
        command_timeout: Seconds that it may take to come.
    """
    content = os.pread(fd, MAX_FILE_BYTES, 0)
    if not content:
        # It was gone, in order, and locking made it again.
        return True
    now = time.time_ns()
    if b"\n" in content:
        return not 0 <= now - os.fstat(fd).st_mtime_ns < command_timeout * 1e9
    # On a full disk it stays as it is, for a later sweep to mark.
    with suppress(OSError):
        os.pwrite(fd, _DEAD, len(content))
        os.utime(fd, ns=(now, now))
    return False
