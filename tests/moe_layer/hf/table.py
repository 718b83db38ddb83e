"""Writes docs/models.md: ``python -m tests.moe_layer.hf.table`` (with ``PYTHONPATH=.:kernels``): a line for each family,
and one for each use of a model, by its tests."""

from __future__ import annotations

import contextlib
import io
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

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

## Families

| family | experts | fp32 | bf16 | routing in our kernel |
|---|---|---|---|---|
"""


_USES_HEAD = """
## Uses

What the tests found. Every test compares with the model before the swap, or with transformers' own experts.

| use | tests in `tests/moe_layer/hf` | tried with | result |
|---|---|---|---|
"""

_USES = {
    "greedy `generate()`, router logits, auxiliary loss, save and reload": "test_families.py::test_all_stays_as_it_was",
    "`load_experts_from()`": "test_load.py",
    "static cache": "test_uses.py::test_generate_with_a_static_cache",
    "CUDA graphs, by `generate()`": "test_uses.py::test_generate_compiles_for_a_static_cache",
    "CUDA graphs, captured by hand": "test_uses.py::test_a_decode_step_in_a_cuda_graph",
    "`torch.compile(fullgraph=True)`": "test_uses.py::test_compiled_whole",
    "`torch.export`, any number of tokens": "test_uses.py::test_export_with_any_number_of_tokens",
    "gradient checkpointing under autocast": "test_uses.py::test_a_step_in_bfloat16_with_checkpointing",
    "`Trainer(bf16=True)`": "test_uses.py::test_trainer",
    "PEFT LoRA on attention": "test_uses.py::test_lora_on_attention",
    "PEFT LoRA on experts, by `experts_implementation`": "test_implementation.py::test_lora_on_experts",
    '`experts_implementation="moe_layer"`': "test_implementation.py::test_logits_gradients_and_generate",
    "… compiled, with gradients": "test_implementation.py::test_compiles_with_gradients",
    "experts alone in bfloat16, Triton": "test_families.py::test_the_kernels_in_bfloat16",
    "whole models in bfloat16, Triton": "test_families.py::test_whole_models_in_bfloat16",
    "two ranks, while experts move": "test_swap.py::test_two_ranks_with_relocation",
    "two ranks: one batch for all, padding, `max_tokens`, different lengths": "test_ranks.py::test_over_two_ranks",
    "the same over NCCL": "test_ranks.py::test_over_two_gpus",
    "ranks that do not come": "test_absence.py",
    "beside Hugging Face's package `kernels`": "test_uses.py::test_beside_the_package_kernels",
}


def _uses() -> list[str]:
    """A line for each use, by one run of pytest in a process of its own (in this one Triton does not interpret)."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = list(dict.fromkeys(str(here / test) for test in _USES.values()))
        command = [sys.executable, "-m", "pytest", "-q", "--junitxml", str(report), "-o", "junit_family=xunit1", *tests]
        subprocess.run(command, cwd=here.parents[2], check=False, stdout=sys.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
    lines = []
    for use, test in _USES.items():
        file, _, function = test.partition("::")
        of_file = [one for one in cases if Path(one.get("file", "")).name == file]
        found = [one for one in of_file if function in ("", one.get("name", "").partition("[")[0])]
        lines.append(f"| {use} | `{test}` | {_tried(found)} | {_result(found)} |")
    return lines


def _tried(cases: list[ElementTree.Element]) -> str:
    """The families, if the cases name them."""
    named = [one.get("name", "").partition("[")[2].rstrip("]") for one in cases]
    names = list(dict.fromkeys(name for name in named if name in FAMILIES))
    return (", ".join(names) or "–") if len(names) <= 12 else f"{len(names)} families"


def _result(cases: list[ElementTree.Element]) -> str:
    """How many passed, and why others were not run."""
    wrong = [one for one in cases if one.find("failure") is not None or one.find("error") is not None]
    skipped = [one.find("skipped") for one in cases if one.find("skipped") is not None]
    reasons = [one.get("message", "") for one in skipped if one is not None]
    parts = [f"**{len(wrong)} failed**"] if wrong or not cases else []
    passed = len(cases) - len(wrong) - len(skipped)
    parts += [f"{passed} passed"] if passed else []
    parts += [f"{reasons.count(reason)} not run: {reason}" for reason in dict.fromkeys(reasons)]
    return "; ".join(parts)


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
    uses = _uses()
    head = _HEAD.format(version=transformers.__version__, torch=torch.__version__, where=f"CPU, {platform.machine()}")
    Path(__file__).parents[3].joinpath("docs", "models.md").write_text(
        head + "\n".join(lines) + "\n" + _USES_HEAD + "\n".join(uses) + "\n"
    )
    print(f"{len(lines)} families, {len(uses)} uses", file=sys.stderr)


if __name__ == "__main__":
    main()
