"""``generate`` with the compiled step gives the tokens of transformers' own loop."""

import logging
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tests.inference.test_decoder import SUPPORTED, assert_same_streams, read
from tests.models import build_model, draw_ids
from unimatrix import pretrained
from unimatrix.errors import InputError

GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 7, "top_p": 0.9}


def pad_left(*prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts [1, T] as one batch, and its mask."""
    width = max(prompt.shape[1] for prompt in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64).unbind()
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    return ids, mask


def generate(model: Any, ids: torch.Tensor, *, seed: int = 3, **kwargs: Any) -> Any:
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14} | kwargs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model.generate(ids, **arguments)


@pytest.fixture
def generate_both(monkeypatch):
    """Return a function that generates with the loop here and with transformers'."""

    def run(model: Any, ids: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
        chosen = []
        choose = pretrained.choose_loop

        def watch(*arguments: Any) -> bool:
            chosen.append(choose(*arguments))
            return chosen[-1]

        with monkeypatch.context() as patch:
            patch.setattr(pretrained, "choose_loop", watch)
            ours = generate(model, ids, **kwargs)
            patch.setattr(pretrained, "choose_loop", lambda *_: False)
            theirs = generate(model, ids, **kwargs)
        assert chosen == [True]
        return ours, theirs

    return run


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("variant", SUPPORTED)
def test_the_same_tokens(variant: str, options: dict[str, Any], generate_both) -> None:
    model = build_model(variant)
    for prompts in ([draw_ids(1, 9)], [draw_ids(1, 4, seed=1), draw_ids(1, 9, seed=2)]):
        ids, mask = pad_left(*prompts)
        ours, theirs = generate_both(model, ids, attention_mask=mask, **options)
        assert torch.equal(ours, theirs)
        assert ours.shape[1] > 9


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": [3, 4, 5]},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(3, 12))},
        {"eos_token_id": [5, 6, 7], "pad_token_id": 1},
        {"eos_token_id": None},
        {"bad_words_ids": [[4, 5], [6]]},
        {"max_new_tokens": 1},
        {"num_return_sequences": 3, "do_sample": True},
        {"typical_p": 0.7, "do_sample": True},
        {"max_new_tokens": 80, "eos_token_id": None},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("sampled", [False, True])
def test_arguments_of_generate(options: dict[str, Any], sampled: bool, generate_both) -> None:
    model = build_model("selective+small", seed=2)
    ids, mask = pad_left(draw_ids(1, 5, seed=1), draw_ids(1, 8, seed=2))
    arguments = (SAMPLED if sampled else GREEDY) | options
    ours, theirs = generate_both(model, ids, attention_mask=mask, **arguments)
    assert torch.equal(ours, theirs)


class _Shout(LogitsProcessor):
    """Prefers the id after the last one, and writes into what it gets."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(scores))
        scores[rows, (input_ids[:, -1] + 1) % scores.shape[1]] += 5
        return scores


class _Asks(LogitsProcessor):
    """Wants an argument that nobody passes."""

    def __call__(self, input_ids: Any, scores: Any, wanted: Any) -> Any:
        raise AssertionError


class _StopAt(StoppingCriteria):
    """Stops a row at an id, anywhere in it."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (input_ids.view(input_ids.shape[0], -1) == 9).any(dim=1)


class _Listener(BaseStreamer):
    """Notes what it is handed."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.heard.append([])


def test_a_callers_own_processors_and_criteria(generate_both) -> None:
    model, ids = build_model("core"), draw_ids(2, 6, high=9)
    arguments = GREEDY | {"logits_processor": [_Shout()], "stopping_criteria": [_StopAt()]}
    ours, theirs = generate_both(model, ids, eos_token_id=None, **arguments)
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="wanted"):
        generate(model, ids, logits_processor=LogitsProcessorList([_Asks()]), **GREEDY)


def test_a_streamer_hears_every_token() -> None:
    model, ids = build_model("core"), draw_ids(1, 6)
    listener = _Listener()
    written = generate(model, ids, streamer=listener, eos_token_id=None, **GREEDY)
    assert listener.heard == [ids[0].tolist(), *([i] for i in written[0, 6:].tolist()), []]


@pytest.mark.parametrize("num_new", [1, 12])
def test_what_a_dictionary_returns(num_new: int, generate_both) -> None:
    model, ids = build_model("sparsepointer"), draw_ids(2, 7)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    arguments = SAMPLED | wanted | {"eos_token_id": None, "max_new_tokens": num_new}
    ours, theirs = generate_both(model, ids, **arguments)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(theirs[name]) == num_new
        for left, right in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
    assert_same_streams(ours.past_key_values, theirs.past_key_values, torch.float64)
    longer = generate(model, ours.sequences, past_key_values=ours.past_key_values, **GREEDY)
    assert torch.equal(longer, generate(model, ours.sequences, **GREEDY))


def test_a_callers_cache_is_continued_and_left_alone() -> None:
    model, ids = build_model("selective"), draw_ids(1, 12)
    cache = read(model, ids[:, :7]).past_key_values
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    continued = generate(model, ids, past_key_values=cache, **GREEDY)
    assert torch.equal(continued, generate(model, ids, **GREEDY))
    assert all(torch.equal(cache.tensors()[name], tensor) for name, tensor in before.items())


def test_the_position_table_bounds_what_is_generated() -> None:
    model, ids = build_model("core", max_position_embeddings=9), draw_ids(1, 6)
    assert generate(model, ids, max_new_tokens=4, eos_token_id=None, **GREEDY).shape == (1, 10)
    with pytest.raises(InputError, match="reaches 10 tokens"):
        generate(model, ids, max_new_tokens=5, eos_token_id=None, **GREEDY)


def test_a_text_grows_past_its_room(generate_both) -> None:
    model, ids = build_model("core"), draw_ids(2, 3)
    arguments = GREEDY | {"max_new_tokens": 1060, "eos_token_id": None}
    ours = generate(model, ids, **arguments)
    assert ours.shape == (2, 1063)
    assert torch.equal(ours[:, :400], generate(model, ids, **(arguments | {"max_new_tokens": 397})))
    # What was generated is what the model says of it.
    with torch.no_grad():
        expected = model(ours[:, :-1]).logits.argmax(dim=-1)
    assert torch.equal(ours[:, 3:], expected[:, 2:])


@pytest.fixture
def messages(caplog):
    """Return what the loop logs, each message once in a process otherwise."""
    logging.Logger.info_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="unimatrix.inference"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_generate_says_once_what_it_does(messages) -> None:
    model, ids = build_model("core"), draw_ids(1, 6)
    for _ in range(2):
        generate(model, ids, **GREEDY)
    assert messages() == ["generate decodes with the compiled step"]


@pytest.mark.parametrize(
    ("variant", "options", "reason"),
    [
        ("assoc", {}, "associative_memory is 'dense'"),
        ("core", {"use_cache": False}, "use_cache is False"),
        (
            "core",
            {"return_dict_in_generate": True, "output_hidden_states": True},
            "output_hidden_states is True",
        ),
    ],
)
def test_generate_says_why_not(variant, options, reason, messages) -> None:
    model, ids = build_model(variant), draw_ids(1, 6)
    generate(model, ids, **(GREEDY | options))
    assert messages() == [f"generate decodes without the compiled step: {reason}"]


def test_devices_in_step_have_their_own_loop(messages) -> None:
    assert not pretrained.choose_loop(build_model("core"), GenerationConfig(use_cache=True), True)
    assert messages() == ["generate decodes without the compiled step: synced_gpus is True"]


def test_beams_are_as_before(messages) -> None:
    model, ids = build_model("core"), draw_ids(1, 6)
    assert generate(model, ids, num_beams=2, eos_token_id=None, **GREEDY).shape == (1, 20)
    assert messages() == []
