"""Tests of bots need what the bots need: without it, they cannot be imported."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("triogram") else ["test_telegram.py"]
