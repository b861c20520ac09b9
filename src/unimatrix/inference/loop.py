"""The token loop of ``generate`` around the compiled step: the same tokens, no copies that grow.

transformers' own loop copies all ids at every token and calls ``forward`` for each; here a token
costs the compiled step and the samplers. Which tokens come out is decided by the same processors,
the same draw and the same stopping criteria, in the same order.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from unimatrix.cache import UniMatrixCache
from unimatrix.inference.prompt import prepare_prompt, read_prompt
from unimatrix.kernels.step.explain import explain_step

_logger = logging.get_logger(__name__)
_MIN_ROOM = 1024

Processor = Callable[[Tensor, Tensor], Tensor]


def choose_loop(model: Any, generation_config: Any, synced_gpus: bool) -> bool:
    """Return whether ``sample_tokens`` takes over from transformers' loop, and log it once.

    It does not where there is no compiled step (``explain_step``), without a cache, on several
    synchronised devices, or where hidden states are to be returned. Beams and assisted generation
    never ask.

    Args:
        model: a ``UniMatrixForCausalLM``.
        generation_config: as ``generate`` has prepared it.
        synced_gpus: whether all devices must take the same number of steps.
    """
    reason = explain_step(model) or _explain_arguments(generation_config, synced_gpus)
    if reason is None:
        _logger.info_once("generate decodes with the compiled step")
    else:
        _logger.info_once(f"generate decodes without the compiled step: {reason}")
    return reason is None


def _explain_arguments(generation_config: Any, synced_gpus: bool) -> str | None:
    """Return which argument of ``generate`` the loop here does not know."""
    if not generation_config.use_cache:
        return "use_cache is False"
    if synced_gpus:
        return "synced_gpus is True"
    if generation_config.return_dict_in_generate and generation_config.output_hidden_states:
        return "output_hidden_states is True"
    return None


@dataclass
class _Text:
    """Token ids [B, T] that grow without being copied at every token."""

    room: Tensor
    length: int

    @classmethod
    def start(cls, input_ids: Tensor) -> "_Text":
        """Return the text of a prompt."""
        text = cls(input_ids, input_ids.shape[1])
        text._grow()
        return text

    @property
    def ids(self) -> Tensor:
        """The ids so far, [B, T], contiguous; a view for a single row."""
        return self.room[:, : self.length].contiguous()

    def append(self, token_ids: Tensor) -> None:
        """Add one token to every row."""
        if self.length == self.room.shape[1]:
            self._grow()
        self.room[:, self.length] = token_ids
        self.length += 1

    def _grow(self) -> None:
        used = self.room[:, : self.length]
        room = used.new_zeros(used.shape[0], 2 * self.length + _MIN_ROOM)
        room[:, : self.length] = used
        self.room = room


@dataclass
class _Records:
    """What ``return_dict_in_generate`` asks for, one tensor [B, V] a token."""

    wanted: bool
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None

    @classmethod
    def start(cls, generation_config: Any) -> "_Records":
        """Return empty records of what is wanted."""
        wanted = generation_config.return_dict_in_generate
        return cls(
            wanted,
            () if wanted and generation_config.output_scores else None,
            () if wanted and generation_config.output_logits else None,
        )

    def add(self, scores: Tensor, logits: Tensor) -> None:
        """Record one token's."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def answer(self, ids: Tensor, stream: "_Stream") -> Tensor | GenerateDecoderOnlyOutput:
        """Return what ``generate`` returns: the ids, with the records where they are wanted."""
        if not self.wanted:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=self.scores,
            logits=self.logits,
            past_key_values=stream.cache(),
        )


@dataclass
class _Stream:
    """Logits of the next token, from the prompt's forward pass and then from the compiled step.

    The step is set up with the second token, so that the first does not wait for it.
    """

    model: Any
    past_key_values: UniMatrixCache
    decoder: Any = field(default=None)

    def advance(self, token_ids: Tensor) -> Tensor:
        """Return the logits [B, V] after one more token of every row."""
        logits: Tensor = self._get_decoder().step(token_ids)
        return logits

    def write(self, token_ids: Tensor, num_tokens: int, **options: Any) -> Tensor:
        """Return the tokens [B, n] that follow greedily; see ``Decoder.write``."""
        written: Tensor = self._get_decoder().write(token_ids, num_tokens, **options)
        return written

    def _get_decoder(self) -> Any:
        if self.decoder is None:
            from unimatrix.inference.decoder import Decoder  # loads the compiler

            self.decoder = Decoder(self.model, self.past_key_values)
        return self.decoder

    def cache(self) -> UniMatrixCache:
        """Return the cache after what was read."""
        if self.decoder is None:
            return self.past_key_values
        cache: UniMatrixCache = self.decoder.cache()
        return cache


def sample_tokens(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue a prompt greedily or by sampling, as ``GenerationMixin._sample``.

    Args:
        model: a ``UniMatrixForCausalLM`` for which ``choose_loop`` is true.
        input_ids: [B, T] int64, the prompt.
        logits_processor: as ``generate`` has prepared it.
        stopping_criteria: likewise.
        generation_config: likewise.
        streamer: is handed every token; ``None`` is nobody.
        generator: to sample with; ``None`` is the global one.
        model_kwargs: for the prompt's forward pass.

    Returns:
        ids [B, T + new], or with ``return_dict_in_generate`` what transformers returns, its cache
        covering all but the last token.
    """
    logits, stream = _read_prompt(model, input_ids, generation_config, model_kwargs)
    if _is_plain(logits_processor, stopping_criteria, generation_config, streamer):
        return _write_greedily(input_ids, logits, stream, stopping_criteria, generation_config)
    process = _join_processors(logits_processor)
    text, records = _Text.start(input_ids), _Records.start(generation_config)
    pad_token_id = generation_config._pad_token_tensor
    may_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.int64)
    while True:
        # A copy, since processors may write into it.
        logits = logits.to(torch.float32, copy=True)
        scores = process(text.ids, logits) if process is not None else logits
        records.add(scores, logits)
        if generation_config.do_sample:
            token_ids = _draw(scores, generator).squeeze(1)
        else:
            token_ids = scores.argmax(dim=-1)
        if may_end:
            token_ids = token_ids * unfinished + pad_token_id * (1 - unfinished)
        text.append(token_ids)
        unfinished = unfinished & ~stopping_criteria(text.ids, records.scores)
        if streamer is not None:
            streamer.put(token_ids)
        if not unfinished.any():
            break
        logits = stream.advance(token_ids)
    if streamer is not None:
        streamer.end()
    return records.answer(text.ids.clone(), stream)


def _read_prompt(
    model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> tuple[Tensor, _Stream]:
    """Return the logits [B, V] after the prompt, and the streams that stand there."""
    inputs = prepare_prompt(model, input_ids, generation_config, model_kwargs)
    past = inputs["past_key_values"]
    if past is not None and inputs["input_ids"].shape[1] == 1:
        # One token after a cache is what the compiled step is for; none of them is padding.
        stream = _Stream(model, past)
        return stream.advance(inputs["input_ids"][:, 0]), stream
    output = read_prompt(model, inputs, generation_config.prefill_chunk_size)
    return output.logits[:, -1], _Stream(model, output.past_key_values)


def _draw(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return one id of each row, [B, 1], by its probability."""
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator)


class _DrawingProcessor(LogitsProcessor):
    """Draws an id of each row and leaves it alone possible, so that the greatest score is it.

    Args:
        generator: to draw with.
        keeps_scores: whether to note the scores that were drawn from.
    """

    def __init__(self, generator: torch.Generator, *, keeps_scores: bool) -> None:
        self.generator = generator
        self.scores: tuple[Tensor, ...] | None = () if keeps_scores else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] of minus infinity, and 0 at the id that was drawn."""
        if self.scores is not None:
            self.scores += (scores,)
        return torch.full_like(scores, -torch.inf).scatter(1, _draw(scores, self.generator), 0)


def sample_seeded(
    run: Callable[..., Any],
    generator: torch.Generator,
    *,
    logits_processor: Any,
    generation_config: Any,
    **prepared: Any,
) -> Any:
    """Sample with a generator in transformers' loop, which knows the global one alone.

    Args:
        run: the loop, all but its prepared arguments given.
        generator: to sample with.
        logits_processor: as ``generate`` has prepared it.
        generation_config: likewise; sampling.
        prepared: the other arguments of the loop.

    Returns:
        what the loop returns.
    """
    keeps_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    drawing = _DrawingProcessor(generator, keeps_scores=bool(keeps_scores))
    greedy = copy.copy(generation_config)
    greedy.do_sample = False
    processors = LogitsProcessorList([*logits_processor, drawing])
    output = run(logits_processor=processors, generation_config=greedy, **prepared)
    if drawing.scores is not None:
        output.scores = drawing.scores
    return output


def _is_plain(processors: Any, criteria: Any, generation_config: Any, streamer: Any) -> bool:
    """Return whether ids alone are wanted, greedily, up to a length or the end of every row."""
    return (
        len(processors) == 0
        and not generation_config.do_sample
        and not generation_config.return_dict_in_generate
        and streamer is None
        and all(type(one) in (MaxLengthCriteria, EosTokenCriteria) for one in criteria)
        and any(type(one) is MaxLengthCriteria for one in criteria)
    )


def _write_greedily(
    input_ids: Tensor, logits: Tensor, stream: _Stream, criteria: Any, generation_config: Any
) -> Tensor:
    """Return the ids [B, T + new], the tokens between criteria written in one call."""
    num_tokens = (
        min(one.max_length for one in criteria if isinstance(one, MaxLengthCriteria))
        - input_ids.shape[1]
    )
    end_ids = [
        int(token_id)
        for one in criteria
        if isinstance(one, EosTokenCriteria)
        for token_id in one.eos_token_id
    ]
    first = logits.to(torch.float32).argmax(dim=-1)
    ended = torch.isin(first, torch.tensor(end_ids, dtype=torch.int64))
    if num_tokens <= 1 or bool(ended.all()):
        return torch.cat([input_ids, first.unsqueeze(1)], dim=1)
    pad_token = generation_config._pad_token_tensor
    others = stream.write(
        first,
        num_tokens - 1,
        end_ids=end_ids,
        pad_id=0 if pad_token is None else int(pad_token),
        ended=ended.numpy(),
    )
    return torch.cat([input_ids, first.unsqueeze(1), others], dim=1)


def _join_processors(processors: Any) -> Processor | None:
    """Return the processors as one, ``None`` if there is none.

    The list looks at the signature of each at every token, which takes as long as the processor;
    here that happens once.
    """
    if len(processors) == 0:
        return None
    for processor in processors:
        if len(inspect.signature(processor.__call__).parameters) > 2:
            whole: Processor = processors  # which says what is missing
            return whole

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        for processor in processors:
            scores = processor(input_ids, scores)
        return scores

    return process
