"""A training run from its recipe to a trained model: check, plan, write the folder, train."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from unimatrix.configuration import UniMatrixConfig
from unimatrix.data import (
    ConsecutiveWindows,
    Corpus,
    DocumentWindows,
    StreamMatches,
    WindowDataset,
    load_corpus,
)
from unimatrix.data.corpora import FILE_RULES, load_stored_corpus
from unimatrix.data.indexed import IndexedDataset
from unimatrix.errors import InputError
from unimatrix.hub.load import load_byte_model, load_config, require_byte_level, save_model
from unimatrix.inference.suffix_matches import match_stream
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.tasks import MixedWindows, ReaderText, choose_names
from unimatrix.tasks.reader_wordings import READER
from unimatrix.tasks.wordings import UNSEEN
from unimatrix.tokenization import build_tokenizer
from unimatrix.train.callbacks import NonFiniteError
from unimatrix.train.checkpoints import (
    describe_kept,
    find_last_checkpoint,
    list_checkpoints,
    list_random_states,
)
from unimatrix.train.muon import require_muon
from unimatrix.train.plan import plan_steps
from unimatrix.train.processes import (
    count_processes,
    is_main_process,
    join_processes,
    leave_processes,
    run_in_main,
    share,
)
from unimatrix.train.recipe import ModelSection, Recipe, make_paths_absolute
from unimatrix.train.run_folder import (
    CHECKPOINT_FOLDER,
    RECIPE_FILE,
    create_folder,
    create_numbered_folder,
    hold_folder,
    read_run,
    require_new_folder,
    require_unicode_path,
    start_record,
    trim_metrics,
    write_json,
    write_record,
    writing,
)
from unimatrix.train.trainer import TrainResult, split_batch, train_model

_WARMUP_ITEMS = 10**7
_QUESTION_BYTES = 1000
_DOCUMENT_TEXT_BYTES = 2**26
"""Documents take names and filler from so many bytes at the beginning of the training text."""


@dataclass(kw_only=True, slots=True)
class TrainingRun:
    """A run that is checked and ready to train.

    Attributes:
        recipe: what to do.
        corpus: the text.
        model: the model, before training.
        device: cpu, cuda or mps.
        num_steps: optimiser steps in all; 0 until ``start_run`` has planned a budget in minutes.
        path: the run folder; ``None`` until ``start_run`` has made it.
        record: the content of ``record.json``.
        matches: predictions of the suffix automaton for the training text, which the first call of
            ``cut_windows`` computes for a recipe with ``data.carried_automaton``.
    """

    recipe: Recipe
    corpus: Corpus
    model: UniMatrixForCausalLM
    device: str
    num_steps: int
    path: Path | None
    record: dict[str, Any]
    matches: StreamMatches | None = None

    def cut_windows(self, num_windows: int) -> IndexedDataset:
        """Return ``num_windows`` windows of the training text, drawn from the recipe's seed.

        ``data.document_share`` of them are generated documents with its names and words.
        """
        if self.recipe.data.carried_automaton and self.matches is None:
            self.matches = match_stream(self.corpus.train, self.model.config.automaton_window)
        return _cut_windows(self.recipe, self.corpus, num_windows, self.matches)


def prepare_run(recipe: Recipe, out: Path | None, device: str) -> TrainingRun:
    """Check a new run to its last detail; nothing is written.

    Without ``out``, ``start_run`` chooses the name of the folder.

    Raises:
        InputError: for a budget, corpus, model, batch or folder that would stop the run later.
    """
    join_processes(device)
    if (recipe.train.steps is None) == (recipe.train.minutes is None):
        raise InputError(
            "the recipe has no training budget; give --minutes N for wall-clock or --steps N"
        )
    if out is not None:
        require_unicode_path(out)
        run_in_main(lambda: require_new_folder(out, resumable=True))
    model = build_model(recipe.model, recipe.train.seed)
    corpus = _open_corpus(recipe, model)
    return TrainingRun(
        recipe=make_paths_absolute(recipe),
        corpus=corpus,
        model=model,
        device=device,
        num_steps=recipe.train.steps or 0,
        path=out,
        record={},
    )


def prepare_resumed_run(run: Path, device: str) -> TrainingRun:
    """Check an interrupted run and set its number of threads; nothing is written.

    The caller holds the folder ``run`` until the run ends (``hold_run``).

    Raises:
        InputError: if there is no such run, it is finished, or its corpus has changed.
    """
    join_processes(device)
    recipe, record = read_run(run)
    if record["status"] == "done":
        raise InputError(
            f"{run} is finished after {record['num_optim_steps']} steps; train it further with "
            f"--init {run}"
        )
    # The rounding of sums depends on how they are split over threads.
    torch.set_num_threads(record["hardware"]["num_threads"])
    model = _rebuild_model(run, recipe)
    corpus = _reopen_corpus(recipe, model, record["corpus"])
    if corpus.sha256 != record["corpus"]["sha256"]:
        raise InputError(
            f"the text of {corpus.name} has changed since {run} began; resuming is exact only on "
            "the same bytes, so start a new run"
        )
    return TrainingRun(
        recipe=recipe,
        corpus=corpus,
        model=model,
        device=device,
        num_steps=record["num_optim_steps"],
        path=run,
        record=record,
    )


def start_run(run: TrainingRun, say: Callable[[str], None]) -> None:
    """Turn a budget in minutes into steps, then create the run folder with recipe and record.

    Sets number of steps, path and record of ``run``; ``say`` is called with sentences on the plan.
    """
    train, seconds_per_step = run.recipe.train, None
    if train.num_threads is not None:
        torch.set_num_threads(train.num_threads)
    if train.minutes is not None:
        say(f"timing a few steps to plan {train.minutes:g} min of training ...")
        windows = run.cut_windows(_WARMUP_ITEMS)
        plan = share(plan_steps(run.model, windows, train, device=run.device))
        run.num_steps, seconds_per_step = plan.num_steps, plan.seconds_per_step
        say(
            f"{seconds_per_step * 1000:.1f} ms a step on {plan.num_threads} CPU thread(s): "
            f"{run.num_steps:,} steps fit {train.minutes:g} min; set-up and validation come on top"
        )
    run.record = start_record(run.recipe, run.model.config.to_dict(), run.device) | {
        "num_optim_steps": run.num_steps,
        "planned_s_per_step": seconds_per_step,
        "num_processes": count_processes(),
        "backends": {"all": "torch.compile"}
        if run.recipe.train.compile
        else run.model.name_backends(run.recipe.data.window_tokens, run.device),
        "corpus": {
            "name": run.corpus.name,
            "sha256": run.corpus.sha256,
            "file_rules": FILE_RULES,
            "train_bytes": len(run.corpus.train),
            "valid_bytes": len(run.corpus.valid),
        },
    }
    share(None)  # A barrier: every process checks the folder before one makes it.
    run.path = run_in_main(lambda: _write_folder(run))


def _write_folder(run: TrainingRun) -> Path:
    """Create the run folder with all that is known before the first step; return its path."""
    title = f"{run.recipe.model.preset or 'tuned'}-{run.corpus.name}"
    path = run.path or create_numbered_folder(title)
    with create_folder(path), writing(path, path.parent):
        run.model.config.save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        write_json(path / RECIPE_FILE, run.recipe.to_dict())
        write_record(path, run.record)
    return path


@contextlib.contextmanager
def hold_run(path: Path) -> Iterator[None]:
    """Keep other runs from writing to a run's folder; the main process holds it for the others.

    Raises:
        InputError: in every process, if another run is writing there.
    """
    with contextlib.ExitStack() as held:
        run_in_main(lambda: held.enter_context(hold_folder(path)))
        yield


def train_run(
    run: TrainingRun,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    on_metrics: Callable[[dict[str, float]], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> TrainResult:
    """Train, from the last checkpoint where there is one, and save the model.

    Args:
        run: started or resumed.
        callbacks, on_metrics: as in ``train_model``.
        say: called with sentences on where the training begins.

    Raises:
        InputError: if its folder is in use, or has checkpoints and none is whole; or if the text
            can no longer be read, which the record then says.
        NonFiniteError: as in ``train_model``; the record says so.
        WriteError: as in ``train_model``.
    """
    assert run.path is not None
    with hold_run(run.path):
        checkpoint = find_last_checkpoint(run.path, say)
        first_step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        begin = f", continuing checkpoint {first_step}" if first_step else ""
        say(f"training {run.num_steps:,} steps on {run.corpus.name} into {run.path}{begin}")
        before = count_processes() if checkpoint is None else len(list_random_states(checkpoint))
        if before != count_processes():
            say(
                f"{checkpoint} is of {before} process(es), and {count_processes()} go on: dropout "
                "draws other numbers than in an unbroken run"
            )
        if is_main_process():
            trim_metrics(run.path, first_step)
        result = _train(run, run.path, checkpoint, callbacks, on_metrics)
        if is_main_process():
            if not result.interrupted:
                save_model(run.model, run.path)
            trained_s = run.record.get("train_s", 0.0) + result.train_s
            status = "interrupted" if result.interrupted else "trained"
            run.record |= {"status": status, "train_s": round(trained_s, 3)}
            write_record(run.path, run.record)
        leave_processes()
    return result


def _train(
    run: TrainingRun,
    path: Path,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
    on_metrics: Callable[[dict[str, float]], None] | None,
) -> TrainResult:
    """Train; an error names the checkpoint that is left, and is written into the record."""
    settings = replace(run.recipe.train, minutes=None, steps=run.num_steps)
    try:
        return train_model(
            run.model,
            run.cut_windows(run.num_steps * settings.batch_size),
            settings,
            path,
            checkpoint=checkpoint,
            callbacks=callbacks,
            device=run.device,
            on_metrics=on_metrics,
        )
    except (NonFiniteError, InputError) as error:
        explained = type(error)(f"{error}; {describe_kept(path / CHECKPOINT_FOLDER)}")
        if is_main_process():
            write_record(path, run.record | {"status": "failed", "error": str(explained)})
        raise explained from error


def build_model(section: ModelSection, seed: int) -> UniMatrixForCausalLM:
    """Build a preset with fresh weights, or load the weights to start from.

    Fresh weights depend on ``seed`` alone; the global generator is left as it was.

    Raises:
        InputError: for an unusable preset, override or saved model, or one that is not byte-level.
    """
    if section.init is not None:
        return load_byte_model(section.init)
    assert section.preset is not None
    model = _draw_model(UniMatrixConfig.preset(section.preset, **section.overrides), seed)
    require_byte_level(model, section.preset)
    return model


def require_room(config: UniMatrixConfig, window_tokens: int) -> None:
    """Raise ``InputError`` if a window is longer than the model's position table, if it has one."""
    rows = config.max_position_embeddings
    if rows is not None and window_tokens > rows:
        raise InputError(
            f"data.window_tokens is {window_tokens} and the model's position table has {rows} rows;"
            " add --set model.max_position_embeddings=none, which drops the table"
        )


def _draw_model(config: UniMatrixConfig, seed: int) -> UniMatrixForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UniMatrixForCausalLM(config)


def _rebuild_model(run: Path, recipe: Recipe) -> UniMatrixForCausalLM:
    """Build the model of an interrupted run, whose checkpoint, if any, will set the weights."""
    if recipe.model.init is not None and not list_checkpoints(run / CHECKPOINT_FOLDER):
        return build_model(recipe.model, recipe.train.seed)
    return _draw_model(load_config(run), recipe.train.seed)


def _reopen_corpus(recipe: Recipe, model: UniMatrixForCausalLM, recorded: dict[str, Any]) -> Corpus:
    """Open the corpus of a run that has begun, by the rules for finding files of its release."""
    if "file_rules" not in recorded:  # A release before the rules were counted.
        corpus = _open_corpus(recipe, model, load=partial(load_stored_corpus, as_before=True))
        if corpus.sha256 == recorded["sha256"]:
            return corpus
    return _open_corpus(recipe, model, load=load_stored_corpus)


def _open_corpus(
    recipe: Recipe, model: UniMatrixForCausalLM, load: Callable[..., Corpus] = load_corpus
) -> Corpus:
    """Open the corpus and check that windows, model and processes fit each other."""
    require_room(model.config, recipe.data.window_tokens)
    if recipe.data.carried_automaton and model.config.residual_path != "suffix_automaton":
        raise InputError(
            "data.carried_automaton is true and the model has no suffix automaton (residual_path "
            f"is {model.config.residual_path!r}); leave it out"
        )
    if recipe.eval.prime_bytes and model.config.max_position_embeddings is not None:
        raise InputError(
            f"eval.prime_bytes is {recipe.eval.prime_bytes} and the model has a position table, "
            "which reads nothing before its window; leave eval.prime_bytes out"
        )
    if recipe.data.documents == "packed" and recipe.train.compile:
        raise InputError(
            "train.compile is true and data.documents is 'packed'; every batch has documents of "
            "other lengths, which no graph can hold, so leave one of them out"
        )
    split_batch(recipe.train)
    if recipe.train.optimizer == "muon":
        require_muon()
    if recipe.eval.questions and model.config.associative_memory != "indexed":
        raise InputError(
            f"eval.questions is {recipe.eval.questions} and the model keeps no index of the text "
            "to answer from; leave it out, or add --set model.associative_memory=indexed"
        )
    corpus = load(recipe.data.data, recipe.data.valid_data or None)
    _cut_windows(recipe, corpus, 1)
    if recipe.eval.questions:
        build_question_tasks(corpus)
    if recipe.eval.protocol == "windows":
        ConsecutiveWindows(corpus.valid, recipe.data.window_tokens, 1)
    return corpus


def _cut_windows(
    recipe: Recipe, corpus: Corpus, num_windows: int, matches: StreamMatches | None = None
) -> IndexedDataset:
    cut = (corpus.train, recipe.data.window_tokens, num_windows, recipe.train.seed)
    if recipe.data.documents == "packed":
        return DocumentWindows(*cut)
    windows = WindowDataset(
        *cut,
        leading_bos=recipe.data.leading_bos,
        matches=matches,
    )
    if recipe.data.document_share == 0:
        return windows
    text = corpus.train.read(0, min(len(corpus.train), _DOCUMENT_TEXT_BYTES))
    names, weight = choose_names(text, tests=False), recipe.data.answer_weight
    task = ReaderText(recipe.data.window_tokens, text, names, answer_weight=weight)
    return MixedWindows(windows, task, recipe.data.document_share)


def build_question_tasks(corpus: Corpus) -> dict[str, ReaderText]:
    """Return what a trained reader is asked about: validation text, names never trained on.

    Returns:
        ``grammar``, with the sentences of training, and ``unseen``, with sentences held out.

    Raises:
        InputError: if the text is too short, or has too few words for names.
    """
    text = corpus.valid.read(0, min(len(corpus.valid), _DOCUMENT_TEXT_BYTES))
    trained = corpus.train.read(0, min(len(corpus.train), _DOCUMENT_TEXT_BYTES))
    names = choose_names(trained, tests=True)
    wordings = {"grammar": READER.bindings, "unseen": UNSEEN._replace(kinds=READER.bindings.kinds)}
    return {
        name: ReaderText(_QUESTION_BYTES, text, names, chosen) for name, chosen in wordings.items()
    }
