"""Several documents in one row of a batch: inside, each is a row of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.nn.padding import Padding


class Group(NamedTuple):
    """Documents of about one length, as the rows of one pass.

    Attributes:
        columns: [n, t] int64, where each token stands among the B T of the caller; behind the end
            of a shorter document, where its last token stands.
        lengths: [n] int64, tokens of each document; ``None`` is t for all.
    """

    columns: Tensor
    lengths: Tensor | None

    def pack(self, features: Tensor) -> Tensor:
        """Return ids or features [B, T, *] of these documents, [n, t, *]."""
        return _take(features, self.columns)


class Packing(NamedTuple):
    """Where the documents of a batch are, and where they go.

    A document that starts in the middle of a row starts with nothing carried. Nothing behind the
    embedding knows of that, since every document is a row of its own there, like any other.

    Attributes:
        groups: the documents, each in one group.
        places: [B, T] int64, of each token among those of the groups, one after the other.
        mask: [B, T] bool, True at real tokens.
        starts: [B, T] bool, True at the first token of each document.
    """

    groups: tuple[Group, ...]
    places: Tensor
    mask: Tensor
    starts: Tensor

    def pack(self, features: Tensor) -> Tensor:
        """Return ids or features [B, T, *] as rows [n, t, *] of the only group."""
        (group,) = self.groups
        return group.pack(features)

    def unpack(self, features: Tensor) -> Tensor:
        """Return features in the caller's columns, zero at padding.

        Args:
            features: [n, t, *] of the only group, or [1, n t + ..., *] of all of them.

        Returns:
            [B, T, *].
        """
        unpacked = _take(features, self.places)
        # Chosen, not multiplied: what stands at padding may be infinite.
        return torch.where(self.mask.view(*self.mask.shape, *_ones(unpacked)), unpacked, 0)

    def count_tokens(self) -> Tensor:
        """Return the number of each token in its document, [B, T] int64; 0 at padding."""
        counts = torch.zeros_like(self.places).flatten()
        for columns, _ in self.groups:
            n, t = columns.shape
            numbers = torch.arange(t, device=columns.device).expand(n, t).flatten()
            # Behind its end a document repeats its last column, whose number is the least.
            counts.scatter_reduce_(0, columns.flatten(), numbers, "amin", include_self=False)
        return counts.view_as(self.places)


def _take(features: Tensor, places: Tensor) -> Tensor:
    """Return features [..., *] of two leading axes at places [n, t] among all of them."""
    taken = features.flatten(0, 1).index_select(0, places.flatten())
    return taken.view(*places.shape, *features.shape[2:])


def _ones(features: Tensor) -> list[int]:
    """Return a 1 for every axis of features [B, T, *] behind the second."""
    return [1] * (features.dim() - 2)


def join_rows(features: Sequence[Tensor]) -> Tensor:
    """Return features [n, t, *] of groups, one after the other, [1, n t + ..., *]."""
    return torch.cat([part.flatten(0, 1) for part in features]).unsqueeze(0)


# Shapes depend on where documents start, which no graph can hold.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def lay_out(starts: Tensor, padding: Padding | None, pass_cost: int | None) -> Packing:
    """Return the documents of a batch as rows of their own.

    Args:
        starts: [B, T] bool, where a document starts, real tokens first in each row.
        padding: where it was; ``None`` is none.
        pass_cost: tokens that take as long as one more pass, see ``choose_groups``; ``None`` lays
            out a single group.
    """
    device, (batch, num_tokens) = starts.device, starts.shape
    columns = torch.arange(batch * num_tokens).view(batch, num_tokens)
    starts, mask = starts.cpu(), torch.ones_like(columns, dtype=torch.bool)
    if padding is not None:
        columns = columns.gather(1, padding.order.cpu())
        is_real = torch.arange(num_tokens) < padding.lengths.cpu().unsqueeze(1)
        columns, starts, mask = columns[is_real], starts[is_real], padding.mask.cpu()
    columns, starts = columns.flatten(), starts.flatten()  # of real tokens, in their order
    first = starts.nonzero().flatten()
    lengths = torch.diff(first, append=torch.tensor([len(columns)]))
    groups, places, num_before = [], torch.zeros(batch * num_tokens, dtype=torch.int64), 0
    for longest, documents in choose_groups(lengths, pass_cost):
        own = lengths[documents].unsqueeze(1)
        numbers = torch.arange(longest)
        chosen = columns[first[documents].unsqueeze(1) + numbers.clamp(max=own - 1)]  # [n, t]
        is_real = numbers < own
        places[chosen[is_real]] = num_before + is_real.flatten().nonzero().flatten()
        num_before += chosen.numel()
        same = bool((own == longest).all())
        groups.append(Group(chosen.to(device), None if same else own.squeeze(1).to(device)))
    marked = torch.zeros(batch * num_tokens, dtype=torch.bool)
    marked[columns[first]] = True
    shape = (batch, num_tokens)
    return Packing(
        tuple(groups), places.view(shape).to(device), mask.to(device), marked.view(shape).to(device)
    )


def choose_groups(lengths: Tensor, pass_cost: int | None) -> list[tuple[int, Tensor]]:
    """Return which documents share a pass.

    Documents of one pass are filled up to the longest of them, and every further pass has a cost of
    its own. Those of similar lengths stand together, so that both are least.

    Args:
        lengths: [N] int64, of each document.
        pass_cost: tokens that take as long as one more pass; ``None`` is more than any.

    Returns:
        for each group the longest length and the numbers of its documents, [n] int64.
    """
    found, order = lengths.sort(stable=True)
    known, counts = torch.unique_consecutive(found, return_counts=True)
    sizes, ends = known.tolist(), [0, *counts.cumsum(0).tolist()]
    if pass_cost is None:
        return [(sizes[-1], torch.arange(len(lengths)))]
    # The least cost of the shortest documents, up to each length, and where its last group begins.
    costs, begins = [0], [0]
    for i, longest in enumerate(sizes):
        options = [costs[j] + (ends[i + 1] - ends[j]) * longest for j in range(i + 1)]
        best = min(options)
        costs.append(best + pass_cost)
        begins.append(options.index(best))
    groups, stop = [], len(sizes)
    while stop:
        start = begins[stop]
        groups.append((sizes[stop - 1], order[ends[start] : ends[stop]].sort().values))
        stop = start
    return groups
