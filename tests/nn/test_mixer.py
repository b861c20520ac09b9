"""The protocol of mixers: what each says of itself, and what one that lacks a part is told."""

from typing import Any, NamedTuple, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.models import VARIANTS, build_model, draw_ids
from tests.nn.streams import draw_stream
from unimatrix.cache import UniMatrixCache, digest_config
from unimatrix.kernels.step.explain import explain_step
from unimatrix.modeling_outputs import Passed, collect_scales, join_passes
from unimatrix.nn.mixer import Mixer, Read, Tokens
from unimatrix.nn.pointer_mixture import Pointer
from unimatrix.ops.backends import BACKENDS
from unimatrix.ops.hindsight import HindsightScale

NAMES = (
    "matrix_mixer",
    "slot_mixer",
    "dense_mixer",
    "selective_mixer",
    "residual_context",
    "indexed_attention",
)
ON_CPU = ("residual_context", "indexed_attention")
# Where the tensors of a state stand in the cache files of every release.
PREFIXES = {
    "matrix_mixer": "",
    "slot_mixer": "associations.",
    "dense_mixer": "associations.",
    "selective_mixer": "associations.selective.",
    "residual_context": "automaton.",
    "indexed_attention": "index.",
}


class EchoState(NamedTuple):
    """What ``Echo`` carries: the last source."""

    echo: Tensor


@pytest.fixture
def echo_class(monkeypatch: pytest.MonkeyPatch) -> type[Mixer]:
    """Define a mixer as a reader of the library would; forget it afterwards."""
    monkeypatch.setattr(Mixer, "kinds", dict(Mixer.kinds))

    class Echo(Mixer):
        """Reads the source again, from the token before, scaled."""

        name, operator, part = "echo", "matrix_state", "echo"
        State, state_prefix = EchoState, "echo."

        def __init__(self, width: int) -> None:
            super().__init__()
            self.echo_gate = nn.Linear(width, width)

        @property
        def runs_operator(self) -> bool:
            """No operator."""
            return False

        @property
        def gate(self) -> nn.Module:
            """Its gate."""
            return self.echo_gate

        def forward(self, source: Tensor, tokens: Tokens, state: Any) -> tuple[Read, EchoState]:
            """Shift the source by a token."""
            first = torch.zeros_like(source[:, 0]) if state is None else state.echo
            shifted = torch.cat([first.unsqueeze(1), source[:, :-1]], dim=1)
            return Read(0.5 * shifted), EchoState(source[:, -1])

    return Echo


def test_every_mixer_is_known_by_its_name() -> None:
    # Examples and other tests may have made mixers of their own.
    kinds = {n: kind for n, kind in Mixer.kinds.items() if kind.__module__.startswith("unimatrix.")}
    assert tuple(sorted(kinds)) == tuple(sorted(NAMES))
    for name, kind in kinds.items():
        assert kind.name == name
        assert kind.operator in BACKENDS
        assert kind.part
        assert kind.state_prefix == PREFIXES[name]
        assert (kind.state_device is None) == (name not in ON_CPU)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_a_named_tuple_of_tensors(name: str) -> None:
    def check(kind: Any) -> None:
        assert issubclass(kind, tuple)
        for hint in get_type_hints(kind).values():
            if hint not in (Tensor, Tensor | None):
                check(hint)

    kind = Mixer.kinds[name]
    for form in (kind.State, *kind.other_states):
        check(form)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_model_holds_each_under_its_name(variant: str) -> None:
    """And calls the one that reads once before the depth step that it names, others at each."""
    model = build_model(variant)
    inner, read_at = model.model, {}
    num_steps, steps = model.config.num_hidden_layers, [0]

    def count_step(*_: Any) -> None:
        steps[0] += 1

    def note(module: Mixer, given: Any, output: Any) -> None:
        read_at.setdefault(module.name, []).append(steps[0])
        assert output[0].context.shape == given[0].shape
        assert output[1] is None or type(output[1]) in (module.State, *module.other_states)

    inner.block.register_forward_hook(count_step)
    for mixer in inner.mixers:
        owner = inner if mixer.name == "residual_context" else inner.block
        assert getattr(owner, mixer.name) is mixer
        assert isinstance(inner.block.gates[mixer.name], nn.Linear)
        mixer.register_forward_hook(note)
    assert list(inner.block.gates) == [mixer.name for mixer in inner.mixers]
    model(draw_ids(2, 9))
    for mixer in inner.mixers:
        once = [mixer.reads_at]
        assert read_at[mixer.name] == (once if once != [None] else list(range(num_steps)))


@pytest.mark.parametrize(
    "variant", ["core+conv", "assoc", "rosa", "core+suffix_automaton", "selective+small"]
)
@torch.no_grad()
def test_a_state_grows_where_the_mixer_says_so(variant: str) -> None:
    model = build_model(variant)
    few, many = (model(draw_ids(1, n), use_cache=True).past_key_values for n in (9, 80))
    for mixer in model.model.mixers:
        sizes = []
        for cache in (few, many):
            states = [states.get(mixer.name) for states in (*cache.depth, cache.shared)]
            sizes.append(sum(tensor.nbytes for tensor in tree_leaves(states) if tensor is not None))
        assert (sizes[1] > sizes[0]) == mixer.grows, mixer.name


def test_a_mixer_that_lacks_a_part_says_which() -> None:
    class Silent(Mixer):
        """Has no name and no part."""

    stream = draw_stream(1, 2)
    with pytest.raises(NotImplementedError, match="Silent has no gate"):
        _ = Silent().gate
    with pytest.raises(NotImplementedError, match="Silent does not read"):
        Silent()(stream.source, stream.describe(), None)
    with pytest.raises(NotImplementedError, match="Silent does not vote"):
        Silent().vote(stream.source, Read(stream.source))
    assert "Silent" not in [kind.__name__ for kind in Mixer.kinds.values()]


@torch.no_grad()
def test_a_new_mixer_is_gated_carried_saved_and_told(
    echo_class: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """All that block, cache and back ends know of it is what the class says."""
    model = build_model("core+previous_token")
    block = model.model.block
    block.echo = echo_class(model.config.hidden_size).double()
    mixers = [*block.mixers, block.echo]
    monkeypatch.setattr(type(block), "mixers", property(lambda self: mixers))
    ids = draw_ids(2, 12)
    whole = model(ids, use_cache=True)
    assert Mixer.kinds["echo"] is echo_class
    assert list(block.gates) == ["matrix_mixer", "echo", "residual_context"]
    cache = model(ids[:, :5], use_cache=True).past_key_values
    assert cache.tensors()["depth.1.echo.echo"].shape == (2, 12)
    assert cache.bytes_by_part()["echo"] == 3 * 2 * 12 * 8
    cache.save(tmp_path / "cache")
    loaded = UniMatrixCache.load(tmp_path / "cache")
    rest = model(ids[:, 5:], past_key_values=loaded).logits
    torch.testing.assert_close(rest, whole.logits[:, 5:])
    block.echo.echo_gate.weight.data += 1
    assert not torch.allclose(model(ids).logits, whole.logits)
    model.set_backend("reference")
    assert block.echo.operator_options == {}
    model.set_backend("auto")
    assert "echo" not in model.name_backends(12, torch.device("cpu"))
    assert explain_step(model) == "model.block.echo is a Echo"


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_mixer_says_what_its_state_is(variant: str) -> None:
    """Fields of the configuration that decide it, and the form of tensors that it carries."""
    model = build_model(variant)
    cache = model(draw_ids(2, 9), use_cache=True).past_key_values
    tensors = cache.tensors()
    assert digest_config(model.config) == cache.config_digest
    for mixer in model.model.mixers:
        assert hasattr(model.config, mixer.chosen_by)
        assert all(hasattr(model.config, name) for name in mixer.list_state_fields(model.config))
        prefix = "depth.0." if mixer.reads_at is None else ""
        for ending, form in mixer.list_state_tensors(model.config).items():
            tensor = tensors.get(f"{prefix}{mixer.state_prefix}{ending}")
            if tensor is not None:
                assert tuple(tensor.shape[1:]) == form.sizes
                assert tensor.is_floating_point() == (form.holds == "floats")
                assert form.holds != "int64" or tensor.dtype == torch.int64


class ToldRead(NamedTuple):
    """What a mixer with an auxiliary loss returns."""

    context: Tensor
    scale: HindsightScale


def test_the_auxiliary_losses_of_all_mixers_are_added() -> None:
    """Each is a mean over its own writes in all passes; none hides another."""

    def zeros(of_target: float, of_gate: float, num_writes: int) -> HindsightScale:
        numbers = (torch.tensor(of_target), torch.tensor(of_gate), torch.tensor(num_writes))
        return HindsightScale(*numbers)

    h = torch.zeros(1, 2, 3)

    def make_pass(one: HindsightScale, other: HindsightScale) -> Passed:
        reads = {"one": ToldRead(h, one), "none": Read(h), "other": ToldRead(h, other)}
        return Passed(h, [], Pointer(), collect_scales(reads), None)

    first = make_pass(zeros(1.0, 2.0, 3), zeros(10.0, 20.0, 1))
    scale = join_passes([first], None).hindsight_scale
    assert scale is not None
    assert [number.item() for number in scale] == [11.0, 22.0]
    second = make_pass(zeros(0.5, 4.0, 1), zeros(5.0, 40.0, 3))
    scale = join_passes([first, second], None).hindsight_scale
    assert scale is not None
    assert [number.item() for number in scale] == [16.5, 2.5 + 35.0]
    assert collect_scales({"none": Read(h)}) == {}
