"""Attention around places: the tokens there, and a few heads that read them."""

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native, require_backend
from unimatrix.ops.checks import require_dtype, require_shape
from unimatrix.ops.indexed_attention.entries import (
    BEFORE,
    MOST_MATCHED,
    NUM_OFFSETS,
    REACH,
    Entries,
)
from unimatrix.ops.indexed_attention.reference import (
    attend_reference,
    find_entries_reference,
    share_reference,
    share_targets_reference,
    sum_around_reference,
)

__all__ = [
    "BEFORE",
    "MOST_MATCHED",
    "NUM_OFFSETS",
    "REACH",
    "Entries",
    "attend_entries",
    "choose_backend",
    "find_entries",
    "share_heads",
    "share_targets",
    "sum_around",
]


def choose_backend(backend: str, x: Tensor) -> str:
    """Return the back end that ``auto`` stands for, or the one that was chosen by name.

    Args:
        backend: ``auto``, ``reference`` or ``native``.
        x: a tensor of the call.

    Raises:
        InputError: if there is no such back end, or it cannot run here.
    """
    is_able = x.is_cpu and x.dtype in (torch.float32, torch.float64, torch.int64)
    if backend == "auto":
        return "native" if is_able and compiles_native() else "reference"
    if require_backend("indexed_attention", backend) == "native" and not is_able:
        raise InputError(
            f"backend 'native' takes float32 or float64 on the CPU, not {x.dtype} on {x.device}; "
            "pass auto"
        )
    return backend


def find_entries(text: Tensor, distances: Tensor, *, window: int, backend: str = "auto") -> Entries:
    """Return the tokens around the places of every position.

    Equation: E26. A position reads the 32 tokens before a place and the 48 from it on, if they are
    at most W - 17 tokens back and not ahead of it.
    Source: this project.

    Args:
        text: [B, S] int64, the last tokens of each stream, of which the last T are the positions;
            -1 is no token.
        distances: [B, T, P] int32, how far back each place is; -1 for none.
        window: W.
        backend: ``auto`` is ``native`` on the CPU, where it runs.

    Returns:
        the entries, E = 80 P; not differentiable.

    Raises:
        InputError: if a shape or type is not as above, or the back end does not exist.
    """
    sizes: dict[str, int] = {}
    require_shape("text", text, "B S", sizes)
    require_shape("distances", distances, "B T P", sizes)
    require_dtype("text", text, torch.int64)
    require_dtype("distances", distances, torch.int32)
    if choose_backend(backend, text) == "reference":
        return find_entries_reference(text, distances, window)
    from unimatrix.ops.indexed_attention.entries_native import find_entries_native

    return Entries(*find_entries_native(text, distances, window))


def sum_around(
    features: Tensor, kernels: Tensor, rows: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return, channel by channel, weighted sums of the 12 tokens before a token, and around it.

    Equation: E28, what stands under the gelu.
    Source: this project.

    Args:
        features: [B, S, D], zeros for no token.
        kernels: [2, D, 12], of the tokens before, the nearest last, and of those from it on.
        rows: [n] int64, each at most once: which sums are wanted. Token j of stream b has the two
            of 2 (b S + j), of the tokens before it, and 2 (b S + j) + 1, of both sides. ``None``
            is all 2 B S.
        backend: ``auto`` is ``native`` on the CPU, where it runs.

    Returns:
        [n, D]. Differentiable once (``native``) in features and kernels.

    Raises:
        InputError: if a shape or type is not as above, or the back end does not exist.
    """
    sizes: dict[str, int] = {"2": 2, "12": REACH}
    require_shape("features", features, "B S D", sizes)
    require_shape("kernels", kernels, "2 D 12", sizes)
    require_dtype("kernels", kernels, features.dtype)
    if rows is not None:
        sizes["n"] = rows.numel()  # may be none
        require_shape("rows", rows, "n", sizes)
        require_dtype("rows", rows, torch.int64)
    if choose_backend(backend, features) == "reference":
        return sum_around_reference(features, kernels, rows)
    from unimatrix.ops.indexed_attention.sums_native import sum_around_native

    if rows is None:
        rows = torch.arange(2 * features.shape[:2].numel(), device=features.device)
    sums: Tensor = sum_around_native(features, kernels, rows)
    return sums


def attend_entries(
    entries: Entries,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offset_bias: Tensor,
    place_bias: Tensor,
    match_bias: Tensor,
    *,
    boundary: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend to the entries of every position, or to nothing, which has a score of 0.

    Equation: E27.
    Source: this project.

    Args:
        entries: what each position reads, [B, T, E].
        query: [B, T, H, C], with the temperature.
        keys: [B, 2 S, H, C], two rows of each token: without and with what stands ahead of it.
        values: [B, S, H, C].
        offset_bias: [B, T, H, 80], added to the score by the entry's offset.
        place_bias: [B, T, H, P], added by its place.
        match_bias: [H, 17], added by its match length.
        boundary: [H, 2 C + 1], of a token's value, of the value before it, and a bias: ln(1 + exp)
            of their sum is the boundary that a token is, and an entry loses those of all tokens
            from its place to itself. ``None`` is no boundaries.
        backend: ``auto`` is ``native`` on the CPU, where it runs.

    Returns:
        [B, T, H, C], the weighted sum of the values; [B, T, H, E], the weights, whose sum is less
        than 1 by the weight of nothing. Differentiable once (``native``) in the floats.

    Raises:
        InputError: if a shape or type is not as above, or the back end does not exist.

    Cost:
        O(B T E H C), and the weights' B T E H numbers. ``reference`` copies the keys and the values
        of every entry, B T E H C numbers each.
    """
    sizes: dict[str, int] = {"80": NUM_OFFSETS, "17": MOST_MATCHED + 1}
    shapes = {
        "entries.rows": (entries.rows, "B T E"),
        "query": (query, "B T H C"),
        "keys": (keys, "B R H C"),
        "values": (values, "B S H C"),
        "offset_bias": (offset_bias, "B T H 80"),
        "place_bias": (place_bias, "B T H P"),
        "match_bias": (match_bias, "H 17"),
    }
    for name, (tensor, letters) in shapes.items():
        require_shape(name, tensor, letters, sizes)
        if name != "entries.rows":
            require_dtype(name, tensor, query.dtype)
    if boundary is not None:
        require_shape("boundary", boundary, "H K", sizes | {"K": 2 * sizes["C"] + 1})
        require_dtype("boundary", boundary, query.dtype)
    if sizes["R"] != 2 * sizes["S"] or sizes["E"] != NUM_OFFSETS * sizes["P"]:
        raise InputError(
            f"keys has {sizes['R']} rows for {sizes['S']} values and entries.rows {sizes['E']} "
            f"entries for {sizes['P']} places; pass two rows a value and {NUM_OFFSETS} entries a "
            "place"
        )
    require_shape("entries.matched", entries.matched, "B T E", sizes)
    inputs = (query, keys, values, offset_bias, place_bias, match_bias, boundary)
    if choose_backend(backend, query) == "reference":
        with torch.autocast(query.device.type, enabled=False):
            return attend_reference(entries, *inputs)
    from unimatrix.ops.indexed_attention.attend_native import attend_entries_native

    context, weights = attend_entries_native(entries.rows, entries.matched, *inputs)
    return context, weights


def _require_components(scores: Tensor, head_scores: Tensor, weights: Tensor) -> dict[str, int]:
    """Return the sizes of what shares; raise ``InputError`` for other shapes or types."""
    sizes: dict[str, int] = {}
    require_shape("weights", weights, "B T H E", sizes)
    require_shape("head_scores", head_scores, "B T H", sizes)
    require_shape("scores", scores, "B T K", sizes)
    for name, tensor in (("scores", scores), ("head_scores", head_scores)):
        require_dtype(name, tensor, weights.dtype)
    return sizes


def share_heads(
    scores: Tensor, head_scores: Tensor, weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Return ln of the shares of components, and of the entries that heads attend to.

    Equation: E17. A head weighs exp(its score) times what its weights sum to.
    Source: this project.

    Args:
        scores: [B, T, K], of the other components; -inf for what is not there.
        head_scores: [B, T, H].
        weights: [B, T, H, E], what each head gives its entries.
        backend: ``auto`` is ``native`` on the CPU, where it runs.

    Returns:
        [B, T, K + E], sums to 1 after exponentiation; -inf for 0. Differentiable once (``native``).

    Raises:
        InputError: if a shape or type is not as above, or the back end does not exist.
    """
    _require_components(scores, head_scores, weights)
    if choose_backend(backend, weights) == "reference":
        return share_reference(scores, head_scores, weights)
    from unimatrix.ops.indexed_attention.shares_native import share_heads_native

    shares: Tensor = share_heads_native(scores, head_scores, weights)
    return shares


def share_targets(
    scores: Tensor,
    head_scores: Tensor,
    weights: Tensor,
    other_ids: Tensor,
    token_ids: Tensor,
    targets: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ln of the vocabulary's share, and of what all components give one token.

    The shares are those of ``share_heads``; of hundreds of entries no logarithms are made.

    Equation: E17.
    Source: this project.

    Args:
        scores: [B, T, K], of the other components, the vocabulary first; -inf for what is not
            there.
        head_scores: [B, T, H].
        weights: [B, T, H, E], what each head gives its entries.
        other_ids: [B, T, K - 1] int64, the tokens of the other components.
        token_ids: [B, T, E] int64, those of the entries.
        targets: [B, T] int64, the token of each position.
        backend: ``auto`` is ``native`` on the CPU, where it runs.

    Returns:
        [B, T, 2]; -inf for a token without a share. Differentiable once (``native``).

    Raises:
        InputError: if a shape or type is not as above, or the back end does not exist.
    """
    sizes = _require_components(scores, head_scores, weights)
    sizes["L"] = sizes["K"] - 1
    ids = {
        "other_ids": (other_ids, "B T L"),
        "token_ids": (token_ids, "B T E"),
        "targets": (targets, "B T"),
    }
    for name, (tensor, letters) in ids.items():
        require_shape(name, tensor, letters, sizes)
        require_dtype(name, tensor, torch.int64)
    inputs = (scores, head_scores, weights, other_ids, token_ids, targets)
    if choose_backend(backend, weights) == "reference":
        return share_targets_reference(*inputs)
    from unimatrix.ops.indexed_attention.shares_native import share_targets_native

    shares: Tensor = share_targets_native(*inputs)
    return shares
