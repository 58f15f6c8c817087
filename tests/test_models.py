"""What a run is given and gives back."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import example, given, strategies as st

from clawtrio import (
    AdditionalMount,
    AgentOutput,
    AllowedRoot,
    ContainerConfig,
    Ending,
    Group,
    GroupFolderError,
    RunResult,
    VolumeMount,
)

# What NanoClaw allows, which was there before us, but for the reserved names.
_FIRST = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_OTHERS = _FIRST + "_-"


@pytest.mark.parametrize("folder", ["main", "a", "9", "Team_A-1", "a" * 64, "errors1"])
def test_a_folder_name_is_taken(folder: str) -> None:
    """Letters, digits, underscores and dashes make a folder name."""
    assert Group("Some", folder).folder == folder


@pytest.mark.parametrize(
    "folder",
    [
        "",
        "main\n",
        "\nmain",
        "a" * 65,
        "-a",
        "_a",
        ".",
        "..",
        ".a",
        "a.b",
        "a/b",
        "/etc",
        "a b",
        "a\0",
        "\u00e9",
        "\u0130",
        "a\u0661",
        "\u212a",
        "global",
        "GLOBAL",
        "Errors",
        None,
        7,
        b"main",
        Path("main"),
    ],
)
def test_a_folder_name_that_is_none_is_refused(folder: Any) -> None:
    """Nothing that could be another place than a group's own is a folder name."""
    with pytest.raises(GroupFolderError) as caught:
        Group("Some", folder)

    assert caught.value.folder == folder


@given(folder=st.text(max_size=70) | st.text(_OTHERS, max_size=70))
@example(folder="main\n")
@example(folder="eRRors")
def test_a_folder_name_is_what_the_rule_says(folder: str) -> None:
    """Exactly the names of the rule are taken, and others raise our error alone."""
    good = (
        1 <= len(folder) <= 64
        and folder[0] in _FIRST
        and all(character in _OTHERS for character in folder)
        and folder.casefold() not in {"global", "errors"}
    )

    try:
        Group("Some", folder)
    except GroupFolderError:
        assert not good
    else:
        assert good


def test_a_group_has_the_seed_s_defaults() -> None:
    """A name and a folder are enough to make a group, of the present moment."""
    before = datetime.now(UTC)
    group = Group("Family", "family")

    assert before <= group.added_at <= datetime.now(UTC)
    assert group == Group(
        name="Family",
        folder="family",
        trigger="@Andy",
        added_at=group.added_at,
        container_config=ContainerConfig(additional_mounts=(), timeout=None),
        requires_trigger=True,
        is_main=False,
    )


@pytest.mark.parametrize(
    "added_at",
    [
        "2026-02-03T04:05:06Z",
        "2026-02-03T05:05:06+01:00",
        datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC),
        datetime(2026, 2, 3, 5, 5, 6, tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_a_moment_is_aware_or_iso_text(added_at: datetime | str) -> None:
    """However it is written, the moment is the same."""
    group = Group("Family", "family", added_at=added_at)

    assert group.added_at == datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.mark.parametrize("added_at", ["2026-02-03T04:05:06", "yesterday", ""])
def test_a_moment_without_a_zone_is_refused(added_at: str) -> None:
    """Nobody has to guess in which zone a group was registered."""
    with pytest.raises(ValueError, match=r"time zone|isoformat"):
        Group("Family", "family", added_at=added_at)


@pytest.mark.parametrize("timeout", [0, -1, -math.inf, math.nan])
def test_a_timeout_of_a_group_is_above_zero(timeout: float) -> None:
    """A group cannot ask for no time at all."""
    with pytest.raises(ValueError, match="above 0"):
        ContainerConfig(timeout=timeout)


@pytest.mark.parametrize("timeout", [None, 0.5, 1800, math.inf])
def test_a_timeout_of_a_group_is_taken(timeout: float | None) -> None:
    """A group may have more, less, or all the time in the world."""
    assert ContainerConfig(timeout=timeout).timeout == timeout


def test_paths_are_text_whatever_they_came_as() -> None:
    """Any path-like is taken, and text is what is kept."""
    mount = AdditionalMount(Path("/a"), Path("b"))

    assert mount == AdditionalMount("/a", "b", readonly=True)
    assert AdditionalMount("/a").container_path is None
    assert VolumeMount(
        Path("/a"),
        Path("/b"),
        readonly=False,
    ) == VolumeMount("/a", "/b", readonly=False)


def test_collections_are_tuples() -> None:
    """A list of mounts cannot be changed behind a group's back."""
    mounts = [AdditionalMount("/a")]
    config = ContainerConfig(mounts)
    mounts.clear()

    assert config.additional_mounts == (AdditionalMount("/a"),)
    assert hash(Group("Family", "family", container_config=config))


def test_values_are_frozen() -> None:
    """What was checked stays as it was checked."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Group("Family", "family").folder = "../x"  # type: ignore[misc]


def test_an_output_needs_nothing_but_a_status() -> None:
    """A frame that says only how it went is a whole output."""
    assert AgentOutput("success") == AgentOutput(
        status="success",
        result=None,
        new_session_id=None,
        error=None,
        partial=False,
        answers=None,
    )


def test_endings_are_those_of_the_contract() -> None:
    """There are six ways for a run to end."""
    assert [ending.name for ending in Ending] == [
        "EXITED",
        "IDLE",
        "TIMED_OUT",
        "FAILED",
        "NOT_STARTED",
        "STOPPED",
    ]


def test_a_result_is_told_by_name() -> None:
    """A result's fields are keyword-only, so that others can be added."""
    assert all(field.kw_only for field in attrs.fields(RunResult))


def test_paths_are_text_whatever_they_were_given_as() -> None:
    """Anything like a path is taken, but bytes, which no runtime could be told."""
    mount = AdditionalMount(Path("/srv/x"), Path("y"))
    assert (mount.host_path, mount.container_path) == ("/srv/x", "y")
    assert VolumeMount(Path("/a"), "/b", readonly=True).host_path == "/a"
    assert AllowedRoot(Path("/a")).path == "/a"
    with pytest.raises(TypeError, match="must be text"):
        AdditionalMount(b"/x")  # type: ignore[arg-type]
