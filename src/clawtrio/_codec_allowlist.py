"""The mount allowlist's JSON -> its model, strictly.

An operator who writes ``"false"`` for false must not be taken to mean true: every type
is exact, nothing unknown or repeated is passed over, and a complaint says where it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final, NewType

import attrs
import cattrs
from cattrs.errors import ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from ._codec import camel
from ._models import AllowedRoot, MountAllowlist

#: How much of a wrong value is quoted, and how many of them are told of.
_QUOTED: Final = 60
_TOLD: Final = 10
_UNFIT: Final = re.compile("[\0-\x1f\x7f-\x9f]")
# JSON can spell half an emoji, which UTF-8 cannot: no path has one, and no file.
_HALF: Final = re.compile("[\ud800-\udfff]")


class _GivenTwice:
    """In the place of a value whose name is in its object twice: of no right type."""


def decode_allowlist(data: bytes) -> MountAllowlist:
    """Read an allowlist, in NanoClaw's format.

    Raises:
        ValueError: If it is not one; names every JSON path where it goes wrong.
    """
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise ValueError("$: must be UTF-8") from None
    except RecursionError:
        raise ValueError("$: must not be nested so deeply") from None
    except ValueError as exc:
        raise ValueError(f"$: must be JSON: {exc}") from None
    try:
        return _converter.structure(found, MountAllowlist)
    # Cattrs groups what its hooks raise, but not what the outermost one does.
    except (cattrs.BaseValidationError, ValueError) as exc:
        problems = cattrs.transform_error(exc, "$", _in_words)
        raise ValueError("; ".join(map(_path_first, problems[:_TOLD]))) from None


def encode_allowlist(allowlist: MountAllowlist) -> bytes:
    """Write an allowlist for people to edit."""
    value = {
        "allowedRoots": [
            {camel(name): part for name, part in attrs.asdict(root).items()}
            for root in allowlist.allowed_roots
        ],
        "blockedPatterns": allowlist.blocked_patterns,
        "nonMainReadOnly": allowlist.non_main_read_only,
    }
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        found[name] = _GivenTwice() if name in found else value
    return found


def _quoted(value: object) -> str:
    if isinstance(value, _GivenTwice):
        return "given twice"
    text = json.dumps(value, default=_quoted)
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."


def _in_words(exc: BaseException, _: type | None) -> str:
    if isinstance(exc, KeyError):
        return "must be there"
    if isinstance(exc, ForbiddenExtraKeysError):
        known = ", ".join(camel(field.name) for field in attrs.fields(exc.cl))
        unknown = ", ".join(map(_quoted, sorted(exc.extra_fields)))
        return f"must have no other fields than {known}: not {unknown}"
    return str(exc)


def _path_first(problem: str) -> str:
    """Put where it is before what it is, by the names that are in the file."""
    what, _, where = problem.rpartition(" @ ")
    where = re.sub("[a-z_]+", lambda match: camel(match[0]), where)
    return f"{where}: {what}"


def _exactly(kind: type, what: str) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"must be {what}, not {_quoted(value)}")
        return value

    return hook


def _text(value: Any, kind: Any) -> str:
    text: str = _string(value, kind)
    if _HALF.search(text):
        raise ValueError(f"must hold no half of a character, not {_quoted(text)}")
    return text


def _path(value: Any, kind: Any) -> str:
    path = _text(value, kind)
    if not path.startswith(("/", "~/")) and path != "~":
        raise ValueError(f"must be absolute, or begin with ~/, not {_quoted(path)}")
    if _UNFIT.search(path):
        problem = f"must hold no control characters, not {_quoted(path)}"
        raise ValueError(problem)
    return path


def _pattern(value: Any, kind: Any) -> str:
    pattern = _text(value, kind)
    # An empty one would match every path, one with a slash none.
    if not pattern or "/" in pattern:
        problem = f"must be part of one component of a path, not {_quoted(pattern)}"
        raise ValueError(problem)
    return pattern


def _description(value: Any, kind: Any) -> str | None:
    return None if value is None else _text(value, kind)


def _list_of(kind: Any) -> Callable[[Any, Any], Any]:
    check = _exactly(list, "an array")
    return lambda value, _: _converter.structure(check(value, _), list[kind])


def _object(cls: type[attrs.AttrsInstance], **fields: Any) -> Callable[[Any, Any], Any]:
    """Make what reads *cls*, each of its fields by the hook of that name."""
    names = {
        name: override(rename=camel(name), struct_hook=hook)
        for name, hook in fields.items()
    }
    # Stubs know only overrides that are given one by one.
    read = make_dict_structure_fn(cls, _converter, **names)  # type: ignore[arg-type]
    check = _exactly(dict, "an object")
    return lambda value, kind: read(check(value, kind), kind)


_string: Final = _exactly(str, "text")
_flag: Final = _exactly(bool, "true or false")
_Pattern = NewType("_Pattern", str)

_converter: Final = cattrs.Converter(forbid_extra_keys=True)
_converter.register_structure_hook(_Pattern, _pattern)
_converter.register_structure_hook(
    AllowedRoot,
    _object(AllowedRoot, path=_path, allow_read_write=_flag, description=_description),
)
_converter.register_structure_hook(
    MountAllowlist,
    _object(
        MountAllowlist,
        allowed_roots=_list_of(AllowedRoot),
        blocked_patterns=_list_of(_Pattern),
        non_main_read_only=_flag,
    ),
)
