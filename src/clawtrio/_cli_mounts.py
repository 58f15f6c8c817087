"""``clawtrio mounts``: the allowlist to begin with, and why it says no."""

from __future__ import annotations

from pathlib import Path

from ._allowlist import AllowlistFile, write_template
from ._cli_terminal import complain, note, write
from ._forbidden import Forbidden
from ._grants import explain
from ._models import AdditionalMount, Group
from ._mounts import container_directory
from ._settings import Settings
from ._text import one_line


def init_allowlist(settings: Settings, *, force: bool) -> int:
    """Write an allowlist to begin with; 1 if there is one already."""
    path = settings.allowlist_path
    before = AllowlistFile(settings, Forbidden(settings)).path
    try:
        write_template(path, force=force)
    except FileExistsError:
        complain(f"there is {path} already: --force replaces it")
        return 1
    write(f"{one_line(path)}\n")
    if Path(before) != Path(path):
        note(f"from now on it is read in the place of {before}")
    return 0


def check_mount(settings: Settings, group: Group, path: str, *, rw: bool) -> int:
    """Say what would become of a group's wish for *path*; 1 if it would be refused."""
    if not path.startswith("~"):
        # As a shell completes it; a group's own wishes must be absolute.
        path = str(Path(path).absolute())
    forbidden = Forbidden(settings, fixed=[str(container_directory())])
    decision = explain(
        AdditionalMount(path, readonly=not rw),
        is_main=group.is_main,
        allowlist=AllowlistFile(settings, forbidden),
        forbidden=forbidden,
    )
    if decision.held is None:
        write(f"refused: {decision.reason}\n")
        return 1
    mount = decision.held.mount
    extent = "to read" if mount.readonly else "to read and write"
    write(
        f"granted {extent}: {decision.reason}\n"
        f"  on the host       {one_line(mount.host_path)}\n"
        f"  in the container  {one_line(mount.container_path)}\n"
    )
    return 0
