"""Gate and read of the selective slots as compiled passes, against tensor operations."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.models import build_model
from tests.ops.oracle import Outputs, compare_with_reference
from unimatrix.nn.selective_mixer import SelectiveMixer, _Values
from unimatrix.ops.hindsight import LABELS, HindsightRules
from unimatrix.ops.selective_slots import SlotLookup
from unimatrix.ops.selective_slots.read_native import read_found_native

DTYPES = (torch.float64, torch.float32)
VOCAB = 9


def build_mixer(width: int, num_patterns: int = 2) -> SelectiveMixer:
    """Return a mixer of so many patterns, each read at two offsets."""
    config = build_model("unimatrix").config
    config.hidden_size, config.slot_read_offsets = width, [0, 1]
    config.slot_key_patterns = [list(range(n + 1)) for n in range(num_patterns)]
    return SelectiveMixer(config)


class Reader(nn.Module):
    """Calls the read of a mixer with values that are given."""

    def __init__(self, mixer: SelectiveMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, table: Tensor, *given):
        values = _Values(nn.Embedding(*table.shape), self.mixer.value_proj, table)
        return self.mixer._read(values, *given)


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
    reader = Reader(mixer).train()

    def run(backend: str, logits, held_logits, read_score, table) -> Outputs:
        mixer.backend = backend
        given = (table, lookup, held_logits, logits, offered)
        read = functional_call(reader, {"mixer.read_score": read_score}, given)
        found = {"context": read.context, "ids": read.token_ids, "none": read.log_strength < -1e3}
        found["log_strength"] = read.log_strength.clamp_min(-1e3)
        if label is not None:
            found |= {"elsewhere": read.elsewhere, **read.scale._asdict()}
        return found

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
    """Logits and codes, before the first token of a row too."""
    mixer, generator = build_mixer(32, num_patterns).to(dtype), torch.Generator().manual_seed(0)
    stream = torch.randint(0, VOCAB, (batch_size, mixer.num_recent + num_tokens))
    stream[0, : mixer.num_recent] = -1

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, table: Tensor):
            return self.mixer._weigh_writes(nn.Embedding(*table.shape), table, stream, None)

    names = ["gate_up.weight", "gate_up.bias", "gate_down.weight", "gate_down.bias"]
    gate = Gate()

    def run(backend: str, table, **weights) -> Outputs:
        mixer.backend = backend
        by_name = {f"mixer.{name}": weights[name.replace(".", "_")] for name in names}
        logits, codes = functional_call(gate, by_name, (table,))
        expected = (8 * logits.detach()).round().clamp(-128, 127)
        assert torch.equal(codes, expected.long())
        return {"logits": logits}

    leaves = {"table": torch.randn(VOCAB, 32, generator=generator).to(dtype)}
    for name in names:
        weight = mixer.get_parameter(name)
        drawn = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
        leaves[name.replace(".", "_")] = (6 * drawn).to(dtype)
    compare_with_reference("selective_slots", "native", run, leaves)
