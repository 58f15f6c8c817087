"""Everything clawtrio raises on purpose: one meaning each, with fields to read."""

from __future__ import annotations

import attrs


class ClawtrioError(Exception):
    """Base class of every clawtrio error."""


@attrs.define
class SettingsError(ClawtrioError):
    """A setting makes no sense.

    Attributes:
        field: The name of the :class:`Settings` field.
        problem: What is wrong with its value, and what would be right.
    """

    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


@attrs.define
class GroupFolderError(ClawtrioError):
    """A group's folder name is not one: correct it before registering the group.

    Attributes:
        folder: The name that was refused.
        problem: Which rule it breaks.
    """

    folder: object
    problem: str

    def __str__(self) -> str:
        return f"group folder {self.folder!r}: {self.problem}"


@attrs.define
class AllowlistError(ClawtrioError):
    """The mount allowlist cannot be used: no additional mount is granted until it can.

    Attributes:
        path: The file.
        problem: What is wrong with it, and what would be right; of a value it names the
            JSON path, such as ``$.allowedRoots[0].path``.
    """

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path!r}: {self.problem}"


@attrs.define
class UnsafePathError(ClawtrioError):
    """A place on the host cannot be trusted, so nothing was done with it.

    Attributes:
        path: The place.
        problem: Why it is not safe, and what would make it so.
    """

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path!r}: {self.problem}"


@attrs.define
class CredentialsError(ClawtrioError):
    """There is no credential for the API, or none that can be used.

    Attributes:
        problem: What is missing or wrong, and where; never the credential itself.
        remedy: What to put where.
    """

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}"


@attrs.define
class RuntimeUnavailableError(ClawtrioError):
    """Containers cannot be run here, as things are.

    Attributes:
        runtime: Which runtime: ``docker``, ``podman``, ``bwrap`` or a user's own.
        problem: What is missing.
        remedy: What to install, start, build or set.
    """

    runtime: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.runtime}: {self.problem}. {self.remedy}"


@attrs.define
class NotStartedError(ClawtrioError):
    """A run could not be started: no container exists, and the prompt went nowhere.

    Attributes:
        problem: What stood in the way.
    """

    problem: str

    def __str__(self) -> str:
        return self.problem


@attrs.define
class GroupBusyError(ClawtrioError):
    """The group has a live run already, here or in another process.

    Attributes:
        folder: The group's folder.
    """

    folder: str

    def __str__(self) -> str:
        return f"group {self.folder!r} has a live run already"


@attrs.define
class RunClosedError(ClawtrioError):
    """The run takes no more follow-ups: it was finished or stopped, or is over.

    Attributes:
        run_id: Which run.
    """

    run_id: str

    def __str__(self) -> str:
        return f"run {self.run_id} takes no more follow-ups"


@attrs.define
class FollowUpRefusedError(ClawtrioError):
    """The follow-up was not queued: try again once the agent has read some.

    Attributes:
        problem: Why there is no room for it.
    """

    problem: str

    def __str__(self) -> str:
        return self.problem


@attrs.define
class UnknownChatError(ClawtrioError):
    """No group belongs to the chat: register one first.

    Attributes:
        chat_jid: The chat, or the folder of a group that has none.
    """

    chat_jid: str

    def __str__(self) -> str:
        return f"no group belongs to chat {self.chat_jid!r}"


@attrs.define
class StoreBusyError(ClawtrioError):
    """The store has an owner already: one dispatcher, in one process, has it open.

    Attributes:
        store: Which store.
    """

    store: str

    def __str__(self) -> str:
        return f"{self.store} is in use by another dispatcher"


@attrs.define
class ScheduleError(ClawtrioError):
    """A task cannot be scheduled like that; nothing has changed.

    Attributes:
        value: What it was that makes no sense.
        problem: Why not.
    """

    value: str
    problem: str

    def __str__(self) -> str:
        return f"{self.value!r}: {self.problem}"


@attrs.define
class UnknownTaskError(ClawtrioError):
    """There is no such task.

    Attributes:
        task_id: The id that no task has.
    """

    task_id: str

    def __str__(self) -> str:
        return f"there is no task {self.task_id!r}"
