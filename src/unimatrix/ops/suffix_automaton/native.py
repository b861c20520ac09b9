"""The online suffix automaton, compiled: Ukkonen's suffix tree that knows its latest leaves.

The point where Ukkonen's construction stands after a token is the longest suffix that occurred
before: the match of equation E10. While predictions come true the match grows by one, its latest
occurrence moves along, and nothing else is touched. Otherwise the suffixes that the token makes
unique become leaves, longest first, down to one that has met the token before. Leaf i starts at
position i, so painting the path from each new leaf to the root with i keeps the latest start of
every string in the tree.

Nodes of at most SPLAY_LENGTH tokens are painted one by one (6 a token on a novel of 1 MB). Longer
ones are rare in text but a chain of thousands in a run; they form a link-cut tree, where a path of
equal paint is one splay tree by length: LATEST counts at its root only, LEFT and RIGHT lead to
shorter and longer nodes, PARENT of its root is the node above the path. So a token costs
O(SPLAY_LENGTH + log n) amortised, whatever the text.

Numba counts references to arrays at every call, which costs as much as the work itself: hence one
long kernel for what happens at every token, and functions for what is rare.
"""

# Numba infers the types of its kernels.
# mypy: allow-untyped-defs

import numpy as np
import torch

from unimatrix.errors import InputError
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.threads import Shaped, map_rows
from unimatrix.ops.suffix_automaton.storage import (
    ACTIVE_NODE,
    CHILD_A,
    CHILD_B,
    EDGE_CHILD,
    EDGE_NODE,
    EDGE_SYMBOL,
    LATEST,
    LEFT,
    LENGTH,
    LINK,
    MATCH_LENGTH,
    MATCH_START,
    MAX_TOKENS,
    NUM_EDGES,
    NUM_HELD,
    NUM_INDEXED,
    NUM_NODES,
    NUM_TOKENS,
    NUM_VISITS,
    PARENT,
    RIGHT,
    SYMBOL_A,
    SYMBOL_B,
    AutomatonState,
    bound_capacity,
    extend_rows,
)

SPLAY_LENGTH = 32
NUM_PUSHED, NUM_PREDICTED, NODES_NEEDED, EDGES_NEEDED = range(4)
"""What ``progress`` holds of a row: tokens read and predicted, and the room that is missing."""


@part()
def _find_slot(edges, node, symbol):
    """Return the slot of the edge, or the empty slot where it belongs."""
    mixed = np.uint64(node) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= np.uint64(symbol) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    num_slots = edges.shape[0]
    slot = np.int64(((mixed >> np.uint64(32)) * np.uint64(num_slots)) >> np.uint64(32))
    while edges[slot, EDGE_CHILD] != 0 and (
        edges[slot, EDGE_NODE] != node or edges[slot, EDGE_SYMBOL] != symbol
    ):
        slot += 1
        if slot == num_slots:
            slot = np.int64(0)
    return slot


@part()
def _rotate(nodes, splays, x):
    """Lift ``x`` over its parent; if that was the splay root, its paint moves along."""
    p = nodes[x, PARENT]
    g = nodes[p, PARENT]
    side = RIGHT if splays[p, RIGHT] == x else LEFT
    other = LEFT + RIGHT - side
    inner = splays[x, other]
    splays[p, side] = inner
    if inner != 0:
        nodes[inner, PARENT] = p
    splays[x, other] = p
    nodes[p, PARENT] = x
    nodes[x, PARENT] = g
    if splays[g, LEFT] == p:
        splays[g, LEFT] = x
    elif splays[g, RIGHT] == p:
        splays[g, RIGHT] = x
    nodes[x, LATEST] = nodes[p, LATEST]


@part()
def _splay(nodes, splays, x):
    """Make ``x`` the root of its splay tree; return the number of rotations."""
    num_rotations = 0
    while True:
        p = nodes[x, PARENT]
        if splays[p, LEFT] != x and splays[p, RIGHT] != x:
            return num_rotations
        g = nodes[p, PARENT]
        if splays[g, LEFT] == p or splays[g, RIGHT] == p:
            straight = (splays[p, LEFT] == x) == (splays[g, LEFT] == p)
            _rotate(nodes, splays, p if straight else x)
            num_rotations += 1
        _rotate(nodes, splays, x)
        num_rotations += 1


@part()
def _cut_above(nodes, splays, x):
    """End the path of equal paint just above ``x``; return the number of rotations.

    The upper part is painted next, all of it, so it needs no paint here.
    """
    num_rotations = _splay(nodes, splays, x)
    above = splays[x, LEFT]
    if above != 0:
        splays[x, LEFT] = 0
        nodes[above, PARENT] = nodes[x, PARENT]
    return num_rotations


@part()
def _paint_long(nodes, splays, x, start, splay_length):
    """Paint ``x`` and the long nodes above; return the first short node and the visits."""
    visits = 0
    lower = np.int64(0)
    while nodes[x, LENGTH] > splay_length:
        visits += 1 + _splay(nodes, splays, x)
        below = splays[x, RIGHT]
        if below != 0:
            nodes[below, LATEST] = nodes[x, LATEST]
        splays[x, RIGHT] = lower
        lower = x
        x = np.int64(nodes[x, PARENT])
    nodes[lower, LATEST] = start
    return x, visits


@part()
def _scan_row(
    input_ids, num_real, predicted_ids, match_lengths, progress,
    tokens, nodes, splays, edges, counters, splay_length,
):  # fmt: skip
    """Predict after each token of a row, as far as the row's buffers reach (``progress``)."""
    num_pushed, num_predicted = progress[NUM_PUSHED], progress[NUM_PREDICTED]
    held, indexed = counters[NUM_HELD], counters[NUM_INDEXED]
    matched, earlier = counters[MATCH_LENGTH], counters[MATCH_START]
    num_nodes, num_edges = counters[NUM_NODES], counters[NUM_EDGES]
    node, visits = counters[ACTIVE_NODE], counters[NUM_VISITS]
    while num_predicted < num_real:
        if indexed == held:
            if held == tokens.shape[0]:
                break
            tokens[held] = input_ids[num_pushed]
            held += 1
            num_pushed += 1
        symbol = np.int64(tokens[indexed])
        # Every suffix of the match has been followed by this, inside an edge by nothing else.
        expected = np.int64(tokens[earlier + matched])
        if matched > 0 and symbol == expected:
            matched += 1
        else:
            nodes_needed, edges_needed = num_nodes + matched, num_edges + matched + 1
            if nodes_needed > nodes.shape[0] or 3 * edges_needed > 2 * edges.shape[0]:
                progress[NODES_NEEDED] = nodes_needed
                progress[EDGES_NEEDED] = edges_needed
                break
            unlinked = np.int64(0)
            depth = np.int64(nodes[node, LENGTH])
            while True:
                start = indexed - matched
                # Go down to the match; if it ends at a node, look for the symbol there.
                while True:
                    key = symbol if depth == matched else np.int64(tokens[start + depth])
                    child, column, slot = np.int64(0), CHILD_A, np.int64(-1)
                    if nodes[node, SYMBOL_A] == key and nodes[node, CHILD_A] != 0:
                        child = np.int64(nodes[node, CHILD_A])
                    elif nodes[node, SYMBOL_B] == key and nodes[node, CHILD_B] != 0:
                        column = CHILD_B
                        child = np.int64(nodes[node, CHILD_B])
                    elif nodes[node, LINK] & 1:
                        slot = _find_slot(edges, node, key)
                        child = np.int64(edges[slot, EDGE_CHILD])
                    if depth == matched or child < 0 or nodes[child, LENGTH] > matched:
                        break
                    node = child
                    depth = np.int64(nodes[node, LENGTH])
                    visits += 1
                parent = node
                if depth < matched:
                    # It ends inside an edge: a new node there, with the old child and the leaf.
                    node = num_nodes
                    num_nodes += 1
                    nodes[node, PARENT] = parent
                    nodes[node, LENGTH] = matched
                    nodes[node, LINK] = 0
                    nodes[node, SYMBOL_A], nodes[node, CHILD_A] = expected, child
                    nodes[node, SYMBOL_B], nodes[node, CHILD_B] = symbol, ~start
                    splays[node, LEFT], splays[node, RIGHT] = 0, 0
                    if slot < 0:
                        nodes[parent, column] = node
                    else:
                        edges[slot, EDGE_CHILD] = node
                    if child > 0:
                        if nodes[child, LENGTH] > splay_length:
                            visits += _cut_above(nodes, splays, child)
                        nodes[child, PARENT] = node
                if unlinked != 0:
                    nodes[unlinked, LINK] |= 2 * node
                unlinked = node if depth < matched else np.int64(0)
                if depth == matched:
                    if child != 0:
                        break
                    if slot < 0:
                        nodes[node, LINK] |= 1
                        slot = _find_slot(edges, node, symbol)
                    edges[slot, EDGE_NODE] = node
                    edges[slot, EDGE_SYMBOL] = symbol
                    edges[slot, EDGE_CHILD] = ~start
                    num_edges += 1
                linked = np.int64(nodes[parent, LINK] >> 1)
                depth = np.int64(nodes[linked, LENGTH])  # loaded while the paint goes on
                visits += 1
                if nodes[node, LENGTH] > splay_length:
                    node, num_visits = _paint_long(nodes, splays, node, start, splay_length)
                    visits += num_visits
                while node != 0:
                    nodes[node, LATEST] = start
                    node = np.int64(nodes[node, PARENT])
                    visits += 1
                node = linked
                if matched == 0:
                    break
                matched -= 1
            if child != 0:
                matched += 1
                earlier = ~child
            if child > 0:
                if nodes[child, LENGTH] > splay_length:
                    visits += _splay(nodes, splays, child)
                earlier = np.int64(nodes[child, LATEST])
        indexed += 1
        if indexed == held and num_predicted < num_pushed:
            if matched > 0:
                predicted_ids[num_predicted] = tokens[earlier + matched]
                match_lengths[num_predicted] = matched
            num_predicted += 1
    counters[NUM_TOKENS] += num_pushed - progress[NUM_PUSHED]
    progress[NUM_PUSHED], progress[NUM_PREDICTED] = num_pushed, num_predicted
    counters[NUM_HELD], counters[NUM_INDEXED] = held, indexed
    counters[MATCH_LENGTH], counters[MATCH_START] = matched, earlier
    counters[NUM_NODES], counters[NUM_EDGES] = num_nodes, num_edges
    counters[ACTIVE_NODE], counters[NUM_VISITS] = node, visits


@kernel()
def _scan_rows(
    first, last, input_ids, lengths, predicted_ids, match_lengths, progress,
    tokens, nodes, splays, edges, counters, splay_length,
):  # fmt: skip
    for row in range(first, last):
        progress[row, NODES_NEEDED] = 0
        while progress[row, NUM_PREDICTED] < lengths[row] and progress[row, NODES_NEEDED] == 0:
            counters[row, NUM_NODES] = max(1, counters[row, NUM_NODES])
            _scan_row(
                input_ids[row], lengths[row], predicted_ids[row], match_lengths[row], progress[row],
                tokens[row], nodes[row], splays[row], edges[row], counters[row], splay_length,
            )  # fmt: skip


@kernel()
def _rehash_rows(first, last, old_edges, new_edges):
    """Put the entries of a hash table into an empty, larger one."""
    for row in range(first, last):
        for slot in range(old_edges.shape[1]):
            entry = old_edges[row, slot]
            if entry[EDGE_CHILD] != 0:
                new_edges[row, _find_slot(new_edges[row], entry[EDGE_NODE], entry[EDGE_SYMBOL])] = (
                    entry
                )


def _reserve_index(automaton: AutomatonState, num_nodes: int, num_slots: int) -> AutomatonState:
    """Return an automaton with at least that many nodes and hash slots."""
    if num_nodes > automaton.nodes.shape[1]:
        automaton = automaton._replace(
            nodes=extend_rows(automaton.nodes, num_nodes),
            splays=extend_rows(automaton.splays, num_nodes),
        )
    if num_slots > automaton.edges.shape[1]:
        rows, _, columns = automaton.edges.shape
        edges = automaton.edges.new_zeros(rows, num_slots, columns)
        map_rows(_rehash_rows, rows, Shaped(automaton.edges), Shaped(edges))
        automaton = automaton._replace(edges=edges)
    return automaton


def _reserve_tokens(automaton: AutomatonState, num_new: int) -> AutomatonState:
    """Return an automaton with room for ``num_new`` more tokens in every row.

    There is room for the nodes and hash slots of text; the kernel stops where that is too little.
    """
    held = int(automaton.counters[:, NUM_HELD].max())
    capacity = automaton.tokens.shape[1]
    if held + num_new <= capacity:
        return automaton
    if held + num_new > MAX_TOKENS:
        raise InputError(
            f"an automaton of {held + num_new} tokens exceeds {MAX_TOKENS}; set a window."
        )
    grown = max(held + num_new, 2 * capacity if held > 0 else 0)
    automaton = automaton._replace(tokens=extend_rows(automaton.tokens, grown))
    return _reserve_index(automaton, grown * 5 // 8, grown * 3 // 4)


def _grow_index(automaton: AutomatonState, num_nodes: int, num_edges: int) -> AutomatonState:
    """Return an automaton with room for that, and for half as much again as it had."""
    most_nodes, most_slots = bound_capacity(automaton.tokens.shape[1])
    num_slots = (3 * num_edges + 1) // 2
    have_nodes, have_slots = automaton.nodes.shape[1], automaton.edges.shape[1]
    if num_nodes > have_nodes:
        num_nodes = max(num_nodes, min(most_nodes, have_nodes * 3 // 2))
    if num_slots > have_slots:
        num_slots = max(num_slots, min(most_slots, have_slots * 3 // 2))
    return _reserve_index(automaton, num_nodes, num_slots)


def scan_native(
    input_ids: torch.Tensor, lengths: torch.Tensor, automaton: AutomatonState
) -> tuple[torch.Tensor, torch.Tensor, AutomatonState]:
    """Predict after each token; see ``predict_from_suffix``.

    Args:
        input_ids: ``[B, T]`` int64, contiguous, on the CPU.
        lengths: ``[B]`` int64 real tokens.
        automaton: contiguous; its tensors are changed in place or outgrown.

    Returns:
        Predicted ids and match lengths, ``[B, T]`` int64, and the automaton to go on with.
    """
    batch = input_ids.shape[0]
    predicted_ids = torch.full_like(input_ids, -1)
    match_lengths = torch.zeros_like(input_ids)
    progress = torch.zeros(batch, 4, dtype=torch.int64)
    call = [input_ids, lengths, predicted_ids, match_lengths, progress]
    automaton = _reserve_tokens(automaton, int(lengths.max()))
    while True:
        map_rows(_scan_rows, batch, *map(Shaped, (*call, *automaton)), SPLAY_LENGTH)
        num_nodes, num_edges = progress[:, NODES_NEEDED:].amax(0).tolist()
        if num_nodes == 0:
            return predicted_ids, match_lengths, automaton
        automaton = _grow_index(automaton, num_nodes, num_edges)
