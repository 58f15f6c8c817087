"""The command line's ``agent install``."""

from __future__ import annotations

import trio

from ._agent import install_agent
from ._cli_terminal import write


async def install() -> int:
    """Install what bwrap needs to run Claude, and say where."""
    started = trio.current_time()
    python = await install_agent(lambda line: write(f"{line}\n"))
    write(f"{python} is there, after {trio.current_time() - started:.1f} s\n")
    return 0
