import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests import models
from tests.models import VARIANTS
from tests.tolerances import error
from tests.train.small_training import (
    WINDOW_TOKENS,
    build_dataset,
    build_model,
    build_recipe,
    build_settings,
    have_equal_weights,
    one_thread,
)
from unimatrix.baselines.gated_linear_attention import build_gated_linear_attention
from unimatrix.baselines.transformers_models import build_llama
from unimatrix.configuration import UniMatrixConfig
from unimatrix.data import WindowDataset
from unimatrix.errors import InputError
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.train import trainer as training
from unimatrix.train.callbacks import NonFiniteError
from unimatrix.train.checkpoints import find_last_checkpoint
from unimatrix.train.muon import MuonWithAdamW, list_matrices
from unimatrix.train.plan import plan_steps
from unimatrix.train.recipe import OPTIMIZERS
from unimatrix.train.run import prepare_run
from unimatrix.train.trainer import list_decayed, train_model

__all__ = ["one_thread"]


NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 brought Muon")


class StopAfter(TrainerCallback):
    """Stop after a step, as Ctrl-C does."""

    def __init__(self, optim_step: int) -> None:
        self.optim_step = optim_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_unused: Any) -> None:
        if state.global_step == self.optim_step:
            control.should_save = control.should_training_stop = True


class Poison(TrainerCallback):
    """Make the loss of one step infinite."""

    def __init__(self, optim_step: int) -> None:
        self.optim_step = optim_step

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step == self.optim_step - 1:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("inf"))


class KeepGradients(TrainerCallback):
    """Keep the gradients that the optimiser gets, of parameters with ``part`` in their name."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, **_: Any
    ) -> None:
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if self.part in name
        }


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=NEEDS_MUON if name == "muon" else ()) for name in OPTIMIZERS],
)
def test_resumed_training_equals_the_unbroken_one_bit_for_bit(
    tmp_path: Path, optimizer: str
) -> None:
    """Dropout is on: the random generators must continue where they stopped."""
    settings, dataset = build_settings(steps=7, optimizer=optimizer), build_dataset(28)
    unbroken, broken, resumed = build_model(), build_model(), build_model()
    train_model(unbroken, dataset, settings, tmp_path / "unbroken")
    out = tmp_path / "broken"
    first = train_model(broken, dataset, settings, out, callbacks=[StopAfter(4)])
    assert (first.num_optim_steps, first.interrupted) == (4, True)
    assert not have_equal_weights(broken, unbroken)
    torch.manual_seed(99)
    second = train_model(resumed, dataset, settings, out, checkpoint=find_last_checkpoint(out))
    assert (second.num_optim_steps, second.interrupted) == (7, False)
    assert second.num_tokens == 3 * 4 * WINDOW_TOKENS
    assert have_equal_weights(resumed, unbroken)
    one, other = (_read_metrics(tmp_path / name) for name in ("unbroken", "broken"))
    assert [entry["loss_nats"] for entry in one] == [entry["loss_nats"] for entry in other]


def test_resuming_at_the_last_step_changes_nothing(tmp_path: Path) -> None:
    settings, dataset = build_settings(steps=3), build_dataset(12)
    model, again = build_model(), build_model()
    train_model(model, dataset, settings, tmp_path)
    last = find_last_checkpoint(tmp_path)
    result = train_model(again, dataset, settings, tmp_path, checkpoint=last)
    assert (result.num_optim_steps, result.num_tokens, result.interrupted) == (3, 0, False)
    assert have_equal_weights(again, model)


def test_global_generators_decide_nothing() -> None:
    models = [build_model(), build_model()]
    for number, model in enumerate(models):
        torch.manual_seed(number)
        train_model(model, build_dataset(24), build_settings(), None)
    assert have_equal_weights(*models)


def test_items_are_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    build = WindowDataset.__getitems__

    def note(self: WindowDataset, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        batches.append(list(indices))
        return build(self, indices)

    dataset = build_dataset(100)
    monkeypatch.setattr(WindowDataset, "__getitems__", note)
    train_model(build_model(), dataset, build_settings(steps=3, accumulation_steps=2), None)
    read = [index for batch in batches for index in batch]
    assert read[0] == 0  # The size of a window is asked for first.
    assert read[1:13] == list(range(12))


def test_a_data_loader_that_runs_the_automaton_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU; the data loader's processes get the collator by name."""
    collator = pickle.loads(pickle.dumps(training.choose_collator(build_model(), "cuda")))
    batch = collator([build_dataset(2)[i] for i in range(2)])
    assert batch["suffix_match"].shape == (2, WINDOW_TOKENS, 2)
    peer = build_model(residual_path="none")
    for model, device in ((build_model(), "cpu"), (peer, "cuda"), (torch.nn.Linear(1, 1), "cuda")):
        assert training.choose_collator(model, device) is training.collate
    expected, model = build_model(), build_model()
    train_model(expected, build_dataset(24), build_settings(), None)
    monkeypatch.setattr(training, "choose_collator", lambda model, device: collator)
    train_model(model, build_dataset(24), build_settings(), None)
    assert have_equal_weights(model, expected)


def test_loss_is_the_mean_over_the_labels_of_the_batch() -> None:
    """Also where rows have different numbers of labels and the batch is cut into parts."""
    dataset = _RaggedLabels()
    batch = dataset.build(range(4))
    model = build_model(dropout=0.0)
    with suspend_training(model):
        expected = model(**batch).loss.item()
    trained, losses = [], []
    for parts in (1, 2, 4):
        entries: list[dict[str, float]] = []
        trained.append(build_model(dropout=0.0))
        settings = build_settings(steps=3, accumulation_steps=parts, warmup_fraction=0.0)
        train_model(trained[-1], dataset, settings, None, on_metrics=entries.append)
        losses.append([entry["loss_nats"] for entry in entries])
    assert losses[0][0] == pytest.approx(expected, rel=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("hindsight", ["attribution", "read_hit"])
def test_accumulated_gate_gradients_are_those_of_the_whole_batch(hindsight: str) -> None:
    """The gate's loss is a mean over writes: parts with equally many add up to it."""
    gradients = []
    for parts in (1, 2, 4):
        model = build_model(
            residual_path="none",
            associative_memory="selective",
            pointer=True,
            slot_read_offsets=[0],
            hindsight=hindsight,
            hindsight_floor=0.0,
            dropout=0.0,
        )
        keep = KeepGradients("selective_mixer.gate_")
        settings = build_settings(steps=1, accumulation_steps=parts, warmup_fraction=0.0)
        train_model(model, build_dataset(4), settings, None, callbacks=[keep])
        gradients.append(keep.gradients)
    assert len(gradients[0]) == 4
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for accumulated in gradients[1:]:
        for name, gradient in accumulated.items():
            assert error(gradient, gradients[0][name]) <= 1e-5, name


def test_loss_that_is_not_finite_stops_before_the_weights(tmp_path: Path) -> None:
    settings, out = build_settings(save_every_steps=1), tmp_path
    with pytest.raises(NonFiniteError, match=r"not finite at optimiser step 3\b") as caught:
        train_model(build_model(), build_dataset(24), settings, out, callbacks=[Poison(3)])
    assert "\n" not in str(caught.value)
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["checkpoint-1", "checkpoint-2"]
    restored = build_model()
    train_model(restored, build_dataset(24), settings, out, checkpoint=find_last_checkpoint(out))
    assert all(torch.isfinite(p).all() for p in restored.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_gets_a_gradient(variant: str) -> None:
    """Data-parallel training waits for the gradient of every parameter that asks for one."""
    model = models.build_model(variant, dropout=0.1).train()
    ids = models.draw_ids(2, 12)
    model(input_ids=ids, shift_labels=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("schedule", "warmup_fraction", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("constant", 0.5, [0, 0.5, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.25, [0, 1, 0.75, 0.25]),
        ("warmup_stable_decay", 0.25, [0, 1, 1, 0.5]),
    ],
)
def test_schedule(schedule: str, warmup_fraction: float, expected: list[float]) -> None:
    entries: list[dict[str, float]] = []
    settings = build_settings(
        steps=4,
        schedule=schedule,
        learning_rate=1e-3,
        warmup_fraction=warmup_fraction,
        cooldown_fraction=0.5,
    )
    train_model(build_model(), build_dataset(16), settings, None, on_metrics=entries.append)
    rates = [entry["learning_rate"] * 1e3 for entry in entries]
    assert rates == pytest.approx(expected)


def test_weight_decay_spares_what_the_settings_say() -> None:
    model = build_model(max_position_embeddings=64)
    matrices = set(list_decayed(model, build_settings()))
    with_embeddings = set(list_decayed(model, build_settings(decay_embeddings=True)))
    everything = set(list_decayed(model, build_settings(decay_all=True)))
    shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    assert everything == set(shapes)
    assert with_embeddings == {name for name, dim in shapes.items() if dim >= 2}
    assert with_embeddings - matrices == {
        "model.embed_tokens.weight",
        "model.embed_positions.weight",
        "model.residual_context.embed.weight",
    }


@NEEDS_MUON
def test_a_frozen_part_leaves_one_optimiser() -> None:
    model = build_model()
    for name in list_matrices(model):
        model.get_parameter(name).requires_grad_(False)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    joint = MuonWithAdamW(model, [], **options, fused=False)
    kept = {id(p) for group in joint.param_groups for p in group["params"]}
    assert kept == {id(p) for p in model.parameters() if p.requires_grad}


@NEEDS_MUON
def test_muon_moves_matrices_and_adamw_the_rest() -> None:
    """Steps of the joint optimiser are those of torch's own two."""
    model, twin = build_model(), build_model()
    settings = build_settings(learning_rate=1e-2, weight_decay=0.1)
    decayed = list_decayed(model, settings)
    matrices = list_matrices(model)
    assert len(matrices) >= 5
    assert all(model.get_parameter(name).dim() == 2 for name in matrices)
    assert not any("embed" in name or "lm_head" in name for name in matrices)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    joint = MuonWithAdamW(model, decayed, **options, betas=(0.9, 0.99), fused=True)
    parameters = dict(twin.named_parameters())
    others = [
        {"params": [parameters[n] for n in names], "weight_decay": decay}
        for names, decay in (
            ([n for n in parameters if n not in matrices and n in decayed], 0.1),
            ([n for n in parameters if n not in matrices and n not in decayed], 0.0),
        )
        if names
    ]
    apart = [
        torch.optim.Muon(
            [parameters[n] for n in parameters if n in matrices],
            **options,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.99), fused=True),
    ]
    batch = {name: rows[None] for name, rows in build_dataset(1)[0].items()}
    for net, optimizers in ((model, [joint]), (twin, apart)):
        torch.manual_seed(3)
        for _ in range(3):
            net(**batch).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert have_equal_weights(model, twin)


@NEEDS_MUON
def test_without_muon_in_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match=r"install torch 2\.9 or later"):
        prepare_run(build_recipe(tmp_path, optimizer="muon"), None, "cpu")


@pytest.mark.parametrize("use_cache", [True, False])
def test_training_leaves_the_use_of_a_cache_alone(tmp_path: Path, use_cache: bool) -> None:
    """The Trainer switches it off, and `generate` would then read everything at every token."""
    model = build_model()
    model.config.use_cache = use_cache
    train_model(model, build_dataset(24), build_settings(save_every_steps=3), tmp_path)
    assert model.config.use_cache == use_cache
    checkpoint = find_last_checkpoint(tmp_path)
    assert checkpoint is not None
    assert UniMatrixConfig.from_pretrained(checkpoint).use_cache == use_cache
    linear = build_gated_linear_attention(model.config, max_tokens=64)  # has no such field
    train_model(linear, build_dataset(24), build_settings(steps=1), None)
    peer = build_llama(model.config, max_tokens=64)
    peer.config.use_cache = use_cache
    train_model(peer, build_dataset(24), build_settings(steps=1), None)
    assert peer.config.use_cache == use_cache


def test_run_folder_gets_log_and_checkpoints(tmp_path: Path) -> None:
    settings = build_settings(steps=5, log_every_steps=2, save_every_steps=1, keep_checkpoints=3)
    seen: list[dict[str, float]] = []
    result = train_model(
        build_model(), build_dataset(20), settings, tmp_path, on_metrics=seen.append
    )
    assert _read_metrics(tmp_path) == seen
    assert [entry["optim_step"] for entry in seen] == [1, 2, 4]
    assert result.loss_nats == seen[-1]["loss_nats"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert (tmp_path / "checkpoints" / "checkpoint-5" / "model.safetensors").is_file()


def test_nothing_is_written_or_printed_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train_model(build_model(), build_dataset(8), build_settings(steps=2), None)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_bfloat16_trains() -> None:
    model = build_model()
    settings = build_settings(precision="bfloat16")
    result = train_model(model, build_dataset(24), settings, None)
    assert 0 < result.loss_nats < 6
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_plan_leaves_the_model_alone() -> None:
    model, untouched = build_model(), build_model()
    settings = build_settings(steps=None, minutes=0.01)
    torch.set_num_threads(2)
    plan = plan_steps(model, build_dataset(10**7), settings)
    assert plan.num_steps >= 1
    assert plan.seconds_per_step > 0
    assert plan.num_threads in (1, 2)
    assert torch.get_num_threads() == plan.num_threads
    assert have_equal_weights(model, untouched)
    for wanted in (1, 2):
        chosen = plan_steps(model, build_dataset(10**7), replace(settings, num_threads=wanted))
        assert chosen.num_threads == torch.get_num_threads() == wanted


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(InputError, match="choose a multiple of 3"):
        train_model(build_model(), build_dataset(24), build_settings(accumulation_steps=3), None)
    with pytest.raises(InputError, match="need 24"):
        train_model(build_model(), build_dataset(23), build_settings(), None)


class _RaggedLabels(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of which row i keeps its last i + 1 labels only."""

    def __init__(self) -> None:
        self.windows = build_dataset(12)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.windows[index]
        item["shift_labels"] = item["shift_labels"].clone()
        item["shift_labels"][: WINDOW_TOKENS - index - 1] = -100
        return item

    def build(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        items = [self[index] for index in indices]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
