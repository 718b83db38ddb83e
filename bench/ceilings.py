"""``python -m bench.ceilings``: what this GPU can do at most, timed as everything else is: the floors' two rates.

The floors of `bench.cases` use fixed rates, so that runs can be compared. A GPU that is slower or faster than those, or hot,
shows here; rates fall under sustained load, as the power limit lowers the clock. What only reading the weights of one token's
experts takes, behind either flush, is what no forward of one token can beat.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from bench.cases import BF16_FLOPS_PER_S, BYTES_PER_S, SHAPES
from bench.command import make_parser
from bench.report import add_device
from bench.timing import DEFAULT_SECONDS, FLUSHES, time_graph

READ_BLOCK = 4096  # elements of a program; of 512 to 8,192, in one to four loads by one to eight warps, the fastest


@triton.jit
def _read_kernel(weights_ptr, sum_ptr, BLOCK: tl.constexpr):
    at = weights_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(at, eviction_policy="evict_first").to(tl.float32), axis=0)
    if total > 1e30:  # never: it keeps the loads
        tl.store(sum_ptr, total)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("ceilings", __doc__)
    add_device(parser, default="cuda")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS)
    options = parser.parse_args(arguments)
    device = options.device
    if device.type != "cuda":
        parser.error(f"--device {device}: must be a GPU")
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = time_graph(lambda: torch.mm(a, b, out=out), device, options.seconds)
    _print(f"{size}³ bf16 product", product.median_us, 2 * size**3, "TFLOP/s", BF16_FLOPS_PER_S)
    many = torch.randn(2**31, device=device, dtype=torch.bfloat16)
    largest = torch.empty((), device=device, dtype=torch.bfloat16)
    read = time_graph(lambda: torch.amax(many, dim=0, out=largest), device, options.seconds)
    _print("read of 4 GiB", read.median_us, many.numel() * 2, "TB/s", BYTES_PER_S)
    nothing = time_graph(largest.zero_, device, options.seconds)
    print(f"graph of one tiny kernel {nothing.median_us:4.1f} µs: contained in every time")
    for shape in (SHAPES["qwen3"], SHAPES["olmoe"]):
        weights = many[: 3 * shape.top_k * shape.hidden_size * shape.intermediate_size]
        grid = (weights.numel() // READ_BLOCK,)
        for flush in FLUSHES:
            read = time_graph(
                lambda grid=grid, weights=weights: _read_kernel[grid](weights, largest, BLOCK=READ_BLOCK, num_warps=8),
                device, options.seconds, flush,
            )  # fmt: skip
            what = f"{shape.name}'s {shape.top_k} experts, {flush} flush"
            _print(what, read.median_us, weights.numel() * 2, "TB/s", BYTES_PER_S)
    return 0


def _print(what: str, median_us: float, amount: float, unit: str, floor_rate: float) -> None:
    rate = amount / median_us * 1e6
    print(f"{what:<30} {median_us:8.1f} µs {rate / 1e12:8.2f} {unit:<8} (floors: {floor_rate / 1e12:.2f})")


if __name__ == "__main__":
    raise SystemExit(main())
