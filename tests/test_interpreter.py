"""The quickened interpreter replaces the language's functions once a launch, and gives them back."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from moe_kernels import RoutingRule, topk_routing
from tests import interpreter as quickened
from tests.distributed import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="kernels run natively"),
    pytest.mark.skipif(not quickened.QUICKENED, reason="the interpreter of this Triton stays as it is"),
]


def test_functions_are_replaced_once_a_launch(monkeypatch):
    replacing, launches = [], []
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: replacing.append(fn.__name__) or patch_lang(fn))
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *args, **kwargs: launches.append(self.fn.__name__) or launch(self, *args, **kwargs),
    )
    for _ in range(2):
        replacing.clear()
        launches.clear()
        topk_routing(torch.randn(2, 8), 2, RoutingRule(), backend="triton")
    assert launches and replacing == launches
    assert tl.core.is_builtin(tl.load), "as before the launch"


def test_types_are_the_interpreters_own():
    assert interpreter._get_np_dtype is quickened._np_dtype
    for dtype in (tl.int1, tl.bfloat16, tl.float8e4nv, tl.pointer_type(tl.int32), tl.block_type(tl.int64, [4])):
        for _ in range(2):
            assert interpreter._get_np_dtype(dtype) == quickened._slow_np_dtype(dtype)
