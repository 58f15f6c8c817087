"""Which processes are sandboxes: read from /proc, and signalled through pidfds.

A sandbox is an outer bwrap, whose environment carries the labels, and its reaper: pid 1
of the sandbox, with the same environment. The agent is the reaper's first child, and so
pid 2 in there for as long as it lives; pids wrap to 300. A reaper counts for itself
only if its bwrap is gone: both have a parent-death signal, but each is without it for
some milliseconds at its start.

Processes may vanish between any two lines of this; a zombie counts as gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from ._bwrap_argv import VARIABLES
from ._runtimes import FoundContainer

#: The fields of /proc/PID/stat that count, behind the name.
_STATE: Final = 0
_PARENT: Final = 1
_STARTED: Final = 19

_PROC: Final = Path("/proc")

#: What reading says of a process that is gone, or of another user's. Anything else, as
#: a lack of descriptors, must not pass for that: a sandbox would count as gone.
_GONE: Final = frozenset({errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM})

_REAPER: Final = 1
_AGENT: Final = 2


@attrs.frozen
class Process:
    """A process that was there a moment ago.

    Attributes:
        pid: Its id, in our namespace.
        parent: Its parent's id.
        started: When it was started, in ticks since boot. A pid may be used again, but
            not together with this.
        inner_pid: Its id in its own namespace; None if that is ours.
        filters: How many seccomp filters it runs under.
    """

    pid: int
    parent: int
    started: int
    inner_pid: int | None
    filters: int

    @property
    def id(self) -> str:
        """What tells it from all others, for as long as the host is up."""
        return f"{self.pid}:{self.started}"


def read_process(pid: int) -> Process | None:
    """Read what /proc says of *pid*; None if it is gone."""
    try:
        # The name before it may hold anything, parentheses too.
        fields = _read(pid, "stat").rpartition(b") ")[2].split()
        status = _read(pid, "status")
    except OSError as exc:
        if exc.errno in _GONE:
            return None
        raise
    if fields[_STATE] in b"ZXx":
        return None
    values = _values(status)
    pids = values[b"NSpid"].split()
    # The number of filters came with Linux 5.9; before that it says whether.
    filters = values.get(b"Seccomp_filters", values[b"Seccomp"])
    return Process(
        pid=pid,
        parent=int(fields[_PARENT]),
        started=int(fields[_STARTED]),
        inner_pid=int(pids[-1]) if len(pids) > 1 else None,
        filters=int(filters),
    )


def find_agent(reaper: Process) -> Process | None:
    """Find the agent below *reaper*; None if it has not started, or has left."""
    for process in children_of(reaper.pid):
        if process.inner_pid == _AGENT:
            return process
    return None


def find_sandboxes(labels: Mapping[str, str]) -> list[FoundContainer]:
    """List the sandboxes whose environment carries *labels*."""
    wanted = {f"{VARIABLES[label]}={value}" for label, value in labels.items()}
    found = {}
    for pid in all_pids():
        if not wanted.issubset(_environment(pid)):
            continue
        # Once more, between two looks at the rest: now it is all of one process.
        process, variables, again = (
            read_process(pid),
            _environment(pid),
            read_process(pid),
        )
        if process and again and again.id == process.id and wanted.issubset(variables):
            found[again] = variables
    clients = {process.pid for process in found if process.inner_pid is None}
    return [
        FoundContainer(process.id, _labels(variables))
        for process, variables in found.items()
        if process.inner_pid is None
        or (process.inner_pid == _REAPER and process.parent not in clients)
    ]


def sandbox_of(container_id: str) -> list[Process]:
    """Return what has to be killed for *container_id*: the reaper, then its bwrap."""
    pid, _, _ = container_id.partition(":")
    process = read_process(int(pid))
    if process is None or process.id != container_id:
        return []
    reapers = [
        child for child in children_of(process.pid) if child.inner_pid == _REAPER
    ]
    return [*reapers, process]


def open_process(process: Process) -> int | None:
    """Open a pidfd of *process*, and of no later one; None if it is gone."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    again = read_process(process.pid)
    if again is None or again.id != process.id:
        os.close(pidfd)
        return None
    return pidfd


def signal_process(pidfd: int, number: signal.Signals) -> None:
    """Send signal *number*, unless the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def count_tasks(uid: int) -> int:
    """Count the processes and threads that belong to *uid*."""
    total = 0
    for pid in all_pids():
        try:
            values = _values(_read(pid, "status"))
        except OSError:
            continue
        if int(values[b"Uid"].split()[0]) == uid:
            total += int(values[b"Threads"])
    return total


def all_pids() -> Iterator[int]:
    """Yield the ids of all processes that are to be seen."""
    return (int(path.name) for path in _PROC.iterdir() if path.name.isdecimal())


def _read(pid: int, name: str) -> bytes:
    return (_PROC / str(pid) / name).read_bytes()


def children_of(pid: int) -> Iterator[Process]:
    """Yield the children of *pid*."""
    # /proc/PID/task/PID/children is not in every kernel.
    for candidate in all_pids():
        process = read_process(candidate)
        if process is not None and process.parent == pid:
            yield process


def _values(status: bytes) -> dict[bytes, bytes]:
    return dict(line.partition(b":")[::2] for line in status.splitlines())


def argv_of(pid: int) -> list[str]:
    """Read a process's command line; one empty word if it is gone, or the kernel's."""
    return _words(pid, "cmdline")


def _environment(pid: int) -> list[str]:
    return _words(pid, "environ")


def _words(pid: int, name: str) -> list[str]:
    try:
        return os.fsdecode(_read(pid, name)).split("\0")
    except OSError as exc:
        if exc.errno in _GONE:
            return [""]
        raise


def _labels(variables: list[str]) -> dict[str, str]:
    values = dict(entry.partition("=")[::2] for entry in variables)
    return {
        label: values[variable]
        for label, variable in VARIABLES.items()
        if variable in values
    }
