"""What a trained model is worth: bits per byte beside xz, and a sample of what it writes."""

import time
from typing import Any

from unimatrix.data import ByteStream, ConsecutiveWindows, Corpus
from unimatrix.evaluation.answers import measure_answers
from unimatrix.evaluation.bits_per_byte import (
    BitsPerByte,
    measure_bits_per_byte,
    measure_consecutive_windows,
)
from unimatrix.evaluation.compressors import measure_xz_bits_per_byte
from unimatrix.inference.generation import generate_bytes
from unimatrix.inference.sampling import Sampling
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.train.recipe import EvalSection
from unimatrix.train.run import TrainingRun, build_question_tasks
from unimatrix.train.run_folder import hold_folder, write_record

_SAMPLE_PROMPT_BYTES = 48


def judge_run(run: TrainingRun) -> dict[str, Any]:
    """Validate the trained model beside xz, let it write, and complete the record."""
    assert run.path is not None
    with hold_folder(run.path):
        start = time.perf_counter()
        settings = run.recipe.eval
        run.model.eval()
        score = judge_model(run.model, run.corpus, settings, run.recipe.data.window_tokens)
        sample = draw_sample(run.model, run.corpus, settings, run.recipe.train.seed)
        results: dict[str, Any] = {
            "bits_per_byte": score.bits_per_byte,
            "xz_bits_per_byte": measure_xz_bits_per_byte(run.corpus.valid, limit_bytes=score.bytes),
            "valid_bytes": score.bytes,
            "context": score.context,
            "prime_bytes": min(settings.prime_bytes, len(run.corpus.train)),
            "state_bytes": score.state_bytes,
            "eval_s": round(time.perf_counter() - start, 3),
            "answers": judge_answers(run.model, run.corpus, settings.questions),
            "parameters": sum(p.numel() for p in run.model.parameters()),
        }
        run.record |= {"status": "done", "results": results}
        write_record(run.path, run.record)
    tokens = run.num_steps * run.recipe.train.batch_size * run.recipe.data.window_tokens
    return {
        **results,
        "run": str(run.path),
        "data": list(run.recipe.data.data),
        "document_share": run.recipe.data.document_share,
        "prime": _name_prime(run),
        "optim_steps": run.num_steps,
        "tokens": tokens,
        "train_s": run.record["train_s"],
        "sample": sample,
    }


def judge_model(
    model: UniMatrixForCausalLM, corpus: Corpus, settings: EvalSection, window_tokens: int
) -> BitsPerByte:
    """Measure bits per byte on the first bytes of the validation split, by the protocol."""
    num_bytes = min(settings.prefix_bytes, len(corpus.valid))
    if settings.protocol == "carried":
        prime = _cut_prime(corpus, settings)
        return measure_bits_per_byte(model, corpus.valid, limit_bytes=num_bytes, prime=prime)
    windows = ConsecutiveWindows(corpus.valid, window_tokens, max(1, num_bytes // window_tokens))
    return measure_consecutive_windows(model, windows, batch_size=settings.batch_size)


def judge_answers(
    model: UniMatrixForCausalLM, corpus: Corpus, num_questions: int
) -> dict[str, Any] | None:
    """Ask a reader about documents with names and text it was not trained on.

    Returns:
        the shares of right answers of ``measure_answers`` in the words of training (``grammar``)
        and in others (``unseen``), half of the questions each; ``None`` without questions.
    """
    if num_questions == 0:
        return None
    tasks = build_question_tasks(corpus)
    return {
        name: measure_answers(model, task, num_questions // 2, seed=0)
        for name, task in tasks.items()
    }


def draw_sample(
    model: UniMatrixForCausalLM, corpus: Corpus, settings: EvalSection, seed: int
) -> dict[str, str] | None:
    """Let the model continue the first bytes of the validation split.

    Returns:
        the prompt and its continuation; ``None`` if the recipe wants no sample.
    """
    num_bytes = settings.sample_bytes
    if num_bytes == 0:
        return None
    prompt = corpus.valid.read(0, min(_SAMPLE_PROMPT_BYTES, len(corpus.valid))).tobytes()
    rows = model.config.max_position_embeddings
    if rows is not None:
        num_bytes = min(num_bytes, max(1, rows // 2))
        prompt = prompt[: max(0, rows - num_bytes - 1)]
    written = generate_bytes(
        model,
        prompt,
        max_new_bytes=num_bytes,
        prime=_cut_prime(corpus, settings),
        sampling=Sampling(seed=seed),
    )
    return {
        "prompt": prompt.decode("utf-8", "replace"),
        "continuation": written.data.decode("utf-8", "replace"),
    }


def _name_prime(run: TrainingRun) -> list[str]:
    """Return the ``--prime`` arguments by which ``eval`` reads the same text first; or none.

    ``--prime`` reads whole files. So there are arguments only where all of the training text is
    read first, and where the validation text is no part of the same files.
    """
    whole = 0 < len(run.corpus.train) <= run.recipe.eval.prime_bytes
    return list(run.recipe.data.data) if whole and run.recipe.data.valid_data else []


def _cut_prime(corpus: Corpus, settings: EvalSection) -> ByteStream | None:
    """Return the end of the training text that is read before the validation text, if any."""
    start = max(0, len(corpus.train) - settings.prime_bytes)
    if start == len(corpus.train):
        return None
    return corpus.train.slice(start, len(corpus.train), name="the end of the training text")
