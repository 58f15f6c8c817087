"""How our image is built."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import trio

from ._errors import NotStartedError
from ._flavours import FLAVOURS, ask, leave, tidy
from ._mounts import container_directory
from ._process import client_environment, spawn
from ._text import one_line

#: Lines of a failed build that its error quotes.
_LAST_LINES: Final = 5
#: A line longer than this is told in pieces.
_LINE_BYTES: Final = 2**14
#: Seconds for a build that was cancelled to take its container down.
_BUILD_GRACE: Final = 5.0

_NO_ENGINE: Final = re.compile(
    r"cannot connect to|failed to connect to the docker|permission denied while trying",
    re.IGNORECASE,
)
_STEP: Final = re.compile(r"step \d+/\d+ ?: (\w+)", re.IGNORECASE)
#: BuildKit's steps come in any order: there the complaint itself tells.
_NO_BASE: Final = re.compile(
    r"ERROR: failed to (build: failed to )?solve: \S+: "
    r"(failed to|pull access|.*not found)"
)


async def build_image(
    runtime: str,
    *,
    image: str,
    base_image: str | None,
    browser: bool = False,
    on_line: Callable[[str], object],
) -> None:
    """Build our image.

    Args:
        runtime: ``docker`` or ``podman``.
        image: What to call it.
        base_image: What to build upon, in place of the Dockerfile's own choice. One
            that is here already is not pulled.
        browser: Whether it has Chromium, and agent-browser to drive it.
        on_line: Called with each line that the build says, made fit for a terminal.

    Raises:
        RuntimeUnavailableError: If there is no image now; says why.
    """
    flavour = FLAVOURS[runtime]
    options = {"BASE_IMAGE": base_image, "BROWSER": "1" if browser else None}
    last: deque[str] = deque(maxlen=_LAST_LINES)
    step = ""

    def hear(line: str) -> None:
        nonlocal step
        if match := _STEP.match(line):
            step = match[1].upper()
        last.append(one_line(line))
        on_line(last[-1])

    try:
        with tempfile.TemporaryDirectory(prefix="clawtrio-") as context:
            _fill(Path(context))
            argv = _build_argv(flavour.name, image, options)
            code = await run_command([*argv, context], hear)
        if (
            code == 0
            and (await ask([flavour.name, "image", "inspect", image])).code == 0
        ):
            return
    except NotStartedError as exc:
        raise flavour.unavailable(str(exc), flavour.install) from exc
    if code == 0:
        problem = f"the build left no image {image!r} where containers are run"
        raise flavour.unavailable(
            problem, "Use the builder 'default' of docker buildx."
        )
    message = tidy(last[-1]) if last else f"it failed with code {code}"
    for line in last:
        if _NO_ENGINE.search(line):
            raise flavour.unavailable(tidy(line))
    if step == "FROM" or any(map(_NO_BASE.match, last)):
        base = "the base image" if base_image is None else f"base image {base_image!r}"
        problem = f"{base} is not here and cannot be pulled: {message}"
        remedy = "Pull or load it, or name one that is here: --base-image NAME."
        raise flavour.unavailable(problem, remedy)
    problem = "the build failed: " + " / ".join(last or [message])
    raise flavour.unavailable(problem, f"See {container_directory() / 'Dockerfile'}.")


def _build_argv(
    client: str, image: str, options: Mapping[str, str | None]
) -> list[str]:
    # Else Docker's classic builder leaves the container of a step that failed.
    argv = [client, "build", "--force-rm", "--tag", image]
    for name, value in options.items():
        if value is not None:
            argv += ["--build-arg", f"{name}={value}"]
    return argv


def _fill(context: Path) -> None:
    """Copy what the image is made of, and the certificates that pip shall trust."""
    shutil.copytree(container_directory(), context, dirs_exist_ok=True)
    certificates = os.environ.get("PIP_CERT")
    if certificates:
        shutil.copyfile(certificates, context / "ca.pem")


async def run_command(
    argv: Sequence[str],
    on_line: Callable[[str], object],
    *,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run *argv* to its end, and return its exit code.

    Args:
        argv: The command.
        on_line: Called with each line that it writes.
        environment: By default a runtime client's.

    Raises:
        NotStartedError: If it cannot be run.
    """
    process = await spawn(argv, environment=environment or client_environment())
    try:
        await process.stdin.aclose()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hear_lines, process.stdout, on_line)
            nursery.start_soon(_hear_lines, process.stderr, on_line)
        return await process.wait()
    except BaseException:
        # SIGKILL would leave Podman's build container behind.
        os.kill(process.pid, signal.SIGTERM)
        with trio.move_on_after(_BUILD_GRACE, shield=True):
            await process.wait()
        raise
    finally:
        await leave(process)  # noqa: ASYNC102 - shields itself


async def _hear_lines(
    stream: trio.abc.ReceiveStream, on_line: Callable[[str], object]
) -> None:
    rest = b""
    async for chunk in stream:
        *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
        if len(rest) > _LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in filter(bytes.strip, lines):
            on_line(line.decode(errors="replace"))
    if rest.strip():
        on_line(rest.decode(errors="replace"))
