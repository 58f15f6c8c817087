"""What a run is given and what it gives back. Durations are seconds, sizes bytes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import attrs

from ._errors import GroupFolderError

Status: TypeAlias = Literal["success", "error"]

#: NanoClaw's rule; matched whole, since ``$`` would let a trailing newline pass.
_FOLDER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
#: Places beside the groups' own: the shared memory, and where malformed files go.
_RESERVED_FOLDERS: Final = frozenset({"global", "errors"})


def _check_folder(_: object, __: object, folder: Any) -> None:
    if not isinstance(folder, str) or not _FOLDER.fullmatch(folder):
        problem = "must be 1 to 64 of A-Z a-z 0-9 _ -, the first a letter or digit"
        raise GroupFolderError(folder, problem)
    if folder.casefold() in _RESERVED_FOLDERS:
        raise GroupFolderError(folder, "is reserved")


def _check_timeout(_: object, __: object, timeout: float | None) -> None:
    if timeout is not None and not (timeout > 0 and not math.isnan(timeout)):
        raise ValueError(f"timeout must be seconds above 0 or inf, not {timeout!r}")


def _aware(moment: datetime | str) -> datetime:
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if moment.tzinfo is None:
        raise ValueError(f"added_at needs a time zone: {moment.isoformat()}")
    return moment


def _path(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    # Unlike what the annotation says, it may be bytes; no runtime could be told those.
    if not isinstance(text, str):
        raise TypeError(f"a path must be text, not {path!r}")
    return text


def _mounts(mounts: Iterable[AdditionalMount]) -> tuple[AdditionalMount, ...]:
    return tuple(mounts)


def _roots(roots: Iterable[AllowedRoot]) -> tuple[AllowedRoot, ...]:
    return tuple(roots)


def _patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    return tuple(patterns)


@attrs.frozen
class AdditionalMount:
    """A directory of the host that a group asks to see.

    Attributes:
        host_path: Where it is on the host; ``~`` is the host user's home.
        container_path: Name below ``/workspace/extra``; by default the last
            component of *host_path*.
        readonly: False asks for write access, which the allowlist may refuse.
    """

    host_path: str = attrs.field(converter=_path)
    container_path: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(_path)
    )
    readonly: bool = True


@attrs.frozen
class ContainerConfig:
    """What is particular about one group's containers.

    Attributes:
        additional_mounts: Directories that the group asks to see.
        timeout: Seconds of silence allowed in place of
            :attr:`Settings.answer_timeout`; None keeps that.

    Raises:
        ValueError: If the timeout is not above 0.
    """

    additional_mounts: tuple[AdditionalMount, ...] = attrs.field(
        default=(), converter=_mounts
    )
    timeout: float | None = attrs.field(default=None, validator=_check_timeout)


@attrs.frozen
class Group:
    """A chat group that has an agent of its own.

    Attributes:
        name: What people call it.
        folder: Its directory below :attr:`Settings.groups_dir`, and its identity.
            Names that differ only in case are the same group.
        trigger: The word that calls the agent.
        added_at: When it was registered: aware, or ISO 8601 text.
        container_config: What is particular about its containers.
        requires_trigger: Whether messages without the trigger are for others.
        is_main: Whether it is the main group, which administers the others.

    Raises:
        GroupFolderError: If *folder* is not a folder name.
        ValueError: If *added_at* has no time zone or is not ISO 8601.
    """

    name: str
    folder: str = attrs.field(validator=_check_folder)
    trigger: str = "@Andy"
    added_at: datetime = attrs.field(
        factory=lambda: datetime.now(UTC), converter=_aware
    )
    container_config: ContainerConfig = attrs.field(factory=ContainerConfig)
    requires_trigger: bool = True
    is_main: bool = False


@attrs.frozen
class ScheduledTask:
    """A task that an agent has scheduled.

    Attributes:
        id: Unique.
        group_folder: The folder of the group whose task it is.
        prompt: What the agent will be asked.
        schedule_type: ``"cron"``, ``"interval"`` or ``"once"``.
        schedule_value: A cron expression, milliseconds, or an ISO 8601 time.
        status: ``"active"``, ``"paused"`` or ``"completed"``.
        next_run: When it is due, in ISO 8601; None if it is not.
        chat_jid: The chat that gets the answers; empty means the group's.
        context_mode: ``"group"`` goes on with the group's session, ``"isolated"`` has
            none.
        last_run: When it was last due, in ISO 8601; None if it never was.
    """

    id: str
    group_folder: str
    prompt: str
    schedule_type: str
    schedule_value: str
    status: str = "active"
    next_run: str | None = None
    chat_jid: str = attrs.field(default="", kw_only=True)
    context_mode: str = attrs.field(default="isolated", kw_only=True)
    last_run: str | None = attrs.field(default=None, kw_only=True)


@attrs.frozen
class AvailableGroup:
    """A chat that the main group may register, as its snapshot shows it.

    Attributes:
        jid: The chat.
        name: What people call it.
        last_activity: When something was last said in it, in ISO 8601.
        is_registered: Whether it is a group already.
    """

    jid: str
    name: str
    last_activity: str
    is_registered: bool = False


@attrs.frozen
class VolumeMount:
    """A place on the host that a container sees.

    Attributes:
        host_path: Where it is on the host.
        container_path: Where the container sees it.
        readonly: Whether the container may only read it.
    """

    host_path: str = attrs.field(converter=_path)
    container_path: str = attrs.field(converter=_path)
    readonly: bool


@attrs.frozen
class AllowedRoot:
    """A directory of the host below which additional mounts may be granted.

    Attributes:
        path: Where it is: absolute, or with ``~`` for the host user's home.
        allow_read_write: Whether a mount that asks for it may be written to.
        description: What people are told of it.
    """

    path: str = attrs.field(converter=_path)
    allow_read_write: bool = False
    description: str | None = None


@attrs.frozen
class MountAllowlist:
    """What the operator allows groups to see besides their own.

    Attributes:
        allowed_roots: Where additional mounts must be.
        blocked_patterns: A path that has one of them in a component is never mounted,
            whatever its case. The default ones hold as well.
        non_main_read_only: Whether groups other than main can only read.
    """

    allowed_roots: tuple[AllowedRoot, ...] = attrs.field(converter=_roots)
    blocked_patterns: tuple[str, ...] = attrs.field(converter=_patterns)
    non_main_read_only: bool


# One is made for every frame. A frozen one with slots would take twice the time.
@attrs.frozen(slots=False)
class AgentOutput:
    """One frame that an agent wrote.

    Attributes:
        status: ``"success"`` or ``"error"``.
        result: Text for the chat. None says that the agent waits for more.
        new_session_id: The session to resume next time, if the frame named one.
        error: What went wrong, where *status* is ``"error"``.
        partial: True for text of an answer that goes on, and for heartbeats.
        answers: The number of the last message that this answers; the prompt is 0.
            None answers all that was written before.
    """

    status: Status
    result: str | None = None
    new_session_id: str | None = None
    error: str | None = None
    partial: bool = False
    answers: int | None = None


@attrs.frozen
class DroppedFrame:
    """A frame that could not become an :class:`AgentOutput`.

    Attributes:
        reason: ``"too_large"``, or ``"unacceptable"`` if no JSON object with a
            status was in it.
        size: Its bytes; for one too large, the bytes seen when it became so.
    """

    reason: Literal["too_large", "unacceptable"]
    size: int


class Ending(Enum):
    """Why a run is over."""

    EXITED = "exited"
    """The agent left by itself, with code 0."""

    IDLE = "idle"
    """It was stopped for its silence after it had answered."""

    TIMED_OUT = "timed out"
    """It was stopped for its silence while an answer was due."""

    FAILED = "failed"
    """It left by itself, or was killed, with another code."""

    NOT_STARTED = "not started"
    """The runtime failed before there was an agent."""

    STOPPED = "stopped"
    """The caller ended it."""


@attrs.frozen(kw_only=True)
class Usage:
    """What a run has asked of the API, as the credential proxy saw it.

    Attributes:
        requests: Requests that went to the API.
        request_bytes: Bytes of their bodies.
        response_bytes: Bytes of the responses' bodies.
        statuses: (HTTP status, how often) of all that was answered, also by the proxy
            itself, in order of the status.
        input_tokens: Tokens read at full price, as the API reports them.
        output_tokens: Tokens written. Where a stream was cut before the API said how
            many, at least as many as it had pieces.
        cache_creation_input_tokens: Tokens written to the prompt cache.
        cache_read_input_tokens: Tokens read from it.
    """

    requests: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    statuses: tuple[tuple[int, int], ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


@attrs.frozen(kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: ``"success"`` if nothing is unanswered, the last turn was no error,
            and the ending is none of NOT_STARTED, TIMED_OUT, FAILED.
        result: The last text, for an :meth:`Engine.run` without a callback.
        new_session_id: The last session id that the agent named.
        error: Why *status* is ``"error"``; may quote the agent.
        ending: Why it is over.
        exit_code: The container's, 128 + N for signal N; None if it never ran or
            could not be brought to exit.
        duration: Seconds from start to end.
        outputs: How many deliveries were begun.
        dropped_frames: Frames that made no output.
        unanswered: The texts, prompt included, that got no answer.
        stdout_truncated: Whether the log keeps only the head and tail of stdout.
        stderr_truncated: The same for stderr.
        refused_mounts: Additional mounts not granted, each with the reason.
        usage: What the run asked of the API; None if nobody counted.
        log_path: The run's log file.
    """

    status: Status
    result: str | None = None
    new_session_id: str | None = None
    error: str | None = None
    ending: Ending
    exit_code: int | None
    duration: float
    outputs: int
    dropped_frames: int
    unanswered: tuple[str, ...]
    stdout_truncated: bool
    stderr_truncated: bool
    refused_mounts: tuple[tuple[AdditionalMount, str], ...] = ()
    usage: Usage | None = None
    log_path: Path
