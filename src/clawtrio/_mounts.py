"""What a container sees of the host: checked, and held from check to start."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from ._errors import UnsafePathError
from ._groups import Places
from ._hostfs import Directory
from ._models import Group, VolumeMount
from ._runtimes import RUNNER, WORKSPACE_GROUP, HeldMount

WORKSPACE_IPC: Final = "/workspace/ipc"

_CONTROL: Final = re.compile("[\0-\x1f\x7f-\x9f]")


def container_directory() -> Path:
    """Return the directory with the image's files, in a wheel or in a checkout."""
    package = Path(__file__).parent
    shipped = package / "_container"
    return shipped if shipped.is_dir() else package.parents[1] / "container"


@contextmanager
def hold_mounts(
    places: Places, group: Group, ipc: Directory, *, own_runner: bool
) -> Iterator[tuple[HeldMount, ...]]:
    """Hold what a run of *group* mounts, until its end.

    Args:
        places: Where things are.
        group: Whose run it is.
        ipc: The group's mailbox.
        own_runner: Whether our agent runner is mounted, or what a foreign image's
            checkout has in its place.

    Raises:
        UnsafePathError: If a path cannot be told to a runtime without ambiguity.
    """
    with ExitStack() as stack:
        runner = (
            container_directory() / "agent_runner"
            if own_runner
            else Path(places.settings.root, "container", "agent-runner", "src")
        )
        with places.open_group(group) as directory:
            mounts = [_hold(directory, WORKSPACE_GROUP, stack)]
        mounts.append(_hold(ipc, WORKSPACE_IPC, stack))
        if runner.is_dir():
            with Directory.at(str(runner)) as directory:
                mounts.append(_hold(directory, RUNNER, stack, readonly=True))
        yield tuple(mounts)


def _hold(
    directory: Directory, target: str, stack: ExitStack, *, readonly: bool = False
) -> HeldMount:
    check_mountable(directory.path)
    fd = directory.hold()
    stack.callback(os.close, fd)
    status = os.fstat(fd)
    mount = VolumeMount(directory.path, target, readonly)
    return HeldMount(mount, fd, status.st_dev, status.st_ino)


def check_mountable(path: str) -> None:
    """Refuse a path for which docker and podman would mount another directory.

    Raises:
        UnsafePathError: If it is not UTF-8 or holds control characters.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UnsafePathError(path, "must be UTF-8 to be mounted") from None
    if _CONTROL.search(path):
        raise UnsafePathError(path, "must not hold control characters to be mounted")
