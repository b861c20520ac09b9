"""The configuration of every UniMatrix model, and the presets as differences from it.

Letters, everywhere in this project: B batch, T tokens, D model width, H heads, N rows = columns of
a head's matrix, L depth steps, M slots, C slot-key width, K pairs read per token, R update rules
(3), V vocabulary, F feed-forward width, E modulation width.
"""

import inspect
from typing import Any, Self

from transformers import PreTrainedConfig

from unimatrix.errors import InputError, suggest

FORMAT_VERSION = 1

RESIDUAL_PATHS = ("none", "previous_token", "suffix_automaton")
UPDATE_RULES = ("outer", "mixed", "none")
ASSOCIATIVE_MEMORIES = ("none", "dense", "slots")
SLOT_SOURCES = ("token", "hidden")

_ROSA: dict[str, Any] = {"residual_path": "previous_token"}
_DISCOVERY: dict[str, Any] = {
    "residual_path": "previous_token",
    "modulation_size": 32,
    "update_rules": "mixed",
    "norm_guard": True,
    "depth_step_embedding": True,
}
_ASSOC: dict[str, Any] = {
    "associative_memory": "dense",
    "slot_source": "hidden",
    "slot_key_size": 64,
    "slots_per_read": 8,
}
_HARD: dict[str, Any] = {"slots_per_read": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "core": {},
    "rosa": _ROSA,
    "discovery": _DISCOVERY,
    "assoc": _ASSOC,
    "assoc-hard": _ASSOC | _HARD,
    "rosa-assoc": _ROSA | _ASSOC,
    "rosa-assoc-hard": _ROSA | _ASSOC | _HARD,
    "discovery-assoc": _DISCOVERY | _ASSOC,
    "sparsepointer": {
        "associative_memory": "slots",
        "slot_source": "token",
        "identity_lookup": True,
        "identity_values": True,
        "pointer": True,
    },
}

# Accepted beside our own fields although a fresh PreTrainedConfig does not list them.
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
        residual_path: ``none``, ``previous_token`` (an embedding of the previous token) or
            ``suffix_automaton`` (an embedding of what followed the longest earlier match).
        update_rules: ``outer``, ``mixed`` (outer, diagonal and symmetric writes, mixed per token
            and head) or ``none`` (no matrix state at all).
        norm_guard: divide a matrix state by its Frobenius norm where that exceeds 1.
        depth_step_embedding: add a learned vector per depth step to the residual stream.
        modulation_size: E, width of the per-token table that scales the stream; 0 is off.
        associative_memory: ``none``, ``dense`` (append-only) or ``slots`` (M of them).
        slot_source: features that queries, keys and values come from: ``token`` (the embedding) or
            ``hidden`` (the normalised stream of each depth step).
        slot_key_size: C; ``None`` is D.
        num_slots: M, slots per sequence (and depth step, with the hidden source).
        slots_per_read: K, best-scoring pairs that a read mixes.
        identity_lookup: queries and keys are the source itself, without projections; needs C = D.
        identity_values: values are the source itself, without a projection.
        match_threshold: cosine above which a write overwrites the slot it matches.
        strength_floor: a slot counts as filled while its strength exceeds this.
        write_gate: learn the strength of a write; otherwise it is 1.
        pointer: let the ids of the slots read vote on the logits.
        automaton_window: W, bound on the suffix automaton's text (at most 2 W tokens are kept);
            ``None`` keeps the whole stream.
        initializer_range: standard deviation of Linear and Embedding weights at the start.
        layer_norm_eps: added to the variance inside the root.
        use_cache: return a cache from ``forward`` outside training.
        pad_token_id: also the residual context of the first token with ``previous_token``.
        bos_token_id: first token of every stream.
        eos_token_id: last token of a document.
        tie_word_embeddings: the head shares the embedding's weights.
        format_version: version of the checkpoint's layout.
        kwargs: fields of ``PreTrainedConfig``; anything else raises.

    Raises:
        InputError: for an unknown key (with the nearest valid name) or an unusable value.
    """

    model_type = "unimatrix"
    keys_to_ignore_at_inference = ["past_key_values", "pointer_token_ids", "pointer_weights"]  # noqa: RUF012

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
        residual_path: str = "none",
        update_rules: str = "outer",
        norm_guard: bool = False,
        depth_step_embedding: bool = False,
        modulation_size: int = 0,
        associative_memory: str = "none",
        slot_source: str = "hidden",
        slot_key_size: int | None = None,
        num_slots: int = 32,
        slots_per_read: int = 4,
        identity_lookup: bool = False,
        identity_values: bool = False,
        match_threshold: float = 0.85,
        strength_floor: float = 0.05,
        write_gate: bool = True,
        pointer: bool = False,
        automaton_window: int | None = None,
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
        self.residual_path = residual_path
        self.update_rules = update_rules
        self.norm_guard = norm_guard
        self.depth_step_embedding = depth_step_embedding
        self.modulation_size = modulation_size
        self.associative_memory = associative_memory
        self.slot_source = slot_source
        self.slot_key_size = hidden_size if slot_key_size is None else slot_key_size
        self.num_slots = num_slots
        self.slots_per_read = slots_per_read
        self.identity_lookup = identity_lookup
        self.identity_values = identity_values
        self.match_threshold = match_threshold
        self.strength_floor = strength_floor
        self.write_gate = write_gate
        self.pointer = pointer
        self.automaton_window = automaton_window
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
        # Set again: some releases of transformers assign class defaults after the keywords.
        for name, value in special_tokens.items():
            setattr(self, name, value)
        self.tie_word_embeddings = tie_word_embeddings
        self._validate()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the configuration of a preset, with any field overridden.

        Args:
            name: a key of ``PRESETS``.
            overrides: configuration fields, as in the constructor.

        Raises:
            InputError: for an unknown preset or field.
        """
        if name not in PRESETS:
            raise InputError(
                f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}."
                f"{suggest(name, PRESETS)}"
            )
        return cls(**(PRESETS[name] | overrides))

    @property
    def uses_pointer(self) -> bool:
        """Whether retrieved token ids vote on the logits."""
        return bool(self.pointer and self.associative_memory == "slots")

    def _validate(self) -> None:
        """Raise ``InputError`` for values that no model can have."""
        positive = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "slot_key_size",
            "num_slots",
            "slots_per_read",
        )
        for name in positive:
            _require_integer(name, getattr(self, name), minimum=1)
        _require_integer("modulation_size", self.modulation_size, minimum=0)
        for name in ("max_position_embeddings", "automaton_window"):
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name), minimum=1)
        _require_choice("residual_path", self.residual_path, RESIDUAL_PATHS)
        _require_choice("update_rules", self.update_rules, UPDATE_RULES)
        _require_choice("associative_memory", self.associative_memory, ASSOCIATIVE_MEMORIES)
        _require_choice("slot_source", self.slot_source, SLOT_SOURCES)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        if self.identity_lookup and self.slot_key_size != self.hidden_size:
            raise InputError(
                f"identity_lookup needs slot_key_size equal to hidden_size ({self.hidden_size}), "
                f"not {self.slot_key_size}; leave slot_key_size out"
            )
        if self.pointer and self.associative_memory != "slots":
            raise InputError(
                f"pointer=True needs associative_memory='slots', not {self.associative_memory!r}"
            )
        if self.pad_token_id is None or not 0 <= self.pad_token_id < self.vocab_size:
            raise InputError(
                f"pad_token_id is {self.pad_token_id}; it must lie in 0..{self.vocab_size - 1} "
                "(vocab_size - 1)"
            )
        if self.format_version > FORMAT_VERSION:
            raise InputError(
                f"this model has format version {self.format_version} and this release reads up to "
                f"{FORMAT_VERSION}; upgrade unimatrix-lm"
            )


def list_config_fields() -> list[str]:
    """Return the names of our own configuration fields, in order."""
    parameters = inspect.signature(UniMatrixConfig.__init__).parameters
    return [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _require_known_keys(extra: dict[str, Any]) -> None:
    """Raise for a key that neither we nor Hugging Face know."""
    if not extra:
        return
    known = set(PreTrainedConfig().to_dict()) | _HUGGING_FACE_KEYS
    for name in extra:
        if name not in known and not name.startswith("_"):
            raise InputError(
                f"unknown configuration key {name!r}.{suggest(name, list_config_fields())}"
            )


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(
            f"{name} is {value!r}; choose one of {', '.join(choices)}."
            f"{suggest(str(value), choices)}"
        )


def _require_integer(name: str, value: object, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {minimum}")
