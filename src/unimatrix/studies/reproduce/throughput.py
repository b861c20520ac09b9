"""Tokens a second of a forward pass by length, models interleaved."""

import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from unimatrix.baselines.transformers_models import build_gelu_transformer
from unimatrix.configuration import UniMatrixConfig
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.modeling import UniMatrixForCausalLM

LENGTHS = (64, 128, 256, 512)
"""Tokens of a sequence, as in the paper."""
BATCH_SIZE = 8
_PRESETS = ("core", "rosa", "discovery", "sparsepointer")
_UNTIMED_ROUNDS = 2
_ROUNDS = 9


def measure_throughput(seed: int, *, num_rounds: int = _ROUNDS) -> dict[str, Any]:
    """Time forward passes of the published presets and of the paper's Transformer.

    Rounds interleave the models, so a machine whose speed drifts slows all of them; the figures are
    medians, ratios those of times in the same round.

    Source: paper, throughput by length: batch 8, lengths 64 to 512, forward only.

    Args:
        seed: of weights and tokens.
        num_rounds: rounds that count.

    Returns:
        ``tokens_per_s`` by model and length, ``ratio_at_128`` to the Transformer, and ``flatness``:
        tokens a second at the longest length over those at the shortest.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models: dict[str, PreTrainedModel] = {
            name: UniMatrixForCausalLM(UniMatrixConfig.preset(name, max_position_embeddings=None))
            for name in _PRESETS
        }
        models["transformer"] = build_gelu_transformer(UniMatrixConfig(), max_tokens=max(LENGTHS))
        ids = torch.randint(0, 256, (BATCH_SIZE, max(LENGTHS)))
    cells = [(length, name) for length in LENGTHS for name in models]
    rounds = [
        {(n, name): _time_forward(models[name], ids[:, :n].contiguous()) for n, name in cells}
        for _ in range(num_rounds + _UNTIMED_ROUNDS)
    ][_UNTIMED_ROUNDS:]
    tokens_per_s = {
        name: {
            str(n): round(BATCH_SIZE * n / statistics.median(each[n, name] for each in rounds), 1)
            for n in LENGTHS
        }
        for name in models
    }
    first, last = str(LENGTHS[0]), str(LENGTHS[-1])
    return {
        "tokens_per_s": tokens_per_s,
        "ratio_at_128": {
            name: statistics.median(each[128, "transformer"] / each[128, name] for each in rounds)
            for name in models
        },
        "flatness": {name: speeds[last] / speeds[first] for name, speeds in tokens_per_s.items()},
        "threads": torch.get_num_threads(),
    }


def _time_forward(model: PreTrainedModel, ids: torch.Tensor) -> float:
    with suspend_training(model):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        return time.perf_counter() - start
