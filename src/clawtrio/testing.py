"""Fakes for tests of what embeds clawtrio: an agent in place of a container.

Everything of the engine is real but the container, and nothing uses a thread, so a
:class:`trio.testing.MockClock` works::

    hello = framed(b'{"status": "success", "result": "Hello"}')
    agent = scripted_agent(hello, exit_code=0)
    settings = Settings(root=tmp_path, agent="echo")  # which needs no credential
    async with open_engine(settings, FakeRuntime(agent)) as engine:
        result = await engine.run(group, "Hi", chat_jid="tg:42")
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeAlias

import attrs
import trio
from trio.testing import memory_stream_one_way_pair

from ._errors import RuntimeUnavailableError
from ._markers import END, START
from ._runtimes import Container, ContainerSpec, FoundContainer

_TERMINATED: Final = 128 + 15
_KILLED: Final = 128 + 9


@attrs.frozen
class AgentPipes:
    """What a fake agent has of its container.

    Attributes:
        stdin: What the engine writes to it.
        stdout: Where it writes frames, among any noise.
        stderr: Where it complains.
        spec: The container that it would run in.
    """

    stdin: trio.abc.ReceiveStream
    stdout: trio.abc.SendStream
    stderr: trio.abc.SendStream
    spec: ContainerSpec


FakeAgent: TypeAlias = Callable[[AgentPipes], Awaitable[int]]
"""An agent: told its pipes, it returns its exit code; stopping cancels it."""


def framed(data: bytes) -> bytes:
    """Put markers round *data*, as an agent does."""
    return b"\n".join((START, data, END, b""))


def scripted_agent(*steps: bytes | float, exit_code: int | None = None) -> FakeAgent:
    """Make an agent that does not listen, but goes by a script.

    Args:
        steps: Written to stdout if bytes, slept for if seconds.
        exit_code: What it leaves with after the last step; None stays quiet until it is
            stopped.
    """

    async def agent(pipes: AgentPipes) -> int:
        for step in steps:
            if isinstance(step, (int, float)):
                await trio.sleep(step)
            else:
                await pipes.stdout.send_all(step)
        if exit_code is None:
            await trio.sleep_forever()
        return exit_code or 0

    return agent


class FakeRuntime:
    """A :class:`Runtime` whose containers are tasks that run *agent*.

    An agent that raises has crashed: its traceback goes to its stderr, its exit code
    is 1.

    Args:
        agent: What each container runs.
        ignores_stop: Whether only ``SIGKILL`` ends the agent, not ``SIGTERM``.

    Attributes:
        specs: What was started, in order.
    """

    name = "fake"
    in_process = True
    takes_runner = True
    compares_mounts = True

    def __init__(self, agent: FakeAgent, *, ignores_stop: bool = False) -> None:
        self._agent = agent
        self._ignores_stop = ignores_stop
        self._live: dict[str, _FakeContainer] = {}
        self.specs: list[ContainerSpec] = []

    async def check(self) -> None:
        """See :meth:`Runtime.check`: always available."""
        await trio.lowlevel.checkpoint()

    async def open_network(self, labels: Mapping[str, str]) -> None:  # noqa: ARG002
        """See :meth:`Runtime.open_network`: an agent is a task, it has ours."""
        await trio.lowlevel.checkpoint()

    async def close_network(self, labels: Mapping[str, str]) -> None:  # noqa: ARG002
        """See :meth:`Runtime.close_network`: there was none."""
        await trio.lowlevel.checkpoint()

    async def gateway(self, labels: Mapping[str, str]) -> tuple[str, str]:  # noqa: ARG002
        """See :meth:`Runtime.gateway`: there is none.

        Raises:
            RuntimeUnavailableError: Always.
        """
        await trio.lowlevel.checkpoint()
        raise _no_network()

    def argv(self, spec: ContainerSpec) -> Sequence[str]:
        """See :meth:`Runtime.argv`: there is none, but the name and the arguments."""
        return (spec.name, *spec.arguments)

    async def start(self, spec: ContainerSpec) -> Container:
        """See :meth:`Runtime.start`."""
        await trio.lowlevel.checkpoint()
        container = _FakeContainer(
            spec, self._agent, ignores_stop=self._ignores_stop, on_exit=self._live.pop
        )
        self.specs.append(spec)
        self._live[spec.name] = container
        # Not in a nursery of somebody's: a container outlives whoever started it.
        trio.lowlevel.spawn_system_task(container.run)
        return container

    async def find(self, labels: Mapping[str, str]) -> Sequence[FoundContainer]:
        """See :meth:`Runtime.find`."""
        await trio.lowlevel.checkpoint()
        return [
            FoundContainer(name, container.spec.labels)
            for name, container in self._live.items()
            if labels.items() <= container.spec.labels.items()
        ]

    async def remove(self, container_id: str) -> None:
        """See :meth:`Runtime.remove`."""
        await trio.lowlevel.checkpoint()
        if container := self._live.get(container_id):
            await container.kill()


def _no_network() -> RuntimeUnavailableError:
    # A port of the real host, open to all on it, would be more than a fake may take.
    problem = "its containers are tasks, and have no network of their own"
    remedy = "Try it with docker, podman or bwrap."
    return RuntimeUnavailableError("fake", problem, remedy)


class _FakeContainer:
    """An agent as a task, in the place of a process."""

    process = None

    def __init__(
        self,
        spec: ContainerSpec,
        agent: FakeAgent,
        *,
        ignores_stop: bool,
        on_exit: Callable[[str], object],
    ) -> None:
        self.spec = spec
        self.stdin, self._agent_stdin = memory_stream_one_way_pair()
        self._agent_stdout, self.stdout = memory_stream_one_way_pair()
        self._agent_stderr, self.stderr = memory_stream_one_way_pair()
        self._agent = agent
        self._ignores_stop = ignores_stop
        self._on_exit = on_exit
        self._alive = trio.CancelScope()
        self._exited = trio.Event()
        self._exit_code = 1

    async def run(self) -> None:
        """Run the agent as the kernel would run a program."""
        pipes = AgentPipes(
            self._agent_stdin, self._agent_stdout, self._agent_stderr, self.spec
        )
        # Outside the scope, which turns a group with a cancellation into one without.
        try:
            with self._alive:
                # None is what a test's agent returns that just ends.
                self._exit_code = await self._agent(pipes) or 0
        except Exception:  # noqa: BLE001 - as a program's end, not as our error
            complaint = traceback.format_exc().encode()
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._agent_stderr.send_all(complaint)
        for stream in (self._agent_stdin, self._agent_stdout, self._agent_stderr):
            stream.close()
        self._on_exit(self.spec.name)
        self._exited.set()

    async def verify(self) -> None:
        await trio.lowlevel.checkpoint()

    async def listen(self, port: int) -> trio.SocketListener:  # noqa: ARG002
        await trio.lowlevel.checkpoint()
        raise _no_network()

    async def wait(self) -> int:
        await self._exited.wait()
        return self._exit_code

    async def stop(self, grace: float) -> None:
        if not self._ignores_stop:
            self._die(_TERMINATED)
        await trio.sleep(grace)
        self._die(_KILLED)

    async def kill(self) -> None:
        await trio.lowlevel.checkpoint()
        self._die(_KILLED)

    def kill_client(self) -> None:
        self._die(_KILLED)

    def _die(self, code: int) -> None:
        if not self._exited.is_set():
            self._exit_code = code
            self._alive.cancel()

    def start_failure(self, exit_code: int, stderr: str) -> str | None:  # noqa: ARG002
        return None  # an agent that is a function always starts

    async def aclose(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            await trio.aclose_forcefully(stream)
