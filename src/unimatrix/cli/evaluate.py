"""``unimatrix eval``: bits per byte on a corpus."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from unimatrix.cli.common import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    PrimeOption,
    SeedOption,
    WindowOption,
    compare_with_xz,
    emit,
    make_log,
    open_prime,
    pick_device,
)
from unimatrix.errors import InputError, require_choice

if TYPE_CHECKING:
    from unimatrix.data import ByteStream, Corpus
    from unimatrix.data.files import FileKey
    from unimatrix.evaluation.bits_per_byte import BitsPerByte
    from unimatrix.modeling import UniMatrixForCausalLM
    from unimatrix.train.recipe import DataSection

SPLITS = ("train", "valid", "test")


DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Corpus, file, folder or glob; of files all bytes, unless the run was trained on the "
        "same: then its held-out end. Repeatable. \\[default: what a run was trained on]",
    ),
]
ValidDataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--valid-data",
        help="Text that validates instead, all of it; --data may then be left out. Repeatable. "
        "\\[default: the corpus's own split; of files trained on, the last 5 %]",
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="valid, test or train; of files, the last 5 % or the rest. \\[default: valid, or all "
        "of files that were not trained on]",
    ),
]
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
    split: SplitOption = None,
    limit_bytes: LimitOption = None,
    prime: PrimeOption = None,
    window: WindowOption = None,
    compressors: CompressorsOption = False,
    out: OutOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure bits per byte: what the model pays to predict a text, beside xz on the same bytes.

    A file that --data names is measured whole. Where the run was trained on it, its held-out end
    is, as after training; --valid-data measures all of it even so.

    Models without a position table read the whole text with their context carried along; the others
    read it in independent windows of their length, and "context" says so. Nothing is random: --seed
    is taken so that every verb has it, and moves nothing.
    """
    _require_extent(split, limit_bytes)
    place = pick_device(device)

    from unimatrix.hub.load import load_byte_model
    from unimatrix.train.run_folder import (
        create_folder,
        describe_run,
        hash_config,
        require_new_folder,
        write_record,
    )

    if out is not None:
        require_new_folder(out)

    loaded = load_byte_model(model, device=place)
    if window is not None:
        loaded.set_window(window)
    corpus, split = open_corpus(model, data, valid_data, split)
    first = open_prime(prime)
    begun = describe_run(place) | {"config_sha256": hash_config(loaded.config.to_dict())}
    with nullcontext() if out is None else create_folder(out):
        result = _measure(loaded, corpus, split, limit_bytes, first) | {"model": model}
        if compressors:
            result["compressors"] = _compress(_choose_stream(corpus, split), result["bytes"], first)
        if out is not None:
            write_record(out, {"status": "done", **begun, "results": result})
    emit(result, as_json, _render)


def _require_extent(split: str | None, limit_bytes: int | None) -> None:
    """Raise ``InputError`` for a split or a limit that no corpus has."""
    if split is not None:
        require_choice("there is no split", split, SPLITS)
    if limit_bytes is not None and limit_bytes < 1:
        raise InputError(f"limit-bytes is {limit_bytes}; it must be at least 1")


def open_corpus(
    model: str, data: list[str] | None, valid_data: list[str] | None, split: str | None
) -> "tuple[Corpus, str]":
    """Open the corpus to evaluate on and choose the split of it that is measured.

    Without ``data`` and ``valid_data`` the recipe of the run folder names the corpus.

    Returns:
        the corpus and ``train``, ``valid`` or ``test``; or ``all`` for files that the model was not
        trained on, whose bytes are all in the validation split.

    Raises:
        InputError: if there is nothing to evaluate on, or it cannot be opened.
    """
    from unimatrix.data import load_corpus
    from unimatrix.data.corpora import hold_out_end, load_stored_corpus

    trained = _TrainingText.find(model)
    if valid_data:
        trained.warn_of_overlap(valid_data)
        return load_corpus(data or valid_data, valid_data), split or "valid"
    if not data:
        if trained.section is None:
            raise InputError(
                f"{model!r} does not say what it was trained on; name a text with --data"
            )
        corpus = load_stored_corpus(trained.section.data, trained.section.valid_data)
        trained.warn_if_changed(corpus)
        return corpus, split or "valid"
    corpus = load_corpus(data, data)
    if corpus.test is not None:
        return corpus, split or "valid"
    if split is None and not trained.is_same(corpus, data):
        trained.warn_of_overlap(data)
        return corpus, "all"
    corpus = hold_out_end(corpus.train)
    if split is None:
        make_log().print(
            f"{escape(corpus.name)} is what the run was trained on: measuring the last "
            f"{len(corpus.valid):,} bytes, which it was not"
        )
    return corpus, split or "valid"


@dataclass(frozen=True)
class _TrainingText:
    """The text that a model was trained on.

    Attributes:
        section: of the recipe; ``None`` without a run folder.
        sha256: of the corpus; ``None`` without a record.
    """

    section: "DataSection | None" = None
    sha256: str | None = None

    @classmethod
    def find(cls, model: str) -> "_TrainingText":
        """Return what the model's run folder, or that of its checkpoint, says."""
        from unimatrix.hub.load import find_run_recipe
        from unimatrix.train.recipe import load_recipe
        from unimatrix.train.run_folder import RECORD_FILE, read_run

        path = find_run_recipe(model)
        if path is None:
            return cls()
        section = load_recipe(path).data
        if not (path.parent / RECORD_FILE).is_file():
            return cls(section)
        _, record = read_run(path.parent)
        return cls(section, record.get("corpus", {}).get("sha256"))

    def is_same(self, corpus: "Corpus", data: list[str]) -> bool:
        """Whether the model was trained on these bytes but their end, wherever they lie now."""
        from unimatrix.data.corpora import HELD_OUT_ONE_IN, find_corpus_files, hold_out_end

        if self.section is None or self.section.valid_data or len(corpus.train) < HELD_OUT_ONE_IN:
            return False
        if self.sha256 is not None:
            return hold_out_end(corpus.train).sha256 == self.sha256
        return self._list_files().keys() == find_corpus_files(data).keys()

    def warn_if_changed(self, corpus: "Corpus") -> None:
        """Warn of a text that has changed since the run was trained on it."""
        if self.sha256 is not None and corpus.sha256 != self.sha256:
            make_log().print(
                f"the text of {escape(corpus.name)} has changed since the run was trained on it: "
                "what is measured may have been trained on"
            )

    def warn_of_overlap(self, specs: list[str]) -> None:
        """Warn of files that the run was trained on."""
        from unimatrix.data.corpora import find_corpus_files, name_shared

        if shared := name_shared(find_corpus_files(specs), self._list_files()):
            make_log().print(f"{escape(shared)}: measured, and trained on by the run")

    def _list_files(self) -> "dict[FileKey, Path]":
        from unimatrix.data.corpora import find_corpus_files, name_explicitly

        if self.section is None:
            return {}
        try:
            return find_corpus_files(name_explicitly(self.section.data))
        except InputError:
            return {}  # Files that are gone are not measured either.


def _measure(
    model: "UniMatrixForCausalLM",
    corpus: "Corpus",
    split: str,
    limit_bytes: int | None,
    prime: "ByteStream | None",
) -> dict[str, Any]:
    """Measure the model and xz on one split."""
    from unimatrix.evaluation.compressors import measure_xz_bits_per_byte

    stream = _choose_stream(corpus, split)
    start = time.perf_counter()
    score = _measure_visibly(model, stream, limit_bytes, prime)
    seconds = time.perf_counter() - start
    return {
        "bits_per_byte": score.bits_per_byte,
        "xz_bits_per_byte": measure_xz_bits_per_byte(stream, limit_bytes=limit_bytes),
        "bytes": score.bytes,
        "text": stream.name,
        "split": split,
        "split_bytes": len(stream),
        "context": score.context,
        "prime": prime and {"name": prime.name, "bytes": len(prime), "sha256": prime.sha256()},
        "state_bytes": score.state_bytes,
        "window": model.config.automaton_window,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 3),
    }


def _measure_visibly(
    model: "UniMatrixForCausalLM",
    stream: "ByteStream",
    limit_bytes: int | None,
    prime: "ByteStream | None",
) -> "BitsPerByte":
    """Measure the model on a stream, with a progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte

    num_bytes = len(stream) if limit_bytes is None else min(limit_bytes, len(stream))
    log = make_log()
    columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(
        *columns, TimeRemainingColumn(), console=log, transient=True, disable=not log.is_terminal
    ) as progress:
        bar = progress.add_task("measuring", total=num_bytes)
        if prime is not None:
            log.print(f"reading {len(prime):,} bytes first ...")
        return measure_bits_per_byte(
            model,
            stream,
            limit_bytes=limit_bytes,
            prime=prime,
            on_progress=lambda done: progress.update(bar, completed=done),
        )


def _compress(
    stream: "ByteStream", num_bytes: int, prime: "ByteStream | None"
) -> dict[str, dict[str, float]]:
    """Return the bits per byte of each compressor on the same bytes, plain and primed."""
    from unimatrix.evaluation.compressors import list_missing_compressors, measure_compressors

    first = b"" if prime is None else prime.read(0, len(prime)).tobytes()
    scores = measure_compressors(first, {"text": stream.read(0, num_bytes).tobytes()})
    for name, package in list_missing_compressors().items():
        make_log().print(f"{name} is left out: pip install {package} brings it")
    kinds = ("plain",) if prime is None else ("plain", "primed")
    return {
        name: {kind: getattr(by_text["text"], kind) for kind in kinds}
        for name, by_text in scores.items()
    }


def _choose_stream(corpus: "Corpus", split: str) -> "ByteStream":
    """Return the bytes of a split, or raise ``InputError`` if the corpus has none."""
    stream = {"train": corpus.train, "test": corpus.test}.get(split, corpus.valid)
    if stream is None:
        raise InputError(f"corpus {corpus.name!r} has no test split; choose one of train, valid")
    return stream


def _render(result: dict[str, Any]) -> str:
    """Return the result for people."""
    ours, xz = result["bits_per_byte"], result["xz_bits_per_byte"]
    verdict = compare_with_xz(ours, xz, is_primed=result["prime"] is not None)
    extent = "all" if result["bytes"] == result["split_bytes"] else "the first"
    others = [
        f"{name:<13}  {score['plain']:.4f}"
        + (f"   (primed: {score['primed']:.4f})" if "primed" in score else "")
        for name, score in result.get("compressors", {}).items()
    ]
    return "\n".join(
        [
            verdict,
            *others,
            f"text           {extent} {result['bytes']:,} bytes of {result['text']}",
            f"context        {result['context']}, {result['state_bytes']:,} bytes of state",
            f"model          {result['model']}, {result['parameters']:,} parameters",
            f"time           {result['seconds']:.1f} s",
        ]
    )
