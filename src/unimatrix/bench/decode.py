"""Microseconds of a token through ``generate``, greedy; models interleaved in one run."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unimatrix.baselines.llama import build_llama
from unimatrix.bench.train_step import BASELINE
from unimatrix.configuration import UniMatrixConfig
from unimatrix.modeling import UniMatrixForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTiming:
    """How long one model takes for a new token.

    Attributes:
        model: a preset, or the baseline's name.
        prompt_tokens: tokens read before.
        new_tokens: tokens timed a round.
        batch_size: B, streams at once.
        parameters: number of parameters.
        median_us: median over the rounds, of one token of all streams.
        fastest_us: fastest round.
        slowest_us: slowest round.
        speedup: median over the rounds of the baseline's time over this model's in the same round.
    """

    model: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    parameters: int
    median_us: float
    fastest_us: float
    slowest_us: float
    speedup: float


def time_decoding(
    presets: Sequence[str],
    prompt_tokens: int,
    batch_size: int,
    *,
    new_tokens: int = 256,
    num_rounds: int,
    seed: int,
    on_round: Callable[[int], None] = lambda _: None,
) -> list[DecodeTiming]:
    """Time the tokens after a prompt, for presets and a Llama of the same width and depth.

    A round is the time of ``generate`` with so many new tokens and one more, less that with one,
    which is the reading of the prompt. What ``generate`` sets up to decode is in it, compiling is
    not. Both keep a cache and neither ends early.

    Args:
        presets: names of presets, at their published size without a position table.
        prompt_tokens: tokens of the prompt.
        batch_size: B.
        new_tokens: tokens timed.
        num_rounds: rounds counted, after one that is not.
        seed: of weights and prompt.
        on_round: called with the number of rounds finished.

    Returns:
        one timing a preset, and the baseline's last.
    """
    torch.manual_seed(seed)
    models: dict[str, Any] = {
        name: UniMatrixForCausalLM(UniMatrixConfig.preset(name, max_position_embeddings=None))
        for name in presets
    }
    config = UniMatrixConfig()
    models[BASELINE] = build_llama(config, max_tokens=prompt_tokens + new_tokens + 1)
    for model in models.values():
        model.eval()
        model.generation_config.eos_token_id = None
    ids = torch.randint(0, config.vocab_size, (batch_size, prompt_tokens))
    rounds = []
    for index in range(num_rounds + 1):
        rounds.append(_time_round(models, ids, new_tokens))
        on_round(index + 1)
    return [
        DecodeTiming(
            model=name,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            median_us=statistics.median(times[name] for times in rounds[1:]),
            fastest_us=min(times[name] for times in rounds[1:]),
            slowest_us=max(times[name] for times in rounds[1:]),
            speedup=statistics.median(times[BASELINE] / times[name] for times in rounds[1:]),
        )
        for name, model in models.items()
    ]


def _time_round(models: Mapping[str, Any], ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Return the microseconds of each model's token."""
    microseconds = {}
    for name, model in models.items():
        seconds = []
        for number in (1, 1 + new_tokens):
            start = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=number,
                do_sample=False,
                use_cache=True,
            )
            seconds.append(time.perf_counter() - start)
        microseconds[name] = 1e6 * (seconds[1] - seconds[0]) / new_tokens
    return microseconds
