"""A ``transformers.Trainer`` built from a recipe, exact to resume and to split over processes."""

import contextlib
import copy
import functools
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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
from unimatrix.train.callbacks import FiniteGuard, MetricsLog, StepTimer
from unimatrix.train.checkpoints import SCRATCH_FOLDER, publish_checkpoint, write_checkpoint
from unimatrix.train.muon import MuonWithAdamW
from unimatrix.train.processes import count_processes, get_rank, is_main_process, join_processes
from unimatrix.train.recipe import TrainSection
from unimatrix.train.run_folder import CHECKPOINT_FOLDER, TENSORBOARD_FOLDER, writing

CHECKPOINTS_PER_RUN = 10
"""How many checkpoints a run writes where ``save_every_steps`` leaves it open."""
BUDGET_SHARE = 0.97
"""The share of a budget in minutes that is planned; the rest is for checkpoints and stalls."""
_COMPILE_BACKEND = "inductor"
_NUM_GPU_LOADERS = 2
_WARMUP_SHARE = 0.03
_LONGEST_WARMUP_S = 4.0


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
    """A Trainer that reads items in their order, whatever the number of processes.

    Args:
        settings: which parameters decay.
        kwargs: passed on to ``Trainer``.
    """

    def __init__(self, settings: TrainSection, **kwargs: Any) -> None:
        self.settings = settings
        self.optimizer: Optimizer | None = None
        self._scratch: Path | None = None
        super().__init__(**kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; a model that can is spared the logits."""
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(bare, UniMatrixForCausalLM):
            inputs = {**inputs, "loss_only": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimiser of ``settings``, made once; later releases pass the model."""
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
        """Write a checkpoint beside its place, and move it there when all processes are done."""
        folder, optim_step = Path(self.args.output_dir), self.state.global_step
        with write_checkpoint(folder, optim_step) as self._scratch:
            super()._save_checkpoint(model, trial)
        self._scratch = None
        self.accelerator.wait_for_everyone()
        if is_main_process():
            publish_checkpoint(folder, optim_step, self.args.save_total_limit)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint of another model, which the Trainer would take in part."""
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

    Matrices decay; vectors (biases, norms) do not; embeddings, and a head tied to one, do as
    ``settings`` says.
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

    Step s sees items ``s * batch_size`` up to the next step's first: the order is the dataset's
    own, and the same for any number of processes. The loss is the exact mean over the labels of
    the whole batch.

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

    Returns:
        what was done; the weights are in ``model``.

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
    if len(dataset) < settings.steps * settings.batch_size:  # type: ignore[arg-type]
        raise InputError(
            f"the dataset has {len(dataset)} items; {settings.steps} steps of "  # type: ignore[arg-type]
            f"{settings.batch_size} need {settings.steps * settings.batch_size}"
        )
    uses_cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    tokens_per_step = dataset[0]["input_ids"].numel() * settings.batch_size
    log = MetricsLog(out, on_metrics, num_tokens=tokens_per_step)
    with hide_progress(), _open_output(out) as folder, _open_tensorboard(out) as board:
        trainer = SequentialTrainer(
            settings,
            model=model,
            args=build_arguments(settings, folder, device, saves=out is not None),
            train_dataset=dataset,
            data_collator=choose_collator(model, device),
            # It is saved in every checkpoint.
            processing_class=build_tokenizer()
            if isinstance(model, UniMatrixForCausalLM) and is_byte_level(model.config)
            else None,
            callbacks=[FiniteGuard(), log, *board, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if isinstance(model, UniMatrixForCausalLM):
            # The Trainer has switched it off; ours makes no cache in training, and checkpoints
            # would keep it off.
            model.config.use_cache = uses_cache
        torch.manual_seed(settings.seed + get_rank())
        start = time.perf_counter()
        if device == "cpu":
            keep_freed_memory()
        try:
            with flush_denormals():
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
        finally:
            if uses_cache is not None:
                model.config.use_cache = uses_cache
    return TrainResult(
        num_optim_steps=trainer.state.global_step,
        num_tokens=log.count_tokens(trainer.state.global_step),
        train_s=time.perf_counter() - start,
        loss_nats=log.loss_nats,
        interrupted=trainer.state.global_step < settings.steps,
    )


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack items; the labels go under both names, because the Trainer counts ``labels``."""
    batch: dict[str, Tensor] = default_collate(list(items))
    return {**batch, "labels": batch["shift_labels"]}


def collate_with_match(items: Sequence[dict[str, Tensor]], window: int | None) -> dict[str, Tensor]:
    """Stack items, and run the suffix automaton, with a window or without, over those without."""
    batch = collate(items)
    if "suffix_match" in batch:
        return batch
    prediction, _ = predict_from_suffix(batch["input_ids"], window=window, keeps_state=False)
    return {**batch, "suffix_match": torch.stack(prediction, dim=-1)}


def choose_collator(
    model: nn.Module, device: str
) -> Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]:
    """Return what makes a batch of items.

    On a GPU the suffix automaton runs here, in the data loader's processes: in the forward pass it
    would wait for the ids, which come after everything queued before, and the GPU for it.
    """
    context = model.model.residual_context if isinstance(model, UniMatrixForCausalLM) else None
    if device != "cuda" or context is None or not context.uses_automaton:
        return collate
    return functools.partial(collate_with_match, window=context.window)


def build_arguments(
    settings: TrainSection, folder: Path, device: str, *, saves: bool
) -> TrainingArguments:
    """Return the Trainer's own settings.

    Args:
        settings: ours; ``steps`` must be given.
        folder: where checkpoints go.
        device: cpu, cuda or mps.
        saves: write checkpoints.

    Raises:
        InputError: if the batch does not divide over processes and accumulation steps.
    """
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
        warmup_steps=_count_steps(settings.warmup_fraction, settings.steps),
        # Muon is not among the Trainer's own: `SequentialTrainer` makes it.
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
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_steps=settings.save_every_steps or math.ceil(settings.steps / CHECKPOINTS_PER_RUN),
        save_total_limit=settings.keep_checkpoints,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and count_processes() > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device == "cuda",
        dataloader_num_workers=_NUM_GPU_LOADERS if device == "cuda" else 0,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    # One process, one device: several GPUs are used through torchrun, never nn.DataParallel.
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


class StepPlan(NamedTuple):
    """What a budget in minutes buys.

    Attributes:
        num_steps: at least 1.
        seconds_per_step: as timed.
        num_threads: CPU threads it was timed with, which are those in use from now on.
    """

    num_steps: int
    seconds_per_step: float
    num_threads: int


def plan_steps(
    model: PreTrainedModel,
    dataset: Dataset[dict[str, Tensor]],
    settings: TrainSection,
    *,
    device: str = "cpu",
) -> StepPlan:
    """Find out how many steps fit ``settings.minutes`` by training copies for a few seconds.

    The first steps, which compile and allocate, are not timed; the timed ones count towards the
    budget. On the CPU one thread is timed beside all of them: waking a second thread can cost more
    than its share of a small step, and far more on a machine that has other work.

    Args:
        model: left as it is.
        dataset: items to train the copy on, more than will be needed.
        settings: ``minutes`` must be given.
        device: cpu, cuda or mps.
    """
    assert settings.minutes is not None
    budget_s = settings.minutes * 60
    num_trial_steps = len(dataset) // settings.batch_size  # type: ignore[arg-type]
    trial = replace(settings, minutes=None, steps=num_trial_steps)
    timers = {}
    for num_threads in _list_thread_counts(settings, device):
        torch.set_num_threads(num_threads)
        timer = timers[num_threads] = StepTimer(min(_LONGEST_WARMUP_S, _WARMUP_SHARE * budget_s))
        train_model(copy.deepcopy(model), dataset, trial, None, callbacks=[timer], device=device)
    num_threads = min(timers, key=lambda number: timers[number].seconds_per_step)
    torch.set_num_threads(num_threads)
    seconds_per_step = timers[num_threads].seconds_per_step
    left_s = budget_s - sum(timer.timed_s for timer in timers.values())
    return StepPlan(
        max(1, int(BUDGET_SHARE * left_s / seconds_per_step)), seconds_per_step, num_threads
    )


def _list_thread_counts(settings: TrainSection, device: str) -> list[int]:
    """Return the numbers of CPU threads worth timing."""
    if settings.num_threads is not None:
        return [settings.num_threads]
    present = torch.get_num_threads()
    if device != "cpu" or count_processes() > 1:
        return [present]
    return sorted({1, present})


def _choose_schedule(settings: TrainSection, num_steps: int) -> tuple[str, dict[str, Any]]:
    """Return a schedule's name and options in the Trainer's terms."""
    if settings.schedule == "constant" and settings.warmup_fraction > 0:
        return "constant_with_warmup", {}
    if settings.schedule == "warmup_stable_decay":
        num_decay_steps = _count_steps(settings.cooldown_fraction, num_steps)
        return settings.schedule, {"num_decay_steps": num_decay_steps, "decay_type": "linear"}
    return settings.schedule, {}


def _count_steps(fraction: float, num_steps: int) -> int:
    return round(fraction * num_steps)


@contextlib.contextmanager
def _open_output(out: Path | None) -> Iterator[Path]:
    """Yield the folder for checkpoints: a passing one where nothing is to be kept."""
    if out is not None:
        folder = out / CHECKPOINT_FOLDER
        if is_main_process():
            shutil.rmtree(folder / SCRATCH_FOLDER, ignore_errors=True)
        yield folder
        return
    with TemporaryDirectory(prefix="unimatrix-") as passing:
        yield Path(passing)


@contextlib.contextmanager
def _open_tensorboard(out: Path | None) -> Iterator[list[TrainerCallback]]:
    """Yield TensorBoard's callback in the main process of a run that is kept."""
    if out is None or not is_main_process():
        yield []
        return
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    folder = out / TENSORBOARD_FOLDER
    with _quiet_writer_thread():
        with writing(folder, out):
            writer = SummaryWriter(str(folder))
        try:
            yield [TensorBoardCallback(writer)]
        except BaseException:
            with contextlib.suppress(OSError):  # It would hide what ended the training.
                writer.close()
            raise
        with writing(folder, out):
            writer.close()


@contextlib.contextmanager
def _quiet_writer_thread() -> Iterator[None]:
    """Keep TensorBoard's thread from printing what it raises: this thread raises it too."""
    former = threading.excepthook

    def show(raised: threading.ExceptHookArgs) -> None:
        if type(raised.thread).__name__ != "_AsyncWriterThread":
            former(raised)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = former
