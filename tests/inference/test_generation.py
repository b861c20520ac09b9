from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.byte_models import build_byte_model, prefer
from tests.tolerances import error, limit
from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.inference import generation
from unimatrix.inference.generation import generate_bytes, read_prompt, resolve_new_bytes
from unimatrix.inference.sampling import DEFAULT_NEW_BYTES, Sampling
from unimatrix.tokenization import BOS_ID, EOS_ID, PAD_ID

GREEDY = Sampling(temperature=0)
EVERY_BYTE = bytes(range(256))


def continue_slowly(model, prompt: bytes, num_new: int) -> bytes:
    """Take the most likely byte again and again, each time from the whole text."""
    ids = [BOS_ID, *prompt]
    for _ in range(num_new):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        logits[[PAD_ID, BOS_ID]] = -torch.inf
        ids.append(int(logits.argmax()))
    return bytes(ids[1 + len(prompt) :])


@pytest.mark.parametrize("preset", ["core", "sparsepointer", "assoc"])
@pytest.mark.parametrize("prompt", [b"", b"a", "né".encode()[:2], EVERY_BYTE])
def test_greedy_bytes_are_the_most_likely_ones(preset, prompt) -> None:
    model = build_byte_model(preset, seed=3)
    expected = continue_slowly(model, prompt, 12)
    written = generate_bytes(model, prompt, max_new_bytes=12, sampling=GREEDY)
    assert written.data == expected
    assert written.stopped == "length"
    assert written.seconds > 0


@pytest.mark.parametrize("preset", ["core", "assoc"])
def test_a_text_ends_where_the_caller_says(preset) -> None:
    model = build_byte_model(preset, seed=3)
    whole = generate_bytes(model, b"ab", max_new_bytes=12, sampling=GREEDY).data
    seen: list[bytes] = []

    def ends_at(data: bytes) -> bool:
        seen.append(data)
        return len(data) == 5

    cut = generate_bytes(model, b"ab", max_new_bytes=12, sampling=GREEDY, ends_at=ends_at)
    assert cut.data == whole[:5]
    assert seen == [whole[:n] for n in range(1, 6)]


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_long_prompts_are_read_in_parts(monkeypatch, chunk) -> None:
    model = build_byte_model("sparsepointer", seed=3)
    expected = generate_bytes(model, EVERY_BYTE, max_new_bytes=8, sampling=GREEDY).data
    monkeypatch.setattr(generation, "PREFILL_TOKENS", chunk)
    assert generate_bytes(model, EVERY_BYTE, max_new_bytes=8, sampling=GREEDY).data == expected


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_read_in_parts_leaves_the_same_cache(monkeypatch, batch, window, chunk) -> None:
    model = build_byte_model("selective", automaton_window=window).double()
    ids = torch.tensor([list(EVERY_BYTE[:50] * 3), list(b"abc" * 50)])[:batch]
    monkeypatch.setattr(generation, "PREFILL_TOKENS", chunk)
    before = read_prompt(model.eval(), ids[:, :61])
    assert before is not None
    held = {name: tensor.clone() for name, tensor in before.tensors().items()}
    cache = read_prompt(model, ids[:, 61:], before)
    assert cache is not None
    for name, tensor in before.tensors().items():
        assert torch.equal(tensor, held[name]), name
    assert cache.num_columns == ids.shape[1]
    with torch.no_grad():
        whole = model(ids, use_cache=True).past_key_values
        following = ids[:, 20:60]
        expected = model(following, past_key_values=whole).logits
        continued = model(following, past_key_values=cache).logits
    assert error(continued, expected) <= limit("model", torch.float64, "value")


def test_an_empty_prompt_leaves_no_cache() -> None:
    assert read_prompt(build_byte_model(), torch.zeros(1, 0, dtype=torch.int64)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prompt", [b"", b"x", EVERY_BYTE[40:90]])
def test_a_prompt_goes_on_where_a_text_read_first_ends(prompt, dtype, monkeypatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 20)
    model = build_byte_model("selective", automaton_window=None).to(dtype)
    first = EVERY_BYTE[:70] * 2
    prime = ByteStream.from_bytes(first, name="first")
    expected = generate_bytes(model, first + prompt, max_new_bytes=30, sampling=GREEDY)
    written = generate_bytes(model, prompt, max_new_bytes=30, prime=prime, sampling=GREEDY)
    assert written.data == expected.data


def test_nothing_is_read_before_a_position_table() -> None:
    prime = ByteStream.from_bytes(b"first", name="first")
    with pytest.raises(InputError, match="reads windows and nothing before them"):
        generate_bytes(build_byte_model(max_position_embeddings=40), b"x", prime=prime)


def test_bytes_come_one_by_one() -> None:
    parts: list[bytes] = []
    model = build_byte_model()
    written = generate_bytes(model, b"x", max_new_bytes=20, on_bytes=parts.append)
    assert b"".join(parts) == written.data
    assert {len(part) for part in parts} == {1}


def test_the_seed_alone_decides_and_nothing_global_moves() -> None:
    model = build_byte_model().train()
    first = generate_bytes(model, b"x", max_new_bytes=30, sampling=Sampling(seed=1))
    torch.manual_seed(99)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = generate_bytes(model, b"x", max_new_bytes=30, sampling=Sampling(seed=1))
    other = generate_bytes(model, b"x", max_new_bytes=30, sampling=Sampling(seed=2))
    assert first.data == again.data != other.data
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["compiled", "transformers"])
def test_the_seed_alone_decides_in_threads_too(dtype) -> None:
    model = build_byte_model().to(dtype).train()
    num_threads = torch.get_num_threads()

    def write(seed: int) -> bytes:
        sampling = Sampling(seed=seed)
        return generate_bytes(model, b"x", max_new_bytes=12, sampling=sampling).data

    expected = [write(seed) for seed in range(6)]
    assert len(set(expected)) > 1
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, list(range(6)) * 2)) == expected * 2
        assert set(pool.map(lambda _: torch.get_num_threads(), range(6))) == {num_threads}
    assert torch.get_num_threads() == num_threads
    assert all(module.training for module in model.modules())


def test_the_end_of_the_text_stops() -> None:
    model = prefer(build_byte_model(), EOS_ID)
    written = generate_bytes(model, b"x", sampling=GREEDY)
    assert (written.data, written.stopped) == (b"", "eos")


@pytest.mark.parametrize("token_id", [PAD_ID, BOS_ID, EOS_ID + 1, 263])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_ids_that_are_no_text_are_never_chosen(token_id, sampling) -> None:
    model = prefer(build_byte_model(vocab_size=264), token_id)
    written = generate_bytes(model, b"x", max_new_bytes=20, sampling=sampling)
    assert len(written.data) == 20 or written.stopped == "eos"


def test_top_k_1_and_a_tiny_top_p_are_greedy() -> None:
    model = build_byte_model()
    expected = generate_bytes(model, b"x", max_new_bytes=20, sampling=GREEDY).data
    for narrow in (Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-3)):
        assert generate_bytes(model, b"x", max_new_bytes=20, sampling=narrow).data == expected


def test_room_in_a_position_table() -> None:
    table, free = build_byte_model(max_position_embeddings=10), build_byte_model()
    assert resolve_new_bytes(table, 0, None) == 10
    assert resolve_new_bytes(table, 9, None) == 1
    assert resolve_new_bytes(table, 4, 6) == 6
    assert resolve_new_bytes(free, 10**6, None) == DEFAULT_NEW_BYTES
    with pytest.raises(InputError, match=r"at most 6$"):
        resolve_new_bytes(table, 4, 7)
    with pytest.raises(InputError, match="a prompt of at most 9;"):
        resolve_new_bytes(table, 10, None)
    with pytest.raises(InputError, match="max-new-bytes is 0"):
        resolve_new_bytes(free, 0, 0)


@pytest.mark.parametrize("num_prompt_bytes", [0, 1, 4, 9])
def test_a_full_table_is_really_generated(num_prompt_bytes) -> None:
    model = build_byte_model("sparsepointer", max_position_embeddings=10)
    prompt = EVERY_BYTE[:num_prompt_bytes]
    written = generate_bytes(model, prompt, sampling=GREEDY)
    assert written.data == continue_slowly(model, prompt, 10 - num_prompt_bytes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", 0),
    ],
)
def test_unusable_sampling(name, value) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        Sampling(**{name: value})
