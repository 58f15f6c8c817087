"""From a container to the command line of its bwrap sandbox. Nothing runs here.

The options go to bwrap through ``--args``, out of sight of ``ps``; what bwrap reads
from a descriptor is an object among them until :mod:`clawtrio._bwrap` opens it. Rules
to keep when changing this:

- Everything is mounted, nothing is masked; of a Python only what Python put there, for
  the root of a bot may be a virtual environment at once, with its ``.env`` in it.
- Mounts below a tmpfs come after it; ``--remount-ro`` comes last. /proc is read-only
  so that the reaper's memory cannot be written to (see :mod:`clawtrio._seccomp`).
- No process of the agent has uid 0 on the host. Root therefore makes no user
  namespace, and leaves its uid inside by ``setpriv``; its three capabilities end there.
- The process environment of bwrap is the sandbox's; options would show it to ``ps``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final, TypeAlias

import attrs

from ._errors import NotStartedError
from ._runtimes import (
    HOME,
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    RUNNER,
    WORKSPACE_GROUP,
    ContainerSpec,
    HeldMount,
)
from ._seccomp import seccomp_filter

HOSTNAME: Final = "clawtrio"
_TMP: Final = "/tmp"  # noqa: S108 - the sandbox's own
_SHM: Final = "/dev/shm"  # noqa: S108 - likewise

#: Where the labels stand: in the environment of bwrap, but not of the agent.
VARIABLES: Final = {
    LABEL_ROOT: "CLAWTRIO_ROOT",
    LABEL_ENGINE: "CLAWTRIO_ENGINE",
    LABEL_RUN: "CLAWTRIO_RUN",
}

#: Docker's default for /dev/shm; the larger two are a quarter of the memory each.
_SHM_SIZE: Final = 64 * 2**20
#: One file. There is no quota: this and Settings.min_free_bytes stand in for it.
_FILE_SIZE: Final = 2**30
_OPEN_FILES: Final = 8192

_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
#: What the dynamic linker obeys: it would do so in bwrap already, outside.
_LINKER: Final = ("LD_", "GLIBC_")

_CAPABILITIES: Final = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")


@attrs.frozen
class Data:
    """Something that bwrap reads from a descriptor.

    Attributes:
        name: What to call it.
        content: Its bytes.
    """

    name: str
    content: bytes


@attrs.frozen
class Report:
    """The descriptor that bwrap reports to."""


Option: TypeAlias = str | Data | Report | HeldMount


@attrs.frozen(kw_only=True)
class Host:
    """What of the host a sandbox is made of.

    Attributes:
        is_root: Whether we are root, and can become any user without a user namespace.
        machine: The architecture.
        bwrap: Path of the bubblewrap program.
        setpriv: Path of util-linux' setpriv; only root needs it.
        prlimit: Path of util-linux' prlimit.
        choom: Path of util-linux' choom.
        python: Path of the Python that runs the agent runner.
        links: Symlinks of ``/`` into ``/usr``, as (target, link).
        shown: Paths of the host that are the same inside, read-only.
        hidden: Files of /proc that show what is the host's.
        hard_limits: The hard limits that we run under, by prlimit's name.
        scope: The start of a systemd-run command line; empty without systemd.
        scope_environment: What systemd-run needs to find its bus.
    """

    is_root: bool
    machine: str
    bwrap: str
    setpriv: str
    prlimit: str
    choom: str
    python: str
    links: tuple[tuple[str, str], ...] = ()
    shown: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    hard_limits: Mapping[str, int] = attrs.field(factory=dict[str, int])
    scope: tuple[str, ...] = ()
    scope_environment: Mapping[str, str] = attrs.field(factory=dict[str, str])


def environment(spec: ContainerSpec, host: Host) -> dict[str, str]:
    """Return the environment for bwrap: the agent's, and what is unset on the way.

    All that starts before the agent has it, too: nothing in it may reach them there.
    """
    agents = {
        name: value
        for name, value in spec.environment.items()
        if not name.startswith(_LINKER)
    }
    path = f"{PurePosixPath(host.python).parent}:{_PATH}"
    return {**host.scope_environment, "PATH": path, **agents, **_labels(spec)}


def launcher(spec: ContainerSpec, host: Host) -> list[str]:
    """Return what stands before bwrap: it limits memory, and offers us to the OOM."""
    argv: list[str] = []
    if host.scope:
        limits = {
            "MemoryMax": spec.memory,
            "MemorySwapMax": 0,
            # Two are bwrap's own.
            "TasksMax": spec.pids + 2,
            "CPUQuota": f"{max(1, round(spec.cpus * 100))}%",
        }
        argv += host.scope
        argv += [f"--property={name}={value}" for name, value in limits.items()]
        argv += ["--"]
    # It has to happen out here: /proc is read-only inside.
    return [*argv, host.choom, "--adjust", "1000", "--", host.bwrap]


def command(
    spec: ContainerSpec,
    host: Host,
    *,
    tasks_elsewhere: int,
    program: Sequence[str] | None = None,
) -> list[str]:
    """Return what bwrap runs: down to the agent, each replaces the one before.

    Args:
        spec: The container.
        host: The host.
        tasks_elsewhere: Processes and threads that count as the sandbox's against
            RLIMIT_NPROC though they are none of its own.
        program: What Python is given; by default the agent runner.
    """
    argv: list[str] = []
    if host.is_root:
        argv += [
            host.setpriv,
            f"--reuid={spec.uid}",
            f"--regid={spec.gid}",
            "--clear-groups",
            "--no-new-privs",
            "--inh-caps=-all",
            "--ambient-caps=-all",
            "--bounding-set=-all",
        ]
    # Never the address space: WebAssembly and the collectors reserve terabytes.
    limits = {
        "core": 0,
        "data": spec.memory,
        "fsize": _FILE_SIZE,
        "nofile": _OPEN_FILES,
        # The reaper is one.
        "nproc": tasks_elsewhere + spec.pids + 1,
    }
    if host.scope:
        # TasksMax counts what is in the sandbox and nothing else.
        del limits["nproc"]
    argv += [host.prlimit]
    for name, value in limits.items():
        argv += [f"--{name}={min(value, host.hard_limits.get(name, value))}"]
    if program is None:
        program = (RUNNER, *spec.arguments)
    return [*argv, "--", host.python, *program]


def options(spec: ContainerSpec, host: Host) -> list[Option]:
    """Return the options of bwrap.

    Raises:
        NotStartedError: If what they would describe is no safe sandbox.
    """
    if not spec.uid or not spec.gid:
        raise NotStartedError("the sandbox would run as root: set run_uid")
    if spec.network != "none":
        raise NotStartedError("the sandbox would share the host's own network")
    _check_targets(spec, host)
    return [
        *_isolation(spec, host),
        *_system(spec, host),
        *_mounts(spec, host),
        *("--remount-ro", "/dev", "--remount-ro", "/proc", "--remount-ro", "/"),
        *("--chdir", WORKSPACE_GROUP),
        *("--seccomp", Data("seccomp", seccomp_filter(host.machine))),
        *("--json-status-fd", Report()),
    ]


def readable(option: Option) -> str:
    """Return *option* as a person would write it."""
    if isinstance(option, str):
        return option
    if isinstance(option, HeldMount):
        return option.mount.host_path
    return f"<{option.name}>" if isinstance(option, Data) else "<report>"


def is_below(path: str, ancestor: str) -> bool:
    """Tell whether *path* is *ancestor* or in it, by their components."""
    return PurePosixPath(path).is_relative_to(ancestor)


def _labels(spec: ContainerSpec) -> dict[str, str]:
    return {
        variable: spec.labels[label]
        for label, variable in VARIABLES.items()
        if label in spec.labels
    }


def _check_targets(spec: ContainerSpec, host: Host) -> None:
    for held in spec.mounts:
        target = held.mount.container_path
        # NUL ends an option; the rest would be the next one.
        if "\0" in target or ".." in target.split("/") or target[:1] != "/":
            raise NotStartedError(f"{target!r} is no place in a container")
        for shown in host.shown:
            if is_below(target, shown) or is_below(shown, target):
                raise NotStartedError(
                    f"the mount {target!r} and the host's {shown!r} overlap in the"
                    " sandbox: move the Python environment elsewhere"
                )


def _isolation(spec: ContainerSpec, host: Host) -> Iterator[Option]:
    for namespace in ("pid", "ipc", "net", "uts", "cgroup-try"):
        yield f"--unshare-{namespace}"
    yield from ("--hostname", HOSTNAME)
    # From a thread that lives as long as we do: see _process.
    yield "--die-with-parent"
    # Away from the host's terminal.
    yield "--new-session"
    yield from ("--cap-drop", "ALL")
    if host.is_root:
        for capability in _CAPABILITIES:
            yield from ("--cap-add", capability)
    else:
        yield from ("--unshare-user", "--disable-userns")
        yield from ("--uid", str(spec.uid), "--gid", str(spec.gid))
    for variable in sorted({*_labels(spec), *host.scope_environment}):
        if variable in _labels(spec) or variable not in spec.environment:
            yield from ("--unsetenv", variable)


def _system(spec: ContainerSpec, host: Host) -> Iterator[Option]:
    yield from ("--ro-bind", "/usr", "/usr")
    for target, link in host.links:
        yield from ("--symlink", target, link)
    yield from ("--perms", "0755", "--dir", "/etc")
    accounts = {
        "passwd": f"root:x:0:0:root:/:/bin/false\n"
        f"node:x:{spec.uid}:{spec.gid}:node:{HOME}:/bin/sh\n",
        "group": f"root:x:0:\nnode:x:{spec.gid}:\n",
        "hosts": f"127.0.0.1 localhost {HOSTNAME}\n::1 localhost {HOSTNAME}\n",
    }
    for name, text in accounts.items():
        yield from ("--perms", "0444", "--file", Data(name, text.encode()))
        yield f"/etc/{name}"
    yield from ("--proc", "/proc", "--dev", "/dev")
    for path in host.hidden:
        yield from ("--ro-bind", "/dev/null", path)
    yield from _tmpfs(_SHM, _SHM_SIZE, "1777")
    yield from _tmpfs(_TMP, spec.memory // 4, "1777")
    yield from ("--perms", "0755", "--dir", "/home")
    # As root's mount it is root's directory, in which the agent has to write.
    yield from _tmpfs(HOME, spec.memory // 4, "0777" if host.is_root else "0755")


def _tmpfs(path: str, size: int, mode: str) -> Iterator[str]:
    yield from ("--perms", mode, "--size", str(max(size, 1)), "--tmpfs", path)


def _mounts(spec: ContainerSpec, host: Host) -> Iterator[Option]:
    made = {"/", "/etc", "/dev", _SHM, _TMP, "/home", HOME}
    for path in host.shown:
        yield from _ancestors(path, made)
        yield from ("--ro-bind", path, path)
    for held in spec.mounts:
        target = held.mount.container_path
        yield from _ancestors(target, made)
        yield "--ro-bind-fd" if held.mount.readonly else "--bind-fd"
        yield from (held, target)


def _ancestors(path: str, made: set[str]) -> Iterator[str]:
    """Make what *path* lies in readable for all, once; add it to *made*."""
    ancestors: Sequence[PurePosixPath] = PurePosixPath(path).parents
    for ancestor in map(str, reversed(ancestors)):
        if ancestor not in made:
            made.add(ancestor)
            yield from ("--perms", "0755", "--dir", ancestor)
