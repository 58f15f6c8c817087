"""How images are built, by fake clients and real ones."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path

import pytest
import trio

from clawtrio import _image
from clawtrio._errors import RuntimeUnavailableError
from clawtrio._flavours import DOCKER, FLAVOURS, PODMAN, ask
from clawtrio._image import build_image
from clawtrio._mounts import container_directory

BASE_IMAGE = "clawtrio-base:bookworm"

real = pytest.mark.parametrize(
    "runtime",
    [
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("podman", marks=pytest.mark.podman),
    ],
)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a directory alone on the PATH, and return the docker to be made in it."""
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    return tmp_path / "docker"


def script(client: Path, build: str, inspect: str = "exit 0") -> None:
    client.write_text(
        f'#!/bin/sh\nif [ "$1" = image ]; then {inspect}; fi\n'
        f'printf "%s\\n" "$@" > "$0.argv"\n{build}\n'
    )
    client.chmod(0o755)


def told(client: Path) -> list[str]:
    """Return what the client was told last."""
    return Path(f"{client}.argv").read_text().splitlines()


async def build(
    runtime: str = "docker", image: str = "x:1", base_image: str | None = None
) -> list[str]:
    lines: list[str] = []
    with trio.fail_after(120):
        await build_image(
            runtime, image=image, base_image=base_image, on_line=lines.append
        )
    return lines


async def failure(base_image: str | None = None) -> RuntimeUnavailableError:
    with pytest.raises(RuntimeUnavailableError) as caught:
        await build(base_image=base_image)
    return caught.value


async def test_lines_are_told(client: Path) -> None:
    """Each line of either stream is told at once, whole, and fit for a terminal."""
    script(client, r"printf 'one\r\n\ntwo\rthr\033[1mee\303'; printf '\251 four' >&2")

    lines = await build()

    assert sorted(lines) == ["one", "thr\\x1b[1mee\ufffd", "two", "\ufffd four"]
    assert told(client)[:-1] == ["build", "--force-rm", "--tag", "x:1"]


async def test_endless_line(client: Path) -> None:
    """A line without an end is told in pieces."""
    script(client, "/usr/bin/head -c 100000 /dev/zero | /usr/bin/tr '\\0' x")

    lines = await build()

    assert len(lines) > 1
    assert "".join(lines) == "x" * 100000


async def test_base_image(client: Path) -> None:
    """The base image is the Dockerfile's argument."""
    script(client, "")
    await build(base_image="base:1")

    argv = told(client)
    assert argv[4:6] == ["--build-arg", "BASE_IMAGE=base:1"]


async def test_browser(client: Path) -> None:
    """A browser is the Dockerfile's argument, where it is asked for."""
    script(client, "")
    with trio.fail_after(120):
        await build_image(
            "docker", image="x:1", base_image=None, browser=True, on_line=print
        )

    assert told(client)[4:6] == ["--build-arg", "BROWSER=1"]


@pytest.mark.parametrize("trusted", ["one", None])
def test_context(
    client: Path, monkeypatch: pytest.MonkeyPatch, trusted: str | None
) -> None:
    """The build gets all that the image is made of, and the certificates pip trusts."""
    listing = f"{client}.listing"
    script(client, f'for last; do :; done; cd "$last" && /bin/ls -A >{listing}')
    monkeypatch.delenv("PIP_CERT", raising=False)
    if trusted:
        certificates = client.with_name("ca.crt")
        certificates.write_text(trusted)
        monkeypatch.setenv("PIP_CERT", os.fspath(certificates))

    trio.run(build)

    names = {path.name for path in container_directory().iterdir()}
    assert {"Dockerfile", "agent_runner", "requirements.txt"} <= names
    shown = set(Path(listing).read_text().split())
    assert shown == names | ({"ca.pem"} if trusted else set())
    assert not Path(told(client)[-1]).exists()


async def test_no_client(client: Path) -> None:
    """Where there is no client, it is to be installed."""
    error = await failure()

    assert error.problem == "cannot run 'docker': No such file or directory"
    assert error.remedy == DOCKER.install


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("Cannot connect to the Docker daemon at unix:///x.", DOCKER.start),
        ("ERROR: failed to connect to the docker API at unix:///x", DOCKER.start),
        ("permission denied while trying to connect to the Docker", DOCKER.denied),
    ],
)
async def test_no_engine(client: Path, line: str, remedy: str) -> None:
    """An engine that does not answer is to be started, or opened."""
    script(client, f"echo '{line}' >&2; echo 'after'; exit 1")

    error = await failure()

    assert error.problem == line.rstrip(".")
    assert error.remedy == remedy


@pytest.mark.parametrize(
    "lines",
    [
        ["Step 1/9 : ARG X", "Step 2/9 : FROM ${X}", "pull access denied for base"],
        ["STEP 1/9: FROM base:1", "Trying to pull base:1...", "Error: no short-name"],
        ["#2 x", "ERROR: failed to solve: base:1: failed to resolve source metadata"],
        ["ERROR: failed to build: failed to solve: base: docker.io/base: not found"],
    ],
)
async def test_no_base_image(client: Path, lines: list[str]) -> None:
    """A base image that is not to be had is named, with the client's reason."""
    said = "\n".join(lines)
    script(client, f"/bin/cat <<'EOF'\n{said}\nEOF\nexit 1")

    error = await failure("base:1")
    assert error.problem.startswith("base image 'base:1' is not here and cannot be ")
    assert error.problem.endswith(lines[-1].removeprefix("Error: "))
    assert "--base-image" in error.remedy
    assert (await failure()).problem.startswith("the base image is not here")


async def test_failing_step(client: Path) -> None:
    """Any other failure is told in its last lines."""
    script(client, "for i in 1 2 3 4 5 6 7; do echo Step $i/7 : RUN; done; exit 1")

    error = await failure()

    lines = " / ".join(f"Step {i}/7 : RUN" for i in range(3, 8))
    assert error.problem == f"the build failed: {lines}"
    assert str(container_directory()) in error.remedy


async def test_failing_silently(client: Path) -> None:
    """A failure without a word has its code."""
    script(client, "exit 9")

    assert (await failure()).problem == "the build failed: it failed with code 9"


async def test_image_went_elsewhere(client: Path) -> None:
    """A builder that keeps its images to itself is not taken for success."""
    script(client, "", inspect="exit 1")

    error = await failure()

    assert error.problem == "the build left no image 'x:1' where containers are run"
    assert "buildx" in error.remedy


@pytest.mark.parametrize("stubborn", [False, True])
async def test_cancelled_build(
    client: Path, monkeypatch: pytest.MonkeyPatch, *, stubborn: bool
) -> None:
    """A build that is cancelled may clean up, for a while."""
    monkeypatch.setattr(_image, "_BUILD_GRACE", 0.3)
    handler = "" if stubborn else 'echo cleaned > "$0.cleaned"; exit'
    script(client, f"trap '{handler}' TERM; echo $$; while :; do /bin/sleep 0.1; done")
    lines: list[str] = []
    with trio.fail_after(10), trio.CancelScope() as scope:

        def on_line(line: str) -> None:
            lines.append(line)
            scope.cancel()

        await build_image("docker", image="x", base_image=None, on_line=on_line)

    assert scope.cancelled_caught
    assert client.with_suffix(".cleaned").exists() is not stubborn
    with pytest.raises(ProcessLookupError):
        os.kill(int(lines[0]), signal.SIGCONT)


def count_fds() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


async def test_answers_are_bounded(client: Path) -> None:
    """A client that does not stop talking fills no memory: the end is kept."""
    script(
        client,
        "/usr/bin/head -c 3000000 /dev/zero; echo end;"
        "/usr/bin/head -c 2000000 /dev/zero >&2",
    )

    answer = await ask(["docker", "info"])

    assert len(answer.stdout) == len(answer.stderr) == 2**20
    assert answer.stdout.endswith("\0end\n")


async def test_cancelled_client_is_killed(client: Path) -> None:
    """Cancelling kills the client at once, and leaves no descriptor."""
    script(client, 'echo $$ > "$0.pid"; exec /bin/sleep 600')
    await ask(["/bin/true"])
    before = count_fds()
    with trio.move_on_after(0.3) as scope:
        await ask(["docker", "x"])

    assert scope.cancelled_caught
    assert trio.current_time() < scope.deadline + 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(client.with_suffix(".pid").read_text()), 0)
    assert count_fds() == before


@real
async def test_real_build(runtime: str) -> None:
    """The packaged directory becomes an image with our label, upon a local base."""
    image = f"clawtrio-test-build:{uuid.uuid4().hex}"
    lines = await build(runtime, image, BASE_IMAGE)
    inspect = [
        runtime,
        "image",
        "inspect",
        "--format",
        "{{json .Config.Labels}}",
        image,
    ]
    done = await trio.run_process(inspect, capture_stdout=True)
    await trio.run_process([runtime, "rmi", image], capture_stdout=True)

    assert b'"clawtrio.protocol":"1"' in done.stdout
    assert b'"clawtrio.agent":"claude"' in done.stdout
    assert any("FROM" in line for line in lines)


@real
async def test_real_base_image_is_missing(runtime: str) -> None:
    """A base image that no registry has is named in the error."""
    base = "localhost:1/clawtrio-none:x"  # where nobody listens

    with pytest.raises(RuntimeUnavailableError) as caught:
        await build(runtime, "clawtrio-test-build:none", base)

    assert caught.value.runtime == runtime
    assert caught.value.problem.startswith(
        f"base image '{base}' is not here and cannot"
    )
    assert "refused" in caught.value.problem


@real
async def test_real_step_fails(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails is told with what it said, and leaves no container."""
    label = f"clawtrio.test={uuid.uuid4().hex}"
    dockerfile = f"FROM {BASE_IMAGE}\nLABEL {label}\nRUN echo oops >&2; exit 3\n"
    (tmp_path / "Dockerfile").write_text(dockerfile)
    monkeypatch.setattr(_image, "container_directory", lambda: tmp_path)

    with pytest.raises(RuntimeUnavailableError) as caught:
        await build(runtime, "clawtrio-test-build:none")

    assert caught.value.problem.startswith("the build failed: ")
    assert "oops" in caught.value.problem
    ps = [runtime, "ps", "-aq", "--filter", f"label={label}"]
    assert (await trio.run_process(ps, capture_stdout=True)).stdout == b""


@real
async def test_real_engine_is_down(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an engine there is no build, and a remedy."""
    conf = tmp_path / "containers.conf"
    conf.write_text("[engine]\nremote = true\n")
    for name in ("DOCKER_HOST", "CONTAINER_HOST"):
        monkeypatch.setenv(name, "unix:///nonexistent")
    monkeypatch.setenv("CONTAINERS_CONF", str(conf))

    with pytest.raises(RuntimeUnavailableError) as caught:
        await build(runtime)

    assert "onnect" in caught.value.problem
    assert caught.value.remedy == FLAVOURS[runtime].start


def test_flavours() -> None:
    """There are two."""
    assert FLAVOURS == {"docker": DOCKER, "podman": PODMAN}
