"""The runs behind the claims: each trained once, kept as a record, never run again."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from unimatrix.baselines.transformers_models import build_gelu_transformer
from unimatrix.configuration import UniMatrixConfig
from unimatrix.data import ConsecutiveWindows, WindowDataset, load_corpus
from unimatrix.evaluation.bits_per_byte import measure_consecutive_windows
from unimatrix.evaluation.recall import measure_recall
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.studies.recall.recipe import RecallRecipe
from unimatrix.studies.recall.run import build_recall_config, run_recall
from unimatrix.studies.recall.slices import build_slices
from unimatrix.studies.reproduce.claims import ClaimCell, list_cells, name_run
from unimatrix.studies.reproduce.throughput import measure_throughput
from unimatrix.tasks import AssociativeRecall, RotatingDataset, TripleInteraction
from unimatrix.train.callbacks import StopOnSignal
from unimatrix.train.judge import judge_run
from unimatrix.train.recipe import Recipe, load_recipe, replace_fields
from unimatrix.train.run import prepare_run, start_run, train_run
from unimatrix.train.run_folder import (
    RECORD_FILE,
    describe_run,
    hold_results,
    read_record,
    require_unicode_path,
    write_record,
)
from unimatrix.train.trainer import train_model

TRANSFORMER = "transformer"
"""The paper's own baseline, among the models of the claims."""
SIZED_MODELS = (TRANSFORMER, "core", "rosa", "discovery")
# Added to the seed, so that no test ever meets a training example.
_TEST_SEED_OFFSET = 2**32
_STAGE_STEPS = 200
_TRIPLE_EXAMPLES = 2048

Record = dict[str, Any]


class StoppedError(Exception):
    """The user asked to stop; finished runs are kept."""


class Abort(TrainerCallback):
    """End a training at once where a stop was asked for: nothing of it is kept.

    Args:
        stop: what takes the signal.
    """

    def __init__(self, stop: StopOnSignal) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_unused: Any) -> None:
        """Raise ``KeyboardInterrupt`` if a stop was asked for."""
        if self.stop.requested:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Plan:
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

    def list_runs(self) -> Iterator[tuple[ClaimCell, int]]:
        """Yield every cell with every seed it is run with."""
        for cell in list_cells(self.groups):
            for seed in cell.seeds[: 1 if self.quick else None]:
                yield cell, seed


def reproduce(
    plan: Plan,
    out: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
    device: str = "cpu",
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
        StoppedError: by Ctrl-C.
    """
    require_unicode_path(out)
    _find_missing(plan, out)
    with hold_results(out), StopOnSignal() as stop:
        # Once more: who held the folder before may have finished some.
        records, missing = _find_missing(plan, out)
        for number, (cell, seed) in enumerate(missing):
            name = name_run(cell, seed)
            say(f"{name} ({len(missing) - number} left)")
            records[name] = _run(cell, seed, out / name, plan, device, stop)
            if stop.requested:
                raise StoppedError(name)
    return records


def _find_missing(plan: Plan, out: Path) -> tuple[dict[str, Record], list[tuple[ClaimCell, int]]]:
    """Return the finished records by folder and the runs to do, whose corpus can be opened."""
    runs = list(plan.list_runs())
    records = {
        name: record
        for cell, seed in runs
        if (record := read_finished(out / (name := name_run(cell, seed)))) is not None
    }
    missing = [(cell, seed) for cell, seed in runs if name_run(cell, seed) not in records]
    if any(cell.group == "lm" and cell.model != "all" for cell, _ in missing):
        load_corpus(plan.data, plan.valid_data or None)
    return records, missing


def read_finished(path: Path) -> Record | None:
    """Return the record of a finished run; ``None`` if there is none.

    Raises:
        InputError: if it is damaged.
    """
    if not (path / RECORD_FILE).is_file():
        return None
    record: Record = read_record(path, f"delete {path} to run it again", "status")
    return record if record["status"] == "done" else None


def _run(
    cell: ClaimCell, seed: int, path: Path, plan: Plan, device: str, stop: StopOnSignal
) -> Record:
    """Run a cell with a seed; of its folder only the record is kept."""
    # What an interrupted run left; each takes a minute and starts anew.
    shutil.rmtree(path, ignore_errors=True)
    callbacks = [Abort(stop)]
    try:
        if cell.folder == "sizes":
            _keep(path, seed, "cpu", {"parameters": count_parameters(), "train_s": 0.0})
        elif cell.group == "throughput":
            start = time.perf_counter()
            results = measure_throughput(seed)
            results["train_s"] = round(time.perf_counter() - start, 3)
            _keep(path, seed, "cpu", results)
        elif cell.group == "triple":
            _run_triple(cell, seed, path, device, callbacks)
        elif cell.group == "lm" and cell.model == TRANSFORMER:
            _run_transformer_pilot(seed, path, plan, device, callbacks)
        elif cell.group == "lm":
            _run_pilot(cell, seed, path, plan, device, callbacks)
        elif cell.model == TRANSFORMER:
            _run_transformer_recall(cell, seed, path, device, callbacks)
        else:
            run_recall(build_recipe(cell, seed), out=path, device=device, callbacks=callbacks)
    except KeyboardInterrupt:
        shutil.rmtree(path, ignore_errors=True)
        raise StoppedError(name_run(cell, seed)) from None
    record = read_finished(path)
    assert record is not None, path
    for part in path.iterdir():
        if part.is_dir():
            shutil.rmtree(part)
        elif part.name != RECORD_FILE:
            part.unlink()
    return record


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


def load_pilot(model: str, seed: int, plan: Plan | None = None) -> Recipe:
    """Return the recipe of the byte-level pilot; the Transformer's is that of core."""
    recipe = load_recipe(f"paper-{'core' if model == TRANSFORMER else model}")
    fields: dict[str, Any] = {"train.seed": seed, "eval.sample_bytes": 0}
    if plan is not None:
        fields |= {"data.data": list(plan.data), "data.valid_data": list(plan.valid_data)}
    return replace_fields(recipe, fields)


def _run_pilot(
    cell: ClaimCell,
    seed: int,
    path: Path,
    plan: Plan,
    device: str,
    callbacks: Sequence[TrainerCallback],
) -> None:
    run = prepare_run(load_pilot(cell.model, seed, plan), path, device)
    start_run(run, lambda _: None)
    train_run(run, callbacks=callbacks)
    judge_run(run)


def _run_transformer_pilot(
    seed: int, path: Path, plan: Plan, device: str, callbacks: Sequence[TrainerCallback]
) -> None:
    recipe = load_pilot(TRANSFORMER, seed, plan)
    assert recipe.train.steps is not None
    corpus = load_corpus(plan.data, plan.valid_data or None)
    window_tokens = recipe.data.window_tokens
    windows = WindowDataset(
        corpus.train,
        window_tokens,
        recipe.train.steps * recipe.train.batch_size,
        seed,
        leading_bos=recipe.data.leading_bos,
    )
    config = UniMatrixConfig.preset("core")
    model = _draw(lambda: build_gelu_transformer(config, max_tokens=window_tokens), seed)
    trained = train_model(model, windows, recipe.train, None, callbacks=callbacks, device=device)
    num_windows = recipe.eval.prefix_bytes // window_tokens
    judged = ConsecutiveWindows(corpus.valid, window_tokens, num_windows)
    score = measure_consecutive_windows(model.to(device), judged, batch_size=recipe.eval.batch_size)
    results = {
        "bits_per_byte": score.bits_per_byte,
        "valid_bytes": score.bytes,
        "context": score.context,
        "parameters": model.num_parameters(),
        "train_s": round(trained.train_s, 3),
    }
    facts = {"corpus": {"name": corpus.name, "sha256": corpus.sha256}}
    _keep(path, seed, device, results, **facts)


def _run_transformer_recall(
    cell: ClaimCell, seed: int, path: Path, device: str, callbacks: Sequence[TrainerCallback]
) -> None:
    recipe = replace(build_recipe(cell, seed), preset="core")
    slices = build_slices(recipe)
    config = build_recall_config(recipe, slices)
    (task,) = slices.train
    assert isinstance(task, AssociativeRecall)
    model = _draw(lambda: build_gelu_transformer(config, max_tokens=task.window_tokens), seed)
    num_examples = recipe.steps * recipe.batch_size
    trained = train_model(
        model,
        RotatingDataset(slices.train, seed, num_examples, recipe.batch_size),
        recipe.to_train_section(),
        None,
        callbacks=callbacks,
        device=device,
    )
    results = {
        "task": recipe.task,
        "accuracy": {
            name: measure_recall(
                model.to(device), test, recipe.test_examples, seed + _TEST_SEED_OFFSET
            )
            for name, test in slices.test.items()
        },
        "parameters": model.num_parameters(),
        "train_s": round(trained.train_s, 3),
        "recipe": dataclasses.asdict(recipe) | {"preset": TRANSFORMER},
    }
    _keep(path, seed, device, results)


def _run_triple(
    cell: ClaimCell, seed: int, path: Path, device: str, callbacks: Sequence[TrainerCallback]
) -> None:
    """Train on the rules in turn, the weights carried on; test each rule after its own stage."""
    fields: dict[str, Any] = {"vocab_size": TripleInteraction.vocab_size, "dropout": cell.dropout}
    fields |= {"pad_token_id": 0, "bos_token_id": TripleInteraction.BOS_ID, "eos_token_id": None}
    recipe = RecallRecipe(steps=_STAGE_STEPS, dropout=cell.dropout, seed=seed)
    window_tokens = TripleInteraction.window_tokens
    model: PreTrainedModel
    if cell.model == TRANSFORMER:
        config = UniMatrixConfig(**fields)
        model = _draw(lambda: build_gelu_transformer(config, max_tokens=window_tokens), seed)
    else:
        config = UniMatrixConfig.preset(cell.model, **(fields | cell.overrides))
        model = _draw(lambda: UniMatrixForCausalLM(config), seed)
    accuracy, train_s = {}, 0.0
    for stage, rule in enumerate(TripleInteraction.RULES):
        # Seeds far apart, so that no stage repeats the examples of another.
        task, stage_seed = TripleInteraction(rule), seed + 1000 * stage
        trained = train_model(
            model,
            RotatingDataset((task,), stage_seed, recipe.steps * recipe.batch_size, 32),
            replace(recipe.to_train_section(), seed=stage_seed),
            None,
            callbacks=callbacks,
            device=device,
        )
        train_s += trained.train_s
        accuracy[rule] = measure_recall(
            model.to(device), task, _TRIPLE_EXAMPLES, stage_seed + _TEST_SEED_OFFSET
        )
    results = {
        "task": "triple",
        "accuracy": accuracy,
        "parameters": model.num_parameters(),
        "train_s": round(train_s, 3),
        "recipe": {"model": cell.model, "dropout": cell.dropout, "stage_steps": recipe.steps},
    }
    _keep(path, seed, device, results)


def _draw(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """Return a model with weights drawn from the seed, the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _keep(path: Path, seed: int, device: str, results: dict[str, Any], **facts: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    record = {"status": "done", "seed": seed, **describe_run(device), **facts}
    write_record(path, record | {"results": results})
