"""Several documents in a row: each as in a row of its own, however the caller marks them."""

from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from tests.models import VARIANTS, build_model, draw_ids
from tests.tolerances import error
from unimatrix import modeling_inputs
from unimatrix.errors import InputError
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.ops.backends import BACKENDS
from unimatrix.presets import PRESETS

variants = pytest.mark.parametrize("variant", VARIANTS)
few = pytest.mark.parametrize("variant", ["core", "sparsepointer", "selective", "unimatrix"])
# Documents of each row; the last tokens of one stand in front of the next one's first.
LENGTHS = [[7, 1, 12, 4], [9, 9, 6]]
T = 24
IDS = draw_ids(2, T, high=8)
COUNTED = torch.tensor([[t for n in row for t in range(n)] for row in LENGTHS])
NUMBERED = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in LENGTHS])
BOUNDS = pad(torch.tensor([n for row in LENGTHS for n in row]).cumsum(0), (1, 0)).int()


def list_documents(ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """Return each document as a row of its own."""
    rows = zip(ids, LENGTHS, strict=True)
    return [part[None] for row, lengths in rows for part in row.split(lengths)]


def cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let documents of every length have a pass of their own."""
    monkeypatch.setattr(modeling_inputs, "_PASS_COST", 0)


def read_alone(model: UniMatrixForCausalLM, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [2, T, V] and the mean loss of the documents in rows of their own."""
    logits, total = [], torch.zeros((), dtype=torch.float64)
    for row in list_documents():
        output = model(row, labels=row, num_items_in_batch=1, **given)
        logits.append(output.logits[0])
        total = total + output.loss
    return torch.cat(logits).view(2, T, -1), total / (2 * T - len(list_documents()))


def list_gradients(model: UniMatrixForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        # Of what is 0 but for rounding, the largest of all says how much that is.
        difference = float((found[name] - grad).abs().max())
        assert difference <= 1e-10 * max(float(grad.abs().max()), 1e-4 * largest), name


def choose_backends(backend: str) -> dict[str, str] | str:
    return {op: backend for op, known in BACKENDS.items() if backend in known}


@pytest.mark.parametrize(
    ("backend", "passes"),
    [
        ("auto", "one pass"),
        ("auto", "a pass for each length"),
        ("reference", "a pass for each length"),
        ("parallel", "one pass"),
        ("native", "a pass for each length"),
    ],
)
@variants
def test_documents_are_what_they_are_alone(
    variant: str, backend: str, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, loss and every gradient."""
    model = build_model(variant, dropout=0.0)
    if backend != "auto":
        chosen = choose_backends(backend)
        if model.config.norm_guard and backend == "parallel":
            del chosen["matrix_state"]  # has no norm guard
        model.set_backend(chosen)
    if passes != "one pass":
        cost_nothing(monkeypatch)
    packed = model(IDS, position_ids=COUNTED, labels=IDS)
    logits, loss = read_alone(model)
    assert error(packed.logits, logits) <= 1e-10
    assert error(packed.loss, loss) <= 1e-10
    expected = list_gradients(model, loss)
    assert_same_gradients(list_gradients(model, packed.loss), expected)
    short = model(IDS, position_ids=COUNTED, labels=IDS, loss_only=True)
    assert short.logits is None
    assert_same_gradients(list_gradients(model, short.loss), expected)


@pytest.mark.parametrize("passes", ["one pass", "a pass for each length"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("selective")])
def test_hindsight_judges_documents_as_rows(
    variant: str, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the gate is a mean over the batch: of packed documents or of padded ones."""
    model = build_model(variant, dropout=0.0).train()
    rows = list_documents()
    ids = torch.cat([pad(row, (0, 12 - row.shape[1])) for row in rows])
    mask = torch.cat([pad(torch.ones_like(row), (0, 12 - row.shape[1])) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    padded = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    expected = list_gradients(model, padded)
    if passes != "one pass":
        cost_nothing(monkeypatch)
    packed = model(IDS, position_ids=COUNTED, labels=IDS).loss
    assert error(packed, padded) <= 1e-10
    assert_same_gradients(list_gradients(model, packed), expected)


@pytest.mark.parametrize(
    "marks",
    [
        {"position_ids": COUNTED + 2},
        {"seq_idx": NUMBERED.int()},
        {"seq_idx": 5 - NUMBERED % 2},
        {"cu_seqlens": BOUNDS},
        {"cu_seqlens": torch.cat([BOUNDS[:2], BOUNDS[1:]]).long()},  # an empty document
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 12, "max_length_k": 24},
        {"position_ids": COUNTED, "seq_idx": NUMBERED, "cu_seq_lens_q": BOUNDS},
    ],
    ids=lambda marks: "+".join(marks),
)
@few
def test_every_library_marks_them_its_own_way(variant: str, marks: dict[str, Any]) -> None:
    model = build_model(variant)
    expected = model(IDS, position_ids=COUNTED)
    assert torch.equal(model(IDS, **marks).logits, expected.logits)
    assert expected.past_key_values is None
    base = model.model(IDS, handles_pointer=True, **marks)
    starts = base.document_starts.flatten().nonzero().flatten()
    assert starts.tolist() == BOUNDS[:-1].tolist()


def test_a_position_table_counts_each_document() -> None:
    model = build_model("sparsepointer+table", max_position_embeddings=12)
    logits, _ = read_alone(model)
    for marks in ({"position_ids": COUNTED}, {"cu_seqlens": BOUNDS}):
        assert error(model(IDS, **marks).logits, logits) <= 1e-10
    with pytest.raises(InputError, match="real token 0 of row 0 has 2"):
        model(IDS, position_ids=COUNTED + 2)
    short = build_model("sparsepointer+table", max_position_embeddings=11)
    with pytest.raises(InputError, match="reaches 12 tokens and the position table has 11"):
        short(IDS, position_ids=COUNTED)


@few
def test_positions_that_only_count_on_are_one_document(variant: str) -> None:
    model = build_model(variant)
    whole = model(IDS)
    for marks in (
        {"position_ids": torch.arange(3, T + 3)},
        {"seq_idx": torch.full((1, T), 4)},
        {"cu_seqlens": torch.tensor([0, T, 2 * T])},
    ):
        found = model(IDS, **marks)
        assert torch.equal(found.logits, whole.logits)
        assert found.past_key_values is not None
    cache = model(IDS[:, :5]).past_key_values
    found = model(IDS[:, 5:], past_key_values=cache, position_ids=torch.arange(5, T))
    assert error(found.logits, whole.logits[:, 5:]) <= 1e-10


@few
def test_padding_is_in_no_document(variant: str) -> None:
    """On the left, on the right and between documents; whatever positions stand there."""
    model = build_model(variant)
    logits, loss = read_alone(model)
    # Two columns in front of the first row, two behind its second document; two behind the other.
    ids = torch.full((2, T + 4), 9)
    mask = torch.ones(2, T + 4, dtype=torch.int64)
    mask[0, [0, 1, 10, 11]] = 0
    mask[1, -4:] = 0
    positions = torch.full((2, T + 4), 7)
    labels = torch.full((2, T + 4), -100)
    for given, into in ((IDS, ids), (COUNTED, positions), (IDS, labels)):
        into[mask.bool()] = given.flatten()
    found = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
    assert error(found.logits[mask.bool()], logits.flatten(0, 1)) <= 1e-10
    assert error(found.loss, loss) <= 1e-10
    zero = model.model(ids, attention_mask=mask, position_ids=positions, handles_pointer=True)[0]
    assert not zero[mask == 0].any()


@few
def test_what_else_a_call_may_ask_for(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cost_nothing(monkeypatch)
    model = build_model(variant, dropout=0.0)
    marks = {"position_ids": COUNTED}
    expected = model(IDS, labels=IDS, **marks)
    loss, logits = model(IDS, labels=IDS, return_dict=False, **marks)[:2]
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    kept = model(IDS, logits_to_keep=3, **marks).logits
    assert torch.equal(kept, expected.logits[:, -3:])
    wanted = COUNTED == 3
    assert torch.equal(model(IDS, logits_at=wanted, **marks).logits, expected.logits[wanted])
    shifted = pad(IDS.masked_fill(COUNTED == 0, -100)[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(IDS, shift_labels=shifted, **marks).loss, expected.loss)
    output = model(IDS, output_hidden_states=True, **marks)
    assert error(output.logits, expected.logits) <= 1e-10
    alone = [model(row, output_hidden_states=True).hidden_states for row in list_documents()]
    for found, parts in zip(output.hidden_states, zip(*alone, strict=True), strict=True):
        assert error(found, torch.cat([part[0] for part in parts]).view_as(found)) <= 1e-10
    output.hidden_states[1].retain_grad()
    output.logits.sum().backward()
    assert output.hidden_states[1].grad.abs().amin(dim=-1).max() > 0


@few
def test_checkpointing_changes_no_gradient(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cost_nothing(monkeypatch)
    model = build_model(variant, dropout=0.0).train()
    expected = list_gradients(model, model(IDS, position_ids=COUNTED, labels=IDS).loss)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = list_gradients(model, model(IDS, position_ids=COUNTED, labels=IDS).loss)
        assert_same_gradients(found, expected)


def test_embeddings_are_packed_as_ids_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cost_nothing(monkeypatch)
    model = build_model("assoc")
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    found = model(inputs_embeds=embeds, position_ids=COUNTED, labels=IDS)
    expected = model(IDS, position_ids=COUNTED, labels=IDS)
    assert error(found.logits, expected.logits) <= 1e-10
    found.loss.backward()
    # The last token of a document predicts nothing, and no other token sees it.
    is_last = pad(COUNTED[:, 1:] == 0, (0, 1), value=True)
    assert torch.equal(embeds.grad.abs().sum(-1) == 0, is_last)


def test_matches_that_a_loader_has_found_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from unimatrix.ops.suffix_automaton import match_suffixes

    cost_nothing(monkeypatch)
    model = build_model("unimatrix")
    window = model.config.automaton_window
    match = torch.cat([match_suffixes(row, window)[0] for row in list_documents()]).view(2, T, 2)
    found = model(IDS, position_ids=COUNTED, suffix_match=match).logits
    assert error(found, model(IDS, position_ids=COUNTED).logits) <= 1e-10


@few
def test_a_first_token_is_no_target_of_the_document_before(variant: str) -> None:
    model = build_model(variant)
    marks = {"position_ids": COUNTED}
    cut = IDS.masked_fill(COUNTED == 0, -100)  # as collators make them
    expected = model(IDS, labels=cut, **marks).loss
    assert torch.equal(model(IDS, labels=IDS, **marks).loss, expected)
    divided = model(IDS, labels=IDS, num_items_in_batch=10, **marks).loss
    assert error(divided, expected * (2 * T - 7) / 10) <= 1e-12


# Where a graph breaks, torch asks tensors between its parts for their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_reads_the_same_numbers() -> None:
    model = build_model("core")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    expected = model(IDS, position_ids=COUNTED, labels=IDS)
    found = compiled(IDS, position_ids=COUNTED, labels=IDS)
    assert error(found.logits, expected.logits) <= 1e-10
    assert error(found.loss, expected.loss) <= 1e-10


@pytest.mark.parametrize("preset", PRESETS)
def test_no_document_sees_another(preset: str) -> None:
    model = build_model(preset)
    before = model(IDS, position_ids=COUNTED).logits
    other = IDS.clone()
    other[:, :7] = draw_ids(2, 7, seed=9)
    after = model(other, position_ids=COUNTED).logits
    assert torch.equal(after[0, 7:], before[0, 7:])
    assert torch.equal(after[1, 9:], before[1, 9:])


class TestRefusals:
    """Each with a sentence that names the value and what to do."""

    def refuse(self, match: str, ids: torch.Tensor = IDS, **given: Any) -> None:
        model = build_model("core")
        for callee in (model, model.model):
            with pytest.raises(InputError, match=match):
                callee(ids, **given)

    def test_a_cache(self) -> None:
        cache = build_model("core")(IDS).past_key_values.forget_weights()
        positions = torch.cat([torch.arange(T, T + 10), torch.arange(T - 10)])
        self.refuse(
            "another document starts at token 10 of row 0, and past_key_values goes on with one",
            position_ids=positions,
            past_key_values=cache,
        )
        self.refuse(
            "starts at token 7 of row 0, and use_cache=True goes on",
            position_ids=COUNTED,
            use_cache=True,
        )

    def test_positions_that_skip(self) -> None:
        skipping = torch.tensor([0, 1, 2, 5, 6, 7] * 4)
        self.refuse("real token 3 of row 0 has 5; leave it out", position_ids=skipping)
        back = torch.tensor([0, 1, 2, 3, 2, 3] * 4)
        self.refuse("real token 4 of row 0 has 2", position_ids=back)

    def test_marks_that_disagree(self) -> None:
        self.refuse(
            "position_ids starts a document at column 7 of row 0, and seq_idx does not",
            position_ids=COUNTED,
            seq_idx=torch.zeros(2, T),
        )
        self.refuse(
            "cu_seq_lens_k starts a document at column 5 of row 0, and cu_seq_lens_q does not",
            cu_seq_lens_q=torch.tensor([0, T, 2 * T]),
            cu_seq_lens_k=torch.tensor([0, 5, T, 2 * T]),
        )

    def test_shapes(self) -> None:
        self.refuse(r"seq_idx has shape \[2, 5\]; pass \[2, 24\]", seq_idx=torch.zeros(2, 5))
        self.refuse(
            r"cu_seqlens is shape \[1, 2\] torch.int64; pass \[documents \+ 1\] whole numbers",
            cu_seqlens=torch.tensor([[0, 48]]),
        )
        self.refuse("cu_seqlens is shape .* torch.float32", cu_seqlens=torch.tensor([0.0, 48.0]))

    @pytest.mark.parametrize("bounds", [[0, 24, 47], [3, 24, 48], [0, 30, 24, 48], [0]])
    def test_bounds(self, bounds: list[int]) -> None:
        self.refuse("pass numbers that rise from 0 to 48", cu_seqlens=torch.tensor(bounds))

    def test_a_document_over_two_rows(self) -> None:
        self.refuse(
            r"cu_seqlens is \[0, 7, 48\], with no document that starts at 24, where a row of 24",
            cu_seqlens=torch.tensor([0, 7, 48]),
        )

    def test_a_longest_document_that_is_longer(self) -> None:
        self.refuse(
            "max_length_q is 11, and the longest document has 12 tokens",
            cu_seq_lens_q=BOUNDS,
            max_length_q=11,
        )
        self.refuse("max_length_k is 5, and the longest document has 24", max_length_k=5)

    def test_generate(self) -> None:
        model = build_model("core")
        with pytest.raises(InputError, match="one text a row, and position_ids starts another"):
            model.generate(IDS, position_ids=COUNTED, max_new_tokens=1)
        with pytest.raises(InputError, match="one text a row, and seq_idx would mark documents"):
            model.generate(IDS, seq_idx=NUMBERED, max_new_tokens=1)
