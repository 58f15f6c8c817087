"""What Claude can ask of the host: files in the mailbox. Nothing here knows the SDK.

Each file is written under a temporary name and renamed, so that the host never reads
half of one. The host decides what is allowed; what is refused here is refused early, in
words that Claude can act on.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from cronsim import CronSim, CronSimError

Arguments: TypeAlias = Mapping[str, Any]

#: The host takes no larger file.
_LARGEST: Final = 2**20
#: Milliseconds, as the host's clock has them: a thousand years.
_LONGEST_INTERVAL: Final = 1000 * 366 * 24 * 60 * 60 * 1000
_PROMPT_SHOWN: Final = 50
_MESSAGES: Final = "messages"
_TASKS: Final = "tasks"


class ToolError(Exception):
    """A tool was asked for what it cannot do; the text tells Claude why."""


@dataclass(frozen=True, slots=True)
class Mailbox:
    """The mailbox, and whose it is.

    Attributes:
        directory: The mailbox.
        chat_jid: The chat that asks.
        group_folder: Whose agent it is.
        is_main: Whether that is the main group.
    """

    directory: Path
    chat_jid: str
    group_folder: str
    is_main: bool

    def post(self, directory: str, **fields: object) -> None:
        """Write a message to the host.

        Raises:
            ToolError: If that fails.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        now = datetime.now(UTC).replace(tzinfo=None)
        given["timestamp"] = f"{now.isoformat(timespec='milliseconds')}Z"
        # What the model cut between surrogates is no UTF-8; escaped, it is JSON.
        data = json.dumps(given, indent=2).encode()
        if len(data) > _LARGEST:
            raise ToolError(f"that is too large: {len(data)} bytes of {_LARGEST}")
        path = self.directory / directory / f"{_unique()}.json"
        temporary = path.with_suffix(".json.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(data)
            temporary.rename(path)
        except OSError as exc:
            raise ToolError(f"the mailbox cannot be written: {exc.strerror}") from exc


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool.

    Attributes:
        name: What Claude calls it by.
        description: What Claude knows of it.
        properties: The JSON schemas of its arguments.
        required: The names of those that must be given.
        use: Does it, and returns what Claude is told; may raise ToolError.
    """

    name: str
    description: str
    properties: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...]
    use: Callable[[Mailbox, Arguments], str]

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of all arguments; there are no others."""
        return {
            "type": "object",
            "properties": self.properties,
            "required": list(self.required),
            "additionalProperties": False,
        }


def _unique() -> str:
    return f"{time.time_ns() // 10**6}-{secrets.token_hex(4)}"


def _send_message(mailbox: Mailbox, given: Arguments) -> str:
    mailbox.post(
        _MESSAGES,
        type="message",
        chatJid=mailbox.chat_jid,
        text=given["text"],
        sender=given.get("sender") or None,
        groupFolder=mailbox.group_folder,
    )
    return "Message sent."


def _schedule_task(mailbox: Mailbox, given: Arguments) -> str:
    kind, value = given["schedule_type"], given["schedule_value"]
    _check_schedule(kind, value)
    target = given.get("target_group_jid") or mailbox.chat_jid
    if target != mailbox.chat_jid and not mailbox.is_main:
        raise ToolError("only the main group can schedule tasks for other groups")
    task_id = f"task-{_unique()}"
    mailbox.post(
        _TASKS,
        type="schedule_task",
        taskId=task_id,
        prompt=given["prompt"],
        schedule_type=kind,
        schedule_value=value,
        context_mode=given.get("context_mode", "group"),
        targetJid=target,
        createdBy=mailbox.group_folder,
    )
    return f"Task {task_id} scheduled: {kind} {value}"


def _check_schedule(kind: str | None, value: str) -> None:
    """Refuse what the host's scheduler would; without a *kind*, what none would take.

    Raises:
        ToolError: If it means nothing.
    """
    checks = _SCHEDULES if kind is None else {kind: _SCHEDULES[kind]}
    problems = []
    for check in checks.values():
        try:
            check(value)
        except ToolError as exc:
            problems.append(str(exc))
    if len(problems) == len(checks):
        raise ToolError("; ".join(problems))


def _check_cron(value: str) -> None:
    try:
        next(CronSim(value, datetime.now()))  # noqa: DTZ005 - schedules are local
    except (CronSimError, StopIteration):
        raise ToolError(
            f"{value!r} is no cron expression, such as '0 9 * * *' for every day at"
            " 9:00, local time"
        ) from None


def _check_interval(value: str) -> None:
    if (
        not (value.isascii() and value.isdecimal())
        or len(value) > len(str(_LONGEST_INTERVAL))
        or not 0 < int(value) <= _LONGEST_INTERVAL
    ):
        raise ToolError(
            f"{value!r} is no interval: a number of milliseconds, such as '300000' for"
            " 5 minutes"
        )


def _check_once(value: str) -> None:
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        when = None
    # A bare date is midnight in one language, and in UTC in another.
    if when is None or when.tzinfo is not None or "T" not in value:
        raise ToolError(
            f"{value!r} is no local time without a zone, such as '2026-02-01T15:30:00'"
        )


_SCHEDULES: Final = {
    "cron": _check_cron,
    "interval": _check_interval,
    "once": _check_once,
}


def _list_tasks(mailbox: Mailbox, _: Arguments) -> str:
    try:
        tasks = json.loads((mailbox.directory / "current_tasks.json").read_bytes())
    except FileNotFoundError:
        tasks = []
    except (OSError, ValueError, RecursionError) as exc:
        raise ToolError(f"the list of tasks cannot be read: {exc}") from exc
    lines = list(_lines_of(tasks, mailbox))
    return "\n".join(["Scheduled tasks:", *lines] if lines else ["No scheduled tasks."])


def _lines_of(tasks: Any, mailbox: Mailbox) -> Iterator[str]:
    for task in tasks if isinstance(tasks, list) else []:
        if not isinstance(task, dict):
            continue
        if not mailbox.is_main and task.get("groupFolder") != mailbox.group_folder:
            continue
        prompt = " ".join(str(task.get("prompt")).split())
        if len(prompt) > _PROMPT_SHOWN:
            prompt = f"{prompt[:_PROMPT_SHOWN]}..."
        yield (
            f"- [{task.get('id')}] {prompt}"
            f" ({task.get('schedule_type')}: {task.get('schedule_value')})"
            f" - {task.get('status')}, next: {task.get('next_run') or 'never'}"
        )


def _changes_task(verb: str) -> Callable[[Mailbox, Arguments], str]:
    def use(mailbox: Mailbox, given: Arguments) -> str:
        mailbox.post(
            _TASKS,
            type=f"{verb}_task",
            taskId=given["task_id"],
            groupFolder=mailbox.group_folder,
            isMain=mailbox.is_main,
        )
        return f"Asked to {verb} task {given['task_id']}."

    return use


def _update_task(mailbox: Mailbox, given: Arguments) -> str:
    kind, value = given.get("schedule_type"), given.get("schedule_value")
    if given.keys() == {"task_id"}:
        raise ToolError("nothing to change: give a prompt or a schedule")
    if kind is not None and value is None:
        raise ToolError("a schedule_type needs its schedule_value")
    if value is not None:
        _check_schedule(kind, value)
    mailbox.post(
        _TASKS,
        type="update_task",
        taskId=given["task_id"],
        groupFolder=mailbox.group_folder,
        # Text, in this file alone: NanoClaw has it so.
        isMain=str(mailbox.is_main).lower(),
        prompt=given.get("prompt"),
        schedule_type=kind,
        schedule_value=value,
    )
    return f"Asked to update task {given['task_id']}."


def _register_group(mailbox: Mailbox, given: Arguments) -> str:
    if not mailbox.is_main:
        raise ToolError("only the main group can register groups")
    mailbox.post(
        _TASKS,
        type="register_group",
        jid=given["jid"],
        name=given["name"],
        folder=given["folder"],
        trigger=given["trigger"],
    )
    return f"Asked to register the group {given['name']!r}."


def _is_text(description: str, **others: object) -> dict[str, object]:
    return {"type": "string", "minLength": 1, "description": description, **others}


_TASK_ID: Final = {"task_id": _is_text("The task's id, as list_tasks shows it.")}
_SCHEDULE: Final = {
    "schedule_type": _is_text(
        "cron: at times that repeat; interval: every so often; once: at one time.",
        enum=list(_SCHEDULES),
    ),
    "schedule_value": _is_text(
        "All times are local. cron: five fields, such as '0 9 * * *' for every day at"
        " 9:00. interval: milliseconds, such as '300000' for 5 minutes. once: a time"
        " without a zone, such as '2026-02-01T15:30:00'."
    ),
}

ALL: Final = (
    Tool(
        "send_message",
        "Send a message to the chat now, while you go on working: to say how far you"
        " are, or to say several things. Your final answer is sent without it.",
        {
            "text": _is_text("The message."),
            "sender": _is_text("The role that speaks, such as 'Researcher'."),
        },
        ("text",),
        _send_message,
    ),
    Tool(
        "schedule_task",
        "Schedule a task: at its time an agent with all your tools is given the prompt,"
        " and its answer is sent to the chat. Say in the prompt whether it must always"
        " answer, or only if there is something to say. Returns the task's id; change"
        " an existing task by update_task instead.",
        {
            "prompt": _is_text(
                "What to do. An isolated task knows nothing but this: tell it all."
            ),
            **_SCHEDULE,
            "context_mode": _is_text(
                "group: in the group's conversation, for what needs to know what was"
                " said; isolated: in a new session. Ask the user if it is not clear.",
                enum=["group", "isolated"],
                default="group",
            ),
            "target_group_jid": _is_text(
                "The chat to schedule it for, from the main group only; this one, if"
                " left out."
            ),
        },
        ("prompt", "schedule_type", "schedule_value"),
        _schedule_task,
    ),
    Tool(
        "list_tasks",
        "List the scheduled tasks: this group's, or from the main group all.",
        {},
        (),
        _list_tasks,
    ),
    Tool(
        "pause_task",
        "Pause a scheduled task until it is resumed.",
        _TASK_ID,
        ("task_id",),
        _changes_task("pause"),
    ),
    Tool(
        "resume_task",
        "Resume a task that was paused.",
        _TASK_ID,
        ("task_id",),
        _changes_task("resume"),
    ),
    Tool(
        "cancel_task",
        "Cancel a scheduled task for good.",
        _TASK_ID,
        ("task_id",),
        _changes_task("cancel"),
    ),
    Tool(
        "update_task",
        "Change a scheduled task. What is left out stays as it is.",
        {**_TASK_ID, "prompt": _is_text("The new prompt."), **_SCHEDULE},
        ("task_id",),
        _update_task,
    ),
    Tool(
        "register_group",
        "Register a chat, so that you answer there. For the main group only. The chats"
        " that there are stand in available_groups.json in the mailbox.",
        {
            "jid": _is_text("The chat's JID, such as 'tg:-1001234567890'."),
            "name": _is_text("What to call the group."),
            "folder": _is_text(
                "The group's folder: the channel, an underscore and a short name in"
                " lower case, such as 'telegram_dev-team'."
            ),
            "trigger": _is_text("The word that you are called by, such as '@Andy'."),
        },
        ("jid", "name", "folder", "trigger"),
        _register_group,
    ),
)


def offered(mailbox: Mailbox) -> tuple[Tool, ...]:
    """Return the tools for whose mailbox it is."""
    return tuple(
        tool for tool in ALL if mailbox.is_main or tool.name != "register_group"
    )
