"""What ``forward`` takes: every argument is checked once, here."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from unimatrix.cache import UniMatrixCache, require_own_cache, start_cache
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.modeling_documents import DocumentMarks, find_starts, refuse_stream
from unimatrix.nn.packing import Group, Packing, lay_out
from unimatrix.nn.padding import Padding, find_padding
from unimatrix.ops.checks import is_transformed

# Tokens of width 64 that take as long as one more pass of the layers, on one thread of a CPU.
_PASS_COST, _PASS_WIDTH = 256, 64
# Elsewhere a pass mostly waits to be started. Not measured: it only decides how rows are laid out.
_PASS_COST_ELSEWHERE = 8_192


class LossOptions(TypedDict, total=False):
    """Keywords of ``UniMatrixForCausalLM.forward`` that its signature does not name.

    ``Trainer`` takes every parameter with "label" in its name for a label that each batch has, and
    evaluates without a loss where one is missing.

    Attributes:
        shift_labels: [B, T] int64, the target of each position, -100 ignored; takes precedence
            over ``labels``.
        loss_weights: [B, T], by which the target of each position counts in the loss; the loss is
            divided by their sum over the targets unless ``num_items_in_batch`` says otherwise.
    """

    shift_labels: Tensor | None
    loss_weights: Tensor | None


class Inputs(NamedTuple):
    """What a forward pass reads, checked.

    Attributes:
        ids: [B, T] int64, real tokens first in each row; -1 where only embeddings are given.
        embeddings: [B, T, D] likewise, in place of those of the ids, or ``None``.
        positions: [B, T] int64, of each real token; ``None`` without a table of positions.
        suffix_match: [B, T, 2] int64, as ``UniMatrixModel.forward`` takes it.
        targets: [B, T] int64, its ``pointer_targets``.
        past: the cache to continue from.
        rows: how rows were rearranged: for padding, or as documents; ``None`` is not at all.
        lengths: real tokens of each row, [B] int64; ``None`` is T for all.
        keeps_cache: whether a cache is returned.
    """

    ids: Tensor
    embeddings: Tensor | None
    positions: Tensor | None
    suffix_match: Tensor | None
    targets: Tensor | None
    past: UniMatrixCache
    rows: Padding | Packing | None
    lengths: Tensor | None
    keeps_cache: bool

    @property
    def passes(self) -> list["Inputs"]:
        """What the layers read: all rows at once, or one group of documents after the other."""
        if not isinstance(self.rows, Packing):
            return [self]
        return [self._take(group) for group in self.rows.groups]

    def _take(self, group: Group) -> "Inputs":
        """Return the documents of a group as rows, of inputs in the caller's columns."""
        ids = group.pack(self.ids)
        beside = (self.embeddings, self.positions, self.suffix_match, self.targets)
        features, positions, match, targets = (None if x is None else group.pack(x) for x in beside)
        past = self.past.select_rows(torch.zeros(len(ids), dtype=torch.int64))
        texts = (ids, features, positions, match, targets)
        return Inputs(*texts, past, self.rows, group.lengths, keeps_cache=False)


def read_inputs(
    model: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    suffix_match: Tensor | None,
    pointer_targets: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: UniMatrixCache | None,
    use_cache: bool | None,
    token_type_ids: Tensor | None,
    output_attentions: bool | None,
    marks: Mapping[str, Any] = {},
    in_one_pass: bool = False,
) -> Inputs:
    """Return what ``UniMatrixModel.forward`` reads of its arguments, and refuse what it cannot.

    Args:
        model: a ``UniMatrixModel``; those not named here are arguments of its ``forward``.
        marks: ``DocumentMarks`` of the caller.
        in_one_pass: whether documents of all lengths have to be rows of one pass.

    Raises:
        InputError: as ``UniMatrixModel.forward``; ``TypeError`` likewise.
    """
    config, marks = model.config, _take_known(marks, DocumentMarks)
    refuse_unused(config, output_attentions, token_type_ids)
    refuse_transform(model)
    ids = require_tokens(model, input_ids, inputs_embeds)
    if input_ids is not None:
        num_tokens = getattr(model.embed_tokens, "num_embeddings", config.vocab_size)
        require_known("token id", ids, num_tokens)
    if suffix_match is not None:
        others = (attention_mask, past_key_values)
        is_continued = bool(use_cache) or any(other is not None for other in others)
        require_match(config, suffix_match, ids, is_continued=is_continued)
    asked = use_cache
    if use_cache is None:
        use_cache = config.use_cache and not model.training
    keeps_cache = use_cache and suffix_match is None
    past = _take_cache(model, past_key_values, ids, is_kept=keeps_cache)
    padding, table = None, model.embed_positions
    if attention_mask is not None:
        padding = find_padding(attention_mask, ids, past.num_columns)
    if position_ids is not None or marks:
        said = (marks, position_ids, ids, past.num_tokens, padding)
        starts = find_starts(*said, has_table=table is not None)
        if starts is not None:
            refuse_stream(starts, continues=past_key_values is not None, keeps=asked)
            cost = None if in_one_pass else _estimate_pass(config, ids)
            texts = (ids, inputs_embeds, None, suffix_match, pointer_targets)
            packing = lay_out(starts, padding, cost)
            return _number_tokens(Inputs(*texts, past, packing, None, keeps_cache=False), table)
    if padding is not None:
        ids = padding.pack(ids)
        inputs_embeds, pointer_targets = (
            None if x is None else padding.pack(x) for x in (inputs_embeds, pointer_targets)
        )
    lengths = None if padding is None else padding.lengths
    texts = (ids, inputs_embeds, None, suffix_match, pointer_targets)
    return _number_tokens(Inputs(*texts, past, padding, lengths, keeps_cache), table)


def _estimate_pass(config: UniMatrixConfig, ids: Tensor) -> int:
    """Return how many tokens take as long as one more pass of the layers does."""
    if ids.device.type != "cpu":
        return _PASS_COST_ELSEWHERE
    return _PASS_COST * _PASS_WIDTH // config.hidden_size


def _take_cache(
    model: Any, past_key_values: UniMatrixCache | None, ids: Tensor, *, is_kept: bool
) -> UniMatrixCache:
    """Return the cache to continue from, checked, or that of an empty sequence."""
    past = require_own_cache(past_key_values)
    if past is None:
        return start_cache(model.config, ids, is_kept=is_kept)
    past.check(model, ids.shape[0])
    return past


def _number_tokens(inputs: Inputs, table: Any) -> Inputs:
    """Return inputs with the position of each real token; raise if a table does not reach so far.

    Args:
        inputs: without positions.
        table: of positions; ``None`` is a model that embeds none.
    """
    if table is None:
        return inputs
    ids, past, rows = inputs.ids, inputs.past, inputs.rows
    if isinstance(rows, Packing):
        positions = rows.count_tokens()
        needed = int(positions.max()) + 1
    else:
        num_new: Tensor | int = ids.shape[1] if inputs.lengths is None else inputs.lengths
        positions = past.num_tokens.unsqueeze(1) + torch.arange(ids.shape[1], device=ids.device)
        needed = ids.shape[1]
        if past.num_columns or rows is not None:
            needed = int((past.num_tokens + num_new).max())
        positions = positions.clamp(max=table.num_embeddings - 1)
    _require_table(needed, table.num_embeddings)
    return inputs._replace(positions=positions)


def _require_table(needed: int, num_rows: int) -> None:
    """Raise ``InputError`` if a table of positions has too few rows for a text."""
    if needed > num_rows:
        raise InputError(
            f"the input reaches {needed} tokens and the position table has {num_rows}; pass "
            "fewer, or train a model with max_position_embeddings=None, which has no table"
        )


def require_known(name: str, ids: Tensor, num_tokens: int, lowest: int = 0) -> None:
    """Raise ``InputError`` for an id that is not in the vocabulary; looked at on the CPU alone.

    A GPU would be waited for, and ends the process's work at such an id by itself.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in ids.aminmax())
    if smallest < lowest or largest >= num_tokens:
        strange = smallest if smallest < lowest else largest
        raise InputError(
            f"{name} {strange} is not in the vocabulary; pass {lowest} to {num_tokens - 1}"
        )


def take_loss_options(options: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return ``LossOptions`` in their order; raise ``TypeError`` for any other keyword."""
    known = _take_known(options, LossOptions)
    return known.get("shift_labels"), known.get("loss_weights")


def _take_known(options: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return keywords that are not ``None``; raise ``TypeError`` for one that a dict does not name.

    Args:
        options: what a caller passed.
        kind: a ``TypedDict``.
    """
    for name in options:
        if name not in kind.__annotations__:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    return {name: value for name, value in options.items() if value is not None}


def require_shape(name: str, given: Tensor | None, shape: list[int]) -> None:
    """Raise ``InputError`` unless a tensor has one value for each of [B, T] tokens."""
    if given is not None and list(given.shape) != shape:
        raise InputError(f"{name} has shape {list(given.shape)}; pass {shape}, one value per token")


def take_targets(name: str, given: Tensor | None, shape: list[int] | None) -> Tensor | None:
    """Return targets as int64; raise ``InputError`` unless they are whole numbers of a shape.

    Args:
        name: what the caller calls them.
        given: the targets; ``None`` is none.
        shape: [B, T]; ``None`` is any.
    """
    if given is None:
        return None
    if shape is not None:
        require_shape(name, given, shape)
    return _take_whole(name, given)


def _take_whole(name: str, given: Tensor) -> Tensor:
    """Return int32 as int64, which compiled code relies on; refuse other types."""
    if given.dtype == torch.int32:
        return given.long()
    if given.dtype != torch.int64:
        raise InputError(f"{name} has dtype {given.dtype}; pass whole numbers as torch.int64")
    return given


def _list_id_readers(model: Any) -> list[str]:
    """Return the configuration fields by which a model reads token ids beside the embedding."""
    fields = [mixer.chosen_by for mixer in model.mixers if mixer.reads_ids]
    fields += ["modulation_size"] if model.token_modulation is not None else []
    return [f"{name}={getattr(model.config, name)!r}" for name in fields]


def require_tokens(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return the ids [B, T] of the tokens, -1 where only their embeddings are given.

    Raises:
        InputError: unless there are either ids [B, T] or embeddings [B, T, D], of at least one
            token, or for embeddings where the model reads ids.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither was" if input_ids is None else "both were"
        raise InputError(f"pass exactly one of input_ids and inputs_embeds; {given} given")
    if input_ids is not None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise InputError(
                f"input_ids has shape {list(input_ids.shape)}; pass [batch, tokens] with at least "
                "one token, for instance BOS"
            )
        return _take_whole("input_ids", input_ids)
    assert inputs_embeds is not None
    if readers := _list_id_readers(model):
        raise InputError(
            "inputs_embeds says no token ids, which this model reads in "
            f"{', '.join(readers)}; pass input_ids"
        )
    width = model.config.hidden_size
    if inputs_embeds.dim() != 3 or 0 in inputs_embeds.shape[1:2]:
        raise InputError(
            f"inputs_embeds has shape {list(inputs_embeds.shape)}; pass [batch, tokens, {width}] "
            "with at least one token"
        )
    if inputs_embeds.shape[2] != width:
        raise InputError(
            f"inputs_embeds has width {inputs_embeds.shape[2]}; this model's is {width}"
        )
    return torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)


def refuse_unused(
    config: UniMatrixConfig, output_attentions: bool | None, token_type_ids: Tensor | None
) -> None:
    """Raise ``InputError`` for what other models take and this one has no use for."""
    if output_attentions is None:
        output_attentions = config.output_attentions
    if output_attentions:
        raise InputError(
            "output_attentions=True: this model has no attention weights; leave it out"
        )
    if token_type_ids is not None and bool(token_type_ids.any()):
        raise InputError("token_type_ids has types other than 0: this model has none; leave it out")


def refuse_transform(model: Any) -> None:
    """Raise ``InputError`` where a transform of ``torch.func`` would have to read a text."""
    if not is_transformed():
        return
    for mixer in model.mixers:
        if mixer.state_device is not None and mixer.runs_operator:
            raise InputError(
                f"torch.func cannot look into the index or automaton of {mixer.chosen_by}="
                f"{getattr(model.config, mixer.chosen_by)!r}; use torch.autograd, for second "
                "derivatives after model.set_backend('reference')"
            )


def require_match(
    config: UniMatrixConfig, match: Tensor, ids: Tensor, *, is_continued: bool
) -> None:
    """Raise ``InputError`` unless what the automaton said may stand for running it.

    Args:
        config: of the model.
        match: ``suffix_match`` of ``UniMatrixModel.forward``.
        ids: [B, T].
        is_continued: whether there is a cache, before or after, or a mask.
    """
    if config.residual_path != "suffix_automaton":
        raise InputError("suffix_match is for models with residual_path 'suffix_automaton'")
    if is_continued:
        raise InputError("suffix_match is for whole rows; leave out cache and attention_mask")
    shape = (*ids.shape, 2)
    if match.shape != shape or match.dtype != torch.int64:
        raise InputError(
            f"suffix_match is {list(match.shape)} {match.dtype}; pass {list(shape)} torch.int64"
        )
    require_known("suffix_match predicts", match[..., 0], config.vocab_size, lowest=-1)
