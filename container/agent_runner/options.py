"""What Claude is started with. It needs no SDK: these are the SDK's own arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from wire import AgentInput

TOOLS: Final = (
    "Bash",
    "Read",
    "Write",
    "Edit",
    "Glob",
    "Grep",
    "WebSearch",
    "WebFetch",
    "Task",
    "TaskOutput",
    "TaskStop",
    "TeamCreate",
    "TeamDelete",
    "SendMessage",
    "TodoWrite",
    "ToolSearch",
    "Skill",
    "NotebookEdit",
    "mcp__nanoclaw__*",
)

ENVIRONMENT: Final = {
    # There is no way out but the API's.
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_BUG_COMMAND": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
    # A dead key is known in 8 s; by default it takes three minutes.
    "CLAUDE_CODE_MAX_RETRIES": "4",
    # Until an answer begins, in milliseconds; by default ten minutes. A stream begins
    # soon, so nothing but streams: a whole answer may take longer than that.
    "API_TIMEOUT_MS": "60000",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    # It is a sandbox: Claude refuses to be free and root anywhere else.
    "IS_SANDBOX": "1",
}

#: Bytes of shared memory: it is one argument of a program, and Linux has a limit.
_MAX_SHARED: Final = 120_000
#: A line from the CLI: a tool may return a picture.
MAX_LINE: Final = 64 * 2**20

SCHEDULED: Final = (
    "[SCHEDULED TASK - A schedule has sent this message, neither a user nor the group.]"
)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the agent's mounts are."""

    root: Path

    @property
    def group(self) -> Path:
        """The group's own folder."""
        return self.root / "group"

    @property
    def ipc(self) -> Path:
        """The mailbox."""
        return self.root / "ipc"

    @property
    def conversations(self) -> Path:
        """Where transcripts are archived."""
        return self.group / "conversations"


WORKSPACE: Final = Workspace(Path("/workspace"))


def first_prompt(given: AgentInput) -> str:
    """Return what Claude is asked first."""
    if given.is_scheduled_task:
        return f"{SCHEDULED}\n\n{given.prompt}"
    return given.prompt


def arguments(
    given: AgentInput, workspace: Workspace, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Return the keyword arguments of ``ClaudeAgentOptions``."""
    prompt = {"type": "preset", "preset": "claude_code"}
    shared = None if given.is_main else _read(workspace.root / "global" / "CLAUDE.md")
    if shared:
        prompt["append"] = shared
    return {
        "cwd": workspace.group,
        "add_dirs": _directories(workspace.root / "extra"),
        "system_prompt": prompt,
        "allowed_tools": list(TOOLS),
        "permission_mode": "bypassPermissions",
        "setting_sources": ["project", "user"],
        "include_partial_messages": environ.get("CLAWTRIO_PARTIAL_TEXT") == "1",
        "model": environ.get("CLAWTRIO_MODEL") or None,
        # What the operator says counts.
        "env": {k: v for k, v in ENVIRONMENT.items() if k not in environ},
        "max_buffer_size": MAX_LINE,
    }


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SHARED)
    except OSError:
        return None
    return data.decode("utf-8", "ignore").replace("\0", "")


def _directories(parent: Path) -> list[Path]:
    try:
        return sorted(Path(entry) for entry in os.scandir(parent) if entry.is_dir())
    except OSError:
        return []
