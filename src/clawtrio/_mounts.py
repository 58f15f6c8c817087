"""What a container sees of the host: checked, and held from check to start.

Rules to keep when changing this:

- Everything is composed, nothing is masked: a mask falls away when what it hides is
  replaced by a rename, as ``.env`` is at every renewal of a token.
- No target lies in another mount that can be written: an agent would plant a symlink
  there, and have the runtime make or mount something elsewhere. The home directory,
  fresh and in memory, is the exception.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import attrs

from ._allowlist import is_blocked
from ._forbidden import Forbidden
from ._groups import Places
from ._hostfs import Directory, check_mountable
from ._models import Group, VolumeMount
from ._runtimes import HOME, RUNNER, WORKSPACE_GROUP, HeldMount
from ._sessions import open_claude, open_runner_copy

_PROJECT: Final = "/workspace/project"
_GLOBAL: Final = "/workspace/global"
_IPC: Final = "/workspace/ipc"
_CLAUDE: Final = f"{HOME}/.claude"

#: Names in the root that begin like this are secrets, whatever comes after it.
_SECRETS: Final = ".env"


def container_directory() -> Path:
    """Return the directory with the image's files, in a wheel or in a checkout."""
    package = Path(__file__).parent
    shipped = package / "_container"
    return shipped if shipped.is_dir() else package.parents[1] / "container"


@contextmanager
def hold_mounts(
    places: Places, group: Group, forbidden: Forbidden, *, own_runner: bool
) -> Iterator[tuple[HeldMount, ...]]:
    """Make what a run of *group* mounts, and hold it until the run's end.

    Args:
        places: Where things are.
        group: Whose run it is.
        forbidden: What not even main sees.
        own_runner: Whether our agent runner is mounted, or what a foreign image's
            checkout has in its place.

    Raises:
        UnsafePathError: If a path cannot be told to a runtime without ambiguity, or
            something else is in our place.
    """
    root = Path(places.settings.root)
    skills = [container_directory() / "skills", root / "container" / "skills"]
    with ExitStack() as stack:
        mounts = list(_hold_project(places, forbidden, stack)) if group.is_main else []
        with places.open_group(group) as directory:
            mounts.append(_hold(directory, WORKSPACE_GROUP, stack))
        shared = None if group.is_main else places.open_global()
        if shared is not None:
            with shared:
                mounts.append(_hold(shared, _GLOBAL, stack, readonly=True))
        with open_claude(places, group, skills) as directory:
            mounts.append(_hold(directory, _CLAUDE, stack))
        with places.open_ipc(group) as directory:
            places.furnish_ipc(directory)
            mounts.append(_hold(directory, _IPC, stack))
        runner = root / "container" / "agent-runner" / "src"
        if own_runner:
            runner = container_directory() / "agent_runner"
        if runner.is_dir() and places.settings.writable_agent_runner:
            with open_runner_copy(places, group, runner) as directory:
                mounts.append(_hold(directory, RUNNER, stack))
        elif runner.is_dir():
            with Directory.at(str(runner)) as directory:
                held = _hold(directory, RUNNER, stack, readonly=True)
            # It may be the system's, which is not for us to label.
            mounts.append(attrs.evolve(held, relabel=False))
        yield tuple(mounts)


def _hold_project(
    places: Places, forbidden: Forbidden, stack: ExitStack
) -> Iterator[HeldMount]:
    """Hold each entry of the root that is for main to see: all but what is private."""
    root = os.path.realpath(places.settings.root)
    with Directory.at(places.settings.root) as directory:
        for name in directory.names(None):
            # What people keep in their homes is no part of a project.
            if forbidden.root_is_home and is_blocked(name):
                continue
            if name.startswith(_SECRETS) or forbidden.is_private(Path(root, name)):
                continue
            held = _hold(
                directory, f"{_PROJECT}/{name}", stack, name=name, readonly=True
            )
            mode = os.fstat(held.fd).st_mode
            # A symlink leads nowhere in the container, or to what is there already.
            if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                yield held


def _hold(
    directory: Directory,
    target: str,
    stack: ExitStack,
    *,
    name: str = ".",
    readonly: bool = False,
) -> HeldMount:
    path = directory.path if name == "." else f"{directory.path}/{name}"
    check_mountable(path)
    fd = directory.hold(name)
    stack.callback(os.close, fd)
    status = os.fstat(fd)
    mount = VolumeMount(path, target, readonly)
    return HeldMount(mount, fd, status.st_dev, status.st_ino, relabel=True)
