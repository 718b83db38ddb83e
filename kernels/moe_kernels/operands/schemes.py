"""Steps 4 and 5 of a forward: the names of the schemes in which experts are stored; `quantised_weights` says what they mean."""

from __future__ import annotations

SCHEMES = ("plain", "fp8_block", "mxfp4", "int4")
BLOCK = 128
"""Rows and columns of a block of fp8_block, and channels of a row that share a scale."""
MXFP4_GROUP = 32
INT4_GROUPS = (32, 128)
"""Columns of weights that share a scale."""


def check_scheme(scheme: str) -> None:
    """Raises ValueError unless it is one of `SCHEMES`."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r}: must be one of {SCHEMES}")
