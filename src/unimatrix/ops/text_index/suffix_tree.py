"""The tree of suffixes: the longest of them that stood before, found while the latest is put in.

A suffix is the last M tokens up to a column, read backwards. The suffixes that end in the window
form a binary search tree by these strings in which a parent is always later than its children. So
the new suffix is put in at the root: on the way down, the tree falls into what is smaller and what
is greater. Of all suffixes that share m tokens with the new one the latest is on this way, since
whatever lay between would share as many and be earlier. What leaves the window is below all that
stays and is not visited again: nothing has to be deleted.

Two trees of random order are about 2 ln W deep. So that no text can order a tree, tokens are
compared by a hash that differs with the depth; which order it is does not matter. Suffixes are in
256 trees by their last token.

A plain function of whole numbers: the reference calls it, the compiled index is made of it.
Source: binary trees as in the match finder of LZMA; here on reversed text.
"""

from typing import Any

MOST_MATCHED = 64
"""M, the tokens that are compared: a longer match counts as one of so many. Less in windows of less
than twice as many."""
NUM_ROOTS = 256


def insert_suffix(tokens: Any, children: Any, roots: Any, column: int, ends: Any) -> Any:
    """Put in the suffix that ends in a column, and find the longest that stood before.

    A child is in a column that is further back than its parent's; -1 or any other is none.

    Args:
        tokens: [W], the ring, the new token among them.
        children: [W, 2], columns of the smaller and of the greater child.
        roots: [256], the latest columns by the last eight bits of the token; -1 for none.
        column: where the new token is.
        ends: [2, 2], overwritten: where the smaller and the greater half go on.

    Returns:
        how many tokens back the match ends, at most W - M, and its length, at most M; 0 for none.
    """
    window = len(tokens)
    most = min(MOST_MATCHED, max(1, window // 2))
    root = tokens[column] % NUM_ROOTS
    visited, distance = int(roots[root]), window
    if visited >= 0 and tokens[visited] % NUM_ROOTS == root:
        distance = column - visited if column > visited else column - visited + window
    roots[root] = column
    ends[0, 0], ends[0, 1], ends[1, 0], ends[1, 1] = column, 0, column, 1
    shared_smaller, shared_greater, longest, found = 0, 0, 0, 0
    while distance <= window - most:
        # Whatever is between two suffixes shares with both what they share with each other.
        length = min(shared_smaller, shared_greater)
        new = column - length if column >= length else column - length + window
        old = visited - length if visited >= length else visited - length + window
        while length < most and tokens[new] == tokens[old]:
            length += 1
            new = new - 1 if new > 0 else window - 1
            old = old - 1 if old > 0 else window - 1
        if length > longest:
            longest, found = length, distance
        if length == most:
            break
        of_depth = length * 0x5BD1
        order_old = ((tokens[old] ^ of_depth) * 0x9E3779B1) & 0xFFFFFFFF
        order_new = ((tokens[new] ^ of_depth) * 0x9E3779B1) & 0xFFFFFFFF
        is_greater = order_old > order_new
        side = 1 if is_greater else 0
        shared_smaller = shared_smaller if is_greater else length
        shared_greater = length if is_greater else shared_greater
        children[ends[side, 0], ends[side, 1]] = visited
        ends[side, 0], ends[side, 1] = visited, 1 - side
        child = int(children[visited, 1 - side])
        further = column - child if column > child else column - child + window
        # In the column of one that has left is a later one.
        distance = further if child >= 0 and further > distance else window
        visited = child
    for side in range(2):
        child = -1
        if longest == most:  # the new suffix takes the place of an equal one
            child = int(children[visited, side])
            further = column - child if column > child else column - child + window
            child = child if further > distance else -1
        children[ends[side, 0], ends[side, 1]] = child
    return found, longest
