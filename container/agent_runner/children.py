"""What the agent has started, and must not outlive it.

A container ends with its first process, and takes the rest along. This is for what
cannot wait for that, and for an agent that runs without one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
#: A look may miss what is started meanwhile; nobody is left to start more after a few.
_MAX_LOOKS: Final = 10


def signal_all(number: signal.Signals) -> bool:
    """Send *number* to every descendant of ours; False if there is none."""
    pids = _descendants()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return bool(pids)


def kill_all() -> None:
    """Leave no descendant alive."""
    for _ in range(_MAX_LOOKS):
        if not signal_all(signal.SIGKILL):
            return


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for path in _PROC.iterdir():
        if path.name.isdecimal() and (parent := _parent_of(path)) is not None:
            children.setdefault(parent, []).append(int(path.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def _parent_of(path: Path) -> int | None:
    """Return the parent of a live process."""
    try:
        # The name before it may hold anything, parentheses too.
        state, parent, *_ = (path / "stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return None
    return None if state in b"ZX" else int(parent)
