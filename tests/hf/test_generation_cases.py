"""The cases of transformers' own generation tests, which its source distribution lacks."""

from typing import Any

import pytest
import torch

from tests.models import build_model, draw_ids
from tests.tolerances import error
from unimatrix import UniMatrixCache

variants = pytest.mark.parametrize("variant", ["core", "sparsepointer", "unimatrix"])
NEW = 5
DICT = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 8, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
    "beam-sample": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "answers": {"do_sample": True, "num_return_sequences": 3},
}


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """Generate ``NEW`` tokens, none of them EOS, with the same draws whatever came before."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    torch.manual_seed(5)
    return model.generate(ids, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0, **options)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["core", "unimatrix"])
def test_what_a_dictionary_holds(variant: str, way: str, use_cache: bool) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    options = WAYS[way]
    result = generate(model, ids, use_cache=use_cache, **options, **DICT)
    num_rows = 2 * options.get("num_return_sequences", 1)
    # Of beams, scores are of all and sequences of those returned; here they are as many.
    assert result.sequences.shape == (num_rows, 6 + NEW)
    assert torch.equal(result.sequences[:: num_rows // 2, :6], ids)
    assert len(result.scores) == len(result.logits) == len(result.hidden_states) == NEW
    vocab_size, width = model.config.vocab_size, model.config.hidden_size
    for index, states in enumerate(result.hidden_states):
        num_read = 6 if index == 0 else 1
        num_read = 6 + index if not use_cache else num_read
        assert len(states) == model.config.num_hidden_layers + 1
        assert {state.shape for state in states} == {(num_rows, num_read, width)}
        assert result.scores[index].shape == (num_rows, vocab_size)
        assert result.logits[index].shape == (num_rows, vocab_size)
    assert (result.past_key_values is not None) == use_cache
    if "num_beams" in options:
        assert result.sequences_scores.shape == (num_rows,)
        assert result.beam_indices.shape == (num_rows, NEW)
    # The same ids without the dictionary, and without the cache.
    assert torch.equal(generate(model, ids, use_cache=use_cache, **options), result.sequences)
    assert torch.equal(generate(model, ids, use_cache=not use_cache, **options), result.sequences)


@variants
def test_logits_are_those_of_one_pass(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    result = generate(model, ids, do_sample=False, **DICT)
    whole = model(result.sequences[:, :-1]).logits[:, 5:]
    assert error(torch.stack(result.logits, 1), whole) <= 1e-5
    assert torch.equal(result.sequences[:, 6:], whole.argmax(-1))


@variants
def test_padding_on_the_left_changes_no_logits(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    found = model(padded, attention_mask=mask).logits[:, -1]
    assert error(found, model(ids).logits[:, -1]) <= 1e-10
    alone = generate(model, ids, do_sample=False)
    together = generate(model, padded, attention_mask=mask, do_sample=False)
    assert torch.equal(together[:, 4:], alone)


@pytest.mark.parametrize("as_new_tokens", [False, True])
@variants
def test_going_on_from_the_cache_of_before(variant: str, as_new_tokens: bool) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    whole = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2 * NEW,
        do_sample=False,
        eos_token_id=-1,
    )
    first = generate(model, ids, do_sample=False, return_dict_in_generate=True)
    # The last new token has not been read yet.
    rest = first.sequences[:, -1:] if as_new_tokens else first.sequences
    later = generate(model, rest, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(later[:, -NEW:], whole[:, -NEW:])


@variants
def test_answers_go_on_from_one_cache(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(2, 8)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    options = {"do_sample": True, "num_return_sequences": 3}
    found = generate(model, ids, past_key_values=cache, **options)
    assert torch.equal(found, generate(model, ids, **options))


def test_embeddings_are_refused_as_a_prompt() -> None:
    """``forward`` takes them where a preset reads no ids; ``generate`` needs ids to continue."""
    model, ids = build_model("core"), draw_ids(2, 6)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)


@variants
def test_a_prompt_of_bos_alone(variant: str) -> None:
    model = build_model(variant)
    found = model.generate(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    bos = torch.tensor([[model.config.bos_token_id]])
    assert torch.equal(found, generate(model, bos, do_sample=False))


@variants
def test_rows_that_end_are_padded(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(3, 6)
    free = generate(model, ids, do_sample=False)[:, 6:]
    end = int(free[0, 1])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 6:]
    for row, expected in zip(found, free, strict=True):
        ends = (expected == end).nonzero()
        length = int(ends[0]) + 1 if len(ends) else NEW
        assert torch.equal(row[:length], expected[:length])
        assert not row[length:].any()


@pytest.mark.parametrize("use_cache", [True, False])
@variants
def test_logits_processors_act(variant: str, use_cache: bool) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    free = generate(model, ids, do_sample=False, use_cache=use_cache)[:, 6:]
    banned = [[int(token)] for token in free[:, 0]]
    found = generate(model, ids, do_sample=False, use_cache=use_cache, bad_words_ids=banned)
    assert not torch.isin(found[:, 6:], torch.tensor(banned)).any()


def test_what_rolls_back_is_refused() -> None:
    """No state can be cropped, which these need."""
    model, ids = build_model("core"), draw_ids(1, 6)
    for options in ({"assistant_model": build_model("core")}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="stateful"):
            generate(model, ids, do_sample=False, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"dola_layers": "low"},
    ],
)
def test_ways_that_transformers_has_moved_out_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        generate(build_model("core"), draw_ids(1, 6), do_sample=False, **options)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_kinds_of_attention_caches_change_nothing(kind: str) -> None:
    """transformers says that it ignores them, as it does for Mamba-2."""
    model, ids = build_model("core"), draw_ids(1, 6)
    options = {"do_sample": False, "return_dict_in_generate": True}
    found = generate(model, ids, cache_implementation=kind, **options)
    assert type(found.past_key_values) is UniMatrixCache
    assert torch.equal(found.sequences, generate(model, ids, **options).sequences)
