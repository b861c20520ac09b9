"""Bytes to ids and back: ids 0..255 are the byte values, then PAD, BOS and EOS.

Two roads lead to the same ids. ``UniMatrixTokenizer`` takes valid text, for everything that expects
a Hugging Face tokenizer. ``encode_bytes`` and ``decode_bytes`` take any bytes and lose none.
"""

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from unimatrix.errors import InputError
from unimatrix.hub.packaged import replace_name
from unimatrix.hub.saved_loader import TOKENIZER_AUTO_MAP, save_loader

NUM_BYTES = 256
PAD_ID = 256
BOS_ID = 257
EOS_ID = 258
VOCAB_SIZE = 259

PAD_TOKEN = "<|pad|>"
BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
SPECIAL_TOKENS = {PAD_TOKEN: PAD_ID, BOS_TOKEN: BOS_ID, EOS_TOKEN: EOS_ID}

NO_LENGTH_LIMIT = 2**50
"""``model_max_length``: no text is as long. lm-eval would read 10**30 as "unknown" and cut to 2,048
tokens. With this length it asks how many rows fit a device, whose bytes torch can still count."""


class UniMatrixTokenizer(PreTrainedTokenizerFast):
    """Turn valid text into bytes with BOS in front, and ids back into text.

    Note:
        ``tokenizer(text)`` starts with BOS, as every stream does; ``add_special_tokens=False``
        gives the bytes alone. Special tokens are not parsed out of text: ``"<|eos|>"`` is seven
        bytes, and a text that ends so after something else is warned of, because programs append
        EOS as text. To read it as EOS there, pass ``split_special_tokens=False`` with the call, or
        build or load the tokenizer with it; all of the text must then be trusted. Of a chat, the
        special tokens that the template writes are always ids, and those in messages text. Text
        cut inside a character decodes to U+FFFD at its end only, so the streamers of transformers
        and tokenizers wait for the rest.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}  # noqa: RUF012 (the base class's own form)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"
    _auto_map = TOKENIZER_AUTO_MAP

    def _save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        files: tuple[str, ...] = super()._save_pretrained(save_directory, *args, **kwargs)
        return (*files, save_loader(save_directory))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, or by the name of a model that comes with the package.

        The arguments, and what is returned, are those of ``PreTrainedTokenizerBase``.
        """
        return super().from_pretrained(*replace_name(args, kwargs), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing: every saved folder has an ``auto_map``, and not this file's source."""

    def _get_padding_truncation_strategies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        padding, truncation, length, rest = super()._get_padding_truncation_strategies(
            *args, **kwargs
        )
        if length == NO_LENGTH_LIMIT:
            # As transformers does without a limit; padding to this one would fill the device.
            length, truncation = None, TruncationStrategy.DO_NOT_TRUNCATE
            if padding is PaddingStrategy.MAX_LENGTH:
                padding = PaddingStrategy.DO_NOT_PAD
        return padding, truncation, length, rest

    def _encode_plus(
        self, text: Any, *args: Any, split_special_tokens: bool | None = None, **kwargs: Any
    ) -> BatchEncoding:
        splits = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        if splits:
            _warn_of_eos(text)
        if splits != self.split_special_tokens:
            return self._copy(splits)._encode_plus(text, *args, **kwargs)
        return super()._encode_plus(text, *args, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render and tokenize a conversation; see ``PreTrainedTokenizerBase``.

        Args:
            conversation: messages, or a batch of such lists.
            args: as there.
            kwargs: as there; ``sanitize_control_tokens`` is on where transformers supports it, so
                that special tokens written in messages stay text.

        Raises:
            InputError: if a message holds a special token and nothing can keep it text:
                transformers cannot beside ``return_assistant_tokens_mask``.
        """
        if not kwargs.get("tokenize", True):
            return super().apply_chat_template(conversation, *args, **kwargs)
        known = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        if "sanitize_control_tokens" in known and not kwargs.get("return_assistant_tokens_mask"):
            kwargs.setdefault("sanitize_control_tokens", True)
        else:
            _refuse_special_tokens((conversation, args[:2], kwargs))  # tools, documents
        reader = self._copy(split_special_tokens=False)
        return PreTrainedTokenizerFast.apply_chat_template(reader, conversation, *args, **kwargs)

    def _copy(self, split_special_tokens: bool) -> Self:
        """Return a tokenizer that parses special tokens, or does not.

        The Rust object has one switch for all calls. Turning it for one text would parse special
        tokens in the text of another thread too.
        """
        made = copy.copy(self)
        made._tokenizer = copy.deepcopy(self._tokenizer)
        made._tokenizer.encode_special_tokens = split_special_tokens
        made.split_special_tokens = split_special_tokens
        return made

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        # The Rust object does not pickle this switch.
        self._tokenizer.encode_special_tokens = self.split_special_tokens


def build_tokenizer(*, split_special_tokens: bool = True) -> UniMatrixTokenizer:
    """Build the byte tokenizer, identical wherever and whenever it is built.

    Args:
        split_special_tokens: keep special tokens in a text as its bytes; ``False`` reads them as
            ids, which clients that append EOS as text need (TRL).

    Returns:
        A tokenizer of 259 entries that pads on the left and never truncates by itself.
    """
    return UniMatrixTokenizer(
        tokenizer_object=_build_backend(),
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        split_special_tokens=split_special_tokens,
        clean_up_tokenization_spaces=False,
        model_max_length=NO_LENGTH_LIMIT,
    )


def encode_bytes(data: bytes | bytearray | memoryview) -> NDArray[np.int64]:
    """Return the ids of any bytes, valid UTF-8 or not, without BOS: [T] int64 in 0..255, a copy."""
    return np.frombuffer(data, dtype=np.uint8).astype(np.int64)


def decode_bytes(ids: ArrayLike) -> bytes:
    """Return the bytes of ids; PAD, BOS and EOS vanish.

    Args:
        ids: [T] integers in 0..258: a list, an array or a CPU tensor.

    Raises:
        InputError: ``ids`` has more than one dimension, is no integer, or leaves 0..258.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return b""
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"ids to decode have shape {array.shape} and type {array.dtype}; give one row of "
            "integers."
        )
    if array.min() < 0 or array.max() >= VOCAB_SIZE:
        wrong = array[(array < 0) | (array >= VOCAB_SIZE)][0]
        raise InputError(
            f"id {wrong} is no byte and no special token; ids are 0..{VOCAB_SIZE - 1}."
        )
    return array[array < NUM_BYTES].astype(np.uint8).tobytes()


def _warn_of_eos(text: Any) -> None:
    """Warn if a text ends with an EOS that a program seems to have appended."""
    for one in (text,) if isinstance(text, str) else text:
        if isinstance(one, str) and one.endswith(EOS_TOKEN) and one != EOS_TOKEN:
            warnings.warn(
                f"a text ends with {EOS_TOKEN!r}, which stays {len(EOS_TOKEN)} bytes. If a program "
                "such as TRL has appended it, use build_tokenizer(split_special_tokens=False), or "
                "append tokenizer.eos_token_id to the ids",
                stacklevel=2,
            )
            return


def _refuse_special_tokens(content: Any) -> None:
    """Raise ``InputError`` if a string anywhere inside holds a special token."""
    if isinstance(content, dict):
        content = [value for name, value in content.items() if name != "chat_template"]
    if isinstance(content, (list, tuple)):
        for part in content:
            _refuse_special_tokens(part)
    elif isinstance(content, str):
        for token in SPECIAL_TOKENS:
            if token in content:
                raise InputError(
                    f"a message holds {token!r}, which would become a special token; take it out, "
                    "or leave out return_assistant_tokens_mask, without which it stays text"
                )


def _list_byte_letters() -> Sequence[str]:
    """Return the letter that the ByteLevel parts use for each byte 0..255.

    A printable Latin-1 character stands for itself; the others take code points from 256 on, in
    order. The position in this list is the id of the letter, and the byte that it stands for.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, next_code = [], 256
    for value in range(NUM_BYTES):
        letters.append(chr(value if value in printable else next_code))
        next_code += value not in printable
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters


def _build_backend() -> Tokenizer:
    letters = {letter: value for value, letter in enumerate(_list_byte_letters())}
    backend = Tokenizer(models.BPE(vocab=letters | SPECIAL_TOKENS, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN}:1 $B:1",
        special_tokens=[(BOS_TOKEN, BOS_ID)],
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    backend.encode_special_tokens = True
    return backend
