"""What a dispatcher keeps: messages until they have ended, sessions, tasks.

A dispatcher has all of it in memory, so that nothing is read but at the start, and a
store is a journal: once ``write()`` has returned, a :class:`Change` is in it, whole. It
has one owner at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

import attrs
import trio

from ._errors import StoreBusyError
from ._models import ScheduledTask

MessageState: TypeAlias = Literal["waiting", "reached", "failed"]


@attrs.frozen(kw_only=True)
class Message:
    """Something that an agent is to answer, and has not yet.

    Attributes:
        id: Unique in its store for ever, and rising in order of arrival.
        chat_jid: The chat that gets the answer.
        text: What to ask.
        task_id: The scheduled task that asks; None if a person does.
        isolated: Whether the group's session has nothing to do with it.
        attempts: How many runs it was given to in vain.
        state: ``reached`` once text of its turn has reached the chat, so that it is not
            asked again; ``failed`` once it has ended and that is still to be said.
    """

    id: int
    chat_jid: str
    text: str
    task_id: str | None = None
    isolated: bool = attrs.field(default=False, converter=bool)
    attempts: int = 0
    state: MessageState = "waiting"


@attrs.frozen(kw_only=True)
class Contents:
    """All that a store holds.

    Attributes:
        next_id: Higher than the id of any message that it ever held.
        messages: By id, in order.
        sessions: Session ids, by the folder of the group.
        tasks: By id.
    """

    next_id: int = 1
    messages: Mapping[int, Message] = attrs.field(factory=dict)
    sessions: Mapping[str, str] = attrs.field(factory=dict)
    tasks: Mapping[str, ScheduledTask] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Change:
    """What becomes different at once.

    Attributes:
        put: Messages that are new or have changed.
        ended: Ids of messages that were answered, or whose failure was said.
        sessions: New session ids, by folder.
        tasks: Tasks by id; None removes one.
    """

    put: tuple[Message, ...] = attrs.field(default=(), converter=tuple[Message, ...])
    ended: tuple[int, ...] = attrs.field(default=(), converter=tuple[int, ...])
    sessions: Mapping[str, str] = attrs.field(factory=dict)
    tasks: Mapping[str, ScheduledTask | None] = attrs.field(factory=dict)


class Store(Protocol):
    """Where a dispatcher keeps what must outlive it."""

    async def open(self) -> Contents:
        """Become its owner, and read all of it.

        Raises:
            StoreBusyError: If it has an owner.
        """

    async def write(self, change: Change) -> None:
        """Make *change*, for good once this returns.

        Raises:
            trio.Cancelled: Only if nothing was changed.
        """

    async def close(self) -> None:
        """Be its owner no longer. Cannot fail, nor be cancelled."""


class MemoryStore:
    """A :class:`Store` for tests, and for bots that may forget.

    It can be opened again, as long as it lives. It uses no threads.

    Attributes:
        contents: What it holds.
    """

    def __init__(self, contents: Contents | None = None) -> None:
        self.contents = contents or Contents()
        self._owned = False

    async def open(self) -> Contents:
        """See :meth:`Store.open`."""
        await trio.lowlevel.checkpoint()
        if self._owned:
            raise StoreBusyError("this MemoryStore")
        self._owned = True
        return self.contents

    async def write(self, change: Change) -> None:
        """See :meth:`Store.write`."""
        await trio.lowlevel.checkpoint()
        old = self.contents
        put = {message.id: message for message in change.put}
        messages = {**old.messages, **put}
        for message_id in change.ended:
            messages.pop(message_id, None)
        tasks = {**old.tasks, **change.tasks}
        self.contents = Contents(
            next_id=max(old.next_id, *(n + 1 for n in put), 1),
            messages=messages,
            sessions={**old.sessions, **change.sessions},
            tasks={name: task for name, task in tasks.items() if task is not None},
        )

    async def close(self) -> None:
        """See :meth:`Store.close`."""
        self._owned = False


#: The layout of the tables; another number is a file of another version of ours.
_VERSION: Final = 1
# AUTOINCREMENT: an id is never used again, whatever was deleted.
_TABLES: Final = (
    """CREATE TABLE message (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        chat_jid TEXT NOT NULL,
        text TEXT NOT NULL,
        task_id TEXT,
        isolated INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        state TEXT NOT NULL
    )""",
    "CREATE TABLE session (folder TEXT PRIMARY KEY, session_id TEXT NOT NULL)",
    "CREATE TABLE task (id TEXT PRIMARY KEY, fields TEXT NOT NULL)",
)
_PUT: Final = "INSERT OR REPLACE INTO message VALUES (?, ?, ?, ?, ?, ?, ?)"


class SqliteStore:
    """A :class:`Store` in a SQLite file.

    What ``write()`` has returned from outlasts a loss of power, too. The owner holds a
    lock on the file *path* + ``.lock``, for as long as its process lives at most.

    Args:
        path: The file; made if need be, for nobody else to read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._connection: sqlite3.Connection | None = None
        self._lock = -1
        # One at a time, in order of arrival.
        self._thread = trio.CapacityLimiter(1)

    async def open(self) -> Contents:
        """See :meth:`Store.open`.

        Raises:
            StoreBusyError: If it has an owner, here or in another process.
            OSError: If the files cannot be made.
            sqlite3.Error: If it is no file of this version.
        """
        return await trio.to_thread.run_sync(self._open, limiter=self._thread)

    async def write(self, change: Change) -> None:
        """See :meth:`Store.write`.

        Raises:
            sqlite3.Error: If it could not be written; nothing was changed.
        """
        await trio.to_thread.run_sync(
            partial(self._write, change), limiter=self._thread
        )

    async def close(self) -> None:
        """See :meth:`Store.close`."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._close, limiter=self._thread)

    def _open(self) -> Contents:
        # Not the database itself, whose POSIX locks would go when we close our lock.
        lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StoreBusyError(self._path) from None
        self._lock = lock
        try:
            Path(self._path).touch(0o600)
            # The limiter sees to it that there is one thread at a time.
            self._connection = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False
            )
            return self._read(self._connection)
        except BaseException:
            self._close()
            raise

    def _read(self, connection: sqlite3.Connection) -> Contents:
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode a commit is on the disk with FULL alone. A message that was
        # accepted, and then lost to a power cut, would be lost for ever.
        connection.execute("PRAGMA synchronous = FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            with _transaction(connection):
                for statement in _TABLES:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise sqlite3.DatabaseError(
                f"{self._path} has version {version}, not {_VERSION}"
            )
        names = [field.name for field in attrs.fields(Message)]
        messages = [
            Message(**dict(zip(names, row, strict=True)))
            for row in connection.execute("SELECT * FROM message ORDER BY id")
        ]
        highest = connection.execute("SELECT seq FROM sqlite_sequence").fetchone()
        tasks = connection.execute("SELECT fields FROM task ORDER BY id")
        return Contents(
            next_id=highest[0] + 1 if highest else 1,
            messages={message.id: message for message in messages},
            sessions=dict(connection.execute("SELECT folder, session_id FROM session")),
            tasks={
                task.id: task
                for task in (ScheduledTask(**json.loads(row[0])) for row in tasks)
            },
        )

    def _write(self, change: Change) -> None:
        assert self._connection is not None, "the store is not open"
        with _transaction(self._connection) as connection:
            connection.executemany(
                _PUT, [attrs.astuple(message) for message in change.put]
            )
            connection.executemany(
                "DELETE FROM message WHERE id = ?", [(n,) for n in change.ended]
            )
            connection.executemany(
                "INSERT OR REPLACE INTO session VALUES (?, ?)", change.sessions.items()
            )
            for task_id, task in change.tasks.items():
                if task is None:
                    connection.execute("DELETE FROM task WHERE id = ?", (task_id,))
                else:
                    fields = json.dumps(attrs.asdict(task))
                    connection.execute(
                        "INSERT OR REPLACE INTO task VALUES (?, ?)", (task_id, fields)
                    )

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        os.close(self._lock)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        # Does nothing where the error has rolled it back already.
        connection.rollback()
        raise
