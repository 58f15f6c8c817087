"""``clawtrio ps``, ``sweep`` and ``logs``: looking after what runs have left."""

from __future__ import annotations

import heapq
import shutil
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias

import attrs

from ._cli_terminal import complain, note, show, write
from ._engine import choose_runtime
from ._errors import RuntimeUnavailableError
from ._groups import open_places
from ._hostfs import Directory
from ._models import Group
from ._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    FoundContainer,
    Runtime,
    ask_within,
)
from ._settings import Settings
from ._sweep import sweep
from ._text import one_line, printable

RuntimeName: TypeAlias = Literal["auto", "docker", "podman", "bwrap"]

RUNTIMES: Final[tuple[RuntimeName, ...]] = ("docker", "podman", "bwrap")
#: How much of an id is shown, as in docker's own lists.
_SHORT: Final = 12


def is_installed(name: str) -> bool:
    """Whether a runtime's program is here; bwrap's comes as a package."""
    return name == "bwrap" or shutil.which(name) is not None


def runtime_named(settings: Settings, name: RuntimeName) -> Runtime:
    """Return a runtime by its name."""
    return choose_runtime(attrs.evolve(settings, runtime=name))


def has_data(settings: Settings) -> bool:
    """Whether anything ever ran with this root; if not, says so.

    Looking after nothing should not make directories.
    """
    if Path(settings.data_dir).is_dir():
        return True
    note(f"nothing has run here yet: there is no {settings.data_dir}")
    return False


async def list_containers(settings: Settings) -> int:
    """Show the containers of a root, and whether an engine looks after each."""
    if not has_data(settings):
        return 0
    runtime = choose_runtime(settings)
    with open_places(settings) as places:
        ask = partial(runtime.find, {LABEL_ROOT: places.root_id})
        found = await ask_within(settings.command_timeout, runtime, ask)
        states = [
            engine_state(places.engines, container.labels.get(LABEL_ENGINE, ""))
            for container in found
        ]
    if not found:
        note(f"{runtime.name} has no container of {settings.root}")
        return 0
    rows = [
        (
            container.id[:_SHORT],
            container.labels.get(LABEL_RUN, "?"),
            container.labels.get(LABEL_ENGINE, "?")[:_SHORT],
            state,
        )
        for container, state in zip(found, states, strict=True)
    ]
    show(rows, header=("CONTAINER", "RUN", "ENGINE", "STATE"))
    if "left behind" in states:
        note("'clawtrio sweep' removes what dead engines left behind")
    return 0


def engine_state(
    engines: Directory, engine_id: str
) -> Literal["live", "left behind", "unknown"]:
    """Tell whether an engine lives, by the lock that it holds."""
    # Taking a lock would make the file.
    if engine_id not in engines.names():
        return "unknown"
    try:
        with engines.lock(engine_id):
            return "left behind"
    except BlockingIOError:
        return "live"


async def sweep_all(settings: Settings, runtime: RuntimeName | None) -> int:
    """Remove what dead engines left in every runtime, or in *runtime* only.

    1 if one of them could not be asked.
    """
    if not has_data(settings):
        return 0
    code = 0
    with open_places(settings) as places:
        for name in (runtime,) if runtime else filter(is_installed, RUNTIMES):
            chosen = runtime_named(settings, name)
            try:
                _report(chosen.name, await sweep(places, chosen))
            except RuntimeUnavailableError as exc:
                complain(exc)
                code = 1
    return code


def _report(name: str, removed: list[FoundContainer]) -> None:
    for container in removed:
        run = container.labels.get(LABEL_RUN, "?")
        write(
            f"{name}: removed {one_line(container.id[:_SHORT])}, run {one_line(run)}\n"
        )
    if not removed:
        write(f"{name}: nothing to remove\n")


def print_logs(settings: Settings, group: Group, last: int, *, paths: bool) -> int:
    """Print a group's newest run logs, the newest last; 1 if there is none."""
    found: list[Path] = []
    if has_data(settings):
        with open_places(settings):
            # No agent writes there. Unlike Directory.names(), this sees all of them.
            directory = Path(settings.data_dir, "logs", group.folder)
            # By name is by time.
            found = heapq.nlargest(last, directory.glob("container-*.log"))
    if not found:
        complain(f"group {group.folder!r} has no run logs")
        return 1
    for path in reversed(found):
        if paths:
            write(f"{printable(str(path))}\n")
            continue
        if last > 1:
            write(f"==> {printable(str(path))} <==\n")
        text = path.read_bytes().decode(errors="replace")
        write(printable(text).rstrip("\n") + "\n")
    return 0
