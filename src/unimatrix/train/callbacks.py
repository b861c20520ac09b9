"""What happens along a training: the check for NaN, the log, TensorBoard, a stop on Ctrl-C."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from unimatrix.errors import RunError
from unimatrix.train.processes import any_process, count_processes, is_main_process
from unimatrix.train.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, writing

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class NonFiniteError(RunError):
    """The loss or a gradient is infinite or NaN; the message names the step."""


class FiniteGuard(TrainerCallback):
    """Stop before a gradient that is not finite reaches the weights.

    Gradients are summed over the processes of a run, so all of them stop at the same step.
    """

    def on_pre_optimizer_step(
        self, args: Arguments, state: State, control: Control, *, model: PreTrainedModel, **_: Any
    ) -> None:
        """Raise ``NonFiniteError`` unless every gradient is finite."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            return
        raise NonFiniteError(
            f"the loss or its gradient is not finite at optimiser step {state.global_step + 1}; "
            "lower train.learning_rate or raise train.warmup_fraction"
        )


class MetricsLog(TrainerCallback):
    """Append every logged entry to ``metrics.jsonl``, and pass it to ``on_metrics``.

    Args:
        out: the run folder; ``None`` writes nothing.
        on_metrics: called with each entry: ``optim_step``, ``loss_nats``, ``learning_rate``,
            ``grad_norm``, ``elapsed_s``, ``tokens_per_s``.
        num_tokens: input tokens of an optimiser step.
    """

    def __init__(
        self,
        out: Path | None,
        on_metrics: Callable[[dict[str, float]], None] | None,
        *,
        num_tokens: int,
    ) -> None:
        self.out = out
        self.on_metrics = on_metrics
        self.num_tokens = num_tokens
        self.loss_nats = float("nan")
        self._first_step = 0
        self._start_s = 0.0
        self._last = (0, 0.0)

    def count_tokens(self, optim_step: int) -> int:
        """Return the input tokens from the start of this training to ``optim_step``."""
        return (optim_step - self._first_step) * self.num_tokens

    def on_train_begin(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Start the clock."""
        self._first_step = state.global_step
        self._start_s = time.perf_counter()
        self._last = (state.global_step, self._start_s)

    def on_log(
        self, args: Arguments, state: State, control: Control, logs: dict[str, float], **_: Any
    ) -> None:
        """Write and pass on an entry that has a loss."""
        if "loss" not in logs or not is_main_process():
            return
        now = time.perf_counter()
        num_steps, seconds = state.global_step - self._last[0], now - self._last[1]
        self._last = (state.global_step, now)
        self.loss_nats = logs["loss"]
        entry = {
            "optim_step": state.global_step,
            "loss_nats": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm", float("nan")),
            "elapsed_s": round(now - self._start_s, 3),
            "tokens_per_s": round(num_steps * self.num_tokens / seconds, 1),
        }
        if self.out is not None:
            path = self.out / METRICS_FILE
            with writing(path, self.out), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if self.on_metrics is not None:
            self.on_metrics(entry)


@contextlib.contextmanager
def open_tensorboard(out: Path | None) -> Iterator[list[TrainerCallback]]:
    """Yield TensorBoard's callback, in the main process of a run with a folder only."""
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
            with contextlib.suppress(OSError):  # A second error would hide the first.
                writer.close()
            raise
        with writing(folder, out):
            writer.close()


@contextlib.contextmanager
def _quiet_writer_thread() -> Iterator[None]:
    """Keep TensorBoard's thread from printing errors that the main thread raises again."""
    former = threading.excepthook

    def show(raised: threading.ExceptHookArgs) -> None:
        if type(raised.thread).__name__ != "_AsyncWriterThread":
            former(raised)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = former


class StopOnSignal(TrainerCallback):
    """Turn Ctrl-C and SIGTERM into a checkpoint and a clean stop after the present step.

    A second Ctrl-C stops at once. Under torchrun, which repeats the terminal's signal, later ones
    are ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._request) for s in _STOP_SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and count_processes() == 1:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Save and stop if any process was asked to."""
        if any_process(self.requested, args.device):
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True
