"""Gate and read of the selective slots as compiled passes, against the mixer's equations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding

from tests.models import build_model
from tests.ops.oracle import Outputs, compare_with_reference
from unimatrix.kernels.selective import SelectiveRun
from unimatrix.nn.mixer import Tokens
from unimatrix.nn.selective_mixer import Found, SelectiveMixer, normalize_features
from unimatrix.ops.hindsight import LABELS, HindsightRules
from unimatrix.ops.selective_slots import SlotLookup
from unimatrix.ops.selective_slots.read_native import read_found_native

DTYPES = (torch.float64, torch.float32)
VOCAB = 9


def build_mixer(width: int, num_patterns: int = 2) -> SelectiveMixer:
    """Return a mixer of so many patterns, each read at two offsets."""
    config = build_model("selective").config
    config.hidden_size, config.slot_read_offsets = width, [0, 1]
    config.slot_key_patterns = [list(range(n + 1)) for n in range(num_patterns)]
    return SelectiveMixer(config)


class Calling(nn.Module):
    """Calls a function of a mixer whose weights may be given."""

    def __init__(self, mixer: SelectiveMixer, function: Callable[..., Any]) -> None:
        super().__init__()
        self.mixer, self.function = mixer, function

    def forward(self, *given: Any) -> Any:
        return self.function(self.mixer, *given)


def draw_lookup(shape: tuple[int, ...], num_initial: int, num_writes: int) -> SlotLookup:
    """Return what was found, at some positions nothing, of slots and of writes."""
    generator = torch.Generator().manual_seed(1)
    entries = torch.randint(0, num_initial + num_writes, shape, generator=generator)
    entries[:, ::4] = -1
    entries[:, 1::4, 0] = num_initial + 3  # one write is read often
    codes = torch.randint(-40, 40, shape, generator=generator)
    value_ids = torch.randint(0, VOCAB, shape, generator=generator)
    return SlotLookup(entries, *(part * (entries >= 0) for part in (codes, value_ids)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 27])
@pytest.mark.parametrize("label", [None, *LABELS])
def test_read(label: str | None, width: int, dtype: torch.dtype) -> None:
    """Values, gradients, and with rules what the gate learns from them."""
    mixer, generator = build_mixer(width), torch.Generator().manual_seed(0)
    batch, num_tokens, num_patterns, num_initial = 3, 60, 2, mixer.num_slots
    lookup = draw_lookup((batch, num_tokens, 4), num_initial, num_tokens * num_patterns)
    offered = torch.rand(batch, num_tokens, num_patterns, generator=generator) < 0.8
    mixer.rules = None
    if label is not None:
        mixer.rules = HindsightRules(label, share=0.15, floor=1e-4, weight=0.7)
    reader = Calling(mixer.train(), SelectiveMixer.weigh_reads)

    def run(backend: str, logits, held_logits, read_score, table) -> Outputs:
        if backend == "native":
            given = (logits, held_logits, read_score, table, offered, mixer.rules)
            context, log_strength, elsewhere, scale = read_found_native(lookup, *given)
        else:
            found = Found(lookup, held_logits, logits, offered)
            weighed = functional_call(reader, {"mixer.read_score": read_score}, (found,))
            log_strength, weights, elsewhere, scale = weighed
            values = embedding(lookup.value_ids, table)  # [B, T, Q, D]
            context = (weights.unsqueeze(-1) * values).sum(dim=2)
        result = {"context": context, "none": log_strength < -1e3}
        result["log_strength"] = log_strength.clamp_min(-1e3)
        assert (elsewhere is None) == (scale is None) == (label is None)
        if label is not None:
            result |= {"elsewhere": elsewhere, **scale._asdict()}
        return result

    leaves = {
        "logits": torch.randn(batch, num_tokens, num_patterns, generator=generator),
        "held_logits": torch.randn(batch, num_initial, generator=generator),
        "read_score": torch.randn(4, generator=generator),
        "table": torch.randn(VOCAB, width, generator=generator),
    }
    leaves = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    compare_with_reference("selective_slots", "native", run, leaves)


def test_a_loss_that_leaves_the_scale_out_teaches_the_gate_nothing_of_it() -> None:
    logits = torch.zeros(1, 20, 1, dtype=torch.float64, requires_grad=True)
    lookup = SlotLookup(*(part[..., :1] for part in draw_lookup((1, 20, 1), 2, 20)))
    table = torch.randn(VOCAB, 16, dtype=torch.float64)
    offered, rules = torch.ones(1, 20, 1, dtype=torch.bool), HindsightRules(LABELS[0], 0, 0, 1.0)
    given = (torch.zeros(1, 2).double(), torch.zeros(1).double(), table, offered)
    grads = []
    for judged in (rules, None):
        context = read_found_native(lookup, logits, *given, judged).context
        grads.append(torch.autograd.grad(context.square().sum(), logits)[0])
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_patterns", [1, 3])
@pytest.mark.parametrize(("batch_size", "num_tokens"), [(1, 200), (3, 40)])
def test_gate(batch_size: int, num_tokens: int, num_patterns: int, dtype: torch.dtype) -> None:
    """Logits, before the first token of a row too."""
    mixer, generator = build_mixer(32, num_patterns).to(dtype), torch.Generator().manual_seed(0)
    stream = torch.randint(0, VOCAB, (batch_size, mixer.num_recent + num_tokens))
    stream[0, : mixer.num_recent] = -1
    ids, counts = stream[:, mixer.num_recent :], torch.zeros(batch_size, dtype=torch.int64)
    names = ["gate_up.weight", "gate_up.bias", "gate_down.weight", "gate_down.bias"]

    def weigh(mixer: SelectiveMixer, backend: str, table: Tensor) -> Tensor:
        """Return the logits by the table of the vocabulary or by each position's embedding."""
        if backend == "native":
            return SelectiveRun(mixer, table, True)._weigh_writes(
                table, normalize_features(table), stream
            )
        tokens = Tokens(ids, table, lambda ids: embedding(ids, table), None, counts, counts)
        return mixer.weigh_writes(table, tokens, stream)

    gate = Calling(mixer, weigh)

    def run(backend: str, table, **weights) -> Outputs:
        by_name = {f"mixer.{name}": weights[name.replace(".", "_")] for name in names}
        return {"logits": functional_call(gate, by_name, (backend, table))}

    leaves = {"table": torch.randn(VOCAB, 32, generator=generator).to(dtype)}
    for name in names:
        weight = mixer.get_parameter(name)
        drawn = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
        leaves[name.replace(".", "_")] = (6 * drawn).to(dtype)
    compare_with_reference("selective_slots", "native", run, leaves)
