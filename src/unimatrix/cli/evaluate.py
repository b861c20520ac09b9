"""``unimatrix eval``: bits per byte on a corpus."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimatrix.cli.common import (
    DeviceOption,
    JsonOption,
    PrimeOption,
    SeedOption,
    emit,
    make_log,
    open_prime,
    pick_device,
)
from unimatrix.errors import InputError, suggest

if TYPE_CHECKING:
    from unimatrix.data import ByteStream, Corpus
    from unimatrix.modeling import UniMatrixForCausalLM

SPLITS = ("train", "valid", "test")


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Run folder, checkpoint or saved model.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Corpus, file, folder or glob. Repeatable. \\[default: what a run was trained on]",
    ),
]
ValidDataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--valid-data",
        help="Text that validates instead, all of it; --data may then be left out. Repeatable. "
        "\\[default: the corpus's own split; of files, the last 5 %]",
    ),
]
SplitOption = Annotated[str, typer.Option("--split", help="valid, test or train.")]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit-bytes", help="Measure the first so many bytes. \\[default: all]"),
]
CompressorsOption = Annotated[
    bool,
    typer.Option(
        "--compressors",
        help="Compress the same bytes with xz, zstd and PPMd too, plain and after --prime.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder to create, with the result in record.json.")
]


def run(
    model: ModelArgument,
    *,
    data: DataOption = None,
    valid_data: ValidDataOption = None,
    split: SplitOption = "valid",
    limit_bytes: LimitOption = None,
    prime: PrimeOption = None,
    compressors: CompressorsOption = False,
    out: OutOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure bits per byte: what the model pays to predict a text, beside xz on the same bytes.

    Models without a position table read the whole text with their context carried along; the others
    read it in independent windows of their length, and "context" says so. Nothing is random: --seed
    is taken so that every verb has it, and moves nothing.
    """
    if split not in SPLITS:
        raise InputError(
            f"there is no split {split!r}; choose one of {', '.join(SPLITS)}."
            f"{suggest(split, SPLITS)}"
        )
    if limit_bytes is not None and limit_bytes < 1:
        raise InputError(f"limit-bytes is {limit_bytes}; it must be at least 1")
    place = pick_device(device)

    from unimatrix.checkpoints import load_model, require_byte_level
    from unimatrix.run_folder import describe_run, hash_config, require_new_folder, write_record

    if out is not None:
        require_new_folder(out, resumable=False)

    loaded = load_model(model, device=place).model
    require_byte_level(loaded, model)
    corpus = open_corpus(model, data, valid_data)
    first = open_prime(prime)
    begun = describe_run(place) | {"config_sha256": hash_config(loaded.config.to_dict())}
    result = _measure(loaded, corpus, split, limit_bytes, first) | {"model": model}
    if compressors:
        result["compressors"] = _compress(_choose_stream(corpus, split), result["bytes"], first)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_record(out, {"status": "done", **begun, "results": result})
    emit(result, as_json, _render)


def open_corpus(model: str, data: list[str] | None, valid_data: list[str] | None) -> "Corpus":
    """Open the corpus to evaluate on.

    Args:
        model: a run folder, whose recipe names the corpus where nothing else does.
        data: corpus, files, folders or globs.
        valid_data: validation text; alone, it is the whole corpus.

    Raises:
        InputError: if there is nothing to evaluate on, or it cannot be opened.
    """
    from unimatrix.checkpoints import find_recipe
    from unimatrix.data import load_corpus
    from unimatrix.recipe import load_recipe

    if data or valid_data:
        return load_corpus(data or valid_data or [], valid_data or None)
    recipe_path = find_recipe(model)
    if recipe_path is None:
        raise InputError(f"{model!r} does not say what it was trained on; name a text with --data")
    section = load_recipe(recipe_path).data
    return load_corpus(section.data, section.valid_data or None)


def _measure(
    model: "UniMatrixForCausalLM",
    corpus: "Corpus",
    split: str,
    limit_bytes: int | None,
    prime: "ByteStream | None",
) -> dict[str, Any]:
    """Measure the model and xz on one split, with a progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte
    from unimatrix.evaluation.compressors import measure_xz_bits_per_byte

    stream = _choose_stream(corpus, split)
    num_bytes = len(stream) if limit_bytes is None else min(limit_bytes, len(stream))
    log = make_log()
    columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(
        *columns, TimeRemainingColumn(), console=log, transient=True, disable=not log.is_terminal
    ) as progress:
        bar = progress.add_task("measuring", total=num_bytes)
        if prime is not None:
            log.print(f"reading {len(prime):,} bytes first ...")
        start = time.perf_counter()
        score = measure_bits_per_byte(
            model,
            stream,
            limit_bytes=limit_bytes,
            prime=prime,
            on_progress=lambda done: progress.update(bar, completed=done),
        )
        seconds = time.perf_counter() - start
    return {
        "bits_per_byte": score.bits_per_byte,
        "xz_bits_per_byte": measure_xz_bits_per_byte(stream, limit_bytes=limit_bytes),
        "bytes": score.bytes,
        "split": split,
        "split_bytes": len(stream),
        "context": score.context,
        "prime": prime and {"name": prime.name, "bytes": len(prime), "sha256": prime.sha256()},
        "state_bytes": score.state_bytes,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 3),
    }


def _compress(
    stream: "ByteStream", num_bytes: int, prime: "ByteStream | None"
) -> dict[str, dict[str, float]]:
    """Return bits per byte of the bytes judged, plain and primed, by compressor."""
    from unimatrix.evaluation.compressors import list_missing_compressors, measure_compressors

    first = b"" if prime is None else prime.read(0, len(prime)).tobytes()
    scores = measure_compressors(first, {"text": stream.read(0, num_bytes).tobytes()})
    for name, package in list_missing_compressors().items():
        make_log().print(f"{name} is left out: pip install {package} brings it")
    kept = ("plain",) if prime is None else ("plain", "primed")
    return {
        name: {kind: getattr(by_text["text"], kind) for kind in kept}
        for name, by_text in scores.items()
    }


def _choose_stream(corpus: "Corpus", split: str) -> "ByteStream":
    """Return the bytes of a split, or raise ``InputError`` if the corpus has none."""
    streams = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
    stream = streams[split]
    if stream is None:
        there = ", ".join(name for name, part in streams.items() if part is not None)
        raise InputError(f"corpus {corpus.name!r} has no {split} split; choose one of {there}")
    return stream


def _render(result: dict[str, Any]) -> str:
    """Return the result for people."""
    ours, xz = result["bits_per_byte"], result["xz_bits_per_byte"]
    verdict = "beaten" if ours < xz else "not beaten"
    if result["prime"] is not None:
        verdict = "which read nothing before"
    whole = result["bytes"] == result["split_bytes"]
    extent = "all" if whole else "the first"
    others = [
        f"{name:<13}  {score['plain']:.4f}"
        + (f"   (primed: {score['primed']:.4f})" if "primed" in score else "")
        for name, score in result.get("compressors", {}).items()
    ]
    return "\n".join(
        [
            f"bits per byte  {ours:.4f}   (xz -9e: {xz:.4f}, {verdict})",
            *others,
            f"text           {extent} {result['bytes']:,} bytes of {result['corpus']}, "
            f"{result['split']} split",
            f"context        {result['context']}, {result['state_bytes']:,} bytes of state",
            f"model          {result['model']}, {result['parameters']:,} parameters",
            f"time           {result['seconds']:.1f} s",
        ]
    )
