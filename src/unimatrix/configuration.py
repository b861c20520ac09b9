"""The configuration of every UniMatrix model.

Letters, everywhere in this project: B batch, T tokens, D model width, H heads, N rows = columns of
a head's matrix, L depth steps, M slots, C slot-key width, K pairs read per token, R update rules
(3), V vocabulary, F feed-forward width, E modulation width.
"""

import functools
import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from unimatrix.configuration_checks import FORMAT_VERSION, check_configuration
from unimatrix.errors import InputError, require_choice, suggest
from unimatrix.hub.packaged import replace_name
from unimatrix.hub.saved_loader import AUTO_MAP, save_loader
from unimatrix.presets import PRESETS

_logger = logging.get_logger(__name__)

# Hugging Face's fields that a fresh PreTrainedConfig does not list.
_HUGGING_FACE_KEYS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "torch_dtype",
    }
)
# Keywords of loading a model, not fields of it: clients such as `transformers serve` pass the same
# keywords to the configuration.
_LOADING_KEYS = frozenset(
    {
        "code_revision",
        "device_map",
        "gguf_file",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "quantization_config",
        "tp_plan",
        "tqdm_class",
        "trust_remote_code",
        "use_auth_token",
        "use_safetensors",
        "weights_only",
    }
)


class UniMatrixConfig(PreTrainedConfig):
    """Describe a UniMatrix model; the defaults are ``core`` at the published size.

    Source: arXiv:2604.25930; ``docs/deviations.md`` lists where its text, its published code and
    this project differ.

    Args:
        vocab_size: V, number of token ids; 259 is 256 bytes, PAD, BOS and EOS.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: L, depth steps; the same block weights serve all of them.
        num_attention_heads: H, matrix states per depth step.
        head_dim: N, rows and columns of a matrix state; H x N need not equal D.
        intermediate_size: F, feed-forward width; ``None`` is 4 D.
        dropout: probability in [0, 1), applied after the embedding, the mixers and in and after the
            feed-forward.
        max_position_embeddings: rows of the learned position table, which bounds the length;
            ``None`` is no table and any length.
        norm_type: ``layer_norm`` or ``rms_norm`` (no mean, no bias).
        feed_forward_type: ``gelu`` (two layers with biases) or ``swiglu`` (gated, no biases).
        residual_path: ``none``, ``previous_token`` (an embedding of the previous token) or
            ``suffix_automaton`` (an embedding of what followed the longest earlier match).
        update_rules: ``outer``, ``mixed`` (outer, diagonal and symmetric writes, mixed per token
            and head), ``delta`` (a write replaces what its key held, as far as a learned strength
            says; needs ``normalized_keys``) or ``none`` (no matrix state at all).
        conv_kernel: tokens, the current one included, that a causal convolution mixes before the
            queries, keys and values of the matrix state are formed; 0 is none.
        norm_guard: divide a matrix state by its Frobenius norm where that exceeds 1.
        normalized_keys: queries, keys and values of the matrix state are unit vectors per head and
            what is read is normalised per head; otherwise they pass through tanh.
        longest_retention: the initial retention of the heads is spread from 2 tokens to this many,
            evenly in the logarithm; ``None`` starts all heads at one half.
        depth_step_embedding: add a learned vector per depth step to the residual stream.
        modulation_size: E, width of the per-token table that scales the stream; 0 is off.
        associative_memory: ``none``, ``dense`` (append-only), ``slots`` (M of them, of the paper),
            ``selective`` (M slots of a context and the token that followed, kept by strength) or
            ``indexed`` (an index of the last W tokens finds where their rare words stood before,
            and an attention reads around these places).
        slot_source: features that queries, keys and values come from: ``token`` (the embedding) or
            ``hidden`` (the normalised stream of each depth step). Selective slots take their keys
            from the ids; ``hidden`` lets their gate see the stream after the first depth step.
        slot_key_size: C; ``None`` is D.
        num_slots: M, slots per sequence (and depth step, with the hidden source).
        slots_per_read: K, best-scoring pairs that a read mixes.
        identity_lookup: queries and keys are the source itself, without projections; needs C = D.
        identity_values: values are the source itself, without a projection.
        product_key_codes: entries of each of two codebooks; the halves of a slot's learned key are
            replaced by their nearest entries. 0 leaves keys as they are.
        slot_hops: successive reads of the slots. In ``slots`` the second read adds what the first
            returned to its query; in ``selective``, whose keys must then be single tokens, the
            second read looks up the token that the first found.
        match_threshold: cosine above which a write overwrites the slot it matches.
        strength_floor: a slot counts as filled while its strength exceeds this.
        write_gate: learn the strength of a write; otherwise it is 1.
        pointer: let the ids of the slots read vote on the logits.
        slot_key_patterns: contexts of selective slots, each a list of distances back; ``[[0]]`` is
            the token itself, ``[[0, 1]]`` the last two; ``None`` is ``[[0]]``.
        slot_read_offsets: a position looks up the contexts that end this many tokens back; ``None``
            is ``[0, 1]``.
        bounded_training: train with M selective slots as well; otherwise training has no bound, so
            that every write can prove useful. A model of text leans on all that it sees in
            training, so it needs the bound.
        slot_margin: nats (of the gate's logit) by which a write must exceed the slot it displaces,
            and may fall short of the same context's.
        slot_fade_tokens: tokens after which the logit of every selective slot falls by 1/8, so that
            an endless stream does not freeze the slots; ``None`` is never.
        repeated_key: which value of a repeated context a selective slot keeps, ``last`` or
            ``first``.
        hindsight: how writes to selective slots are labelled in training: ``attribution``,
            ``read_hit``, ``read_weight`` or ``none`` (the gate learns from the loss alone).
        hindsight_share: a write is useful if its attribution exceeds this share of the sequence's
            largest,
        hindsight_floor: and exceeds this many nats.
        hindsight_weight: weight of the gate's loss.
        automaton_window: W, the tokens that the suffix automaton and ``indexed`` remember, together
            exactly the last W; ``None`` keeps the whole stream, which ``indexed`` cannot.
        automaton_pointer: the automaton's token shares the probability with the vocabulary; needs
            ``residual_path='suffix_automaton'``.
        index_units: what the index finds again: ``words`` of bytes, or ``tokens``; ``None`` is
            words where ids are bytes, BOS 257 and EOS 258.
        index_heads: heads that read around a place.
        index_head_dim: width of such a head.
        index_reads_at: depth steps before the read; ``None`` is 1, or 0 of a single one.
        index_boundaries: entries lose score for the boundaries between them and their place.
        initializer_range: standard deviation of Linear and Embedding weights at the start.
        layer_norm_eps: added to the variance inside the root.
        use_cache: return a cache from ``forward`` outside training.
        pad_token_id: also the residual context of the first token with ``previous_token``.
        bos_token_id: first token of every stream.
        eos_token_id: last token of a document.
        tie_word_embeddings: the head shares the embedding's weights.
        format_version: version of the checkpoint's layout.
        kwargs: fields of ``PreTrainedConfig``; anything else raises. A *file* may hold more: notes
            that other programs write there are kept.

    Raises:
        InputError: for an unknown key (with the nearest valid name) or an unusable value.
    """

    model_type = "unimatrix"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "past_key_values",
        "pointer_token_ids",
        "pointer_weights",
        "pointer_log_weights",
    ]

    def __init__(
        self,
        *,
        vocab_size: int = 259,
        hidden_size: int = 64,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        head_dim: int = 16,
        intermediate_size: int | None = None,
        dropout: float = 0.1,
        max_position_embeddings: int | None = 128,
        norm_type: str = "layer_norm",
        feed_forward_type: str = "gelu",
        residual_path: str = "none",
        update_rules: str = "outer",
        conv_kernel: int = 0,
        norm_guard: bool = False,
        normalized_keys: bool = False,
        longest_retention: int | None = None,
        depth_step_embedding: bool = False,
        modulation_size: int = 0,
        associative_memory: str = "none",
        slot_source: str = "hidden",
        slot_key_size: int | None = None,
        num_slots: int = 32,
        slots_per_read: int = 4,
        identity_lookup: bool = False,
        identity_values: bool = False,
        product_key_codes: int = 0,
        slot_hops: int = 1,
        match_threshold: float = 0.85,
        strength_floor: float = 0.05,
        write_gate: bool = True,
        pointer: bool = False,
        slot_key_patterns: list[list[int]] | None = None,
        slot_read_offsets: list[int] | None = None,
        bounded_training: bool = False,
        slot_margin: float = 1.0,
        slot_fade_tokens: int | None = None,
        repeated_key: str = "last",
        hindsight: str = "attribution",
        hindsight_share: float = 0.15,
        hindsight_floor: float = 1.5e-4,
        hindsight_weight: float = 1.0,
        automaton_window: int | None = None,
        automaton_pointer: bool = False,
        index_units: str | None = None,
        index_heads: int = 2,
        index_head_dim: int = 32,
        index_reads_at: int | None = None,
        index_boundaries: bool = False,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        use_cache: bool = True,
        pad_token_id: int = 256,
        bos_token_id: int | None = 257,
        eos_token_id: int | None = 258,
        tie_word_embeddings: bool = True,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        _require_known_keys(kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.dropout = dropout
        self.max_position_embeddings = max_position_embeddings
        self.norm_type = norm_type
        self.feed_forward_type = feed_forward_type
        self.residual_path = residual_path
        self.update_rules = update_rules
        self.conv_kernel = conv_kernel
        self.norm_guard = norm_guard
        self.normalized_keys = normalized_keys
        self.longest_retention = longest_retention
        self.depth_step_embedding = depth_step_embedding
        self.modulation_size = modulation_size
        self.associative_memory = associative_memory
        self.slot_source = slot_source
        self.slot_key_size = hidden_size if slot_key_size is None else slot_key_size
        self.num_slots = num_slots
        self.slots_per_read = slots_per_read
        self.identity_lookup = identity_lookup
        self.identity_values = identity_values
        self.product_key_codes = product_key_codes
        self.slot_hops = slot_hops
        self.match_threshold = match_threshold
        self.strength_floor = strength_floor
        self.write_gate = write_gate
        self.pointer = pointer
        self.slot_key_patterns = [[0]] if slot_key_patterns is None else slot_key_patterns
        self.slot_read_offsets = [0, 1] if slot_read_offsets is None else slot_read_offsets
        self.bounded_training = bounded_training
        self.slot_margin = slot_margin
        self.slot_fade_tokens = slot_fade_tokens
        self.repeated_key = repeated_key
        self.hindsight = hindsight
        self.hindsight_share = hindsight_share
        self.hindsight_floor = hindsight_floor
        self.hindsight_weight = hindsight_weight
        self.automaton_window = automaton_window
        self.automaton_pointer = automaton_pointer
        is_bytes = vocab_size > 258 and (bos_token_id, eos_token_id) == (257, 258)
        by_vocabulary = "words" if is_bytes else "tokens"
        self.index_units = by_vocabulary if index_units is None else index_units
        self.index_heads = index_heads
        self.index_head_dim = index_head_dim
        last = min(1, num_hidden_layers - 1)
        self.index_reads_at = last if index_reads_at is None else index_reads_at
        self.index_boundaries = index_boundaries
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.use_cache = use_cache
        self.format_version = format_version
        special_tokens = {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
        }
        super().__init__(tie_word_embeddings=tie_word_embeddings, **special_tokens, **kwargs)
        # Some releases of transformers assign class defaults over the keywords.
        for name, value in special_tokens.items():
            setattr(self, name, value)
        self.tie_word_embeddings = tie_word_embeddings
        self.auto_map = dict(AUTO_MAP)
        check_configuration(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the configuration of a preset, with any field overridden.

        Raises:
            InputError: for an unknown preset or field.
        """
        require_choice("unknown preset", name, PRESETS)
        return cls(**(PRESETS[name] | overrides))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, or by the name of a model that comes with the package.

        The arguments, and what is returned, are those of ``PretrainedConfig.from_pretrained``.
        """
        return super().from_pretrained(*replace_name(args, kwargs), **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration that a file holds; keys that are no fields are kept as notes.

        Args:
            config_dict: contents of a ``config.json``.
            kwargs: fields that override the file's; with ``return_unused_kwargs``, keywords that
                are no fields are returned beside the configuration.

        Raises:
            InputError: for an unknown keyword (with the nearest valid name), an unusable value, or
                a key of the file that would hide a part of this class.
        """
        returns_unused = kwargs.pop("return_unused_kwargs", False)
        known = {name: value for name, value in config_dict.items() if _is_known(name)}
        notes = {name: value for name, value in config_dict.items() if name not in known}
        unused = {n: v for n, v in kwargs.items() if not _is_known(n) and n not in notes}
        fields = {name: value for name, value in kwargs.items() if name not in unused}
        config = super().from_dict(known, **fields)
        # transformers reads the parameters of generation from the same file by itself.
        of_generation = GenerationConfig().to_dict()
        config._keep_notes({n: value for n, value in notes.items() if n not in of_generation})
        for name in fields.keys() & notes.keys():
            setattr(config, name, fields[name])
        check_configuration(config)
        if returns_unused:
            return config, unused
        _require_known_keys(unused.keys() - _LOADING_KEYS)
        return config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """Return the configuration that a file holds; as ``from_dict``."""
        config: Self = cls.from_dict(cls._dict_from_json_file(json_file))
        return config

    def _keep_notes(self, notes: dict[str, Any]) -> None:
        """Set keys of a file that are no fields, so that saving writes them again."""
        for name, value in notes.items():
            part = getattr(type(self), name, None)
            if callable(part) or isinstance(part, property):
                raise InputError(
                    f"the configuration file holds {name!r}, which is no field but a part of "
                    f"{type(self).__name__}; remove it from the file"
                )
            # A file may hold notes of any name; only one close to a field is worth a warning.
            if guess := suggest(name, list_config_fields(), likeness=0.8):
                _logger.warning(f"unknown configuration key {name!r} is kept, but unused.{guess}")
            setattr(self, name, value)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the configuration beside the file that its ``auto_map`` names."""
        save_loader(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: ``auto_map`` in every saved folder names a loader, not this file's source."""

    @property
    def uses_pointer(self) -> bool:
        """Whether the ids of the slots read vote on the logits."""
        return bool(self.pointer and self.associative_memory == "slots")

    @property
    def uses_mixture(self) -> bool:
        """Whether ids that were retrieved share the vocabulary's probability."""
        reads = self.pointer and self.associative_memory in ("selective", "indexed")
        return bool(reads or self.automaton_pointer)


@functools.cache
def get_config_defaults() -> Mapping[str, Any]:
    """Return the default of each of our own configuration fields, in order."""
    parameters = inspect.signature(UniMatrixConfig.__init__).parameters
    return {
        name: p.default
        for name, p in parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }


def list_config_fields() -> list[str]:
    """Return the names of our own configuration fields, in order."""
    return list(get_config_defaults())


@functools.cache
def _list_known_keys() -> frozenset[str]:
    """Return the keywords that a configuration takes: our own fields and Hugging Face's."""
    inherited = set(PreTrainedConfig().to_dict())
    return frozenset(inherited | _HUGGING_FACE_KEYS | set(list_config_fields()))


def _is_known(name: str) -> bool:
    return name.startswith("_") or name in _list_known_keys()


def _require_known_keys(names: Iterable[str]) -> None:
    """Raise ``InputError`` for a key that is neither our field nor Hugging Face's."""
    for name in names:
        if not _is_known(name):
            raise InputError(
                f"unknown configuration key {name!r}.{suggest(name, list_config_fields())}"
            )
