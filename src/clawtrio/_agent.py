"""The Python that bwrap runs the agent with: an environment of the agent's own.

It holds the Claude Agent SDK, which is no dependency of the host's. The name of its
place tells what is in it: an update makes another, and a running agent keeps the old.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ._errors import NotStartedError, RuntimeUnavailableError
from ._image import run_command
from ._mounts import container_directory
from ._text import one_line

#: Lines of a failed command that its error quotes.
_LAST_LINES: Final = 3


def agent_python() -> str:
    """Return the path of the agent's Python, which need not be there."""
    return str(_place() / "bin" / "python")


async def install_agent(on_line: Callable[[str], object]) -> str:
    """Make the agent's environment, unless it is there; return its Python.

    Args:
        on_line: Called with each line that pip says, made fit for a terminal.

    Raises:
        RuntimeUnavailableError: If it cannot be made; says why.
        OSError: If its place cannot be written.
    """
    with _making(_place()) as new:
        if new is not None:
            await _run([sys.executable, "-m", "venv", new], on_line)
            pip = [f"{new}/bin/python", "-m", "pip", "install", "--progress-bar=off"]
            await _run([*pip, "--requirement", f"{_requirements()}"], on_line)
    return agent_python()


@contextmanager
def _making(place: Path) -> Iterator[str | None]:
    """Give a directory that becomes *place* if all goes well; None if that is there."""
    if place.exists():
        yield None
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: an environment can be moved, but for its scripts.
    new = tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent)
    try:
        Path(new).chmod(0o755)
        yield new
        Path(new).rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


async def _run(argv: list[str], on_line: Callable[[str], object]) -> None:
    last: deque[str] = deque(maxlen=_LAST_LINES)

    def hear(line: str) -> None:
        last.append(one_line(line))
        on_line(last[-1])

    try:
        # Unlike a runtime's client, pip is told whatever the user has set.
        code = await run_command(argv, hear, environment=os.environ)
    except NotStartedError as exc:
        last.append(str(exc))
        code = 1
    if code:
        problem = "the agent was not installed: " + " / ".join(last)
        remedy = "See that pip reaches its index, and that Python has its venv module."
        raise RuntimeUnavailableError("bwrap", problem, remedy)


def _requirements() -> Path:
    return container_directory() / "requirements.txt"


def _place() -> Path:
    """Return the environment's directory: one for each Python, and each choice."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    digest = hashlib.sha256(_requirements().read_bytes()).hexdigest()[:12]
    name = f"agent-{sys.implementation.cache_tag}-{digest}"
    return Path(base).expanduser() / "clawtrio" / name
