"""What there is of this process, and of its containers, at a moment."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import attrs
import trio

from clawtrio import Run
from tests.e2e.conftest import Site, descriptors, memory, processes, wait_until
from tests.helpers import open_threads

#: Seconds until all is quiet: the janitor looks once more, and a client or two go.
SETTLED_WITHIN: Final = 20.0


def _kept(*, within: int = 0, unit: str = "", ours: bool = False) -> int:
    """Describe a measure.

    Args:
        within: How much more of it there may be afterwards.
        unit: What is counted, if not things.
        ours: Whether it counts only what this soak has made: in the end there is none.
    """
    described = {"within": within, "unit": unit, "ours": ours}
    measured: int = attrs.field(metadata=described)
    return measured


@attrs.frozen(kw_only=True)
class Measures:
    """Counts of what may be left.

    Attributes:
        containers: Of our roots, running or not, in all runtimes.
        processes: Children of ours, theirs, and what else is marked as our own.
        descriptors: Open ones.
        tasks: Trio's, of the system too.
        threads: But for Trio's idle ones, which go by themselves.
        runs: Live objects of that class.
        files: Sockets of runs, files of engines, and trash.
        memory: MiB that are resident. What the allocator keeps between blocks in use
            comes and goes with the largest frames; that is what may come on top.
    """

    containers: int = _kept(ours=True)
    processes: int = _kept()
    descriptors: int = _kept()
    tasks: int = _kept()
    threads: int = _kept()
    runs: int = _kept()
    files: int = _kept(ours=True)
    memory: int = _kept(within=24, unit="MiB")


def more(before: Measures, after: Measures) -> Iterator[str]:
    """Yield what there is too much of."""
    for field in attrs.fields(Measures):
        old, new = getattr(before, field.name), getattr(after, field.name)
        allowed = 0 if field.metadata["ours"] else old + field.metadata["within"]
        if new > allowed:
            yield f"left: {new} {field.name}, {old} before"


async def measure(sites: Iterable[Site]) -> Measures:
    """Measure, once all is quiet, or seems never to be."""
    places = list(sites)
    # A suspect run is looked for in a second, and its client goes after it.
    with trio.move_on_after(SETTLED_WITHIN):
        await wait_until(lambda: not any(site.remains() for site in places))
    # Twice: what the first finalizes may let go of more.
    gc.collect()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return Measures(
        containers=sum(len(site.containers()) for site in places),
        processes=len({*_descendants(), *(p.pid for s in places for p in s.strays())}),
        descriptors=len(descriptors()),
        tasks=_count_tasks(),
        threads=len(open_threads()),
        runs=sum(isinstance(thing, Run) for thing in gc.get_objects()),
        files=sum(len(_files(root)) for root in {site.root for site in places}),
        memory=memory("VmRSS") // 2**20,
    )


def _descendants() -> set[int]:
    alive = list(processes())
    found = {os.getpid()}
    # A parent may come after its child.
    while grown := {p.pid for p in alive if p.parent in found} - found:
        found |= grown
    return found - {os.getpid()}


def _count_tasks() -> int:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    tasks = [root]
    for task in tasks:
        for nursery in task.child_nurseries:
            tasks.extend(nursery.child_tasks)
    return len(tasks)


def _files(root: Path) -> list[Path]:
    places = (root / "data" / name for name in ("sockets", "trash", "engines"))
    # Hidden are locks.
    return [path for place in places for path in place.glob("[!.]*")]
