"""What the fields of a configuration may be, each alone and beside the others."""

from typing import TYPE_CHECKING

from unimatrix.errors import InputError, require_choice
from unimatrix.ops.hindsight import LABELS
from unimatrix.ops.text_index.state import require_window

if TYPE_CHECKING:
    from unimatrix.configuration import UniMatrixConfig

FORMAT_VERSION = 3
_NUM_BYTES = 256
CHOICES: dict[str, tuple[str, ...]] = {
    "residual_path": ("none", "previous_token", "suffix_automaton"),
    "update_rules": ("outer", "mixed", "delta", "none"),
    "associative_memory": ("none", "dense", "slots", "selective", "indexed"),
    "slot_source": ("token", "hidden"),
    "norm_type": ("layer_norm", "rms_norm"),
    "feed_forward_type": ("gelu", "swiglu"),
    "repeated_key": ("last", "first"),
    "hindsight": ("none", *LABELS),
    "index_units": ("words", "tokens"),
}
"""The values of every field that is a choice."""

_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 1,
    "intermediate_size": 1,
    "slot_key_size": 1,
    "num_slots": 1,
    "slots_per_read": 1,
    "slot_hops": 1,
    "modulation_size": 0,
    "conv_kernel": 0,
    "product_key_codes": 0,
    "index_heads": 1,
    "index_head_dim": 1,
    "index_reads_at": 0,
}
_POSITIVE_OR_NONE = (
    "max_position_embeddings",
    "automaton_window",
    "longest_retention",
    "slot_fade_tokens",
)
_NOT_NEGATIVE = ("slot_margin", "hindsight_share", "hindsight_floor", "hindsight_weight")


def check_configuration(config: "UniMatrixConfig") -> None:
    """Raise ``InputError`` for values that no model can have."""
    for name, least in _LEAST.items():
        _require_integer(name, getattr(config, name), least)
    for name in _POSITIVE_OR_NONE:
        if getattr(config, name) is not None:
            _require_integer(name, getattr(config, name), 1)
    for name, choices in CHOICES.items():
        require_choice(f"{name} is", getattr(config, name), choices)
    for name in _NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least 0")
    if not 0 <= config.dropout < 1:
        raise InputError(f"dropout is {config.dropout}; it must lie in [0, 1)")
    _check_matrix_state(config)
    _check_slots(config)
    _check_contexts(config)
    _check_pointers(config)
    if config.associative_memory == "indexed":
        _check_index(config)
    if config.pad_token_id is None or not 0 <= config.pad_token_id < config.vocab_size:
        raise InputError(
            f"pad_token_id is {config.pad_token_id}; it must lie in 0..{config.vocab_size - 1} "
            "(vocab_size - 1)"
        )
    if config.format_version > FORMAT_VERSION:
        raise InputError(
            f"this model has format version {config.format_version} and this release reads up to "
            f"{FORMAT_VERSION}; upgrade unimatrix-lm"
        )
    if config.format_version < 2 and config.automaton_window is not None:
        raise InputError(
            "this model has format version 1, whose automaton kept up to twice "
            f"automaton_window={config.automaton_window} tokens; set format_version to 2 in its "
            "config.json to go on with exactly the last so many"
        )
    if config.format_version < 3 and config.associative_memory == "indexed":
        raise InputError(
            f"this model has format version {config.format_version}, whose indexed attention did "
            "not look at the units that lead to its places; train it again with this release"
        )


def _check_matrix_state(config: "UniMatrixConfig") -> None:
    """Raise ``InputError`` for parts of the matrix state that do not go together."""
    if config.conv_kernel == 1:
        raise InputError("conv_kernel is 1, which mixes nothing; pass 0 for none, or 2 or more")
    if config.update_rules != "delta":
        return
    if not config.normalized_keys:
        raise InputError(
            "update_rules='delta' needs normalized_keys=True: with longer keys the state may "
            "grow without bound"
        )
    if config.norm_guard:
        raise InputError("update_rules='delta' keeps its state bounded; leave norm_guard out")


def _check_slots(config: "UniMatrixConfig") -> None:
    """Raise ``InputError`` for options of slots on a memory that cannot have them."""
    if config.identity_lookup and config.slot_key_size != config.hidden_size:
        raise InputError(
            f"identity_lookup needs slot_key_size equal to hidden_size ({config.hidden_size}), "
            f"not {config.slot_key_size}; leave slot_key_size out"
        )
    has_slots = config.associative_memory == "slots"
    if config.product_key_codes and (not has_slots or config.identity_lookup):
        raise InputError(
            f"product_key_codes is {config.product_key_codes}, and needs "
            "associative_memory='slots' with identity_lookup=False; pass 0"
        )
    if config.product_key_codes and config.slot_key_size % 2:
        raise InputError(
            f"product_key_codes halves the keys, and slot_key_size is {config.slot_key_size};"
            " make it even"
        )
    by_token = config.associative_memory == "selective" and config.slot_key_patterns == [[0]]
    if config.slot_hops > 1 and not (has_slots or by_token):
        raise InputError(
            f"slot_hops is {config.slot_hops}, and needs associative_memory='slots', or "
            "'selective' with slot_key_patterns [[0]]; pass 1"
        )


def _check_contexts(config: "UniMatrixConfig") -> None:
    """Raise ``InputError`` for contexts that selective slots cannot have."""
    named = [("slot_read_offsets", config.slot_read_offsets)]
    named += [("slot_key_patterns", pattern) for pattern in config.slot_key_patterns]
    for name, distances in named:
        if not isinstance(distances, list | tuple):
            raise InputError(f"{name} holds {distances!r}; it needs lists of distances back")
        if not distances or len(set(distances)) < len(distances):
            raise InputError(
                f"{name} holds {distances}; it needs at least one distance, none twice"
            )
        for distance in distances:
            _require_integer(name, distance, 0)
    if not config.slot_key_patterns:
        raise InputError("slot_key_patterns is empty; [[0]] is the token itself")
    sees_stream = config.associative_memory == "selective" and config.slot_source == "hidden"
    if sees_stream and config.num_hidden_layers < 2:
        raise InputError(
            "slot_source='hidden' lets the gate see the first depth step, so num_hidden_layers "
            f"must be at least 2, not {config.num_hidden_layers}"
        )


def _check_pointers(config: "UniMatrixConfig") -> None:
    """Raise ``InputError`` for a pointer at something that the model does not have."""
    if config.pointer and config.associative_memory not in ("slots", "selective", "indexed"):
        raise InputError(
            "pointer=True needs associative_memory='slots', 'selective' or 'indexed', not "
            f"{config.associative_memory!r}"
        )
    if config.automaton_pointer and config.residual_path != "suffix_automaton":
        raise InputError(
            "automaton_pointer=True needs residual_path='suffix_automaton', not "
            f"{config.residual_path!r}"
        )


def _check_index(config: "UniMatrixConfig") -> None:
    """Raise ``InputError`` for an index that the model cannot have."""
    if config.automaton_window is None:
        raise InputError(
            "associative_memory='indexed' needs automaton_window, the tokens that it remembers; "
            "pass an even number"
        )
    require_window("automaton_window", config.automaton_window, config.index_units)
    if config.index_units == "words" and config.vocab_size < _NUM_BYTES:
        raise InputError(
            f"index_units='words' reads ids below {_NUM_BYTES} as bytes, and vocab_size is "
            f"{config.vocab_size}; pass index_units='tokens'"
        )
    if config.index_reads_at >= config.num_hidden_layers:
        raise InputError(
            f"index_reads_at is {config.index_reads_at}, and num_hidden_layers "
            f"{config.num_hidden_layers}; pass a number of depth steps below that"
        )


def _require_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")
