"""JSON <-> models, and the only place where names are camelCase.

What comes from an agent is read with tolerance, since an answer is never lost for its
shape; what goes to it is written strictly, one compact line a value.

:func:`decode_output` has two ways to the same value. The fast one is msgspec's, for
what well-behaved agents write; whatever it does not like is looked at again, with
patience, by :mod:`json`. Where both accept they must agree, which a property test
watches: change one only along with the other.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final, Literal, NoReturn, cast

import attrs
import cattrs
import msgspec
from cattrs.gen import make_dict_unstructure_fn, override

from ._models import AgentOutput, AvailableGroup, ScheduledTask, Status

#: Session ids end up in files, argv and logs. Claude's are UUIDs, 36 characters.
_MAX_SESSION_ID: Final = 256

#: In every acceptable output is one of these, since nothing else can escape a letter.
STATUS_SIGNS: Final = (b'"success"', b'"error"', b"\\u")

# What has none, or is no JSON object, is not worth a decoder's time.
_STATUS: Final = re.compile(b"|".join(map(re.escape, STATUS_SIGNS)))
_OBJECT: Final = re.compile(rb"[ \t\r\n]*\{")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

#: What NanoClaw's snapshot holds of a task, in its order.
_TASK_FIELDS: Final = (
    *("id", "group_folder", "prompt", "schedule_type", "schedule_value"),
    *("status", "next_run"),
)

#: The line that asks an agent to finish its turn, then leave with 0.
CLOSE: Final = b'{"type":"close"}'


@attrs.frozen
class ContainerInput:
    """What an agent is told when it starts: the first line of its stdin.

    Attributes:
        prompt: The text to answer; its number is 0.
        session_id: The session to resume, if any.
        group_folder: The group's folder name.
        chat_jid: The chat that the prompt came from.
        is_main: Whether the group is the main one.
        is_scheduled_task: Whether a schedule asks, not a person; None leaves it unsaid.
        assistant_name: What the agent is called.
        lifeline: Whether further lines follow, and end of file means that the host is
            gone.
    """

    prompt: str
    session_id: str | None
    group_folder: str
    chat_jid: str
    is_main: bool
    is_scheduled_task: bool | None = None
    assistant_name: str | None = None
    lifeline: bool = False


class _WireOutput(msgspec.Struct, rename="camel", gc=False):
    """An output as well-behaved agents write it. Fields in AgentOutput's order."""

    status: Literal["success", "error"]
    result: str | None = None
    new_session_id: str | None = None
    error: str | None = None
    partial: bool | None = False
    answers: int | None = None


_decoder: Final = msgspec.json.Decoder(_WireOutput)
_REFUSALS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_output(data: bytes | bytearray | memoryview) -> AgentOutput | None:
    """Read one output, if *data* is an acceptable one.

    That is a JSON object whose ``status`` is ``"success"`` or ``"error"``. Unknown
    fields are ignored, and null is as good as absent. So is a field of a wrong type,
    but a ``result`` that is neither text nor null is kept as its JSON text. Invalid
    UTF-8 and lone surrogates become U+FFFD.

    Returns:
        The output; or None if it is not acceptable, or too much for a decoder: nested
        too deeply, or with an integer of thousands of digits.
    """
    try:
        wire = _decoder.decode(data)
    except _REFUSALS:
        return _decode_patiently(data)
    return AgentOutput(
        wire.status,
        wire.result,
        _session_id(wire.new_session_id) if wire.new_session_id else None,
        wire.error,
        wire.partial is True,
        wire.answers,
    )


def _decode_patiently(data: bytes | bytearray | memoryview) -> AgentOutput | None:
    if not (_OBJECT.match(data) and _STATUS.search(data)):
        return None
    try:
        wire = json.loads(
            str(data, "utf-8", "replace"),
            parse_float=_nearest_float,
            parse_constant=_refuse_constant,
        )
        status = wire.get("status")
        if status not in ("success", "error"):
            return None
        result = wire.get("result")
        if result is not None and not isinstance(result, str):
            result = json.dumps(result, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    answers = wire.get("answers")
    return AgentOutput(
        cast("Status", status),
        _text(result),
        _session_id(_text(wire.get("newSessionId"))),
        _text(wire.get("error")),
        wire.get("partial") is True,
        answers if type(answers) is int else None,  # a bool is an int, too
    )


def _nearest_float(number: str) -> float:
    # 1e999 is JSON, but the infinity that Python makes of it is not.
    limit = sys.float_info.max
    return max(-limit, min(float(number), limit))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _text(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    return well_formed(value) if _SURROGATE.search(value) else value


def _session_id(value: str | None) -> str | None:
    if value and len(value) <= _MAX_SESSION_ID and value.isprintable():
        return value
    return None


def well_formed(text: str) -> str:
    """Replace what UTF-8 cannot say: lone surrogates, which JavaScript writes."""
    # UTF-16 joins the halves of a pair, and leaves only the lone ones to replace.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def encode_input(value: ContainerInput) -> bytes:
    """Write the first line of an agent's stdin, without its newline."""
    return _line(_converter.unstructure(value))


def encode_message(
    id: int,  # noqa: A002 - the wire's name for it
    text: str,
) -> bytes:
    """Write the line of a follow-up, without its newline.

    Args:
        id: Its number, which an output may name in ``answers``.
        text: What to ask.
    """
    return _line({"type": "message", "id": id, "text": text})


def encode_tasks(tasks: Iterable[ScheduledTask]) -> bytes:
    """Write the snapshot of tasks, as NanoClaw does: one of its names is camelCase."""
    shown = []
    for task in tasks:
        fields = attrs.asdict(task)
        names = {name: name for name in _TASK_FIELDS} | {"group_folder": "groupFolder"}
        shown.append({wire: fields[name] for name, wire in names.items()})
    return _document(shown)


def encode_groups(groups: Iterable[AvailableGroup], synced: datetime) -> bytes:
    """Write the snapshot of available groups, as of *synced*, an aware time."""
    moment = synced.astimezone(UTC).isoformat(timespec="milliseconds")
    return _document(
        {
            "groups": _converter.unstructure(list(groups)),
            "lastSync": moment.replace("+00:00", "Z"),
        }
    )


def output_to_wire(output: AgentOutput) -> dict[str, Any]:
    """Name an output's fields as an agent does, without None but for ``result``."""
    return cast("dict[str, Any]", _converter.unstructure(output))


def _line(value: object) -> bytes:
    return _utf8(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _document(value: object) -> bytes:
    return _utf8(json.dumps(value, ensure_ascii=False, indent=2))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return well_formed(text).encode()


def camel(name: str) -> str:
    """Name a field as the wire does."""
    first, *others = name.split("_")
    return first + "".join(map(str.title, others))


def _wire_hook(
    cls: type[attrs.AttrsInstance], keep: Callable[[str, object], bool]
) -> Callable[[Any], dict[str, Any]]:
    """Make what writes *cls*: camelCase, and only the fields that *keep* wants."""
    names = {f.name: override(rename=camel(f.name)) for f in attrs.fields(cls)}
    # Stubs know only overrides that are given one by one.
    write = make_dict_unstructure_fn(cls, _converter, **names)  # type: ignore[arg-type]

    def hook(value: Any) -> dict[str, Any]:
        return {name: part for name, part in write(value).items() if keep(name, part)}

    return hook


def _keep_input(name: str, value: object) -> bool:
    return value is not None and (name != "lifeline" or value is True)


def _keep_output(name: str, value: object) -> bool:
    return value is not None or name == "result"


_converter: Final = cattrs.Converter()
_converter.register_unstructure_hook(
    ContainerInput, _wire_hook(ContainerInput, _keep_input)
)
_converter.register_unstructure_hook(AgentOutput, _wire_hook(AgentOutput, _keep_output))
_converter.register_unstructure_hook(
    AvailableGroup, _wire_hook(AvailableGroup, lambda _name, _value: True)
)
