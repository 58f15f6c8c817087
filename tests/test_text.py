"""Text that an agent chose, on a terminal or in a log line."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, strategies as st

from clawtrio._text import one_line, printable

# Explicit direction, by its Unicode class; the marks have none of those.
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MARKS = {"\u200e", "\u200f", "\u061c"}

# Every character that matters, and many that do not.
_texts = st.text(
    st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"]) | st.characters()
)


def _is_unfit(character: str) -> bool:
    return (
        unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}
        or unicodedata.bidirectional(character) in _BIDI
        or character in _MARKS
    )


@given(text=_texts)
@example(text="\x1b]0;owned\x07")
@example(text="\x9b31m")
@example(text="\ud83d")
def test_nothing_reaches_a_terminal_that_moves_or_reorders(text: str) -> None:
    """No control character but newline and tab is left, and no bidi override."""
    assert {c for c in printable(text) if _is_unfit(c)} <= {"\n", "\t"}
    assert {c for c in one_line(text) if _is_unfit(c)} == set()


@given(text=_texts)
def test_one_record_is_one_line(text: str) -> None:
    """Whatever an agent says, it cannot begin a line of a log."""
    assert len(one_line(text).splitlines()) <= 1
    assert isinstance(one_line(text).encode(), bytes)


@given(text=_texts)
def test_escaping_twice_is_escaping_once(text: str) -> None:
    """What is fit stays as it is."""
    assert printable(printable(text)) == printable(text)
    assert one_line(one_line(text)) == one_line(text)
    assert one_line(printable(text)) == one_line(text)


@given(text=_texts)
def test_only_what_is_unfit_is_changed(text: str) -> None:
    """The rest of a text comes through, character by character."""

    assert printable(text) == "".join(printable(c) for c in text)
    assert one_line(text) == "".join(one_line(c) for c in text)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\r\x00\x7f\x85", "\\r\\x00\\x7f\\x85"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2066\u2069\u200f", "\\u2066\\u2069\\u200f"),
        ("\u2028", "\\u2028"),
        ("\U000e0041", "\\U000e0041"),
        ("\udcff", "\\udcff"),
        ("Gr\u00fc\u00dfe \U0001f468\u200d\U0001f469\u200d\U0001f467", None),
        ("\u05e9\u05dc\u05d5\u05dd \u4f60\u597d", None),
        ("[bold]not markup[/nope]", None),
        ("", None),
    ],
)
def test_what_is_escaped(text: str, escaped: str | None) -> None:
    """An escape is a Python one; letters of all scripts, emoji and markup stay."""
    assert printable(text) == (text if escaped is None else escaped)


def test_newlines_and_tabs_are_escaped_in_a_line() -> None:
    """One line shows where others began."""
    assert one_line("a\tb\nc") == "a\\tb\\nc"
