"""The corpora of a comparison."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from unimatrix.data import ByteStream, Corpus, StreamMatches, load_corpus
from unimatrix.errors import InputError
from unimatrix.inference.suffix_matches import match_stream


@dataclass(frozen=True)
class Text:
    """One corpus of a comparison.

    Attributes:
        spec: what the comparison calls it.
        corpus: its splits.
    """

    spec: str
    corpus: Corpus
    _matches: dict[int | None, StreamMatches] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def match_training_text(self, window: int | None) -> StreamMatches:
        """Return what a suffix automaton says of every training token; it reads them once."""
        if window not in self._matches:
            self._matches[window] = match_stream(self.corpus.train, window)
        return self._matches[window]

    def cut_prime(self, num_bytes: int | None) -> ByteStream:
        """Return so many training bytes from the end, ``None`` for all."""
        train = self.corpus.train
        start = 0 if num_bytes is None else max(0, len(train) - num_bytes)
        return train.slice(start, len(train), name=train.name)

    @cached_property
    def slug(self) -> str:
        """A name for folders and tables."""
        return Path(self.spec.partition(":")[0].rstrip("/")).name


def open_texts(specs: Iterable[str]) -> dict[str, Text]:
    """Open the corpora of a comparison; return them by what it calls them.

    Raises:
        InputError: as in ``load_corpus``, or if two would share a folder of results.
    """
    texts = {spec: open_text(spec) for spec in specs}
    by_slug: dict[str, str] = {}
    for spec, text in texts.items():
        other = by_slug.setdefault(text.slug, spec)
        if other != spec:
            raise InputError(
                f"corpora {other!r} and {spec!r} would share the name {text.slug!r}; "
                "rename one of the folders"
            )
    return texts


def open_text(spec: str) -> Text:
    """Open a corpus of a comparison.

    Args:
        spec: what ``--data`` takes in `train`, or a folder with the subfolders ``train``, ``valid``
            and ``test``.

    Raises:
        InputError: as in ``load_corpus``.
    """
    folder = Path(spec).expanduser()
    if all((folder / split).is_dir() for split in ("train", "valid", "test")):
        corpus = load_corpus(folder / "train", folder / "valid")
        test = load_corpus(folder / "train", folder / "test").valid
        return Text(spec, replace(corpus, name=folder.name, test=test))
    return Text(spec, load_corpus(spec))
