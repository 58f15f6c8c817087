"""What the operator allows: a file, read strictly, and read again when it changes."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from clawtrio import AllowedRoot, AllowlistError, MountAllowlist, Settings
from clawtrio._allowlist import (
    DEFAULT_BLOCKED_PATTERNS,
    TEMPLATE,
    AllowlistFile,
    write_template,
)
from clawtrio._codec_allowlist import decode_allowlist, encode_allowlist
from clawtrio._forbidden import Forbidden
from clawtrio._hostfs import MAX_FILE_BYTES

from .helpers import open_descriptors
from .strategies import json_values

NANOCLAW = {
    "allowedRoots": [
        {"path": "~/projects", "allowReadWrite": True, "description": "Development"},
        {"path": "/srv/docs", "allowReadWrite": False},
    ],
    "blockedPatterns": ["password", "token"],
    "nonMainReadOnly": True,
}


def data_of(**changes: Any) -> bytes:
    return json.dumps({**NANOCLAW, **changes}).encode()


def root_with(**changes: Any) -> bytes:
    return data_of(allowedRoots=[{"path": "/x", "allowReadWrite": True, **changes}])


# ---------------------------------------------------------------- the format


def test_nanoclaw_s_format_is_read() -> None:
    """A file that NanoClaw has written means the same here."""
    assert decode_allowlist(data_of()) == MountAllowlist(
        allowed_roots=[
            AllowedRoot("~/projects", True, "Development"),  # noqa: FBT003
            AllowedRoot("/srv/docs"),
        ],
        blocked_patterns=["password", "token"],
        non_main_read_only=True,
    )


def test_what_says_nothing_may_be_left_out() -> None:
    """A root needs only its path, and is then for reading."""
    data = data_of(allowedRoots=[{"path": "~", "description": None}])

    assert decode_allowlist(data).allowed_roots == (AllowedRoot("~"),)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\xff", "$: must be UTF-8"),
        (b"", "$: must be JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100_000, "$: must not be nested so deeply"),
        (b"[]", "$: must be an object, not []"),
        (b"null", "$: must be an object, not null"),
        (
            b"{}",
            (
                "$.allowedRoots: must be there; $.blockedPatterns: must be there; "
                "$.nonMainReadOnly: must be there"
            ),
        ),
        (
            root_with(allowReadWrite="false"),
            '$.allowedRoots[0].allowReadWrite: must be true or false, not "false"',
        ),
        (
            root_with(allowReadWrite=None),
            "$.allowedRoots[0].allowReadWrite: must be true or false, not null",
        ),
        (
            data_of(nonMainReadOnly=1),
            "$.nonMainReadOnly: must be true or false, not 1",
        ),
        (root_with(path=7), "$.allowedRoots[0].path: must be text, not 7"),
        (
            root_with(path="projects"),
            (
                "$.allowedRoots[0].path: must be absolute, or begin with ~/, "
                'not "projects"'
            ),
        ),
        (
            root_with(path="~other/x"),
            (
                "$.allowedRoots[0].path: must be absolute, or begin with ~/, "
                'not "~other/x"'
            ),
        ),
        (
            root_with(path="/a\0b"),
            '$.allowedRoots[0].path: must hold no control characters, not "/a\\u0000b"',
        ),
        (
            root_with(path="/\ud83d"),
            '$.allowedRoots[0].path: must hold no half of a character, not "/\\ud83d"',
        ),
        (
            root_with(description="\ud83d"),
            (
                "$.allowedRoots[0].description: must hold no half of a character, "
                'not "\\ud83d"'
            ),
        ),
        (
            data_of(blockedPatterns=["\udc80"]),
            '$.blockedPatterns[0]: must hold no half of a character, not "\\udc80"',
        ),
        (
            root_with(description=["x"]),
            '$.allowedRoots[0].description: must be text, not ["x"]',
        ),
        (
            root_with(allow_read_write=True),
            (
                "$.allowedRoots[0]: must have no other fields than path, "
                'allowReadWrite, description: not "allow_read_write"'
            ),
        ),
        (
            data_of(allowedRoots=["/x"]),
            '$.allowedRoots[0]: must be an object, not "/x"',
        ),
        (
            data_of(allowedRoots={"/x": True}),
            '$.allowedRoots: must be an array, not {"/x": true}',
        ),
        (
            data_of(blockedPatterns="password"),
            '$.blockedPatterns: must be an array, not "password"',
        ),
        (
            data_of(blockedPatterns=["a", None]),
            "$.blockedPatterns[1]: must be text, not null",
        ),
        (
            data_of(blockedPatterns=["a/b", ""]),
            (
                "$.blockedPatterns[0]: must be part of one component of a path, "
                'not "a/b"; $.blockedPatterns[1]: must be part of one component of a '
                'path, not ""'
            ),
        ),
        (
            data_of(allowedRoots="x" * 100),
            f'$.allowedRoots: must be an array, not "{"x" * 59}...',
        ),
        (
            data_of()[:-1] + b', "nonMainReadOnly": false}',
            "$.nonMainReadOnly: must be true or false, not given twice",
        ),
    ],
)
def test_a_complaint_says_where_it_is_and_what_would_be_right(
    data: bytes, complaint: str
) -> None:
    """Nothing is coerced, guessed or passed over."""
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}$"):
        decode_allowlist(data)


def test_a_few_complaints_are_enough() -> None:
    """A file that is all wrong makes no page of complaints."""
    with pytest.raises(ValueError, match="blockedPatterns") as caught:
        decode_allowlist(data_of(blockedPatterns=[1] * 1000))

    assert str(caught.value).count("; ") == 9


_parts = st.dictionaries(st.sampled_from([*NANOCLAW, "path"]), json_values)


@given(json_values | _parts | _parts.map(lambda part: {**NANOCLAW, "x": part}))
def test_anything_else_is_refused_in_words(value: object) -> None:
    """Whatever JSON it is, the complaint has a path, and no other error comes out."""
    with pytest.raises(ValueError, match=r"^\$"):
        decode_allowlist(json.dumps(value).encode())


def test_the_template_is_an_allowlist() -> None:
    """What is written to begin with can be read, and each root says what it is for."""
    assert decode_allowlist(encode_allowlist(TEMPLATE)) == TEMPLATE
    assert all(root.description for root in TEMPLATE.allowed_roots)


def test_an_allowlist_is_written_for_people() -> None:
    """It is indented by two spaces, and has letters, not their escapes."""
    allowlist = MountAllowlist(
        allowed_roots=[], blocked_patterns=["clé"], non_main_read_only=True
    )

    assert encode_allowlist(allowlist).decode().splitlines() == [
        "{",
        '  "allowedRoots": [],',
        '  "blockedPatterns": [',
        '    "clé"',
        "  ],",
        '  "nonMainReadOnly": true',
        "}",
    ]


@pytest.mark.parametrize(("size", "end"), [(58, 'x"'), (59, "x...")])
def test_a_short_value_is_quoted_whole(size: int, end: str) -> None:
    """What is wrong is quoted, up to 60 characters with its quotes."""
    with pytest.raises(ValueError, match="must be true or false") as caught:
        decode_allowlist(data_of(nonMainReadOnly="x" * size))

    assert str(caught.value).endswith(end)


def test_nanoclaw_s_patterns_are_blocked_and_all_are_small() -> None:
    """Nothing that NanoClaw blocks is open here."""
    nanoclaw = (
        ".ssh .gnupg .gpg .aws .azure .gcloud .kube .docker credentials .env .netrc "
        ".npmrc .pypirc id_rsa id_ed25519 private_key .secret"
    )

    assert set(nanoclaw.split()) <= set(DEFAULT_BLOCKED_PATTERNS)
    assert all(p == p.casefold() and "/" not in p for p in DEFAULT_BLOCKED_PATTERNS)
    assert len(set(DEFAULT_BLOCKED_PATTERNS)) == len(DEFAULT_BLOCKED_PATTERNS)


# ---------------------------------------------------------------- the file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a home of one's own."""
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    return place


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name where the allowlist is."""
    return tmp_path / "allowlist.json"


@pytest.fixture
def allowlist(tmp_path: Path, path: Path) -> AllowlistFile:
    """Have an allowlist at a place of one's own."""
    settings = Settings(root=str(tmp_path / "bot"), allowlist_path=str(path))
    return AllowlistFile(settings, Forbidden(settings))


def test_a_missing_file_is_one_warning(
    allowlist: AllowlistFile, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once that nothing is allowed, and again if the file vanishes."""
    assert allowlist.read() is None
    assert allowlist.read() is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text

    path.write_bytes(data_of())
    assert allowlist.read() is not None
    path.unlink()
    assert allowlist.read() is None
    assert allowlist.read() is None

    assert len(caplog.records) == 2


def test_a_changed_file_is_read_again(allowlist: AllowlistFile, path: Path) -> None:
    """What it says counts from the next look on; an unchanged one is not read again."""
    path.write_bytes(data_of())
    first = allowlist.read()
    assert allowlist.read() is first

    path.write_bytes(data_of(nonMainReadOnly=False))
    second = allowlist.read()
    assert second is not None
    assert second.non_main_read_only is False

    fresh = path.with_name("fresh")
    fresh.write_bytes(data_of(blockedPatterns=[]))
    fresh.rename(path)
    third = allowlist.read()
    assert third is not None
    assert third.blocked_patterns == ()


def test_a_malformed_file_is_an_error_until_it_is_mended(
    allowlist: AllowlistFile, path: Path
) -> None:
    """Each look says what is wrong with it."""
    path.write_bytes(data_of(nonMainReadOnly="no"))
    for _ in range(2):
        with pytest.raises(AllowlistError) as caught:
            allowlist.read()
        assert caught.value.path == str(path)
        assert caught.value.problem.startswith("$.nonMainReadOnly: must be")

    path.write_bytes(data_of())

    assert allowlist.read() is not None


def test_a_file_of_any_size_is_no_allowlist(
    allowlist: AllowlistFile, path: Path
) -> None:
    """A megabyte is enough, to the byte."""
    path.write_bytes(data_of().ljust(MAX_FILE_BYTES))
    assert allowlist.read() is not None
    path.write_bytes(data_of().ljust(MAX_FILE_BYTES + 1))

    with pytest.raises(AllowlistError, match=f"not be larger than {MAX_FILE_BYTES}"):
        allowlist.read()


def test_only_a_file_is_an_allowlist(allowlist: AllowlistFile, path: Path) -> None:
    """A FIFO in its place holds nobody up."""
    os.mkfifo(path)

    with pytest.raises(AllowlistError, match="must be a regular file"):
        allowlist.read()


def test_a_way_that_leads_nowhere_is_an_error(
    allowlist: AllowlistFile, path: Path
) -> None:
    """An allowlist that cannot be reached is no missing one."""
    path.symlink_to(path)

    with pytest.raises(AllowlistError, match="cannot be read: Too many levels"):
        allowlist.read()


def test_an_unreadable_file_is_an_error(
    allowlist: AllowlistFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that may not be read is told of by its name."""
    path.write_bytes(data_of())

    def refuse(*args: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)

    with pytest.raises(AllowlistError, match="cannot be read: Permission denied"):
        allowlist.read()


@pytest.mark.parametrize("mode", [0o646, 0o666])
def test_what_others_can_write_is_not_trusted(
    allowlist: AllowlistFile, path: Path, mode: int
) -> None:
    """Nobody else may say what groups see; as soon as that is mended, it counts."""
    path.write_bytes(data_of())
    path.chmod(mode)
    with pytest.raises(AllowlistError, match=r"cannot be trusted.*chmod o-w"):
        allowlist.read()

    path.chmod(0o644)

    assert allowlist.read() is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that")
def test_root_s_is_trusted_by_others(
    allowlist: AllowlistFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who runs a bot need not be who decides what its agents may see."""
    path.write_bytes(data_of())
    path.chmod(0o664)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "getegid", lambda: 12345)

    assert allowlist.read() is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that")
def test_another_user_s_is_not_trusted(allowlist: AllowlistFile, path: Path) -> None:
    """It must be our own, or root's."""
    path.write_bytes(data_of())
    os.chown(path, 12345, 12345)

    with pytest.raises(AllowlistError, match="belongs to uid 12345"):
        allowlist.read()


def test_what_an_agent_can_write_is_not_trusted(tmp_path: Path) -> None:
    """An allowlist in a group's directory is no allowlist."""
    place = tmp_path / "bot" / "groups" / "main"
    place.mkdir(parents=True)
    settings = Settings(
        root=str(tmp_path / "bot"), allowlist_path=str(place / "allowlist.json")
    )
    (place / "allowlist.json").write_bytes(data_of())

    with pytest.raises(AllowlistError, match="is where agents can write"):
        AllowlistFile(settings, Forbidden(settings)).read()


def test_nanoclaw_s_place_is_read_until_there_is_ours(
    tmp_path: Path, home: Path
) -> None:
    """Who comes from NanoClaw need not move the file."""
    settings = Settings(root=str(tmp_path))
    allowlist = AllowlistFile(settings, Forbidden(settings))
    old = home / ".config" / "nanoclaw" / "mount-allowlist.json"
    old.parent.mkdir(parents=True)
    old.write_bytes(data_of(blockedPatterns=["old"]))
    found = allowlist.read()
    assert found is not None
    assert found.blocked_patterns == ("old",)
    assert allowlist.path == str(old)

    write_template(settings.allowlist_path, force=False)

    assert allowlist.read() == TEMPLATE
    assert allowlist.path == settings.allowlist_path


@pytest.mark.parametrize("name", ["0.json", "zzz.json"])
def test_nanoclaw_s_place_is_not_for_who_has_chosen_another(
    home: Path, tmp_path: Path, name: str
) -> None:
    """A place that is set is the only one, however it is called."""
    settings = Settings(root=str(tmp_path), allowlist_path=str(home / name))
    old = home / ".config" / "nanoclaw" / "mount-allowlist.json"
    old.parent.mkdir(parents=True)
    old.write_bytes(data_of())

    assert AllowlistFile(settings, Forbidden(settings)).read() is None


def test_the_template_is_for_us_alone(tmp_path: Path) -> None:
    """Nobody else reads it, or writes in its directory."""
    path = tmp_path / "new" / "allowlist.json"

    write_template(str(path), force=False)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_the_template_replaces_nothing_unasked(path: Path) -> None:
    """An operator's own words are kept."""
    path.write_text("mine")

    with pytest.raises(FileExistsError):
        write_template(str(path), force=False)
    assert path.read_text() == "mine"

    write_template(str(path), force=True)
    assert decode_allowlist(path.read_bytes()) == TEMPLATE


def test_a_complaint_is_new_once(allowlist: AllowlistFile, path: Path) -> None:
    """What was said of a file is not said again before it changes."""
    path.write_bytes(data_of())
    allowlist.read()
    assert allowlist.first_time("x")
    assert not allowlist.first_time("x")

    path.write_bytes(data_of(blockedPatterns=[]))
    allowlist.read()

    assert allowlist.first_time("x")


def test_reading_leaves_nothing_open(allowlist: AllowlistFile, path: Path) -> None:
    """No descriptor stays behind."""
    before = open_descriptors()
    path.write_bytes(data_of())

    allowlist.read()

    assert open_descriptors() == before
