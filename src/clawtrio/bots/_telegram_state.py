"""What the Telegram bot keeps in ``data/telegram.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final, TypedDict

import msgspec

from clawtrio import (
    AdditionalMount,
    AvailableGroup,
    ClawtrioError,
    ContainerConfig,
    Group,
    SettingsError,
)

from ._telegram_text import Line

#: Messages that are kept for whoever calls the agent next, and their characters.
_MAX_LINES: Final = 50
_MAX_CHARACTERS: Final = 2**15
#: Chats that main's agent can choose from.
_MAX_CHATS: Final = 200
_MAIN_FOLDER: Final = "main"


class StoredMount(TypedDict):
    """See :class:`clawtrio.AdditionalMount`."""

    host_path: str
    container_path: str | None
    readonly: bool


class StoredConfig(TypedDict):
    """See :class:`clawtrio.ContainerConfig`."""

    additional_mounts: list[StoredMount]
    timeout: float | None


class StoredGroup(TypedDict):
    """See :class:`clawtrio.Group`. That a group is main, the file cannot say."""

    name: str
    folder: str
    trigger: str
    added_at: datetime
    requires_trigger: bool
    container_config: StoredConfig


class State(msgspec.Struct, forbid_unknown_fields=True):
    """What outlives the process; by chat, but the offset.

    Attributes:
        offset: The first update that was not dealt with.
        groups: Who is registered, as it was read; main is not among them.
        context: What was said since an agent was last called, the oldest first.
        chats: Name and last activity of the group chats seen, the quietest first.
    """

    offset: int = 0
    groups: dict[str, StoredGroup] = {}
    context: dict[str, list[Line]] = {}
    chats: dict[str, tuple[str, str]] = {}

    def keep(self, jid: str, line: Line) -> None:
        """Keep what was said for whoever calls the agent next, within bounds."""
        lines = self.context.setdefault(jid, [])
        lines.append(line)
        while len(lines) > _MAX_LINES or (
            len(lines) > 1 and sum(len(text) for _, _, text in lines) > _MAX_CHARACTERS
        ):
            del lines[0]

    def note_chat(self, jid: str, name: str, activity: str) -> bool:
        """Note that something was said in a chat; tell whether it is news of it."""
        known = self.chats.pop(jid, None)
        self.chats[jid] = (name, activity)
        if len(self.chats) > _MAX_CHATS:
            del self.chats[next(iter(self.chats))]
        return known is None or known[0] != name

    def available(self) -> list[AvailableGroup]:
        """Return the group chats that were seen."""
        return [AvailableGroup(jid, *chat) for jid, chat in self.chats.items()]


def main_group(trigger: str) -> Group:
    """Return main's group, which answers everything."""
    return Group("Main", _MAIN_FOLDER, trigger, requires_trigger=False, is_main=True)


def load(path: Path) -> tuple[State, dict[str, Group]]:
    """Read the state, and who is registered.

    Raises:
        SettingsError: If the file makes no sense; names the place.
    """
    try:
        data = path.read_bytes() if path.exists() else b"{}"
        state = msgspec.json.decode(data, type=State)
        groups = {jid: _group(stored) for jid, stored in state.groups.items()}
        _check_folders(groups)
    except (OSError, ValueError, ClawtrioError) as exc:
        raise SettingsError(path.name, f"cannot be used: {exc}") from exc
    return state, groups


def _group(stored: StoredGroup) -> Group:
    config = stored["container_config"]
    mounts = [AdditionalMount(**mount) for mount in config["additional_mounts"]]
    return Group(
        stored["name"],
        stored["folder"],
        stored["trigger"],
        stored["added_at"],
        ContainerConfig(mounts, config["timeout"]),
        stored["requires_trigger"],
    )


def _check_folders(groups: Mapping[str, Group]) -> None:
    # Who shares main's mailbox has main's rights.
    if any(group.folder.casefold() == _MAIN_FOLDER for group in groups.values()):
        raise ValueError(f"the folder {_MAIN_FOLDER!r} is main's")


def dump(state: State, groups: Mapping[str, Group]) -> bytes:
    """Return what is to be written: the state, and who is registered now."""
    others = {jid: group for jid, group in groups.items() if not group.is_main}
    fields = {**msgspec.structs.asdict(state), "groups": others}
    return msgspec.json.format(msgspec.json.encode(fields))


def write(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is the old one or the new one."""
    new = path.with_suffix(".new")
    with open(new, "wb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)
