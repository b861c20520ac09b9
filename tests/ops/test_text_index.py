"""Text index (E25): exact, the same in every split, of constant size."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import candidates
from unimatrix.errors import InputError
from unimatrix.ops.backends import BACKENDS
from unimatrix.ops.text_index import (
    Found,
    TextIndex,
    empty_index,
    order_tokens,
    rebuild_index,
    search_text,
)
from unimatrix.ops.text_index.reference import list_units
from unimatrix.ops.text_index.state import (
    COUNT,
    HAS_LOST_LETTER,
    KNOWN,
    LEAST_WINDOW,
    NUM_TOKENS,
    TIMES,
)
from unimatrix.ops.text_index.units import FIRST_HASH, extend_hash

ALL = BACKENDS["indexed_attention"]
CANDIDATES = candidates("indexed_attention")
NO_PLACE = [-1, 0, 0, 0, 0]
# Words and numbers, both cases, what ends them, and pieces of longer characters.
ALPHABET = b"abAB12 .\xe3\x81\x82\xe0\xb8\xb9\xc3"


def read_text(
    text: bytes, backend: str, *, window: int = LEAST_WINDOW, words: bool = True
) -> Tensor:
    """Return the places of every byte, [T, 5, 5]."""
    index = empty_index(1, window, 259, "words" if words else "tokens")
    found, _ = search_text(torch.tensor([list(text)]), initial=index, backend=backend)
    return found.places[0]


def is_same(one: Found, other: Found) -> bool:
    """Return whether two searches found the same."""
    return all(map(torch.equal, one, other))


def read_in_pieces(
    ids: Tensor, sizes: list[int], backends: tuple[str, ...], index: TextIndex, in_place: bool
) -> tuple[Found, TextIndex]:
    """Return what is found in tokens [B, T] piece by piece, sizes and back ends in turn."""
    found, first = [], 0
    for size, backend in zip(itertools.cycle(sizes), itertools.cycle(backends), strict=False):
        if first >= ids.shape[1]:
            return Found(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))), index
        piece = ids[:, first : first + size]
        of_piece, index = search_text(piece, initial=index, in_place=in_place, backend=backend)
        found.append(of_piece)
        first += size
    raise AssertionError


@pytest.mark.parametrize("backend", ALL)
def test_which_units_are_new(backend: str) -> None:
    text = b"The code of Harkov is 52. The code of harkov is 53. CODE: harkov "
    index = empty_index(1, 1024, 259, "words")
    found, _ = search_text(torch.tensor([list(text)]), initial=index, backend=backend)
    marks = found.new_units[0].tolist()
    assert marks[2] == 0  # "The" is known with the space behind it
    assert marks[3] == 0b1
    assert marks[8] == 0b11
    # The, code, Harkov, 52, The, code, harkov, 53, CODE, harkov: the last is the lowest bit.
    assert marks[len(b"The code of Harkov is 52. The")] == 0b11110
    assert marks[-1] == 0b11000100


@pytest.mark.parametrize("backend", ALL)
def test_where_words_stood_before(backend: str) -> None:
    text = b"The code of Harkov is 52. The code of harkov is 53. CODE: harkov "
    places = read_text(text, backend).tolist()
    now, third = len(text) - 1, len(text) - 2
    # "harkov", "code" and "The" stood once when they were read the second time; when they were read
    # the third time, twice. Of equals the latest comes first.
    assert places[now] == [
        [now - 17, 1, 3, 0, now - 44],
        [now - 7, 1, 4, 3, now - 34],
        [now - 2, 1, 5, 5, now - 29],
        [now - 43, 2, 0, 7, 0],
        [now - 17, 2, 0, 8, 0],
    ]
    # A word counts once it has ended: at its last letter the third "harkov" is not there yet.
    assert places[third][:1] == [[third - 17, 1, 2, 0, third - 44]]
    assert [place[2] for place in places[third]] == [2, 3, 4, 0, 0]
    # With more that came between only the third is left, which has three places.
    later = read_text(text + b"and only six new words then: ", backend, window=256).tolist()[-1]
    assert later[:2] == [[now + 29 - 43, 2, 6, 0, 29], [now + 29 - 17, 2, 6, 1, 29]]
    assert all(place == NO_PLACE for place in places[0])


@pytest.mark.parametrize("backend", ALL)
def test_what_a_unit_is(backend: str) -> None:
    def find(text: str) -> list[int]:
        """Return how far back the places of the last byte are."""
        return [
            place[0] for place in read_text(text.encode(), backend)[-1].tolist() if place[0] >= 0
        ]

    assert find("of of ") == []  # two letters
    assert find("x1 x1 ") == find("17-17 ") == [4]  # fewer than three with a digit
    assert find("naïve NaïVE ") == [8]
    assert find("光明光明") == [6]  # two characters, ended with the second
    assert find("光 光 ") == []
    assert find("ไทยxไทย") == [10, 13]
    long = "a" * 64
    assert find(f"{long} {long} ") == []  # forgotten: the first letter is 130 bytes back
    assert find(f"{long[:60]} {long[:60]} ") == [62]
    assert find(f"{long}a-abc-{long}a-") == []  # 65 letters


@pytest.mark.parametrize("backend", ALL)
def test_a_unit_is_remembered_until_its_first_token_leaves(backend: str) -> None:
    for gap in range(LEAST_WINDOW - 12, LEAST_WINDOW + 2):
        # "word" is at 0 to 3; the second is known with the space behind it, at gap + 4.
        text = b"word" + b"." * (gap - 4) + b"word "
        place = read_text(text, backend)[-1, 0].tolist()
        is_remembered = gap + 4 < LEAST_WINDOW
        assert place == ([gap + 1, 1, 0, 0, 0] if is_remembered else NO_PLACE)


@pytest.mark.parametrize("backend", ALL)
def test_tokens_are_units_where_they_are_no_bytes(backend: str) -> None:
    places = read_text(bytes([65, 97, 70, 65]), backend, words=False).tolist()
    assert places[3][0] == [3, 1, 0, 0, 0]  # not the other case of the letter
    assert places[3][1] == NO_PLACE


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from(ALPHABET), min_size=230, max_size=230), min_size=1, max_size=2
    ),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    words=st.booleans(),
    in_place=st.booleans(),
    backends=st.sampled_from([*((name,) for name in ALL), (*ALL,), (*reversed(ALL),)]),
)
def test_any_split_and_any_back_end_give_the_same(
    rows: list[list[int]], sizes: list[int], words: bool, in_place: bool, backends: tuple[str, ...]
) -> None:
    ids = torch.tensor(rows)
    index = empty_index(len(ids), LEAST_WINDOW, 259, "words" if words else "tokens")
    expected, _ = search_text(ids, initial=index, backend="reference")
    found, _ = read_in_pieces(ids, sizes, backends, index, in_place)
    assert is_same(found, expected)


@pytest.mark.parametrize("backend", ALL)
def test_an_index_that_is_not_given_up_stays(backend: str) -> None:
    ids = torch.tensor([list(b"some words, and some more ")])
    _, index = search_text(ids, initial=empty_index(1, 128, 259, "words"), backend=backend)
    before = TextIndex(*(part.clone() for part in index))
    search_text(ids, initial=index, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(index, before, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_padding_is_not_read(backend: str) -> None:
    ids = torch.tensor([list(b"abc 12 abc "), list(b"12 12 \0\0\0\0\0")])
    lengths = torch.tensor([11, 6])
    empty = empty_index(2, 128, 259, "words")
    found, index = search_text(ids, initial=empty, lengths=lengths, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        one = TextIndex(*(part[row : row + 1] for part in empty))
        alone, after = search_text(ids[row : row + 1, :length], initial=one, backend=backend)
        assert torch.equal(found.places[row, :length], alone.places[0])
        assert torch.equal(found.matches[row, :length], alone.matches[0])
        assert all(torch.equal(x[row], y[0]) for x, y in zip(index, after, strict=True))
    assert (found.places[1, 6:, :, 0] == -1).all()
    assert (found.matches[1, 6:] == torch.tensor([-1, 0])).all()


WORST = {
    "one letter": b"a" * 4000,
    "short words": b"abc " * 1000,
    "digits": b"1 " * 2000,
    "different words": b"".join(b"%03x " % i for i in range(1000)),
    "pairs": "".join(map(chr, range(0x4E00, 0x5200))).encode(),
}


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("backend", CANDIDATES)
def test_the_worst_texts_fit(backend: str, name: str) -> None:
    text, window = WORST[name], 512
    found = read_text(text, backend, window=window)[-40:]
    # What is older than the window and the units before it cannot be seen.
    expected = read_text(text[-2 * window - 40 :], "reference", window=window)[-40:]
    assert torch.equal(found, expected)


def test_bytes_a_token() -> None:
    for window in (1 << 12, 1 << 16):
        index = empty_index(1, window, 259, "words")
        limit = 11.75 * window + 1520
        assert sum(part.nbytes for part in index) <= (limit if window < 2**15 else 2 * limit)
        ids = torch.randint(32, 127, (1, 300))
        _, after = search_text(ids, initial=index)
        assert [part.nbytes for part in after] == [part.nbytes for part in index]


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("num_tokens", [5, 100, 128, 131, 300])
def test_an_index_from_a_file_is_built_again(num_tokens: int, words: bool) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    letters = torch.tensor(list(ALPHABET))
    ids = letters[torch.randint(0, len(letters), (2, num_tokens + 60), generator=generator)]
    empty = empty_index(2, 128, 259, "words" if words else "tokens")
    _, index = search_text(ids[:, :num_tokens], initial=empty)
    expected, _ = search_text(ids[:, num_tokens:], initial=index)
    broken = index._replace(
        units=torch.full_like(index.units, 2**14),
        links=index.links + 2**14,
        children=index.children + 2**14,
        roots=index.roots - 2**14,
    )
    counts = torch.full((2,), num_tokens)
    anew = rebuild_index(broken, counts, 128, 259, "words" if words else "tokens")
    found, _ = search_text(ids[:, num_tokens:], initial=anew)
    assert is_same(found, expected)


def test_an_index_that_is_none_is_refused() -> None:
    index = empty_index(1, 128, 259, "words")
    counts = torch.tensor([3])
    with pytest.raises(InputError, match="does not hold the last tokens of the stream"):
        rebuild_index(index, counts, 128, 259, "words")
    with pytest.raises(InputError, match=r"index\.tokens is torch\.int16 \[1, 128\], not"):
        rebuild_index(index, counts, 256, 259, "words")
    _, index = search_text(torch.tensor([[1, 2, 260]]), initial=index)
    with pytest.raises(InputError, match="holds 260, and the vocabulary has 259 tokens"):
        rebuild_index(index, counts, 128, 259, "words")

    ids = torch.tensor([list(b"abc abc ")])
    _, index = search_text(ids, initial=empty_index(1, 128, 259, "words"))
    rebuild_index(index, torch.tensor([8]), 128, 259, "words")
    for column, value in ((0, 8), (1, -2), (2, 2**40), (TIMES, -1), (KNOWN, 8)):
        broken = index.recent_units.clone()
        broken[0, 0, column] = value
        with pytest.raises(InputError, match="does not hold"):
            rebuild_index(index._replace(recent_units=broken), torch.tensor([8]), 128, 259, "words")


def list_remembered(index: TextIndex, words: bool) -> dict[tuple[int, ...], int]:
    """Return how often each unit is remembered, by the definition alone."""
    window, now = index.tokens.shape[1], int(index.counters[0, NUM_TOKENS])
    text = [token for token in order_tokens(index)[0].tolist() if token >= 0]
    if not words:
        return Counter((token,) for token in text)
    follows_letter = bool(index.counters[0, HAS_LOST_LETTER])
    units, _ = list_units(text, now - len(text), follows_letter)
    return Counter(unit.content for unit in units if unit.first >= now - window)


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_the_table_holds_what_is_remembered_and_nothing_else(backend: str, words: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    letters = torch.tensor(list(ALPHABET + "é光明ไทยabcdefg  ..".encode()))
    index = empty_index(1, 256, 259, "words" if words else "tokens")
    for _ in range(40):
        ids = letters[torch.randint(0, len(letters), (1, 97), generator=generator)]
        _, index = search_text(ids, initial=index, backend=backend)
        counts = index.units[0, :, COUNT].long()
        remembered = list_remembered(index, words)
        assert sorted(counts[counts > 0].tolist()) == sorted(remembered.values())


# Its hash is that of no letters at all, so "xo280daabc" and "abc" begin alike.
EMPTY_PREFIX = b"xo280da"


@pytest.mark.parametrize("backend", ALL)
def test_words_of_equal_hashes_are_told_apart(backend: str) -> None:
    code = FIRST_HASH
    for letter in EMPTY_PREFIX:
        code = extend_hash(code, letter)
    assert code == FIRST_HASH
    places = read_text(EMPTY_PREFIX + b"abc and abc ", backend)
    assert (places[..., 0] == -1).all()
    words = [b"%03x" % i for i in range(0xA00, 0xC00)]
    text = b"".join(b"%s%s %s %s%s " % (EMPTY_PREFIX, w, w, EMPTY_PREFIX, w) for w in words)
    expected = read_text(text[-600:], "reference", window=256)[-50:]
    assert torch.equal(read_text(text, backend, window=256)[-50:], expected)


@pytest.mark.parametrize("backend", ALL)
def test_a_stream_of_any_length(backend: str) -> None:
    text = torch.tensor([list(b"harkov, and some other words; harkov ")])
    _, index = search_text(text[:, :12], initial=empty_index(1, 128, 259, "words"))
    far = 128 * 2**30
    index.counters[:, NUM_TOKENS] += far
    places = index.recent_units[..., [*range(TIMES), KNOWN]]
    index.recent_units[..., [*range(TIMES), KNOWN]] += far * (places >= 0)
    found, _ = search_text(text[:, 12:], initial=index, backend=backend)
    expected, _ = search_text(text, initial=empty_index(1, 128, 259, "words"))
    assert is_same(found, Found(*(part[:, 12:] for part in expected)))


def test_wrong_arguments() -> None:
    index, ids = empty_index(1, 128, 259, "words"), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="window is 127; pass an even number of 128 to"):
        empty_index(1, 127, 259, "words")
    with pytest.raises(InputError, match=r"units is 'letters'"):
        empty_index(1, 128, 259, "letters")
    with pytest.raises(InputError, match=r"holds 40000; pass 0 \.\. 32767"):
        search_text(ids + 40_000, initial=index)
    with pytest.raises(InputError, match="holds -1"):
        search_text(ids - 1, initial=index)
    with pytest.raises(
        InputError, match=r"index\.tokens is torch\.int16 \[1, 128\], not torch\.int16 \[2, 128\]"
    ):
        search_text(ids.repeat(2, 1), initial=index)
    with pytest.raises(InputError, match="not available for indexed_attention"):
        search_text(ids, initial=index, backend="triton")
    with pytest.raises(InputError, match="int64"):
        search_text(ids.float(), initial=index)
    for length in (-1, 4):
        with pytest.raises(InputError, match=r"lengths is \[.*\]; pass values in 0 \.\. 3"):
            search_text(ids, initial=index, lengths=torch.tensor([length]))
    for name in TextIndex._fields[1:]:
        short = index._replace(**{name: getattr(index, name)[:, 1:]})
        with pytest.raises(InputError, match=rf"index\.{name} is torch\.int"):
            search_text(ids, initial=short)
    assert search_text(ids + 40_000, initial=empty_index(1, 128, 50_000, "tokens"))


def find_matches(text: Tensor, backend: str, window: int) -> Tensor:
    """Return what followed the longest suffix of a text [T], and the lengths: [T, 2]."""
    index = empty_index(1, window, 2**15, "none")
    found, _ = search_text(text[None], initial=index, in_place=True, backend=backend)
    return found.matches[0]


@pytest.mark.parametrize("backend", ALL)
def test_the_longest_suffix_that_stood_before(backend: str) -> None:
    matches = find_matches(torch.tensor(list(b"xabc.yabc")), backend, 128).tolist()
    assert matches[6:] == [[98, 1], [99, 2], [46, 3]]  # a, b, c
    assert matches[:6] == [[-1, 0]] * 6
    # Of equals the latest: after "ab" came "d" last.
    matches = find_matches(torch.tensor(list(b"abc.abd.ab")), backend, 128).tolist()
    assert matches[-1] == [100, 3]  # ".ab"
    assert find_matches(torch.tensor(list(b"abcdab-ab")), backend, 128).tolist()[-1] == [45, 2]


@pytest.mark.parametrize("backend", ALL)
def test_how_far_and_how_long_a_match_may_be(backend: str) -> None:
    for distance in range(126, 132):
        text = torch.cat([torch.tensor([7]), torch.arange(10, 9 + distance), torch.tensor([7])])
        is_near = distance <= 192 - 64
        assert find_matches(text, backend, 192)[-1].tolist() == ([10, 1] if is_near else [-1, 0])
    copied = torch.arange(100).repeat(2)
    assert find_matches(copied, backend, 256)[100:, 1].tolist() == [*range(1, 65), *[64] * 36]


FIBONACCI = [0, 1]
while len(FIBONACCI) < 1200:
    FIBONACCI = [*FIBONACCI, *FIBONACCI[: len(FIBONACCI) * 5 // 8]]
ORDERS = {
    "one letter": [5] * 1200,
    "a period": [*range(40)] * 30,
    "ascending": [*range(1200)],
    "descending": [*range(1200, 0, -1)],
    "Fibonacci": FIBONACCI[:1200],
    "runs": [token for size in range(48) for token in [0] * size + [1]],
    "runs of 70": [token for size in range(50) for token in [0] * (70 - size % 9) + [1]][:1200],
    "equal roots": [256 * token for token in range(30)] * 40,
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("backend", CANDIDATES)
def test_matches_of_texts_of_any_order(backend: str, name: str) -> None:
    text = torch.tensor(ORDERS[name])
    expected = find_matches(text, "reference", 256)
    assert torch.equal(find_matches(text, backend, 256), expected)


@settings(max_examples=40, deadline=None)
@given(text=st.lists(st.integers(0, 2), min_size=1, max_size=400), spread=st.sampled_from([1, 256]))
@pytest.mark.parametrize("backend", CANDIDATES)
def test_matches_of_random_texts(backend: str, text: list[int], spread: int) -> None:
    tokens = torch.tensor(text) * spread
    expected = find_matches(tokens, "reference", 128)
    assert torch.equal(find_matches(tokens, backend, 128), expected)
