"""What responses say they have cost, however they are cut."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from clawtrio._proxy_usage import Meter

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]
STREAM = b"".join(
    b"event: %b\ndata: %b\n\n" % (json.loads(data)["type"].encode(), data)
    for data in (
        (
            b'{"type":"message_start","message":{"usage":{"input_tokens":9,'
            b'"cache_read_input_tokens":4,"output_tokens":1}}}'
        ),
        b'{"type":"content_block_delta","delta":{"text":"the \\"usage\\""}}',
        b'{"type":"ping"}',
        b'{"type":"content_block_delta","delta":{"text":"\xe2\x80\xa6"}}',
        b'{"type":"message_delta","usage":{"output_tokens":40,"input_tokens":9}}',
        b'{"type":"message_delta","usage":{"output_tokens":42}}',
        b'{"type":"message_stop"}',
    )
)


def counted(*chunks: bytes, headers: list[tuple[bytes, bytes]] = SSE) -> dict[str, int]:
    """Return what a response of these chunks adds."""
    totals: Counter[str] = Counter()
    meter = Meter(headers, totals)
    for chunk in chunks:
        meter.feed(chunk)
    meter.close()
    return dict(+totals)


@given(cuts=st.sets(st.integers(0, len(STREAM))))
def test_a_stream_is_counted_however_it_is_cut(cuts: set[int]) -> None:
    """Sums that the API repeats count once; chunk boundaries do not matter."""
    edges = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[i:j] for i, j in pairwise(edges)]

    assert counted(*chunks) == {
        "input_tokens": 9,
        "cache_read_input_tokens": 4,
        "output_tokens": 42,
    }


def test_a_stream_counts_while_it_comes() -> None:
    """A budget can be compared before the stream is over."""
    totals: Counter[str] = Counter(output_tokens=100)
    meter = Meter(SSE, totals)

    meter.feed(STREAM[: STREAM.index(b'{"type":"message_stop"}')])

    assert totals["output_tokens"] == 142


def test_leaving_before_the_sum_is_not_free() -> None:
    """A stream that was cut counts a token for each piece, at least."""
    cut = STREAM[: STREAM.index(b"event: message_delta")]

    assert counted(cut)["output_tokens"] == 2


def test_a_whole_response_is_counted() -> None:
    """JSON is read when it is whole; texts about usage are no usage."""
    body = json.dumps(
        {"content": [{"text": '"usage"'}], "usage": {"output_tokens": 3}}
    ).encode()

    assert counted(body[:9], body[9:], headers=JSON) == {"output_tokens": 3}


@pytest.mark.parametrize("count", ["9", True, -4, 1.5, None, [], {}])
def test_what_is_no_count_is_not_counted(count: Any) -> None:
    """A gateway may say anything."""
    for usage in ({"output_tokens": count}, count):
        body = json.dumps({"usage": usage}).encode()

        assert counted(body, headers=JSON) == {}
        assert counted(b'data: {"message":' + body + b"}\n") == {}


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b'{"message":3,"usage":{"output_tokens":1}}', b"{" * 9, b"[" * 9999],
)
def test_nonsense_is_not_counted(body: bytes) -> None:
    """Neither is what is no JSON, or no object."""
    assert counted(body, headers=JSON) == {}
    assert counted(b'data: "usage"' + body + b"\n") == {}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"content-type", b"text/plain")],
        [*JSON, (b"content-encoding", b"gzip")],
        [*SSE, (b"content-encoding", b"br")],
    ],
)
def test_other_responses_are_not_looked_at(headers: list[tuple[bytes, bytes]]) -> None:
    """What is compressed or of another kind passes uncounted."""
    assert counted(STREAM, b'{"usage":{"output_tokens":3}}', headers=headers) == {}


def test_what_is_kept_is_bounded() -> None:
    """A line or a response too long is skipped, and the next line is read."""
    meter = Meter(SSE, totals := Counter[str]())
    for _ in range(300):
        meter.feed(b"data: " + b"x" * 1000)
        assert len(meter._buffer) <= 2**16 + 1006
    meter.feed(b'"usage"\n' + STREAM)
    assert totals["output_tokens"] == 42

    whole = Meter(JSON, Counter())
    for _ in range(40):
        whole.feed(b" " * 2**16)
    assert len(whole._buffer) <= 2**21 + 2**16
    whole.close()
