"""What an automaton keeps between calls: plain integer tensors, batch first.

The text is the essence; the rest is an index of it, a suffix tree whose leaves are the suffixes
that occurred once so far, and which can be built anew from the text. A node is a row of ``nodes``,
node 0 is the root. A child is a node if positive, the leaf of the suffix that starts at ``~child``
if negative, absent if 0. Every node but the root keeps two children in its row, since a node is
born with two; the others are in ``edges``, an open addressing hash table. On a novel that halves
the table, and most visits touch one cache line.

    nodes   PARENT, LATEST                        the node above; where the node's string last
                                                  began (of long nodes: see native.py)
            LENGTH, LINK                          of its string; 2 * suffix link, + 1 if the node
                                                  has children in ``edges``
            SYMBOL_A, CHILD_A, SYMBOL_B, CHILD_B
    splays  LEFT, RIGHT                           of long nodes, 0 if none
    edges   EDGE_NODE, EDGE_SYMBOL, EDGE_CHILD
"""

from typing import NamedTuple

import torch

from unimatrix.errors import InputError
from unimatrix.ops.checks import require_dtype, require_shape

PARENT, LATEST, LENGTH, LINK, SYMBOL_A, CHILD_A, SYMBOL_B, CHILD_B = range(8)
LEFT, RIGHT = range(2)
EDGE_NODE, EDGE_SYMBOL, EDGE_CHILD = range(3)
(
    NUM_TOKENS,  # real tokens since the stream began
    NUM_HELD,  # of them in `tokens`, the latest ones
    NUM_INDEXED,  # of those in the tree, the first ones; the rest follows when needed
    MATCH_LENGTH,
    MATCH_START,  # latest start of the match before the current one
    ACTIVE_NODE,  # a node whose string begins the match
    NUM_NODES,  # 0: none yet, and everything in the index is 0
    NUM_EDGES,
    NUM_VISITS,  # nodes visited and splay rotations: the work done, for tests
) = range(9)
NUM_COUNTERS = 10
"""One more than are used: files have it, 0 unless an earlier release had a window."""

MAX_TOKENS = 2**30
_MIN_TOKENS = 16


class AutomatonState(NamedTuple):
    """The suffix automaton of a batch, on the CPU; rows are independent.

    ``index_select`` over dim 0 of every tensor gives a working automaton of those rows.
    """

    tokens: torch.Tensor  # [B, P] int32, P the capacity in tokens
    nodes: torch.Tensor  # [B, X, 8] int32, X the capacity in nodes
    splays: torch.Tensor  # [B, X, 2] int32
    edges: torch.Tensor  # [B, Y, 3] int32, Y the slots of the hash table
    counters: torch.Tensor  # [B, 10] int64


LETTERS = {
    "tokens": "B P",
    "nodes": "B X 8",
    "splays": "B X 2",
    "edges": "B Y 3",
    "counters": "B 10",
}
DTYPES = {"counters": torch.int64}
"""Of the tensors that are not int32."""


def empty_automaton(batch: int, num_tokens: int = _MIN_TOKENS) -> AutomatonState:
    """Build the automaton of ``batch`` empty streams.

    Args:
        batch: number of rows B.
        num_tokens: tokens for which there is room from the start.

    Returns:
        A new automaton on the CPU.

    Cost:
        62 bytes a row and token.
    """
    num_nodes, num_slots = bound_capacity(num_tokens)
    return AutomatonState(
        tokens=torch.zeros(batch, num_tokens, dtype=torch.int32),
        nodes=torch.zeros(batch, num_nodes, 8, dtype=torch.int32),
        splays=torch.zeros(batch, num_nodes, 2, dtype=torch.int32),
        edges=torch.zeros(batch, num_slots, 3, dtype=torch.int32),
        counters=torch.zeros(batch, NUM_COUNTERS, dtype=torch.int64),
    )


def bound_capacity(num_tokens: int) -> tuple[int, int]:
    """Return the nodes and hash slots that suffice for any ``num_tokens`` tokens."""
    # n leaves: at most n nodes with the root, at most n edges beyond two a node; load <= 2/3.
    return num_tokens, (3 * num_tokens + 1) // 2


def extend_rows(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``tensor`` with ``size`` entries a row, the new ones 0."""
    extended = tensor.new_zeros(tensor.shape[0], size, *tensor.shape[2:])
    extended[:, : tensor.shape[1]] = tensor
    return extended


def copy_automaton(automaton: AutomatonState) -> AutomatonState:
    """Return a copy that shares nothing, contiguous on the CPU."""
    layout = torch.contiguous_format
    return AutomatonState(*(x.to("cpu", copy=True, memory_format=layout) for x in automaton))


def keep_text(automaton: AutomatonState) -> AutomatonState:
    """Return the automaton of the same text without its index, sharing nothing.

    Args:
        automaton: from anywhere; of its numbers, those of tokens alone are used.

    Raises:
        InputError: if shapes, types or counts are not those of an automaton.
    """
    sizes = {"8": 8, "2": 2, "3": 3, "10": NUM_COUNTERS}
    for name, letters in LETTERS.items():
        tensor = getattr(automaton, name)
        require_shape(f"automaton.{name}", tensor, letters, sizes)
        require_dtype(f"automaton.{name}", tensor, DTYPES.get(name, torch.int32))
    capacity, counters = automaton.tokens.shape[1], torch.zeros_like(automaton.counters)
    of_text = [NUM_TOKENS, NUM_HELD]
    counters[:, of_text] = automaton.counters[:, of_text]
    num_tokens, held = counters[:, of_text].unbind(dim=1)
    if (
        automaton.counters[:, -1].any()
        or not ((held == num_tokens) & (held >= 0) & (held <= capacity)).all()
    ):
        raise InputError(
            f"the automaton counts {held.tolist()} tokens held of {num_tokens.tolist()} in room "
            f"for {capacity}; pass one that this model has made"
        )
    is_held = torch.arange(capacity) < held.unsqueeze(1)
    return AutomatonState(
        tokens=torch.where(is_held, automaton.tokens, 0),
        nodes=torch.zeros_like(automaton.nodes),
        splays=torch.zeros_like(automaton.splays),
        edges=torch.zeros_like(automaton.edges),
        counters=counters,
    )


def count_live_bytes(automaton: AutomatonState) -> torch.Tensor:
    """Count the bytes in use, which the capacity may exceed.

    Returns:
        ``[B]`` int64, bytes a row: its text, nodes, hash entries and counters.
    """
    counters = automaton.counters
    num_bytes = 4 * counters[:, NUM_HELD] + 8 * NUM_COUNTERS
    num_bytes = num_bytes + 4 * (2 + 8) * counters[:, NUM_NODES]
    return num_bytes + 4 * 3 * counters[:, NUM_EDGES]
