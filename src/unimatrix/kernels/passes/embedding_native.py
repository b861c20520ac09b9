"""Rows of an embedding in Numba, their gradients summed by all threads."""
# mypy: allow-untyped-defs

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimatrix.errors import InputError
from unimatrix.ops.numba.compile import kernel
from unimatrix.ops.numba.lanes import OPTIONS, at, pointer
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import TILE, add_multiple, count_spans, sum_spans


@kernel(**OPTIONS)
def _take_spans(
    first, last, lanes, num_spans, num_rows, width, lowest, token_ids, table, rows, num_strange
):  # fmt: skip
    num_tokens = len(table) // width
    for span in range(first, last):
        num_strange[span] = 0
        for row in range(span * num_rows // num_spans, (span + 1) * num_rows // num_spans):
            number, target = token_ids[row], pointer(rows, row * width)
            for j in range(width):
                target[j] = 0
            if 0 <= number < num_tokens:
                add_multiple(lanes, pointer(table, number * width), 1.0, width, target)
            elif number < lowest or number >= num_tokens:
                num_strange[span] += 1


@kernel(**OPTIONS)
def _sum_spans(first, last, lanes, num_spans, num_rows, width, token_ids, drows, dtables):
    num_numbers = len(dtables) // num_spans
    for span in range(first, last):
        dtables[span * num_numbers : (span + 1) * num_numbers] = 0
        dtable = pointer(dtables, span * num_numbers)
        for row in range(span * num_rows // num_spans, (span + 1) * num_rows // num_spans):
            if token_ids[row] >= 0:
                grad = pointer(drows, row * width)
                add_multiple(lanes, grad, 1.0, width, at(dtable, token_ids[row] * width))


class _EmbedTokens(torch.autograd.Function):
    """The rows with their gradient; not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, token_ids: Tensor, lowest: int, table: Tensor) -> Tensor:
        token_ids, table = token_ids.contiguous(), table.contiguous()
        width, num_rows = table.shape[1], token_ids.numel()
        num_spans = count_spans(-(-num_rows // TILE))
        rows = table.new_empty(*token_ids.shape, width)
        num_strange = token_ids.new_empty(num_spans)
        sizes = (num_spans, num_rows, width, lowest)
        given = (token_ids, table, rows, num_strange)
        run_rows(_take_spans, LANES, num_spans, 8 * num_rows * width // num_spans, *sizes, *given)
        if num_strange.any():
            is_strange = (token_ids < lowest) | (token_ids >= table.shape[0])
            raise InputError(
                f"token id {int(token_ids[is_strange][0])} is not in the vocabulary; pass 0 to "
                f"{table.shape[0] - 1}"
            )
        ctx.save_for_backward(token_ids)
        ctx.shape = table.shape
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        (token_ids,) = ctx.saved_tensors
        num_rows, width = token_ids.numel(), ctx.shape[1]
        num_spans = count_spans(-(-num_rows // TILE))
        dtables = drows.new_empty(num_spans, ctx.shape.numel())
        given = (num_spans, num_rows, width, token_ids, drows, dtables)
        run_rows(_sum_spans, LANES, num_spans, 8 * num_rows * width // num_spans, *given)
        return None, None, sum_spans(dtables).view(ctx.shape)


def embed_tokens_native(token_ids: Tensor, table: Tensor, *, allows_none: bool) -> Tensor:
    """Take rows of a table on the CPU.

    Args:
        token_ids: [...] int64.
        table: [V, D] float32 or float64.
        allows_none: -1 stands for no token, whose row is zero.

    Returns:
        [..., D], differentiable once in the table.

    Raises:
        InputError: for an id that is not in the table.
    """
    rows: Tensor = _EmbedTokens.apply(token_ids, -1 if allows_none else 0, table)
    return rows
