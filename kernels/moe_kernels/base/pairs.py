"""Steps 4 and 5 of a forward: pairs of programs that run in step, so that the L2 is read once for what both load."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.backend import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def keep_in_step():
    """Waits for the other program of the pair, unless that has ended; without pairs (see `PreparedLaunch`) for nobody.

    A pair is a cluster, on two multiprocessors of a GPC. Called before a program loads, it makes the two ask for the same
    lines at the same time; on Hopper such requests become one.
    """
    if not _INTERPRETED:
        asm: tl.constexpr = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
