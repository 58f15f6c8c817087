"""What a group's agent keeps between runs: Claude's settings, skills and sessions.

The agent writes in ``.claude``, so nothing in there is trusted; what lies beside it,
in ``data/sessions/<folder>``, no container shows.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ._errors import UnsafePathError
from ._groups import Places
from ._hostfs import Directory
from ._models import Group
from ._text import one_line

log = logging.getLogger(__name__)

#: NanoClaw's: agents of agents, the memory files of further directories, own memory.
_SETTINGS: Final = {
    "env": {
        "CLAUDE_CODE_EXPERIMENTAL_AGENT_TEAMS": "1",
        "CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD": "1",
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "0",
    }
}
_RUNNER_COPY: Final = "agent-runner-src"


def open_claude(places: Places, group: Group, skills: Sequence[Path]) -> Directory:
    """Open the group's ``.claude``, with settings and skills in it.

    Args:
        places: Where things are.
        group: Whose.
        skills: Directories of skills; what stands in a later one wins. Those that do
            not exist are left out, and so are symlinks: they may lead to where an
            agent can write, and from there anywhere.

    Raises:
        UnsafePathError: If something else is in its place.
    """
    with places.open_session(group) as session:
        claude = session.subdirectory(".claude", owner=places.owner)
    try:
        _write_settings(claude, places)
        for source in skills:
            if source.is_dir():
                with Directory.at(str(source)) as directory:
                    _sync_skills(claude, directory, places)
    except BaseException:
        claude.close()
        raise
    return claude


def open_runner_copy(places: Places, group: Group, source: Path) -> Directory:
    """Open the group's own copy of the agent runner; made once, then the agent's.

    Raises:
        UnsafePathError: If something else is in its place.
    """
    with places.open_session(group) as session:
        if _RUNNER_COPY not in session.names(None):
            # Under another name first: half a copy would stay one.
            temporary = f".{_RUNNER_COPY}.{secrets.token_hex(8)}"
            with (
                Directory.at(str(source)) as original,
                session.subdirectory(temporary, owner=places.owner) as copy,
            ):
                copy.copy_tree(original, places.trash, places.owner)
            session.rename(temporary, _RUNNER_COPY)
        return session.subdirectory(_RUNNER_COPY)


def _write_settings(claude: Directory, places: Places) -> None:
    """Write the settings where there are none; from then on they are the user's."""
    if claude.modified("settings.json") is None:
        content = (json.dumps(_SETTINGS, indent=2) + "\n").encode()
        trash, owner = places.trash, places.owner
        claude.write("settings.json", content, trash=trash, owner=owner)


def _sync_skills(claude: Directory, source: Directory, places: Places) -> None:
    trash, owner = places.trash, places.owner
    with claude.subdirectory("skills", trash=trash, owner=owner) as skills:
        for name in source.names(None):
            skill = _open_skill(source, name)
            if skill is not None:
                with skill, skills.subdirectory(name, trash=trash, owner=owner) as copy:
                    copy.copy_tree(skill, trash, owner)


def _open_skill(source: Directory, name: str) -> Directory | None:
    """Open a skill; None if it is something else."""
    try:
        return source.existing(name)
    except UnsafePathError:
        path = Path(source.path, name)
        if path.is_symlink():
            log.warning("skill %s is a symlink: left out", one_line(str(path)))
        return None
