"""Writes docs/models.md: ``python -m tests.moe_layer.hf.table`` (with ``PYTHONPATH=.:kernels``); one line for each family."""

from __future__ import annotations

import contextlib
import io
import platform
import sys
from pathlib import Path

import torch

from moe_layer.hf import SwapReport, swap_experts
from tests.moe_layer.hf.models import FAMILIES, make_model, make_tokens

_HEAD = """# Models

What `swap_experts` does with each family of transformers {version} that can be made tiny, with random weights (PyTorch
{torch}, {where}). Differences are of the largest logit, to the model before the swap. In bf16 the model rounds after every
step, and our kernels once. The next layer's router may then choose another expert for a token, which is what differences
above 0.1 are.

`python -m tests.moe_layer.hf.table` writes this page. `tests/moe_layer/hf` checks more of each family: router logits, auxiliary
loss, greedy generation, saving, loading whole and expert by expert (`load_experts_from`).

| family | experts | fp32 | bf16 | routing in our kernel |
|---|---|---|---|---|
"""


def _difference(family: str, dtype: torch.dtype) -> tuple[str, SwapReport]:
    model, tokens = make_model(family, dtype), make_tokens()
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits.float()
        with contextlib.redirect_stdout(io.StringIO()):
            report = swap_experts(model, strict=False)
        after = model(tokens, use_cache=False).logits.float()
    return f"{float((after - before).abs().max() / before.abs().max()):.0e}", report


def _line(family: str) -> str:
    found, report = _difference(family, torch.float32)
    if not report.swapped:
        return f"| {family} | refused: {next(iter(report.left.values()))} | – | – | – |"
    formats = {one.format.describe().rsplit(", ", 2)[0] + _layout(one) for one in report.swapped.values()}
    rules = {str(rule).removeprefix("RouterRule") for rule in report.fused.values()}
    not_fused = [f"no: {reason}" for reason in dict.fromkeys(report.not_fused.values())]
    routing = "; ".join([*(f"`{_short(rule)}`" for rule in rules), *not_fused])
    try:
        rounded = _difference(family, torch.bfloat16)[0]
    except RuntimeError as error:
        rounded = f"the model fails: {error}"
    return f"| {family} | {'; '.join(sorted(formats))} | {found} | {rounded} | {routing} |"


def _layout(one: object) -> str:
    layout = one.layout  # type: ignore[attr-defined]
    words = [
        word for word, is_so in (("transposed", layout.is_transposed), ("interleaved", layout.is_interleaved)) if is_so
    ]
    return f" ({', '.join(words)})" if words else ""


def _short(rule: str) -> str:
    """Without what is as it is by default."""
    default = (
        "correction_bias=False",
        "epsilon=1e-20",
        "scale=1.0",
        "num_groups=1",
        "top_groups=1",
        "weights_dtype=None",
    )
    parts = [part for part in rule.strip("()").split(", ") if part not in default]
    if not any(part.startswith("num_groups") for part in parts):
        parts = [part for part in parts if not part.startswith("group_score")]
    return ", ".join(parts).replace("score_function=", "").replace("'", "")


def main() -> None:
    import transformers

    lines = [_line(family) for family in sorted(FAMILIES)]
    head = _HEAD.format(version=transformers.__version__, torch=torch.__version__, where=f"CPU, {platform.machine()}")
    Path(__file__).parents[3].joinpath("docs", "models.md").write_text(head + "\n".join(lines) + "\n")
    print(f"{len(lines)} families", file=sys.stderr)


if __name__ == "__main__":
    main()
