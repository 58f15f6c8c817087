"""What the benchmarks of runs share: bots, the runtimes that work here, quantiles."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from clawtrio import Group, RuntimeUnavailableError, Settings
from clawtrio._cli_care import RUNTIMES, RuntimeName

T = TypeVar("T")

GROUP: Final = Group(name="bench", folder="bench")
JID: Final = "tg:1"


@contextmanager
def open_root(runtime: RuntimeName, **changes: Any) -> Iterator[Settings]:
    """Have a bot of its own, with an agent that needs no API, for a measurement."""
    with tempfile.TemporaryDirectory(prefix="clawtrio-bench-") as root:
        Path(root).chmod(0o755)
        wanted = {"agent": "echo", **changes}
        yield Settings(root=root, runtime=runtime, min_free_bytes=0, **wanted)


async def in_each_runtime(
    measure: Callable[[Settings], Awaitable[T]], **changes: Any
) -> dict[str, T]:
    """Measure in each runtime that works here; say on stderr which does not.

    Args:
        measure: Awaited with the settings of a bot that has this runtime.
        changes: What its settings are to be besides.

    Returns:
        What was measured, by runtime.
    """
    found: dict[str, T] = {}
    for runtime in RUNTIMES:
        print(f"{runtime} ...", file=sys.stderr)
        with open_root(runtime, **changes) as settings:
            try:
                found[runtime] = await measure(settings)
            except RuntimeUnavailableError as exc:
                print(exc, file=sys.stderr)
    return found


def group_directory(settings: Settings) -> Path:
    """Make the directory that the agent sees as its workspace, and may write to."""
    directory = Path(settings.groups_dir, GROUP.folder)
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(directory, 1000, 1000)
    return directory


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this *share* of them are not above; 1 for the worst."""
    ordered = sorted(values)
    return ordered[max(0, round(share * len(ordered)) - 1)]
