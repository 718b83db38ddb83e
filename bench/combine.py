"""``python -m bench.combine``: `combine`, weighted rows to the sum over each token's experts."""

import sys

from bench.kernel import Inputs, Work, main
from moe_kernels import combine, combine_torch


def make_work(inputs: Inputs) -> Work:
    lanes_TK = inputs.ids_TK
    rows_NH = inputs.normal(inputs.num_rows, inputs.shape.hidden_size)
    rows_TKH = rows_NH.view(inputs.num_tokens, inputs.top_k, -1)
    return Work(
        runs={"combine": lambda: combine(rows_NH, lanes_TK), "torch sum": lambda: rows_TKH.sum(dim=1)},
        expected=lambda: combine_torch(rows_NH, lanes_TK),
        num_bytes=rows_NH.nbytes + rows_NH.nbytes // inputs.top_k + lanes_TK.nbytes,
    )


if __name__ == "__main__":
    sys.exit(main("combine", __doc__, make_work))
