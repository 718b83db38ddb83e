"""``python -m bench.ceilings``: the two rates that no forward can beat, measured as forwards are timed.

Every benchmark with a floor calls `measure_ceilings` at its start, so its floors are those of the same GPU in the same
state: replays of a CUDA graph for about 20 ms, from idle. Under longer load the power limit lowers the clock, and both
rates fall (docs/performance.md).

The script also prints the time of an empty replay, and of reading one token's experts behind either flush: no forward of
one token can be faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from bench.cases import SHAPES
from bench.command import make_parser
from bench.report import add_device
from bench.timing import DEFAULT_SECONDS, FLUSHES, Function, Timing, time_eager, time_graph

READ_BLOCK = 4096  # elements of a program; of 512 to 8,192, in one to four loads by one to eight warps, the fastest


@dataclass(frozen=True)
class Ceilings:
    """The two rates behind a floor: products in the run's dtype, and reads of memory."""

    flops_per_s: float
    bytes_per_s: float

    def floor_us(self, flops: float, num_bytes: float) -> float:
        """The larger of two times in µs: the products at their ceiling, and the bytes at theirs."""
        return 1e6 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def columns(self) -> dict[str, str]:
        """For a CSV."""
        return {
            "ceiling_tflops": f"{self.flops_per_s / 1e12:.4g}",
            "ceiling_tb_per_s": f"{self.bytes_per_s / 1e12:.4g}",
        }

    def __str__(self) -> str:
        return f"{self.flops_per_s / 1e12:.4g} TFLOP/s, {self.bytes_per_s / 1e12:.4g} TB/s"


@triton.jit
def _read_kernel(weights_ptr, sum_ptr, BLOCK: tl.constexpr):
    at = weights_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(at, eviction_policy="evict_first").to(tl.float32), axis=0)
    if total > 1e30:  # never: it keeps the loads
        tl.store(sum_ptr, total)


def measure_ceilings(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, seconds: float = DEFAULT_SECONDS
) -> Ceilings:
    """Rates of an 8192³ product of random numbers and of a read of 4 GiB.

    The read is that of the faster of two kernels: PyTorch's `amax`, and one of loads alone. float32 products use no TF32,
    as the layer's kernels use none. On a CPU both are tiny: the rates there only serve to try the scripts.
    """
    is_gpu = device.type == "cuda"
    size, read_bytes = (8192, 2**32) if is_gpu else (256, 2**22)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = _time(lambda: torch.mm(a, b, out=out), device, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    many = torch.randn(2**20, device=device).bfloat16().repeat(read_bytes // 2**21)
    largest = torch.empty((), device=device, dtype=torch.bfloat16)
    reads = [_time(lambda: torch.amax(many, dim=0, out=largest), device, seconds)]
    if is_gpu:
        reads.append(_time(lambda: _read(many), device, seconds))
    read_us = min(read.median_us for read in reads)
    return Ceilings(2e6 * size**3 / product.median_us, 1e6 * read_bytes / read_us)


def _time(function: Function, device: torch.device, seconds: float, flush: str = "write") -> Timing:
    if device.type == "cuda":
        return time_graph(function, device, seconds, flush)
    return time_eager(function, device, seconds)[0]


def _read(weights: torch.Tensor) -> None:
    """Every element once, and nothing else; the number of elements divides by `READ_BLOCK`."""
    unused = weights.view(torch.float32)[:1]
    _read_kernel[(weights.numel() // READ_BLOCK,)](weights, unused, BLOCK=READ_BLOCK, num_warps=8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("ceilings", __doc__)
    add_device(parser, default="cuda")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS)
    options = parser.parse_args(arguments)
    device = options.device
    if device.type != "cuda":
        parser.error(f"--device {device}: must be a GPU")
    print(measure_ceilings(device, seconds=options.seconds))
    element = torch.empty((), device=device)
    nothing = time_graph(element.zero_, device, options.seconds)
    print(f"replay of one tiny kernel {nothing.median_us:.1f} µs: contained in every time")
    for shape in (SHAPES["qwen3"], SHAPES["olmoe"]):
        num_weights = 3 * shape.top_k * shape.hidden_size * shape.intermediate_size
        weights = torch.randn(num_weights, device=device).bfloat16()
        for flush in FLUSHES:
            read = _time(partial(_read, weights), device, options.seconds, flush)
            rate = weights.nbytes / read.median_us / 1e6
            what = f"{shape.name}'s {shape.top_k} experts, {flush} flush"
            print(f"{what:<32}{read.median_us:8.1f} µs {rate:8.2f} TB/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
