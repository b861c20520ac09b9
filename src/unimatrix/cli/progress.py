"""The live progress of a training on stderr: a bar on a terminal, lines elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from unimatrix.train.processes import is_main_process

_LINES_PER_RUN = 20


class TrainingProgress(TrainerCallback):
    """Show how far a training is, its loss, its speed and the time left.

    Args:
        log: where to show it.
        loss_scale: what a loss in nats is multiplied by before it is shown.
        loss_unit: the unit it then has.
    """

    def __init__(self, log: Console, *, loss_scale: float, loss_unit: str) -> None:
        self.log = log
        self.loss_scale = loss_scale
        self.loss_unit = loss_unit
        self._text = ""
        self._next_line = 0.0
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=log,
            expand=True,
            disable=not log.is_terminal,
        )
        self._task = self._bar.add_task("training", total=None, text="")

    def show_metrics(self, entry: dict[str, float]) -> None:
        """Show an entry of the log; without a terminal, print some entries as lines."""
        loss = f"{entry['loss_nats'] * self.loss_scale:.3f} {self.loss_unit}"
        self._text = f"{loss}  {entry['tokens_per_s']:,.0f} tokens/s"
        total = self._bar.tasks[0].total
        if self.log.is_terminal or total is None or entry["optim_step"] < self._next_line:
            return
        self._next_line = entry["optim_step"] + total / _LINES_PER_RUN
        self.log.print(f"step {entry['optim_step']:,.0f} of {total:,.0f}  {self._text}")

    def on_train_begin(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Start the bar where the training starts."""
        if is_main_process():
            self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=state.global_step, text=self._text)

    def on_train_end(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Leave the bar as it stands."""
        self.close()

    def close(self) -> None:
        """Stop drawing; to be called after an error too."""
        self._bar.stop()
