"""What a run of the benchmark is to time."""

from collections.abc import Sequence
from dataclasses import dataclass

from unimatrix.bench.models import BenchModel
from unimatrix.bench.probe import BenchCell
from unimatrix.bench.workloads import choose_batch_size

ALONE = ("automaton", "start")
"""What is timed without cells: the suffix automaton at the two greatest lengths, and new processes
up to the first tokens of a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPlan:
    """What is to be timed.

    Attributes:
        modes: keys of ``MODES``.
        alone: what is timed without cells, of ``ALONE``.
        lengths: T, in rising order.
        models: presets and peers.
        batch_size: B of train steps and forward passes; ``None`` fills ``TOKENS_PER_BATCH``.
        num_rounds: rounds of a cell, if they fit the budget.
        budget_s: seconds that one run may take, and that all rounds of a cell may.
        seed: of the weights.
        device: cpu, cuda or mps.
        num_threads: CPU threads; ``None`` is what torch has.
        text: a corpus that is read; ``None`` is the standard library's sources.
    """

    modes: Sequence[str]
    alone: Sequence[str] = ()
    lengths: Sequence[int]
    models: Sequence[BenchModel]
    batch_size: int | None
    num_rounds: int
    budget_s: float
    seed: int
    device: str
    num_threads: int | None = None
    text: str | None = None

    @property
    def precision(self) -> str:
        """Of the products of all models."""
        return self.models[0].precision if self.models else "float32"

    def list_cells(self, *modes: str) -> list[BenchCell]:
        """Return the cells of modes, lengths rising in each; train steps alone are compiled."""
        return [
            BenchCell(
                mode=mode,
                model=model,
                num_tokens=num_tokens,
                batch_size=choose_batch_size(mode, num_tokens, self.batch_size, self.device),
            )
            for mode in modes
            for num_tokens in self.lengths
            for model in self.models
            if mode == "train" or model.compiler is None
        ]

    def count_text_bytes(self) -> int:
        """Return the bytes of text that the largest cell reads, or the automaton."""
        cells = self.list_cells(*self.modes)
        return max(*self.lengths, *(cell.batch_size * (cell.num_tokens + 1) for cell in cells), 0)
