"""Milliseconds of a train step: forward, backward, AdamW; models interleaved in one run."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from unimatrix.baselines.llama import build_llama
from unimatrix.configuration import UniMatrixConfig
from unimatrix.modeling import UniMatrixForCausalLM

BASELINE = "llama-sdpa"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTiming:
    """How long one model's train step took.

    Attributes:
        model: a preset, or the baseline's name.
        num_tokens: T, tokens a sequence.
        batch_size: B, sequences a step.
        parameters: number of parameters.
        median_ms: median over the rounds.
        fastest_ms: fastest round.
        slowest_ms: slowest round.
        ratio: median over the rounds of this model's time over the baseline's in the same round.
    """

    model: str
    num_tokens: int
    batch_size: int
    parameters: int
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    ratio: float


def time_train_steps(
    presets: Sequence[str],
    num_tokens: int,
    batch_size: int,
    *,
    num_rounds: int,
    seed: int,
    on_round: Callable[[int], None] = lambda _: None,
) -> list[StepTiming]:
    """Time the train step of presets and of a Llama of the same width and depth.

    Dropout is 0 on both sides, weights and activations are float32, and no model has a position
    table. Rounds interleave the models, so a machine whose speed drifts slows all of them.

    Args:
        presets: names of presets, at their published size.
        num_tokens: T.
        batch_size: B.
        num_rounds: rounds counted, after two that are not.
        seed: of weights and tokens.
        on_round: called with the number of rounds finished.

    Returns:
        one timing a preset, and the baseline's last.
    """
    torch.manual_seed(seed)
    models: dict[str, nn.Module] = {
        name: UniMatrixForCausalLM(
            UniMatrixConfig.preset(name, max_position_embeddings=None, dropout=0.0)
        )
        for name in presets
    }
    models[BASELINE] = build_llama(UniMatrixConfig(), max_tokens=num_tokens)
    vocab_size = UniMatrixConfig().vocab_size
    ids = torch.randint(0, vocab_size, (batch_size, num_tokens))
    rounds = _run_rounds(models, ids, num_rounds + 2, on_round)[2:]
    timings = []
    for name, model in models.items():
        milliseconds = [times[name] * 1e3 for times in rounds]
        timings.append(
            StepTiming(
                model=name,
                num_tokens=num_tokens,
                batch_size=batch_size,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                median_ms=statistics.median(milliseconds),
                fastest_ms=min(milliseconds),
                slowest_ms=max(milliseconds),
                ratio=statistics.median(times[name] / times[BASELINE] for times in rounds),
            )
        )
    return timings


def _run_rounds(
    models: Mapping[str, nn.Module],
    ids: torch.Tensor,
    num_rounds: int,
    on_round: Callable[[int], None],
) -> list[dict[str, float]]:
    """Return the seconds of each model in each round."""
    optimizers = {
        name: torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        for name, model in models.items()
    }
    rounds = []
    for index in range(num_rounds):
        seconds = {}
        for name, model in models.items():
            start = time.perf_counter()
            # Both take unshifted labels; the baseline and ours drop the same last position.
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            seconds[name] = time.perf_counter() - start
        rounds.append(seconds)
        on_round(index + 1)
    return rounds
