"""Cache files of every variant: what is loaded is what was saved, under the names of 0.1.0."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from tests.models import VARIANTS, build_model, draw_ids
from unimatrix import UniMatrixCache, UniMatrixConfig, UniMatrixForCausalLM
from unimatrix.configuration_checks import FORMAT_VERSION
from unimatrix.nn.mixer import Mixer
from unimatrix.ops.text_index import TextIndex

SAVED = Path(__file__).parent.parent / "golden" / "saved"
FIXTURES = ("core", "sparsepointer")  # without an automaton, whose form has changed
SLOTS = ("slot_keys", "slot_values", "slot_strength", "slot_age", "slot_token_ids")
SELECTIVE = ("slot_keys", "slot_value_ids", "slot_codes")
AUTOMATON = ("tokens", "nodes", "splays", "edges", "counters")
variants = pytest.mark.parametrize("variant", VARIANTS)


def list_names(config: UniMatrixConfig, *, learns: bool = False) -> set[str]:
    """Return the names of a cache file's tensors, as release 0.1.0 wrote them.

    Args:
        config: of the model.
        learns: whether gradients were recorded.
    """
    names, associations = {"num_tokens", "last_token_ids"}, set()
    if config.associative_memory == "slots":
        associations = {"previous", *(f"slots.{name}" for name in SLOTS)}
    elif config.associative_memory == "dense":
        associations = {"previous", "dense.keys", "dense.values", "dense.valid"}
    elif config.associative_memory == "selective":
        associations = {f"selective.slots.{name}" for name in SELECTIVE}
        associations |= {"selective.recent_token_ids"} | ({"selective.logits"} if learns else set())
    of_steps = set()
    if config.update_rules != "none":
        of_steps |= {"matrix_state"} | ({"recent"} if config.conv_kernel else set())
    if config.slot_source == "hidden" and config.associative_memory != "selective":
        of_steps |= {f"associations.{name}" for name in associations}
    else:
        names |= {f"associations.{name}" for name in associations}
    names |= {f"depth.{i}.{name}" for i in range(config.num_hidden_layers) for name in of_steps}
    if config.associative_memory == "indexed":
        names |= {f"index.{name}" for name in TextIndex._fields}
    if config.residual_path == "suffix_automaton" and config.associative_memory != "indexed":
        fields = AUTOMATON if config.automaton_window is None else TextIndex._fields
        names |= {f"automaton.{name}" for name in fields}
    return names


def save(cache: UniMatrixCache, folder: Path) -> Path:
    """Save a cache and return its file."""
    cache.save(folder / "cache.safetensors")
    return folder / "cache.safetensors"


def assert_equal(loaded: UniMatrixCache, cache: UniMatrixCache) -> None:
    """Assert that two caches hold the same numbers in the same states."""
    assert (loaded.config_digest, loaded.num_columns) == (cache.config_digest, cache.num_columns)
    pairs = zip((*loaded.depth, loaded.shared), (*cache.depth, cache.shared), strict=True)
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, state in theirs.items():
            kind = Mixer.kinds[name]
            assert type(ours[name]) is type(state) in (kind.State, *kind.other_states)
            leaves = zip(tree_leaves(ours[name]), tree_leaves(state), strict=True)
            assert all(one is other is None or one.dtype == other.dtype for one, other in leaves)
    held, expected = loaded.tensors(), cache.tensors()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(held[name], tensor), name


@pytest.mark.parametrize("learns", [False, True])
@variants
def test_what_is_loaded_is_what_was_saved(variant: str, learns: bool, tmp_path: Path) -> None:
    """Of rows with padding, empty rows among them, fresh and gone on with."""
    model = build_model(variant).train(learns)
    ids, mask = draw_ids(3, 14), torch.ones(3, 14, dtype=torch.int64)
    mask[1, ::3] = 0
    mask[2] = 0
    cache = None
    for _ in range(2):
        with torch.set_grad_enabled(learns):
            output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        file = save(cache, tmp_path)
        assert set(load_file(file)) == list_names(model.config, learns=learns) | {"text_hash"}
        loaded = UniMatrixCache.load(file)
        assert_equal(loaded, cache)
        again = tmp_path / "again"
        again.mkdir(exist_ok=True)
        assert_equal(UniMatrixCache.load(save(loaded, again)), cache)


@pytest.mark.parametrize("name", FIXTURES)
def test_names_shapes_and_types_are_those_of_the_saved_folders(name: str, tmp_path: Path) -> None:
    model = UniMatrixForCausalLM.from_pretrained(SAVED / name).eval()
    ids = load_file(SAVED / name / "expected.safetensors")["input_ids"]
    with safe_open(SAVED / name / "cache.safetensors", framework="pt") as file:
        expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    with torch.no_grad():
        cache = model(ids[:, : int(metadata["num_columns"])], use_cache=True).past_key_values
    with safe_open(save(cache, tmp_path), framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata["format_version"] = str(FORMAT_VERSION)
        assert metadata.items() <= file.metadata().items()
    # Later releases also write which text was read.
    assert found.keys() - {"text_hash"} == expected.keys() == list_names(model.config)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        if not tensor.is_floating_point():
            assert torch.equal(found[key], tensor), key
