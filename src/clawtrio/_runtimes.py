"""What a runtime is: how containers are started, stopped, found and removed.

The engine knows runtimes by :class:`Runtime` and :class:`Container` alone, so a user
can write one: for a scheduler's client, say, or a remote host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Literal, Protocol, TypeVar

import attrs
import trio

from ._errors import ClawtrioError, RuntimeUnavailableError
from ._models import VolumeMount

#: What the methods of a runtime and a container may raise; anything else is a bug.
RUNTIME_FAILURES: Final = (ClawtrioError, OSError)

LABEL_ROOT: Final = "clawtrio.root"
LABEL_ENGINE: Final = "clawtrio.engine"
LABEL_RUN: Final = "clawtrio.run"

#: Where an agent finds its group, where our runner is mounted, and what is its home.
WORKSPACE_GROUP: Final = "/workspace/group"
RUNNER: Final = "/app/src"
HOME: Final = "/home/node"
#: Where the directory of the proxy's Unix socket is mounted.
RUN_CLAWTRIO: Final = "/run/clawtrio"


T = TypeVar("T")


@attrs.frozen
class HeldMount:
    """A mount whose source was checked, and is held from check to start.

    Attributes:
        mount: Source and target.
        fd: An ``O_PATH`` descriptor of the source, open until the run is over.
        device: ``st_dev`` of the source.
        inode: ``st_ino`` of the source.
        relabel: Whether SELinux may label it anew, for containers to see it: what is
            the bot's own.
        replaceable: Whether an agent could put something else in its place meanwhile.
    """

    mount: VolumeMount
    fd: int
    device: int
    inode: int
    relabel: bool = False
    replaceable: bool = False


@attrs.frozen(kw_only=True)
class ContainerSpec:
    """One container to start.

    Attributes:
        name: ``clawtrio-<folder>-<run id>``: unique, at most 128 characters.
        labels: By which :meth:`Runtime.find` must find it, from the first moment.
        mounts: What it sees of the host. Nothing else may be visible in it.
        environment: Its environment; holds no secret of the host. Not in the repr.
        arguments: Arguments for the agent runner, which is mounted at ``/app/src``;
            empty leaves the start to the image.
        uid: The user to run as; never 0.
        gid: The group to run as.
        memory: Bytes of memory, swap included.
        cpus: Processors' worth of time.
        pids: Processes and threads.
        network: ``none`` leaves it with a loopback interface of its own; ``open`` puts
            it into what :meth:`Runtime.open_network` opened for its engine.
        hidden: Names in *environment* whose values no command line may show.
    """

    name: str
    labels: Mapping[str, str]
    mounts: tuple[HeldMount, ...]
    environment: Mapping[str, str] = attrs.field(repr=False)
    arguments: tuple[str, ...]
    uid: int
    gid: int
    memory: int
    cpus: float
    pids: int
    network: Literal["none", "open"] = "none"
    hidden: frozenset[str] = frozenset()


@attrs.frozen
class FoundContainer:
    """A container that exists, running or not.

    Attributes:
        id: The runtime's own identifier, never reused; not the name.
        labels: Its ``clawtrio.*`` labels.
    """

    id: str
    labels: Mapping[str, str]


class Container(Protocol):
    """A started container, seen through the client process that holds its pipes."""

    @property
    def stdin(self) -> trio.abc.SendStream:
        """Where the agent reads. Closing it tells the agent that the host is gone."""

    @property
    def stdout(self) -> trio.abc.ReceiveStream:
        """What the agent writes: frames among noise."""

    @property
    def stderr(self) -> trio.abc.ReceiveStream:
        """What the agent and the client complain of."""

    @property
    def process(self) -> int | None:
        """The host's id of the first process in it, for as long as it runs.

        None before :meth:`verify`, and where it is not a process of this host, or not
        known.
        """

    async def verify(self) -> None:
        """Make sure that what was checked is what was mounted, before stdin is used.

        Returns at once where the runtime cannot be tricked, or if the container is
        gone already. Bounded by the engine.

        Raises:
            UnsafePathError: If another place was mounted, or that cannot be told of a
                source that an agent could have replaced; names the path.
        """

    async def listen(self, port: int) -> trio.SocketListener:
        """Open a port on the container's own loopback, for the host to serve.

        Called after :meth:`verify`, before the first byte of stdin. Whoever is inside
        can connect to it, and nobody else. Bounded.

        Args:
            port: On 127.0.0.1; 1 to 65535.

        Raises:
            RuntimeUnavailableError: If the network of the container cannot be joined,
                or the container is gone.
        """

    async def wait(self) -> int:
        """Wait until the client has exited; then 0 to 255, 128 + N for signal N."""

    async def stop(self, grace: float) -> None:
        """Send the agent ``SIGTERM``, and have it killed *grace* seconds later.

        May return before it is gone. Being cancelled must end it within a moment.
        A container that does not exist (yet) is no error.
        """

    async def kill(self) -> None:
        """Have the runtime kill the container. Otherwise like :meth:`stop`."""

    def kill_client(self) -> None:
        """``SIGKILL`` the client process, if it is still there. Never blocks."""

    def start_failure(self, exit_code: int, stderr: str) -> str | None:
        """Tell whether the runtime failed before there was an agent.

        Called after the exit, if nothing was written to stdout.

        Args:
            exit_code: What :meth:`wait` returned.
            stderr: The last that stderr said.

        Returns:
            The runtime's own message; None if the agent ran.
        """

    async def aclose(self) -> None:
        """Give back pipes and descriptors. The container is not touched."""


class Runtime(Protocol):
    """A way to run containers.

    Every method may be called from several tasks at once, and must end soon when it
    is cancelled; the engine bounds them all.
    """

    @property
    def name(self) -> str:
        """What errors and logs call it."""

    @property
    def in_process(self) -> bool:
        """Whether containers are mere tasks of this process, on its clock.

        The engine then uses no threads: they would make a mock clock jump.
        """

    @property
    def takes_runner(self) -> bool:
        """Whether containers run the agent runner that the engine mounts at /app/src.

        False for an image that has an agent of its own. Known after :meth:`check`.
        """

    @property
    def compares_mounts(self) -> bool:
        """Whether :meth:`Container.verify` can tell what was mounted.

        If not, no source is granted that an agent could replace. Known after
        :meth:`check`.
        """

    async def check(self) -> None:
        """Make sure that containers can be run here; awaited as the engine opens.

        Raises:
            RuntimeUnavailableError: If not; says what to do about it.
        """

    async def open_network(self, labels: Mapping[str, str]) -> None:
        """Make ready for containers whose network is ``open``.

        They reach what the host reaches, and the host, but never each other, nor
        those of another engine. Awaited as an engine opens that is to have such.

        Args:
            labels: ``clawtrio.root`` and ``clawtrio.engine``.

        Raises:
            RuntimeUnavailableError: If that cannot be had here.
        """

    async def close_network(self, labels: Mapping[str, str]) -> None:
        """Remove the networks with these labels; there may be none.

        Called when the engine's containers are gone, or by a sweep if it died.

        Raises:
            RuntimeUnavailableError: If it cannot be told, or one could not be removed.
        """

    async def gateway(self, labels: Mapping[str, str]) -> tuple[str, str]:
        """Tell where the host is in the network that was opened.

        For an image that knows only a URL, where :meth:`Container.listen` fails.

        Returns:
            The host's address, and the network device that has it.

        Raises:
            RuntimeUnavailableError: If there is no such place.
        """

    def argv(self, spec: ContainerSpec) -> Sequence[str]:
        """Return the command line that :meth:`start` uses, for people to read.

        It shows no value of what is hidden.

        Raises:
            NotStartedError: If no such container can be started by this runtime.
            UnsafePathError: If a mount cannot be told to this runtime.
        """

    async def start(self, spec: ContainerSpec) -> Container:
        """Start a container and return once its client process runs.

        If cancelled, nothing that was begun may be left behind.

        Raises:
            NotStartedError: If there is no client process.
            UnsafePathError: If a mount cannot be told to this runtime.
        """

    async def find(self, labels: Mapping[str, str]) -> Sequence[FoundContainer]:
        """List the containers, running or not, that carry all of *labels*.

        Raises:
            RuntimeUnavailableError: If it cannot be told.
        """

    async def remove(self, container_id: str) -> None:
        """Kill and remove a container that :meth:`find` listed.

        One that is gone is no error.

        Raises:
            RuntimeUnavailableError: If it could not be removed.
        """


async def ask_within(
    seconds: float, runtime: Runtime, method: Callable[[], Awaitable[T]]
) -> T:
    """Await a method of *runtime*, but not for long.

    Raises:
        RuntimeUnavailableError: If it takes more than *seconds*, or says so itself.
    """
    with trio.move_on_after(seconds):
        return await method()
    problem = f"did not answer within {seconds:g} s"
    remedy = "Restart its daemon, or raise command_timeout."
    raise RuntimeUnavailableError(runtime.name, problem, remedy)
