"""What a container reaches: under "none" nothing, under "open" no other container."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from clawtrio._docker import DockerContainer, DockerRuntime
from clawtrio._errors import NotStartedError, RuntimeUnavailableError
from clawtrio._flavours import Flavour
from clawtrio._netns import listen_on_device
from clawtrio._runtimes import LABEL_ENGINE, LABEL_ROOT, ContainerSpec
from tests.helpers import open_descriptors, own_addresses

from .conftest import UID, House, finish, read_line, run

Client = Callable[[str, str], DockerRuntime]
Calls = Callable[[], list[str]]

#: Serves on all of its addresses; tells them; then tries what stdin tells it to.
AGENT = """
import json, os, socket, sys, threading
server = socket.create_server(("", 0))
def serve():
    while True:
        with server.accept()[0] as peer:
            peer.send(b"inside")
threading.Thread(target=serve, daemon=True).start()
def lines(path):
    return [line.split() for line in open(path)] if os.path.exists(path) else []
try:
    address = socket.gethostbyname(socket.gethostname())
except OSError:
    address = None
print(json.dumps({
    "address": [address, server.getsockname()[1]],
    "interfaces": os.listdir("/sys/class/net"),
    "routes": [line[0] for line in lines("/proc/net/route")[1:]]
        + [line[-1] for line in lines("/proc/net/ipv6_route")],
}), flush=True)
for line in sys.stdin:
    host, port = json.loads(line)
    try:
        with socket.create_connection((host, port), timeout=1) as peer:
            print(json.dumps(peer.recv(16).decode()), flush=True)
    except OSError:
        print("null", flush=True)
"""


@attrs.frozen
class Agent:
    """An agent that tells what it reaches.

    Attributes:
        container: Where it is.
        seen: What it found around itself.
    """

    container: DockerContainer
    seen: Any

    async def reaches(self, host: str, port: int) -> str | None:
        """Return what is said at a place; None if it cannot be reached."""
        await self.container.stdin.send_all(json.dumps([host, port]).encode() + b"\n")
        answer: str | None = json.loads(await read_line(self.container.stdout))
        return answer


@asynccontextmanager
async def agent_of(runtime: DockerRuntime, spec: ContainerSpec) -> AsyncIterator[Agent]:
    with trio.fail_after(60):
        container = await runtime.start(spec)
        await container.verify()
        try:
            yield Agent(container, json.loads(await read_line(container.stdout)))
        finally:
            with trio.move_on_after(20, shield=True):
                await container.stdin.aclose()
                result = await finish(container)
    assert (result.code, result.stderr) == (0, "")


def opened(spec: ContainerSpec, engine: str = "engine") -> ContainerSpec:
    labels = {**spec.labels, LABEL_ENGINE: engine}
    return attrs.evolve(spec, network="open", labels=labels)


@asynccontextmanager
async def network_of(
    runtime: DockerRuntime, house: House, engine: str = "engine"
) -> AsyncIterator[dict[str, str]]:
    labels = {LABEL_ROOT: house.root, LABEL_ENGINE: engine}
    with trio.fail_after(60):
        await runtime.open_network(labels)
        try:
            yield labels
        finally:
            with trio.move_on_after(20, shield=True):
                await runtime.close_network(labels)


def networks(flavour: Flavour, house: House) -> list[str]:
    """Name the networks that were made for a test."""
    argv = [flavour.name, "network", "ls", "--format", "{{.Name}}", "--filter"]
    argv.append(f"label={LABEL_ROOT}={house.root}")
    found = subprocess.run(argv, check=True, capture_output=True, text=True)
    return found.stdout.split()


@pytest.fixture(autouse=True)
def no_networks(house: House, flavour: Flavour) -> Iterator[None]:
    """Find out what networks and devices a test has left."""
    devices = {name for _, name in socket.if_nameindex()}
    yield
    left = networks(flavour, house)
    if left:
        subprocess.run([flavour.name, "network", "rm", *left], check=False)
    assert left == []
    assert {n for _, n in socket.if_nameindex() if n.startswith("ct-")} <= devices


@asynccontextmanager
async def host_listener() -> AsyncIterator[int]:
    """Say "host" to whoever comes, on every address of this machine."""

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(b"host")
        await stream.aclose()

    sock = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [listener])
        yield sock.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_no_network_at_all(runtime: DockerRuntime, house: House) -> None:
    """Without a network there is lo and no route: no host, and no other container."""
    async with (
        host_listener() as port,
        network_of(runtime, house),
        agent_of(runtime, opened(house.spec(AGENT))) as other,
        agent_of(runtime, house.spec(AGENT)) as agent,
    ):
        addresses = own_addresses()
        assert {"127.0.0.1", "::1"} < set(addresses)
        for address in addresses:
            async with await open_stream(address, port) as stream:
                assert await stream.receive_some() == b"host"
            assert await agent.reaches(address, port) is None
        assert await agent.reaches(*other.seen["address"]) is None
        assert agent.seen["interfaces"] == ["lo"]
        assert set(agent.seen["routes"]) <= {"lo"}
        # It can reach itself, so that its failures mean something.
        own_port = agent.seen["address"][1]
        assert await agent.reaches("127.0.0.1", own_port) == "inside"


async def open_stream(address: str, port: int) -> trio.SocketStream:
    (info, *_) = await trio.socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    sock = trio.socket.socket(info[0])
    try:
        await sock.connect(info[4])
    except OSError:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def test_open_networks_are_apart(
    runtime: DockerRuntime, house: House, flavour: Flavour
) -> None:
    """Containers reach the host, but none that of another run, or another engine."""
    async with (
        host_listener() as port,
        network_of(runtime, house),
        network_of(runtime, house, "another"),
        agent_of(runtime, opened(house.spec(AGENT))) as one,
        agent_of(runtime, opened(house.spec(AGENT))) as two,
        agent_of(runtime, opened(house.spec(AGENT), "another")) as three,
    ):
        agents = (one, two, three)
        places = [tuple(agent.seen["address"]) for agent in agents]
        assert len(set(places)) == 3
        assert len(networks(flavour, house)) == (3 if flavour.network_per_run else 2)
        outside = next(a for a in own_addresses() if not a.startswith("127."))

        async def try_all(agent: Agent, own: tuple[str, int]) -> None:
            assert await agent.reaches(*own) == "inside"
            assert await agent.reaches(outside, port) == "host"
            for place in places:
                if place != own:
                    assert await agent.reaches(*place) is None

        async with trio.open_nursery() as nursery:
            for agent, own in zip(agents, places, strict=True):
                nursery.start_soon(try_all, agent, own)


async def test_nothing_is_left_of_a_network(
    runtime: DockerRuntime, house: House, flavour: Flavour
) -> None:
    """A network and its bridge are gone once closed; those of others stay."""
    async with network_of(runtime, house), network_of(runtime, house, "dead") as dead:
        async with agent_of(runtime, opened(house.spec(AGENT), "dead")):
            during = networks(flavour, house)
        after = networks(flavour, house)
        await runtime.close_network(dead)
        await runtime.close_network(dead)
        closed = networks(flavour, house)

    assert all(len(name) <= 15 for name in during)
    # A run's own network goes with it, an engine's stays.
    expected = (1, 0, 0) if flavour.network_per_run else (2, 2, 1)
    assert (len(during), len(after), len(closed)) == expected
    assert not {name for _, name in socket.if_nameindex()} & {*during}


async def test_network_of_a_dead_engine(
    runtime: DockerRuntime, house: House, flavour: Flavour
) -> None:
    """Another process closes it by its labels, once no container is in it."""
    spec = opened(house.spec(AGENT))
    await runtime.open_network(spec.labels)
    with trio.fail_after(60):
        container = await runtime.start(spec)
        await container.verify()
        another = DockerRuntime(flavour, image="x")
        with pytest.raises(RuntimeUnavailableError):
            await another.close_network(spec.labels)
        assert len(networks(flavour, house)) == 1
        (found,) = await another.find({LABEL_ROOT: house.root})
        await another.remove(found.id)
        await another.close_network(spec.labels)

        assert networks(flavour, house) == []
        await finish(container)


async def test_gateway(runtime: DockerRuntime, house: House, flavour: Flavour) -> None:
    """What listens on an engine's bridge is reached from there, by no other bridge."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"host")
        await stream.aclose()

    labels = {LABEL_ROOT: house.root, LABEL_ENGINE: "engine"}
    if flavour.network_per_run:
        with pytest.raises(RuntimeUnavailableError, match="no gateway"):
            await runtime.gateway(labels)
        return
    with pytest.raises(RuntimeUnavailableError, match=r"(?i)no such network|not found"):
        await runtime.gateway(labels)
    async with (
        network_of(runtime, house),
        network_of(runtime, house, "another"),
        agent_of(runtime, opened(house.spec(AGENT))) as agent,
        agent_of(runtime, opened(house.spec(AGENT), "another")) as other,
        trio.open_nursery() as nursery,
    ):
        address, device = await runtime.gateway(labels)
        listener = listen_on_device(address, device)
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, serve, [listener])

        assert await agent.reaches(address, port) == "host"
        assert await other.reaches(address, port) is None
        nursery.cancel_scope.cancel()


async def test_listens_inside(runtime: DockerRuntime, house: House) -> None:
    """An agent without a network talks to the host through a port of its own loopback.

    Nobody else does: not on the host, nor in another container.
    """
    talk = """
import socket, sys
sys.stdin.readline()
with socket.create_connection(("127.0.0.1", 4000), timeout=10) as peer:
    peer.sendall(b"question")
    print(peer.recv(16).decode())
"""

    async def serve(stream: trio.SocketStream) -> None:
        assert await stream.receive_some() == b"question"
        await stream.send_all(b"answer")
        await stream.aclose()

    async with (
        agent_of(runtime, house.spec(AGENT)) as other,
        trio.open_nursery() as nursery,
    ):
        container = await runtime.start(house.spec(talk))
        await container.verify()
        before = open_descriptors()
        listener = await container.listen(4000)
        assert open_descriptors() == before + 1
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        assert await other.reaches("127.0.0.1", 4000) is None
        with pytest.raises(ConnectionRefusedError):
            await open_stream("127.0.0.1", 4000)
        with pytest.raises(RuntimeUnavailableError, match="in use"):
            await container.listen(4000)
        await container.stdin.aclose()
        result = await finish(container)
        nursery.cancel_scope.cancel()

    assert result.stdout == "answer\n", result.stderr


async def test_listens_in_nothing_else(runtime: DockerRuntime, house: House) -> None:
    """Where the container is gone, or its number is another's, no port is opened."""
    with trio.fail_after(60):
        container = await runtime.start(house.spec("import sys; sys.stdin.read()"))
        before = open_descriptors()
        with pytest.raises(RuntimeUnavailableError, match="does not run"):
            await container.listen(4000)
        await container.verify()
        assert container._seen is not None
        container_id, _ = seen = container._seen
        container._seen = container_id, os.getpid()
        with pytest.raises(RuntimeUnavailableError, match="not on this host") as caught:
            await container.listen(4000)
        assert "CLAWTRIO_NETWORK" in caught.value.remedy
        assert open_descriptors() == before
        container._seen = seen
        await container.stdin.aclose()
        await finish(container)
        with pytest.raises(RuntimeUnavailableError, match=r"(?i)no such"):
            await container.listen(4000)


async def test_socket_of_the_host(
    runtime: DockerRuntime, house: House, tmp_path: Path
) -> None:
    """A socket in a read-only mount can be connected to; /run cannot be written to."""
    place = tmp_path / "run"
    place.mkdir()
    program = """
import os, socket
for path in "/run/x", "/run/clawtrio/x":
    try:
        open(path, "w").close(); print("written")
    except OSError as exc:
        print(exc.strerror)
with socket.socket(socket.AF_UNIX) as peer:
    peer.connect("/run/clawtrio/proxy")
    print(os.getuid(), peer.recv(16).decode())
"""
    listener = trio.socket.socket(socket.AF_UNIX)
    with listener:
        await listener.bind(os.fspath(place / "proxy"))
        (place / "proxy").chmod(0o666)
        listener.listen()
        mount = house.hold(place, "/run/clawtrio", readonly=True)

        async def serve() -> None:
            stream, _ = await listener.accept()
            with stream:
                await stream.send(b"host")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            result = await run(runtime, house.spec(program, mount))

    readonly = "Read-only file system"
    assert result.stdout.splitlines() == [readonly, readonly, f"{UID} host"]


def command_lines() -> list[bytes]:
    """Read what ``ps`` shows of all processes."""
    shown = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has left
            shown.append(path.read_bytes())
    return shown


async def test_hidden_value(runtime: DockerRuntime, house: House) -> None:
    """The agent has it, but no command line that others can read."""
    secret = f"token-{uuid.uuid4().hex}"
    program = """
import os, sys
print(os.environ["CLAWTRIO_TOKEN"], flush=True)
sys.stdin.read()
"""
    spec = house.spec(program, environment={"CLAWTRIO_TOKEN": secret})
    spec = attrs.evolve(spec, hidden=frozenset({"CLAWTRIO_TOKEN"}))
    with trio.fail_after(60):
        container = await runtime.start(spec)
        assert await read_line(container.stdout) == secret
        shown = command_lines()
        await container.stdin.aclose()
        await finish(container)

    assert any(spec.name.encode() in line for line in shown)
    assert not any(secret.encode() in line for line in shown)
    assert secret not in f"{runtime.argv(spec)} {spec!r}"


# Where it cannot be had.

LABELS = {LABEL_ROOT: "r", LABEL_ENGINE: "e"}


async def test_bridges_that_are_not_filtered(
    house: House, flavour: Flavour, tmp_path: Path
) -> None:
    """Where the kernel shows bridged packets to no filter, no network is left open."""
    labels = {LABEL_ROOT: house.root, LABEL_ENGINE: "engine"}
    for sysctl in (tmp_path / "absent", tmp_path / "zero"):
        changed = attrs.evolve(flavour, network_per_run=False, network_options=())
        changed = attrs.evolve(changed, network_sysctl=str(sysctl))
        (tmp_path / "zero").write_text("0\n")

        with pytest.raises(RuntimeUnavailableError, match="reach each other") as caught:
            await DockerRuntime(changed, image="x").open_network(labels)

        assert "br_netfilter" in caught.value.remedy
        assert networks(flavour, house) == []


async def test_ordinary_user(
    runtime: DockerRuntime, flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it takes root, an ordinary user is told so."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if not flavour.network_needs_root:
        await runtime.open_network(LABELS)
        await runtime.close_network(LABELS)
        return
    with pytest.raises(RuntimeUnavailableError) as caught:
        await runtime.open_network(LABELS)
    assert "as root" in caught.value.remedy


CLIENT = """#!/bin/sh
echo "$@" >> '{log}'
case "$1 $2" in
"network {command}") {act};;
"network ls") echo one; echo two;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    """Tell how the client was called so far."""
    log = tmp_path / "calls"
    log.touch()
    return lambda: log.read_text().splitlines()


@pytest.fixture
def client(
    tmp_path: Path, calls: Calls, flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> Client:
    """Put a client on the PATH that does something of its own for one command."""

    def make(command: str, act: str) -> DockerRuntime:
        path = tmp_path / "bin" / flavour.name
        path.parent.mkdir(exist_ok=True)
        path.write_text(CLIENT.format(log=tmp_path / "calls", command=command, act=act))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", os.fspath(path.parent))
        return DockerRuntime(attrs.evolve(flavour, network_per_run=True), image="x")

    return make


async def test_start_is_given_up(client: Client, calls: Calls, house: House) -> None:
    """A start that is cancelled leaves no network of its run."""
    runtime = client("create", "exec /bin/sleep 60")
    with trio.fail_after(30), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runtime.start, opened(house.spec("")))
            while not calls():  # noqa: ASYNC110 - another process makes them
                await trio.sleep(0.01)
            scope.cancel()

    (created, removed) = calls()
    assert created.startswith("network create")
    assert removed == f"network rm {created.split()[-1]}"


async def test_no_network_for_a_run(client: Client, calls: Calls, house: House) -> None:
    """A run whose network cannot be had is not started; the error says why."""
    runtime = client("create", "echo Error: no more subnets >&2; exit 125")

    with pytest.raises(NotStartedError, match="no more subnets") as caught:
        await runtime.start(opened(house.spec("")))

    assert "network prune" in caught.value.problem
    assert "run" not in [line.split()[0] for line in calls()]


async def test_networks_cannot_be_listed(client: Client) -> None:
    """Who cannot tell what networks there are says so."""
    runtime = client("ls", "echo Error: broken >&2; exit 1")

    with pytest.raises(RuntimeUnavailableError, match="broken"):
        await runtime.close_network(LABELS)


async def test_network_that_is_still_used(client: Client, calls: Calls) -> None:
    """One that cannot be removed is an error, after the others were removed."""
    runtime = client("rm", '[ $3 = two ] || { echo "in use" >&2; exit 2; }')

    with pytest.raises(RuntimeUnavailableError, match="in use"):
        await runtime.close_network(LABELS)

    assert calls()[1:] == ["network rm one", "network rm two"]


async def test_client_is_gone(client: Client) -> None:
    """Without a client nothing is removed, and that is told."""
    runtime = client("ls", 'echo one; /bin/rm "$0"')

    with pytest.raises(RuntimeUnavailableError, match="cannot run"):
        await runtime.close_network(LABELS)
