"""One wish for a directory of the host: where it would be seen, and what it means.

Only directories can be mounted: a file would be mounted by its inode, and the container
keep an old one once an editor has replaced it.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final

from ._errors import UnsafePathError
from ._forbidden import expand
from ._hostfs import MAX_ENTRIES, check_mountable
from ._models import AdditionalMount

#: Where additional mounts are in a container.
WORKSPACE_EXTRA: Final = PurePosixPath("/workspace/extra")
#: Bytes of a component, and of a whole target: no more than a kernel takes.
_NAME_BYTES: Final = 255
_TARGET_BYTES: Final = 1024


class RefusedError(Exception):
    """The wish is not granted; the message says why, and what would help."""


def target_of(request: AdditionalMount) -> PurePosixPath:
    """Return where a container sees it; by default under its own last name.

    Raises:
        RefusedError: If that could be elsewhere than in :data:`WORKSPACE_EXTRA`.
    """
    path = request.container_path or Path(request.host_path).name
    target = PurePosixPath(path)
    if not path.strip() or not target.parts:
        raise RefusedError("the container path must not be empty")
    if target.is_absolute() or ".." in target.parts:
        problem = f"the container path {path!r} must be relative and without '..'"
        raise RefusedError(problem)
    _check_mountable(path, "the container path")
    target = WORKSPACE_EXTRA / target
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in target.parts):
        raise RefusedError(f"a name in the container path is over {_NAME_BYTES} bytes")
    if len(os.fsencode(target)) > _TARGET_BYTES:
        raise RefusedError(f"the container path is over {_TARGET_BYTES} bytes")
    return target


def source_of(request: AdditionalMount) -> str:
    """Return the absolute path that is asked for.

    Raises:
        RefusedError: If it is none, or docker and podman would mount another one.
    """
    path = expand(request.host_path)
    _check_mountable(path, "the host path")
    if not path.startswith("/"):
        raise RefusedError("the host path must be absolute, or begin with ~/")
    return path


def _check_mountable(path: str, what: str) -> None:
    try:
        check_mountable(path)
    except UnsafePathError as exc:
        raise RefusedError(f"{what} {exc.problem}") from None


def open_directory(path: str, stack: ExitStack) -> int:
    """Hold the directory that *path* leads to, through whatever symlinks.

    Raises:
        RefusedError: If there is none.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise RefusedError("does not exist on the host") from None
    except NotADirectoryError:
        raise RefusedError("is no directory, and only those are mounted") from None
    except OSError as exc:
        raise RefusedError(f"cannot be opened: {exc.strerror}") from exc
    stack.callback(os.close, fd)
    return fd


def place_of(fd: int) -> Path:
    """Return the real path of an open directory, which is there at this moment.

    Raises:
        RefusedError: If it is not, or docker and podman would mount another one.
    """
    real = str(Path(f"/proc/self/fd/{fd}").readlink())
    _check_mountable(real, "the real path")
    try:
        same = os.path.samestat(os.lstat(real), os.fstat(fd))
    except OSError:
        same = False
    if not same:
        raise RefusedError("was moved or removed while it was looked at: try again")
    return Path(real)


def find_socket(fd: int, limit: int = MAX_ENTRIES) -> str | None:
    """Look for a Unix socket in a directory, nearest first.

    Args:
        fd: The directory.
        limit: How many entries to look at.

    Returns:
        Its path in the directory; None if there is none among so many.
    """
    places = deque(["."])
    while places:
        place = places.popleft()
        for name, mode in _entries(fd, place, limit):
            limit -= 1
            if stat.S_ISSOCK(mode):
                return os.path.normpath(f"{place}/{name}")
            if stat.S_ISDIR(mode):
                places.append(f"{place}/{name}")
    return None


def _entries(fd: int, place: str, limit: int) -> list[tuple[str, int]]:
    """List names and modes, as far as one may."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    found = []
    with suppress(OSError):
        here = os.open(place, flags, dir_fd=fd)
        try:
            with os.scandir(here) as entries:
                for entry in islice(entries, limit):
                    mode = entry.stat(follow_symlinks=False).st_mode
                    found.append((entry.name, mode))
        finally:
            os.close(here)
    return found
