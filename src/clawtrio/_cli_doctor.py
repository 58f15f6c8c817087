"""``clawtrio doctor``: what is needed here, whether it is there, and what to do."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal, TypeAlias

import attrs
from rich.text import Text

from ._cli_care import RUNTIMES, RuntimeName, is_installed, runtime_named
from ._cli_terminal import show, write
from ._credentials import CredentialFile
from ._docker import DockerRuntime
from ._engine import choose_runtime
from ._errors import ClawtrioError, CredentialsError, RuntimeUnavailableError
from ._groups import Places, open_places
from ._mounts import container_directory
from ._proxy_upstream import check_credential
from ._runtimes import ContainerSpec, Runtime, ask_within
from ._settings import MIB, Settings
from ._text import printable
from ._upkeep import MIN_FREE_INODES

State: TypeAlias = Literal["ok", "info", "warning", "broken"]

_MARKS: Final[dict[State, tuple[str, str]]] = {
    "ok": ("ok", "green"),
    "info": ("-", "dim"),
    "warning": ("!", "yellow"),
    "broken": ("BROKEN", "bold red"),
}
#: The oldest that we promise to work with.
_TRIO: Final = (0, 28)
#: Anyone but root: a sandbox that is described, and never started, needs a user.
_SOMEBODY: Final = 1000


@attrs.frozen
class Finding:
    """One thing that was looked at.

    Attributes:
        state: How it is; ``broken`` if runs are impossible because of it.
        what: What was looked at.
        found: What was seen.
        remedy: What to do about it.
    """

    state: State
    what: str
    found: str
    remedy: str = ""


async def doctor(settings: Settings) -> int:
    """Show a table of what was looked at; 1 if something needed is broken."""
    findings = [*_look_at_programs(), *_look_at_places(settings)]
    chosen = choose_runtime(settings).name
    for name in RUNTIMES:
        findings += await _look_at_runtime(settings, name)
    findings.append(await _look_at_credential(settings))
    findings.append(_look_at_limits(settings))
    rows: list[tuple[str | Text, ...]] = []
    for finding in findings:
        mark, style = _MARKS[finding.state]
        rows.append((Text(mark, style), finding.what, finding.found))
        if finding.remedy:
            remedy = Text(f"-> {printable(finding.remedy)}", "bold")
            rows.append(("", "", remedy))
    show(rows, header=("", "CHECK", "FINDING"))
    broken = [finding.what for finding in findings if finding.state == "broken"]
    if broken:
        write(f"Runs are impossible here: see {', '.join(broken)}.\n")
        return 1
    write(f"Runs are possible here, by {chosen}.\n")
    return 0


def _look_at_programs() -> Iterator[Finding]:
    name = f"Python {platform.python_version()}, {sys.executable}"
    yield Finding(
        "ok", "python", f"{name}, on {platform.system()} {platform.machine()}"
    )
    trio_version = version("trio")
    numbers = tuple(map(int, trio_version.split(".")[:2]))
    if numbers >= _TRIO:
        yield Finding("ok", "trio", trio_version)
    else:
        oldest = ".".join(map(str, _TRIO))
        yield Finding("broken", "trio", trio_version, f"pip install 'trio>={oldest}'")


def _look_at_places(settings: Settings) -> Iterator[Finding]:
    remedy = "Correct that, or choose another place: --root DIR"
    try:
        with open_places(settings) as places:
            where = f"{settings.groups_dir} and {settings.data_dir}"
            yield Finding("ok", "directories", where)
            yield _look_at_user(places)
            yield _look_at_space(places)
    except ClawtrioError as exc:
        yield Finding("broken", "directories", str(exc), remedy)
    except OSError as exc:
        problem = f"{exc.filename!r}: {exc.strerror}"
        yield Finding("broken", "directories", problem, remedy)


def _look_at_user(places: Places) -> Finding:
    owner = places.owner
    found = f"uid {os.geteuid()}; agents run as uid {owner.uid}, gid {owner.gid}"
    return Finding("ok", "user", found)


def _look_at_space(places: Places) -> Finding:
    free, inodes = places.free()
    least = places.settings.min_free_bytes
    found = f"{free / MIB:,.0f} MiB free, {least / MIB:,.0f} MiB needed"
    if inodes is not None and inodes < MIN_FREE_INODES:
        found += f"; only {inodes} inodes free, {MIN_FREE_INODES} needed"
    elif free >= least:
        return Finding("ok", "disk", found)
    return Finding(
        "broken", "disk", found, "Make room, or lower CLAWTRIO_MIN_FREE_BYTES"
    )


async def _look_at_runtime(settings: Settings, name: RuntimeName) -> list[Finding]:
    runtime = runtime_named(settings, name)
    is_chosen = choose_runtime(settings).name == name
    what = f"{name}, by runtime={settings.runtime}" if is_chosen else name
    if not is_chosen and not is_installed(name):
        return [Finding("info", what, "not installed, and not needed")]
    try:
        await ask_within(settings.command_timeout, runtime, runtime.check)
    except RuntimeUnavailableError as exc:
        state: State = "broken" if is_chosen else "info"
        return [Finding(state, what, exc.problem, exc.remedy)]
    if name == "bwrap":
        return [
            Finding("ok", what, "works"),
            _look_at_memory(runtime, is_chosen=is_chosen),
        ]
    image = f"works, with the image {settings.image}"
    if not runtime.takes_runner:
        image += ", a foreign one: its own agent is run"
    findings = [Finding("ok", what, image)]
    if isinstance(runtime, DockerRuntime) and runtime.needs_labels:
        problem = "SELinux keeps containers from files without their label"
        places = {settings.root, settings.groups_dir, settings.data_dir}
        places.add(str(container_directory()))
        remedy = f"chcon -R -t container_file_t {shlex.join(sorted(places))}"
        findings.append(Finding("warning", f"{name}'s labels", problem, remedy))
    return findings


def _look_at_memory(runtime: Runtime, *, is_chosen: bool) -> Finding:
    """Tell whether something contains a sandbox's memory, by its command line."""
    spec = ContainerSpec(
        name="clawtrio-doctor",
        labels={},
        mounts=(),
        environment={},
        arguments=(),
        uid=_SOMEBODY,
        gid=_SOMEBODY,
        memory=MIB,
        cpus=1,
        pids=1,
    )
    if Path(runtime.argv(spec)[0]).name == "systemd-run":
        return Finding("ok", "bwrap's memory", "limited by a cgroup, through systemd")
    return Finding(
        "warning" if is_chosen else "info",
        "bwrap's memory",
        "limited per process only: there is no systemd to ask for a cgroup",
        "Run where systemd runs, or choose docker or podman for agents you don't trust",
    )


async def _look_at_credential(settings: Settings) -> Finding:
    """Ask the API itself: the Claude CLI would ask for minutes before it says so."""
    is_needed = settings.agent == "claude" and settings.agent_command is None
    try:
        credential = CredentialFile(settings.root).require()
    except CredentialsError as exc:
        if is_needed:
            return Finding("broken", "credential", exc.problem, exc.remedy)
        return Finding("info", "credential", f"{exc.problem}: the proxy has none")
    found = await check_credential(credential)
    if found.state == "alive":
        return Finding("ok", "credential", f"alive: {found.detail}")
    if found.state == "dead":
        remedy = f"Renew {credential.variable}: in .env, nothing has to start anew"
        state: State = "broken" if is_needed else "warning"
        return Finding(state, "credential", f"dead: {found.detail}", remedy)
    remedy = "Look at the network, ANTHROPIC_BASE_URL and SSL_CERT_FILE"
    return Finding("warning", "credential", f"unreachable: {found.detail}", remedy)


def _look_at_limits(settings: Settings) -> Finding:
    memory = f"{settings.memory / MIB:,.0f} MiB of memory"
    found = f"{memory}, {settings.cpus:g} processors, {settings.pids} processes each"
    return Finding("info", "limits", found)
