"""Fixtures of the tests of eplb."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def switch_often() -> Iterator[None]:
    """Threads change places after nearly every bytecode, so that what is not guarded by a lock shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)
