"""``clawtrio top``: what the engines of a root are doing, as they tell it."""

from __future__ import annotations

from typing import Any, Final

import trio

from ._cli_care import has_data
from ._cli_terminal import is_interactive, show, write
from ._groups import open_places
from ._settings import Settings
from ._status import ask_status

_HEADER: Final = ("GROUP", "RUN", "STATE", "AGE", "IDLE", "OUTPUTS", "TOKENS")
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
            rows = [_row(run) for engine in told for run in engine["runs"]]
            live = is_interactive()
            if live:
                write(_CLEAR)
            show(rows, header=_HEADER)
            if not live:
                return 0
            await trio.sleep(_INTERVAL)


def _row(run: dict[str, Any]) -> tuple[str, ...]:
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
    )
