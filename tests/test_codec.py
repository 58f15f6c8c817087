"""What agents may write, and what is written to them."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import example, given, strategies as st

from clawtrio._codec import (
    CLOSE,
    ContainerInput,
    _decode_patiently,
    _decoder,
    decode_output,
    encode_input,
    encode_message,
    output_to_wire,
)
from clawtrio._models import AgentOutput

from .oracle import acceptable
from .strategies import json_values, objects, oddities, texts


@given(data=st.binary() | objects | oddities)
def test_any_bytes_are_an_output_or_none(data: bytes) -> None:
    """Whatever an agent writes, it is one of two things, and never an exception."""
    assert isinstance(decode_output(data), AgentOutput | None)


@given(data=objects | oddities)
def test_the_contract_in_its_simplest_form_agrees(data: bytes) -> None:
    """An output is what the contract says it is."""
    assert decode_output(data) == acceptable(data)


@given(data=objects | oddities | st.tuples(oddities, objects, oddities).map(b"".join))
@example(data=b'{"status":"success","status":"no"}')
@example(data=b'{"status":"error","result":"a","result":null}')
@example(data=b'{"status":"success","answers":18446744073709551616}')
def test_both_ways_agree(data: bytes) -> None:
    """What the fast way accepts, the patient one reads in the same way."""
    try:
        _decoder.decode(data)
    except (ValueError, RecursionError):
        return  # DecodeError is a ValueError
    assert _decode_patiently(data) == decode_output(data)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("result", [b'"hi"', b'"\\ud83d"'])
def test_any_bytes_like_is_taken(kind: type, result: bytes) -> None:
    """Bytes are read where they are, whatever holds them."""
    output = decode_output(kind(b'{"status":"success","result":' + result + b"}"))

    assert output is not None
    assert output.result == ("hi" if result == b'"hi"' else "\ufffd")


def test_every_field() -> None:
    """A frame's fields arrive under their names, and unknown ones do not matter."""
    data = (
        b'{"status":"error","result":"r","newSessionId":"s","error":"e",'
        b'"partial":true,"answers":3,"usage":{"tokens":[1]}}'
    )

    assert decode_output(data) == AgentOutput("error", "r", "s", "e", True, 3)  # noqa: FBT003


def test_null_is_as_good_as_absent() -> None:
    """A null says nothing."""
    data = (
        b'{"status":"success","result":null,"newSessionId":null,"error":null,'
        b'"partial":null,"answers":null}'
    )

    assert decode_output(data) == AgentOutput("success")


@pytest.mark.parametrize(
    "field",
    [
        b'"newSessionId":1',
        b'"newSessionId":""',
        b'"newSessionId":"a\\nb"',
        b'"newSessionId":"' + b"a" * 257 + b'"',
        b'"error":["no"]',
        b'"partial":1',
        b'"partial":"true"',
        b'"answers":"1"',
        b'"answers":true',
        b'"answers":1.0',
    ],
)
def test_a_field_of_a_wrong_type_counts_as_absent(field: bytes) -> None:
    """What cannot be used is not used, and the answer counts all the same."""
    assert decode_output(
        b'{"status":"success","result":"hi",' + field + b"}"
    ) == AgentOutput("success", "hi")


def test_the_longest_session_id() -> None:
    """256 characters are a session id, also beyond ASCII, and repaired."""
    text = "\u00e9" * 255

    output = decode_output(
        b'{"status":"success","newSessionId":"%s\\ud83d"}' % text.encode()
    )

    assert output == AgentOutput("success", new_session_id=text + "\ufffd")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"5", "5"),
        (b"true", "true"),
        (b"0.5", "0.5"),
        (b'{"a":["\xc3\xa9",null]}', '{"a": ["\u00e9", null]}'),
        (b'["\\ud83d"]', '["\ufffd"]'),
        (b"123456789012345678901234567890", "123456789012345678901234567890"),
        (b"-1e999", repr(-sys.float_info.max)),
    ],
)
def test_a_result_of_another_type_is_kept_as_its_json(value: bytes, text: str) -> None:
    """An answer is not lost for its shape, and its text is JSON."""
    output = decode_output(b'{"status":"success","result":' + value + b"}")

    assert output == AgentOutput("success", text)
    json.loads(text)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xff", "\ufffd"),
        (b"\xe2\x82", "\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"\\ud83d", "\ufffd"),
        (b"\\ude00\\ud83d", "\ufffd\ufffd"),
        (b"\\ud83d\\ude00", "\U0001f600"),
        (b"\\ud83d\\ud83d\\ude00", "\ufffd\U0001f600"),
    ],
)
def test_broken_text_is_repaired(raw: bytes, text: str) -> None:
    """Invalid UTF-8 and lone surrogates become U+FFFD; the rest of the text stays."""
    output = decode_output(
        b'{"status":"error","result":"a%sb","error":"a%sb"}' % (raw, raw)
    )

    assert output == AgentOutput("error", f"a{text}b", error=f"a{text}b")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"status":"done"}',
        b'{"status":null,"result":"success"}',
        b'{"status":["success"]}',
        b'\xef\xbb\xbf{"status":"success"}',
        b'{"status":"success","x":NaN}',
        b'{"status":"success","result":Infinity}',
        b'{"status":"success","result":' + b"9" * 5000 + b"}",
        b'{"status":"success","result":' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        b'{"status":"success","x":' + b'{"":' * 10**5 + b"1" + b"}" * 10**5 + b"}",
        b"\xff\xfe{\0",
    ],
)
def test_what_is_not_acceptable(data: bytes) -> None:
    """No object, no status, no JSON, or too much for a decoder: no output."""
    assert decode_output(data) is None


def test_the_whole_input() -> None:
    """The first line of stdin says all there is to say, in camelCase."""
    line = encode_input(
        ContainerInput(
            prompt="hi\nthere",
            session_id="s",
            group_folder="family",
            chat_jid="tg:42",
            is_main=True,
            is_scheduled_task=False,
            assistant_name="Andy",
            lifeline=True,
        )
    )

    assert line == (
        b'{"prompt":"hi\\nthere","sessionId":"s","groupFolder":"family",'
        b'"chatJid":"tg:42","isMain":true,"isScheduledTask":false,'
        b'"assistantName":"Andy","lifeline":true}'
    )


def test_the_least_input() -> None:
    """What is not given is not written."""
    line = encode_input(ContainerInput("hi", None, "family", "tg:42", is_main=False))

    assert line == (
        b'{"prompt":"hi","groupFolder":"family","chatJid":"tg:42","isMain":false}'
    )


@given(text=texts, number=st.integers(0))
@example(text="\u2028\x00", number=0)
def test_a_message_is_one_line_whatever_its_text(text: str, number: int) -> None:
    """A follow-up arrives on one line, its text as it was but for lone surrogates."""
    line = encode_message(number, text)
    value = json.loads(line)

    assert b"\n" not in line
    assert value == {"type": "message", "id": number, "text": value["text"]}
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert value["text"] == text


def test_lone_surrogates_of_a_caller_are_replaced() -> None:
    """A broken emoji in a prompt is no reason to fail; halves of a whole one join."""
    text = "a\ud83db \ud83d\ude00"

    assert json.loads(encode_message(1, text))["text"] == "a\ufffdb \U0001f600"
    line = encode_input(ContainerInput(text, None, "f", "j", is_main=False))
    assert json.loads(line)["prompt"] == "a\ufffdb \U0001f600"


def test_the_closing_line() -> None:
    """The line that ends a session is one constant."""
    assert json.loads(CLOSE) == {"type": "close"}


def test_an_output_on_the_wire() -> None:
    """What is None is left out, but a result is always there."""
    assert output_to_wire(AgentOutput("success")) == {
        "status": "success",
        "result": None,
        "partial": False,
    }
    assert output_to_wire(AgentOutput("error", "r", "s", "e", answers=0)) == {
        "status": "error",
        "result": "r",
        "newSessionId": "s",
        "error": "e",
        "partial": False,
        "answers": 0,
    }


@given(value=json_values, session_id=st.none() | st.just("s"))
def test_an_output_comes_back_from_the_wire(
    value: object, session_id: str | None
) -> None:
    """What is written as an agent writes it is read as the same."""
    wire = {"status": "success", "result": value, "newSessionId": session_id}
    output = decode_output(json.dumps(wire).encode())
    assert output is not None

    assert decode_output(json.dumps(output_to_wire(output)).encode()) == output
