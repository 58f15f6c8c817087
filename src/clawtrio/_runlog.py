"""What is kept of a run: the head and tail of its streams, and one log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

import attrs

from ._hostfs import Directory
from ._models import Ending, RunResult, VolumeMount
from ._text import one_line, printable


class Capture:
    """The head and the tail of a stream, in bounded memory.

    Args:
        limit: Bytes to keep; half of them the head, half the tail. 0 only counts.
    """

    def __init__(self, limit: int) -> None:
        self._head_room = (limit + 1) // 2
        self._tail_room = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0

    def add(self, data: bytes | bytearray) -> None:
        """Take the next bytes of the stream."""
        self.total += len(data)
        room = self._head_room - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        # Only now and then, so that the work is linear whatever an agent's reads are.
        if len(self._tail) > 2 * self._tail_room:
            del self._tail[: len(self._tail) - self._tail_room]

    def kept(self) -> tuple[bytes, int, bytes]:
        """Return the head, how many bytes are missing after it, and the tail."""
        # Not tail[-room:], which is everything where there is no room.
        tail = bytes(self._tail[max(0, len(self._tail) - self._tail_room) :])
        return bytes(self._head), self.total - len(self._head) - len(tail), tail

    def text(self) -> str:
        """Return what was kept, fit for a terminal, and say where bytes are missing."""
        head, missing, tail = self.kept()
        if not missing:
            return printable((head + tail).decode(errors="replace"))
        gap = f"\n[{missing} bytes left out]\n"
        return gap.join(
            printable(part.decode(errors="replace")) for part in (head, tail)
        )


@attrs.frozen(kw_only=True)
class LogEntry:
    """What goes into a run's log file, beside its result."""

    started: datetime
    group_name: str
    is_main: bool
    container_name: str
    prompt_length: int
    session_id: str | None
    argv: Callable[[], Sequence[str]]
    mounts: Sequence[VolumeMount]
    input_text: str | None
    stdout: Capture | None
    stderr: Capture


def log_name(started: datetime, run_id: str) -> str:
    """Return the file name of a run's log: sorted by name is sorted by time."""
    stamp = started.astimezone(UTC).strftime("%Y-%m-%dT%H-%M-%S.%fZ")
    return f"container-{stamp}-{run_id}.log"


def render_log(entry: LogEntry, result: RunResult) -> bytes:
    """Write down how a run went, in the sections that NanoClaw's logs have."""
    timed_out = result.ending in {Ending.TIMED_OUT, Ending.IDLE}
    is_error = result.status == "error" or result.exit_code not in {0, None}
    facts = {
        "Timestamp": entry.started.isoformat(),
        "Group": one_line(entry.group_name),
        "Container": entry.container_name,
        "IsMain": str(entry.is_main).lower(),
        "Duration": f"{result.duration * 1000:.0f}ms",
        "Exit Code": "none" if result.exit_code is None else str(result.exit_code),
        "Ending": result.ending.value,
        "Status": result.status,
        "Had Streaming Output": str(result.outputs > 0).lower(),
        "Outputs": str(result.outputs),
        "Dropped Frames": str(result.dropped_frames),
        "Unanswered": str(len(result.unanswered)),
        "Stdout Truncated": str(result.stdout_truncated).lower(),
        "Stderr Truncated": str(result.stderr_truncated).lower(),
    }
    title = "Container Run Log (TIMEOUT)" if timed_out else "Container Run Log"
    sections = [(title, "\n".join(f"{name}: {text}" for name, text in facts.items()))]
    if entry.input_text is not None:
        sections.append(("Input", printable(entry.input_text)))
    else:
        summary = f"Prompt length: {entry.prompt_length} chars\nSession ID: "
        sections.append(("Input Summary", summary + (entry.session_id or "new")))
    if is_error:
        sections.append(("Container Args", one_line(" ".join(entry.argv()))))
    sections.append(("Mounts", _list_mounts(entry.mounts, with_source=is_error)))
    if is_error:
        title = "Stderr (TRUNCATED)" if result.stderr_truncated else "Stderr"
        sections.append((title, entry.stderr.text()))
    if entry.stdout is not None:
        title = "Stdout (TRUNCATED)" if result.stdout_truncated else "Stdout"
        sections.append((title, entry.stdout.text()))
    text = "\n\n".join(f"=== {title} ===\n{body}" for title, body in sections)
    return (text + "\n").encode(errors="replace")


def _list_mounts(mounts: Iterable[VolumeMount], *, with_source: bool) -> str:
    return "\n".join(
        (f"{one_line(mount.host_path)} -> " if with_source else "")
        + mount.container_path
        + (" (ro)" if mount.readonly else "")
        for mount in mounts
    )


def prune_logs(directory: Directory, retention: float) -> None:
    """Remove the logs that are older than *retention* seconds."""
    oldest = time.time() - retention
    for name in directory.names(limit=None):
        modified = directory.modified(name)
        if modified is not None and modified < oldest:
            directory.remove(name)
