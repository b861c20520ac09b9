"""The text index: where the rarest of the last units of a stream stood before."""

from typing import cast

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native, require_backend
from unimatrix.ops.checks import read_ids
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
    TIMES,
    TextIndex,
    choose_token_type,
    empty_index,
    order_tokens,
    require_form,
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
        O(1) a token on average. At most 12 W + 1,400 bytes for words of a vocabulary below 32,768,
        34 W for tokens. ``reference`` reads the whole window again in each call.

    Note:
        Rows run in parallel on the CPU. Deterministic and causal; any split of a stream gives the
        same places. Not differentiable.
    """
    if backend == "auto":
        backend = "native" if compiles_native() else "reference"
    require_backend("indexed_attention", backend)
    ids, lengths = read_ids(input_ids, lengths, torch.iinfo(initial.tokens.dtype).max)
    batch, num_tokens = ids.shape
    window = initial.tokens.shape[1]
    reads_bytes = initial.links.shape[1] < window
    require_form(initial, batch, window, reads_bytes, initial.tokens.dtype)
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
            none of the vocabulary, there are more or fewer tokens than the stream has, or a place
            is none of the stream.
    """
    index = TextIndex(*(part.cpu() for part in index))
    dtype = choose_token_type(vocab_size)
    require_form(index, len(num_tokens), window, reads_bytes, dtype)
    anew = empty_index(len(num_tokens), window, vocab_size, reads_bytes)
    num_tokens = num_tokens.cpu()
    held = num_tokens.clamp(max=window)
    anew.counters[:, NUM_TOKENS] = num_tokens
    tokens = order_tokens(anew._replace(tokens=index.tokens))
    is_held = torch.arange(window) >= (window - held).unsqueeze(1)
    places, times = index.recent_units[..., :TIMES], index.recent_units[..., TIMES]
    num_units = index.counters[:, NUM_UNITS]
    is_unsound = ((tokens >= 0) != is_held).any() or int(tokens.max()) >= vocab_size
    is_unsound |= (places >= num_tokens.view(-1, 1, 1)).any() or int(places.min()) < -1
    is_unsound |= int(times.min()) < 0 or int(num_units.min()) < 0
    if is_unsound:
        raise InputError(
            "the text index does not hold the last tokens of the stream and what was found for "
            "them; pass a cache that this model has made"
        )
    cut = index.counters[:, HAS_LOST_LETTER] != 0
    anew.counters[:, NUM_TOKENS] = num_tokens - held
    # Letters that go on with a word whose beginning is forgotten are no word.
    anew.counters[:, RUN_LENGTH] = cut * window
    anew.counters[:, HAS_LOST_LETTER] = cut
    first = ((window - held).unsqueeze(1) + torch.arange(window)).clamp(max=window - 1)
    text = tokens.gather(1, first).clamp_min(0)
    anew = cast("TextIndex", find_places(text, initial=anew, lengths=held, in_place=True)[1])
    anew.counters[:, NUM_UNITS] = num_units
    return anew._replace(recent_units=index.recent_units)
