"""What tests of the engine and its runs share: agents, and a runtime of one's own."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs
import trio
from trio.testing import lockstep_stream_one_way_pair

import clawtrio
from clawtrio import Ending, Engine, FoundContainer, Group, RunResult, Settings
from clawtrio.testing import AgentPipes, FakeAgent, FakeRuntime, framed

GROUP: Final = Group("Family", "family")
JID: Final = "tg:42"
#: Longer than any test takes, in virtual time.
FOREVER: Final = 1e6
NOISE: Final = b"Downloading... 40 %\n"
UNACCEPTABLE: Final = framed(b'{"status":"maybe"}')


def frame(result: object = "hi", status: str = "success", **fields: Any) -> bytes:
    """Write what an agent writes; *fields* by their names on the wire."""
    output = {"status": status, "result": result, **fields}
    return framed(json.dumps(output, ensure_ascii=False).encode())


WAITS: Final = frame(None)
HEARTBEAT: Final = frame(None, partial=True)


def settings_for(root: Path, **changes: Any) -> Settings:
    """Make settings for a test: offline, round numbers, and the disk may be full."""
    plain = {
        "agent": "echo",
        "answer_timeout": 100,
        "idle_timeout": 40,
        "close_grace": 7,
        "stop_grace": 5,
        "drain_grace": 2,
        "command_timeout": 10,
        "min_free_bytes": 0,
    }
    return Settings(root=str(root), **{**plain, **changes})


def result_of(**changes: Any) -> RunResult:
    """Make the result of a run that went well."""
    result = RunResult(
        status="success",
        ending=Ending.EXITED,
        exit_code=0,
        duration=1.2345,
        outputs=1,
        dropped_frames=0,
        unanswered=(),
        stdout_truncated=False,
        stderr_truncated=False,
        log_path=Path("/x.log"),
    )
    return attrs.evolve(result, **changes)


@asynccontextmanager
async def engine_of(
    root: Path, agent: FakeAgent, *, ignores_stop: bool = False, **changes: Any
) -> AsyncIterator[Engine]:
    """Open an engine whose containers are *agent*."""
    runtime = FakeRuntime(agent, ignores_stop=ignores_stop)
    async with engine_on(root, runtime, **changes) as engine:
        yield engine


class Reader:
    """Reads the lines of an agent's stdin."""

    def __init__(self, stdin: trio.abc.ReceiveStream) -> None:
        self._stdin = stdin
        self._buffer = bytearray()

    async def line(self) -> dict[str, Any] | None:
        """Return the next line's object; None at the end of file.

        A prompt that is all of stdin has no newline.
        """
        while b"\n" not in self._buffer:
            chunk = await self._stdin.receive_some()
            if not chunk:
                break
            self._buffer += chunk
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        found: dict[str, Any] | None = json.loads(line) if line else None
        return found


def echoing(*, exit_code: int = 0, mute: bool = False) -> FakeAgent:
    """Make an agent that answers each line with its text, and leaves when told to."""

    async def agent(pipes: AgentPipes) -> int:
        reader = Reader(pipes.stdin)
        number = 0
        while (line := await reader.line()) and line.get("type") != "close":
            number = line.get("id", number)
            text = line.get("prompt") or line["text"]
            if not mute:
                await pipes.stdout.send_all(frame(text, answers=number))
        return exit_code

    return agent


def open_descriptors() -> int:
    """Count this process's descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def open_threads() -> set[threading.Thread]:
    """Find this process's threads, but for those that Trio keeps for a while."""
    return {t for t in threading.enumerate() if not t.name.startswith("Trio thread")}


def own_addresses() -> list[str]:
    """List the addresses of this machine."""
    found = []
    with socket.socket() as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(any_socket, 0x8915, request)  # SIOCGIFADDR
                found.append(socket.inet_ntoa(answer[20:24]))
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        address, _, _, _, flags, name = line.split()
        if int(flags, 16) & 0x40:  # IFA_F_TENTATIVE: not yet its own
            continue
        text = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
        found.append(f"{text}%{name}" if text.startswith("fe80") else text)
    return found


async def nothing() -> None:
    """Work at once."""
    await trio.lowlevel.checkpoint()


async def hang() -> None:
    """Work, but never come to an end."""
    await trio.sleep_forever()


def raising(error: BaseException) -> Callable[[], Awaitable[object]]:
    """Make something that fails."""

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise error

    return fail


class OwnContainer:
    """A container as a user's runtime might have it, its pipes without any buffer.

    It stays until the runtime stops, kills or removes it, or the test ends it; so does
    its client, which does not close the pipes.
    """

    def __init__(self, runtime: OwnRuntime, spec: clawtrio.ContainerSpec) -> None:
        self.runtime = runtime
        self.spec = spec
        self.stdin, self.agent_stdin = lockstep_stream_one_way_pair()
        self.agent_stdout, self.stdout = lockstep_stream_one_way_pair()
        self.agent_stderr, self.stderr = lockstep_stream_one_way_pair()
        self.asked: list[str] = []
        #: Which of this machine's ports a port inside is.
        self.ports: dict[int, int] = {}
        self._code: int | None = None
        self._exited = trio.Event()

    def exit(self, code: int, *, close: bool = True) -> None:
        """End container and client; without *close* somebody else has the pipes."""
        self.runtime.live.pop(self.spec.name, None)
        self.exit_client(code)
        if close:
            trio.lowlevel.spawn_system_task(self._close)

    async def _close(self) -> None:
        await self.agent_stdout.aclose()
        await self.agent_stderr.aclose()

    def exit_client(self, code: int) -> None:
        """End the client alone."""
        if self._code is None:
            self._code = code
            self._exited.set()

    async def _ask(self, rung: str) -> None:
        self.asked.append(rung)
        await self.runtime.behaviour[rung]()
        if rung not in self.runtime.futile:
            self.exit(self.runtime.stopped_code)

    @property
    def process(self) -> int | None:
        return None

    async def verify(self) -> None:
        await self.runtime.behaviour["verify"]()

    async def listen(self, port: int) -> trio.SocketListener:
        """Listen on this machine's loopback, there being no other, on a free port."""
        await self.runtime.behaviour["listen"]()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.ports[port] = listener.socket.getsockname()[1]
        return listener

    async def wait(self) -> int:
        await self.runtime.behaviour["wait"]()
        await self._exited.wait()
        assert self._code is not None
        return self._code

    async def stop(self, grace: float) -> None:  # noqa: ARG002
        await self._ask("stop")

    async def kill(self) -> None:
        await self._ask("kill")

    def kill_client(self) -> None:
        if "kill_client" not in self.runtime.futile:
            self.exit_client(137)

    def start_failure(self, exit_code: int, stderr: str) -> str | None:  # noqa: ARG002
        return self.runtime.start_failure if exit_code == 125 else None

    async def aclose(self) -> None:
        await self.runtime.behaviour["aclose"]()
        for stream in (self.stdin, self.stdout, self.stderr):
            await trio.aclose_forcefully(stream)


OwnAgent: TypeAlias = Callable[[OwnContainer], Awaitable[object]]


class OwnRuntime:
    """A runtime written by a user, from the public protocol alone.

    Args:
        agent: What goes on in each container.
        in_process: See the protocol; False has the engine use threads.
        futile: What achieves nothing: ``stop``, ``kill``, ``remove``, ``kill_client``.
        stopped_code: What the client exits with when the container is stopped.
        start_failure: The runtime's own message, should it exit with 125.
        behaviour: What the methods do first, by name.
    """

    name = "own"
    takes_runner = False
    compares_mounts = False

    def __init__(
        self,
        agent: OwnAgent,
        *,
        in_process: bool = True,
        futile: Sequence[str] = (),
        stopped_code: int = 143,
        start_failure: str | None = None,
        **behaviour: Callable[[], Awaitable[object]],
    ) -> None:
        methods = (
            *("check", "start", "verify", "listen", "wait", "stop", "kill"),
            *("find", "remove", "aclose"),
            *("open_network", "close_network", "gateway"),
        )
        self.in_process = in_process
        self.futile = futile
        self.stopped_code = stopped_code
        self.start_failure = start_failure
        self.behaviour: dict[str, Callable[[], Awaitable[object]]] = {
            **dict.fromkeys(methods, nothing),
            **behaviour,
        }
        self.live: dict[str, OwnContainer] = {}
        self.started: list[OwnContainer] = []
        self.looks: list[float] = []
        self.networks: list[Mapping[str, str]] = []
        self._agent = agent

    async def check(self) -> None:
        await self.behaviour["check"]()

    async def open_network(self, labels: Mapping[str, str]) -> None:
        await self.behaviour["open_network"]()
        self.networks.append(labels)

    async def close_network(self, labels: Mapping[str, str]) -> None:
        await self.behaviour["close_network"]()
        self.networks = [has for has in self.networks if has != labels]

    async def gateway(self, labels: Mapping[str, str]) -> tuple[str, str]:  # noqa: ARG002
        await self.behaviour["gateway"]()
        return "127.0.0.1", "lo"

    def argv(self, spec: clawtrio.ContainerSpec) -> Sequence[str]:
        return ("own", spec.name)

    async def start(self, spec: clawtrio.ContainerSpec) -> clawtrio.Container:
        await self.behaviour["start"]()
        container = OwnContainer(self, spec)
        self.live[spec.name] = container
        self.started.append(container)
        trio.lowlevel.spawn_system_task(self._agent, container)
        return container

    async def find(self, labels: Mapping[str, str]) -> Sequence[FoundContainer]:
        self.looks.append(trio.current_time())
        await self.behaviour["find"]()
        return [
            FoundContainer(name, container.spec.labels)
            for name, container in self.live.items()
            if labels.items() <= container.spec.labels.items()
        ]

    async def remove(self, container_id: str) -> None:
        await self.behaviour["remove"]()
        if "remove" not in self.futile and container_id in self.live:
            self.live[container_id].exit(137)


@asynccontextmanager
async def engine_on(
    root: Path, runtime: clawtrio.Runtime, **changes: Any
) -> AsyncIterator[Engine]:
    """Open an engine on *runtime*; in virtual time, a hang fails."""
    settings = settings_for(root, **changes)
    with trio.fail_after(FOREVER):
        async with clawtrio.open_engine(settings, runtime) as engine:
            yield engine
