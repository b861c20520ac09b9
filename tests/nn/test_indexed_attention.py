"""Indexed attention (E25 to E28): what it reads, in any split, and what it carries."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.byte_models import build_byte_model
from tests.nn.streams import build_mixer, check_gradients, check_padding, check_split
from unimatrix import UniMatrixCache, UniMatrixConfig, UniMatrixForCausalLM
from unimatrix.errors import InputError
from unimatrix.nn.indexed_attention import IndexedAttention, find_needed
from unimatrix.nn.selective_mixer import normalize_features
from unimatrix.ops.indexed_attention import REACH, find_entries
from unimatrix.ops.text_index import empty_index, search_text

NAME, VARIANT = "indexed_attention", "unimatrix"
TEXT = (
    b"The code of harkov is 5202798. Nothing else was said that day, and the rain went on; the "
    b"number of selim is 1148. He walked down to the harbour and saw no ship.\n"
    b"Question: which number belongs to harkov? Answer: 5202798. And to selim? Answer: 1148."
)


def build() -> IndexedAttention:
    mixer: IndexedAttention = build_mixer(NAME, VARIANT)
    return mixer


def build_words(**changes) -> UniMatrixForCausalLM:
    """Return a small model of bytes in float64, its weights far from their start."""
    options = {"associative_memory": "indexed", "automaton_window": 128, "index_head_dim": 4}
    model = build_byte_model("unimatrix", **(options | {"num_hidden_layers": 3} | changes)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.add_(noise * 0.1)
    return model


def encode(text: bytes) -> Tensor:
    return torch.tensor([list(text)])


def test_split() -> None:
    check_split(build())


def test_padding() -> None:
    check_padding(build())


def test_gradients() -> None:
    check_gradients(build(), beside=("read_gate",))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_words_are_read_alike_in_any_split(backend: str) -> None:
    model, ids = build_words(), encode(TEXT * 2)
    model.set_backend(backend)
    expected = model(ids, use_cache=True)
    # The keys of few tokens are made of what stands around their places alone.
    for sizes in ([1], [7, 1, 60], [130, 3]):
        cache, logits, first = None, [], 0
        while first < ids.shape[1]:
            piece = ids[:, first : first + sizes[len(logits) % len(sizes)]]
            output = model(piece, past_key_values=cache, use_cache=True)
            cache, first = output.past_key_values, first + piece.shape[1]
            logits.append(output.logits)
        torch.testing.assert_close(
            torch.cat(logits, dim=1), expected.logits, rtol=1e-10, atol=1e-10
        )


@torch.no_grad()
def test_nothing_is_seen_ahead() -> None:
    model, ids = build_words(), encode(TEXT)
    expected = model(ids).logits
    for changed in (90, 160, 220):
        other = ids.clone()
        other[:, changed:] = torch.randint(32, 127, other[:, changed:].shape)
        found = model(other).logits
        torch.testing.assert_close(
            found[:, :changed], expected[:, :changed], rtol=1e-10, atol=1e-10
        )
        assert not torch.allclose(found[:, changed:], expected[:, changed:])


@torch.no_grad()
def test_the_answer_is_among_what_a_question_reads() -> None:
    model = build_words(automaton_window=1024)
    read = {}
    model.model.block.indexed_attention.register_forward_hook(
        lambda _, inputs, output: read.update(found=output[0])
    )
    model(encode(TEXT))
    asked = TEXT.index(b"harkov? Answer: ") + len("harkov? Answer: ") - 1
    found = bytes(read["found"].token_ids[0, asked].tolist())
    assert b"harkov is 5202798" in found
    weights = read["found"].weights[0, asked]
    assert ((weights.sum(dim=-1) > 0) & (weights.sum(dim=-1) < 1)).all()


@torch.no_grad()
def test_a_key_sees_both_sides_once_they_are_known() -> None:
    model = build_words()
    mixer: IndexedAttention = model.model.block.indexed_attention
    text = encode(TEXT)

    class Embeds:
        embed = model.model.embed_tokens

    keys, _ = mixer.make_keys(text, Embeds)
    at = 100
    for changed, sees_past, sees_ahead in (
        (at - REACH - 1, False, False),
        (at - REACH, True, True),
        (at - 1, True, True),
        (at, False, True),
        (at + REACH - 1, False, True),
        (at + REACH, False, False),
    ):
        other = text.clone()
        other[0, changed] = 33
        found, _ = mixer.make_keys(other, Embeds)
        pair = slice(2 * at, 2 * at + 2)
        differs = (found[0, pair] != keys[0, pair]).flatten(1).any(dim=1).tolist()
        assert differs == [sees_past, sees_ahead], changed


@torch.no_grad()
def test_a_place_is_judged_by_what_stands_around_its_unit() -> None:
    model = build_words(automaton_window=256)
    mixer: IndexedAttention = model.model.block.indexed_attention
    text = torch.cat([encode(TEXT), encode(TEXT.upper())])
    places = search_text(text, initial=empty_index(2, 256, 259, "words"))[0].places
    queries = torch.randn(*places.shape[:2], mixer.num_heads, mixer.inner // mixer.num_heads)

    class Embeds:
        embed = model.model.embed_tokens

    found = mixer.score_units(queries.double(), text, places, Embeds())
    keys, _ = mixer.make_keys(pad(text, (0, 1), value=-1), Embeds())
    of_kinds = mixer.unit_kind.weight.view(-1, *queries.shape[2:])
    expected, seen = torch.zeros_like(found), set()
    for row, t, place in (places[..., 0] >= 0).nonzero().tolist():
        _, _, _, kind, since = places[row, t, place].tolist()
        if since < 256 - 16:
            key = keys[row, 2 * (t - since + 1) + (since >= REACH)]
            expected[row, t, :, place] = ((queries[row, t] + of_kinds[kind]) * key).sum(dim=-1)
        seen.add((kind, since >= REACH))
    assert len(seen) >= 10
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_new_units_change_the_score_of_nothing() -> None:
    mixer: IndexedAttention = build_words().model.block.indexed_attention
    source = torch.randn(1, 3, mixer.nothing_score.in_features).double()
    places = torch.zeros(1, 3, 5, 5, dtype=torch.int32)
    marks = torch.tensor([[0, 1, 0b10000010]], dtype=torch.int32)
    of_places = mixer.make_queries(source, places, marks)[-1]
    without = mixer.make_queries(source, places, torch.zeros_like(marks))[-1]
    scores = mixer.nothing_score(normalize_features(source)).view(1, 3, mixer.num_heads, 9)
    less = torch.stack(
        [scores[:, 0, :, 0] * 0, scores[:, 1, :, 1], scores[:, 2, :, 2] + scores[:, 2, :, 8]], dim=1
    )
    torch.testing.assert_close(without - of_places, less.unsqueeze(-1).expand_as(of_places))


@pytest.mark.parametrize("num_before", [0, 70])
def test_the_keys_that_are_needed_are_those_that_are_read(num_before: int) -> None:
    generator, num_columns = torch.Generator().manual_seed(0), num_before + 60
    text = torch.zeros(2, num_columns, dtype=torch.int64)
    for most in (20, 130):
        distances = torch.randint(-1, most, (2, 60, 2), generator=generator, dtype=torch.int32)
        now = torch.arange(num_before, num_columns).view(1, -1, 1)
        distances = distances.minimum(now.int())
        distances[1, 20:] = -1
        rows = find_entries(text, distances, window=1000).rows
        expected = torch.zeros(2, 2 * num_columns, dtype=torch.bool)
        for b in range(2):
            expected[b, rows[b][rows[b] >= 0].long()] = True
        found = find_needed(distances, num_columns)
        assert torch.equal(found.flatten(1), expected)


def test_keys_that_are_made_alone_are_the_same() -> None:
    model = build_words()
    mixer: IndexedAttention = model.model.block.indexed_attention
    text, generator = encode(TEXT * 2)[:, :200].view(2, 100), torch.Generator().manual_seed(0)
    needed = torch.rand(2, 100, 2, generator=generator) > 0.6
    needed[1, :50] = False

    class Embeds:
        embed = model.model.embed_tokens

    found = []
    for chosen in (None, needed):
        model.zero_grad()
        keys, values = mixer.make_keys(text, Embeds, chosen)
        keys = keys * needed.flatten(1)[..., None, None]
        (keys.cos().sum() + values.cos().sum()).backward()
        own = (mixer.key_conv, *mixer.key_mix.parameters(), *mixer.key_proj.parameters())
        weights = (*own, *mixer.value_proj.parameters(), *model.model.embed_tokens.parameters())
        found.append([keys, values, *(weight.grad for weight in weights)])
    for of_all, alone in zip(*found, strict=True):
        torch.testing.assert_close(alone, of_all, rtol=1e-10, atol=1e-12)
    assert mixer.make_keys(text, Embeds, torch.zeros_like(needed))[0].eq(0).all()


@torch.no_grad()
def test_a_saved_state_goes_on(tmp_path) -> None:
    model, ids = build_words(), encode(TEXT)
    expected = model(ids).logits
    for split in (60, 200):
        cache = model(ids[:, :split], use_cache=True).past_key_values
        assert cache.bytes_by_part()["text and index"] <= 12 * 128 + 1520
        cache.save(tmp_path / "state")
        loaded = UniMatrixCache.load(tmp_path / "state")
        found = model(ids[:, split:], past_key_values=loaded, use_cache=True)
        torch.testing.assert_close(found.logits, expected[:, split:], rtol=1e-10, atol=1e-10)
        loaded = UniMatrixCache.load(tmp_path / "state")
        state = loaded.shared[NAME]
        loaded.shared = {**loaded.shared, NAME: state._replace(tokens=state.tokens + 300)}
        with pytest.raises(InputError, match="and the vocabulary has 259 tokens"):
            model(ids[:, split:], past_key_values=loaded)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_rows_of_other_lengths_are_read_like_each_alone(backend: str) -> None:
    """Padded on the left, beyond the window, in a cache that is given up from call to call."""
    model = build_words()
    model.set_backend(backend)
    texts = [TEXT * 2, TEXT[40:] + TEXT, TEXT[:100]]
    alone = [model(encode(text)).logits[0] for text in texts]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    cache, logits = None, []
    for first in range(0, longest, 60):
        piece = slice(first, first + 60)
        output = model(
            ids[:, piece],
            attention_mask=mask[:, piece],
            past_key_values=cache,
            use_cache=True,
            gives_up_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    for row, expected in enumerate(alone):
        found = torch.cat(logits, dim=1)[row, longest - len(expected) :]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    following = encode(b"harkov is") + torch.zeros(3, 1, dtype=torch.int64)
    expected = model(following, past_key_values=cache).logits
    rows = torch.tensor([2, 0, 0])
    found = model(following, past_key_values=cache.select_rows(rows)).logits
    torch.testing.assert_close(found, expected[rows], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_more_tokens_than_16_bits_count() -> None:
    model = build_byte_model("unimatrix", associative_memory="indexed", index_units="tokens")
    model.resize_token_embeddings(40_000)
    ids = torch.tensor([[39_999, 5, 39_999, 5, 7]])
    cache = model(ids, use_cache=True).past_key_values
    assert cache.shared[NAME].tokens.dtype == torch.int32
    assert cache.shared[NAME].tokens[0, :5].tolist() == ids[0].tolist()


@torch.no_grad()
def test_shares_sum_to_one_under_autocast() -> None:
    model, ids = build_words().float(), encode(TEXT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.model(ids, handles_pointer=True)
    shares = output.pointer_log_weights.exp().sum(dim=-1)
    torch.testing.assert_close(shares, torch.ones_like(shares), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_loss_alone_is_that_of_all_logits(backend: str) -> None:
    model = build_words().eval()
    model.set_backend(backend)
    ids = encode(TEXT)[:, :180].view(2, 90)
    labels = ids.clone()
    labels[0, 20:30] = -100
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, 50:] = 0, 0  # padding on the left and on the right
    found = []
    for loss_only in (False, True):
        model.zero_grad()
        output = model(ids, attention_mask=mask, labels=labels, loss_only=loss_only)
        output.loss.backward()
        found.append([output.loss, *(weight.grad for weight in model.parameters())])
    assert output.logits is None
    assert output.pointer_log_weights is None
    for of_all, alone in zip(*found, strict=True):
        torch.testing.assert_close(alone, of_all, rtol=1e-9, atol=1e-11)


def test_it_learns_under_autocast_and_in_16_bits() -> None:
    model, ids = build_words().float().train(), encode(b"12 12 12 " + TEXT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, loss_only=True).loss
    loss.backward()
    mixer = model.model.block.indexed_attention
    assert all(weight.grad.isfinite().all() for weight in mixer.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in mixer.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        for backend in ("auto", "reference"):
            model.set_backend(backend)
            logits = model.to(dtype).eval()(ids).logits
            assert logits.isfinite().all()
            assert model.name_backends(9)[NAME] == ("native" if backend == "auto" else backend)


def test_configurations_that_cannot_be() -> None:
    build = {
        "associative_memory": "indexed",
        "max_position_embeddings": None,
        "automaton_window": 128,
    }
    for changes, message in (
        ({"automaton_window": 129}, "automaton_window is 129; pass an even number of 128 to"),
        ({"automaton_window": 64}, "automaton_window is 64"),
        ({"automaton_window": None}, "needs automaton_window, the tokens that it remembers"),
        ({"index_reads_at": 3}, "index_reads_at is 3, and num_hidden_layers 3"),
        (
            {"vocab_size": 90, "pad_token_id": 0, "index_units": "words"},
            "reads ids below 256 as bytes, and vocab_size is",
        ),
        ({"index_heads": 0}, "index_heads is 0; it must be a whole number of at least 1"),
        ({"index_units": "letters"}, "index_units is 'letters'"),
    ):
        with pytest.raises(InputError, match=message):
            UniMatrixConfig(**(build | changes))


def test_a_model_of_version_2_is_refused_with_one_sentence() -> None:
    old = UniMatrixConfig.preset("unimatrix").to_dict() | {"format_version": 2}
    with pytest.raises(InputError, match="format version 2, whose indexed attention did not look"):
        UniMatrixConfig.from_dict(old)
    assert UniMatrixConfig.from_dict(old | {"associative_memory": "none", "pointer": False})


def test_what_follows_from_the_vocabulary_and_the_depth() -> None:
    assert UniMatrixConfig.preset("unimatrix").index_units == "words"
    small = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = UniMatrixConfig.preset("unimatrix", num_hidden_layers=1, **small)
    assert (config.index_units, config.index_reads_at) == ("tokens", 0)
    assert UniMatrixConfig.preset("unimatrix", num_hidden_layers=2).index_reads_at == 1


def test_a_key_behind_nothing_has_no_gradient_without_bounds() -> None:
    """The past-only key of a first token is 0 at the start; a place just behind it reads it."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = UniMatrixConfig.preset("unimatrix", **tokens, dropout=0.0, automaton_window=128)
    model = UniMatrixForCausalLM(config).train()
    ids = torch.tensor([[7, 8, 7, 9, 7, 8, 7, 9]])
    model(ids, labels=ids).loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(norms).norm() < 1e3
