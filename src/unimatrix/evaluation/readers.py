"""One interface to any causal model: bytes in, bytes out, a number for every token of a text."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from unimatrix.baselines.linear_attention.modeling import (
    LinearAttentionConfig,
    LinearAttentionForCausalLM,
)
from unimatrix.errors import InputError, explain
from unimatrix.evaluation.byte_costs import Score, score_tokens
from unimatrix.hub.auto import register
from unimatrix.hub.load import CONFIG_FILE, hide_progress, load_byte_model
from unimatrix.hub.packaged import PACKAGED_MODELS
from unimatrix.inference.generation import generate_bytes
from unimatrix.inference.sampling import Sampling
from unimatrix.inference.streams import CHUNK_TOKENS, carry_state, name_state
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.presets import PRESETS
from unimatrix.tokenization import (
    BOS_ID,
    EOS_ID,
    NUM_BYTES,
    VOCAB_SIZE,
    UniMatrixTokenizer,
    encode_bytes,
)

MOST_WINDOW_TOKENS = 8192
"""The longest window that a model without state reads a text in."""
_HUB_TIMEOUT_S = 10
_MEMORY_WORDS = ("can't allocate memory", "not enough memory")
_GREEDY = Sampling(temperature=0)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_OUR_IDS = (VOCAB_SIZE, BOS_ID, EOS_ID)
# Fields of configurations that tell how many tokens a model can read.
_LIMIT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")

EndsAt = Callable[[bytes], bool]


class TooLongError(Exception):
    """A text is too long for the model; the message says why."""


class Tokens(NamedTuple):
    """A text as a model reads it.

    Attributes:
        ids: [n] int64, without BOS.
        ends: [n] int64, the bytes of the text up to the end of each token.
    """

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Reader:
    """A causal model and how it reads bytes.

    Attributes:
        name: its name in messages.
        model: on its device, in evaluation mode.
        tokenizer: ``None`` if ids are bytes, with our BOS and EOS.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def limit_tokens(self) -> int | None:
        """How many tokens the model can read by its configuration; ``None`` is any number."""
        fields = self.model.config.to_dict()
        found = [fields[name] for name in _LIMIT_NAMES if fields.get(name) is not None]
        return int(found[0]) if found else None

    @property
    def first_id(self) -> int:
        """The id in front of every text: BOS, or EOS for a tokenizer without BOS."""
        if self.tokenizer is None:
            return BOS_ID
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        first = next((i for i in ids if i is not None), None)
        if first is None:
            raise InputError(f"the tokenizer of {self.name!r} has neither BOS nor EOS; give it one")
        return int(first)

    def encode(self, data: bytes) -> Tokens:
        """Return the tokens of any bytes; a tokenizer of text leaves out bytes that are no UTF-8.

        Raises:
            InputError: if the tokenizer does not tell where its tokens lie.
        """
        if self.tokenizer is None:
            return Tokens(encode_bytes(data), np.arange(1, len(data) + 1))
        if not self.tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of {self.name!r} does not tell where its tokens lie; give a model "
                "with a fast tokenizer"
            )
        text = data.decode("utf-8", errors="ignore")
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000).astype(np.int64)
        borders = np.concatenate([[0], np.cumsum(sizes)])
        ends = [end for _, end in found["offset_mapping"]]
        return Tokens(np.array(found["input_ids"], np.int64), borders[np.array(ends, np.int64)])

    def score(self, tokens: Tokens, score: Score) -> tuple[NDArray[np.float32], str]:
        """Score every token of a text by the rule of ``byte_costs``.

        Args:
            tokens: at least one.
            score: of logits and targets, such as ``cost_targets``.

        Returns:
            [n] float32, and the context of the tokens as in ``ByteCosts``.

        Raises:
            TooLongError: the memory of the machine is too small.
        """
        limit = self.limit_tokens
        window = MOST_WINDOW_TOKENS if limit is None else min(limit, MOST_WINDOW_TOKENS)
        with _tell_memory():
            return score_tokens(
                self.model,
                tokens.ids,
                first_id=self.first_id,
                window_tokens=window - window % 2,
                score=score,
            )

    def complete(self, prompt: bytes, max_new_bytes: int, ends_at: EndsAt) -> bytes:
        """Continue a prompt greedily.

        A model with state reads the prompt in parts, and in constant memory if its state is
        constant. A model with a tokenizer writes as many tokens as ``max_new_bytes`` bytes of the
        prompt have. ``ends_at`` is called with all that is written, after each token, and ends the
        text where it is true.

        Raises:
            TooLongError: the model has too few positions, or the machine too little memory.
        """
        tokens = self.encode(prompt)
        num_new = max_new_bytes
        if self.tokenizer is not None:
            num_new = -(-max_new_bytes * len(tokens.ids) // max(1, len(prompt)))
        limit, needed = self.limit_tokens, len(tokens.ids) + num_new
        if limit is not None and needed > limit:
            raise TooLongError(f"the model reads at most {limit:,} tokens")
        with _tell_memory():
            if self.tokenizer is None and isinstance(self.model, UniMatrixForCausalLM):
                return generate_bytes(
                    self.model, prompt, max_new_bytes=num_new, sampling=_GREEDY, ends_at=ends_at
                ).data
            ids = torch.from_numpy(np.concatenate([[self.first_id], tokens.ids]))[None]
            write = self._write_on if name_state(self.model) else self._generate
            with suspend_training(self.model):
                return write(ids.to(self.model.device), num_new, ends_at)[:max_new_bytes]

    def _write_on(self, ids: Tensor, num_new: int, ends_at: EndsAt) -> bytes:
        """Continue ids [1, T], carrying a state from part to part."""
        state: Any = None
        for start in range(0, ids.shape[1], CHUNK_TOKENS):
            part = ids[:, start : start + CHUNK_TOKENS].contiguous()
            logits, state = carry_state(self.model, part, state)
        new_ids: list[int] = []
        while True:
            new_ids.append(int(logits[0, -1].argmax()))
            data = self._decode(new_ids)
            if len(new_ids) == num_new or new_ids[-1] == self._end_id or ends_at(data):
                return data
            token = torch.tensor([[new_ids[-1]]], device=ids.device)
            logits, state = carry_state(self.model, token, state)

    def _generate(self, ids: Tensor, num_new: int, ends_at: EndsAt) -> bytes:
        """Continue ids [1, T] by ``generate``."""
        num_prompt = ids.shape[1]

        def stop(input_ids: Tensor, scores: Any, **_unused: Any) -> Tensor:
            data = self._decode(input_ids[0, num_prompt:].tolist())
            return torch.tensor([ends_at(data)], device=input_ids.device)

        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=self._end_id,
            eos_token_id=self._end_id,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        return self._decode(output[0, num_prompt:].tolist())

    @property
    def _end_id(self) -> int:
        if self.tokenizer is None:
            return EOS_ID
        end = self.tokenizer.eos_token_id
        return self.first_id if end is None else int(end)

    def _decode(self, ids: list[int]) -> bytes:
        if self.tokenizer is None:
            return bytes(token_id for token_id in ids if token_id < NUM_BYTES)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).encode()


def open_reader(name: str, *, device: torch.device | str = "cpu") -> Reader:
    """Load a model of ours, or any causal model of transformers with its tokenizer.

    Args:
        name: a run folder, a saved or packaged model, or a name on the Hugging Face hub. A saved
            model without a tokenizer reads bytes if its vocabulary is ours.

    Raises:
        InputError: if there is no such model, it is unusable, or its tokenizer is missing.
    """
    folder = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or (
        len(folder.parts) > 1 and Path(folder.parts[0]).exists()
    )
    is_path = folder.exists() or looks_like_path or name in (*PRESETS, *PACKAGED_MODELS)
    kind = _read_kind(folder)
    if is_path and kind in (None, "unimatrix"):
        return Reader(name, load_byte_model(name, device=device), None)
    register()
    # The one peer that transformers does not have.
    AutoConfig.register(LinearAttentionConfig.model_type, LinearAttentionConfig, exist_ok=True)
    AutoModelForCausalLM.register(LinearAttentionConfig, LinearAttentionForCausalLM, exist_ok=True)
    source = folder if is_path else name
    if not is_path:
        _require_hub(name)
    try:
        with hide_progress():
            loaded = AutoModelForCausalLM.from_pretrained(source).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load the model {name!r}: {explain(error)}") from error
    return Reader(name, loaded, _open_tokenizer(name, source, loaded))


def _read_kind(folder: Path) -> str | None:
    """Return the model type that a folder's configuration names; ``None`` if there is none."""
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
    return str(fields.get("model_type")) if isinstance(fields, dict) else None


def _require_hub(name: str) -> None:
    """Raise ``InputError`` if the hub cannot be reached, which transformers tries for a minute."""
    address = f"{ENDPOINT}/{urllib.parse.quote(name)}/resolve/main/{CONFIG_FILE}"
    request = urllib.request.Request(address, method="HEAD")
    try:
        if not isinstance(try_to_load_from_cache(name, CONFIG_FILE), str):
            urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # The hub answers, and transformers will explain why it refuses.
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no folder {name!r} here, and the Hugging Face hub cannot be reached; check "
            "the path or connect to the network"
        ) from error


def _open_tokenizer(
    name: str, source: Path | str, model: PreTrainedModel
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model, ``None`` where its ids are bytes."""
    config = model.config
    is_ours = (config.vocab_size, config.bos_token_id, config.eos_token_id) == _OUR_IDS
    has_own = any((Path(source) / file).is_file() for file in _TOKENIZER_FILES)
    if is_ours and not has_own:
        return None
    # Without files, transformers would make an empty tokenizer.
    if isinstance(source, Path) and not has_own:
        raise InputError(f"{name!r} has no tokenizer; save it beside the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot load the tokenizer of {name!r}: {explain(error)}; save it beside the model"
        ) from error
    return None if isinstance(tokenizer, UniMatrixTokenizer) else tokenizer


@contextmanager
def _tell_memory() -> Iterator[None]:
    """Raise ``TooLongError`` for errors of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if is_memory or any(words in str(error) for words in _MEMORY_WORDS):
            raise TooLongError("the machine has not enough memory for it") from error
        raise
