"""Nothing reads or writes outside what it was given: strange ids and shapes are refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import SMALL, build_model, draw_ids
from unimatrix import Decoder, UniMatrixCache
from unimatrix.errors import InputError
from unimatrix.kernels.passes.head_native import prepare_head, sum_cross_entropy_native
from unimatrix.ops.matrix_state import bind_and_scan
from unimatrix.ops.selective_slots import empty_selective_slots, scan_selective_slots

VOCAB = SMALL["vocab_size"]
MODELS = ("core", "rosa", "discovery", "sparsepointer", "selective")


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("strange", [-1, -100, VOCAB, 10**12])
def test_ids_outside_the_vocabulary_are_refused(variant: str, strange: int) -> None:
    model = build_model(variant)
    for num_tokens in (2, 40):  # fewer and more than the vocabulary take other ways
        ids = draw_ids(1, num_tokens)
        ids[0, 1] = strange
        said = rf"token id {strange} is not in the vocabulary; pass 0 to {VOCAB - 1}"
        with pytest.raises(InputError, match=said):
            model(ids)
        with pytest.raises(InputError, match=said):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    with pytest.raises(InputError, match=rf"token_ids holds \[{strange}\]"):
        Decoder(model).step(torch.tensor([strange]))


@pytest.mark.parametrize("variant", ["core", "sparsepointer", "selective"])
@pytest.mark.parametrize("loss_only", [False, True])
@pytest.mark.parametrize("hidden_size", [12, 16])  # of whole registers: the compiled loss
def test_labels_outside_the_vocabulary_are_refused(
    variant: str, loss_only: bool, hidden_size: int
) -> None:
    model, ids = (
        build_model(variant, hidden_size=hidden_size, slot_key_size=hidden_size),
        draw_ids(2, 40),
    )
    for strange in (-1, VOCAB):
        labels = ids.clone()
        labels[1, 7] = strange
        with pytest.raises(InputError, match=f"label {strange} is no token of the vocabulary"):
            model(ids, labels=labels, loss_only=loss_only)
    for name in ("labels", "shift_labels"):
        for given in (ids[:, :-1], ids[:1]):
            with pytest.raises(InputError, match=rf"{name} has shape .*; pass \[2, 40\]"):
                model(ids, **{name: given}, loss_only=loss_only)
        with pytest.raises(InputError, match=f"{name} has dtype torch.float64"):
            model(ids, **{name: ids.double()}, loss_only=loss_only)
        short = model(ids, **{name: ids.int()}, loss_only=loss_only).loss
        assert torch.equal(short, model(ids, **{name: ids}, loss_only=loss_only).loss)


def test_ids_and_matches_of_another_kind_are_refused() -> None:
    model, ids = build_model("selective"), draw_ids(1, 40)
    with pytest.raises(InputError, match=r"input_ids has dtype torch.float32"):
        model(ids.float())
    match = torch.stack([ids, torch.ones_like(ids)], dim=-1)
    for strange in (VOCAB, 10**12, -2):
        match[0, 3, 0] = strange
        said = rf"suffix_match predicts {strange} is not in the vocabulary; pass -1 to {VOCAB - 1}"
        with pytest.raises(InputError, match=said):
            model(ids, suffix_match=match)


def test_a_decoder_refuses_what_it_cannot_read() -> None:
    decoder, ids = Decoder(build_model("selective"), batch_size=2), torch.tensor([3, 4])
    with pytest.raises(InputError, match=r"token_ids is torch.bfloat16 on cpu"):
        decoder.step(ids.bfloat16())
    with pytest.raises(InputError, match=f"pad_id {VOCAB}"):
        decoder.write(ids, 4, end_ids=range(VOCAB), pad_id=VOCAB)
    with pytest.raises(InputError, match="num_tokens is 0"):
        decoder.write(ids, 0)
    with pytest.raises(InputError, match=r"ended has shape \[3\]; pass \[2\]"):
        decoder.write(ids, 2, ended=np.zeros(3, dtype=bool))
    with pytest.raises(InputError, match="batch_size is 0"):
        Decoder(build_model("core"), batch_size=0)


def load_changed(
    variant: str, folder: Path, change: Callable[[dict[str, Tensor]], None]
) -> tuple[object, UniMatrixCache]:
    """Return a model and a cache of it that was changed on its way through a file."""
    model = build_model(variant)
    with torch.no_grad():
        cache = model(draw_ids(2, 30), use_cache=True).past_key_values
    change(cache.tensors())  # shares memory with the cache
    cache.save(folder / "cache")
    return model, UniMatrixCache.load(folder / "cache")


@pytest.mark.filterwarnings("ignore:.*does not say")
@pytest.mark.parametrize(
    ("variant", "name", "strange"),
    [
        ("core", "last_token_ids", VOCAB),
        ("sparsepointer+table", "num_tokens", -1),
        ("sparsepointer", "associations.slots.slot_token_ids", VOCAB),
        ("selective", "associations.selective.slots.slot_value_ids", VOCAB),
        ("selective", "associations.selective.recent_token_ids", -2),
        ("rosa", "last_token_ids", 10**9),
        ("selective", "automaton.tokens", VOCAB),
        ("core+suffix_automaton", "automaton.counters", -1),
    ],
)
def test_a_cache_with_strange_numbers_is_refused(
    variant: str, name: str, strange: int, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0 if "counters" not in name else 1] = strange

    model, cache = load_changed(variant, tmp_path, change)
    with pytest.raises(InputError, match=str(strange)):
        model(draw_ids(2, 3), past_key_values=cache)
    with pytest.raises(InputError, match=str(strange)):
        Decoder(model, cache)


@pytest.mark.filterwarnings("ignore:.*does not say")
@pytest.mark.parametrize("variant", ["core+suffix_automaton", "selective+small"])
def test_the_index_of_an_automaton_is_not_believed(variant: str, tmp_path: Path) -> None:
    """A cache from a file is read on as the one that was saved, whatever its index says."""

    def change(tensors: dict[str, Tensor]) -> None:
        of_text = ("automaton.tokens", "automaton.counters", "automaton.recent_units")
        for name in tensors:
            if name.startswith("automaton.") and name not in of_text:
                tensors[name].fill_(2**14)
        if "automaton.nodes" in tensors:
            tensors["automaton.counters"][:, 3:9] = 2**40

    model, changed = load_changed(variant, tmp_path, change)
    _, whole = load_changed(variant, tmp_path, lambda tensors: None)
    ids = draw_ids(2, 9, seed=1)
    with torch.no_grad():
        expected = model(ids, past_key_values=whole).logits
        unbroken = model(torch.cat([draw_ids(2, 30), ids], dim=1)).logits[:, 30:]
        torch.testing.assert_close(expected, unbroken)
        decoder = Decoder(model, changed)
        decoded = torch.stack([decoder.step(column.contiguous()) for column in ids.T], dim=1)
        torch.testing.assert_close(decoded, expected)


@pytest.mark.parametrize("variant", ["core", "sparsepointer", "selective+small"])
def test_a_cache_of_other_shapes_is_refused(variant: str) -> None:
    model = build_model(variant)
    with torch.no_grad():
        cache = model(draw_ids(2, 9), use_cache=True).past_key_values
    cache.is_sound = False  # as if it came from elsewhere
    cache.depth = cache.depth[:1]
    with pytest.raises(InputError, match="holds 1 depth steps"):
        model(draw_ids(2, 3), past_key_values=cache)
    with torch.no_grad():
        cache = model(draw_ids(2, 9), use_cache=True).past_key_values
    cache.is_sound = False
    state = cache.depth[0]["matrix_mixer"]
    cut = state._replace(matrix_state=state.matrix_state[..., :-1])
    cache.depth = ({**cache.depth[0], "matrix_mixer": cut}, *cache.depth[1:])
    with pytest.raises(InputError, match=r"depth\.0\.matrix_state has shape"):
        Decoder(model, cache)


def test_operators_refuse_lengths_and_targets_that_do_not_fit() -> None:
    lengths = torch.tensor([5, 4])
    vectors, controls = torch.zeros(2, 4, 3, 2, 16), torch.zeros(2, 4, 2)
    with pytest.raises(InputError, match="lengths go from 4 to 5"):
        bind_and_scan(vectors, controls, unit=True, lengths=lengths)
    with pytest.raises(InputError, match="initial_state has shape"):
        bind_and_scan(vectors, controls, unit=True, initial_state=torch.zeros(2, 2, 16, 15))
    keys, ids = torch.zeros(2, 4, 1, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    slots = empty_selective_slots(2, 3, VOCAB)
    with pytest.raises(InputError, match="lengths go from 4 to 5"):
        scan_selective_slots(keys, keys, ids, keys, initial=slots, lengths=lengths)
    head, h = prepare_head(torch.zeros(VOCAB, 16)), torch.zeros(2, 4, 16)
    with pytest.raises(InputError, match=r"targets is \[2, 3\]"):
        sum_cross_entropy_native(h, head, ids[:, :3], ignored=-100)
