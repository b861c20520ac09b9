"""The online suffix automaton, compiled: Ukkonen's suffix tree with the latest start of each node.

The point where Ukkonen's construction stands after token t is the longest suffix that occurred
before, which is the match that equation E10 asks for. As long as the prediction comes true the
match grows by one and its latest occurrence stays, so nothing is touched. Otherwise the suffixes
that the token makes unique become leaves, longest first, until a suffix is found that has met the
token before; leaf i starts at position i, so painting the path from a new leaf to the root with i
keeps the latest start of every string in the tree.

Painting walks up the parents of short nodes (5.9 nodes a token on a novel of 1 MB). Nodes longer
than SPLAY_LENGTH, rare in text but a chain of thousands in a run, are held in the splay trees of a
link-cut tree instead: a path of equal paint is one splay tree, its paint is LATEST of the splay
root, LEFT and RIGHT are shorter and longer nodes, PARENT of the splay root is the node above the
path. So a token costs amortised O(SPLAY_LENGTH + log n) at worst.
"""

import numpy as np
import torch
from numba import njit

from unimatrix.errors import InputError
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
    MAX_TOKENS,
    WINDOW,
    AutomatonState,
    bound_capacity,
    extend_rows,
)
from unimatrix.ops.threads import map_rows

SPLAY_LENGTH = 64
_PUSHED, _DONE, _NODES_WANTED, _EDGES_WANTED = range(4)


@njit(nogil=True, cache=True)
def _hash_edge(node, symbol, num_slots):
    mixed = np.uint64(node) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= np.uint64(symbol) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return np.int64(((mixed >> np.uint64(32)) * np.uint64(num_slots)) >> np.uint64(32))


@njit(nogil=True, cache=True)
def _find_slot(edges, node, symbol):
    """Return the slot of the edge, or the empty slot where it belongs."""
    slot = _hash_edge(node, symbol, edges.shape[0])
    while edges[slot, EDGE_CHILD] != 0 and (
        edges[slot, EDGE_NODE] != node or edges[slot, EDGE_SYMBOL] != symbol
    ):
        slot = slot + 1 if slot + 1 < edges.shape[0] else 0
    return slot


@njit(nogil=True, cache=True)
def _find_child(nodes, edges, node, symbol):
    """Return the child by ``symbol`` (0: none) and its place: a column, or ~slot of ``edges``."""
    if nodes[node, SYMBOL_A] == symbol and nodes[node, CHILD_A] != 0:
        return np.int64(nodes[node, CHILD_A]), np.int64(CHILD_A)
    if nodes[node, SYMBOL_B] == symbol and nodes[node, CHILD_B] != 0:
        return np.int64(nodes[node, CHILD_B]), np.int64(CHILD_B)
    if nodes[node, LINK] & 1 == 0:
        return np.int64(0), np.int64(0)
    slot = _find_slot(edges, node, symbol)
    return np.int64(edges[slot, EDGE_CHILD]), ~slot


@njit(nogil=True, cache=True)
def _add_leaf(nodes, edges, node, symbol, start):
    """Add the leaf of the suffix at ``start``; return the number of entries put in ``edges``."""
    for column in (CHILD_A, CHILD_B):
        if nodes[node, column] == 0:
            nodes[node, column - 1] = symbol
            nodes[node, column] = ~start
            return 0
    nodes[node, LINK] |= 1
    slot = _find_slot(edges, node, symbol)
    edges[slot, EDGE_NODE] = node
    edges[slot, EDGE_SYMBOL] = symbol
    edges[slot, EDGE_CHILD] = ~start
    return 1


@njit(nogil=True, cache=True)
def _rotate(paths, nodes, x):
    """Lift ``x`` over its parent; the paint moves with the top."""
    p = paths[x, PARENT]
    g = paths[p, PARENT]
    side = RIGHT if nodes[p, RIGHT] == x else LEFT
    other = LEFT + RIGHT - side
    inner = nodes[x, other]
    nodes[p, side] = inner
    if inner != 0:
        paths[inner, PARENT] = p
    nodes[x, other] = p
    paths[p, PARENT] = x
    paths[x, PARENT] = g
    if nodes[g, LEFT] == p:
        nodes[g, LEFT] = x
    elif nodes[g, RIGHT] == p:
        nodes[g, RIGHT] = x
    paths[x, LATEST] = paths[p, LATEST]


@njit(nogil=True, cache=True)
def _splay(paths, nodes, x):
    """Make ``x`` the root of its splay tree; return the number of rotations."""
    rotations = 0
    while True:
        p = paths[x, PARENT]
        if nodes[p, LEFT] != x and nodes[p, RIGHT] != x:
            return rotations
        g = paths[p, PARENT]
        if nodes[g, LEFT] == p or nodes[g, RIGHT] == p:
            straight = (nodes[p, LEFT] == x) == (nodes[g, LEFT] == p)
            _rotate(paths, nodes, p if straight else x)
            rotations += 1
        _rotate(paths, nodes, x)
        rotations += 1


@njit(nogil=True, cache=True)
def _paint(paths, nodes, node, start, splay_length):
    """Set the latest start of ``node`` and all above it; return the number of visits."""
    visits = 1
    if nodes[node, LENGTH] > splay_length:
        lower = np.int64(0)
        while nodes[node, LENGTH] > splay_length:
            visits += 1 + _splay(paths, nodes, node)
            below = nodes[node, RIGHT]
            if below != 0:
                paths[below, LATEST] = paths[node, LATEST]
            nodes[node, RIGHT] = lower
            lower = node
            node = np.int64(paths[node, PARENT])
        paths[lower, LATEST] = start
    while node != 0:
        visits += 1
        paths[node, LATEST] = start
        node = np.int64(paths[node, PARENT])
    return visits


@njit(nogil=True, cache=True)
def _cut(paths, nodes, child):
    visits = _splay(paths, nodes, child)
    above = nodes[child, LEFT]
    if above != 0:
        nodes[child, LEFT] = 0
        paths[above, PARENT] = paths[child, PARENT]
        paths[above, LATEST] = paths[child, LATEST]
    return visits


@njit(nogil=True, cache=True)
def _paint_deep(paths, nodes, node, start, splay_length):
    visits = 1
    lower = np.int64(0)
    while nodes[node, LENGTH] > splay_length:
        visits += 1 + _splay(paths, nodes, node)
        below = nodes[node, RIGHT]
        if below != 0:
            paths[below, LATEST] = paths[node, LATEST]
        nodes[node, RIGHT] = lower
        lower = node
        node = np.int64(paths[node, PARENT])
    paths[lower, LATEST] = start
    return node, visits


@njit(nogil=True, cache=True)
def _hang_below(paths, nodes, child, node, splay_length):
    """Make ``node``, new between ``child`` and its parent, the parent; return the visits."""
    visits = 0
    if nodes[child, LENGTH] > splay_length:
        visits = _splay(paths, nodes, child)
        above = nodes[child, LEFT]
        if above != 0:
            nodes[child, LEFT] = 0
            paths[above, PARENT] = paths[child, PARENT]
            paths[above, LATEST] = paths[child, LATEST]
    paths[child, PARENT] = node
    return visits


@njit(nogil=True, cache=True)
def _split_edge(paths, nodes, edges, node, place, symbol, new):
    """Put row ``new`` on the edge at ``place`` of ``node``; return the child now below it."""
    if place >= 0:
        child = np.int64(nodes[node, place])
        nodes[node, place] = new
    else:
        child = np.int64(edges[~place, EDGE_CHILD])
        edges[~place, EDGE_CHILD] = new
    paths[new, PARENT] = node
    nodes[new, LINK] = 0
    nodes[new, SYMBOL_A] = symbol
    nodes[new, CHILD_A] = child
    nodes[new, CHILD_B] = 0
    nodes[new, LEFT] = 0
    nodes[new, RIGHT] = 0
    return child


@njit(nogil=True, cache=True)
def _clear_index(nodes, edges):
    edges[:] = 0
    nodes[0] = 0


@njit(nogil=True, cache=True)
def _insert_suffixes(
    indexed, expected, matched, node, num_nodes, num_edges,
    tokens, paths, nodes, edges, splay_length,
):  # fmt: skip
    num_slots = edges.shape[0]
    symbol = np.int64(tokens[indexed])
    visits = np.int64(0)
    earlier = np.int64(0)
    unlinked = np.int64(0)
    while True:
        start = indexed - matched
        depth = np.int64(nodes[node, LENGTH])
        while True:
            key = symbol if depth == matched else np.int64(tokens[start + depth])
            slot = np.int64(-1)
            if nodes[node, SYMBOL_A] == key and nodes[node, CHILD_A] != 0:
                place = CHILD_A
                child = np.int64(nodes[node, CHILD_A])
            elif nodes[node, SYMBOL_B] == key and nodes[node, CHILD_B] != 0:
                place = CHILD_B
                child = np.int64(nodes[node, CHILD_B])
            elif nodes[node, LINK] & 1:
                slot = _hash_edge(node, key, num_slots)
                child = np.int64(edges[slot, EDGE_CHILD])
                while child != 0 and (
                    edges[slot, EDGE_NODE] != node or edges[slot, EDGE_SYMBOL] != key
                ):
                    slot += 1
                    if slot == num_slots:
                        slot = np.int64(0)
                    child = np.int64(edges[slot, EDGE_CHILD])
            else:
                child = np.int64(0)
            if child < 0 or depth == matched or nodes[child, LENGTH] > matched:
                break
            node = child
            depth = np.int64(nodes[node, LENGTH])
            visits += 1
        parent = node
        if depth < matched:
            node = num_nodes
            num_nodes += 1
            paths[node, PARENT] = parent
            paths[node, LATEST] = start
            nodes[node, LENGTH] = matched
            nodes[node, LINK] = 0
            nodes[node, SYMBOL_A] = expected
            nodes[node, CHILD_A] = child
            nodes[node, SYMBOL_B] = symbol
            nodes[node, CHILD_B] = ~start
            nodes[node, LEFT] = 0
            nodes[node, RIGHT] = 0
            if slot < 0:
                nodes[parent, place] = node
            else:
                edges[slot, EDGE_CHILD] = node
            if child > 0:
                if nodes[child, LENGTH] > splay_length:
                    visits += _cut(paths, nodes, child)
                paths[child, PARENT] = node
            if unlinked != 0:
                nodes[unlinked, LINK] |= 2 * node
            unlinked = node
        else:
            if unlinked != 0:
                nodes[unlinked, LINK] |= 2 * node
                unlinked = np.int64(0)
            if child != 0:
                break
            if node == 0 and nodes[0, CHILD_B] == 0:
                column = CHILD_A if nodes[0, CHILD_A] == 0 else CHILD_B
                nodes[0, column - 1] = symbol
                nodes[0, column] = ~start
            else:
                if slot < 0:
                    nodes[node, LINK] |= 1
                    slot = _hash_edge(node, symbol, num_slots)
                    while edges[slot, EDGE_CHILD] != 0:
                        slot += 1
                        if slot == num_slots:
                            slot = np.int64(0)
                edges[slot, EDGE_NODE] = node
                edges[slot, EDGE_SYMBOL] = symbol
                edges[slot, EDGE_CHILD] = ~start
                num_edges += 1
        visits += 1
        if nodes[node, LENGTH] > splay_length:
            node, cost = _paint_deep(paths, nodes, node, start, splay_length)
            visits += cost
        while node != 0:
            visits += 1
            paths[node, LATEST] = start
            node = np.int64(paths[node, PARENT])
        node = np.int64(nodes[parent, LINK] >> 1)
        if matched == 0:
            break
        matched -= 1
    if child != 0:
        matched += 1
        earlier = ~child
        if child > 0:
            if nodes[child, LENGTH] > splay_length:
                visits += _splay(paths, nodes, child)
            earlier = np.int64(paths[child, LATEST])
    return matched, earlier, node, num_nodes, num_edges, visits


@njit(nogil=True, cache=True)
def _scan_row(
    input_ids, length, predicted_ids, match_lengths, progress,
    tokens, paths, nodes, edges, counters, splay_length,
):  # fmt: skip
    """Predict after each token of one row, or stop where the index may become too small."""
    num_slots = edges.shape[0]
    window = counters[WINDOW]
    held = counters[NUM_HELD]
    indexed = counters[NUM_INDEXED]
    matched = counters[MATCH_LENGTH]
    earlier = counters[MATCH_START]
    node = counters[ACTIVE_NODE]
    num_nodes = counters[NUM_NODES]
    num_edges = counters[NUM_EDGES]
    visits = counters[NUM_VISITS]
    pushed = progress[_PUSHED]
    done = progress[_DONE]
    if num_nodes == 0:
        num_nodes = np.int64(1)
    while done < length:
        if indexed == held:
            if window > 0 and held == 2 * window:
                tokens[:window] = tokens[window:].copy()
                held = window
                _clear_index(nodes, edges)
                indexed = np.int64(0)
                matched = np.int64(0)
                earlier = np.int64(0)
                node = np.int64(0)
                num_nodes = np.int64(1)
                num_edges = np.int64(0)
            tokens[held] = input_ids[pushed]
            held += 1
            pushed += 1
        symbol = np.int64(tokens[indexed])
        expected = np.int64(tokens[earlier + matched])
        if matched > 0 and symbol == expected:
            matched += 1
        else:
            if (
                num_nodes + matched > nodes.shape[0]
                or 3 * (num_edges + matched + 1) > 2 * edges.shape[0]
            ):
                progress[_NODES_WANTED] = num_nodes + matched
                progress[_EDGES_WANTED] = num_edges + matched + 1
                break
            matched, earlier, node, num_nodes, num_edges, cost = _insert_suffixes(
                indexed, expected, matched, node, num_nodes, num_edges,
                tokens, paths, nodes, edges, splay_length,
            )  # fmt: skip
            visits += cost
        indexed += 1
        if indexed == held and done < pushed:
            if matched > 0:
                predicted_ids[done] = tokens[earlier + matched]
                match_lengths[done] = matched
            done += 1
    counters[NUM_TOKENS] += pushed - progress[_PUSHED]
    progress[_PUSHED] = pushed
    progress[_DONE] = done
    counters[NUM_HELD] = held
    counters[NUM_INDEXED] = indexed
    counters[MATCH_LENGTH] = matched
    counters[MATCH_START] = earlier
    counters[ACTIVE_NODE] = node
    counters[NUM_NODES] = num_nodes
    counters[NUM_EDGES] = num_edges
    counters[NUM_VISITS] = visits


@njit(nogil=True, cache=True)
def _scan_rows(
    first, last, input_ids, lengths, predicted_ids, match_lengths, progress,
    tokens, paths, nodes, edges, counters, splay_length,
):  # fmt: skip
    for row in range(first, last):
        if lengths[row] > 0:
            _scan_row(
                input_ids[row], lengths[row], predicted_ids[row], match_lengths[row], progress[row],
                tokens[row], paths[row], nodes[row], edges[row], counters[row], splay_length,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def _rehash_rows(first, last, old_edges, new_edges):
    """Put the entries of a full hash table into an empty, larger one."""
    for row in range(first, last):
        for slot in range(old_edges.shape[1]):
            if old_edges[row, slot, EDGE_CHILD] != 0:
                entry = old_edges[row, slot]
                place = _find_slot(new_edges[row], entry[EDGE_NODE], entry[EDGE_SYMBOL])
                new_edges[row, place] = entry


def _reserve_index(automaton: AutomatonState, num_nodes: int, num_slots: int) -> AutomatonState:
    """Return an automaton with at least that many nodes and hash slots."""
    if num_nodes > automaton.nodes.shape[1]:
        automaton = automaton._replace(
            paths=extend_rows(automaton.paths, num_nodes),
            nodes=extend_rows(automaton.nodes, num_nodes),
        )
    if num_slots > automaton.edges.shape[1]:
        rows, _, columns = automaton.edges.shape
        edges = automaton.edges.new_zeros(rows, num_slots, columns)
        map_rows(_rehash_rows, rows, automaton.edges.numpy(), edges.numpy())
        automaton = automaton._replace(edges=edges)
    return automaton


def _reserve_tokens(automaton: AutomatonState, num_new: int) -> AutomatonState:
    """Return an automaton with room for ``num_new`` more tokens in every row.

    Nodes and hash slots get what text needs; the kernel asks for more where that is too little.
    """
    held, window = automaton.counters[:, [NUM_HELD, WINDOW]].amax(0).tolist()
    capacity = automaton.tokens.shape[1]
    if window > 0 or held + num_new <= capacity:
        return automaton
    if held + num_new > MAX_TOKENS:
        raise InputError(
            f"an automaton of {held + num_new} tokens exceeds {MAX_TOKENS}; set a window."
        )
    grown = max(held + num_new, 2 * capacity if held > 0 else 0)
    automaton = automaton._replace(tokens=extend_rows(automaton.tokens, grown))
    return _reserve_index(automaton, grown * 5 // 8, grown * 3 // 4)


def scan_native(
    input_ids: torch.Tensor, lengths: torch.Tensor, automaton: AutomatonState
) -> tuple[torch.Tensor, torch.Tensor, AutomatonState]:
    """Predict after each token; ``automaton`` is changed in place, or outgrown.

    Args:
        input_ids: ``[B, T]`` int64 on the CPU.
        lengths: ``[B]`` int64 real tokens.
        automaton: contiguous; the caller gives up its tensors.

    Returns:
        Predicted ids and match lengths, ``[B, T]`` int64, and the automaton to go on with.
    """
    batch = input_ids.shape[0]
    predicted_ids = torch.full_like(input_ids, -1)
    match_lengths = torch.zeros_like(input_ids)
    progress = torch.zeros(batch, 4, dtype=torch.int64)
    automaton = _reserve_tokens(automaton, int(lengths.max()))
    call = (input_ids, lengths, predicted_ids, match_lengths, progress)
    while True:
        arrays = [tensor.numpy() for tensor in (*call, *automaton)]
        map_rows(_scan_rows, batch, *arrays, SPLAY_LENGTH)
        if torch.equal(progress[:, _DONE], lengths):
            return predicted_ids, match_lengths, automaton
        most_nodes, most_slots = bound_capacity(automaton.tokens.shape[1])
        _, _, num_nodes, num_edges = progress.amax(0).tolist()
        if num_nodes > 0:
            num_nodes = min(most_nodes, max(num_nodes, automaton.nodes.shape[1] * 3 // 2))
        if num_edges > 0:
            grown = max((3 * num_edges + 1) // 2, automaton.edges.shape[1] * 3 // 2)
            num_edges = min(most_slots, grown)
        automaton = _reserve_index(automaton, num_nodes, num_edges)
