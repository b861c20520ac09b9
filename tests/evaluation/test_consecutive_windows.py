import numpy as np
import pytest
from torch.nn.functional import cross_entropy

from tests.train.small_training import build_model, build_text, one_thread
from unimatrix.baselines.transformers_models import build_gelu_transformer
from unimatrix.configuration import UniMatrixConfig
from unimatrix.data import ByteStream, ConsecutiveWindows
from unimatrix.evaluation.bits_per_byte import measure_consecutive_windows
from unimatrix.evaluation.units import to_bits_per_byte
from unimatrix.inference.suspend_training import suspend_training

__all__ = ["one_thread"]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_it_is_the_mean_loss_of_the_windows(batch_size: int) -> None:
    stream = ByteStream.from_bytes(build_text(100), name="words", ends_with_eos=True)
    windows, model = ConsecutiveWindows(stream, 16, 7), build_model()
    model.train()
    score = measure_consecutive_windows(model, windows, batch_size=batch_size)
    assert model.training
    with suspend_training(model):
        losses = [
            cross_entropy(model(item["input_ids"][None]).logits[0], item["shift_labels"]).item()
            for item in (windows[index] for index in range(7))
        ]
    assert score.bits_per_byte == pytest.approx(to_bits_per_byte(sum(losses) / 7, 1), rel=1e-5)
    assert (score.bytes, score.context) == (7 * 16, "consecutive windows of 16")


def test_a_peer_is_judged_alike() -> None:
    stream = ByteStream.from_bytes(build_text(100), name="words", ends_with_eos=True)
    windows = ConsecutiveWindows(stream, 16, 7)
    config = UniMatrixConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    model = build_gelu_transformer(config, max_tokens=16)
    score = measure_consecutive_windows(model, windows, batch_size=3)
    batch = windows.build_batch(np.arange(7))
    with suspend_training(model):
        logits = model(input_ids=batch["input_ids"]).logits
    expected = cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten()).item()
    assert score.bits_per_byte == pytest.approx(to_bits_per_byte(expected, 1), rel=1e-5)
