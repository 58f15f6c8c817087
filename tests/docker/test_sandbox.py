"""What an agent finds around itself: told from inside, by a real process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from clawtrio._docker import DockerRuntime
from clawtrio._errors import RuntimeUnavailableError
from clawtrio._flavours import Flavour

from .conftest import BASE_IMAGE, UID, House, run

LOOK = """
import json, os, resource, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def writable(path):
    try:
        open(os.path.join(path, "x"), "w").close()
    except OSError as exc:
        return exc.strerror
    return True
def tmpfs(path):
    fs, st = os.statvfs(path), os.stat(path)
    return [fs.f_blocks * fs.f_frsize, oct(st.st_mode & 0o7777), st.st_uid]
open("/tmp/program", "w").write("#!/bin/sh\\n")
os.chmod("/tmp/program", 0o700)
print(json.dumps({
    "argv": sys.argv[1:],
    "environment": dict(os.environ),
    "cwd": os.getcwd(),
    "ids": [os.getresuid(), os.getresgid(), os.getgroups()],
    "status": {name: value.strip() for name, value in status.items()},
    "writable": {path: writable(path) for path in (
        "/", "/etc", "/usr", "/run", "/var/tmp", "/app/src", "/workspace",
        "/workspace/group", "/tmp", "/home/node")},
    "tmpfs": [tmpfs("/tmp"), tmpfs("/home/node")],
    "executes": os.system("/tmp/program"),
    "interfaces": os.listdir("/sys/class/net"),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
    "init": open("/proc/1/comm").read().strip(),
}))
"""

PROXIES = {
    "httpProxy": "http://user:canary@proxy:1",
    "httpsProxy": "http://user:canary@proxy:1",
    "ftpProxy": "http://user:canary@proxy:1",
    "allProxy": "http://user:canary@proxy:1",
    "noProxy": "canary.example",
}


async def look(runtime: DockerRuntime, house: House, **environment: str) -> Any:
    result = await run(runtime, house.spec(LOOK, environment=environment))
    assert result.code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


async def test_agent_has_no_power(runtime: DockerRuntime, house: House) -> None:
    """An ordinary user, no capability, no way to one, seccomp, no network but lo."""
    seen = await look(runtime, house)

    assert seen["ids"] == [[UID] * 3, [UID] * 3, [UID]]
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(seen["status"][name], 16) == 0
    assert seen["status"]["NoNewPrivs"] == "1"
    assert seen["status"]["Seccomp"] == "2"
    assert seen["interfaces"] == ["lo"]
    assert seen["core"] == [0, 0]
    assert seen["nofile"][0] == seen["nofile"][1] <= 16384
    assert seen["init"] in {"docker-init", "catatonit", "podman-init"}


async def test_agent_is_called_as_asked(runtime: DockerRuntime, house: House) -> None:
    """It gets the arguments one by one, and stands in its group's directory."""
    seen = await look(runtime, house)

    assert seen["argv"] == ["one", "two words"]
    assert seen["cwd"] == "/workspace/group"


async def test_only_mounts_and_sized_tmpfs_are_writable(
    runtime: DockerRuntime, house: House
) -> None:
    """The image is read-only, /tmp and HOME hold half the memory each."""
    seen = await look(runtime, house)

    assert [path for path, w in seen["writable"].items() if w is True] == [
        "/workspace/group",
        "/tmp",
        "/home/node",
    ]
    size = 64 * 2**20
    tmp, home = seen["tmpfs"]
    assert tmp == [size, "0o1777", 0]
    # An old runc gives a tmpfs the mode of the directory that it hides.
    assert home in ([size, "0o700", UID], [size, "0o1777", UID])
    assert seen["executes"] == 0
    assert (house.group / "x").stat().st_uid == UID


async def test_environment_is_what_was_given(
    runtime: DockerRuntime,
    house: House,
    flavour: Flavour,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Nothing of the host's environment or of Docker's proxy settings gets inside."""
    config = {"proxies": {"default": PROXIES}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    for name in ("CANARY", "HTTP_PROXY", "https_proxy", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "canary")
    odd = "a=b 'c' \"d\" $HOME \n é --x"

    environment = (await look(runtime, house, ODD=odd, TZ="UTC"))["environment"]

    assert "canary" not in json.dumps(environment)
    for name in flavour.silenced:
        assert environment.pop(name) == ""
    assert environment.pop("HOSTNAME")
    # Podman's own two; Python's own, where there is no locale; our image's own.
    for name in ("container", "TERM", "LC_CTYPE"):
        environment.pop(name, None)
    assert environment.pop("PATH").startswith("/usr/local/sbin:")
    assert environment == {
        "HOME": "/home/node",
        "ODD": odd,
        "TZ": "UTC",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "AGENT_BROWSER_EXECUTABLE_PATH": "/usr/bin/chromium",
    }


async def test_granted_proxy_is_not_silenced(
    runtime: DockerRuntime, house: House
) -> None:
    """A proxy variable that the engine gives is there, and none beside it."""
    seen = await look(runtime, house, HTTPS_PROXY="http://127.0.0.1:1")

    assert seen["environment"]["HTTPS_PROXY"] == "http://127.0.0.1:1"
    assert not seen["environment"].get("https_proxy")


async def test_too_much_memory_kills(runtime: DockerRuntime, house: House) -> None:
    """An agent that takes more than its memory is killed, and the code says so."""
    program = "print('x', flush=True); x = b'x' * 2**28; print('survived')"

    result = await run(runtime, house.spec(program, memory=64 * 2**20))

    assert (result.code, result.stdout) == (137, "x\n")


async def test_full_tmpfs_does_not_kill(runtime: DockerRuntime, house: House) -> None:
    """Filling one tmpfs is an error of the disk, not the end of the agent."""
    program = """
try:
    with open("/tmp/x", "wb", buffering=0) as file:
        while True: file.write(bytes(2**20))
except OSError as exc:
    print(exc.strerror)
"""
    result = await run(runtime, house.spec(program))

    assert (result.code, result.stdout) == (0, "No space left on device\n")


async def test_processes_are_limited(runtime: DockerRuntime, house: House) -> None:
    """A fork bomb ends at the limit."""
    program = """
import os, time
count = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        count += 1
except OSError as exc:
    print(count, exc.strerror, flush=True)
"""
    result = await run(runtime, house.spec(program, pids=20))

    count, error = result.stdout.split(maxsplit=1)
    assert 10 <= int(count) < 20
    assert error == "Resource temporarily unavailable\n"


async def test_more_processors_than_there_are(
    runtime: DockerRuntime, house: House
) -> None:
    """A wish for more processors than the machine has stops nothing."""
    result = await run(runtime, attrs.evolve(house.spec("print(1)"), cpus=4096))

    assert result == attrs.evolve(result, code=0, stdout="1\n")


async def test_foreign_image_is_accepted(flavour: Flavour, house: House) -> None:
    """An image without our label runs as it is, and is not made read-only."""
    runtime = DockerRuntime(flavour, image=BASE_IMAGE)
    await runtime.check()
    assert not runtime.takes_runner

    result = await run(runtime, house.spec("", arguments=()))

    # The base has no entrypoint, nor a command: that is its own business.
    assert result.code in {125, 127}
    program = "import sys; open('/tmp/x', 'w'); print(sys.argv[1:])"
    result = await run(runtime, house.spec(program, arguments=("1",)))
    assert (result.code, result.stdout) == (0, "['1']\n")


async def test_absent_image(flavour: Flavour) -> None:
    """An image that is not there is a matter of building it, not of pulling one."""
    runtime = DockerRuntime(flavour, image="localhost:1/clawtrio-none:x")

    with pytest.raises(RuntimeUnavailableError) as caught:
        await runtime.check()

    assert caught.value.problem == "there is no image 'localhost:1/clawtrio-none:x'"
    build = f"clawtrio image build --runtime {flavour.name}"
    assert build in caught.value.remedy
