"""Whose cache it is: files, copies, other weights and other kinds of cache."""

import copy
import gc
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from tests.models import build_model, draw_ids
from unimatrix import Decoder, UniMatrixForCausalLM
from unimatrix.cache import UniMatrixCache
from unimatrix.errors import InputError
from unimatrix.hub import weights_origin

IDS = draw_ids(2, 8)
OTHER = "made by a model with other weights"


def read(model: Any, ids: torch.Tensor = IDS, **kwargs: Any) -> UniMatrixCache:
    with torch.no_grad():
        cache = model(ids, use_cache=True, **kwargs).past_key_values
    assert isinstance(cache, UniMatrixCache)
    return cache


def test_a_cache_of_other_weights_is_refused() -> None:
    model, other = build_model("core"), build_model("core", seed=1)
    cache = read(model)
    for use in (
        lambda: read(other, past_key_values=cache),
        lambda: read(other.model, past_key_values=cache.detach()),
        lambda: Decoder(other, cache.to("cpu")),
        lambda: other.generate(IDS[:, :1], past_key_values=cache, max_new_tokens=2),
        lambda: read(other, past_key_values=Decoder(model, cache).cache()),
        lambda: read(other, past_key_values=copy.deepcopy(cache).select_rows(torch.arange(2))),
        lambda: read(other, past_key_values=pickle.loads(pickle.dumps(cache))),
    ):
        with pytest.raises(InputError, match=OTHER):
            use()
    read(other, past_key_values=cache.forget_weights())
    read(model, past_key_values=cache)


def test_a_saved_cache_of_other_weights_is_refused(tmp_path) -> None:
    model = build_model("core")
    read(model).save(tmp_path / "cache")
    with pytest.raises(InputError, match=OTHER):
        read(build_model("core", seed=1), past_key_values=UniMatrixCache.load(tmp_path / "cache"))
    model.save_pretrained(tmp_path / "model")
    loaded = UniMatrixForCausalLM.from_pretrained(tmp_path / "model").eval()
    following = read(loaded, past_key_values=UniMatrixCache.load(tmp_path / "cache"))
    assert following.origin is loaded.model.origin


def test_a_cache_outlives_its_model() -> None:
    model = build_model("core")
    cache = read(model)
    same = copy.deepcopy(model)
    del model
    gc.collect()
    with pytest.raises(InputError, match=OTHER):
        read(build_model("core", seed=1), past_key_values=cache)
    read(same, past_key_values=cache)


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_another_type_are_the_same_weights(dtype, is_saved, tmp_path) -> None:
    wide = build_model("core", dtype=torch.float32)
    cast = copy.deepcopy(wide).to(dtype)
    for maker, reader in ((wide, cast), (cast, wide)):
        cache = read(maker)
        if is_saved:
            cache.save(tmp_path / "cache")
            cache = UniMatrixCache.load(tmp_path / "cache")
        with torch.no_grad():
            assert cache.origin is not None
            assert cache.origin.is_of(reader.model)
            assert not cache.origin.is_of(build_model("core", seed=1).to(dtype).model)


def test_the_model_itself_is_never_asked(monkeypatch) -> None:
    """It may train on, be wrapped, moved or compiled: its caches are its own."""
    model = build_model("core", dropout=0.0)
    gc.collect()
    asked: list[Any] = []
    monkeypatch.setattr(weights_origin, "digest_weights", lambda *given: asked.append(given))
    cache = read(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    cache = read(model, past_key_values=cache)
    Decoder(model, cache).step(IDS[:, 0])
    cache = read(model.float().double(), past_key_values=cache)
    cache = read(torch.compile(model, backend="eager"), past_key_values=cache)
    assert cache.origin is model.model.origin
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    cache = read(adapted, past_key_values=cache)
    assert cache.origin is model.model.origin
    assert asked == []
    torch.compiler.reset()


def test_copies_are_models_of_their_own() -> None:
    model = build_model("core")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        if copied.model is not model.model:
            assert copied.model.origin is not model.model.origin
        cache = read(copied, past_key_values=read(model))
        assert cache.origin is copied.model.origin
    copied = copy.deepcopy(model)
    copied.model.block = torch.compile(copied.model.block, backend="eager")
    assert read(model).origin.is_of(copied.model)


@pytest.mark.filterwarnings("default")
def test_weights_that_are_not_here_are_not_compared(tmp_path) -> None:
    model, empty = build_model("core"), build_model("core")
    empty.model.embed_tokens.to("meta")
    assert read(model).origin.is_of(empty.model) is None
    cache = replace(read(model), origin=weights_origin.WeightsOrigin(None))
    with pytest.warns(UserWarning, match="weights cannot be compared"):
        read(model, past_key_values=cache)
    assert cache.origin is model.model.origin


def test_a_file_of_an_earlier_release_loads_with_a_warning(tmp_path) -> None:
    model = build_model("selective+small")
    cache = read(model)
    cache.save(tmp_path / "new")
    with safe_open(tmp_path / "new", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata["weights_digests"], tensors["text_hash"]
    save_file(tensors, tmp_path / "old", metadata=metadata)
    with pytest.warns(UserWarning, match="which weights made it.*, nor which text it has read"):
        old = UniMatrixCache.load(tmp_path / "old")
    expected = model(IDS, past_key_values=cache).logits
    assert torch.equal(model(IDS, past_key_values=old).logits, expected)
    assert Decoder(model, old).cache().text_hash is None


def test_unusable_paths(tmp_path) -> None:
    with pytest.raises(InputError, match="is a folder; name the file"):
        UniMatrixCache.load(tmp_path)
    with pytest.raises(InputError, match="no cache file"):
        UniMatrixCache.load(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be written"):
        read(build_model("core")).save(tmp_path / "none" / "cache")


def test_caches_of_other_kinds() -> None:
    model = build_model("core")
    full = DynamicCache()
    full.update(torch.zeros(2, 1, 8, 4), torch.zeros(2, 1, 8, 4), 0)
    for wrong in (full, ((torch.zeros(1),),)):
        with pytest.raises(InputError, match="is no cache of this model"):
            model(IDS, past_key_values=wrong)
    with pytest.raises(InputError, match="is a DynamicCache, which is no cache of this model"):
        model.generate(IDS, past_key_values=full, max_new_tokens=2)
    expected = model(IDS).logits
    assert torch.equal(model(IDS, past_key_values=DynamicCache()).logits, expected)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        found = model.generate(IDS, past_key_values=DynamicCache(), **options, **arguments)
        assert torch.equal(found, model.generate(IDS, **options, **arguments))


def test_a_file_with_tensors_that_no_mixer_carries_is_refused(tmp_path) -> None:
    model = build_model("core")
    with torch.no_grad():
        model(draw_ids(2, 9), use_cache=True).past_key_values.save(tmp_path / "c")
    with safe_open(tmp_path / "c", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors | {"depth.0.unknown.average": torch.zeros(2, 3)}, tmp_path / "c", metadata)
    with pytest.raises(InputError, match=r"holds 'depth\.0\.unknown\.average', which no mixer"):
        UniMatrixCache.load(tmp_path / "c")
