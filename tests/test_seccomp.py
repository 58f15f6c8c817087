"""The filter, run by a BPF interpreter: every rule, on both architectures."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

import pytest

from clawtrio._seccomp import _DENIED, seccomp_filter

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COLUMN = {"x86_64": 0, "aarch64": 1}

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
EPERM = 0x00050000 | errno.EPERM
ENOSYS = 0x00050000 | errno.ENOSYS
EAFNOSUPPORT = 0x00050000 | errno.EAFNOSUPPORT
EPROTONOSUPPORT = 0x00050000 | errno.EPROTONOSUPPORT

# Number on x86_64, on aarch64.
READ = (0, 63)
OPENAT = (257, 56)
EXECVE = (59, 221)
PRLIMIT64 = (302, 261)
NAME_TO_HANDLE_AT = (303, 264)
CLONE = (56, 220)
CLONE3 = (435, 435)
IOCTL = (16, 29)
SOCKET = (41, 198)
SOCKETPAIR = (53, 199)

every_machine = pytest.mark.parametrize("machine", ARCHITECTURES)


def run_filter(
    program: bytes, *, architecture: int, number: int, arguments: Sequence[int] = ()
) -> int:
    """Interpret *program* as the kernel would; any other instruction is an error."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<iIQ6Q", number, architecture, 0x1234, *words)
    steps = list(struct.iter_unpack("<HBBI", program))
    accumulator = counter = 0
    while True:
        code, if_true, if_false, operand = steps[counter]
        counter += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, operand)
            case 0x15:
                counter += if_true if accumulator == operand else if_false
            case 0x25:
                counter += if_true if accumulator > operand else if_false
            case 0x45:
                counter += if_true if accumulator & operand else if_false
            case 0x06:
                return int(operand)
            case _:
                pytest.fail(f"instruction {code:#x}")


def verdict(machine: str, call: Sequence[int | None], *arguments: int) -> int:
    number = call[COLUMN[machine]]
    assert number is not None
    return run_filter(
        seccomp_filter(machine),
        architecture=ARCHITECTURES[machine],
        number=number,
        arguments=arguments,
    )


@every_machine
def test_jumps_stay_inside(machine: str) -> None:
    """The kernel would accept it: short, with jumps inside, and a return at the end."""
    steps = list(struct.iter_unpack("<HBBI", seccomp_filter(machine)))

    assert len(steps) < 256
    assert steps[-1][0] == 0x06
    for place, (code, if_true, if_false, _) in enumerate(steps):
        if code & 0x07 == 0x05:
            assert place + 1 + max(if_true, if_false) < len(steps)


@every_machine
@pytest.mark.parametrize(
    "call", [READ, OPENAT, EXECVE, PRLIMIT64, NAME_TO_HANDLE_AT], ids=str
)
def test_ordinary_calls_are_allowed(machine: str, call: tuple[int, int]) -> None:
    """What every program needs works."""
    assert verdict(machine, call) == ALLOW


@every_machine
def test_denied_calls(machine: str) -> None:
    """Each row of the table answers EPERM, and no number stands there twice."""
    calls = [row for row in _DENIED.values() if row[COLUMN[machine]] is not None]

    assert {verdict(machine, call, 1, 2, 3) for call in calls} == {EPERM}
    assert len({call[COLUMN[machine]] for call in calls}) == len(calls)


@every_machine
def test_only_the_denied_are(machine: str) -> None:
    """With harmless arguments, all numbers but those of the rules are allowed."""
    column = COLUMN[machine]
    denied = {row[column] for row in _DENIED.values()}
    special = {CLONE3[column], SOCKET[column], SOCKETPAIR[column]}

    for number in range(463):
        if number not in denied | special:
            assert verdict(machine, (number, number)) == ALLOW


@every_machine
@pytest.mark.parametrize("number", [463, 467, 512, 521, 547, 0x40000000, 0x40000065])
def test_unknown_calls_do_not_exist(machine: str, number: int) -> None:
    """What is newer than the tables, and all of x32, answers as an old kernel would."""
    assert verdict(machine, (number, number)) == ENOSYS


@every_machine
@pytest.mark.parametrize("architecture", [0x40000003, 0x40000028, 0xC000003E ^ 1])
def test_other_architectures_are_killed(machine: str, architecture: int) -> None:
    """A 32-bit call, whose numbers mean other things, ends the process."""
    result = run_filter(
        seccomp_filter(machine), architecture=architecture, number=READ[0]
    )

    assert result == KILL_PROCESS


@every_machine
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (0x11, ALLOW),  # fork: SIGCHLD
        (0x3D0F00, ALLOW),  # a thread
        (0x4111, ALLOW),  # vfork
        *((flag | 0x11, EPERM) for flag in (0x20000, 0x2000000, 0x4000000)),
        *((1 << bit | 0x11, EPERM) for bit in (27, 28, 29, 30)),
        (0x7E020011, EPERM),
        (1 << 32 | 0x11, ALLOW),  # the kernel does not look there
    ],
)
def test_clone_makes_no_namespaces(machine: str, flags: int, expected: int) -> None:
    """Processes and threads, but no namespaces."""
    assert verdict(machine, CLONE, flags) == expected


@every_machine
def test_clone3_does_not_exist(machine: str) -> None:
    """Its flags cannot be seen from here, so programs must use clone."""
    assert verdict(machine, CLONE3, 0, 88) == ENOSYS


@every_machine
@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (0x5412, EPERM),
        (0x541C, EPERM),
        (0xFFFFFFFF00005412, EPERM),  # CVE-2019-10063: compare 32 bits
        (0x5401, ALLOW),
        (0x5413, ALLOW),
    ],
)
def test_terminals_are_not_typed_into(
    machine: str, request_: int, expected: int
) -> None:
    """TIOCSTI and TIOCLINUX are refused, whatever is in the upper half."""
    assert verdict(machine, IOCTL, 0x5412, request_) == expected


@every_machine
@pytest.mark.parametrize("call", [SOCKET, SOCKETPAIR])
@pytest.mark.parametrize(
    ("family", "protocol", "expected"),
    [
        (1, 0, ALLOW),
        (1, 99, ALLOW),
        (2, 0, ALLOW),
        (2, 1, ALLOW),
        (2, 6, ALLOW),
        (2, 17, ALLOW),
        (2, 132, EPROTONOSUPPORT),  # SCTP
        (2, 262, EPROTONOSUPPORT),  # MPTCP, which Go tries first
        (10, 6, ALLOW),
        (10, 58, ALLOW),
        (10, 33, EPROTONOSUPPORT),  # DCCP
        (16, 0, ALLOW),
        (16, 12, EPROTONOSUPPORT),  # netfilter
        (0, 0, EAFNOSUPPORT),
        (17, 3, EAFNOSUPPORT),  # AF_PACKET
        (38, 0, EAFNOSUPPORT),  # AF_ALG
        (40, 0, EAFNOSUPPORT),  # AF_VSOCK
        (1 << 32 | 40, 0, EAFNOSUPPORT),
        (1 << 32 | 1, 0, ALLOW),
    ],
)
def test_socket_families(
    machine: str, call: tuple[int, int], family: int, protocol: int, expected: int
) -> None:
    """Unix, internet and route sockets only."""
    assert verdict(machine, call, family, 1, protocol) == expected


def test_unknown_machines_have_no_filter() -> None:
    """Rather none than one whose numbers mean something else."""
    with pytest.raises(KeyError):
        seccomp_filter("riscv64")
