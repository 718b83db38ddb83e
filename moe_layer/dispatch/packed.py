"""Forward, dispatch: what travels together in one collective, as bytes.

Legend: T tokens of this rank, K top-k, H hidden, N rows, B tokens that each rank sends, R = W · B tokens of all W ranks.
"""

from dataclasses import dataclass

import torch

# Rows begin at multiples of this many bytes: TMA asks for 16.
_ALIGNMENT = 16
_WORD = 4  # bytes of a float32 or int32


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def token_bytes(hidden_size: int, item: int, top_k: int) -> int:
    """Bytes of one token of `pack_tokens`; `item`: of an element of the hidden states."""
    return _aligned(hidden_size * item) + _aligned(_WORD * (2 * top_k + 1))


# ---- rows with one weight each


def pack_rows(rows_NH: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Rows and their weights (float32) as uint8 ``[N, bytes]``."""
    num_rows, hidden_size = rows_NH.shape
    width = _aligned(hidden_size * rows_NH.element_size())
    packed = rows_NH.new_empty((num_rows, width + _ALIGNMENT), dtype=torch.uint8)
    packed.view(rows_NH.dtype)[:, :hidden_size] = rows_NH
    packed.view(torch.float32)[:, width // _WORD] = weights_N
    return packed


def unpack_rows(packed: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (a view, padded) and weights (contiguous) of `pack_rows`."""
    weights = packed.view(torch.float32)[:, (packed.shape[1] - _ALIGNMENT) // _WORD]
    return packed.view(dtype)[:, :hidden_size], weights.contiguous()


# ---- a rank's tokens, padded


@dataclass(frozen=True)
class Tokens:
    """The tokens of all ranks, by rank; views of what came.

    Attributes:
        rows_RH: hidden states; rows are padded.
        weights_RK: float32.
        lanes_RK: int32, global lanes, -1 for none: also of the padding, of which nothing else is defined.
        needs_grad_R: int32, 1 if the token's rank says that a backward comes, else 0; of the padding too.
    """

    rows_RH: torch.Tensor
    weights_RK: torch.Tensor
    lanes_RK: torch.Tensor
    needs_grad_R: torch.Tensor


def pack_tokens(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, num_rows: int, needs_grad: bool
) -> torch.Tensor:
    """This rank's tokens, padded to `num_rows`, as uint8 ``[num_rows, bytes]``. No host sync.

    Args:
        num_rows: B, at least 1 and at least T.
    """
    (num_tokens, hidden_size), top_k = x_TH.shape, lanes_TK.shape[1]
    assert num_rows >= max(1, num_tokens), (num_rows, num_tokens)
    size = token_bytes(hidden_size, x_TH.element_size(), top_k)
    packed = x_TH.new_empty((num_rows, size), dtype=torch.uint8)
    packed.view(x_TH.dtype)[:num_tokens, :hidden_size] = x_TH
    at = _aligned(hidden_size * x_TH.element_size()) // _WORD
    packed.view(torch.float32)[:num_tokens, at : at + top_k] = weights_TK
    integers = packed.view(torch.int32)[:, at + top_k :]
    integers[:num_tokens, :top_k] = lanes_TK
    if num_tokens < num_rows:
        integers[num_tokens:, :top_k] = -1
    integers[:, top_k] = int(needs_grad)
    return packed


def unpack_tokens(packed: torch.Tensor, hidden_size: int, dtype: torch.dtype, top_k: int) -> Tokens:
    """The views of what `pack_tokens` of all ranks made, one rank after another."""
    at = _aligned(hidden_size * dtype.itemsize) // _WORD
    integers = packed.view(torch.int32)[:, at + top_k :]
    return Tokens(
        rows_RH=packed.view(dtype)[:, :hidden_size],
        weights_RK=packed.view(torch.float32)[:, at : at + top_k],
        lanes_RK=integers[:, :top_k],
        needs_grad_R=integers[:, top_k],
    )
