"""What a container sees of the host, as the agent in it finds out by looking."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio

from clawtrio import Engine, Group, open_engine

from .conftest import Site, group

MAIN = group("main", is_main=True)
FAMILY = group("family")

#: Looks at all there is for what the test has put on the host, each time it is asked.
LOOK = """
import stat

SYSTEM = ("/proc", "/sys", "/dev", "/usr", sys.prefix, sys.base_prefix)

def look():
    seen, writable = {}, []
    for place, directories, files in os.walk("/"):
        inside = [os.path.join(place, name) for name in directories]
        directories[:] = [os.path.basename(p) for p in inside if p not in SYSTEM]
        for path in [*inside, *(os.path.join(place, name) for name in files)]:
            try:
                if os.path.isfile(path) and os.path.getsize(path) < 100_000:
                    with open(path, errors="replace") as file:
                        text = file.read()
                    if "canary" in text:
                        seen[path] = text
                elif os.path.isdir(path) and not os.path.islink(path):
                    probe = os.path.join(path, ".probe")
                    open(probe, "w").close()
                    os.remove(probe)
                    writable.append(path)
            except OSError:
                pass
    return {"seen": seen, "writable": sorted(writable), "variables": dict(os.environ)}

emit(json.dumps(look()))
hear()
while hear():
    emit(json.dumps(look()))
"""

#: A checkout of NanoClaw in use, with a canary in every file.
FILES = (
    *(".env", ".env.local", ".git/config", ".gitignore", "package.json"),
    *("src/index.ts", "store/messages.db", "store/auth/creds.json"),
    *("groups/main/CLAUDE.md", "groups/global/CLAUDE.md", "groups/family/CLAUDE.md"),
    *("groups/work/CLAUDE.md", "data/sessions/main/.claude/projects/main.jsonl"),
    *("data/sessions/family/.claude/projects/family.jsonl",),
    *("data/sessions/work/.claude/projects/work.jsonl", "data/router_state.json"),
    *("data/ipc/main/messages/1.json", "data/ipc/family/messages/1.json"),
    *("data/ipc/work/messages/1.json", "data/logs/family/old.log"),
    *("container/skills/browse/SKILL.md", "container/agent-runner/src/index.ts"),
)


@attrs.frozen
class Sight:
    """What an agent found.

    Attributes:
        seen: The files with a canary, each with its content.
        writable: The directories in which it could make a file.
        variables: Its environment.
    """

    seen: dict[str, str]
    writable: list[str]
    variables: dict[str, str]


@pytest.fixture
def checkout(site: Site, tmp_path: Path) -> Path:
    """Fill the root, and put more canaries beside it."""
    for name in FILES:
        path = site.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"canary of {name}")
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    for name in ("home/.ssh/id_rsa", "mount-allowlist.json", "neighbour"):
        (tmp_path / name).write_text(f"canary of {name}")
    # As the agents', who write in them.
    for directory in ("groups", "data/sessions", "data/ipc"):
        for path in (site.root / directory).rglob("*"):
            os.chown(path, 1000, 1000)
    return site.root


@pytest.fixture
async def engine(
    site: Site, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engine]:
    """Open an engine whose agents look around."""
    assert checkout == site.root
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "canary of the environment")
    settings = site.settings(LOOK, allowlist_path=tmp_path / "mount-allowlist.json")
    with trio.fail_after(60):
        async with open_engine(settings) as engine:
            yield engine


def sight(text: str | None) -> Sight:
    assert text is not None
    return Sight(**json.loads(text))


async def look(engine: Engine, who: Group) -> Sight:
    async with engine.open_run(who, "look", chat_jid="tg:1") as run:
        return sight((await anext(run)).result)


#: Where an agent may write, whoever it is.
OWN = {"/workspace/group", "/workspace/ipc", "/home/node", "/home/node/.claude"}
OWN |= {f"/workspace/ipc/{name}" for name in ("messages", "tasks", "input")}
OWN |= {f"/home/node/.claude/{name}" for name in ("projects", "skills")}
OWN |= {f"/home/node/.claude/skills/{name}" for name in ("browse", "scheduling")}
OWN |= {"/tmp", "/dev/shm"}


def canaries(*pairs: tuple[str, str]) -> dict[str, str]:
    return {target: f"canary of {source}" for target, source in pairs}


async def test_what_a_group_sees(engine: Engine) -> None:
    """Its own, and the global memory; nothing of another group, nothing of the host."""
    found = await look(engine, FAMILY)

    assert found.seen == canaries(
        ("/workspace/group/CLAUDE.md", "groups/family/CLAUDE.md"),
        ("/workspace/global/CLAUDE.md", "groups/global/CLAUDE.md"),
        ("/workspace/ipc/messages/1.json", "data/ipc/family/messages/1.json"),
        (
            "/home/node/.claude/projects/family.jsonl",
            "data/sessions/family/.claude/projects/family.jsonl",
        ),
        (
            "/home/node/.claude/skills/browse/SKILL.md",
            "container/skills/browse/SKILL.md",
        ),
    )
    assert set(found.writable) - {"/dev/shm"} == OWN - {"/dev/shm"}
    assert not [value for value in found.variables.values() if "canary" in value]


async def test_what_main_sees(engine: Engine) -> None:
    """Its own, and the project read-only: without secrets, history, messages, data."""
    found = await look(engine, MAIN)

    project = (
        *(".gitignore", "package.json", "src/index.ts", "groups/main/CLAUDE.md"),
        *("groups/global/CLAUDE.md", "groups/family/CLAUDE.md"),
        *("groups/work/CLAUDE.md", "container/skills/browse/SKILL.md"),
        "container/agent-runner/src/index.ts",
    )
    assert found.seen == canaries(
        *((f"/workspace/project/{name}", name) for name in project),
        ("/workspace/group/CLAUDE.md", "groups/main/CLAUDE.md"),
        ("/workspace/ipc/messages/1.json", "data/ipc/main/messages/1.json"),
        (
            "/home/node/.claude/projects/main.jsonl",
            "data/sessions/main/.claude/projects/main.jsonl",
        ),
        (
            "/home/node/.claude/skills/browse/SKILL.md",
            "container/skills/browse/SKILL.md",
        ),
    )
    assert set(found.writable) - {"/dev/shm"} == OWN - {"/dev/shm"}


async def test_what_changes_while_main_lives(engine: Engine, checkout: Path) -> None:
    """New keys, a new history and new data never come into sight."""
    async with engine.open_run(MAIN, "look", chat_jid="tg:1") as run:
        before = sight((await anext(run)).result)
        # As every renewal of a token does it.
        (checkout / ".env.new").write_text("canary of a new key")
        (checkout / ".env.new").rename(checkout / ".env")
        (checkout / ".git" / "config").write_text("canary of a new remote")
        (checkout / "data").rename(checkout / "data.old")
        (checkout / "data" / "sessions").mkdir(parents=True)
        (checkout / "data" / "sessions" / "new").write_text("canary of new data")
        (checkout / "store" / "new").write_text("canary of a new message")
        await run.send("look again")
        after = sight((await anext(run)).result)
    (checkout / "data" / "sessions" / "new").unlink()
    (checkout / "data" / "sessions").rmdir()
    (checkout / "data").rmdir()
    (checkout / "data.old").rename(checkout / "data")

    assert after.seen == before.seen


async def test_the_agent_s_files_are_its_own(engine: Engine, checkout: Path) -> None:
    """What is made for it belongs to it on the host, too, and what it makes."""
    await look(engine, FAMILY)

    made = ("settings.json", "skills", "skills/browse", "skills/browse/SKILL.md")
    claude = checkout / "data" / "sessions" / "family" / ".claude"
    assert {(claude / name).stat().st_uid for name in made} == {1000}
    assert (checkout / "data" / "sessions" / "family").stat().st_uid == 1000
