"""What is timed: a train step, a forward pass, a prompt read, bytes decoded, single steps."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unimatrix.bench.arithmetic import TokenCost
from unimatrix.bench.clock import Workload
from unimatrix.bench.models import BenchModel
from unimatrix.data.corpora import load_corpus
from unimatrix.inference.generation import read_prompt
from unimatrix.kernels.step.explain import explain_step
from unimatrix.modeling import UniMatrixForCausalLM

Collate = Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]

NEW_TOKENS = 64
"""Tokens decoded in one run."""
TOKENS_PER_BATCH = {"cpu": 2048, "mps": 2048, "cuda": 65_536}
"""Tokens of a train step or forward pass where no batch size is given, by device."""


class Mode(NamedTuple):
    """One kind of work.

    Attributes:
        title: what it is, in a few words.
        batched: whether several sequences run together.
        per_token: whether a run is ``NEW_TOKENS`` tokens and the time of one is reported; its
            lengths are then timed together, so that they can be compared.
        build: ``build(spec, model, ids)`` returns the workload, with ids [B, T + 1].
        cost_of: ``cost_of(cost, num_tokens)`` returns the multiply-adds of one sequence, or token.
    """

    title: str
    batched: bool
    per_token: bool
    build: Callable[[BenchModel, PreTrainedModel, Tensor], Workload]
    cost_of: Callable[[TokenCost, int], int]


def choose_batch_size(mode: str, num_tokens: int, batch_size: int | None, device: str) -> int:
    """Return B of a cell; without a batch size it fills ``TOKENS_PER_BATCH``."""
    if not MODES[mode].batched:
        return 1
    return max(1, TOKENS_PER_BATCH[device] // num_tokens) if batch_size is None else batch_size


def load_text(num_bytes: int, data: str | None = None) -> bytes:
    """Return the first bytes of a corpus, repeated where it is shorter.

    Args:
        num_bytes: how many.
        data: as for ``load_corpus``, whose training split it is; ``None`` is the standard
            library's sources.
    """
    stream = load_corpus(data or "pystdlib").train
    text = stream.read(0, min(num_bytes, len(stream))).tobytes()
    return (text * -(-num_bytes // len(text)))[:num_bytes]


def cut_rows(text: bytes, batch_size: int, num_tokens: int, vocab_size: int) -> Tensor:
    """Return [B, T] int64, B x T bytes row after row; ids modulo the vocabulary."""
    ids = np.frombuffer(text, dtype=np.uint8, count=batch_size * num_tokens).astype(np.int64)
    return torch.from_numpy(ids % vocab_size).view(batch_size, num_tokens)


@torch.no_grad()
def prefill(spec: BenchModel, model: PreTrainedModel, ids: Tensor) -> Any:
    """Read all of ``ids`` but the last, and return what is carried on.

    A UniMatrix reads as ``unimatrix generate`` does; a peer in one forward pass that makes the
    logits of the last position only, where it can.

    Args:
        spec: which model it is.
        model: in evaluation mode.
        ids: [B, T + 1] int64, T >= 1.
    """
    with spec.cast_products(ids.device):
        if isinstance(model, UniMatrixForCausalLM):
            return read_prompt(model, ids[:, :-1])
        options = {"logits_to_keep": 1} if spec.cache_name == "past_key_values" else {}
        output = model(input_ids=ids[:, :-1], use_cache=True, **options)
    return getattr(output, spec.cache_name)


@torch.no_grad()
def step_once(spec: BenchModel, model: PreTrainedModel, token: Tensor, carried: Any) -> Any:
    """Read one token [B, 1] and return what is carried on."""
    with spec.cast_products(token.device):
        output = model(input_ids=token, use_cache=True, **{spec.cache_name: carried})
    return getattr(output, spec.cache_name)


def compile_step(spec: BenchModel, model: PreTrainedModel) -> Callable[..., Any]:
    """Return what a train step of the model calls: itself, or one graph of fixed sizes."""
    called: Callable[..., Any] = model
    if spec.compiler is not None:
        is_whole = not spec.is_peer
        called = torch.compile(model, backend=spec.compiler, fullgraph=is_whole, dynamic=False)
    return called


def _build_train(spec: BenchModel, model: PreTrainedModel, ids: Tensor) -> Workload:
    """Forward, backward and AdamW, as ``unimatrix train`` does them."""
    model.train()
    called = compile_step(spec, model)
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.requires_grad),
        lr=1e-4,
        fused=True,
    )
    # Both take unshifted labels and drop the same last position; ours is spared the logits.
    options = {} if spec.is_peer else {"loss_only": True}
    inputs = ids[:, :-1]
    loader = _start_loader(model, inputs)

    def run(_: None) -> None:
        added = options if loader is None else {**options, **loader.take()}
        with spec.cast_products(ids.device):
            loss = called(input_ids=inputs, labels=inputs, use_cache=False, **added).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if loader is not None:
            loader.wait()

    return Workload(lambda: None, run)


class BatchLoader:
    """What a data loader adds to batches: each is made on the CPU during the step before.

    Args:
        collate: makes a batch of items.
        ids: [B, T] int64, those of every batch.
    """

    def __init__(self, collate: Collate, ids: Tensor) -> None:
        self._collate, self._device = collate, ids.device
        self._items = [{"input_ids": row, "shift_labels": row} for row in ids.cpu()]
        self._thread = ThreadPoolExecutor(1)
        self._ahead = self._thread.submit(collate, self._items)

    def take(self) -> dict[str, Tensor]:
        """Return what is added to this batch, and start to make the next."""
        batch = self._ahead.result()
        self._ahead = self._thread.submit(self._collate, self._items)
        added = batch.keys() & {"suffix_match"}
        return {name: batch[name].to(self._device, non_blocking=True) for name in added}

    def wait(self) -> None:
        """Wait until the next batch is made: a step takes as long as the slower of both."""
        self._ahead.result()


def _start_loader(model: PreTrainedModel, ids: Tensor) -> BatchLoader | None:
    """Return the loader of a train step, ``None`` where training has none."""
    if ids.device.type != "cuda":
        return None
    # Imported here: it loads the Trainer.
    from unimatrix.train.trainer import choose_collator

    return BatchLoader(choose_collator(model, ids.device.type), ids)


def _build_forward(spec: BenchModel, model: PreTrainedModel, ids: Tensor) -> Workload:
    """One pass with the logits of all positions."""
    model.eval()
    inputs = ids[:, :-1]

    @torch.no_grad()
    def run(_: None) -> None:
        with spec.cast_products(ids.device):
            model(input_ids=inputs, use_cache=False)

    return Workload(lambda: None, run)


def _build_prefill(spec: BenchModel, model: PreTrainedModel, ids: Tensor) -> Workload:
    """Read a prompt."""
    model.eval()
    return Workload(lambda: None, lambda _: prefill(spec, model, ids))


def _build_decode(spec: BenchModel, model: PreTrainedModel, ids: Tensor) -> Workload:
    """Continue a prompt that was read, greedily, through ``generate``."""
    model.eval()
    # No end: all models write the same number of tokens, without a processor that forbids ends.
    model.generation_config.eos_token_id = None
    carried = prefill(spec, model, ids)
    # With other names of the cache `generate` does not know how much of the prompt was read.
    prompt = ids if spec.cache_name == "past_key_values" else ids[:, -1:]

    def run(cache: Any) -> Tensor:
        options = {"use_cache": True, "do_sample": False, "max_new_tokens": NEW_TOKENS}
        with spec.cast_products(ids.device):
            written: Tensor = model.generate(prompt, **{spec.cache_name: cache}, **options)
        return written[:, prompt.shape[1] :]

    # Some caches are written in place.
    return Workload(lambda: copy.deepcopy(carried), run)


def _build_step(spec: BenchModel, model: PreTrainedModel, ids: Tensor) -> Workload:
    """Read single tokens after a prompt, each with one call: ours with the compiled step."""
    model.eval()
    carried = prefill(spec, model, ids)
    with spec.cast_products(ids.device):
        is_compiled = isinstance(model, UniMatrixForCausalLM) and explain_step(model) is None
    if is_compiled:
        from unimatrix.inference.decoder import Decoder  # loads the compiler

        decoder = Decoder(model, carried)

        def advance(_: None) -> None:
            for _token in range(NEW_TOKENS):
                decoder.step(ids[:, -1])

        return Workload(lambda: None, advance)

    def run(cache: Any) -> None:
        for _ in range(NEW_TOKENS):
            cache = step_once(spec, model, ids[:, -1:], cache)

    return Workload(lambda: copy.deepcopy(carried), run)


MODES = {
    "train": Mode("train step", True, False, _build_train, TokenCost.count_train_step),
    "forward": Mode("forward pass", True, False, _build_forward, TokenCost.count_forward),
    "prefill": Mode("prefill", False, False, _build_prefill, TokenCost.count_prefill),
    "decode": Mode("decoding a token", False, True, _build_decode, TokenCost.count_token),
    "step": Mode("one step", False, True, _build_step, TokenCost.count_token),
}
