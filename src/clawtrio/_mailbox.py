"""What agents ask of the bot: files in their mailboxes -> requests.

The group that asks is the one in whose mailbox a file is, whatever the file says. Main
may act on others, and others on themselves only; nobody can make a group main. What an
agent wrote is looked at only as far as it is safe and small; what makes no sense goes
to ``data/errors``. A file goes when its request was dealt with, and not before.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import attrs
import trio

from ._codec import well_formed
from ._errors import GroupFolderError, UnsafePathError
from ._groups import Places
from ._hostfs import MAX_ENTRIES, Directory
from ._models import AdditionalMount, ContainerConfig, Group
from ._text import one_line

log = logging.getLogger(__name__)

#: Seconds between two looks, where no event says that something is new.
_POLL_INTERVAL: Final = 5.0
#: Seconds between two looks at least, however many events an agent makes.
_REST: Final = 0.05
#: Files taken from one mailbox at a time, so that the others have their turn.
_BATCH: Final = 64
#: More of them than that are not kept: an agent can make any number.
_MAX_ERRORS: Final = 1000
_MAX_ID: Final = 256

_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVED_TO: Final = 0x80


@attrs.frozen(kw_only=True)
class Request:
    """Something that an agent asks for. ``async with request:`` deals with it.

    Leaving that block removes its file. If the block raises, or the host ends, the file
    stays, and the request comes again when requests are opened the next time.

    Attributes:
        group: Whose agent asks.
    """

    group: Group
    _settle: Callable[[], None] = attrs.field(
        default=lambda: None, eq=False, repr=False, alias="settle"
    )

    async def __aenter__(self) -> Self:
        await trio.lowlevel.checkpoint()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self._settle()


@attrs.frozen(kw_only=True)
class SendMessage(Request):
    """Say something in a chat, in the name of *sender* if that is not None."""

    chat_jid: str
    text: str
    sender: str | None = None


@attrs.frozen(kw_only=True)
class ScheduleTask(Request):
    """Schedule a task for the chat *target_jid*; see :class:`ScheduledTask`."""

    task_id: str | None
    prompt: str
    schedule_type: str
    schedule_value: str
    context_mode: str
    target_jid: str


@attrs.frozen(kw_only=True)
class PauseTask(Request):
    """Pause a task, if it is the group's or that is main."""

    task_id: str


@attrs.frozen(kw_only=True)
class ResumeTask(Request):
    """Resume a task, if it is the group's or that is main."""

    task_id: str


@attrs.frozen(kw_only=True)
class CancelTask(Request):
    """Cancel a task, if it is the group's or that is main."""

    task_id: str


@attrs.frozen(kw_only=True)
class UpdateTask(Request):
    """Change what is not None of a task, if it is the group's or that is main."""

    task_id: str
    prompt: str | None = None
    schedule_type: str | None = None
    schedule_value: str | None = None


@attrs.frozen(kw_only=True)
class RefreshGroups(Request):
    """Find out which chats there are, and write main's snapshot of them."""


@attrs.frozen(kw_only=True)
class RegisterGroup(Request):
    """Register *new_group*, which is never main, for the chat *jid*."""

    jid: str
    new_group: Group


class _RefusedError(Exception):
    """An agent asks for what it has no right to."""


_Fields: TypeAlias = dict[str, Any]


def _text_of(fields: _Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text")
    # What JavaScript passes on and UTF-8 cannot say would fail in the bot.
    return well_formed(value)


def _id_of(fields: _Fields, name: str) -> str:
    value = _text_of(fields, name)
    if len(value) > _MAX_ID or not value.isprintable():
        raise ValueError(f"{name} must be {_MAX_ID} printable characters at most")
    return value


def _optional(fields: _Fields, name: str) -> str | None:
    return None if fields.get(name) is None else _text_of(fields, name)


def _mode_of(fields: _Fields) -> str:
    return "group" if fields.get("context_mode") == "group" else "isolated"


def _config_of(fields: _Fields) -> ContainerConfig:
    config = fields.get("containerConfig") or {}
    timeout = config.get("timeout")
    return ContainerConfig(
        additional_mounts=[
            AdditionalMount(
                _text_of(mount, "hostPath"),
                _optional(mount, "containerPath"),
                mount.get("readonly") is not False,
            )
            for mount in config.get("additionalMounts") or ()
        ],
        timeout=None if timeout is None else timeout / 1000,
    )


def parse_request(
    fields: _Fields,
    group: Group,
    groups: Mapping[str, Group],
    settle: Callable[[], None],
) -> Request:
    """Make a request of what an agent of *group* wrote.

    Raises:
        _RefusedError: If the group has no right to it.
        Exception: Anything, if it makes no sense.
    """
    kind = fields["type"]
    by: dict[str, Any] = {"group": group, "settle": settle}
    if kind == "message":
        chat_jid = _id_of(fields, "chatJid")
        _check_chat(group, groups, chat_jid)
        return SendMessage(
            chat_jid=chat_jid,
            text=_text_of(fields, "text"),
            sender=_optional(fields, "sender"),
            **by,
        )
    if kind == "schedule_task":
        target = _id_of(fields, "targetJid")
        _check_chat(group, groups, target)
        return ScheduleTask(
            task_id=_id_of(fields, "taskId") if fields.get("taskId") else None,
            prompt=_text_of(fields, "prompt"),
            schedule_type=_text_of(fields, "schedule_type"),
            schedule_value=_text_of(fields, "schedule_value"),
            context_mode=_mode_of(fields),
            target_jid=target,
            **by,
        )
    if kind == "update_task":
        names = ("prompt", "schedule_type", "schedule_value")
        by |= {name: _optional(fields, name) for name in names}
        return UpdateTask(task_id=_id_of(fields, "taskId"), **by)
    if kind in _BY_TASK_ID:
        return _BY_TASK_ID[kind](task_id=_id_of(fields, "taskId"), **by)
    if kind not in {"refresh_groups", "register_group"}:
        raise ValueError("no such type")
    if not group.is_main:
        raise _RefusedError("only main may do that")
    if kind == "refresh_groups":
        return RefreshGroups(**by)
    return _register(fields, groups, by)


_BY_TASK_ID: Final[dict[str, Callable[..., Request]]] = {
    "pause_task": PauseTask,
    "resume_task": ResumeTask,
    "cancel_task": CancelTask,
}


def _check_chat(group: Group, groups: Mapping[str, Group], chat_jid: str) -> None:
    own = chat_jid in groups and _key(groups[chat_jid]) == _key(group)
    if not (group.is_main or own):
        raise _RefusedError("the chat is another group's")


def _register(
    fields: _Fields, groups: Mapping[str, Group], by: dict[str, Any]
) -> RegisterGroup:
    jid = _id_of(fields, "jid")
    new_group = Group(
        _text_of(fields, "name"),
        _text_of(fields, "folder"),
        _text_of(fields, "trigger"),
        container_config=_config_of(fields),
        requires_trigger=fields.get("requiresTrigger") is not False,
    )
    for chat_jid, group in groups.items():
        # Who shares main's mailbox has main's rights.
        if group.is_main and (chat_jid == jid or _key(group) == _key(new_group)):
            raise _RefusedError("main stays as it is")
    return RegisterGroup(jid=jid, new_group=new_group, **by)


def _key(group: Group) -> str:
    return group.folder.casefold()


class _Watch:
    """Tells when something is new in a directory, where the kernel can."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        # Below 0 where there are too many already: then the poll must do.
        self.fd: int = self._libc.inotify_init1(flags)

    def add(self, directory: Directory) -> None:
        """Watch a directory, once, however often it is added."""
        fd = directory.hold()
        place = f"/proc/self/fd/{fd}".encode()
        self._libc.inotify_add_watch(self.fd, place, _IN_CLOSE_WRITE | _IN_MOVED_TO)
        os.close(fd)

    async def wait(self) -> None:
        """Wait until something may be new."""
        with trio.move_on_after(_POLL_INTERVAL):
            if self.fd < 0:
                await trio.sleep_forever()
            await trio.lowlevel.wait_readable(self.fd)
            with suppress(BlockingIOError):
                os.read(self.fd, 2**16)
            await trio.sleep(_REST)

    def close(self) -> None:
        """Watch no longer."""
        if self.fd >= 0:
            os.close(self.fd)


_Place: TypeAlias = tuple[str, str, str]  # the group's folder, the directory, the name


class Requests:
    """Iterates over what agents ask for. Made by :meth:`Engine.open_requests`."""

    def __init__(
        self,
        places: Places,
        groups: Mapping[str, Group],
        offload: Callable[[Callable[[], None]], Awaitable[None]],
        check_open: Callable[[], object],
    ) -> None:
        self._places = places
        self._groups = groups
        self._offload = offload
        self._check_open = check_open
        self._watch = _Watch()
        self._found: list[Request] = []
        self._offered: set[_Place] = set()
        self._warned: set[tuple[str, str]] = set()

    def close(self) -> None:
        """Look no longer."""
        self._watch.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Request:
        await trio.lowlevel.checkpoint()
        while not self._found:
            self._check_open()
            await self._offload(self._look)
            if not self._found:
                await self._watch.wait()
        return self._found.pop(0)

    def _look(self) -> None:
        """Look into every mailbox; take some from each."""
        by_folder: dict[str, Group] = {}
        for group in self._groups.values():
            # A folder that is main's by one of its chats is main's.
            if group.is_main or _key(group) not in by_folder:
                by_folder[_key(group)] = group
        for group in by_folder.values():
            try:
                with self._places.open_ipc(group) as ipc:
                    for name in ("messages", "tasks"):
                        with self._places.open_in_ipc(ipc, name) as box:
                            self._watch.add(box)
                            self._take(group, name, box)
            except (OSError, UnsafePathError) as exc:
                self._warn(group, "closed", f"cannot look into its mail: {exc}")

    def _take(self, group: Group, box_name: str, box: Directory) -> None:
        names = box.names()
        mail = [name for name in names if name.endswith(".json")]
        if len(names) == MAX_ENTRIES and not mail:
            # There may be mail behind it.
            self._warn(group, "full", "its mail is full of other files: discarded")
            for name in names:
                box.discard(name, self._places.trash)
        places = [(group.folder, box_name, name) for name in mail]
        for place in [p for p in places if p not in self._offered][:_BATCH]:
            self._read(group, place, box)

    def _read(self, group: Group, place: _Place, box: Directory) -> None:
        name = place[2]
        try:
            data = box.read(name)
            if data is None:
                return
            settle = partial(self._settle, group, place)
            fields = json.loads(data)
            if (fields["type"] == "message") != (place[1] == "messages"):
                raise ValueError("wrong directory")
            request = parse_request(fields, group, self._groups, settle)
        except _RefusedError as exc:
            self._warn(group, "refused", f"refused a request: {exc}")
            self._remove(box, name)
        except _MALFORMED as exc:
            kind = type(exc).__name__
            self._warn(group, kind, f"wrote a malformed request: {kind}")
            full = len(self._places.errors.names()) >= _MAX_ERRORS
            box.discard(name, self._places.trash if full else self._places.errors)
        else:
            self._offered.add(place)
            self._found.append(request)

    def _warn(self, group: Group, kind: str, problem: str) -> None:
        """Warn once of each kind of trouble: an agent could fill the host's log."""
        key = (group.folder, kind)
        level = logging.DEBUG if key in self._warned else logging.WARNING
        self._warned.add(key)
        extra = {"group": group.folder}
        log.log(level, "[%s] %s", group.folder, one_line(problem), extra=extra)

    def _settle(self, group: Group, place: _Place) -> None:
        """Remove the file of a request that was dealt with."""
        _, box_name, name = place
        try:
            with (
                self._places.open_ipc(group) as ipc,
                self._places.open_in_ipc(ipc, box_name) as box,
            ):
                self._remove(box, name)
        except (OSError, UnsafePathError) as exc:
            # It stays among those that were offered, so nothing is done twice for it.
            self._warn(group, "removed", f"cannot remove a request: {exc}")
        else:
            self._offered.discard(place)

    def _remove(self, box: Directory, name: str) -> None:
        try:
            box.remove(name)
        except OSError:
            # It has become a directory.
            box.discard(name, self._places.trash)


#: What comes of reading what an agent wrote, and of making sense of it.
_MALFORMED: Final = (
    *(AttributeError, KeyError, TypeError, ValueError),
    *(ArithmeticError, RecursionError),
    *(GroupFolderError, UnsafePathError),
)
