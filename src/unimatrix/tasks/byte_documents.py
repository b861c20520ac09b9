"""Documents of bytes as inputs and labels: BOS in front, the last bytes to predict."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.tasks.seeded import IGNORED_LABEL

BYTE_BOS_ID = 257
BYTE_VOCAB_SIZE = 259


def split_answer(documents: NDArray[np.uint8], num_answer_bytes: int) -> dict[str, Tensor]:
    """Turn documents into inputs and labels on the positions that predict their last bytes.

    Args:
        documents: [n, T] uint8.
        num_answer_bytes: how many bytes at the end are the answer.

    Returns:
        ``input_ids`` [n, T] int64: BOS and all bytes but the last. ``shift_labels`` [n, T] int64:
        the bytes of the documents on the last ``num_answer_bytes`` positions, -100 before them.
    """
    input_ids = np.empty(documents.shape, np.int64)
    input_ids[:, 0] = BYTE_BOS_ID
    input_ids[:, 1:] = documents[:, :-1]
    labels = np.full_like(input_ids, IGNORED_LABEL)
    labels[:, -num_answer_bytes:] = documents[:, -num_answer_bytes:]
    return {"input_ids": torch.from_numpy(input_ids), "shift_labels": torch.from_numpy(labels)}
