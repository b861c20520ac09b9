"""The selective slots (E13, E14, E21): against a loop over tokens; and over a table (the plan)."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import gelu

from tests.models import build_model, draw_ids
from tests.nn.streams import (
    VOCAB,
    Stream,
    assert_same,
    build_mixer,
    check_gradients,
    check_padding,
    check_split,
    draw_stream,
)
from tests.ops.oracle import Outputs, compare_with_reference
from unimatrix.kernels.plan import explain_selective, plan
from unimatrix.kernels.selective import SelectiveRun
from unimatrix.nn.selective_mixer import SelectiveMixer, SelectiveRead, SelectiveState

# Long contexts, which fade; two patterns read at two offsets; a gate that sees the stream, where
# the first value is kept; two hops.
VARIANTS = ("selective", "selective+small", "selective+hidden", "selective+two-hops")
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str) -> SelectiveMixer:
    changes = {"slot_key_patterns": [[0, 1]]} if variant == "selective" else {}
    mixer: SelectiveMixer = build_mixer("selective_mixer", variant, **changes)
    if mixer.fade_tokens:
        mixer.fade_tokens = 5
    # Strengths that differ by more than the margin, so that slots are displaced and refused.
    mixer.gate_down.weight.data *= 20
    return mixer


def normalise(vector: Tensor) -> Tensor:
    eps = torch.finfo(vector.dtype).eps
    return vector / (vector.square().mean() + eps).sqrt()


class Slots:
    """At most M (context, token id, code); without a bound as many as are offered."""

    def __init__(self, mixer: SelectiveMixer, bounded: bool) -> None:
        self.mixer, self.bounded, self.held = mixer, bounded, []

    def fade(self) -> None:
        self.held = [[context, value, max(code - 1, -128)] for context, value, code in self.held]

    def find(self, context: Any) -> list | None:
        return next((slot for slot in self.held if slot[0] == context), None)

    def offer(self, context: Any, value: int, code: int) -> None:
        margin, slot = self.mixer.margin, self.find(context)
        if slot is not None:
            first = self.mixer.keep_first
            if code > slot[2] + margin if first else code >= slot[2] - margin:
                slot[1:] = [value, code]
        elif not self.bounded or len(self.held) < self.mixer.num_slots:
            self.held.append([context, value, code])
        else:
            weakest = min(self.held, key=lambda slot: slot[2])
            if code > weakest[2] + margin:
                weakest[:] = [context, value, code]


def form_context(ids: list[int], end: int, pattern: list[int]) -> tuple[int, ...] | None:
    """Return the tokens at a pattern's distances back; ``None`` where one does not exist."""
    places = [end - distance for distance in pattern]
    return None if min(places) < 0 else tuple(ids[place] for place in places)


def weigh_write(mixer: SelectiveMixer, stream: Stream, row: int, t: int) -> Tensor:
    """Return the logits of the strengths that a token offers, one a pattern."""
    ids, table = stream.ids[row].tolist(), stream.table
    before = normalise(table[ids[t - 1]]) if t else torch.zeros_like(table[0])
    inputs = [before, normalise(table[ids[t]])]
    if mixer.reads_at:
        inputs.append(normalise(stream.source[row, t]))
    return mixer.gate_down(gelu(mixer.gate_up(torch.cat(inputs))))


def read_by_hand(mixer: SelectiveMixer, stream: Stream, row: int) -> list[tuple]:
    """Return the context, the ids found and their strengths at every token of a row."""
    slots, ids, reads = Slots(mixer, not mixer.training or mixer.bounded_training), [], []
    for t, token_id in enumerate(stream.ids[row].tolist()):
        ids.append(token_id)
        if mixer.fade_tokens and t and t % mixer.fade_tokens == 0:
            slots.fade()
        found = [
            slots.find((n, form_context(ids, t - offset, pattern)))
            for offset in mixer.read_offsets
            for n, pattern in enumerate(mixer.patterns)
        ]
        for _ in range(mixer.num_hops - 1):
            asked = found[-len(mixer.read_offsets) :]
            found += [None if slot is None else slots.find((0, (slot[1],))) for slot in asked]
        strengths = [0.0 if slot is None else 1 / (1 + math.exp(-slot[2] / 8)) for slot in found]
        scores = [math.exp(a) * s for a, s in zip(mixer.read_score, strengths, strict=True)]
        values = [
            w / (1 + sum(scores)) * normalise(stream.table[slot[1]])
            for w, slot in zip(scores, found, strict=True)
            if slot is not None
        ]
        context = mixer.value_proj(sum(values, torch.zeros_like(stream.table[0])))
        reads.append((context, [slot[1] if slot else 0 for slot in found], strengths))
        for n, logit in enumerate(weigh_write(mixer, stream, row, t).tolist()):
            written = form_context(ids, t - 1, mixer.patterns[n])
            if written is not None:
                code = min(max(round(8 * logit), -128), 127)
                slots.offer((n, written), token_id, code)
    return reads


@pytest.mark.parametrize("training", [False, True])
@variants
@torch.no_grad()
def test_equals_a_loop(variant: str, training: bool) -> None:
    mixer, stream = build(variant).train(training), draw_stream(2, 40)
    read, state = stream.read(mixer)
    assert isinstance(read, SelectiveRead)
    assert isinstance(state, SelectiveState)
    assert (read.log_strength > -torch.inf).any()
    for row in range(2):
        for t, (context, ids, strengths) in enumerate(read_by_hand(mixer, stream, row)):
            torch.testing.assert_close(read.context[row, t], context)
            assert read.token_ids[row, t].tolist() == ids
            torch.testing.assert_close(read.log_strength[row, t].exp().tolist(), strengths)
    assert torch.equal(state.recent_token_ids.long(), stream.ids[:, -mixer.num_recent :])


@variants
@torch.no_grad()
def test_two_parts_equal_one_and_padding_is_nothing(variant: str) -> None:
    check_split(build(variant))
    check_padding(build(variant))


@variants
def test_the_gradient_of_a_code_is_that_of_its_logit(variant: str) -> None:
    """Values are those of whole codes: the gate learns as if they were not rounded."""
    mixer, stream = build(variant).train(), draw_stream(2, 12)
    mixer.rules, mixer.fade_tokens = None, 0
    mixer.gate_down.weight.data /= 40  # no code is cut to what a byte holds
    grads = []
    for smooth in (False, True):
        mixer.zero_grad()
        tokens = stream.describe()
        joined = mixer.join_stream(tokens.ids, None)
        logits = mixer.weigh_writes(stream.source, tokens, joined)
        found, _ = mixer.look_up(tokens, joined, logits, None)
        if smooth:
            # Strengths from the logits themselves, moved by what rounding took.
            lookup = found.lookup
            taken = found.entries.gather(1, lookup.entries.clamp_min(0).flatten(1))
            held = taken.view(lookup.codes.shape)
            held = held + (lookup.codes / 8 - held).detach()
            scores = (mixer.read_score + held.sigmoid().log()).exp() * (lookup.entries >= 0)
            weights = scores / (1 + scores.sum(dim=-1, keepdim=True))
        else:
            _, weights, elsewhere, scale = mixer.weigh_reads(found)
            assert elsewhere is scale is None
        (weights * torch.linspace(-1, 2, weights.numel()).view_as(weights)).sum().backward()
        gate = (mixer.gate_up.weight.grad, mixer.gate_down.weight.grad, mixer.read_score.grad)
        grads.append([grad.clone() for grad in gate])
        assert all(grad.abs().sum() > 0 for grad in grads[-1])
    assert_same(grads[0], grads[1])


@pytest.mark.parametrize("variant", ["selective+small", "selective+two-hops"])
def test_gradients_of_what_is_read(variant: str) -> None:
    """With codes that do not depend on the embeddings: a step of a code has no derivative."""
    mixer = build(variant)
    mixer.gate_up.weight.data.zero_()
    check_gradients(mixer, beside=("gate_up", "gate_down", "read_gate"))


def test_gradients_pass_from_call_to_call() -> None:
    """Through the logits behind the slots, which are kept while gradients are recorded."""
    mixer, stream = build("selective+small"), draw_stream(2, 30)
    mixer.rules = None
    grads = []
    for parts in ([stream], [stream.cut(0, 13), stream.cut(13, 30)]):
        mixer.zero_grad()
        state, total = None, torch.zeros((), dtype=torch.float64)
        for part in parts:
            read, state = part.read(mixer, state)
            total = total + read.context.square().sum()
        total.backward()
        grads.append({name: w.grad for name, w in mixer.named_parameters() if w.grad is not None})
    assert_same(grads[1], grads[0])
    assert state.logits.requires_grad
    with torch.no_grad():
        assert stream.read(mixer)[1].logits is None


@pytest.mark.parametrize("width", [12, 32])  # 32: the gate is a compiled pass too
@pytest.mark.parametrize("backend", ["table", "native"])
@pytest.mark.parametrize("training", [False, True])
@variants
def test_the_table_changes_nothing(variant: str, training: bool, backend: str, width: int) -> None:
    """What layers make of embeddings alone is made once, for the vocabulary; a mixer's equal."""
    model = build_model(variant, hidden_size=width)
    mixer = model.model.block.selective_mixer.train(training)
    stream = draw_stream(2, 24, width=width)
    lengths = torch.tensor([12, 7])

    def run(backend: str, source: Tensor, table: Tensor, **weights: Tensor) -> Outputs:
        own = stream._replace(source=source, table=table)
        read_by = mixer
        if backend != "reference":
            read_by = SelectiveRun(mixer, table, backend == "native")
        calling = Calling(mixer, read_by)
        by_name = {f"mixer.{name.replace('__', '.')}": w for name, w in weights.items()}
        found, state = {}, None
        for call, part in enumerate((own.cut(0, 12), own.cut(12, 24))):
            given = (part.source, part.describe(None if call else lengths), state)
            read, state = functional_call(calling, by_name, given)
            read = read._replace(log_strength=read.log_strength.clamp_min(-1e3))
            named = read._asdict() | {"scale": None}
            named |= {} if read.scale is None else read.scale._asdict()
            found |= {f"{name}_{call}": value for name, value in named.items()}
        return found | state.slots._asdict() | {"held": state.logits}

    leaves = {"source": stream.source, "table": stream.table}
    leaves |= {name.replace(".", "__"): w for name, w in mixer.named_parameters()}
    compare_with_reference("selective_slots", backend, run, leaves)


class Calling(nn.Module):
    """Calls a function beside a mixer, whose weights may be given."""

    def __init__(self, mixer: SelectiveMixer, function: Callable[..., Any]) -> None:
        super().__init__()
        self.mixer, self.function = mixer, function

    def forward(self, *given: Any) -> Any:
        return self.function(*given)


def test_where_the_table_is_not_used() -> None:
    model = build_model("selective", dtype=torch.float32)
    mixer, embed = model.model.block.selective_mixer, model.get_input_embeddings()
    weight = embed.weight

    def explain(num_ids: int = VOCAB, like: Tensor = weight) -> str | None:
        return explain_selective(mixer, embed, like, num_ids)

    assert explain() is None
    assert explain(VOCAB - 1) == "the vocabulary has more tokens than the call"
    for module, name in (
        (embed, "embed_tokens"),
        (mixer, "selective_mixer"),
        (mixer.gate_up, "selective_mixer.gate_up"),
        (mixer.gate_down, "selective_mixer.gate_down"),
        (mixer.value_proj, "selective_mixer.value_proj"),
    ):
        hook = module.register_forward_hook(lambda *_: None)
        assert explain() == f"{name} has a hook"
        hook.remove()
    mixer.gate_down.double()
    assert "a weight of selective_mixer.gate_down is float64" in explain()
    # Less than 32 bits, and autocast, are refused for the whole call.
    ids = draw_ids(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plan(model.model, like=ids).mixers["selective_mixer"] is mixer
    model.bfloat16()
    assert plan(model.model, like=ids).mixers["selective_mixer"] is mixer


def test_a_read_starts_above_nothing() -> None:
    mixer = build("selective+small")
    ((score, start),) = mixer.list_starts()
    assert score is mixer.read_score
    assert start.tolist() == mixer.num_reads * [4.0]
    assert mixer.num_reads == 4
