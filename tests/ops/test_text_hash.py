import pytest
import torch

from tests.models import draw_ids
from unimatrix.ops.text_hash import MULTIPLIER, START, hash_text


def hash_slowly(ids: list[int]) -> int:
    value = START
    for token_id in ids:
        value = (value * MULTIPLIER + token_id) % 2**64
    return value


@pytest.mark.parametrize("splits", [[40], [1] * 40, [3, 1, 16, 20]], ids=str)
def test_a_text_has_one_hash_in_whatever_parts_it_is_read(splits: list[int]) -> None:
    ids = draw_ids(2, 40)
    found = torch.full((2,), START)
    for part in ids.split(splits, dim=1):
        found = hash_text(part, None, found)
    assert [value % 2**64 for value in found.tolist()] == [hash_slowly(r) for r in ids.tolist()]


def test_only_real_tokens_count() -> None:
    ids, start = draw_ids(3, 12), torch.full((3,), START)
    found = hash_text(ids, torch.tensor([12, 5, 0]), start)
    expected = [hash_slowly(row[:n]) for row, n in zip(ids.tolist(), (12, 5, 0), strict=True)]
    assert [value % 2**64 for value in found.tolist()] == expected


def test_texts_of_zeros_differ_in_length() -> None:
    start = torch.full((1,), START)
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    assert len({int(hash_text(zeros[:, :n], None, start)) for n in range(1, 9)}) == 8
