"""The fuzzed targets under pytest: with what fuzzers found, and with chance."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from .corpus import read_corpus
from .targets import TARGETS, WORDS


def test_every_target_has_a_small_corpus_and_words() -> None:
    """What is checked in is little: 300 inputs a target, and a mebibyte in all."""
    corpora = {target: read_corpus(target) for target in TARGETS}

    assert set(WORDS) == set(TARGETS)
    assert all(1 <= len(inputs) <= 300 for inputs in corpora.values())
    assert sum(len(data) for inputs in corpora.values() for data in inputs) <= 2**20


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_holds(target: str) -> None:
    """Inputs that once led a fuzzer further lead to no error."""
    for data in read_corpus(target):
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_chance_finds_nothing(target: str, data: st.DataObject) -> None:
    """Words of a target, whole inputs and noise in any order lead to no error."""
    pieces = st.sampled_from([*WORDS[target], *read_corpus(target)])
    written = data.draw(st.lists(pieces | st.binary(max_size=4), max_size=12))

    TARGETS[target](b"".join(written))
