"""``python -m bench.hf_model``: decode and prefill of a whole transformers model, its experts by us and by transformers.

A Qwen3-30B-A3B of four layers with random weights and a static cache. On a GPU: device time of a CUDA graph's replay with a
cold L2, where the variants of a case take turns; and without a graph the latency of a call, from the host. Masks and positions
are given, as `generate()` does. Each variant's logits are compared with those of transformers' loop over experts.

`experts_us` is the time of a layer's experts: the whole, less the same model with experts that do nothing (of the compiled
variants, compiled too), by the number of layers. The variants are in `bench.hf_variants`. One that fails is named with its
error, and the others go on; the exit status is 1 then.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.command import exit_status, integers, make_parser, names
from bench.hf_variants import BASES, REFERENCE, SHAPES, VARIANTS, Variant, make_model
from bench.providers import Unavailable, complaining, find
from bench.report import DTYPES, Report, add_device, relative_error
from bench.timing import Timing, capture, time_captured, time_eager

WORST_ERROR = 0.15
"""Median over tokens of the logits' relative error. Experts that do nothing are near 1; a near tie that falls otherwise is at a
few hundredths (`hf_variants.ROUTER_SCALE`)."""
LOGITS_OF = 64  # of a prompt's last tokens: to compare them; generation needs one

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """`batch` sequences of `length` tokens behind `place` tokens that are in the cache."""

    name: str
    batch: int
    length: int
    place: int


def make_cases(batches: Sequence[int], prefill: int, cache: int, names: Sequence[str] | None = None) -> list[Case]:
    """Decode steps in the middle of what the cache holds, and one prompt; of these those with one of `names`.

    Raises:
        ValueError: a number below 1, a prompt that the cache cannot hold, or an unknown name.
    """
    if min(*batches, prefill, cache) < 1:
        raise ValueError(f"batches {list(batches)}, prefill {prefill} and cache {cache} must be at least 1")
    if prefill >= cache:
        raise ValueError(f"prefill {prefill} must be less than the cache's {cache} places: decoding comes after it")
    decode = [Case(f"decode/B{batch}", batch, 1, prefill) for batch in batches]
    cases = [*decode, Case(f"prefill/T{prefill}", 1, prefill, 0)]
    if unknown := set(names or ()) - {case.name for case in cases}:
        raise ValueError(f"cases {sorted(unknown)} unknown: must be among {[case.name for case in cases]}")
    return [case for case in cases if names is None or case.name in names]


@dataclass(frozen=True)
class Measured:
    """One variant in one case: by mode its timing, and the error of its logits."""

    times: dict[str, Timing]
    error: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("hf_model", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batches", type=integers, default=[1, 16, 64], metavar="N,M", help="sequences that decode")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument(
        "--cache", type=int, default=2304, help="places of the static cache: attention is over all of them"
    )
    parser.add_argument("--cases", type=names, metavar="A,B", help="only these of decode/B… and prefill/T…")
    parser.add_argument("--providers", type=names, metavar="A,B", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    add_device(parser)
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing, for each case and provider")
    parser.add_argument("--compile-backend", default="inductor", help="of the compiled variants")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="a row per case, provider and mode, written as they come"
    )
    options = parser.parse_args(arguments)
    try:
        if options.layers < 1:
            raise ValueError(f"--layers must be at least 1, got {options.layers}")
        cases = make_cases(options.batches, options.prefill, options.cache, options.cases)
        chosen: list[Variant] = find(options.providers, (), VARIANTS)
        model = make_model(SHAPES[options.shape], options.layers, DTYPES[options.dtype], options.device)
    except (ValueError, Unavailable) as error:
        parser.error(str(error))
    needed = dict.fromkeys([REFERENCE, *(variant.without for variant in chosen)])
    variants = [*(BASES[name] for name in needed), *chosen]
    complaints: list[str] = []
    models: dict[str, nn.Module] = {}
    with Report(options.csv, len(variants) + len(cases) * len(variants), _versions()) as report, torch.no_grad():
        for variant in variants:
            report.step(f"making {variant.name}")
            with complaining(variant.name, "making it", complaints):
                models[variant.name] = variant.make(model)
        for line in complaints:
            report.line(line)
        report.line(f"{'case':<16}{'provider':<34}{'mode':<7}{'median ms':>10}{'experts µs':>12}{'rel. error':>12}")
        made = [variant for variant in variants if variant.name in models]
        for case in cases:
            new: list[str] = []
            found = measure(case, model, made, models, options, report, new)
            for row in _rows(case, found, made, options):
                report.row(row)
                report.line(_line(row))
            for line in new:
                report.line(f"    {line}")
            complaints += new
    return exit_status(complaints)


def measure(
    case: Case,
    model: nn.Module,
    variants: Sequence[Variant],
    models: dict[str, nn.Module],
    options: argparse.Namespace,
    report: Report,
    complaints: list[str],
) -> dict[str, Measured]:
    """All variants in one case, those that could be measured. The first is the reference, which is not timed."""
    device, is_gpu = options.device, options.device.type == "cuda"
    torch._dynamo.reset()  # or the next case would be compiled as a dynamic one, or not at all
    cache = make_cache(model, case, options.cache)
    expected: torch.Tensor | None = None
    steps: dict[str, Step] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    errors: dict[str, float | None] = {}
    for variant in variants:
        report.step(f"{case.name}: {variant.name}")
        with complaining(variant.name, case.name, complaints):
            variant.check(case.batch * case.length, SHAPES[options.shape], DTYPES[options.dtype], device)
            step = make_step(
                models[variant.name], case, cache, options.compile_backend if variant.is_compiled else None
            )
            logits = step().clone()
            if variant.name == REFERENCE:
                expected = logits
                continue
            steps[variant.name], errors[variant.name] = step, None
            if variant.name not in BASES and expected is not None:
                errors[variant.name] = error = error_of(logits, expected)
                if not error <= WORST_ERROR:
                    complaints.append(
                        f"FAILED {variant.name}, {case.name}: error {error:.2e} against {REFERENCE}, or NaN"
                    )
        if is_gpu:
            if variant.name in steps:
                with complaining(f"{variant.name} in a CUDA graph", case.name, complaints):
                    graphs[variant.name] = capture(steps[variant.name], device)
            torch.cuda.empty_cache()  # what one that failed has left
    times: dict[str, dict[str, Timing]] = {name: {} for name in steps}
    if graphs:
        timings = time_captured(list(graphs.values()), device, options.seconds)
        for name, timing in zip(graphs, timings, strict=True):
            times[name]["graph"] = timing
    for name, step in steps.items():
        with complaining(f"{name} without a graph", case.name, complaints):
            times[name]["eager"] = time_eager(step, device, options.seconds)[0]
    return {name: Measured(times[name], errors[name]) for name in steps}


def make_cache(model: Any, case: Case, places: int) -> Any:
    """A static cache for the sequences of a case, full of random keys and values."""
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=places)
    device = next(model.parameters()).device
    model(
        torch.zeros(case.batch, 1, dtype=torch.int64, device=device), use_cache=True, **{_name_of_cache(model): cache}
    )
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor.normal_()
    return cache


def make_step(model: Any, case: Case, cache: Any, compile_backend: str | None) -> Step:
    """Logits ``[batch * last tokens, vocabulary]`` of the case's tokens, always at the same place of the cache."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (case.batch, case.length), generator=random).to(device)
    positions_S = case.place + torch.arange(case.length, device=device)
    places_N = torch.arange(cache.layers[0].max_cache_len, device=device)
    options = {
        _name_of_cache(model): cache,
        "use_cache": True,
        "position_ids": positions_S.expand(case.batch, -1),
        "attention_mask": (places_N <= positions_S[:, None]).expand(case.batch, 1, -1, -1),
        "logits_to_keep": min(case.length, LOGITS_OF),
    }
    forward = model
    if compile_backend is not None:
        forward = torch.compile(model, backend=compile_backend, dynamic=False)

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(case.place)  # a forward moves it on
        return forward(tokens, **options).logits.flatten(0, 1)

    return step


def _name_of_cache(model: nn.Module) -> str:
    """Of the argument; transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def error_of(logits_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """The median over tokens of the error relative to the norm; NaN if anything is NaN."""
    errors = [relative_error(*pair) for pair in zip(logits_TV, expected_TV, strict=True)]
    return float(torch.tensor(errors).quantile(0.5))


def _rows(
    case: Case, found: dict[str, Measured], variants: Sequence[Variant], options: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    for variant in variants:
        if variant.name not in found:
            continue
        for mode, timing in found[variant.name].times.items():
            experts_us = None
            if variant.name not in BASES and mode in getattr(found.get(variant.without), "times", {}):
                without = found[variant.without].times[mode]
                experts_us = (timing.median_us - without.median_us) / options.layers
            rows.append(
                {
                    "case": case.name,
                    "provider": variant.name,
                    "mode": mode,
                    "median_ms": f"{timing.median_us / 1e3:.4f}",
                    "experts_us": experts_us,
                    "p20_ms": f"{timing.p20_us / 1e3:.4f}",
                    "p80_ms": f"{timing.p80_us / 1e3:.4f}",
                    "rel_err": found[variant.name].error,
                    "layers": options.layers,
                    "dtype": options.dtype,
                }
            )
    return rows


def _line(row: dict[str, Any]) -> str:
    experts = "" if row["experts_us"] is None else f"{row['experts_us']:.1f}"
    error = "" if row["rel_err"] is None else f"{row['rel_err']:.1e}"
    return f"{row['case']:<16}{row['provider']:<34}{row['mode']:<7}{row['median_ms']:>10}{experts:>12}{error:>12}"


def _versions() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__}


if __name__ == "__main__":
    sys.exit(main())
