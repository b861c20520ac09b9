"""The suffix automaton alone: what it reads, what is said of it, and that it is right."""

import pytest
import torch

from unimatrix.bench import automaton
from unimatrix.bench.automaton import time_automaton
from unimatrix.bench.equivalence import EquivalenceError


def test_every_text_and_length_has_a_row() -> None:
    rows = time_automaton(b"to be or not to be. " * 20, [64, 256], num_rounds=2, budget_s=9.0)
    texts = ["text", "one byte", "Fibonacci word", "de Bruijn", "random bytes"]
    assert [(row["num_tokens"], row["text"]) for row in rows] == [
        (length, text) for length in (64, 256) for text in texts
    ]
    for row in rows:
        assert row["rounds"] == 2
        assert 0 < row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]
        assert row["bytes_per_s"] == pytest.approx(1e3 * row["num_tokens"] / row["median_ms"])
        assert row["state_bytes_per_token"] > 0


def test_the_worst_texts_are_what_they_are_called() -> None:
    write = automaton._WORST
    assert bytes(write["Fibonacci word"](13).tolist()) == b"abaababaabaab"
    assert set(write["one byte"](9).tolist()) == {97}
    for n in (1, 3, 6):
        sequence = write["de Bruijn"](2**n).tolist()
        around = sequence + sequence[: n - 1]
        assert len({tuple(around[i : i + n]) for i in range(2**n)}) == 2**n
    assert write["de Bruijn"](41).tolist() == write["de Bruijn"](64).tolist()[:41]
    assert write["random bytes"](5000).unique().numel() == 256


def test_a_wrong_prediction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = automaton.predict_from_suffix

    def predict_wrongly(ids, *, backend="auto"):
        (predicted, lengths), state = predict(ids, backend=backend)
        return (predicted, lengths + (backend == "auto")), state

    monkeypatch.setattr(automaton, "predict_from_suffix", predict_wrongly)
    with pytest.raises(EquivalenceError, match="suffix automaton: predictions on text differ"):
        time_automaton(b"abcabc" * 20, [100], num_rounds=1, budget_s=9.0)
    assert torch.equal(predict(torch.tensor([[1, 2, 1]]))[0][0], torch.tensor([[-1, -1, 2]]))
