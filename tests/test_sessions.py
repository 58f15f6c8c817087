"""What a group's agent keeps between runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from clawtrio import Group, Settings, UnsafePathError
from clawtrio._groups import Places, open_places
from clawtrio._hostfs import Directory
from clawtrio._sessions import open_claude, open_runner_copy

from .helpers import open_descriptors

GROUP = Group("Family", "family")


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Count descriptors: none may be left, whatever happened."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a root."""
    path = tmp_path / "bot"
    path.mkdir()
    return path


@pytest.fixture
def places(root: Path) -> Iterator[Places]:
    """Hold the places of a root."""
    with open_places(Settings(root=str(root))) as places:
        yield places


@pytest.fixture
def claude(root: Path) -> Path:
    """Where the group's .claude is going to be."""
    return root / "data" / "sessions" / "family" / ".claude"


def prepare(places: Places, skills: Sequence[Path] = ()) -> None:
    open_claude(places, GROUP, skills).close()


def make_skill(source: Path, name: str, text: str) -> Path:
    skill = source / name
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text(text)
    return skill


def test_settings_are_made_once(places: Places, claude: Path) -> None:
    """A new group gets the three settings; what becomes of them is not ours."""
    prepare(places)

    assert (claude / "settings.json").read_text() == (
        "{\n"
        '  "env": {\n'
        '    "CLAUDE_CODE_EXPERIMENTAL_AGENT_TEAMS": "1",\n'
        '    "CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD": "1",\n'
        '    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "0"\n'
        "  }\n"
        "}\n"
    )
    (claude / "settings.json").write_text("{}")
    prepare(places)
    assert (claude / "settings.json").read_text() == "{}"


def test_what_is_made_is_the_agents(places: Places, claude: Path, root: Path) -> None:
    """It can write in all of its .claude, and in nothing above."""
    source = root / "container" / "skills"
    make_skill(source, "one", "1")
    prepare(places, [source])

    expected = places.owner.uid if os.geteuid() == 0 else os.geteuid()
    made = [claude, *claude.rglob("*")]
    assert len(made) == 5
    assert {path.stat().st_uid for path in made} == {expected}
    assert claude.parent.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "dangling"])
def test_settings_of_a_wrong_type_are_replaced(
    places: Places, claude: Path, tmp_path: Path, kind: str
) -> None:
    """Whatever an agent puts in their place, nothing outside is touched."""
    outside = tmp_path / "outside"
    outside.write_text("outside")
    claude.mkdir(parents=True)
    settings = claude / "settings.json"
    if kind == "fifo":
        os.mkfifo(settings)
    elif kind == "directory":
        settings.mkdir()
    else:
        settings.symlink_to(outside if kind == "symlink" else tmp_path / "made")

    prepare(places)

    assert not settings.is_symlink()
    assert "env" in json.loads(settings.read_text())
    assert outside.read_text() == "outside"
    assert not (tmp_path / "made").exists()


def test_skills_are_synced(
    places: Places, claude: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The later source wins; what the agent has added stays, what it changed not."""
    package, own = tmp_path / "package", tmp_path / "own"
    make_skill(package, "one", "package")
    make_skill(package, "two", "package")
    make_skill(own, "two", "own")
    (package / "README").write_text("no skill")
    (own / "linked").symlink_to(make_skill(tmp_path, "elsewhere", "linked"))
    (own / "two" / "leak").symlink_to(own / "two" / "SKILL.md")
    skills = claude / "skills"
    prepare(places, [package, tmp_path / "missing", own])
    make_skill(skills, "learned", "agent")
    (skills / "one" / "SKILL.md").write_text("changed")
    (skills / "one" / "notes").write_text("agent")

    prepare(places, [package, tmp_path / "missing", own])

    found = {
        str(path.relative_to(skills)): path.read_text()
        for path in skills.rglob("*")
        if path.is_file()
    }
    assert found == {
        "one/SKILL.md": "package",
        "one/notes": "agent",
        "two/SKILL.md": "own",
        "learned/SKILL.md": "agent",
    }
    # An agent could have its say in where they lead.
    assert caplog.text.count("linked is a symlink: left out") == 2


@pytest.mark.parametrize("place", ["skills", "skills/one", "skills/one/SKILL.md"])
def test_a_symlink_does_not_lead_the_sync_outside(
    places: Places, claude: Path, tmp_path: Path, place: str
) -> None:
    """At any level, an agent's symlink is moved away or replaced."""
    source = tmp_path / "source"
    make_skill(source, "one", "1")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "SKILL.md").write_text("outside")
    link = claude / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "SKILL.md" if place.endswith("md") else outside)

    prepare(places, [source])

    assert (claude / "skills" / "one" / "SKILL.md").read_text() == "1"
    assert not link.is_symlink()
    assert [path.name for path in outside.iterdir()] == ["SKILL.md"]
    assert (outside / "SKILL.md").read_text() == "outside"


def test_a_claude_that_is_no_directory_is_the_operators(
    places: Places, claude: Path, tmp_path: Path
) -> None:
    """No agent can put anything there, so it is an error, and is left alone."""
    claude.parent.mkdir(parents=True)
    claude.symlink_to(tmp_path)

    with pytest.raises(UnsafePathError, match="must be a directory"):
        prepare(places)

    assert claude.is_symlink()


def test_a_source_that_cannot_be_read_leaks_nothing(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the sync comes out, and what was opened is closed."""
    make_skill(tmp_path / "source", "one", "1")

    def refuse(*_: object, **__: object) -> bytes:
        raise UnsafePathError("SKILL.md", "cannot be read: Permission denied")

    monkeypatch.setattr(Directory, "read", refuse)

    with pytest.raises(UnsafePathError, match="cannot be read"):
        prepare(places, [tmp_path / "source"])


def test_the_runner_is_copied_once(places: Places, root: Path, tmp_path: Path) -> None:
    """The group's copy is the agent's to change, and is not made anew."""
    source = tmp_path / "runner"
    source.mkdir()
    (source / "__main__.py").write_text("1")
    copy = root / "data" / "sessions" / "family" / "agent-runner-src"

    with open_runner_copy(places, GROUP, source) as opened:
        assert opened.path == str(copy)
        assert opened.read("__main__.py") == b"1"
    (copy / "__main__.py").write_text("changed")
    open_runner_copy(places, GROUP, source).close()

    assert (copy / "__main__.py").read_text() == "changed"
    assert [path.name for path in copy.parent.iterdir()] == ["agent-runner-src"]
