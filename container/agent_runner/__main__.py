"""Start an agent inside the container: ``python3 /app/src echo`` or ``-- ARGV...``.

Before that, the proxy on the host gets a port in here: see ``forward.py``.

The directory is mounted at /app/src and started as a program; it is not a package, so
its modules import each other by plain name. To add a backend, write a module with
``run(session) -> int`` beside ``echo.py`` and enter it in ``BACKENDS``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from wire import Session

# As a shell has them.
USAGE = 2
CANNOT_EXECUTE = 126
NOT_FOUND = 127


def run_echo(session: Session) -> int:
    """Run the offline backend."""
    # Here and not above: a backend may need what another one's image does not have.
    import echo  # noqa: PLC0415 - see above

    return echo.run(session)


def run_claude(session: Session) -> int:
    """Run the Claude Agent SDK."""
    try:
        import claude  # noqa: PLC0415 - as above
    except ModuleNotFoundError as exc:
        # It is in our image, and in what `clawtrio agent install` makes.
        import wire  # noqa: PLC0415 - as above

        remedy = "'clawtrio image build', or for bwrap 'clawtrio agent install'"
        error = f"Claude is not installed here ({exc}): run {remedy}"
        wire.emit(status="error", error=error, answers=0)
        return 1
    return claude.run(session)


BACKENDS: dict[str, Callable[[Session], int]] = {
    "claude": run_claude,
    "echo": run_echo,
}


def main(argv: list[str], *, inbox: Path | None = None) -> int:
    """Do what *argv* (without the program) asks, and return the exit code.

    Args:
        argv: ``[backend]``, or ``["--", command, argument, ...]``.
        inbox: Where follow-ups come as files, if not where the wire says.
    """
    foreign = argv[:1] == ["--"] and len(argv) > 1
    if not foreign and (len(argv) != 1 or argv[0] not in BACKENDS):
        known = " | ".join([*BACKENDS, "-- COMMAND [ARGUMENT]..."])
        return complain(f"expected {known}, not {argv}", USAGE)
    if "CLAWTRIO_PROXY" in os.environ:
        import forward  # noqa: PLC0415 - what has no proxy starts faster

        try:
            forward.start(os.environ)
        except forward.ForwardError as exc:
            return complain(str(exc), 1)
    if foreign:
        return run_command(argv[1:])
    return run_backend(BACKENDS[argv[0]], inbox)


def run_command(command: list[str]) -> int:
    """Become *command*, the user's own agent, which speaks the protocol itself."""
    # Python ignores these two, and what is ignored stays so in the new program.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - that is the point
    except FileNotFoundError:
        return complain(f"{command[0]!r}: command not found", NOT_FOUND)
    except OSError as exc:
        return complain(f"{command[0]!r}: {exc.strerror}", CANNOT_EXECUTE)


def run_backend(backend: Callable[[Session], int], inbox: Path | None) -> int:
    """Read the input and run *backend* on it."""
    import wire  # noqa: PLC0415 - not for a user's own command, which starts faster

    if os.getpid() == 1:
        # The kernel spares the first process of a container every default action.
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        try:
            session = wire.open_session(wire.take_stdin(), inbox=inbox or wire.INBOX)
        except wire.InputError as exc:
            wire.emit(status="error", error=str(exc))
            return 1
        return backend(session)
    except BrokenPipeError:
        return complain("stdout is closed, so nobody reads the answers", 1)


def complain(problem: str, code: int) -> int:
    """Say what is wrong in one line, and pass the exit *code* on."""
    print(f"agent_runner: {problem}", file=sys.stderr)  # noqa: T201 - to say it
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
