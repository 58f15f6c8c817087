"""The seccomp filter of a bwrap sandbox: a table of system calls in, BPF out.

What is denied is the kernel that an agent can do without: what reaches into other
namespaces, other processes or the host's terminal and keyrings, and what has time and
again been the way out of a sandbox. Everything else stays allowed, for an agent runs
compilers, browsers and test suites.

The numbers are those of ``arch/x86/entry/syscalls/syscall_64.tbl`` and, for aarch64,
``scripts/syscall.tbl`` of Linux 6.12, checked against Debian's ``linux-libc-dev`` 6.1.
From 424 on they are the same everywhere. Calls newer than the tables answer ENOSYS, as
an older kernel would, so a kernel update opens nothing that was not looked at; the same
comparison covers the x32 calls (512 to 547, or bit 30 set).

How to change it: add a row to :data:`_DENIED`; raise :data:`_NEWEST` only after reading
what the new calls do. ``tests/test_seccomp.py`` runs every rule for both architectures.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from typing import Final

import attrs

# linux/seccomp.h
_KILL_PROCESS: Final = 0x80000000
_ERRNO: Final = 0x00050000
_ALLOW: Final = 0x7FFF0000

# Offsets into struct seccomp_data; both architectures are little-endian, so an
# argument's low 32 bits come first.
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_ARGUMENTS: Final = 16

# linux/bpf_common.h: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_{JEQ,JGT,JSET}|BPF_K, BPF_RET.
_LOAD: Final = 0x20
_JUMP_EQUAL: Final = 0x15
_JUMP_GREATER: Final = 0x25
_JUMP_SET: Final = 0x45
_RETURN: Final = 0x06


@attrs.frozen
class _Machine:
    """One architecture: its ``AUDIT_ARCH_*``, and its column of the tables."""

    audit: int
    column: int


_MACHINES: Final = {
    "x86_64": _Machine(audit=0xC000003E, column=0),
    "aarch64": _Machine(audit=0xC00000B7, column=1),
}

#: The highest call that was looked at: mseal, Linux 6.10.
_NEWEST: Final = 462

_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_IOCTL: Final = (16, 29)
_SOCKET: Final = (41, 198)
_SOCKETPAIR: Final = (53, 199)

#: Denied with EPERM whatever the arguments: number on x86_64, on aarch64 (None: none).
_DENIED: Final[dict[str, tuple[int, int | None]]] = {
    # Keyrings are not namespaced: the host user's session keyring would be readable.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Namespaces, and with them capabilities over parts of the kernel.
    "unshare": (272, 97),
    "setns": (308, 268),
    # Mounts.
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # Other processes. In a user's sandbox bwrap's reaper has the agent's uid: an agent
    # that could write to it would take away its parent-death signal, and the sandbox
    # would outlive the host (ptrace attached to it in a trial). So there is no strace
    # or gdb in there. /proc is read-only to keep out the same through /proc/1/mem.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    # Large and often broken.
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # A file by its handle, past every mount. Without the capability it fails already;
    # name_to_handle_at tells little more than stat, and stays.
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # The administrator's. No capability is left for these; it costs nothing to say so.
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "modify_ldt": (154, None),
    "adjtimex": (159, 171),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "lookup_dcookie": (212, 18),
    "clock_settime": (227, 112),
    "kexec_load": (246, 104),
    "clock_adjtime": (305, 266),
    "finit_module": (313, 273),
    "kexec_file_load": (320, 294),
    "quotactl_fd": (443, 443),
}

#: ``clone`` flags that make a namespace (CLONE_NEWTIME does not fit into them).
_NAMESPACES: Final = (
    0x00020000  # CLONE_NEWNS
    | 0x02000000  # CLONE_NEWCGROUP
    | 0x04000000  # CLONE_NEWUTS
    | 0x08000000  # CLONE_NEWIPC
    | 0x10000000  # CLONE_NEWUSER
    | 0x20000000  # CLONE_NEWPID
    | 0x40000000  # CLONE_NEWNET
)

#: Both put text into a terminal as if it had been typed.
_TYPING: Final = (
    0x5412,  # TIOCSTI
    0x541C,  # TIOCLINUX
)

#: The socket families that work, each with the protocols that do; None is all. Asking
#: for others makes the kernel load modules that nobody on the host ever needed.
_FAMILIES: Final[dict[int, tuple[int, ...] | None]] = {
    1: None,  # AF_UNIX
    2: (0, socket.IPPROTO_ICMP, socket.IPPROTO_TCP, socket.IPPROTO_UDP),  # AF_INET
    10: (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP, 58),  # AF_INET6; 58 is ICMPv6
    16: (0,),  # AF_NETLINK: NETLINK_ROUTE, which getifaddrs() asks
}

_Instruction = tuple[int, int, int, int]


def seccomp_filter(machine: str) -> bytes:
    """Assemble the filter for ``bwrap --seccomp``: an array of ``struct sock_filter``.

    Args:
        machine: What :func:`platform.machine` says.

    Raises:
        KeyError: If there is no filter for such a machine.
    """
    audit, column = attrs.astuple(_MACHINES[machine])
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        # A 32-bit call has other numbers; nothing in the sandbox is meant to make one.
        *_unless_equal([audit], [_give(_KILL_PROCESS)]),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER, 0, 1, _NEWEST),
        _fail(errno.ENOSYS),
        # Its flags are behind a pointer. glibc then falls back on clone.
        *_on(_CLONE3[column], [_fail(errno.ENOSYS)]),
        *_on(
            _CLONE[column],
            [
                _load_argument(0),
                (_JUMP_SET, 0, 1, _NAMESPACES),
                _fail(errno.EPERM),
                _give(_ALLOW),
            ],
        ),
        *_on(
            _IOCTL[column],
            [
                # The kernel looks at no more than these 32 bits either.
                _load_argument(1),
                *(step for request in _TYPING for step in _deny_if_equal(request)),
                _give(_ALLOW),
            ],
        ),
        *_on(_SOCKET[column], _socket_rules()),
        *_on(_SOCKETPAIR[column], _socket_rules()),
    ]
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            program += _deny_if_equal(number)
    program.append(_give(_ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _give(action: int) -> _Instruction:
    return (_RETURN, 0, 0, action)


def _fail(code: int) -> _Instruction:
    return _give(_ERRNO | code)


def _load_argument(index: int) -> _Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)


def _on(value: int, steps: list[_Instruction]) -> list[_Instruction]:
    """Do *steps*, which must not fall through, if what was loaded equals *value*."""
    # Blocks are short, so that no jump comes near the 255 that fit into one.
    return [(_JUMP_EQUAL, 0, len(steps), value), *steps]


def _unless_equal(
    values: Iterable[int], steps: list[_Instruction]
) -> list[_Instruction]:
    """Do *steps* if what was loaded is none of *values*."""
    block = list(steps)
    for value in values:
        block.insert(0, (_JUMP_EQUAL, len(block), 0, value))
    return block


def _deny_if_equal(value: int) -> list[_Instruction]:
    return _on(value, [_fail(errno.EPERM)])


def _socket_rules() -> list[_Instruction]:
    rules = [_load_argument(0)]
    for family, protocols in _FAMILIES.items():
        verdict = [_give(_ALLOW)]
        if protocols is not None:
            refuse = [_fail(errno.EPROTONOSUPPORT)]
            verdict = [_load_argument(2), *_unless_equal(protocols, refuse), *verdict]
        rules += _on(family, verdict)
    return [*rules, _fail(errno.EAFNOSUPPORT)]
