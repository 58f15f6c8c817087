"""The command line: what ``clawtrio`` understands, and what it exits with.

======  ==============================================================
0       all went well
1       it did not, or an agent's run did not
2       the command line or a setting makes no sense
130     Ctrl-C; 143 after SIGTERM, 129 after SIGHUP
141     nobody reads our output any more
======  ==============================================================

Nothing else imports this, nor cyclopts and rich.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as version_of
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

import attrs
import trio
from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from ._cli_agent import install
from ._cli_care import RuntimeName, has_data, list_containers, print_logs, sweep_all
from ._cli_chat import chat
from ._cli_demo import demo
from ._cli_doctor import doctor
from ._cli_mounts import check_mount, init_allowlist
from ._cli_proxy import serve_proxy
from ._cli_runs import STDIN, UsageError, group_of, plan_run, reset, run_prompt
from ._cli_terminal import Interrupts, complain, note, obeying_signals, prepare, write
from ._cli_top import top
from ._engine import choose_runtime
from ._errors import ClawtrioError, GroupFolderError, SettingsError
from ._flavours import FLAVOURS
from ._groups import open_places
from ._image import build_image
from ._settings import Settings
from ._text import one_line

_USAGE: Final = 2
_INTERRUPTED: Final = 130
_NOBODY_READS: Final = 141


app = App(
    name="clawtrio",
    help="Run AI agents in containers, and stream what they say.",
    help_format="markdown",
    version=lambda: f"clawtrio {version_of('clawtrio')}",
    default_parameter=Parameter(negative="", show_default=False),
    backend="trio",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
image = App(
    name="image", help="Build the image that docker and podman need.", sort_key=9
)
app.command(image)
mounts = App(
    name="mounts", help="Let groups see more directories of the host.", sort_key=10
)
app.command(mounts)
agents = App(name="agent", help="Install the agent that bwrap runs.", sort_key=11)
app.command(agents)


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class Common:
    """What every command takes."""

    root: Annotated[
        Path | None,
        Parameter(help="The bot's directory; by default CLAWTRIO_ROOT, else this one."),
    ] = None
    debug: Annotated[bool, Parameter(help="Show tracebacks and log everything.")] = (
        False
    )

    def settings(self, **changes: object) -> Settings:
        """Load the settings, with what the command line says instead."""
        wanted: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
        return attrs.evolve(Settings.load(self.root), **wanted)


_COMMON: Final = Common()

GroupOption = Annotated[
    str,
    Parameter(
        name=["--group", "-g"],
        help="The folder of the group whose agent it is; main alone is privileged.",
        show_default=True,
    ),
]
RuntimeOption = Annotated[
    RuntimeName | None,
    Parameter(help="What runs containers; by default CLAWTRIO_RUNTIME."),
]
AgentOption = Annotated[
    str | None, Parameter(help="The agent's backend; 'echo' works offline.")
]


@app.command(sort_key=3)
async def run(
    prompt: str,
    /,
    *,
    group: GroupOption = "main",
    runtime: RuntimeOption = None,
    agent: AgentOption = None,
    json: bool = False,
    new_session: bool = False,
    dry_run: bool = False,
    common: Common = _COMMON,
) -> int:
    """Ask an agent one thing, and print what it says as it comes.

    The group's last session is resumed. Ctrl-C stops the container. The exit code is 0
    if the agent answered, 1 if not.

    Args:
        prompt: What to ask; - reads it from stdin.
        json: Print a line of JSON for each output ("status", "result", ...), then one
            with "type": "result" that says how the run ended.
        new_session: Begin a new session.
        dry_run: Print the command that would be run, and start nothing.
    """
    settings = common.settings(runtime=runtime, agent=agent)
    if dry_run:
        return await obeying_signals(lambda _: plan_run(settings, group_of(group)))
    return await obeying_signals(
        partial(
            run_prompt,
            settings,
            group_of(group),
            prompt,
            as_json=json,
            new_session=new_session,
        )
    )


@app.command(name="chat", sort_key=4)
async def chat_command(
    *,
    group: GroupOption = "main",
    runtime: RuntimeOption = None,
    agent: AgentOption = None,
    new_session: bool = False,
    common: Common = _COMMON,
) -> int:
    """Talk to an agent: each line is a message to it.

    /quit, or the end of the input, leaves once all is answered; /stop stops the agent.
    The exit code is 1 if something was not answered.

    Args:
        new_session: Begin a new session.
    """
    settings = common.settings(runtime=runtime, agent=agent)
    work = partial(chat, settings, group_of(group), new_session=new_session)
    return await obeying_signals(work)


@app.command(name="demo", sort_key=1)
async def demo_command(
    *, runtime: RuntimeOption = None, common: Common = _COMMON
) -> int:
    """See it work in a second, offline and without a key.

    An agent in a sandbox answers a prompt, then a follow-up, then leaves. On Linux the
    sandbox is bwrap, unless a runtime is chosen; nothing is kept, unless --root is.
    """
    _silence(common)
    settings = common.settings(runtime=runtime)
    work = partial(demo, settings, temporary=common.root is None)
    return await obeying_signals(work)


@app.command(name="doctor", sort_key=2)
async def doctor_command(
    *, runtime: RuntimeOption = None, common: Common = _COMMON
) -> int:
    """Check what runs need here, and say how to mend it."""
    _silence(common)
    settings = common.settings(runtime=runtime)
    return await obeying_signals(lambda _: doctor(settings))


@app.command(sort_key=6)
async def ps(*, runtime: RuntimeOption = None, common: Common = _COMMON) -> int:
    """List the containers of this root."""
    settings = common.settings(runtime=runtime)
    return await obeying_signals(lambda _: list_containers(settings))


@app.command(name="top", sort_key=6)
async def top_command(*, common: Common = _COMMON) -> int:
    """Show what the live runs of this root are doing: at a terminal until Ctrl-C."""
    settings = common.settings()
    return await obeying_signals(lambda _: top(settings))


@app.command(sort_key=7)
async def sweep(
    *,
    runtime: Annotated[
        RuntimeName | None,
        Parameter(help="Where to look; by default in each one that is installed."),
    ] = None,
    common: Common = _COMMON,
) -> int:
    """Remove what engines of this root left behind when they died."""
    _silence(common)
    settings = common.settings()
    return await obeying_signals(lambda _: sweep_all(settings, runtime))


@app.command(sort_key=5)
def logs(
    group: Annotated[str, Parameter(show_default=True)] = "main",
    /,
    *,
    last: Annotated[int, Parameter(validator=Number(gte=1), show_default=True)] = 1,
    path: bool = False,
    common: Common = _COMMON,
) -> int:
    """Print the newest run logs of a group.

    Args:
        group: The group's folder.
        last: How many.
        path: Print where they are instead.
    """
    return print_logs(common.settings(), group_of(group), last, paths=path)


@app.command(name="reset", sort_key=8)
def reset_command(group: str, /, *, common: Common = _COMMON) -> int:
    """Forget a group's session: its next run begins a new one.

    Args:
        group: The group's folder.
    """
    settings = common.settings()
    wanted = group_of(group)
    forgot = False
    if has_data(settings):
        with open_places(settings) as places:
            forgot = reset(places, wanted)
    note(f"{group}: {'forgotten' if forgot else 'there was no session to forget'}")
    return 0


@app.command(name="proxy", sort_key=8)
async def proxy_command(
    *,
    host: Annotated[str, Parameter(show_default=True)] = "127.0.0.1",
    port: Annotated[
        int, Parameter(validator=Number(gte=0, lte=65535), show_default=True)
    ] = 0,
    common: Common = _COMMON,
) -> int:
    """Run the credential proxy alone, for agents that others run.

    It prints where it is and the token to use there, and, once a signal ends it, what
    the API has counted.

    Args:
        host: The address to listen on.
        port: The port; 0 takes a free one.
    """
    return await obeying_signals(partial(serve_proxy, common.settings(), host, port))


@image.command
async def build(
    *,
    runtime: Literal["docker", "podman"] | None = None,
    base_image: str | None = None,
    browser: bool = False,
    common: Common = _COMMON,
) -> int:
    """Build the image that docker and podman run agents in.

    Args:
        runtime: Where; by default where runs are.
        base_image: What to build upon, in place of a slim Python image.
        browser: Add Chromium, and agent-browser to drive it: 0.7 GB more.
    """
    settings = common.settings(runtime=runtime)
    name = choose_runtime(settings).name
    if name not in FLAVOURS:
        raise UsageError(f"{name} needs no image: name docker or podman by --runtime")
    started = trio.current_time()

    async def work(_: Interrupts) -> int:
        await build_image(
            name,
            image=settings.image,
            base_image=base_image,
            browser=browser,
            on_line=lambda line: write(f"{line}\n"),
        )
        seconds = trio.current_time() - started
        write(f"{name} has built {settings.image} in {seconds:.1f} s\n")
        return 0

    return await obeying_signals(work)


@mounts.command
def init(*, force: bool = False, common: Common = _COMMON) -> int:
    """Write an allowlist to begin with, which explains itself.

    Args:
        force: Replace one that is there.
    """
    return init_allowlist(common.settings(), force=force)


@mounts.command
def check(
    path: str,
    /,
    *,
    group: GroupOption = "main",
    rw: bool = False,
    common: Common = _COMMON,
) -> int:
    """Say whether a directory would be mounted for a group, and why, or why not.

    The exit code is 0 if it would be, 1 if not.

    Args:
        path: The directory.
        rw: Ask to write in it, too.
    """
    return check_mount(common.settings(), group_of(group), path, rw=rw)


@agents.command(name="install")
async def install_command(*, common: Common = _COMMON) -> int:
    """Install Claude for bwrap: 0.5 GB, in a directory of the user's data.

    Docker and Podman have it in their image.
    """
    del common  # it knows no root, but takes the same options
    return await obeying_signals(lambda _: install())


def main() -> NoReturn:
    """Do what the command line says, and exit."""
    prepare()
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Do what *arguments* say, and return the exit code."""
    options = list(takewhile(lambda word: word != "--", arguments))
    debug = "--debug" in options
    # Cyclopts takes a bare dash for an option.
    words = [STDIN if word == "-" else word for word in options]
    words += arguments[len(options) :]
    try:
        with _logging(logging.DEBUG if debug else logging.WARNING):
            # Help and version return nothing.
            return app(words, exit_on_error=False, print_error=False) or 0
    # The outermost frame: each error becomes one line and an exit code, bugs included.
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as exc:  # noqa: BLE001
        if debug:
            traceback.print_exc()
        return _account_for(_first_cause(exc))


def _first_cause(exc: BaseException) -> BaseException:
    """Return what is in a group: nurseries put errors of ours into one."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def _account_for(exc: BaseException) -> int:
    """Say what went wrong, in one line at most, and return the exit code."""
    match exc:
        case KeyboardInterrupt():
            return _INTERRUPTED
        case BrokenPipeError():
            return _NOBODY_READS
        case CycloptsError() | UsageError() | SettingsError() | GroupFolderError():
            complain(exc)
            return _USAGE
        case ClawtrioError():
            complain(exc)
        case OSError():
            place = f"{exc.filename!r}: " if exc.filename else ""
            complain(f"{place}{exc.strerror or exc}")
        case Exception():
            complain(f"a bug: {type(exc).__name__}: {exc} (--debug shows where)")
        case _:
            raise exc
    return 1


class _OneLine(logging.Formatter):
    """One record, one line, whatever an agent has put in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return one_line(super().formatMessage(record))


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """Send our log to stderr for as long as the block takes."""
    logger = logging.getLogger("clawtrio")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("clawtrio: %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def _silence(common: Common) -> None:
    """Leave out warnings where the output itself tells what they would say."""
    if not common.debug:
        logging.getLogger("clawtrio").setLevel(logging.ERROR)
