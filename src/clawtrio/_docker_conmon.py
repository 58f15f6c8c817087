"""What Podman forgets of a container whose client was killed while it started it.

conmon and the OCI runtime's process, which waits in there for leave to execute the
agent, are begun before Podman notes that they are. It then removes the container as one
that was never begun, and they stay for good, with all that the container had mounted.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import trio

from ._bwrap_procs import (
    Process,
    all_pids,
    argv_of,
    children_of,
    open_process,
    read_process,
    signal_process,
)
from ._process import in_thread

_LOOK_AGAIN: Final = 0.05
#: How often to look while one whose container has ended may leave by itself, and then
#: how often to kill: what that makes an orphan is found the next time.
_PATIENT: Final = 20
_KILLS: Final = 40


async def end_monitor(container: str) -> bool:
    """See a removed container's conmon off, and what is below it.

    Args:
        container: Its whole id, or its name.

    Returns:
        Whether it is gone.
    """
    for look in [_find] * _PATIENT + [_kill] * _KILLS:
        if not await in_thread(partial(look, container)):
            return True
        await trio.sleep(_LOOK_AGAIN)
    return False


def _find(container: str) -> list[Process]:
    return [
        process
        for pid in all_pids()
        if _watches(argv_of(pid), container)
        and _is_ours(pid)
        and (process := read_process(pid))
    ]


def _kill(container: str) -> list[Process]:
    """Kill what is below each conmon; itself last: that is how the rest is found."""
    found = _find(container)
    for monitor in found:
        for process in list(children_of(monitor.pid)) or [monitor]:
            pidfd = open_process(process)
            if pidfd is not None:
                signal_process(pidfd, signal.SIGKILL)
                os.close(pidfd)
    return found


def _watches(argv: list[str], container: str) -> bool:
    """Tell whether that is conmon's command line: ``-c ID``, ``-n NAME``."""
    if Path(argv[0]).name != "conmon":
        return False
    return not {("-c", container), ("-n", container)}.isdisjoint(pairwise(argv))


def _is_ours(pid: int) -> bool:
    """Tell whether a process is this user's: an agent may call itself what it likes."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False
