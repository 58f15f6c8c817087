"""Where everything of a group is on the host: the one place that knows the layout.

::

    groups/<folder>             the group's own, the agent writes in it
    groups/global               memory that all groups see
    data/ipc/<folder>           messages, tasks, input: the agent writes in it
    data/sessions/<folder>      .claude, in which the agent writes; its runner's copy
    data/logs/<folder>          run logs, never mounted
    data/sockets/<run>          where the run's container reaches the proxy
    data/locks, data/engines    locks, never mounted
    data/errors                 malformed requests, never mounted
    data/trash                  what waits to be deleted, never mounted

No agent can write where the groups' folders and mailboxes are: what stands there in
the place of one is the operator's, and an error. In a mailbox it is the agent's doing,
and is moved to the trash.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from ._errors import GroupBusyError, UnsafePathError
from ._hostfs import Directory, Owner, check_trusted
from ._models import Group
from ._settings import Settings

#: The user and group of agents where root owns the place: ``node`` in the image.
_UNPRIVILEGED: Final = 1000

_ROOT_ID: Final = "root-id"
#: No group's lock is called that: a folder cannot begin with a dot.
_TRASH_LOCK: Final = ".trash"

IPC_SUBDIRECTORIES: Final = ("messages", "tasks", "input")


class Places:
    """The directories of one root, held open.

    Attributes:
        settings: Where they are.
        owner: Whom what we make for agents belongs to, and whom they run as.
        trash: Where things go that an agent may still be writing in.
        engines: Where engines have their files.
        sockets: Where each run has a directory for its socket, named
            ``<engine id>-<run id>``.
        errors: Where requests go that make no sense.
        root_id: Random, kept in the data directory: which root a container is of.
    """

    def __init__(self, settings: Settings, owner: Owner, stack: ExitStack) -> None:
        self.settings = settings
        self.owner = owner
        self._groups = stack.enter_context(Directory.at(settings.groups_dir))
        self._data = stack.enter_context(Directory.at(settings.data_dir))
        enter = stack.enter_context
        self.engines = enter(self._data.subdirectory("engines", mode=0o700))
        self.sockets = enter(self._data.subdirectory("sockets", mode=0o700))
        self._locks = enter(self._data.subdirectory("locks", mode=0o700))
        self._logs = enter(self._data.subdirectory("logs", mode=0o700))
        self._ipc = enter(self._data.subdirectory("ipc"))
        self._sessions = enter(self._data.subdirectory("sessions"))
        self.trash = enter(self._data.subdirectory("trash", mode=0o700))
        self.errors = enter(self._data.subdirectory("errors", mode=0o700))
        self.root_id = self._read_root_id()

    def _read_root_id(self) -> str:
        root_id = self._data.read(_ROOT_ID)
        if root_id is None:
            # Of several engines that start at once, the first one's is kept.
            fresh = secrets.token_hex(16).encode()
            with suppress(FileExistsError):
                self._data.write(_ROOT_ID, fresh, mode=0o600, replace=False)
            root_id = self._data.read(_ROOT_ID) or fresh
        return root_id.decode("ascii", errors="replace").strip()

    @contextmanager
    def lock_group(self, group: Group) -> Iterator[None]:
        """Hold the group, so that it has one live run.

        Raises:
            GroupBusyError: If it is held by another run, here or elsewhere.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locks.lock(group.folder.casefold()))
            except BlockingIOError:
                raise GroupBusyError(group.folder) from None
            yield

    def open_group(self, group: Group) -> Directory:
        """Open the group's own directory; made if need be.

        Raises:
            UnsafePathError: If something else is there, or it cannot be opened.
        """
        return self._groups.subdirectory(group.folder, owner=self.owner)

    def open_global(self) -> Directory | None:
        """Open the memory that all groups see, if the operator has made one.

        Raises:
            UnsafePathError: If something else is there, or it cannot be opened.
        """
        return self._groups.existing("global")

    def open_session(self, group: Group) -> Directory:
        """Open where the agent's ``.claude`` is: the agent does not see that itself.

        Raises:
            UnsafePathError: If something else is there, or it cannot be opened.
        """
        return self._sessions.subdirectory(group.folder)

    def open_ipc(self, group: Group) -> Directory:
        """Open the group's mailbox.

        Raises:
            UnsafePathError: If something else is there, or it cannot be opened.
        """
        return self._ipc.subdirectory(group.folder, owner=self.owner)

    def furnish_ipc(self, ipc: Directory) -> None:
        """Make what belongs in a mailbox."""
        for name in IPC_SUBDIRECTORIES:
            self.open_in_ipc(ipc, name).close()

    def open_in_ipc(self, ipc: Directory, name: str) -> Directory:
        """Open a directory of a mailbox, in which an agent may have done anything."""
        return ipc.subdirectory(name, trash=self.trash, owner=self.owner)

    def open_logs(self, group: Group) -> Directory:
        """Open the directory of the group's run logs."""
        return self._logs.subdirectory(group.folder, mode=0o700)

    def empty_trash(self, limit: int) -> bool:
        """Delete up to *limit* things; True if there is nothing left to do here."""
        try:
            with self._locks.lock(_TRASH_LOCK):
                return self.trash.empty(limit)
        except BlockingIOError:
            # Another engine of this root is at it.
            return True

    def free(self) -> tuple[int, int | None]:
        """Return the bytes and inodes to be had, where groups and data are.

        The inodes are None where the file system does not count them.
        """
        places = (self.settings.groups_dir, self.settings.data_dir)
        found = [os.statvfs(place) for place in places]
        counted = [status.f_favail for status in found if status.f_files]
        return (
            min(status.f_bavail * status.f_frsize for status in found),
            min(counted, default=None),
        )


@contextmanager
def open_places(settings: Settings) -> Iterator[Places]:
    """Check the roots, make what is missing, and hold them open.

    Raises:
        UnsafePathError: If an agent, or another user, could replace one of them.
    """
    owner = _agent_owner(settings)
    uids = frozenset({0, os.geteuid(), owner.uid})
    gids = frozenset({0, os.getegid(), owner.gid})
    check_trusted(settings.root, uids, gids)
    # The data directory holds sessions and logs, nobody else's business.
    for path, mode in ((settings.groups_dir, 0o755), (settings.data_dir, 0o700)):
        _check_not_writable_by_agents(path, settings)
        Path(path).mkdir(mode, parents=True, exist_ok=True)
        check_trusted(path, uids, gids)
    _check_not_writable_by_agents(settings.root, settings)
    with ExitStack() as stack:
        yield Places(settings, owner, stack)


def _agent_owner(settings: Settings) -> Owner:
    try:
        status = Path(settings.root).stat()
    except FileNotFoundError:
        raise UnsafePathError(settings.root, "does not exist: make it first") from None
    uid = settings.run_uid or status.st_uid or _UNPRIVILEGED
    return Owner(uid, status.st_gid or _UNPRIVILEGED)


def _check_not_writable_by_agents(path: str, settings: Settings) -> None:
    """Refuse a root below a directory that agents write in."""
    place = Path(os.path.realpath(path))
    groups = Path(os.path.realpath(settings.groups_dir))
    data = Path(os.path.realpath(settings.data_dir))
    writable = [data / "ipc", data / "sessions"]
    if place != groups or place == data:
        writable.append(groups)
    elif place.is_relative_to(data):
        # A group called like an engine or another's logs would be mounted there.
        raise UnsafePathError(path, f"is in the data directory {str(data)!r}")
    for parent in writable:
        if place.is_relative_to(parent):
            raise UnsafePathError(path, f"is in {str(parent)!r}, where agents write")
