"""The text index: where the rarest of the last units of a stream stood before."""

from typing import cast

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native, require_backend
from unimatrix.ops.checks import find_real_tokens, require_dtype, require_shape
from unimatrix.ops.operator import declare_operator
from unimatrix.ops.text_index.reference import scan_reference
from unimatrix.ops.text_index.state import (
    HAS_LOST_LETTER,
    MOST_COUNTED,
    NUM_KINDS,
    NUM_PLACES,
    NUM_RECENT,
    NUM_TOKENS,
    NUM_UNITS,
    RUN_LENGTH,
    TextIndex,
    empty_index,
    order_tokens,
)

__all__ = [
    "MOST_COUNTED",
    "NUM_KINDS",
    "NUM_PLACES",
    "NUM_RECENT",
    "TextIndex",
    "empty_index",
    "find_new_places",
    "find_places",
    "order_tokens",
    "rebuild_index",
]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def find_places(
    input_ids: Tensor,
    *,
    initial: TextIndex,
    lengths: Tensor | None = None,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, TextIndex]:
    """Return where the rarest of the last eight units stood before, for every token.

    Equation: E25. A unit is a word of at most 64 letters or digits (three letters, or fewer with a
    digit; ASCII letters without case; any longer character is a letter), complete with the token
    behind it; two characters of a script that puts no spaces between words; or one token, where the
    tokens are no bytes. Its place is its last token. A unit is remembered until its first token is
    W tokens back. Of the last eight units those that were remembered when they were read are ranked
    by how often they were, the rarest first and of equals the latest. The first sends a position to
    its latest place, the one before that and the oldest; the others to their latest, until there
    are five places.
    Source: this project.

    Args:
        input_ids: [B, T] int64, ids that the index's tokens can hold; what stands at positions
            ``lengths[b]`` and after is not looked at.
        initial: the index to go on with, of which a new stream has an empty one.
        lengths: [B] int64 in 0 .. T, the real tokens that lead each row; ``None`` means T.
        in_place: change the tensors of ``initial``, which the caller then gives up.
        backend: ``auto`` is ``native``, or ``reference`` where kernels do not run here.

    Returns:
        [B, T, 5, 4] int32 on the device of ``input_ids``: for each place how many tokens it is
        back, how often its unit was remembered (at most 7), how many units were read after that
        one, and its kind: 0 to 2 are the places of the rarest unit, 3 to 6 those of the others;
        -1 and three zeros for no place. And the index after each row's real tokens, on the CPU.

    Raises:
        InputError: if a shape, type or id is not as above, or the back end does not exist.

    Cost:
        O(1) a token on average, whatever the text; at most 12 bytes a token of the window for
        words of a vocabulary below 32,768, 34 for tokens. ``reference`` reads the whole window
        again in each call.

    Note:
        Rows run in parallel on the CPU. Deterministic and causal; any split of a stream gives the
        same places. Not differentiable.
    """
    if backend == "auto":
        backend = "native" if compiles_native() else "reference"
    require_backend("indexed_attention", backend)
    sizes: dict[str, int] = {}
    require_shape("input_ids", input_ids, "B T", sizes)
    require_dtype("input_ids", input_ids, torch.int64)
    batch, num_tokens = input_ids.shape
    if initial.tokens.shape[0] != batch:
        raise InputError(
            f"initial has {initial.tokens.shape[0]} rows; pass one for each of the {batch} rows of "
            "input_ids"
        )
    ids = input_ids.detach().cpu().contiguous()
    if lengths is None:
        lengths = torch.full((batch,), num_tokens, dtype=torch.int64)
    else:
        require_shape("lengths", lengths, "B", sizes)
        lengths = lengths.cpu().contiguous()
        ids = torch.where(find_real_tokens(lengths, ids), ids, 0)
    most = torch.iinfo(initial.tokens.dtype).max
    smallest, largest = (int(bound) for bound in ids.aminmax())
    if smallest < 0 or largest > most:
        raise InputError(
            f"input_ids holds {smallest if smallest < 0 else largest}; pass 0 .. {most}"
        )
    index = TextIndex(*(x.cpu().contiguous() for x in initial))
    if not in_place:
        index = TextIndex(*(x.clone() for x in index))
    places = torch.zeros(batch, num_tokens, NUM_PLACES, 4, dtype=torch.int32)
    places[..., 0] = -1
    if backend == "native":
        from unimatrix.ops.text_index.native import scan_native

        scan_native(ids, lengths, index, places)
    else:
        scan_reference(ids, lengths, index, places)
    return places.to(input_ids.device), index


def _find_new_places(input_ids: Tensor, window: int, vocab_size: int, reads_bytes: bool) -> Tensor:
    index = empty_index(len(input_ids), window, vocab_size, reads_bytes)
    places: Tensor = find_places(input_ids, initial=index, in_place=True)[0]
    return places


find_new_places = declare_operator(
    "find_new_places",
    _find_new_places,
    shapes=lambda input_ids, *_: input_ids.new_empty(
        *input_ids.shape, NUM_PLACES, 4, dtype=torch.int32
    ),
    devices=None,
)
"""Return what ``find_places`` finds in new streams, which a captured graph takes whole.

Args: input_ids [B, T] int64, and window, vocab_size and reads_bytes as for ``empty_index``.
Returns: [B, T, 5, 4] int32.
"""


def rebuild_index(
    index: TextIndex, num_tokens: Tensor, window: int, vocab_size: int, reads_bytes: bool
) -> TextIndex:
    """Return an index from elsewhere with its table and links built again from its tokens.

    Args:
        index: of which nothing is known.
        num_tokens: [B] int64, tokens of each stream.
        window: W.
        vocab_size: V.
        reads_bytes: as for ``empty_index``.

    Raises:
        InputError: if its tensors do not have the shapes and types of such an index, a token is
            none of the vocabulary, or there are more or fewer tokens than the stream has.
    """
    anew = empty_index(len(num_tokens), window, vocab_size, reads_bytes)
    index = TextIndex(*(part.cpu() for part in index))
    for name, part, expected in zip(TextIndex._fields, index, anew, strict=True):
        if part.shape != expected.shape or part.dtype != expected.dtype:
            raise InputError(
                f"index.{name} is {part.dtype} {list(part.shape)}, not {expected.dtype} "
                f"{list(expected.shape)}; pass a cache that this model has made"
            )
    num_tokens = num_tokens.cpu()
    held = num_tokens.clamp(max=window)
    anew.counters[:, NUM_TOKENS] = num_tokens
    tokens = order_tokens(TextIndex(index.tokens, *anew[1:]))
    is_held = torch.arange(window) >= (window - held).unsqueeze(1)
    if ((tokens >= 0) != is_held).any() or int(tokens.max()) >= vocab_size:
        raise InputError(
            "index.tokens does not hold the last tokens of the stream; pass a cache that this "
            "model has made"
        )
    cut = index.counters[:, HAS_LOST_LETTER] != 0
    anew.counters[:, NUM_TOKENS] = num_tokens - held
    # Letters that go on with a word whose beginning is forgotten are no word.
    anew.counters[:, RUN_LENGTH] = cut * window
    first = ((window - held).unsqueeze(1) + torch.arange(window)).clamp(max=window - 1)
    text = tokens.gather(1, first).clamp_min(0)
    anew = cast("TextIndex", find_places(text, initial=anew, lengths=held, in_place=True)[1])
    anew.counters[:, HAS_LOST_LETTER] = cut
    anew.counters[:, NUM_UNITS] = index.counters[:, NUM_UNITS].clamp_min(0)
    return anew._replace(recent_units=index.recent_units)
