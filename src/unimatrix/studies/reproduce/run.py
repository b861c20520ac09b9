"""The runs behind the claims: each trained once, kept as a record, never run again."""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unimatrix.baselines.transformers_models import build_gelu_transformer
from unimatrix.configuration import UniMatrixConfig
from unimatrix.data import ConsecutiveWindows, WindowDataset, load_corpus
from unimatrix.evaluation.bits_per_byte import measure_consecutive_windows
from unimatrix.evaluation.recall import measure_recall
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.studies.engine import (
    Attempt,
    FolderStore,
    Say,
    StoppedError,
    StudyCell,
    run_cells,
    split_finished,
)
from unimatrix.studies.recall.recipe import RecallRecipe
from unimatrix.studies.recall.run import RecallCell, build_recall_config
from unimatrix.studies.recall.slices import build_slices
from unimatrix.studies.records import Record
from unimatrix.studies.reproduce.claims import ClaimCell, list_cells, name_run
from unimatrix.studies.reproduce.throughput import measure_throughput
from unimatrix.studies.seeds import TEST_SEED_OFFSET, draw_model
from unimatrix.tasks import AssociativeRecall, RotatingDataset, TripleInteraction
from unimatrix.train.callbacks import StopOnSignal
from unimatrix.train.judge import judge_run
from unimatrix.train.recipe import Recipe, load_recipe, replace_fields
from unimatrix.train.run import prepare_run, start_run, train_run
from unimatrix.train.run_folder import describe_run, hold_results, require_unicode_path

TRANSFORMER = "transformer"
"""The paper's own baseline, among the models of the claims."""
SIZED_MODELS = (TRANSFORMER, "core", "rosa", "discovery")
_STAGE_STEPS = 200
_TRIPLE_EXAMPLES = 2048


@dataclass(frozen=True)
class ReproductionPlan:
    """What is run.

    Attributes:
        groups: tables whose claims are tested.
        quick: the first seed of every cell only.
        data: corpus of the language models, as in ``train``.
        valid_data: what validates instead of its own split; empty is its own.
    """

    groups: tuple[str, ...]
    quick: bool = False
    data: tuple[str, ...] = ("wikitext2",)
    valid_data: tuple[str, ...] = ()

    def list_runs(self) -> Iterator["ClaimRun"]:
        """Yield a run for every cell and every seed that it is run with."""
        for cell in list_cells(self.groups):
            for seed in cell.seeds[: 1 if self.quick else None]:
                yield ClaimRun(name=name_run(cell, seed), cell=cell, seed=seed, plan=self)


@dataclass(frozen=True, kw_only=True)
class ClaimRun(StudyCell):
    """A cell of the claims with one seed."""

    cell: ClaimCell
    seed: int
    plan: ReproductionPlan

    def measure(self, attempt: Attempt) -> Record:
        """Train and judge, by what kind of run the cell is; see ``StudyCell``."""
        group, model = self.cell.group, self.cell.model
        if model not in ("all", TRANSFORMER) and group == "lm":
            return _run_pilot(self, attempt)
        if model != TRANSFORMER and group in ("recall", "slots"):
            recipe = build_recipe(self.cell, self.seed)
            return RecallCell.prepare(self.name, recipe).measure(attempt)
        if group == "throughput":
            run = _run_throughput
        elif group == "triple":
            run = _run_triple
        elif group == "lm":
            run = _count_sizes if model == "all" else _run_transformer_pilot
        else:
            run = _run_transformer_recall
        device = "cpu" if model == "all" else attempt.device
        begun = {"status": "done", "seed": self.seed, **describe_run(device)}
        return begun | run(self, attempt)


def reproduce(
    plan: ReproductionPlan, out: Path, *, say: Say = lambda _: None, device: str = "cpu"
) -> dict[str, Record]:
    """Run what is not yet recorded; return the records of the plan by folder.

    Args:
        plan: what to run.
        out: folder of the records; what is finished there is not run again.
        say: called with a sentence a run.
        device: cpu, cuda or mps; throughput is always measured on the CPU.

    Raises:
        InputError: for a corpus that cannot be opened, a damaged record, or a folder that another
            process writes to, before anything is run.
        StoppedError: by Ctrl-C; finished runs are kept, nothing of an unfinished one.
    """
    require_unicode_path(out)
    store = FolderStore(out, records_only=True)
    runs = list(plan.list_runs())
    _, missing = split_finished(runs, store)
    if any(run.cell.group == "lm" and run.cell.model != "all" for run in missing):
        load_corpus(plan.data, plan.valid_data or None)
    with hold_results(out), StopOnSignal() as stop:
        # Once more: who held the folder before may have finished some.
        records, missing = split_finished(runs, store)
        attempt = Attempt(device=device, say=say)
        return run_cells(missing, store, attempt, records=records, num_cells=len(runs), stop=stop)


def build_recipe(cell: ClaimCell, seed: int) -> RecallRecipe:
    """Return the recipe of a preset that learns associative recall as in the paper."""
    return RecallRecipe(
        preset=cell.model,
        dropout=cell.dropout,
        num_slots=cell.num_slots,
        overrides=dict(cell.overrides),
        seed=seed,
    )


def count_parameters() -> dict[str, int]:
    """Return the parameters of the byte-level models of the paper's pilot."""
    counts = {}
    for model in SIZED_MODELS:
        recipe = load_pilot(model, 0)
        config = UniMatrixConfig.preset(recipe.model.preset or "core", **recipe.model.overrides)
        built: PreTrainedModel = (
            build_gelu_transformer(config, max_tokens=recipe.data.window_tokens)
            if model == TRANSFORMER
            else UniMatrixForCausalLM(config)
        )
        counts[model] = built.num_parameters()
    return counts


def load_pilot(model: str, seed: int, plan: ReproductionPlan | None = None) -> Recipe:
    """Return the recipe of the byte-level pilot; the Transformer's is that of core."""
    recipe = load_recipe(f"paper-{'core' if model == TRANSFORMER else model}")
    fields: dict[str, Any] = {"train.seed": seed, "eval.sample_bytes": 0}
    if plan is not None:
        fields |= {"data.data": list(plan.data), "data.valid_data": list(plan.valid_data)}
    return replace_fields(recipe, fields)


def _run_pilot(run: ClaimRun, attempt: Attempt) -> Record:
    """Return the record of a preset on bytes of WikiText-2, as ``unimatrix train`` makes it."""
    recipe = load_pilot(run.cell.model, run.seed, run.plan)
    prepared = prepare_run(recipe, attempt.folder, attempt.device)
    start_run(prepared, lambda _: None)
    if train_run(prepared, callbacks=attempt.callbacks).interrupted:
        raise StoppedError(run.name)
    judge_run(prepared)
    return prepared.record


def _count_sizes(run: ClaimRun, attempt: Attempt) -> Record:
    return {"results": {"parameters": count_parameters(), "train_s": 0.0}}


def _run_throughput(run: ClaimRun, attempt: Attempt) -> Record:
    start = time.perf_counter()
    results = measure_throughput(run.seed)
    return {"results": results | {"train_s": round(time.perf_counter() - start, 3)}}


def _run_transformer_pilot(run: ClaimRun, attempt: Attempt) -> Record:
    """Train the paper's Transformer on bytes of WikiText-2 and judge it."""
    recipe = load_pilot(TRANSFORMER, run.seed, run.plan)
    assert recipe.train.steps is not None
    corpus = load_corpus(run.plan.data, run.plan.valid_data or None)
    window_tokens = recipe.data.window_tokens
    windows = WindowDataset(
        corpus.train,
        window_tokens,
        recipe.train.steps * recipe.train.batch_size,
        run.seed,
        leading_bos=recipe.data.leading_bos,
    )
    model = _draw_transformer(UniMatrixConfig.preset("core"), window_tokens, run.seed)
    train_s = attempt.train(model, windows, recipe.train)
    num_windows = recipe.eval.prefix_bytes // window_tokens
    judged = ConsecutiveWindows(corpus.valid, window_tokens, num_windows)
    score = measure_consecutive_windows(model, judged, batch_size=recipe.eval.batch_size)
    return {
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        "results": {
            "bits_per_byte": score.bits_per_byte,
            "valid_bytes": score.bytes,
            "context": score.context,
            "parameters": model.num_parameters(),
            "train_s": train_s,
        },
    }


def _run_transformer_recall(run: ClaimRun, attempt: Attempt) -> Record:
    """Train the paper's Transformer on associative recall and test it."""
    recipe = replace(build_recipe(run.cell, run.seed), preset="core")
    slices = build_slices(recipe)
    (task,) = slices.train
    assert isinstance(task, AssociativeRecall)
    config = build_recall_config(recipe, slices)
    model = _draw_transformer(config, task.window_tokens, run.seed)
    num_examples = recipe.steps * recipe.batch_size
    examples = RotatingDataset(slices.train, run.seed, num_examples, recipe.batch_size)
    train_s = attempt.train(model, examples, recipe.to_train_section())
    test_seed = run.seed + TEST_SEED_OFFSET
    results = {
        "task": recipe.task,
        "accuracy": {
            name: measure_recall(model, test, recipe.test_examples, test_seed)
            for name, test in slices.test.items()
        },
        "parameters": model.num_parameters(),
        "train_s": train_s,
        "recipe": dataclasses.asdict(recipe) | {"preset": TRANSFORMER},
    }
    return {"results": results}


def _run_triple(run: ClaimRun, attempt: Attempt) -> Record:
    """Train on the rules in turn, the weights carried on; test each rule after its own stage."""
    cell = run.cell
    fields: dict[str, Any] = {"vocab_size": TripleInteraction.vocab_size, "dropout": cell.dropout}
    fields |= {"pad_token_id": 0, "bos_token_id": TripleInteraction.BOS_ID, "eos_token_id": None}
    recipe = RecallRecipe(steps=_STAGE_STEPS, dropout=cell.dropout, seed=run.seed)
    model: PreTrainedModel
    if cell.model == TRANSFORMER:
        config = UniMatrixConfig(**fields)
        model = _draw_transformer(config, TripleInteraction.window_tokens, run.seed)
    else:
        config = UniMatrixConfig.preset(cell.model, **(fields | cell.overrides))
        model = draw_model(lambda: UniMatrixForCausalLM(config), run.seed)
    accuracy, train_s = {}, 0.0
    for stage, rule in enumerate(TripleInteraction.RULES):
        # Seeds far apart, so that no stage repeats the examples of another.
        task, seed = TripleInteraction(rule), run.seed + 1000 * stage
        examples = RotatingDataset((task,), seed, recipe.steps * recipe.batch_size, 32)
        section = replace(recipe.to_train_section(), seed=seed)
        train_s += attempt.train(model, examples, section)
        accuracy[rule] = measure_recall(model, task, _TRIPLE_EXAMPLES, seed + TEST_SEED_OFFSET)
    results = {
        "task": "triple",
        "accuracy": accuracy,
        "parameters": model.num_parameters(),
        "train_s": round(train_s, 3),
        "recipe": {"model": cell.model, "dropout": cell.dropout, "stage_steps": recipe.steps},
    }
    return {"results": results}


def _draw_transformer(config: UniMatrixConfig, max_tokens: int, seed: int) -> PreTrainedModel:
    """Return the paper's Transformer with weights drawn from the seed."""
    return draw_model(lambda: build_gelu_transformer(config, max_tokens=max_tokens), seed)
