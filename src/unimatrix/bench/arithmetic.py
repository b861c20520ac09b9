"""The arithmetic floor: the multiply-adds that a model cannot do without, counted from its sizes.

Counted are products that are summed: projections, the recurrence of a state in its cheapest form
(decay, write and read of each of its numbers), scores and weighted sums of what is read, attention
to earlier tokens alone. Not counted is work on single numbers (norms, activations, gates) and on
integers (suffix automaton, selective slots). A backward pass costs two products for each of the
forward, except where a choice has no gradient.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from unimatrix.bench.peers import TIMED_PEERS, count_linear
from unimatrix.configuration import UniMatrixConfig
from unimatrix.ops.indexed_attention import NUM_OFFSETS, REACH
from unimatrix.ops.text_index import NUM_KINDS, NUM_PLACES, NUM_RECENT

FLOPS_PER_MULTIPLY_ADD = 2
_NUM_RULES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCost:
    """Multiply-adds of one token in one forward pass.

    Attributes:
        linear: in projections, the head apart.
        head: in the projection to the vocabulary.
        mixing: in recurrences, reads and convolutions.
        choices: in scores that only choose, without gradient.
        mixing_per_earlier: in attention, for the token itself and each before it.
        choices_per_earlier: in scores that only choose, likewise.
    """

    linear: int = 0
    head: int = 0
    mixing: int = 0
    choices: int = 0
    mixing_per_earlier: int = 0
    choices_per_earlier: int = 0

    def count_forward(self, num_tokens: int) -> int:
        """Return the multiply-adds of a sequence with the logits of all positions."""
        graded, ungraded = self._sum_sequence(num_tokens)
        return graded + ungraded

    def count_train_step(self, num_tokens: int) -> int:
        """Return the multiply-adds of forward and backward over a sequence."""
        graded, ungraded = self._sum_sequence(num_tokens)
        return 3 * graded + ungraded

    def count_prefill(self, num_tokens: int) -> int:
        """Return the multiply-adds of reading a sequence for the logits of its last position."""
        return self.count_forward(num_tokens) - (num_tokens - 1) * self.head

    def count_token(self, position: int) -> int:
        """Return the multiply-adds of one token that follows ``position`` others."""
        per_earlier = self.mixing_per_earlier + self.choices_per_earlier
        once = self.linear + self.head + self.mixing + self.choices
        return once + (position + 1) * per_earlier

    def _sum_sequence(self, num_tokens: int) -> tuple[int, int]:
        """Return what a sequence costs with a gradient and without one."""
        pairs = num_tokens * (num_tokens + 1) // 2
        graded = num_tokens * (self.linear + self.head + self.mixing)
        ungraded = num_tokens * self.choices
        return graded + pairs * self.mixing_per_earlier, ungraded + pairs * self.choices_per_earlier


def count_peer(name: str, model: Any) -> TokenCost:
    """Count a model of another library, built by ``TIMED_PEERS``."""
    peer, config = TIMED_PEERS[name], model.config
    head = model.get_output_embeddings()
    layers = int(config.num_hidden_layers)
    attended = 2 * config.hidden_size if peer.attends else 0
    return TokenCost(
        linear=count_linear(model, head),
        head=head.weight.numel(),
        mixing=layers * peer.count_mixing(config),
        mixing_per_earlier=layers * attended,
    )


def count_unimatrix(config: UniMatrixConfig) -> TokenCost:
    """Count a UniMatrix by its parts; the letters are those of ``configuration``.

    A depth step costs: the matrix mixer's projections D (3 H N + H + D) + H N D (with mixed rules
    D (H N + 3 H) more, with the delta rule D H), 3 H N^2 for its states (H N^2 more for the
    symmetric rule, the delta rule and the norm guard each), K D for a short convolution, a read
    gate of D^2, a context gate of D^2, and a feed-forward network of 2 D F or, gated, 3 D F. What
    retrieves is counted once, or at each depth step with the hidden source: slots score M C (a
    choice) and read K (C + D) at each hop, product keys score C for an entry of both codebooks;
    dense memory scores C an earlier pair.
    """
    width, depth = config.hidden_size, config.num_hidden_layers
    linear, mixing = _count_matrix_mixer(config)
    gated = 3 if config.feed_forward_type == "swiglu" else 2
    linear += gated * width * config.intermediate_size
    linear += width**2 * (config.residual_path != "none")
    retrieval = _count_retrieval(config)
    memory = config.associative_memory
    reads_stream = config.slot_source == "hidden" and memory in ("slots", "dense")
    repeats = depth if reads_stream else 1
    # The gate of what was read runs from the depth step on at which it was.
    first = {"indexed": config.index_reads_at, "selective": config.slot_source == "hidden"}
    once = width**2 * (depth - first.get(memory, 0)) * (memory != "none")
    once += width * config.modulation_size + width * config.uses_pointer
    if config.uses_mixture:
        reads = config.index_heads if memory == "indexed" else _count_selective_reads(config)
        once += width * (reads * config.pointer + config.automaton_pointer)
    return TokenCost(
        linear=depth * linear + once + repeats * retrieval.linear,
        head=width * config.vocab_size,
        mixing=depth * mixing + repeats * retrieval.mixing,
        choices=repeats * retrieval.choices,
        choices_per_earlier=repeats * retrieval.choices_per_earlier,
    )


def _count_matrix_mixer(config: UniMatrixConfig) -> tuple[int, int]:
    """Return the multiply-adds of one depth step in projections and in the matrix states."""
    if config.update_rules == "none":
        return 0, 0
    width, heads, rows = config.hidden_size, config.num_attention_heads, config.head_dim
    inner, rules = heads * rows, config.update_rules
    mixed, delta = rules == "mixed", rules == "delta"
    linear = width * (3 * inner + heads + width) + inner * width
    linear += mixed * width * (inner + _NUM_RULES * heads) + delta * width * heads
    state = heads * rows**2 * (3 + mixed + delta + bool(config.norm_guard))
    return linear, state + config.conv_kernel * width


def _count_selective_reads(config: UniMatrixConfig) -> int:
    """Return Q, what a position looks up in selective slots."""
    return len(config.slot_key_patterns) * len(config.slot_read_offsets) * config.slot_hops


def _count_retrieval(config: UniMatrixConfig) -> TokenCost:
    """Return what one retrieval costs a token, its read gate apart."""
    width, key, reads = config.hidden_size, config.slot_key_size, config.slots_per_read
    projected = 2 * width * key * (not config.identity_lookup)
    projected += width**2 * (not config.identity_values)
    read = reads * (key + width)
    if config.associative_memory == "dense":
        return TokenCost(linear=projected, mixing=read, choices_per_earlier=key)
    if config.associative_memory == "slots":
        hops = config.slot_hops
        linear = projected + 2 * width * config.write_gate + (hops - 1) * width * key
        linear += config.product_key_codes * key
        return TokenCost(linear=linear, mixing=hops * read, choices=hops * config.num_slots * key)
    if config.associative_memory == "selective":
        inputs = (3 if config.slot_source == "hidden" else 2) * width
        gate = (inputs + len(config.slot_key_patterns)) * (width // 2)
        return TokenCost(linear=gate + width**2, mixing=_count_selective_reads(config) * width)
    if config.associative_memory == "indexed":
        inner = config.index_heads * config.index_head_dim
        # Both queries, value and readout, and the numbers added to the scores.
        biases = NUM_OFFSETS + NUM_KINDS + 1 + NUM_RECENT
        linear = 4 * width * inner + width * config.index_heads * biases
        # Both keys of every token, at most: a key that no position reads is not made.
        keys = 2 * (width**2 + width * inner + REACH * width)
        entries = 2 * NUM_PLACES * NUM_OFFSETS + NUM_PLACES
        return TokenCost(linear=linear, mixing=keys + entries * inner)
    return TokenCost()


def count_model(name: str, model: nn.Module) -> TokenCost:
    """Count a peer, or a UniMatrix of any other name."""
    return count_peer(name, model) if name in TIMED_PEERS else count_unimatrix(model.config)  # type: ignore[arg-type]
