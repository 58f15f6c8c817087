"""How a run's words reach the agent: the input first, then follow-ups, then the close.

There are two ways, by :attr:`Settings.stdin`. Both take words without waiting, so that
a callback may send to an agent that is itself blocked on writing to us, and both know
what the agent can have read, without which nobody could tell what an output answers.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import ExitStack
from typing import Final, Protocol

import trio

from ._codec import CLOSE, encode_message
from ._errors import FollowUpRefusedError, UnsafePathError
from ._groups import Places
from ._hostfs import Directory, Owner
from ._models import Group

log = logging.getLogger(__name__)

#: Bytes of follow-ups that may wait for an agent which does not read.
QUEUE_LIMIT: Final = 2**20
#: The name of the file that ends a session in ``eof`` mode.
CLOSE_FILE: Final = "_close"


class Words(Protocol):
    """One of the two ways."""

    def send(self, message_id: int, text: str) -> None:
        """Queue a follow-up.

        Raises:
            FollowUpRefusedError: If there is no room for it.
        """

    def finish(self) -> None:
        """Tell the agent to finish its turn, then leave."""

    def unread(self) -> frozenset[int]:
        """Return the numbers of the messages that the agent cannot have read.

        The prompt is one only until its writing has begun: what an agent says before
        it has read all of a long prompt can be about nothing else.
        """

    async def write(self, stdin: trio.abc.SendStream) -> None:
        """Write to the agent what there is to say, until cancelled.

        Raises:
            trio.BrokenResourceError: If the agent has closed its stdin.
            trio.ClosedResourceError: If we did.
        """


def open_words(
    line: bytes, places: Places, group: Group, run_id: str, stack: ExitStack
) -> Words:
    """Choose the way that the settings say, and clear it.

    Args:
        line: The input.
        places: Where the mailbox is.
        group: Whose.
        run_id: The run's; in the names of the files.
        stack: Clears the mailbox again at the run's end.
    """
    if places.settings.stdin == "lifeline":
        return LifelineWords(line)
    ipc = stack.enter_context(places.open_ipc(group))
    # What an earlier run has not read is not for this one, nor the other way round.
    ipc.discard("input", places.trash)
    stack.callback(_clear_input, ipc, places.trash)
    directory = stack.enter_context(places.open_in_ipc(ipc, "input"))
    return FileWords(line, directory, run_id, places.owner, trash=places.trash)


def _clear_input(ipc: Directory, trash: Directory) -> None:
    try:
        ipc.discard("input", trash)
    except (OSError, UnsafePathError) as exc:
        # An agent of our own uid can forbid it; the next start tries again.
        log.warning("cannot clear %s/input: %s", ipc.path, exc)


def _check_room(queued: int, size: int) -> None:
    if queued + size > QUEUE_LIMIT:
        raise FollowUpRefusedError(
            f"a follow-up of {size} bytes does not fit: of {QUEUE_LIMIT} bytes that "
            f"may wait for the agent, {queued} do"
        )


class LifelineWords:
    """Lines on an open stdin, whose end would mean that the host is gone.

    Args:
        first_line: The input, without its newline.
    """

    def __init__(self, first_line: bytes) -> None:
        self._lines = deque([(0, first_line)])
        self._queued = 0
        self._begun = False
        self._more = trio.Event()
        self._more.set()

    def send(self, message_id: int, text: str) -> None:
        """See :meth:`Words.send`."""
        line = encode_message(message_id, text)
        _check_room(self._queued, len(line))
        self._queued += len(line)
        self._append(message_id, line)

    def finish(self) -> None:
        """See :meth:`Words.finish`."""
        self._append(0, CLOSE)

    def _append(self, message_id: int, line: bytes) -> None:
        self._lines.append((message_id, line))
        self._more.set()

    def unread(self) -> frozenset[int]:
        """See :meth:`Words.unread`."""
        waiting = {message_id for message_id, _ in self._lines}
        return frozenset(waiting - {0} if self._begun else waiting)

    async def write(self, stdin: trio.abc.SendStream) -> None:
        """See :meth:`Words.write`."""
        self._begun = True
        while True:
            await self._more.wait()
            while self._lines:
                message_id, line = self._lines[0]
                await stdin.send_all(line + b"\n")
                self._lines.popleft()
                if message_id:
                    self._queued -= len(line)
            self._more = trio.Event()


class FileWords:
    """Files in the group's ``ipc/input``, for an agent whose stdin ends at once.

    Args:
        input_json: The input.
        directory: ``ipc/input``.
        run_id: Goes into the names of the files.
        owner: Whom they belong to.
        trash: Where a directory that stands in the place of one is moved to.
    """

    def __init__(
        self,
        input_json: bytes,
        directory: Directory,
        run_id: str,
        owner: Owner | None = None,
        *,
        trash: Directory | None = None,
    ) -> None:
        self._input = input_json
        self._directory = directory
        self._run_id = run_id
        self._owner = owner
        self._trash = trash
        self._begun = False
        self._written: dict[int, int] = {}

    def _name(self, message_id: int) -> str:
        # Agents take them in order of name.
        return f"{message_id:08d}-{self._run_id}.json"

    def send(self, message_id: int, text: str) -> None:
        """See :meth:`Words.send`."""
        data = encode_message(message_id, text)
        if sum(self._written.values()) + len(data) > QUEUE_LIMIT:
            self.unread()
        _check_room(sum(self._written.values()), len(data))
        try:
            self._write_file(self._name(message_id), data)
        except (OSError, UnsafePathError) as exc:
            raise FollowUpRefusedError(f"cannot write it for the agent: {exc}") from exc
        self._written[message_id] = len(data)

    def finish(self) -> None:
        """See :meth:`Words.finish`."""
        self._write_file(CLOSE_FILE, b"")

    def _write_file(self, name: str, data: bytes) -> None:
        self._directory.write(name, data, trash=self._trash, owner=self._owner)

    def unread(self) -> frozenset[int]:
        """See :meth:`Words.unread`."""
        # An agent removes what it has read. Not a listing, which has a limit.
        left = {
            m: size
            for m, size in self._written.items()
            if self._directory.modified(self._name(m)) is not None
        }
        self._written = left
        return frozenset(left if self._begun else {0, *left})

    async def write(self, stdin: trio.abc.SendStream) -> None:
        """See :meth:`Words.write`."""
        self._begun = True
        async with stdin:
            await stdin.send_all(self._input)
        await trio.sleep_forever()


async def write_words(
    words: Words,
    stdin: trio.abc.SendStream,
    logger: logging.LoggerAdapter[logging.Logger],
) -> None:
    """Be the one task that writes to an agent. Broken stdin is no end of a run."""
    try:
        await words.write(stdin)
    except trio.BrokenResourceError:
        logger.info("the agent has closed its stdin")
    except trio.ClosedResourceError:
        logger.debug("stdin was closed, for the agent to leave")
