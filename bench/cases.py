"""The cases: five model shapes at batches of 1 to 16,384 tokens, some with skewed routing, and their least work.

A case is data. Its logits come from a seeded CPU generator, so they are the same on every device; the seeds are chosen so
that the number of experts hit is typical of the draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ZIPF_EXPONENT = 1.5
"""Skewed logits fall by this times the logarithm of an expert's rank."""

GAP = 0.125
"""Least gap between the logits of a chosen and of another expert: peers break ties differently, and rounding makes none."""

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3", 128, 8, 2048, 768),
        Shape("mixtral", 8, 2, 4096, 14336),
        Shape("dsv3", 32, 8, 7168, 2048),  # the experts of one of 8 ranks
        Shape("gptoss", 128, 4, 2880, 2880),
        Shape("olmoe", 64, 8, 2048, 1024),
    )
}


@dataclass(frozen=True)
class Case:
    """One layer's batch; `seed` draws its logits."""

    shape: Shape
    num_tokens: int
    is_skewed: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.shape.name}{'~zipf' if self.is_skewed else ''}/T{self.num_tokens}"


# Seeds other than 0.
_SEEDS = {"qwen3/T16": 2, "qwen3/T64": 3, "qwen3~zipf/T4096": 14, "gptoss/T16": 6, "olmoe/T16": 14}
_SKEWED = {"qwen3": (256, 4096), "mixtral": (1024,), "dsv3": (1024,)}


def _case(shape: Shape, num_tokens: int, is_skewed: bool) -> Case:
    case = Case(shape, num_tokens, is_skewed)
    return Case(shape, num_tokens, is_skewed, _SEEDS.get(case.name, 0))


CASES: tuple[Case, ...] = tuple(
    _case(shape, num_tokens, is_skewed)
    for shape in SHAPES.values()
    for is_skewed, batches in ((False, TOKENS), (True, _SKEWED.get(shape.name, ())))
    for num_tokens in batches
)
"""All of them, shape after shape."""


def make_logits(case: Case) -> torch.Tensor:
    """Router logits, float32 ``[T, E]`` on the CPU: normal, and falling along a shuffled rank if the case is skewed."""
    generator = torch.Generator().manual_seed(case.seed)
    num_experts, top_k = case.shape.num_experts, case.shape.top_k
    logits_TE = torch.randn(case.num_tokens, num_experts, generator=generator)
    if case.is_skewed:
        rank_E = torch.randperm(num_experts, generator=generator) + 1
        logits_TE -= ZIPF_EXPONENT * rank_E.log()
    chosen_TK = logits_TE.topk(top_k, dim=1).indices
    return (logits_TE - GAP).scatter(1, chosen_TK, logits_TE.gather(1, chosen_TK))


def count_hit(logits_TE: torch.Tensor, top_k: int) -> int:
    """How many experts have a token."""
    return logits_TE.topk(top_k, dim=1).indices.unique().numel()


def forward_work(shape: Shape, num_tokens: int, experts_hit: int, dtype: torch.dtype) -> tuple[float, float]:
    """The FLOPs and bytes that no forward of a layer can do without.

    The weights of the experts hit are read once, the input is read, the output is written. For its floor, give them to
    `bench.ceilings.Ceilings.floor_us`.
    """
    matrix = shape.hidden_size * shape.intermediate_size
    flops = 6 * num_tokens * shape.top_k * matrix
    num_bytes = dtype.itemsize * (3 * matrix * experts_hit + 2 * num_tokens * shape.hidden_size)
    return flops, num_bytes


def select(shapes: Sequence[str] | None, tokens: Sequence[int] | None) -> list[Case]:
    """The cases of some shapes and batch sizes; of all if None.

    A shape is one of `SHAPES` or experts:top_k:hidden:intermediate, as in ``8:2:256:512``. A shape of one's own, and a
    batch size that no case has, makes a new case.

    Raises:
        ValueError: unknown name, numbers that are no shape, or a batch without tokens.
    """
    for num_tokens in tokens or ():
        if num_tokens < 1:
            raise ValueError(f"tokens {num_tokens}: must be at least 1")
    cases: list[Case] = []
    for name in shapes or SHAPES:
        shape = _shape(name)
        known = [case for case in CASES if case.shape == shape]
        if tokens is None:
            cases += known or [Case(shape, num_tokens) for num_tokens in TOKENS]
        for num_tokens in tokens or ():
            cases += [case for case in known if case.num_tokens == num_tokens] or [Case(shape, num_tokens)]
    return cases


def _shape(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    numbers = name.split(":")
    if len(numbers) != 4 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"shape {name!r}: must be one of {', '.join(SHAPES)}, or experts:top_k:hidden:intermediate")
    num_experts, top_k, hidden_size, intermediate_size = map(int, numbers)
    if top_k > num_experts:
        raise ValueError(f"shape {name!r}: top_k must be at most the number of experts")
    return Shape(name, num_experts, top_k, hidden_size, intermediate_size)
