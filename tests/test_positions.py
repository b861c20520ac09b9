"""Positions of real tokens, from a table of limited length."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import build_model, draw_ids
from unimatrix.cache import UniMatrixCache, start_cache
from unimatrix.errors import InputError
from unimatrix.modeling_inputs import Inputs, read_inputs

NUM_ROWS = 9
IDS = draw_ids(2, 4)


def read(ids: torch.Tensor = IDS, mask: Any = None, past: UniMatrixCache | None = None) -> Inputs:
    """Return what a model with a table reads of its arguments."""
    model = build_model("core", max_position_embeddings=NUM_ROWS).model
    mask = None if mask is None else torch.tensor(mask)
    return read_inputs(model, ids, None, mask, *3 * [None], past, None, None, None)


def start(*num_tokens: int) -> UniMatrixCache:
    """Return a cache that so many tokens of each row went into."""
    config = build_model("core", max_position_embeddings=NUM_ROWS).config
    tokens = torch.tensor(num_tokens)
    return replace(start_cache(config, IDS), num_columns=max(num_tokens), num_tokens=tokens)


def test_each_token_has_the_position_of_its_number() -> None:
    assert read().positions.tolist() == 2 * [[0, 1, 2, 3]]
    assert read(past=start(0, 5)).positions.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    without = build_model("core").model
    assert read_inputs(without, IDS, *9 * [None]).positions is None


def test_padding_has_no_position() -> None:
    inputs = read(mask=[[0, 1, 0, 1], [1, 1, 1, 1]], past=start(3, 5))
    assert inputs.positions[0, :2].tolist() == [3, 4]
    assert inputs.positions[1].tolist() == [5, 6, 7, 8]
    # It does not reach beyond the table either.
    assert read(mask=2 * [[1, 1, 0, 0]], past=start(7, 2)).positions.max() < NUM_ROWS


def test_more_tokens_than_the_table_has_are_refused() -> None:
    with pytest.raises(InputError, match="reaches 10 tokens and the position table has 9"):
        read(draw_ids(1, NUM_ROWS + 1))
    with pytest.raises(InputError, match="reaches 10 tokens and the position table has 9"):
        read(past=start(0, 6))
    with pytest.raises(InputError, match="reaches 11 tokens and the position table has 9"):
        read(mask=[[1, 1, 0, 0], [1, 1, 1, 1]], past=start(9, 2))
    assert read(draw_ids(1, NUM_ROWS)).positions.max() == NUM_ROWS - 1


@torch.no_grad()
def test_the_rows_of_the_table_are_added_to_the_features() -> None:
    model = build_model("core", max_position_embeddings=NUM_ROWS)
    table = model.model.embed_positions.weight
    rows = table.clone()
    located = model(IDS, output_hidden_states=True).hidden_states[0]
    table.zero_()
    features = model(IDS, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(located, features + rows[:4])
