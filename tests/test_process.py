"""Client processes, real ones."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from clawtrio import NotStartedError
from clawtrio._process import (
    CLIENT_ENVIRONMENT,
    ClientProcess,
    client_environment,
    in_thread,
    spawn,
)

from .helpers import open_descriptors

PYTHON = sys.executable
ENVIRONMENT = {"PATH": os.environ["PATH"]}


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Count descriptors: none may be left, whatever happened."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@asynccontextmanager
async def running(*argv: str, **environment: str) -> AsyncIterator[ClientProcess]:
    """Run a process for as long as the block takes, but never for long."""
    with trio.fail_after(30):
        process = await spawn(argv, environment=ENVIRONMENT | environment)
        try:
            yield process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                await process.aclose()


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    """Read to the end."""
    return b"".join([bytes(chunk) async for chunk in stream])


async def output_of(*argv: str, **environment: str) -> bytes:
    """Return what a program writes to stdout."""
    async with running(*argv, **environment) as process:
        return await everything(process.stdout)


# -- pipes -----------------------------------------------------------------------------


async def test_three_pipes() -> None:
    """What is written to stdin comes in, and both outputs come out apart."""
    async with running("sh", "-c", "cat; echo complaint >&2") as process:
        await process.stdin.send_all(b"words")
        await process.stdin.aclose()
        assert await everything(process.stdout) == b"words"
        assert await everything(process.stderr) == b"complaint\n"
        assert await process.wait() == 0


async def test_a_process_has_nothing_open_but_its_pipes() -> None:
    """No descriptor of ours is inherited, not even another process's pipe."""
    ours = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(ours, True)  # noqa: FBT003
    async with running("sleep", "30"):
        code = "import os; print(os.listdir('/proc/self/fd'))"
        listed = await output_of(PYTHON, "-c", code)
    os.close(ours)

    # The fourth is the listing's own.
    assert listed == b"['0', '1', '2', '3']\n"


async def test_a_pipe_ends_when_the_process_does() -> None:
    """Our side keeps no end of a child's pipe open."""
    async with running("true") as process:
        assert await everything(process.stdout) == b""
        assert await everything(process.stderr) == b""
        assert await process.wait() == 0
        with pytest.raises(trio.BrokenResourceError):
            await process.stdin.send_all(b"x")


async def test_descriptors_can_be_passed_on() -> None:
    """A descriptor that is asked for is inherited, under its number."""
    reader, writer = os.pipe()
    argv = [PYTHON, "-c", f"import os; os.write({writer}, b'passed')"]
    try:
        process = await spawn(argv, environment=ENVIRONMENT, pass_fds=[writer])
        assert await process.wait() == 0
        await process.aclose()
        assert os.read(reader, 100) == b"passed"
    finally:
        os.close(reader)
        os.close(writer)


# -- the end ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 125, 255])
async def test_an_exit_code(code: int) -> None:
    """A process's code is what it left with."""
    async with running("sh", "-c", f"exit {code}") as process:
        assert await process.wait() == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
async def test_a_signal_is_128_and_its_number(number: signal.Signals) -> None:
    """A process that a signal ended has the code that a shell would give it."""
    async with running("sleep", "30") as process:
        os.kill(process.pid, number)
        assert await process.wait() == 128 + number


async def test_kill() -> None:
    """Killing works on a process that ignores what can be ignored."""
    async with running("sh", "-c", "trap '' TERM; echo up; sleep 30") as process:
        assert await process.stdout.receive_some() == b"up\n"
        os.kill(process.pid, signal.SIGTERM)
        process.kill()
        assert await process.wait() == 137


async def test_killing_what_is_gone_is_nothing() -> None:
    """Once it was waited for, a process's number may be another one's."""
    async with running("true") as process:
        assert await process.wait() == 0
        process.kill()
        assert await process.wait() == 0


async def test_killing_a_zombie_leaves_its_code() -> None:
    """A process that left by itself before it was killed has left by itself."""
    async with running("sh", "-c", "exit 3") as process:
        assert await everything(process.stdout) == b""
        await trio.to_thread.run_sync(
            os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT
        )
        process.kill()
        assert await process.wait() == 3


async def test_several_may_wait() -> None:
    """Everybody who waits gets the code, also later, also after a cancelled wait."""
    codes = []

    async def wait(process: ClientProcess) -> None:
        codes.append(await process.wait())

    async with running("sh", "-c", "read x; exit 7") as process:
        with trio.move_on_after(0.1) as scope:
            await process.wait()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, process)
            nursery.start_soon(wait, process)
            await process.stdin.aclose()
        await wait(process)

    assert codes == [7, 7, 7]


@pytest.mark.parametrize("error", [AttributeError, PermissionError])
async def test_without_pidfd_a_thread_waits(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Where there are no pidfds, or none to be had, waiting works all the same."""

    def refuse(pid: int) -> int:
        raise error

    monkeypatch.setattr(os, "pidfd_open", refuse)

    async with running("sh", "-c", "read x; exit 7") as process:
        with trio.move_on_after(0.1) as scope:
            await process.wait()
        assert scope.cancelled_caught
        await process.stdin.aclose()
        assert await process.wait() == 7
    async with running("sleep", "30") as process:
        process.kill()
        assert await process.wait() == 137


# -- the start -------------------------------------------------------------------------


async def test_the_environment_is_exactly_what_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No variable of the host gets in by itself."""
    monkeypatch.setenv("CANARY", "secret")
    process = await spawn(
        ["/usr/bin/env"], environment={"A": "b", "C": "d=\u00e9\udcff\n"}
    )
    printed = await everything(process.stdout)
    await process.wait()
    await process.aclose()

    assert printed == b"A=b\nC=d=\xc3\xa9\xff\n\n"


async def test_a_process_is_in_the_root_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever the bot is, its clients are in /: no mount point is held, nor meant."""
    monkeypatch.chdir(tmp_path)

    assert await output_of("pwd") == b"/\n"


async def test_a_program_is_looked_for_on_the_path_that_was_given(
    tmp_path: Path,
) -> None:
    """PATH in the environment of the process is the one that counts."""
    (tmp_path / "own-program").write_text("#!/bin/sh\necho found\n")
    (tmp_path / "own-program").chmod(0o755)

    assert await output_of("own-program", PATH=f"{tmp_path}:/bin") == b"found\n"


@pytest.mark.parametrize("own", [True, False])
async def test_a_terminal_s_ctrl_c_does_not_reach_it(*, own: bool) -> None:
    """By default a process is in a session of its own."""
    process = await spawn(
        ["sleep", "30"], environment=ENVIRONMENT, start_new_session=own
    )
    session = os.getsid(process.pid)
    process.kill()
    await process.wait()
    await process.aclose()

    assert session == (process.pid if own else os.getsid(0))


@pytest.mark.parametrize(
    "program", ["/no/such/program", "no-such-program", "/etc/passwd"]
)
async def test_a_program_that_cannot_be_run(program: str) -> None:
    """What cannot be run is a NotStartedError that names it, and leaks nothing."""
    before = open_descriptors()

    with pytest.raises(NotStartedError, match=program):
        await spawn([program], environment=ENVIRONMENT)

    assert open_descriptors() == before


async def test_a_start_without_descriptors() -> None:
    """Out of descriptors there is no process, and none of the few is lost."""
    before = open_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = os.dup(0)
    os.close(highest)
    for more in range(8):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, limits[1]))
        try:
            with pytest.raises(NotStartedError):
                await spawn(["/no/such/program"], environment=ENVIRONMENT)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert open_descriptors() == before


async def test_a_start_that_python_refuses_leaks_nothing() -> None:
    """An argument that no process can have is an error, and costs no descriptor."""
    before = open_descriptors()

    with pytest.raises(ValueError, match="null"):
        await spawn(["true", "a\0b"], environment=ENVIRONMENT)

    assert open_descriptors() == before


async def test_many_processes_leave_no_descriptor() -> None:
    """Each process gives back what it had."""
    before = open_descriptors()
    for _ in range(10):
        async with running("true") as process:
            await process.wait()

    assert open_descriptors() == before


async def test_a_start_is_not_cancelled_half_way() -> None:
    """Who is cancelled while a process starts gets it, to end it in order."""
    with trio.CancelScope() as scope:
        scope.cancel()
        process = await spawn(["sleep", "30"], environment=ENVIRONMENT)
        process.kill()
        with trio.CancelScope(shield=True):
            code = await process.wait()
            await process.aclose()

    assert code == 137


# -- the thread ------------------------------------------------------------------------


def _spawners() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "clawtrio spawn"]


async def test_one_thread_spawns_and_never_expires() -> None:
    """Every process is the child of one thread, which lives as long as we do."""
    async with running("sleep", "30") as one, running("sleep", "30") as other:
        (thread,) = _spawners()
        children = await trio.Path(
            f"/proc/self/task/{thread.native_id}/children"
        ).read_text()

    assert {str(one.pid), str(other.pid)} <= set(children.split())
    assert thread.daemon
    assert _spawners() == [thread]


@pytest.mark.slow
async def test_a_parent_death_signal_does_not_come_while_we_live() -> None:
    """A process that dies with its parent outlives Trio's idle worker threads."""
    code = (
        "import ctypes, signal, sys\n"
        "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
        "print('armed', flush=True)\n"
        "sys.stdin.read()\n"
        "print('alive')\n"
    )
    async with running(PYTHON, "-c", code) as process:
        assert await process.stdout.receive_some() == b"armed\n"
        # Longer than the 10 s after which an idle worker thread expires.
        await trio.sleep(11)
        await process.stdin.aclose()
        assert await everything(process.stdout) == b"alive\n"


def test_the_thread_serves_one_event_loop_after_another() -> None:
    """A second trio.run() in the same process can spawn, too."""
    for _ in range(2):
        assert trio.run(output_of, "echo", "hi") == b"hi\n"


async def test_a_thread_is_to_be_had_when_the_application_has_none_left() -> None:
    """Threads of ours do not wait for those of a bot, which may wait for a run."""
    limiter = trio.to_thread.current_default_thread_limiter()
    for _ in range(int(limiter.total_tokens)):
        limiter.acquire_on_behalf_of_nowait(object())
    with pytest.raises(trio.WouldBlock):
        limiter.acquire_nowait()

    with trio.fail_after(10):
        name = await in_thread(lambda: threading.current_thread().name)

    assert name != threading.current_thread().name


def test_a_forked_child_can_spawn() -> None:
    """A bot that forks after its first run has a thread that spawns in the child."""
    code = (
        "import os, signal, trio\n"
        "from clawtrio._process import spawn\n"
        "async def run():\n"
        "    argv = ['sh', '-c', 'exit 7']\n"
        "    process = await spawn(argv, environment=dict(os.environ))\n"
        "    code = await process.wait()\n"
        "    await process.aclose()\n"
        "    return code\n"
        "assert trio.run(run) == 7\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        # A child that hangs ends, too.
        "    signal.alarm(20)\n"
        "    os._exit(trio.run(run))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    argv = [PYTHON, "-c", code]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=40)

    assert done.stdout == b"7\n"


# -- the environment of clients --------------------------------------------------------


def test_a_client_knows_where_things_are_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the host's environment only listed names are passed on."""
    monkeypatch.setenv("DOCKER_HOST", "ssh://host")
    monkeypatch.setenv("PATH", "/bin")
    for name in (
        "ANTHROPIC_API_KEY",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "HTTPS_PROXY",
        "LD_PRELOAD",
        "CANARY",
    ):
        monkeypatch.setenv(name, "secret")

    environment = client_environment()

    assert environment["DOCKER_HOST"] == "ssh://host"
    assert environment["PATH"] == "/bin"
    assert "secret" not in environment.values()
    assert environment.keys() <= CLIENT_ENVIRONMENT


def test_no_listed_name_is_that_of_a_secret() -> None:
    """The list names no variable that holds a credential."""
    words = ("KEY", "TOKEN", "SECRET", "PASS", "AUTH", "CREDENTIAL")

    assert [n for n in CLIENT_ENVIRONMENT if any(w in n for w in words)] == []
