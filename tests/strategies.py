"""What the property tests are fed with."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from .oracle import END, START


@st.composite
def chunked(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> list[bytes]:
    """Cut what *source* gives into chunks, none of them empty."""
    data = draw(source)
    cuts = sorted(draw(st.sets(st.integers(0, len(data)))))
    edges = zip([0, *cuts], [*cuts, len(data)], strict=True)
    return [data[i:j] for i, j in edges if i < j]


# Of few characters, those that matter to someone on the way.
_texts = st.text(
    'ab \t\n\r\x00\x7f"\\/-{}[]:,\u00e9\u2028\ufeff\U0001f600', max_size=8
) | st.sampled_from(["", "hi", "\u00e9\U0001f600", "\x00\x1f", "a" * 256, "a" * 257])
_lone = st.sampled_from(["\ud83d", "x\ude00\ud83d", "\ud83d\ude00", "\ud83dA"])
#: Texts that an agent may say about the markers, or with broken emoji.
texts = _texts | _lone | st.sampled_from([f"\n{m.decode()}\n" for m in (START, END)])

_leaves = (
    texts
    | st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(2**64), 0.5, -0.0, 1e300])
)
json_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=6,
)

_NAMES = ("status", "result", "newSessionId", "error", "partial", "answers", "x")


@st.composite
def _members(draw: st.DrawFn) -> str:
    """Write the inside of an object: names may repeat, and anything may be escaped."""
    members = []
    statuses = st.sampled_from(["success", "error"])
    fields: list[tuple[str, Any]] = draw(
        st.lists(st.tuples(st.sampled_from(_NAMES), json_values), max_size=5)
    )
    if draw(st.integers(0, 9)):
        fields.insert(draw(st.integers(0, len(fields))), ("status", draw(statuses)))
    for name, value in fields:
        ascii_only = draw(st.booleans())
        key = json.dumps(name)
        if not draw(st.integers(0, 9)):
            key = f'"\\u{ord(name[0]):04x}{name[1:]}"'
        text = json.dumps(value, ensure_ascii=ascii_only)
        gap = draw(st.sampled_from(["", "", " ", "\t"]))
        members.append(f"{key}{gap}:{gap}{text}")
    return draw(st.sampled_from([",", ", "])).join(members)


#: JSON objects, most of them with a status, as bytes that may not be UTF-8.
objects = _members().map(lambda m: f"{{{m}}}".encode(errors="surrogatepass"))

#: What is nearly an object, or one that few would write.
oddities = st.sampled_from(
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"success"',
        b'{"status":"success"',
        b'"result":"x"}',
        b'{"status":"success"}{"status":"error"}',
        b'\xef\xbb\xbf{"status":"success"}',
        b' \t\r\n{"status":"success"} \r\n\t',
        b'\x0b{"status":"success"}',
        b'{"status":"success"}\x0c',
        b'{"status":"success",}',
        b'{"status":"success"\n,"result":"x"}',
        b'{"status":"success","result":NaN}',
        b'{"status":"success","x":-Infinity}',
        b'{"status":"success","result":1.50}',
        b'{"status":"success","result":"\xff\xed\xa0\x80\xc3"}',
        b'{"status":"success","result":"a\nb"}',
        b'{"status":"success","result":"\x7f\\/"}',
        b'{"status":"success","x":"\\x"}',
        b'{"status":"success","answers":1.0}',
        b'{"status":"success","answers":1e2}',
        b'{"status":"success","answers":01}',
        b'{"status":"success","answers":-0}',
        b'{"status":"succ\\u0065ss"}',
        b'{"status":["success"]}',
    ]
)

_pieces = (
    st.sampled_from(
        [
            START,
            END,
            b"\n",
            b"\r\n",
            b"\r",
            b"-",
            b"\n" + START,
            b"\n" + END,
            START + b"\n",
            END + b"\n",
            END + b"\r\n",
            END + b"\r",
            b"\n" + END + b"\n" + START + b"\n",
            b'{"status":"success"}',
            b'{"status":"success"}' + END + b"\n",
            b'{"status":1}' + END + b"\n",
        ]
    )
    | st.sampled_from([START, END]).flatmap(
        lambda m: st.integers(1, len(m) - 1).flatmap(
            lambda n: st.sampled_from([m[:n], m[n:], b"\n" + m[:n]])
        )
    )
    | objects
    | oddities
    | objects.map(lambda o: o + END)
    | objects.map(lambda o: START + b"\n" + o + b"\n" + END + b"\n")
    | st.binary(max_size=12)
)

#: Streams with frames, near frames and noise, dense enough to be interesting.
marker_streams = st.lists(_pieces, max_size=12).map(b"".join)

#: Limits at which such streams have frames on either side.
limits = st.integers(1, 200) | st.just(2**20)

# Few names, so that paths meet; some only once their case is folded.
_directory_names = st.sampled_from(["k1", "k2", "\u00e4", "\u00c4x", "\u00df"])
_steps = st.lists(_directory_names | st.just(".."), max_size=4)
_places = st.lists(_directory_names, min_size=1, max_size=3)


@st.composite
def mount_trees(draw: st.DrawFn) -> dict[str, Any]:
    """Draw directories, symlinks, roots, patterns and wishes; paths are lists of names.

    A link has whether its target is absolute; a root and a wish, whether one may, or
    wants to, write.
    """
    return {
        "directories": draw(st.lists(_places, min_size=1, max_size=6)),
        "links": draw(st.lists(st.tuples(_places, _steps, st.booleans()), max_size=5)),
        "roots": draw(
            st.lists(st.tuples(_steps, st.booleans()), min_size=1, max_size=3)
        ),
        "patterns": draw(
            st.lists(st.sampled_from(["\u00c4X", "sS", "K2"]), max_size=1)
        ),
        "wishes": draw(
            st.lists(st.tuples(_steps, st.booleans()), min_size=1, max_size=4)
        ),
    }
