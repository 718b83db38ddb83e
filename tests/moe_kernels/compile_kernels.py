"""``python -m tests.moe_kernels.compile_kernels ARCH [all]``: compiles every kernel for a GPU (80, 89, 90, 100), without one.

Some variants of each kernel, or all of them, which takes minutes. Prints a line for each: its name, its constants and its
shared memory in bytes. Run by `test_compile.py` in a process without interpreter; `compiling/` has a file for each folder of
kernels.
"""

from __future__ import annotations

import bisect
import sys

import torch

from moe_kernels.gradients.gradient_configs import _TABLE_16_BIT, _TABLE_32_BIT, _TABLE_HOPPER
from moe_kernels.gradients.gradient_configs import _TABLE_TMA as _GRADIENTS_TMA
from moe_kernels.operands.config import _INTERMEDIATE, _KEPT_TMA, _TABLE_TMA
from tests.moe_kernels.compiling.gemms import compile_gemms, compile_tma_gemms
from tests.moe_kernels.compiling.gradients import compile_gradients, compile_gradients_tma
from tests.moe_kernels.compiling.kernel import DTYPES, KINDS
from tests.moe_kernels.compiling.one_token import compile_one_token
from tests.moe_kernels.compiling.peers import compile_peers
from tests.moe_kernels.compiling.quantised import compile_all_quantised
from tests.moe_kernels.compiling.small import compile_small

if __name__ == "__main__":
    arch, all_of_them = int(sys.argv[1]), sys.argv[2:] == ["all"]  # all of them takes minutes
    compile_small(arch)
    for dtype, num_ranks in ((torch.bfloat16, 4), (torch.float32, 2), *(((torch.bfloat16, 8),) if all_of_them else ())):
        compile_peers(arch, dtype, num_ranks)
    for dtype in DTYPES if arch >= 90 else (torch.bfloat16,):  # an older one shows what must not be used there
        compile_one_token(arch, dtype)
        is_usual = all_of_them or dtype == torch.bfloat16
        for rows in (16, 32, 64, 128) if is_usual else ():
            compile_gemms(arch, dtype, rows, rows != 16, "gelu" if rows == 32 else "silu", biased=False)
        for activation, biased in KINDS if all_of_them else KINDS[1:3] if is_usual else ():
            compile_gemms(arch, dtype, 64, True, activation, biased)
    tables = {torch.float32: _TABLE_32_BIT, torch.bfloat16: _TABLE_HOPPER if arch == 90 else _TABLE_16_BIT}
    for dtype, table in tables.items():
        for place, (_, configs) in enumerate(table):
            compile_gradients(arch, dtype, place, configs, *KINDS[place])
    if arch == 90:
        for _, configs in _GRADIENTS_TMA:
            compile_gradients_tma(arch, torch.bfloat16, configs)
    compile_all_quantised(arch, all_of_them)
    if arch == 90:
        for hidden_size, intermediate in ((2048, 768), (2880, 2880), (4096, 14336)):  # one for each column
            column = bisect.bisect_left(_INTERMEDIATE, intermediate)
            dtypes = (torch.bfloat16,) if column else (torch.bfloat16, torch.float16)  # whose tiles are the same
            for dtype in dtypes if all_of_them else dtypes[:1]:
                table = _KEPT_TMA if dtype == torch.bfloat16 and not column else _TABLE_TMA
                every = 1 if all_of_them else 5
                for number, (up, down) in enumerate([*dict.fromkeys(pairs[column] for *_, pairs in table)][::every]):
                    compile_tma_gemms(arch, dtype, up, down, hidden_size, intermediate)
                    if hidden_size == 2880 and dtype == torch.bfloat16 and (all_of_them or number == 0):
                        for kind in KINDS[1:4]:
                            compile_tma_gemms(arch, dtype, up, down, hidden_size, intermediate, *kind)
