"""``clawtrio demo``: what a run is, in ten lines, offline."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Final

import attrs
import trio

from ._cli_terminal import Interrupts, complain, write
from ._engine import choose_runtime, open_engine
from ._errors import ClawtrioError
from ._groups import open_places
from ._models import Ending, Group
from ._run import Run
from ._runtimes import LABEL_ROOT, FoundContainer, Runtime
from ._settings import Settings
from ._text import one_line

_PROMPT: Final = "Hello from the host!\nAre you in there?"
_FOLLOW_UP: Final = "And do you still listen?"
_GROUP: Final = Group(name="Demo", folder="demo")
#: Seconds of silence after which something is wrong: it all takes less than one.
_PATIENCE: Final = 30.0
#: Docker removes a container a moment after its client has left.
_REMOVAL: Final = 5.0
_LOOK_AGAIN: Final = 0.1


class DemoFailedError(ClawtrioError):
    """Something came back wrong: what, is the message."""


def demo_settings(settings: Settings, root: Path | None) -> Settings:
    """Return *settings* as the demo needs them.

    Args:
        settings: What the operator wishes.
        root: Where to keep what is kept, in place of where it is kept otherwise.
    """
    if settings.runtime == "auto" and sys.platform == "linux":
        # What needs no daemon and no image shows the most, the soonest.
        settings = attrs.evolve(settings, runtime="bwrap")
    if root is not None:
        settings = attrs.evolve(
            settings,
            root=str(root),
            groups_dir=str(root / "groups"),
            data_dir=str(root / "data"),
            min_free_bytes=0,
        )
    return attrs.evolve(
        settings,
        agent="echo",
        agent_command=None,
        stdin="lifeline",
        answer_timeout=_PATIENCE,
        idle_timeout=_PATIENCE,
        close_grace=_PATIENCE,
    )


async def demo(settings: Settings, interrupts: Interrupts, *, temporary: bool) -> int:
    """Run the demo; 0 if all of it came back right.

    Args:
        settings: What the operator wishes.
        interrupts: What stops it.
        temporary: Whether to leave no trace in the operator's directories.
    """
    with ExitStack() as stack:
        root = None
        if temporary:
            made = tempfile.TemporaryDirectory(
                prefix="clawtrio-demo-", ignore_cleanup_errors=True
            )
            root = Path(stack.enter_context(made))
        settings = demo_settings(settings, root)
        chosen = choose_runtime(settings)
        try:
            await _show(settings, chosen, interrupts)
        except DemoFailedError as exc:
            complain(f"the demo failed: {exc}")
            return 1
    write("All of it came back, in order.\n")
    return 0


async def _show(settings: Settings, runtime: Runtime, interrupts: Interrupts) -> None:
    started = trio.current_time()

    def tell(what: str, text: str = "") -> None:
        seconds = trio.current_time() - started
        write(f"{seconds:6.2f} s  {what:<10}{one_line(text)}".rstrip() + "\n")

    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(open_engine(settings, runtime))
        tell("engine", f"{runtime.name} works here; offline, without a key")
        run = await stack.enter_async_context(
            engine.open_run(_GROUP, _PROMPT, chat_jid="cli:demo")
        )
        interrupts.stop = run.stop
        tell("started", f"{run.container_name}, an agent that echoes")
        tell("asked", json.dumps(_PROMPT))
        await _expect(run, _PROMPT.splitlines(), tell)
        await run.send(_FOLLOW_UP)
        tell("follow-up", json.dumps(_FOLLOW_UP))
        await _expect(run, [_FOLLOW_UP], tell)
        run.finish()
        tell("finish", "no more questions: it may leave")
        late = [output async for output in run]
        result = run.result
        tell(result.ending.value, f"code {result.exit_code}; {result.outputs} outputs")
    if late or result.ending is not Ending.EXITED or result.status != "success":
        problem = result.error or f"it said more than it was asked: {late}"
        raise DemoFailedError(one_line(problem))
    await _expect_nothing_left(settings, runtime)
    tell("clean", "the container is gone")


async def _expect(run: Run, texts: list[str], tell: Callable[..., None]) -> None:
    """Receive the outputs of a turn: *texts*, then that the agent waits."""
    for text in [*texts, None]:
        output = await anext(run, None)
        if output is None:
            raise DemoFailedError(run.result.error or "the agent has left")
        if output.status != "success" or output.result != text:
            raise DemoFailedError(f"expected {text!r}, not {output}")
        if text is not None:
            tell("answered", json.dumps(text))


async def _expect_nothing_left(settings: Settings, runtime: Runtime) -> None:
    found: Sequence[FoundContainer] = ()
    with open_places(settings) as places, trio.move_on_after(_REMOVAL):
        while True:
            found = await runtime.find({LABEL_ROOT: places.root_id})
            if not found:
                return
            await trio.sleep(_LOOK_AGAIN)
    ids = ", ".join(container.id for container in found)
    raise DemoFailedError(f"left behind, or not to be found out: {ids}")
