"""The paper's validation: the mean loss over consecutive windows of the training length."""

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from unimatrix.data import ConsecutiveWindows
from unimatrix.evaluation.bits_per_byte import BitsPerByte
from unimatrix.evaluation.units import to_bits_per_byte
from unimatrix.inference.suspend_training import suspend_training


def measure_consecutive_windows(
    model: PreTrainedModel, windows: ConsecutiveWindows, *, batch_size: int = 16
) -> BitsPerByte:
    """Predict the T labels of each window from the T tokens beside them, every window afresh.

    Source: paper, validation of the byte-level WikiText-2 recipe.

    Args:
        model: a byte-level causal language model, on the device it is to run on.
        windows: what to predict; the first window starts with BOS, the others with a byte.
        batch_size: windows of one forward pass; moves the result by rounding only.
    """
    nats, num_labels = 0.0, 0
    with suspend_training(model):
        for batch in DataLoader(windows, batch_size=batch_size):
            placed = {name: tensor.to(model.device) for name, tensor in batch.items()}
            # Models of transformers compute a loss only where there are labels.
            loss = model(**placed, labels=placed["shift_labels"], use_cache=False).loss
            assert isinstance(loss, torch.Tensor)
            nats += loss.item() * batch["shift_labels"].numel()
            num_labels += batch["shift_labels"].numel()
    context = f"consecutive windows of {windows.window_tokens}"
    return BitsPerByte(to_bits_per_byte(nats, num_labels), num_labels, context)
