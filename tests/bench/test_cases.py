"""The cases, their floors and their logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.cases import CASES, GAP, SHAPES, Case, count_hit, forward_work, make_logits, select
from bench.ceilings import Ceilings, measure_ceilings

BY_NAME = {case.name: case for case in CASES}

# Experts hit and floor in µs at 686 TFLOP/s and 4.38 TB/s, from a table that another program made.
RATES = Ceilings(686e12, 4.38e12)
KNOWN = {
    "qwen3/T1": (8, 17),
    "qwen3/T16": (77, 166),
    "qwen3/T64": (126, 271),
    "qwen3/T256": (128, 276),
    "qwen3/T4096": (128, 451),
    "qwen3~zipf/T256": (46, 100),
    "qwen3~zipf/T4096": (81, 451),
    "mixtral/T1": (2, 161),
    "mixtral/T16": (8, 643),
    "mixtral~zipf/T1024": (8, 1052),
    "dsv3/T16": (32, 643),
    "dsv3/T1024": (32, 1052),
    "dsv3~zipf/T1024": (32, 1052),
    "gptoss/T1": (4, 45),
    "gptoss/T16": (47, 534),
    "gptoss/T64": (110, 1249),
    "gptoss/T4096": (128, 1464),
    "olmoe/T1": (8, 23),
    "olmoe/T16": (56, 161),
    "olmoe/T64": (64, 184),
    "olmoe/T1024": (64, 186),
}


def test_there_are_39_cases_shape_after_shape():
    assert len(CASES) == len(BY_NAME) == 39
    assert list(dict.fromkeys(case.shape.name for case in CASES)) == ["qwen3", "mixtral", "dsv3", "gptoss", "olmoe"]
    assert {case.name for case in CASES if case.is_skewed} == {
        "qwen3~zipf/T256",
        "qwen3~zipf/T4096",
        "mixtral~zipf/T1024",
        "dsv3~zipf/T1024",
    }


@pytest.mark.parametrize("name", KNOWN)
def test_experts_hit_and_floor(name):
    case, (hit, floor) = BY_NAME[name], KNOWN[name]
    assert count_hit(make_logits(case), case.shape.top_k) == hit
    # The table is rounded, and so are the ceilings in it.
    work = forward_work(case.shape, case.num_tokens, hit, torch.bfloat16)
    assert RATES.floor_us(*work) == pytest.approx(floor, rel=1e-3, abs=0.7)


def test_float32_is_twice_the_bytes():
    flops, num_bytes = forward_work(SHAPES["qwen3"], 1, 8, torch.bfloat16)
    assert forward_work(SHAPES["qwen3"], 1, 8, torch.float32) == (flops, 2 * num_bytes)


def test_ceilings_are_measured():
    """On a CPU too, so that scripts can be tried there."""
    ceilings = measure_ceilings(torch.device("cpu"), seconds=0.001)
    assert 1e8 < ceilings.flops_per_s < 1e14 and 1e7 < ceilings.bytes_per_s < 1e13
    assert set(ceilings.columns()) == {"ceiling_tflops", "ceiling_tb_per_s"}


@pytest.mark.gpu
def test_ceilings_of_a_gpu():
    ceilings = measure_ceilings(torch.device("cuda", 0))
    assert 1e13 < ceilings.flops_per_s < 1e16 and 1e11 < ceilings.bytes_per_s < 2e13


@pytest.mark.parametrize("name", ["qwen3/T256", "qwen3~zipf/T256", "gptoss/T64"])
def test_rounding_to_bf16_changes_no_choice(name):
    case = BY_NAME[name]
    logits_TE, top_k = make_logits(case), case.shape.top_k
    best = logits_TE.topk(top_k + 1).values
    assert (best[:, -2] - best[:, -1]).min() > 0.99 * GAP
    rounded = logits_TE.bfloat16().float()
    rounded_best = rounded.topk(top_k + 1).values
    assert (rounded_best[:, -2] > rounded_best[:, -1]).all()
    chosen, rounded_chosen = (logits.topk(top_k).indices.sort().values for logits in (logits_TE, rounded))
    assert torch.equal(chosen, rounded_chosen)


def test_logits_depend_on_the_seed_alone():
    case = BY_NAME["olmoe/T16"]
    assert torch.equal(make_logits(case), make_logits(case))
    assert not torch.equal(make_logits(case), make_logits(replace(case, seed=case.seed + 1)))


def test_select():
    assert select(None, None) == list(CASES)
    assert [case.name for case in select(["qwen3"], [256])] == ["qwen3/T256", "qwen3~zipf/T256"]
    assert [case.name for case in select(["olmoe"], [3])] == ["olmoe/T3"]
    (own,) = select(["8:2:64:32"], [5])
    assert own == Case(own.shape, 5) and own.name == "8:2:64:32/T5"
    assert (own.shape.num_experts, own.shape.top_k, own.shape.hidden_size, own.shape.intermediate_size) == (
        8,
        2,
        64,
        32,
    )


@pytest.mark.parametrize("name", ["qwen4", "8:2:64", "8:0:64:32", "8:9:64:32", "8:2:64:x"])
def test_select_refuses(name):
    with pytest.raises(ValueError, match=name):
        select([name], None)
