"""Docker and Podman as data, and how their clients are asked.

What differs is a :class:`Flavour`; no code asks for a name. What was learned the hard
way stands beside the option that answers it. Clients are run by argv, never through a
shell, and judged by exit code and last line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import trio

from ._errors import RuntimeUnavailableError
from ._process import ClientProcess, client_environment, spawn
from ._text import one_line

#: What is kept of a client's answer, from its end: some thousand containers' lines.
_ANSWER_BYTES: Final = 2**20
_MESSAGE_CHARACTERS: Final = 500
HINT: Final = re.compile(r"(See|Run) '.*--help'")


@attrs.frozen(kw_only=True)
class EngineInfo:
    """What ``info`` told of the engine behind a client.

    Attributes:
        seccomp: Whether containers get a seccomp filter.
        limits: Whether it can limit their memory and processes.
        processors: How many it has; inf if asking for more is no error.
        nonrecursive: The option that keeps submounts out of a bind mount.
        selinux: Whether SELinux keeps containers from what has no label of theirs.
        local: Whether its containers are processes of this host.
        isolates: Whether it can keep its networks apart.
    """

    seccomp: bool = True
    limits: bool = True
    processors: float = math.inf
    nonrecursive: str = "bind-nonrecursive=true"
    selinux: bool = False
    local: bool = True
    isolates: bool = True


def _read_docker_info(info: Any) -> EngineInfo:
    options = [option.split(",") for option in info["SecurityOptions"] or ()]
    seccomp = [option for option in options if option[0] == "name=seccomp"]
    engine = EngineInfo(
        seccomp=bool(seccomp) and "profile=unconfined" not in seccomp[0],
        limits=bool(info["MemoryLimit"] and info["PidsLimit"]),
        processors=info["NCPU"] or math.inf,
        selinux=["name=selinux"] in options,
        local=info.get("OperatingSystem") != "Docker Desktop",
    )
    # New clients take the old word too, but complain on stderr each time.
    if re.match(r"2[5-9]|[3-9]\d", info["ClientInfo"].get("Version", "")):
        engine = attrs.evolve(engine, nonrecursive="bind-recursive=disabled")
    return engine


def _read_podman_info(info: Any) -> EngineInfo:
    host = info["host"]
    # Empty for an ordinary user under cgroup v1: limits are then ignored.
    limits = {"memory", "pids"} <= set(host["cgroupControllers"] or ())
    security = host["security"]
    return EngineInfo(
        seccomp=security["seccompEnabled"] is True,
        limits=limits,
        selinux=security.get("selinuxEnabled") is True,
        local=host.get("serviceIsRemote") is not True,
        isolates=host.get("networkBackend") == "netavark",
    )


@attrs.frozen(kw_only=True)
class Flavour:
    """What is particular about one of the two.

    Attributes:
        name: Of the runtime, and of its client.
        install: What to do where there is no client.
        start: What to do where the engine does not answer.
        denied: What to do where it may not be asked.
        options: Options of ``run`` that only it needs.
        rootless_options: More of them, for an ordinary user.
        relabel: The option of a mount that has SELinux label the source; none if the
            operator has to.
        endpoint: The command that tells where the engine is; none if ``info`` does.
        silenced: Variables that it would pass into containers: set empty.
        tmpfs: Options of every tmpfs.
        tmpfs_owned: Options by which a tmpfs is the agent's own.
        label: How a template of ``ps`` reads a label.
        remove: The commands that kill and remove; only the last one has to succeed.
        forgets: Whether a container that is removed may leave processes behind.
        read_info: Reads what ``info`` answers.
        network_options: Options of ``network create``, by which the containers of an
            open network do not reach each other; a name goes into them.
        network_sysctl: The file of the kernel that must say 1 for them to have effect.
        network_per_run: Whether that takes a network for each run, not each engine.
        network_needs_root: Whether an ordinary user cannot have it.
    """

    name: str
    install: str
    start: str
    denied: str
    options: tuple[str, ...] = ()
    rootless_options: tuple[str, ...] = ()
    relabel: tuple[str, ...] = ()
    endpoint: tuple[str, ...] = ()
    silenced: tuple[str, ...] = ()
    tmpfs: str
    tmpfs_owned: str
    label: str
    remove: tuple[tuple[str, ...], ...]
    forgets: bool = False
    read_info: Callable[[Any], EngineInfo]
    network_options: tuple[str, ...]
    network_sysctl: str = ""
    network_per_run: bool = False
    network_needs_root: bool = False

    def unavailable(self, problem: str, remedy: str = "") -> RuntimeUnavailableError:
        """Make the error that says so; by default the remedy follows from *problem*."""
        if not remedy:
            denied = "permission denied" in problem.lower()
            remedy = self.denied if denied else self.start
        return RuntimeUnavailableError(self.name, problem, remedy)


_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY")

DOCKER: Final = Flavour(
    name="docker",
    install="Install Docker, or set CLAWTRIO_RUNTIME to podman or bwrap.",
    start="Start it (systemctl start docker), or correct DOCKER_HOST.",
    denied="Add this user to the docker group (which is as good as root) and log in "
    "again, or set CLAWTRIO_RUNTIME to podman or bwrap.",
    endpoint=("context", "inspect", "--format", "{{.Endpoints.docker.Host}}"),
    # The client adds the "proxies" of its config.json, credentials included.
    silenced=(*_PROXIES, *map(str.lower, _PROXIES)),
    tmpfs="rw,nosuid,nodev,exec",
    tmpfs_owned="uid={uid},gid={gid}",
    label='.Label "{}"',
    # -v: with the anonymous volumes of a foreign image.
    remove=(("rm", "-f", "-v"),),
    read_info=_read_docker_info,
    # One for an engine: Docker's default addresses are for some thirty networks.
    network_options=(
        "--opt=com.docker.network.bridge.name={name}",
        "--opt=com.docker.network.bridge.enable_icc=false",
    ),
    # Without it iptables does not see what goes from one port of a bridge to another.
    network_sysctl="/proc/sys/net/bridge/bridge-nf-call-iptables",
)

_PODMAN_REMEDY: Final = "Run 'podman info' as this user to see what it lacks."

PODMAN: Final = Flavour(
    name="podman",
    install="Install Podman, or set CLAWTRIO_RUNTIME to docker or bwrap.",
    start=_PODMAN_REMEDY,
    denied=_PODMAN_REMEDY,
    options=(
        "--http-proxy=false",
        # Else --read-only adds /run and /var/tmp, writable and of any size.
        "--read-only-tmpfs=false",
        # Else Ctrl-P Ctrl-Q on stdin detaches the client, terminal or not.
        "--detach-keys=",
    ),
    rootless_options=("--userns=keep-id",),
    # Shared, since main's containers see other groups' directories.
    relabel=("relabel=shared",),
    # It copies up what a tmpfs hides, and knows no uid=.
    tmpfs="rw,nosuid,nodev,exec,notmpcopyup",
    tmpfs_owned="U",
    label='index .Labels "{}"',
    # Before 4.4, rm forgets one that somebody has begun to stop, and lets it live.
    # Without -t it waits ten seconds for a SIGTERM to work.
    remove=(("kill",), ("rm", "-f", "-v", "-t", "0")),
    forgets=True,
    read_info=_read_podman_info,
    # It has no icc: containers of one network always reach each other. Its own name
    # service would be one more thing to reach.
    network_options=("--opt=isolate=true", "--disable-dns"),
    network_per_run=True,
    network_needs_root=True,
)

FLAVOURS: Final = {flavour.name: flavour for flavour in (DOCKER, PODMAN)}


@attrs.frozen(kw_only=True)
class Answer:
    """What a client said before it left.

    Attributes:
        code: Its exit code.
        stdout: The end of its output.
        stderr: The end of its complaints.
    """

    code: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """The last line of its complaints, but for advice on usage."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        lines = [line for line in lines if not HINT.match(line)]
        return tidy(lines[-1]) if lines else f"it failed with code {self.code}"


async def ask(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Answer:
    """Run a client to its end. Cancelling kills it at once.

    Args:
        argv: The client and its arguments.
        environment: By default a client's.
        pass_fds: Descriptors that it inherits.

    Raises:
        NotStartedError: If it cannot be run.
    """
    if environment is None:
        environment = client_environment()
    process = await spawn(argv, environment=environment, pass_fds=pass_fds)
    stdout, stderr = bytearray(), bytearray()
    try:
        await process.stdin.aclose()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_end, process.stdout, stdout)
            nursery.start_soon(_keep_end, process.stderr, stderr)
        code = await process.wait()
    finally:
        await leave(process)  # noqa: ASYNC102 - shields itself
    out, err = (kept.decode(errors="replace") for kept in (stdout, stderr))
    return Answer(code=code, stdout=out, stderr=err)


async def _keep_end(stream: trio.abc.ReceiveStream, kept: bytearray) -> None:
    async for chunk in stream:
        kept += chunk
        del kept[:-_ANSWER_BYTES]


def tidy(message: str) -> str:
    """Make one bounded line of a client's message."""
    for prefix in ("Error: ", "Error response from daemon: "):
        message = message.removeprefix(prefix)
    return one_line(message[:_MESSAGE_CHARACTERS]).strip(" .")


async def leave(process: ClientProcess) -> None:
    """Make sure that a client is gone, and close its pipes."""
    process.kill()
    with trio.move_on_after(1, shield=True):
        await process.wait()
    with trio.CancelScope(shield=True):  # does not block
        await process.aclose()
