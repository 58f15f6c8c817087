"""Client processes: how they are spawned, waited for and killed.

Processes are not spawned by :func:`trio.lowlevel.open_process`, for one reason: a
parent-death signal (``bwrap --die-with-parent``) follows the *thread* that spawned,
and Trio's worker threads expire when they have been idle for 10 s. The thread here
lives as long as the host process.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Final, TypeVar

import outcome
import trio
from trio.lowlevel import FdStream

from ._errors import NotStartedError

T = TypeVar("T")

#: What a client may know of the host's environment: where things are, never a secret.
CLIENT_ENVIRONMENT: Final = frozenset(
    {
        "CONTAINERS_CONF",
        "CONTAINERS_STORAGE_CONF",
        "CONTAINER_HOST",
        "DBUS_SESSION_BUS_ADDRESS",
        "DOCKER_CERT_PATH",
        "DOCKER_CONFIG",
        "DOCKER_CONTEXT",
        "DOCKER_HOST",
        "DOCKER_TLS_VERIFY",
        "HOME",
        "LANG",
        "LOGNAME",
        "PATH",
        "TMPDIR",
        "USER",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "XDG_RUNTIME_DIR",
    }
)


# Trio's own limiter is the application's: one that has all its threads wait for runs
# must still see them end.
_limiter: Final = trio.CapacityLimiter(40)


async def in_thread(fn: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
    """Call *fn* in a worker thread, however many threads the application uses."""
    return await trio.to_thread.run_sync(
        fn, abandon_on_cancel=abandon_on_cancel, limiter=_limiter
    )


async def hold_in_thread(fn: Callable[[ExitStack], T], stack: ExitStack) -> T:
    """Call *fn* in a thread that cancellation leaves behind, as a hung mount may ask.

    Args:
        fn: Puts what it opens into the stack that it is given.
        stack: Gets all that; what is opened by a thread left behind is given back.
    """
    lock = threading.Lock()
    kept = ExitStack()
    abandoned = False

    def work() -> T:
        with ExitStack() as own:
            result = fn(own)
            with lock:
                if not abandoned:
                    kept.push(own.pop_all())
            return result

    try:
        result = await in_thread(work, abandon_on_cancel=True)
    except BaseException:
        with lock:
            abandoned = True
        kept.close()
        raise
    stack.push(kept.pop_all())
    return result


def client_environment() -> dict[str, str]:
    """Return the environment for a runtime's client."""
    return {
        name: value for name, value in os.environ.items() if name in CLIENT_ENVIRONMENT
    }


class ClientProcess:
    """A running process with pipes to its stdin, stdout and stderr.

    Attributes:
        stdin: Its standard input.
        stdout: Its standard output.
        stderr: Its standard error.
    """

    def __init__(
        self, popen: subprocess.Popen[bytes], stdin: int, stdout: int, stderr: int
    ) -> None:
        self._popen = popen
        self.stdin = FdStream(stdin)
        self.stdout = FdStream(stdout)
        self.stderr = FdStream(stderr)
        self._exit_fd = _open_pidfd(popen.pid)
        self._waiting = trio.Lock()

    @property
    def pid(self) -> int:
        """Its process id; it stays ours until :meth:`wait` has returned."""
        return self._popen.pid

    async def wait(self) -> int:
        """Wait until it has exited; then 0 to 255, 128 + N for signal N."""
        async with self._waiting:
            if self._popen.returncode is None:
                if self._exit_fd is None:
                    await in_thread(self._popen.wait, abandon_on_cancel=True)
                else:
                    await trio.lowlevel.wait_readable(self._exit_fd)
            code = self._popen.wait()
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        """Send ``SIGKILL``, unless it has been waited for already."""
        self._popen.kill()

    async def aclose(self) -> None:
        """Close the pipes and what :meth:`wait` needed."""
        if self._exit_fd is not None:
            trio.lowlevel.notify_closing(self._exit_fd)
            os.close(self._exit_fd)
            self._exit_fd = None
        for stream in (self.stdin, self.stdout, self.stderr):
            await trio.aclose_forcefully(stream)


async def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    start_new_session: bool = True,
) -> ClientProcess:
    """Start *argv* with pipes, in ``/`` and by default in a session of its own.

    In its own session a Ctrl-C in the host's terminal does not reach it, so that the
    engine can stop it in order.

    Args:
        argv: The program and its arguments.
        environment: Its whole environment.
        pass_fds: Descriptors that it inherits under the same numbers.
        start_new_session: False leaves it in ours.

    Raises:
        NotStartedError: If there is no such program, or no process to be had.
    """
    with ExitStack() as theirs, ExitStack() as ours:
        try:
            ends = []
            for reader_is_ours in (False, True, True):
                reader, writer = os.pipe()
                mine, other = (reader, writer) if reader_is_ours else (writer, reader)
                ours.callback(os.close, mine)
                theirs.callback(os.close, other)
                ends.append((mine, other))
            (stdin, child_stdin), (stdout, child_stdout), (stderr, child_stderr) = ends

            def start() -> subprocess.Popen[bytes]:
                return subprocess.Popen(  # noqa: S603 - an argv, and never a shell
                    list(argv),
                    stdin=child_stdin,
                    stdout=child_stdout,
                    stderr=child_stderr,
                    env=dict(environment),
                    cwd="/",
                    pass_fds=tuple(pass_fds),
                    start_new_session=start_new_session,
                )

            popen = await _in_spawn_thread(start)
        except OSError as exc:
            raise NotStartedError(f"cannot run {argv[0]!r}: {exc.strerror}") from exc
        ours.pop_all()
        return ClientProcess(popen, stdin, stdout, stderr)


def _open_pidfd(pid: int) -> int | None:
    """Open a descriptor that becomes readable on exit; None where there is no such."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Not Linux, forbidden, or out of descriptors: a thread can wait, too.
        return None


async def _in_spawn_thread(fn: Callable[[], T]) -> T:
    """Call *fn* in the thread that never expires. Not cancelled half-way."""
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()
    results: list[outcome.Outcome[T]] = []

    def job() -> None:
        results.append(outcome.capture(fn))
        token.run_sync_soon(done.set)

    _spawn_queue().put(job)
    with trio.CancelScope(shield=True):
        await done.wait()
    return results[0].unwrap()


@cache
def _spawn_queue() -> queue.SimpleQueue[Callable[[], None]]:
    jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            jobs.get()()

    threading.Thread(target=work, name="clawtrio spawn", daemon=True).start()
    return jobs


# A forked child has the queue, but nobody who takes from it.
os.register_at_fork(after_in_child=_spawn_queue.cache_clear)
