"""The share of right answers, all and by kind."""

import pytest

from tests.byte_models import build_byte_model
from tests.inference.test_text_reader import INDEXED
from tests.tasks.test_bindings import NAMES, TEXT
from unimatrix.errors import InputError
from unimatrix.evaluation.answers import measure_answers
from unimatrix.inference.text_reader import TextReader
from unimatrix.tasks import NOT_IN_TEXT, ReaderText
from unimatrix.tasks.reader import QUESTION_KINDS


def test_shares_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    task = ReaderText(500, TEXT, NAMES)
    model = build_byte_model("unimatrix", **INDEXED)
    shares = measure_answers(model, task, 4, 0)
    assert shares == dict.fromkeys(["all", *QUESTION_KINDS], 0.0)
    monkeypatch.setattr(TextReader, "_write", lambda *_: NOT_IN_TEXT.encode())
    shares = measure_answers(model, task, 8, 0)
    assert shares == {"all": 0.25, **dict.fromkeys(QUESTION_KINDS, 0.0), "not told": 1.0}


def test_what_cannot_be_measured() -> None:
    task = ReaderText(500, TEXT, NAMES)
    with pytest.raises(InputError, match="num_questions is 3; ask at least 4"):
        measure_answers(build_byte_model("unimatrix", **INDEXED), task, 3, 0)
    with pytest.raises(InputError, match="keeps no index of the text"):
        measure_answers(build_byte_model("core"), task, 4, 0)
