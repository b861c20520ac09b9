"""A ``transformers.Trainer`` built from a recipe, exact to resume and to split over processes."""

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler, SequentialSampler, default_collate
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from unimatrix.errors import InputError
from unimatrix.hub.load import hide_progress, is_byte_level
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.ops.numba.torch_threads import flush_denormals
from unimatrix.ops.suffix_automaton import predict_from_suffix
from unimatrix.tokenization import build_tokenizer
from unimatrix.train.allocator import keep_freed_memory
from unimatrix.train.callbacks import FiniteGuard, MetricsLog, open_tensorboard
from unimatrix.train.checkpoints import SCRATCH_FOLDER, publish_checkpoint, write_checkpoint
from unimatrix.train.muon import MuonWithAdamW
from unimatrix.train.processes import count_processes, get_rank, is_main_process, join_processes
from unimatrix.train.recipe import TrainSection
from unimatrix.train.run_folder import CHECKPOINT_FOLDER

_CHECKPOINTS_PER_RUN = 10  # where ``save_every_steps`` is not set
_COMPILE_BACKEND = "inductor"
_NUM_GPU_LOADERS = 2
# Of the Trainer, whatever the recipe says.
_FIXED_ARGUMENTS: dict[str, Any] = {
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "ddp_find_unused_parameters": False,
    "remove_unused_columns": False,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "log_level_replica": "error",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a training did.

    Attributes:
        num_optim_steps: steps behind the weights, those before a resume included.
        num_tokens: input tokens of the steps taken in this call, over all processes.
        train_s: wall seconds of this call.
        loss_nats: mean loss of the last logged steps; NaN if none was logged.
        interrupted: whether it stopped before its last step.
    """

    num_optim_steps: int
    num_tokens: int
    train_s: float
    loss_nats: float
    interrupted: bool


class SequentialTrainer(Trainer):
    """A Trainer that reads items in their order, whatever the number of processes."""

    def __init__(self, settings: TrainSection, **kwargs: Any) -> None:
        self.settings = settings
        self.optimizer: Optimizer | None = None
        self._scratch: Path | None = None
        super().__init__(**kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; our own models skip the logits, which nobody reads here."""
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(bare, UniMatrixForCausalLM):
            inputs = {**inputs, "loss_only": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimiser of ``settings``, made once."""
        if self.settings.optimizer == "muon" and self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = MuonWithAdamW(
                trained,
                list_decayed(trained, self.settings),
                lr=self.settings.learning_rate,
                weight_decay=self.settings.weight_decay,
                betas=(self.settings.beta1, self.settings.beta2),
                fused=True,
            )
        made: Optimizer = super().create_optimizer(*(() if model is None else (model,)))
        return made

    def _get_output_dir(self, trial: Any) -> str:
        made: str = super()._get_output_dir(trial)
        return made if self._scratch is None else str(self._scratch)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into a scratch folder; rename it when all processes are done."""
        folder, optim_step = Path(self.args.output_dir), self.state.global_step
        with write_checkpoint(folder, optim_step) as self._scratch:
            super()._save_checkpoint(model, trial)
        self._scratch = None
        self.accelerator.wait_for_everyone()
        if is_main_process():
            publish_checkpoint(folder, optim_step, self.args.save_total_limit)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint of another model; the Trainer would load the names that fit."""
        tied = set(self.model.all_tied_weights_keys)
        unfit = sorted({*load_result.missing_keys, *load_result.unexpected_keys} - tied)
        if unfit:
            raise InputError(
                f"the checkpoint is of another model: {unfit[0]!r} is missing in one of them; "
                "start a new run"
            )
        super()._issue_warnings_after_load(load_result)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that weight decay applies to."""
        return list_decayed(model, self.settings)


def list_decayed(model: nn.Module, settings: TrainSection) -> list[str]:
    """Return the names of the parameters that weight decay applies to.

    Matrices decay, vectors (biases, norms) do not; ``settings.decay_embeddings`` decides about
    embeddings, and about a head tied to one.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if settings.decay_all
        or (parameter.dim() >= 2 and (settings.decay_embeddings or id(parameter) not in embeddings))
    ]


def train_model(
    model: PreTrainedModel,
    dataset: Dataset[dict[str, Tensor]],
    settings: TrainSection,
    out: Path | None,
    *,
    checkpoint: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    device: str = "cpu",
    on_metrics: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train a model in place.

    Step s reads items ``s * batch_size`` to ``(s + 1) * batch_size - 1`` in the order of the
    dataset, for any number of processes. The loss is the exact mean over the labels of the whole
    batch.

    Args:
        model: takes ``input_ids`` and ``shift_labels`` and returns a ``loss``.
        dataset: map-style; items ``{"input_ids": [T], "shift_labels": [T]}``, as many as
            ``steps * batch_size`` or more, in an order that is already random.
        settings: ``steps`` must be given.
        out: a run folder, which gets checkpoints, ``metrics.jsonl`` and TensorBoard's files, and
            which no other process may write to (``hold_folder``); ``None`` writes nothing.
        checkpoint: where to continue, from ``find_last_checkpoint``; ``None`` is the beginning.
        callbacks: called along the way, such as a progress bar.
        device: cpu, cuda or mps.
        on_metrics: called with each entry of the log.

    Raises:
        InputError: if the batch does not divide over the processes, or the dataset is too short.
        NonFiniteError: if the loss or a gradient is no longer finite; the weights in ``model`` and
            in the checkpoints are those before that step.
        WriteError: if ``out`` cannot be written to; the checkpoints there are whole.

    Note:
        Seeds the global generators, which dropout draws from: with ``settings.seed`` plus the
        process's number.
    """
    assert settings.steps is not None, "the number of steps is decided before training"
    join_processes(device)
    _require_items(dataset, settings.steps, settings.batch_size)
    tokens_per_step = dataset[0]["input_ids"].numel() * settings.batch_size
    log = MetricsLog(out, on_metrics, num_tokens=tokens_per_step)
    with (
        hide_progress(),
        _restore_use_cache(model),
        _open_output(out) as folder,
        open_tensorboard(out) as board,
    ):
        trainer = _build_trainer(
            model,
            settings,
            args=build_arguments(settings, folder, device, saves=out is not None),
            train_dataset=dataset,
            data_collator=choose_collator(model, device),
            callbacks=[FiniteGuard(), log, *board, *callbacks],
        )
        torch.manual_seed(settings.seed + get_rank())
        start = time.perf_counter()
        _take_steps(trainer, checkpoint, device)
    return TrainResult(
        num_optim_steps=trainer.state.global_step,
        num_tokens=log.count_tokens(trainer.state.global_step),
        train_s=time.perf_counter() - start,
        loss_nats=log.loss_nats,
        interrupted=trainer.state.global_step < settings.steps,
    )


def _require_items(dataset: Any, num_steps: int, batch_size: int) -> None:
    """Raise ``InputError`` unless a dataset has the items of all steps."""
    if len(dataset) < num_steps * batch_size:
        raise InputError(
            f"the dataset has {len(dataset)} items; {num_steps} steps of {batch_size} need "
            f"{num_steps * batch_size}"
        )


def _build_trainer(
    model: PreTrainedModel, settings: TrainSection, **options: Any
) -> SequentialTrainer:
    """Return the Trainer of a model; every checkpoint of a byte-level model has its tokenizer."""
    if not isinstance(model, UniMatrixForCausalLM):
        trainer = SequentialTrainer(settings, model=model, **options)
    else:
        uses_cache = model.config.use_cache
        tokenizer = build_tokenizer() if is_byte_level(model.config) else None
        trainer = SequentialTrainer(settings, model=model, processing_class=tokenizer, **options)
        # The Trainer switches the cache off in the configuration, which checkpoints save. Our
        # models make no cache in training, whatever it says.
        model.config.use_cache = uses_cache
    trainer.remove_callback(PrinterCallback)
    return trainer


def _take_steps(trainer: SequentialTrainer, checkpoint: Path | None, device: str) -> None:
    """Train from a checkpoint, or from the beginning."""
    if device == "cpu":
        keep_freed_memory()
    with flush_denormals():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


@contextlib.contextmanager
def _restore_use_cache(model: PreTrainedModel) -> Iterator[None]:
    """Restore ``use_cache`` of a configuration that has it: the Trainer switches it off."""
    if not hasattr(model.config, "use_cache"):
        yield
        return
    uses_cache = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = uses_cache


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack items; the labels go under both names, because the Trainer counts ``labels``."""
    batch: dict[str, Tensor] = default_collate(list(items))
    return {**batch, "labels": batch["shift_labels"]}


def collate_with_match(items: Sequence[dict[str, Tensor]], window: int | None) -> dict[str, Tensor]:
    """Stack items, and add the predictions of a suffix automaton unless the items have them.

    Of rows with several documents, each with an automaton of its own, the model finds them.
    """
    batch = collate(items)
    if "suffix_match" in batch or "position_ids" in batch:
        return batch
    prediction, _ = predict_from_suffix(batch["input_ids"], window=window, keeps_state=False)
    return {**batch, "suffix_match": torch.stack(prediction, dim=-1)}


def choose_collator(
    model: nn.Module, device: str
) -> Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]:
    """Return the function that makes a batch of items.

    For a GPU the suffix automaton runs in the data loader's processes. In the forward pass the
    automaton would have to wait for all work queued on the GPU before it sees the ids, and the GPU
    would then wait for the automaton.
    """
    context = model.model.residual_context if isinstance(model, UniMatrixForCausalLM) else None
    if device != "cuda" or context is None or not context.runs_operator:
        return collate
    return functools.partial(collate_with_match, window=context.window)


def build_arguments(
    settings: TrainSection, folder: Path, device: str, *, saves: bool
) -> TrainingArguments:
    """Return the Trainer's own settings."""
    assert settings.steps is not None
    schedule, schedule_options = _choose_schedule(settings, settings.steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=split_batch(settings),
        gradient_accumulation_steps=settings.accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=round(settings.warmup_fraction * settings.steps),
        # The Trainer knows no Muon; `SequentialTrainer` makes it.
        optim="adamw_torch_fused" if settings.optimizer == "muon" else settings.optimizer,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        torch_compile=settings.compile,
        torch_compile_backend=_COMPILE_BACKEND if settings.compile else None,
        seed=settings.seed,
        logging_steps=settings.log_every_steps,
        save_strategy="steps" if saves else "no",
        save_steps=settings.save_every_steps or math.ceil(settings.steps / _CHECKPOINTS_PER_RUN),
        save_total_limit=settings.keep_checkpoints,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and count_processes() > 1 else None,
        dataloader_pin_memory=device == "cuda",
        dataloader_num_workers=_NUM_GPU_LOADERS if device == "cuda" else 0,
        **_FIXED_ARGUMENTS,
    )
    # Several GPUs are used through torchrun; nn.DataParallel would take those that are visible.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def split_batch(settings: TrainSection) -> int:
    """Return the windows of one forward pass in one process.

    Raises:
        InputError: if the batch does not divide over processes and accumulation steps.
    """
    parts = count_processes() * settings.accumulation_steps
    if settings.batch_size % parts:
        raise InputError(
            f"train.batch_size is {settings.batch_size}, which {count_processes()} process(es) x "
            f"{settings.accumulation_steps} accumulation step(s) do not divide; choose a multiple "
            f"of {parts}"
        )
    return settings.batch_size // parts


def _choose_schedule(settings: TrainSection, num_steps: int) -> tuple[str, dict[str, Any]]:
    """Return a schedule's name and options in the Trainer's terms."""
    if settings.schedule == "constant" and settings.warmup_fraction > 0:
        return "constant_with_warmup", {}
    if settings.schedule == "warmup_stable_decay":
        num_decay_steps = round(settings.cooldown_fraction * num_steps)
        return settings.schedule, {"num_decay_steps": num_decay_steps, "decay_type": "linear"}
    return settings.schedule, {}


@contextlib.contextmanager
def _open_output(out: Path | None) -> Iterator[Path]:
    """Yield the folder for checkpoints; a temporary one without ``out``."""
    if out is not None:
        folder = out / CHECKPOINT_FOLDER
        if is_main_process():
            shutil.rmtree(folder / SCRATCH_FOLDER, ignore_errors=True)
        yield folder
        return
    with TemporaryDirectory(prefix="unimatrix-") as temporary:
        yield Path(temporary)
