"""Rows of an embedding in Numba, their gradients summed by all threads."""
# mypy: allow-untyped-defs

from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.numba.compile import kernel
from unimatrix.ops.numba.lanes import OPTIONS, at, pointer
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import TILE, add_multiple, count_spans, sum_spans
from unimatrix.ops.operator import declare_operator


@kernel(**OPTIONS)
def _take_spans(
    first, last, lanes, num_spans, num_rows, width, lowest, token_ids, table, rows, num_invalid
):  # fmt: skip
    num_tokens = len(table) // width
    for span in range(first, last):
        num_invalid[span] = 0
        for row in range(span * num_rows // num_spans, (span + 1) * num_rows // num_spans):
            token_id, target = token_ids[row], pointer(rows, row * width)
            for j in range(width):
                target[j] = 0
            if 0 <= token_id < num_tokens:
                add_multiple(lanes, pointer(table, token_id * width), 1.0, width, target)
            elif token_id < lowest or token_id >= num_tokens:
                num_invalid[span] += 1


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


def _run_forward(token_ids: Tensor, table: Tensor, lowest: int, num_tokens: int) -> Tensor:
    token_ids, width, num_rows = token_ids.contiguous(), table.shape[1], token_ids.numel()
    num_spans = count_spans(-(-num_rows // TILE))
    rows = table.new_empty(*token_ids.shape, width)
    num_invalid = token_ids.new_empty(num_spans)
    inputs = (num_spans, num_rows, width, lowest, token_ids, table, rows, num_invalid)
    run_rows(_take_spans, LANES, num_spans, 8 * num_rows * width // num_spans, *inputs)
    if num_invalid.any():
        is_invalid = (token_ids < lowest) | (token_ids >= num_tokens)
        raise InputError(
            f"token id {int(token_ids[is_invalid][0])} is not in the vocabulary; pass 0 to "
            f"{num_tokens - 1}"
        )
    return rows


def _run_backward(token_ids: Tensor, num_tokens: int, drows: Tensor) -> tuple[Tensor]:
    num_rows, width = token_ids.numel(), drows.shape[-1]
    num_spans = count_spans(-(-num_rows // TILE))
    dtables = drows.new_empty(num_spans, num_tokens * width)
    inputs = (num_spans, num_rows, width, token_ids, drows, dtables)
    run_rows(_sum_spans, LANES, num_spans, 8 * num_rows * width // num_spans, *inputs)
    return (sum_spans(dtables).view(num_tokens, width),)


_embed_tokens = declare_operator(
    "embed_tokens", _run_forward, backward=_run_backward, gradients="table"
)


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
    rows: Tensor = _embed_tokens(token_ids, table, -1 if allows_none else 0, table.shape[0])
    return rows
