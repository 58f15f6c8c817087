"""What an engine tells other processes of itself: who connects gets a line of JSON.

The socket is beside the engine's file, and for its user alone. What is told has no
texts in it, nor secrets. An engine that cannot have a socket does without.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import attrs
import trio

from ._access import listen_at
from ._hostfs import Directory

log = logging.getLogger(__name__)

#: Follows the engine's id in the name of its socket.
SUFFIX: Final = ".sock"
#: How many are answered at the same time; others are turned away.
_MAX_CLIENTS: Final = 8
#: Seconds for one answer, on both sides.
_PATIENCE: Final = 2.0


def open_status(engines: Directory, engine_id: str) -> trio.SocketListener | None:
    """Open the socket of an engine; None if there can be none."""
    fd = engines.hold()
    try:
        return listen_at(f"/proc/self/fd/{fd}/{engine_id}{SUFFIX}", mode=0o600)
    except OSError as exc:
        log.warning("nobody can watch this engine: %s", exc)
        return None
    finally:
        os.close(fd)


async def serve_status(
    listener: trio.SocketListener, describe: Callable[[], attrs.AttrsInstance]
) -> None:
    """Tell those who connect what *describe* returns, until cancelled."""
    clients = 0

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal clients
        if clients >= _MAX_CLIENTS:
            return
        clients += 1
        line = json.dumps(attrs.asdict(describe())).encode() + b"\n"
        try:
            with trio.move_on_after(_PATIENCE), suppress(trio.BrokenResourceError):
                await stream.send_all(line)
        finally:
            clients -= 1

    await trio.serve_listeners(answer, [listener])


async def ask_status(engines: Directory) -> list[dict[str, Any]]:
    """Return what the live engines of a root tell; those that do not, are left out."""
    told = []
    for name in engines.names():
        if name.endswith(SUFFIX):
            fd = engines.hold()
            try:
                with (
                    trio.move_on_after(_PATIENCE),
                    suppress(OSError, trio.BrokenResourceError, ValueError),
                ):
                    told.append(await _ask(f"/proc/self/fd/{fd}/{name}"))
            finally:
                os.close(fd)
    return told


async def _ask(address: str) -> dict[str, Any]:
    async with await trio.open_unix_socket(address) as stream:
        line = b"".join([chunk async for chunk in stream])
    found: dict[str, Any] = json.loads(line)
    return found
