"""Files and directories in places where an agent can write.

An agent may put a symlink, a FIFO, a device or a hard link where the host is going to
read or write, and may do so between two system calls. Hence every name is resolved
against an open directory, one component at a time and never through a symlink; every
open is non-blocking (a FIFO or a lease would hold it); what was opened is looked at
through its descriptor; files are written under a temporary name and renamed over.
What stands in our place and is of the wrong type is moved to the trash, unopened, and
the log says so.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import attrs

from ._errors import UnsafePathError
from ._text import one_line

log = logging.getLogger(__name__)

#: How many entries of a directory are looked at. NanoClaw's mailboxes hold a few.
MAX_ENTRIES: Final = 1000
#: Largest file of a skill or a runner.
_MAX_COPIED_BYTES: Final = 2**24
#: Largest file that is read: far above any message or task.
MAX_FILE_BYTES: Final = 2**20

#: A hostile agent may put the wrong thing there again; it gets no endless race.
_TRIES: Final = 3

_READ: Final = 2**16
#: No descriptor; -1 would be none to Python, which then takes the current directory.
_CLOSED: Final = 2**31 - 1
_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRONG_TYPE: Final = frozenset({errno.ENOTDIR, errno.ELOOP})
_CONTROL: Final = re.compile("[\0-\x1f\x7f-\x9f]")
_DIRECTORY_FLAGS: Final = _FLAGS | os.O_RDONLY | os.O_DIRECTORY


@attrs.frozen
class Owner:
    """The user and group that files made for an agent belong to."""

    uid: int
    gid: int


def _give(fd: int, owner: Owner | None) -> None:
    if owner is not None and os.geteuid() == 0:
        os.fchown(fd, owner.uid, owner.gid)


def _start_of(name: str) -> str:
    # Bytes count for NAME_MAX, and an agent's 64 characters may be 256 of them.
    return os.fsdecode(os.fsencode(name)[:64])


class Directory:
    """An open directory. Its path is for messages only, and never walked again."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path = path

    @classmethod
    def at(cls, path: str) -> Directory:
        """Open a directory whose path was checked by :func:`check_trusted`."""
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor. Who uses this later gets an error, and no other's."""
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            os.close(fd)

    def subdirectory(
        self,
        name: str,
        *,
        trash: Directory | None = None,
        owner: Owner | None = None,
        mode: int = 0o755,
    ) -> Directory:
        """Open a directory in this one; make it if need be.

        Args:
            name: One component.
            trash: Where anything else of that name is moved to.
            owner: Whom a new one belongs to, where we may decide that.
            mode: The permissions of a new one.

        Raises:
            UnsafePathError: If something else has the name and there is no trash, or
                an agent keeps on putting it there.
        """
        made = False
        for _ in range(_TRIES):
            try:
                found = self.existing(name)
            except UnsafePathError as exc:
                cause = exc.__cause__
                wrong = isinstance(cause, OSError) and cause.errno in _WRONG_TYPE
                if trash is None or not wrong:
                    raise
                self._discard_wrong(name, trash, exc.problem)
                continue
            if found is not None:
                if made:
                    found.give(owner)
                return found
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=self._fd)
                made = True
        problem = "must be a directory, and does not stay one"
        raise UnsafePathError(f"{self.path}/{name}", problem)

    def give(self, owner: Owner | None) -> None:
        """Make it *owner*'s, where we may decide that."""
        _give(self._fd, owner)

    def existing(self, name: str) -> Directory | None:
        """Open a directory in this one, if there is something of that name.

        Raises:
            UnsafePathError: If it is no directory, or cannot be opened.
        """
        path = f"{self.path}/{name}"
        try:
            try:
                fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=self._fd)
            except PermissionError:
                # An agent of our own uid can shut us out, and itself.
                with suppress(OSError):
                    self._permit(name)
                fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError as exc:
            problem = "must be a directory"
            if exc.errno not in _WRONG_TYPE:
                problem = f"cannot be opened: {exc.strerror}"
            raise UnsafePathError(path, problem) from exc
        return Directory(fd, path)

    def hold(self, name: str = ".") -> int:
        """Return an ``O_PATH`` descriptor of this directory, or of something in it.

        A symlink is held itself, not what it leads to.
        """
        return os.open(name, _FLAGS | os.O_PATH, dir_fd=self._fd)

    def names(self, limit: int | None = MAX_ENTRIES) -> list[str]:
        """List the first *limit* names, sorted; None lists all, for our own places."""
        with os.scandir(self._fd) as entries:
            return sorted(entry.name for entry in islice(entries, limit))

    def modified(self, name: str) -> float | None:
        """Tell when a regular file was written, in seconds; None for anything else."""
        try:
            status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return None
        return status.st_mtime if stat.S_ISREG(status.st_mode) else None

    def read(self, name: str, *, limit: int = MAX_FILE_BYTES) -> bytes | None:
        """Read a whole regular file; None if there is none.

        Raises:
            UnsafePathError: If it is no regular file, or larger than *limit* bytes.
        """
        path = f"{self.path}/{name}"
        try:
            fd = os.open(name, _FLAGS | os.O_RDONLY, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise UnsafePathError(path, f"cannot be read: {exc.strerror}") from exc
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnsafePathError(path, "must be a regular file")
            data = b""
            while len(data) <= limit and (chunk := os.read(fd, _READ)):
                data += chunk
        finally:
            os.close(fd)
        if len(data) > limit:
            raise UnsafePathError(path, f"must not be larger than {limit} bytes")
        return data

    def write(
        self,
        name: str,
        data: bytes,
        *,
        trash: Directory | None = None,
        owner: Owner | None = None,
        mode: int = 0o644,
        replace: bool = True,
    ) -> None:
        """Write a file so that a reader sees all of it or nothing.

        Args:
            name: One component; a file or link of that name is replaced.
            data: The whole content.
            trash: Where a directory of that name is moved to.
            owner: Whom it belongs to, where we may decide that.
            mode: Its permissions.
            replace: False leaves a file alone that is there already.

        Raises:
            FileExistsError: If *replace* is False and something has the name.
            UnsafePathError: If an agent keeps on putting a directory there.
        """
        temporary = f".{_start_of(name)}.{secrets.token_hex(8)}.tmp"
        flags = _FLAGS | os.O_WRONLY | os.O_CREAT | os.O_EXCL
        fd = os.open(temporary, flags, mode, dir_fd=self._fd)
        litter = True
        try:
            with os.fdopen(fd, "wb") as file:
                _give(fd, owner)
                file.write(data)
            publish = os.rename if replace else os.link
            for _ in range(_TRIES):
                try:
                    publish(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                    break
                except IsADirectoryError:
                    if trash is None:
                        raise
                    self._discard_wrong(name, trash, "must be a file")
            else:
                problem = "must be a file, and does not stay one"
                raise UnsafePathError(f"{self.path}/{name}", problem)
            # A link leaves the temporary name; a rename leaves it to the agent.
            litter = not replace
        finally:
            if litter:
                # An agent may have done anything to it: no matter for the outcome.
                with suppress(OSError):
                    self.remove(temporary)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def rename(self, name: str, new_name: str) -> None:
        """Give something in here another name."""
        os.rename(name, new_name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def discard(self, name: str, trash: Directory) -> None:
        """Move whatever has the name to the trash, if there is anything."""
        target = f"{secrets.token_hex(8)}-{_start_of(name)}"
        with suppress(FileNotFoundError):
            try:
                os.rename(name, target, src_dir_fd=self._fd, dst_dir_fd=trash._fd)
            except PermissionError:
                # The ".." of a directory changes, which asks for leave to write in it;
                # and an agent of our own uid can take it from the one that it is in.
                for place in (name, "."):
                    with suppress(OSError):
                        self._permit(place)
                os.rename(name, target, src_dir_fd=self._fd, dst_dir_fd=trash._fd)

    def _discard_wrong(self, name: str, trash: Directory, problem: str) -> None:
        """Move what is of the wrong type to the trash; it may have been of use."""
        path = one_line(f"{self.path}/{name}")
        log.warning("%s %s: moved to the trash", path, problem)
        self.discard(name, trash)

    def _permit(self, name: str) -> None:
        """Let us write in a directory of ours, whatever its mode."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=self._fd)
        try:
            # fchmod() takes no O_PATH descriptor.
            Path(f"/proc/self/fd/{fd}").chmod(0o700)
        finally:
            os.close(fd)

    def empty(self, limit: int) -> bool:
        """Delete what is in here, however deep: for the trash.

        What is in a directory moves up beside it before that is removed: neither
        recursion nor a path as long as an agent can make it would end well.

        Args:
            limit: How many names to look at, so that it ends soon.

        Returns:
            True if there is nothing left.
        """
        while names := self.names():
            for name in names:
                if limit <= 0:
                    return False
                limit -= self._delete(name)
        return True

    def _delete(self, name: str) -> int:
        """Delete a file, or a directory once its content has moved up; say how many."""
        try:
            os.unlink(name, dir_fd=self._fd)
        except IsADirectoryError:
            self._permit(name)
            fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=self._fd)
            with Directory(fd, name) as child:
                entries = child.names()
                for entry in entries:
                    child.discard(entry, self)
            try:
                os.rmdir(name, dir_fd=self._fd)
            except OSError as exc:
                # There was more in it, or an agent still sees it: next time round.
                if exc.errno != errno.ENOTEMPTY:
                    raise
            return 1 + len(entries)
        return 1

    def copy_tree(self, source: Directory, trash: Directory, owner: Owner) -> None:
        """Copy a tree over what is here; what else is here stays.

        Args:
            source: What to copy. Symlinks are left out: an agent may have made them.
                So is what goes away meanwhile.
            trash: Where what is of the wrong type here is moved to.
            owner: Whom the copies belong to, where we may decide that.

        Raises:
            UnsafePathError: If a file is too large, or something is swapped meanwhile.
        """
        for name in source.names(None):
            try:
                status = os.stat(name, dir_fd=source._fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            mode = status.st_mode
            if stat.S_ISREG(mode):
                content = source.read(name, limit=_MAX_COPIED_BYTES)
                if content is None:
                    continue
                permissions = 0o755 if mode & stat.S_IXUSR else 0o644
                self.write(name, content, trash=trash, owner=owner, mode=permissions)
            elif stat.S_ISDIR(mode) and (inner := source.existing(name)) is not None:
                with inner, self.subdirectory(name, trash=trash, owner=owner) as child:
                    child.copy_tree(inner, trash, owner)

    @contextmanager
    def claim(self, name: str, data: bytes) -> Iterator[None]:
        """Hold a locked file that nobody ever sees unlocked; it stays behind."""
        temporary = f".{name}.tmp"
        with self.lock(temporary) as fd:
            os.write(fd, data)
            os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            yield

    @contextmanager
    def lock(self, name: str) -> Iterator[int]:
        """Hold an exclusive lock on a file of that name, made if need be.

        Gives the file's descriptor. The file stays: removing one that someone else
        has opened would give two owners.

        Raises:
            BlockingIOError: If it is held by another, here or in another process.
        """
        fd = os.open(name, _FLAGS | os.O_RDWR | os.O_CREAT, 0o600, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield fd
            finally:
                # A process that is just being spawned may have fd until it executes.
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)


def check_trusted(path: str, uids: frozenset[int], gids: frozenset[int]) -> None:
    """Make sure that nobody but *uids* can replace *path* or an ancestor of it.

    Raises:
        UnsafePathError: If someone else owns or may write one of them; names it.
    """
    seen: set[str] = set()
    starts = [path]
    # Through every symlink, since whoever can replace one leads us elsewhere.
    while starts:
        start = Path(starts.pop())
        for place in (start, *start.parents):
            if str(place) not in seen:
                seen.add(str(place))
                _check_component(str(place), uids, gids)
                if place.is_symlink():
                    starts.append(str(place.parent / place.readlink()))


def _check_component(place: str, uids: frozenset[int], gids: frozenset[int]) -> None:
    try:
        status = os.lstat(place)
    except FileNotFoundError:
        raise UnsafePathError(place, "does not exist: make it first") from None
    except OSError as exc:
        raise UnsafePathError(place, f"cannot be reached: {exc.strerror}") from exc
    if status.st_uid not in uids:
        owners = " or ".join(map(str, sorted(uids)))
        problem = f"belongs to uid {status.st_uid}, must belong to {owners}"
        raise UnsafePathError(place, problem)
    if stat.S_ISLNK(status.st_mode) or status.st_mode & stat.S_ISVTX:
        return
    if status.st_mode & stat.S_IWOTH:
        raise UnsafePathError(place, "can be written by anybody: chmod o-w")
    if status.st_mode & stat.S_IWGRP and status.st_gid not in gids:
        problem = f"can be written by gid {status.st_gid}: chmod g-w"
        raise UnsafePathError(place, problem)


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
