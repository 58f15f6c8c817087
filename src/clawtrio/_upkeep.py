"""What an engine does beside its runs: it looks after disk space and trash."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio
from trio_util import AsyncValue

from ._errors import NotStartedError
from ._groups import Places
from ._run import Run

log = logging.getLogger(__name__)

#: Seconds between two looks at the free space while agents may fill the disk.
_SPACE_INTERVAL: Final = 5.0
#: How many files are deleted in one go, well below a second.
_TRASH_BATCH: Final = 5000
#: A file system can be full of empty files, too.
MIN_FREE_INODES: Final = 1024


def check_space(places: Places) -> None:
    """Make sure that there is room for a run.

    Raises:
        NotStartedError: If not.
    """
    free, inodes = places.free()
    if free < places.settings.min_free_bytes:
        problem = (
            f"{free} bytes are free on the disk, min_free_bytes asks for "
            f"{places.settings.min_free_bytes}"
        )
        raise NotStartedError(problem)
    if inodes is not None and inodes < MIN_FREE_INODES:
        raise NotStartedError(f"only {inodes} inodes are free on the disk")


async def watch_space(places: Places, runs: AsyncValue[tuple[Run, ...]]) -> None:
    """Stop the runs before one of them has filled the disk."""
    while True:
        await runs.wait_value(bool)
        try:
            check_space(places)
        except NotStartedError as exc:
            log.error("stopping all runs: %s", exc)  # noqa: TRY400 - no bug
            for run in runs.value:
                run.stop()
        except OSError as exc:
            log.warning("cannot tell how much space is free: %s", exc)
        await trio.sleep(_SPACE_INTERVAL)


async def empty_trash(
    places: Places, offload: Callable[[Callable[[], bool]], Awaitable[bool]]
) -> None:
    """Delete what was thrown away, a little at a time: an agent chose how much.

    Args:
        places: Where it is.
        offload: Calls what may take a while.
    """
    work = partial(places.empty_trash, _TRASH_BATCH)
    try:
        while not await offload(work):  # noqa: ASYNC110 - it is work, no wait
            await trio.lowlevel.checkpoint()
    except OSError as exc:
        log.warning("cannot empty %s: %s", places.trash.path, exc)
