import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.byte_models import build_byte_model, prefer, quiet_transformers, save_model
from unimatrix.baselines.peers import PEERS
from unimatrix.configuration import UniMatrixConfig
from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation import readers
from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte
from unimatrix.evaluation.byte_costs import cost_targets, hit_targets
from unimatrix.evaluation.code_completion import (
    list_far_names,
    list_lines,
    measure_far_names,
    measure_lines,
)
from unimatrix.evaluation.long_context import bin_by_position, measure_positions, measure_task
from unimatrix.evaluation.readers import Reader, TooLongError, open_reader
from unimatrix.tasks.ruler import build_task
from unimatrix.tokenization import BOS_ID

SIZE = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "dropout": 0.0}
TEXT = np.frombuffer(b"The rain falls on the plain. " * 500, np.uint8)
PROSE = "Grüße aus Köln: 東京 und naïve Würfel. The rain falls on the plain.\n" * 20


def build_peer(name: str):
    torch.manual_seed(0)
    model = PEERS[name].build(UniMatrixConfig(**SIZE), max_tokens=200).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def never(_: bytes) -> bool:
    return False


def write_greedily(model, prompt: bytes, count: int) -> bytes:
    """Write by whole forward passes."""
    ids = [BOS_ID, *prompt]
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return bytes(i for i in ids[1 + len(prompt) :] if i < 256)


def save_peer(folder, model) -> str:
    with quiet_transformers():
        model.save_pretrained(folder)
    return str(folder)


def build_subword_reader(folder) -> Reader:
    """Save a small GPT-2 with byte pairs, and open it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PROSE], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_positions=400, n_embd=16, n_layer=1, n_head=2, eos_token_id=0
    )
    save_peer(folder, GPT2LMHeadModel(config))
    return open_reader(str(folder))


class Solver(Reader):
    """Reads needles with a regular expression."""

    def complete(self, prompt, max_new_bytes, ends_at):
        found = re.findall(rb"One of the secret numbers of (\S+) is: (\d+)", prompt)
        asked = prompt.rpartition(b"Question:")[2]
        return b", ".join(value for key, value in found if key in asked)


@pytest.mark.parametrize("name", ["llama", "gelu-transformer", "mamba2", "gated-deltanet"])
def test_peers_write_what_whole_forward_passes_do(name) -> None:
    model = build_peer(name)
    expected = write_greedily(model, b"The rain in", 12)
    assert Reader(name, model, None).complete(b"The rain in", 12, never) == expected


@pytest.mark.parametrize("preset", ["unimatrix", "core"])
def test_ours_writes_what_whole_forward_passes_do(preset) -> None:
    model = build_byte_model(preset)
    expected = write_greedily(model, b"The rain in", 12)
    found = Reader("ours", model, None).complete(b"The rain in", 12, never)
    assert found[: len(expected)] == expected


@pytest.mark.parametrize("name", ["ours", "llama", "mamba2"])
def test_writing_ends_where_asked(name) -> None:
    model = build_byte_model() if name == "ours" else build_peer(name)
    reader = Reader(name, model, None)
    whole = reader.complete(b"ab", 10, never)
    assert reader.complete(b"ab", 10, lambda data: len(data) == 3) == whole[:3]


def test_what_does_not_fit_a_position_table_is_too_long() -> None:
    for model in (build_peer("llama"), build_byte_model(max_position_embeddings=200)):
        reader = Reader("small", model, None)
        assert reader.limit_tokens == 200
        assert len(reader.complete(b"x" * 190, 10, never)) <= 10
        with pytest.raises(TooLongError, match="reads at most 200 tokens"):
            reader.complete(b"x" * 191, 10, never)
    assert Reader("any", build_peer("mamba2"), None).limit_tokens is None
    assert Reader("any", build_byte_model(), None).limit_tokens is None


def test_too_little_memory_is_told_from_other_errors(monkeypatch) -> None:
    reader = Reader("llama", build_peer("llama"), None)
    for message, error in (
        ("DefaultCPUAllocator: can't allocate memory", TooLongError),
        ("shapes differ", RuntimeError),
    ):

        def fail(*_args, message=message, **_options):
            raise RuntimeError(message)

        monkeypatch.setattr(reader.model, "generate", fail)
        with pytest.raises(error):
            reader.complete(b"x", 1, never)


def test_opening_ours_and_peers(tmp_path) -> None:
    ours = open_reader(save_model(tmp_path / "ours", build_byte_model("unimatrix")))
    assert (ours.tokenizer, ours.model.training) == (None, False)
    for name in ("llama", "gated-linear-attention"):
        reader = open_reader(save_peer(tmp_path / name, build_peer(name)))
        assert reader.tokenizer is None
        assert reader.first_id == BOS_ID
    assert isinstance(open_reader(str(tmp_path / "llama")).model, LlamaForCausalLM)


def test_a_misspelt_name_is_refused_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(InputError, match=r"there is no run folder.*Did you mean 'runs/first'"):
        open_reader("runs/frist")
    monkeypatch.setattr(readers, "ENDPOINT", "http://localhost:9")
    for name in ("gpt-none", "nobody/nothing", "not a name"):
        with pytest.raises(InputError, match=f"no folder '{name}' here, and the Hugging Face hub"):
            open_reader(name)


def test_unusable_models(tmp_path) -> None:
    with pytest.raises(InputError, match="there is no run folder"):
        open_reader(str(tmp_path / "no"))
    with pytest.raises(InputError, match="'core' is a preset"):
        open_reader("core")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=40, n_embd=8, n_layer=1, n_head=1)
    folder = save_peer(tmp_path / "no-tokenizer", GPT2LMHeadModel(config))
    with pytest.raises(InputError, match="has no tokenizer; save it beside the model"):
        open_reader(folder)
    (tmp_path / "no-tokenizer" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the model"):
        open_reader(folder)
    (tmp_path / "no-tokenizer" / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        open_reader(folder)


def test_tokens_of_a_text_know_their_bytes(tmp_path) -> None:
    reader = build_subword_reader(tmp_path)
    data = PROSE.encode()
    tokens = reader.encode(data)
    assert len(tokens.ids) < len(data) / 2
    assert tokens.ends[-1] == len(data)
    assert (np.diff(tokens.ends) >= 0).all()
    for number in range(10, 30):
        piece = data[: tokens.ends[number]]
        text = reader.tokenizer.decode(tokens.ids[: number + 1]).replace("\ufffd", "")
        assert piece.decode(errors="ignore").startswith(text)
    # What is no UTF-8 is left out, here half a character.
    assert reader.encode("é".encode()[:1] + b"ab").ends[-1] == 2


def test_a_model_of_subwords_is_measured_in_bytes(tmp_path) -> None:
    reader = build_subword_reader(tmp_path)
    stream = ByteStream.from_bytes(PROSE.encode(), name="prose")
    found = measure_positions(reader, stream, 10**6)
    tokens = reader.encode(PROSE.encode())
    nats, _ = reader.score(tokens, cost_targets)
    assert found["bytes"] == len(PROSE.encode())
    expected = float(nats.sum()) / np.log(2) / found["bytes"]
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert found["context"] == "windows of 400, half overlapping"
    assert len(reader.complete(b"The rain falls on the ", 30, never)) <= 30
    task = build_task("niah_single_1", 2500, TEXT)
    with pytest.raises(TooLongError):
        measure_task(reader, task, 1, 0)


def test_positions_are_what_eval_measures() -> None:
    model = build_byte_model("unimatrix")
    stream = ByteStream.from_bytes(TEXT[:700].tobytes(), name="text")
    found = measure_positions(Reader("ours", model, None), stream, 600)
    expected = measure_bits_per_byte(model, stream, limit_bytes=600)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert [bins[:2] for bins in found["by_position"]] == [
        [0, 128],
        [128, 256],
        [256, 512],
        [512, 600],
    ]
    mean = sum((end - first) * bits for first, end, bits in found["by_position"]) / 600
    assert mean == pytest.approx(found["bits_per_byte"], abs=1e-4)
    assert found["context"] == "carried"


def test_a_token_counts_where_it_starts() -> None:
    nats = np.log(2) * np.array([127, 30, 8, 5], np.float32)
    bins = bin_by_position(nats, np.array([127, 157, 161, 171]))
    # The second token starts at byte 127 and ends behind the border.
    assert bins == [[0, 128, 1.0], [128, 171, pytest.approx(13 / 14, abs=1e-5)]]


def test_a_solver_reaches_the_top_and_a_model_of_one_byte_nothing() -> None:
    solver = Solver("solver", build_byte_model(), None)
    constant = Reader("constant", prefer(build_byte_model(), ord("e")), None)
    for name in ("niah_single_2", "niah_multikey_2", "niah_multivalue", "niah_multiquery"):
        task = build_task(name, 2048, TEXT)
        calls: list[int] = []
        found = measure_task(solver, task, 3, 0, on_example=lambda calls=calls: calls.append(1))
        assert (found["score"], found["examples"], len(calls)) == (1.0, 3, 3)
        assert [depth for depth, _ in found["by_example"]] == pytest.approx(
            [0, 17 / 39, 34 / 39], abs=1e-6
        )
        answer = found["first"]["answer"].split(", ")
        assert sorted(answer) == sorted(found["first"]["references"])
    task = build_task("niah_single_1", 1024, TEXT)
    found = measure_task(constant, task, 1, 0)
    assert found["score"] == 0
    assert found["first"]["answer"] == "e" * 200


SOURCE = (
    b"import lexical_thing\n"
    + b"early = lexical_thing.first_value  # rare_word\n"
    + b"x = 1\n" * 400
    + b"lexical_thing(first_value, unseen_name, early, rare_word, isinstance)\n"
    + b"lexical_thing.other\n"
)


def test_names_from_far_above() -> None:
    found = [SOURCE[start:stop] for start, stop in list_far_names(SOURCE)]
    assert found == [b"lexical_thing", b"first_value", b"early", b"rare_word"]
    start = SOURCE.rindex(b"lexical_thing(")
    assert list_far_names(SOURCE)[0] == (start, start + 13)
    assert list_far_names(b"def (\n") == []
    accented = "é = 'ü'\n".encode() + SOURCE.replace(b"rare_word, ", "'ä', rare_word, ".encode())
    assert [accented[a:b] for a, b in list_far_names(accented)] == found


def test_lines_to_complete() -> None:
    places = list_lines({"a.py": SOURCE, "b.py": b"call_something()\n"})
    lines = [SOURCE[place.start : place.stop] for place in places]
    assert lines == [SOURCE.splitlines()[-2], SOURCE.splitlines()[-1]]
    with pytest.raises(InputError, match="2 lines to complete, fewer than 3"):
        measure_lines(Reader("m", build_byte_model(), None), {"a": SOURCE}, 3, 0, context_bytes=9)


class Copier(Reader):
    """Knows the source by heart, up to a length of prompt."""

    def complete(self, prompt, max_new_bytes, ends_at):
        if len(prompt) > 300:
            raise TooLongError("too long")
        return SOURCE[SOURCE.rindex(prompt) + len(prompt) :][:max_new_bytes]

    def score(self, tokens, score):
        assert score is hit_targets
        hits = np.ones(len(SOURCE), np.float32)
        hits[SOURCE.rindex(b"first_value") + 1] = 0
        hits[SOURCE.rindex(b"rare_word") + 5] = 0
        return hits[: len(tokens.ids)], "carried"


def test_code_completion_counts() -> None:
    reader = Copier("copier", build_byte_model(), None)
    found = measure_lines(reader, {"a": SOURCE}, 2, 0, context_bytes=1000)
    assert (found["exact_match"], found["examples"], found["context_bytes"]) == (1.0, 2, 250)
    names = measure_far_names(reader, {"a": SOURCE}, 10, most_bytes=10_000)
    assert (names["accuracy"], names["examples"]) == (0.5, 4)
    assert (names["rest_accuracy"], names["rest_examples"]) == (0.75, 4)
    few = measure_far_names(reader, {"a": SOURCE, "b": SOURCE}, 1, most_bytes=10_000)
    assert (few["accuracy"], few["examples"]) == (1.0, 1)
    none = measure_far_names(reader, {"a": SOURCE}, 1, most_bytes=100)
    assert (none["accuracy"], none["examples"], none["rest_accuracy"]) == (None, 0, None)


def test_code_completion_of_models() -> None:
    for model in (build_byte_model("unimatrix"), build_peer("llama")):
        reader = Reader("model", model, None)
        found = measure_lines(reader, {"a": SOURCE}, 1, 0, context_bytes=10**6)
        assert found["exact_match"] == 0
        assert found["context_bytes"] == (10**6 if reader.limit_tokens is None else 80)
        names = measure_far_names(reader, {"a": SOURCE}, 10, most_bytes=10**6)
        assert (names["accuracy"], names["examples"]) == (0, 4)
