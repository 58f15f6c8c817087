"""What a sandbox reaches: nothing but what the host opens inside it."""

from __future__ import annotations

import os
import socket

import attrs
import pytest
import trio

from clawtrio._bwrap_container import BwrapContainer
from clawtrio._errors import NotStartedError, RuntimeUnavailableError
from clawtrio._runtimes import LABEL_ENGINE, LABEL_ROOT
from tests.helpers import open_descriptors, own_addresses

from .conftest import UID, Sandbox, read_line

pytestmark = pytest.mark.bwrap

LABELS = {LABEL_ROOT: "r", LABEL_ENGINE: "e"}

WAIT = """
    import sys
    print("ready", flush=True)
    sys.stdin.read()
"""


async def test_no_network_at_all(sandbox: Sandbox) -> None:
    """There is lo and no route; the loopback is not the host's."""
    agent = """
        import json, os, socket
        def devices(path, column, skip):
            return {line.split()[column] for line in list(open(path))[skip:]}
        found = devices("/proc/net/route", 0, 1)
        found |= devices("/proc/net/ipv6_route", -1, 0)
        tried = {}
        for host in os.environ["HOSTS"].split():
            try:
                socket.create_connection((host, os.environ["PORT"]), timeout=1).close()
                tried[host] = "reached"
            except OSError:
                tried[host] = "no"
        print(json.dumps([[n for _, n in socket.if_nameindex()], sorted(found), tried]))
    """
    server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with server:
        hosts = own_addresses()
        assert {"127.0.0.1", "::1"} <= set(hosts)
        environment = {"PORT": str(server.getsockname()[1]), "HOSTS": " ".join(hosts)}
        spec = sandbox.spec(agent, environment=environment)
        names, routes, tried = (await sandbox.run(spec)).answer

    assert names == ["lo"]
    assert set(routes) <= {"lo"}
    assert tried == dict.fromkeys(hosts, "no")


async def test_listens_inside(sandbox: Sandbox) -> None:
    """An agent talks to the host through a port of its own loopback."""
    agent = """
        import socket, sys
        sys.stdin.read()
        with socket.create_connection(("127.0.0.1", 4000), timeout=10) as peer:
            peer.sendall(b"question")
            print(peer.recv(16).decode())
    """

    async def serve(stream: trio.SocketStream) -> None:
        assert await stream.receive_some() == b"question"
        await stream.send_all(b"answer")
        await stream.aclose()

    with trio.fail_after(30):
        async with (
            sandbox.start(sandbox.spec(agent)) as container,
            trio.open_nursery() as nursery,
        ):
            before = open_descriptors()
            listener = await container.listen(4000)
            assert open_descriptors() == before + 1
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            await container.stdin.aclose()
            result = await sandbox.finish(container)
            nursery.cancel_scope.cancel()

    assert result.stdout == "answer\n", result.stderr


async def test_listens_in_nothing_else(sandbox: Sandbox) -> None:
    """Where the sandbox is gone, or its number is another's, no port is opened."""
    with trio.fail_after(30):
        async with sandbox.start(sandbox.spec(WAIT)) as container:
            assert isinstance(container, BwrapContainer)
            assert await read_line(container) == "ready"
            before = open_descriptors()
            pid, container._reaper_pid = container._reaper_pid, os.getpid()
            with pytest.raises(RuntimeUnavailableError, match="host's own"):
                await container.listen(4000)
            container._reaper_pid = pid
            await container.kill()
            await container.wait()
            with pytest.raises(RuntimeUnavailableError, match="port 4000"):
                await container.listen(4000)
            assert open_descriptors() == before
        with pytest.raises(RuntimeUnavailableError, match="does not run"):
            await container.listen(4000)


async def test_number_is_used_again(sandbox: Sandbox) -> None:
    """A process that has got the number of a sandbox that is gone is not joined."""
    process = await trio.lowlevel.open_process(["true"])
    gone = os.pidfd_open(process.pid)
    await process.wait()
    with trio.fail_after(30):
        async with sandbox.start(sandbox.spec(WAIT)) as container:
            assert isinstance(container, BwrapContainer)
            reaper, container._reaper = container._reaper, gone
            with pytest.raises(RuntimeUnavailableError, match="No such process"):
                await container.listen(4000)
            container._reaper = reaper
    os.close(gone)


async def test_socket_of_the_host(sandbox: Sandbox) -> None:
    """A socket in a read-only mount can be connected to; /run cannot be written to."""
    place = sandbox.directory("run")
    agent = """
        import json, os, socket
        answer = []
        for path in "/run/x", "/run/clawtrio/x":
            try:
                open(path, "w").close()
            except OSError as exc:
                answer.append(exc.strerror)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect("/run/clawtrio/proxy")
            answer += [os.getuid(), peer.recv(16).decode()]
        print(json.dumps(answer))
    """
    listener = trio.socket.socket(socket.AF_UNIX)
    with listener:
        await listener.bind(os.fspath(place / "proxy"))
        (place / "proxy").chmod(0o666)
        listener.listen()
        mount = sandbox.hold(place, "/run/clawtrio", readonly=True)

        async def serve() -> None:
            stream, _ = await listener.accept()
            with stream:
                await stream.send(b"host")

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                answer = (await sandbox.run(sandbox.spec(agent, mounts=[mount]))).answer

    assert answer == ["Read-only file system"] * 2 + [UID, "host"]


async def test_no_open_network(sandbox: Sandbox) -> None:
    """It would be the host's own: neither the runtime nor a start gives it."""
    runtime = sandbox.runtime
    for method in (runtime.open_network, runtime.gateway):
        with pytest.raises(RuntimeUnavailableError) as caught:
            await method(LABELS)
        assert "docker or podman" in caught.value.remedy
    await runtime.close_network(LABELS)

    with pytest.raises(NotStartedError, match="host's own network"):
        await runtime.start(attrs.evolve(sandbox.spec(WAIT), network="open"))
