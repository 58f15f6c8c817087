"""How an image without our runner, and one in an open network, reach the proxy."""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from clawtrio import NotStartedError, RuntimeUnavailableError, open_engine
from clawtrio._docker import DockerRuntime
from clawtrio._flavours import FLAVOURS
from tests.helpers import own_addresses
from tests.upstream import SECRET, open_api

from .conftest import Site, group, nothing_left

BASE_IMAGE = "clawtrio-base:bookworm"
FOREIGN = "clawtrio-test-foreign:latest"

#: Knows a URL and a key, as a program does that was written for the API itself.
ASK = """
import json, os, sys, urllib.request
sys.stdin.readline()
request = urllib.request.Request(
    os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages",
    data=b"{}",
    headers={"x-api-key": os.environ["ANTHROPIC_API_KEY"]},
)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(request, timeout=10) as answer:
    found = [answer.status, os.environ["ANTHROPIC_BASE_URL"], dict(os.environ)]
frame = json.dumps({"status": "success", "result": json.dumps(found)})
print("---NANOCLAW_OUTPUT_START---", frame, "---NANOCLAW_OUTPUT_END---", sep="\\n")
"""

docker = pytest.param("docker", marks=pytest.mark.docker)
podman = pytest.param("podman", marks=pytest.mark.podman)


@pytest.fixture(params=[docker, podman])
def runtime_name(request: pytest.FixtureRequest) -> str:
    """The runtimes that have images and networks."""
    name: str = request.param
    return name


@pytest.fixture
def foreign(site: Site, tmp_path: Path) -> str:
    """Make an image with an agent of its own."""
    context = tmp_path / "image"
    context.mkdir()
    (context / "agent.py").write_text(ASK)
    (context / "Dockerfile").write_text(
        f'FROM {BASE_IMAGE}\nCOPY agent.py /agent.py\nCMD ["python3", "/agent.py"]\n'
    )
    argv = [site.runtime, "build", "-q", "-t", FOREIGN, str(context)]
    subprocess.run(argv, check=True, capture_output=True)
    return FOREIGN


@pytest.fixture
def site(runtime_name: str, tmp_path: Path) -> Iterator[Site]:
    """A root; afterwards nothing may be left of what ran for it, networks included."""
    root = tmp_path / "root"
    root.mkdir()
    site = Site(runtime_name, root)
    with nothing_left(site):
        yield site
    argv = [runtime_name, "network", "ls", "-q", "--filter"]
    argv.append(f"label=clawtrio.root={site.root_id}")
    assert subprocess.run(argv, check=True, capture_output=True).stdout == b""


async def ask(site: Site, **changes: Any) -> tuple[int, str]:
    """Run the agent; return the status that it got, and where it asked."""
    async with open_api() as api:
        (site.root / ".env").write_text(
            f"ANTHROPIC_API_KEY={SECRET}\n"
            f"ANTHROPIC_BASE_URL=http://127.0.0.1:{api.port}\n"
        )
        settings = attrs.evolve(site.settings(**changes), agent="claude")
        with trio.fail_after(60):
            async with open_engine(settings) as engine:
                result = await engine.run(group(), "ask", chat_jid="tg:1")
    assert result.result is not None, result.error
    status, url, environment = json.loads(result.result)
    [call] = api.calls
    assert call.header("x-api-key") == SECRET
    assert SECRET not in str(environment)
    assert result.usage is not None
    assert result.usage.requests == 1
    return status, url


@pytest.mark.parametrize("network", ["proxy", "open"])
async def test_a_foreign_image_has_a_port_inside(
    site: Site, foreign: str, network: str
) -> None:
    """It is opened in the container's own network, once that is there."""
    answer = await ask(site, image=foreign, network=network)

    assert answer == (200, "http://127.0.0.1:3001")


async def test_our_own_image_in_an_open_network(site: Site) -> None:
    """Its way to the proxy is the socket all the same."""
    answer = await ask(site, agent_command=("python3", "-c", ASK), network="open")

    assert answer == (200, "http://127.0.0.1:3001")


async def test_an_address_that_the_operator_chose(site: Site) -> None:
    """It is for engines elsewhere, which have no socket of ours."""
    found = [ipaddress.ip_address(name.partition("%")[0]) for name in own_addresses()]
    host = next(str(a) for a in found if a.version == 4 and not a.is_loopback)

    status, url = await ask(
        site,
        agent_command=("python3", "-c", ASK),
        network="open",
        proxy_host=host,
    )

    assert status == 200
    assert url.startswith(f"http://{host}:")


async def test_an_engine_elsewhere_cannot_have_the_socket(site: Site) -> None:
    """That is said before anything starts, with what to do."""
    (site.root / ".env").write_text(f"ANTHROPIC_API_KEY={SECRET}\n")
    runtime = DockerRuntime(FLAVOURS[site.runtime], image="clawtrio-agent:latest")
    with trio.fail_after(60):
        settings = attrs.evolve(site.settings(), agent="claude")
        async with open_engine(settings, runtime) as engine:
            runtime.compares_mounts = False
            with pytest.raises(NotStartedError, match="CLAWTRIO_PROXY_HOST"):
                await engine.run(group(), "ask", chat_jid="tg:1")


@pytest.mark.bwrap
async def test_bwrap_has_no_open_network(tmp_path: Path) -> None:
    """It would be the host's own: an error with a remedy, and no engine."""
    (tmp_path / "root").mkdir()
    site = Site("bwrap", tmp_path / "root")
    with nothing_left(site), pytest.raises(RuntimeUnavailableError) as caught:
        async with open_engine(site.settings(network="open")):
            pass

    assert "CLAWTRIO_NETWORK" in caught.value.remedy
