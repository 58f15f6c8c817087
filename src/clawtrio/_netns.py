"""Listening sockets that are not of the host's own network: a container's, a bridge's.

A socket stays in the network namespace that it was made in, whoever holds it. So a
helper joins the namespace of the container, opens the socket there and sends it back.
It has to be a process: the network of a sandbox that an ordinary user made belongs to
a user namespace, and no thread can join that. Here it is by descriptor all the way:
who calls has made sure whose descriptor it is.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Final

import trio

from ._errors import NotStartedError, RuntimeUnavailableError
from ._flavours import ask

#: It takes some 30 ms; this is for a host that is busy.
_TIMEOUT: Final = 5.0

_JOINED: Final = (
    "Run the bot as root, or with runtime bwrap or podman as the user who owns the"
    " containers, or set CLAWTRIO_NETWORK to open."
)
_BOUND: Final = (
    "Run the bot as root on the host of the engine, or leave CLAWTRIO_NETWORK at proxy."
)

#: os.setns() is of Python 3.12. 0xb701 is NS_GET_USERNS: whose the network is.
_HELPER: Final = """
import ctypes, fcntl, os, socket, sys
channel, network, port = map(int, sys.argv[1:])
setns = ctypes.CDLL(None, use_errno=True).setns
def join(namespace):
    if setns(namespace, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
try:
    owner = fcntl.ioctl(network, 0xb701)
    if not os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):
        join(owner)
    join(network)
    listener = socket.socket()
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    socket.send_fds(socket.socket(fileno=channel), [b"."], [listener.fileno()])
except OSError as exc:
    sys.exit(str(exc))
"""


def open_network_of(process: int) -> int:
    """Open the network namespace of a process.

    Args:
        process: A descriptor of its directory in /proc.

    Raises:
        OSError: If the process is gone, may not be looked into, or has the host's
            own network, where nothing of a container's may listen.
    """
    network = os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    if os.path.samestat(os.fstat(network), Path("/proc/self/ns/net").stat()):
        os.close(network)
        raise OSError("its network is the host's own")
    return network


async def listen_inside(runtime: str, network: int, port: int) -> trio.SocketListener:
    """Open a port on the loopback of a network namespace. Bounded.

    Args:
        runtime: What the error calls the runtime.
        network: A descriptor of the namespace; it stays the caller's.
        port: On 127.0.0.1.

    Raises:
        RuntimeUnavailableError: If that cannot be done, or not soon.
    """
    problem = f"its helper did not end within {_TIMEOUT:g} s"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = theirs.fileno()
        argv = [sys.executable, "-I", "-S", "-c", _HELPER]
        argv += map(str, (channel, network, port))
        try:
            with trio.move_on_after(_TIMEOUT):
                answer = await ask(argv, environment={}, pass_fds=(channel, network))
                if not answer.code:
                    # It has left, so what it sent is there. No checkpoint from here on.
                    return _received(ours)
                problem = answer.message
        except NotStartedError as exc:
            problem = str(exc)
    raise cannot_listen(runtime, port, problem)


def cannot_listen(runtime: str, port: int, problem: object) -> RuntimeUnavailableError:
    """Make the error that says so."""
    problem = f"cannot listen on port {port} inside its container: {problem}"
    return RuntimeUnavailableError(runtime, problem, _JOINED)


def listen_on_device(address: str, device: str) -> trio.SocketListener:
    """Open a port of the kernel's choice that only what comes in by *device* reaches.

    Args:
        address: An address of this host.
        device: A network device.

    Raises:
        RuntimeUnavailableError: If that cannot be done.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        listener.bind((address, 0))
        listener.listen(128)
    except OSError as exc:
        listener.close()
        problem = f"cannot listen on {device} at {address}: {exc.strerror}"
        raise RuntimeUnavailableError("network", problem, _BOUND) from exc
    return _wrapped(listener)


def _received(channel: socket.socket) -> trio.SocketListener:
    # Not socket.recv_fds(): Python 3.11's does not pass the flags on.
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    _, ((_, _, data), *_), _, _ = channel.recvmsg(1, socket.CMSG_LEN(4), flags)
    return _wrapped(socket.socket(fileno=int.from_bytes(data, sys.byteorder)))


def _wrapped(listener: socket.socket) -> trio.SocketListener:
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))
