"""A run's way to the API: a ticket for the proxy, a socket, and what the agent is told.

A container has no network. It has a directory with a Unix socket in it, on which the
proxy serves this one run; our agent runner gives the agent a loopback port for that. An
image without our runner knows only a URL: the port is opened inside its network, once
it has one, or on the host's address in an open network.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
import trio

from ._credentials import Credential
from ._groups import Places
from ._models import VolumeMount
from ._netns import listen_on_device
from ._proxy_tickets import Ticket
from ._runtimes import RUN_CLAWTRIO, HeldMount

log = logging.getLogger(__name__)

#: The port of the proxy in a container; NanoClaw's.
PORT: Final = 3001
_URL: Final = f"http://127.0.0.1:{PORT}"
#: What a container of Docker Desktop calls the machine outside.
_OUTSIDE: Final = "host.docker.internal"
_SOCKET: Final = "proxy.sock"
#: How many connections may wait: agents open several at once.
_BACKLOG: Final = 128

#: Where a program looks for its credential; without one, any will do.
_VARIABLES: Final = {
    "api-key": "ANTHROPIC_API_KEY",
    "oauth": "CLAUDE_CODE_OAUTH_TOKEN",
}


@attrs.frozen(kw_only=True)
class Access:
    """What a run has of the API.

    Attributes:
        ticket: Its right to use the proxy.
        environment: What its agent is told.
        hidden: Which of these variables no command line shows.
        listener: Where the proxy is to serve it; None if that is still to be opened.
        mount: What its container needs for that.
    """

    ticket: Ticket
    environment: Mapping[str, str]
    hidden: frozenset[str]
    listener: trio.SocketListener | None = None
    mount: HeldMount | None = None


def tell(ticket: Ticket, credential: Credential | None) -> Access:
    """Make what an agent is told, which finds the proxy on its own loopback."""
    variable = _VARIABLES[credential.scheme if credential else "api-key"]
    environment = {"ANTHROPIC_BASE_URL": _URL, variable: ticket.token}
    return Access(ticket=ticket, environment=environment, hidden=frozenset({variable}))


def open_socket(access: Access, places: Places, name: str, stack: ExitStack) -> Access:
    """Open a Unix socket for a run, in a directory of its own; for someone to close.

    Args:
        access: The run's.
        places: Where things are.
        name: What to call the directory.
        stack: Gives back the directory at the run's end.

    Raises:
        OSError: If it cannot be opened.
    """
    directory = places.sockets.subdirectory(name)
    stack.callback(_discard, places, name)
    with directory:
        fd = directory.hold()
        stack.callback(os.close, fd)
        status = os.fstat(fd)
        # Whoever is in the container may connect; out here, nobody gets this far.
        listener = listen_at(f"/proc/self/fd/{fd}/{_SOCKET}", mode=0o666)
        mount = VolumeMount(directory.path, RUN_CLAWTRIO, readonly=True)
    return attrs.evolve(
        access,
        environment={
            **access.environment,
            "CLAWTRIO_PROXY": f"{RUN_CLAWTRIO}/{_SOCKET}",
        },
        listener=listener,
        mount=HeldMount(mount, fd, status.st_dev, status.st_ino, relabel=True),
    )


def _discard(places: Places, name: str) -> None:
    """Throw a run's directory away; what cannot be moved now is for a sweep."""
    try:
        places.sockets.discard(name, places.trash)
    except OSError as exc:
        log.warning("cannot remove %s/%s: %s", places.sockets.path, name, exc.strerror)


def open_host(access: Access, host: str) -> Access:
    """Open a port for a run on an address of the host that the operator chose.

    It is for engines whose containers do not share our kernel, nor its sockets.

    Args:
        access: The run's.
        host: The address. In a container, this machine's loopback, and all of its
            addresses at once, go by the name that Docker Desktop has for it.

    Raises:
        OSError: If it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    address, port = opened.getsockname()[:2]
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(opened))
    ours = ipaddress.ip_address(address)
    name = f"[{host}]" if family == socket.AF_INET6 else host
    if ours.is_loopback or ours.is_unspecified:
        name = _OUTSIDE
    return _reached_at(access, f"http://{name}:{port}", listener)


def open_gateway(access: Access, address: str, device: str) -> Access:
    """Open a port for a run on the host's address in the open network; to be closed.

    Args:
        access: The run's.
        address: The host's.
        device: The network device that has it.

    Raises:
        RuntimeUnavailableError: If the address may not be listened on.
    """
    listener = listen_on_device(address, device)
    port = listener.socket.getsockname()[1]
    return _reached_at(access, f"http://{address}:{port}", listener)


def _reached_at(access: Access, url: str, listener: trio.SocketListener) -> Access:
    environment = {**access.environment, "ANTHROPIC_BASE_URL": url}
    return attrs.evolve(access, environment=environment, listener=listener)


def listen_at(address: str, *, mode: int) -> trio.SocketListener:
    """Listen on a path through a descriptor: its own may be too long for an address.

    Raises:
        OSError: If it cannot be listened on.
    """
    opened = socket.socket(socket.AF_UNIX)
    try:
        opened.bind(address)
        Path(address).chmod(mode)
        opened.listen(_BACKLOG)
        return trio.SocketListener(trio.socket.from_stdlib_socket(opened))
    except BaseException:
        opened.close()
        raise
