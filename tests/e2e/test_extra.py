"""Additional mounts, as the agent in a real container finds them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import trio

from clawtrio import (
    AdditionalMount,
    ContainerConfig,
    Ending,
    Group,
    RunResult,
    Settings,
    open_engine,
)

from .conftest import Site

#: Says what is in each additional mount, and in which of them a file can be made.
LIST = """
hear()
found = {}
for place, directories, files in os.walk("/workspace/extra"):
    for name in files:
        with open(os.path.join(place, name)) as file:
            found[os.path.relpath(place, "/workspace/extra")] = file.read()
written = []
for name in list(found):
    try:
        open(f"/workspace/extra/{name}/by-agent", "w").close()
        written.append(name)
    except OSError:
        pass
emit(json.dumps([found, written]))
"""

NAMES = ("plain", "a:b", "a,b", 'quo"te', " space ", "é😀", "-rf", "n" * 255)
#: What no runtime may be told, since some would mount another directory.
REFUSED = (b"a\nb", b"a\rb", b"a\xffb", b"\x7f")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that may be granted, with a file in each of those in it."""
    place = tmp_path / "shared"
    for name in NAMES:
        directory = place / name
        directory.mkdir(parents=True)
        (directory / "it").write_text(name)
        os.chown(directory, 1000, 1000)
    for raw in REFUSED:
        Path(os.fsdecode(os.fsencode(place) + b"/" + raw)).mkdir()
    allowlist = {
        "allowedRoots": [{"path": str(place), "allowReadWrite": True}],
        "blockedPatterns": ["blocked"],
        "nonMainReadOnly": True,
    }
    (tmp_path / "list.json").write_text(json.dumps(allowlist))
    return place


def settings_of(site: Site, shared: Path, agent: str = LIST) -> Settings:
    return site.settings(agent, allowlist_path=shared.parent / "list.json")


def group_with(*mounts: AdditionalMount, is_main: bool = False) -> Group:
    config = ContainerConfig(additional_mounts=mounts)
    return Group("Chat", "chat", is_main=is_main, container_config=config)


async def ask(site: Site, shared: Path, group: Group) -> RunResult:
    with trio.fail_after(30):
        async with open_engine(settings_of(site, shared)) as engine:
            return await engine.run(group, "look", chat_jid="tg:1")


@pytest.mark.parametrize("is_main", [True, False])
async def test_what_is_granted(site: Site, shared: Path, *, is_main: bool) -> None:
    """Whatever its name, it is there; to write in for main alone, and on demand."""
    mounts = [
        AdditionalMount(str(shared / name), f"{number}", readonly=number % 2 == 0)
        for number, name in enumerate(NAMES)
    ]

    result = await ask(site, shared, group_with(*mounts, is_main=is_main))

    assert result.refused_mounts == ()
    found, written = json.loads(result.result or "")
    assert found == {str(number): name for number, name in enumerate(NAMES)}
    odd = [str(number) for number in range(1, len(NAMES), 2)]
    assert sorted(written) == (odd if is_main else [])
    assert {(shared / NAMES[1] / "by-agent").exists()} == {is_main}


async def test_odd_container_paths(site: Site, shared: Path) -> None:
    """So is it under an odd name of its own; what leads elsewhere is refused."""
    targets = ("a:b", "c,d", "e/f", "ü", 'g"h')
    bad = ("../up", "/etc", "e", "e/f/g", "x\ny", "", "a/../../b")
    mounts = [
        AdditionalMount(str(shared / "plain"), target) for target in (*targets, *bad)
    ]

    result = await ask(site, shared, group_with(*mounts))

    found, _ = json.loads(result.result or "")
    # An empty one is as good as none.
    assert found == dict.fromkeys((*targets, "plain"), "plain")
    refused = [mount.container_path for mount, _ in result.refused_mounts]
    assert refused == [name for name in bad if name]


async def test_what_is_refused(site: Site, shared: Path, tmp_path: Path) -> None:
    """Ambiguous names, other places, and what a symlink leads to: not there."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "it").write_text("outside")
    (shared / "link").symlink_to(tmp_path / "outside")
    (shared / "blocked").mkdir()
    sources = [os.fsdecode(os.fsencode(shared) + b"/" + raw) for raw in REFUSED]
    sources += [str(shared / name) for name in ("link", "blocked", "missing")]
    sources += ["/proc", "/etc", str(site.root), str(site.root / "data"), "~"]
    mounts = [AdditionalMount(source, f"{n}") for n, source in enumerate(sources)]

    result = await ask(site, shared, group_with(*mounts))

    assert result.status == "success"
    assert json.loads(result.result or "") == [{}, []]
    assert [mount for mount, _ in result.refused_mounts] == mounts
    assert all(reason and "\n" not in reason for _, reason in result.refused_mounts)


async def test_swapped_in_a_tight_loop(
    site: Site, shared: Path, tmp_path: Path
) -> None:
    """Whenever a source is swapped, the agent never sees what was not granted."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "it").write_text("secret")
    source = shared / "source"
    source.mkdir()
    (source / "it").write_text("granted")
    done = threading.Event()

    def swap() -> None:
        while not done.wait(0.001):
            source.rename(shared / "away")
            source.symlink_to(secret)
            done.wait(0.001)
            source.unlink()
            (shared / "away").rename(source)

    group = group_with(AdditionalMount(str(source), "x"))
    seen = set()
    with trio.fail_after(90):
        async with (
            open_engine(settings_of(site, shared)) as engine,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(trio.to_thread.run_sync, swap)
            try:
                for _ in range(8):
                    result = await engine.run(group, "look", chat_jid="tg:1")
                    if result.ending is Ending.NOT_STARTED:
                        seen.add("not started")
                    elif result.refused_mounts:
                        seen.add("refused")
                    else:
                        found, _ = json.loads(result.result or "")
                        seen.add(found["x"])
            finally:
                done.set()

    assert seen
    assert seen <= {"granted", "not started", "refused"}
