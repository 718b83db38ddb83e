"""Shared by all tests: the device, Triton's interpreter, skipping, poison, tolerances.

On a machine without CUDA the Triton kernels run in Triton's interpreter; where there is a GPU the same tests run them
natively. `TRITON_INTERPRET` counts when triton is first imported, so it is set here, before any test module is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # does not import triton
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import quicken_interpreter

    quicken_interpreter()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it

# The same examples in every run; fixtures of function scope (the device, poison) hold nothing that examples change.
settings.register_profile(
    "moe",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("moe")

# (rtol, atol) for results of unit scale, by dtype: some units in the last place, as the order of sums may differ.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needed = {"gpu": 1, "multigpu": 2}
    available = torch.cuda.device_count()
    for item in items:
        for marker, count in needed.items():
            if item.get_closest_marker(marker) and available < count:
                item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA device(s), there are {available}"))


@pytest.fixture
def device() -> str:
    """Where the tests run: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory holds NaN, or the largest integer, until it is written, so that an unwritten output is caught."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # PyTorch fills only in this mode. It refuses nothing here (warn_only), and its warnings are not what is tested.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def assert_close():  # type: ignore[no-untyped-def]
    """Compare with a float64 (or other) oracle within the tolerance of the dtype of what is compared."""

    def compare(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
        rtol, atol = TOLERANCES[actual.dtype]
        torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol * scale, atol=atol * scale)

    return compare
