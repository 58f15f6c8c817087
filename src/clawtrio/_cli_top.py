"""``clawtrio top``: what the engines of a root are doing, as they tell it."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import Any, Final

import trio

from ._cli_care import has_data
from ._cli_terminal import is_interactive, show, write
from ._groups import open_places
from ._settings import MIB, Settings
from ._status import ask_status

_HEADER: Final = (
    *("GROUP", "RUN", "STATE", "AGE", "IDLE", "OUTPUTS", "TOKENS", "MEMORY"),
)
#: Moves to the upper left, and clears what is below.
_CLEAR: Final = "\x1b[H\x1b[J"
#: Seconds between two looks.
_INTERVAL: Final = 1.0


async def top(settings: Settings) -> int:
    """Show the live runs of a root: once, or at a terminal until a signal comes."""
    if not has_data(settings):
        return 0
    with open_places(settings) as places:
        while True:
            told = await ask_status(places.engines)
            runs = [run for engine in told for run in engine["runs"]]
            processes = [run["process"] for run in runs if run["process"] is not None]
            # Of fakes nothing is to be measured, and a thread would hurry their clock.
            memory = (
                await trio.to_thread.run_sync(measure_memory, processes)
                if processes
                else {}
            )
            rows = [_row(run, memory.get(run["process"])) for run in runs]
            live = is_interactive()
            if live:
                write(_CLEAR)
            show(rows, header=_HEADER)
            if not live:
                return 0
            await trio.sleep(_INTERVAL)


def measure_memory(containers: list[int]) -> dict[int, int]:
    """Sum up what the processes of containers have in memory.

    What several share counts for each of them. Containers without a namespace of
    processes to themselves are left out, and so are those of other users.

    Args:
        containers: The ids of their first processes.

    Returns:
        Bytes, by those ids.
    """
    names = {}
    for process in containers:
        with contextlib.suppress(OSError):
            names[_namespace_of(process)] = process
    names.pop(_namespace_of(os.getpid()), None)
    memory: Counter[int] = Counter()
    for place in Path("/proc").glob("[1-9]*"):
        # Processes end while we look.
        with contextlib.suppress(OSError):
            if found := names.get(_namespace_of(int(place.name))):
                pages = (place / "statm").read_bytes().split()[1]
                memory[found] += int(pages) * os.sysconf("SC_PAGE_SIZE")
    return memory


def _namespace_of(process: int) -> int:
    return Path(f"/proc/{process}/ns/pid").stat().st_ino


def _row(run: dict[str, Any], memory: int | None) -> tuple[str, ...]:
    usage = run["usage"]
    tokens = usage["input_tokens"] + usage["output_tokens"] if usage else 0
    return (
        run["group"],
        run["run"],
        run["state"],
        f"{run['age']:.0f} s",
        f"{run['idle']:.0f} s",
        f"{run['outputs']}",
        f"{tokens}",
        "-" if memory is None else f"{memory / MIB:.0f} MiB",
    )
