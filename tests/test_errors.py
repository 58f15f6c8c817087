"""What clawtrio raises on purpose."""

from __future__ import annotations

import pickle

import pytest

import clawtrio
from clawtrio import ClawtrioError

ERRORS = [
    (clawtrio.SettingsError("pids", "must be at least 1"), "pids: must be at least 1"),
    (
        clawtrio.GroupFolderError("a b", "is wrong"),
        "group folder 'a b': is wrong",
    ),
    (
        clawtrio.AllowlistError("/a\nb", "$: must be an object"),
        "'/a\\nb': $: must be an object",
    ),
    (clawtrio.UnsafePathError("/a\nb", "is a FIFO"), "'/a\\nb': is a FIFO"),
    (clawtrio.CredentialsError("no key", "Set it."), "no key. Set it."),
    (
        clawtrio.RuntimeUnavailableError("docker", "is down", "Start it."),
        "docker: is down. Start it.",
    ),
    (clawtrio.NotStartedError("no process"), "no process"),
    (clawtrio.GroupBusyError("main"), "group 'main' has a live run already"),
    (clawtrio.RunClosedError("1f"), "run 1f takes no more follow-ups"),
    (clawtrio.FollowUpRefusedError("no room"), "no room"),
]


@pytest.mark.parametrize(("error", "text"), ERRORS, ids=lambda e: type(e).__name__)
def test_an_error_says_in_one_line_what_its_fields_hold(
    error: ClawtrioError, text: str
) -> None:
    """People read the fields in words, and text that others chose only quoted."""
    assert str(error) == text


@pytest.mark.parametrize("error", [error for error, _ in ERRORS], ids=repr)
def test_an_error_survives_pickling(error: ClawtrioError) -> None:
    """An error that crosses processes keeps its type, fields and words."""
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert copy.args == error.args
    assert str(copy) == str(error)


def test_one_except_clause_catches_them_all() -> None:
    """Every error is a ClawtrioError, and no kind of another one's."""
    kinds = [type(error) for error, _ in ERRORS]

    assert all(kind.__bases__ == (ClawtrioError,) for kind in kinds)


def test_errors_are_told_apart_by_identity() -> None:
    """Two errors with the same words are two, and can be in a set or a note."""
    one, other = clawtrio.GroupBusyError("main"), clawtrio.GroupBusyError("main")
    one.add_note("at noon")

    assert len({one, other}) == 2


def test_a_field_can_be_read_instead_of_parsing() -> None:
    """Each error carries what it is about."""
    assert clawtrio.SettingsError("pids", "x").field == "pids"
    assert clawtrio.UnsafePathError("/a", "x").path == "/a"
    assert clawtrio.GroupFolderError(7, "x").folder == 7
    assert clawtrio.RuntimeUnavailableError("r", "x", "y").remedy == "y"
