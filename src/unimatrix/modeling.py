"""From token ids to logits: embed, apply one block L times, predict.

The numbered comments are the steps of ``docs/forward.md``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from unimatrix.cache import UniMatrixCache, require_own_cache, start_cache
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.hub.split_head import PointedHidden, keep_pointer, splits_truly
from unimatrix.loss import (
    IGNORED_LABEL,
    UnscoredRows,
    add_scale,
    choose_rows,
    compute_loss,
    ignore_padding,
)
from unimatrix.modeling_inputs import (
    LossOptions,
    refuse_unused,
    require_match,
    require_positions,
    require_shape,
    require_tokens,
    take_shift_labels,
    take_targets,
)
from unimatrix.modeling_outputs import UniMatrixCausalLMOutput, UniMatrixModelOutput
from unimatrix.nn.block import (
    Associations,
    BlockWeights,
    DepthCarry,
    Retrieval,
    Sequence,
    UniMatrixBlock,
)
from unimatrix.nn.embed_tokens import embed_tokens
from unimatrix.nn.fusion import fuse_head
from unimatrix.nn.norm import build_norm
from unimatrix.nn.packed_linear import is_bare
from unimatrix.nn.padding import Padding, find_padding
from unimatrix.nn.pointer_mixture import MixedLogits, PointerMixture, mix_logits
from unimatrix.nn.previous_token import take_last
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.nn.token_modulation import TokenModulation
from unimatrix.ops.hindsight import HindsightScale
from unimatrix.ops.suffix_automaton import AutomatonState
from unimatrix.ops.text_hash import hash_text
from unimatrix.pretrained import UniMatrixGenerationMixin, UniMatrixPreTrainedModel


class UniMatrixModel(UniMatrixPreTrainedModel):
    """Embed the tokens and apply the block L times.

    Args:
        config: see ``UniMatrixConfig``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        positions, depth_steps = config.max_position_embeddings, config.num_hidden_layers
        self.embed_positions = nn.Embedding(positions, width) if positions else None
        self.embed_depth = nn.Embedding(depth_steps, width) if config.depth_step_embedding else None
        self.residual_context = ResidualContext(config) if config.residual_path != "none" else None
        self.token_modulation = TokenModulation(config) if config.modulation_size else None
        self.dropout = nn.Dropout(config.dropout)
        self.block = UniMatrixBlock(config)
        self.norm = build_norm(config)
        mixer = self.block.selective_mixer if config.pointer else None
        self.pointer_mixture = None
        if config.uses_mixture:
            self.pointer_mixture = PointerMixture(config, mixer.num_reads if mixer else 0)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: UniMatrixCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        gives_up_cache: bool = False,
        suffix_match: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        handles_pointer: bool = False,
        logits_to_keep: int = 0,
    ) -> UniMatrixModelOutput | tuple[Any, ...]:
        """Return the hidden states of every position and the cache after the last.

        Args:
            input_ids: [B, T] int64 or int32, T >= 1.
            attention_mask: [B, T] or [B, past + T], 0 at padding, which may stand anywhere and
                leaves everything carried untouched; ``None`` is no padding.
            past_key_values: the cache to continue from; not altered unless it is given up.
            use_cache: return a cache; ``None`` is ``config.use_cache`` outside training.
            output_hidden_states: return the stream before every depth step; ``None`` is as the
                configuration says.
            return_dict: return a tuple if ``False``; ``None`` is as the configuration says.
            gives_up_cache: the caller does not use ``past_key_values`` again, so its automaton,
                whose copy may take longer than the tokens, is changed in place.
            suffix_match: [B, T, 2] int64, what the suffix automaton says of these rows, each a
                stream of its own: predicted ids and match lengths. A data loader can find them
                while a GPU trains; without, the GPU waits for the CPU here. ``None`` runs it.
            inputs_embeds: [B, T, D], embeddings instead of ``input_ids``, for a model that reads no
                ids beside them.
            position_ids: [B, T], accepted where they count each row's real tokens on, as the model
                does by itself.
            token_type_ids: [B, T], accepted where they are all 0.
            output_attentions: accepted unless true: there are no attention weights.
            handles_pointer: the caller predicts with the pointer as well. Otherwise, where there
                is one, the hidden states refuse to be multiplied with a head (``PointedHidden``).
            logits_to_keep: without effect; callers that split a causal model pass it here as well.

        Returns:
            a ``UniMatrixModelOutput``.

        Raises:
            InputError: for ids that are no [B, T] of at least one token, ids and embeddings both or
                neither, embeddings for a model that reads ids, positions that start anew, a mask
                that does not fit, a cache of another model or of other weights, more tokens than
                the position table has rows, or ``suffix_match`` beside a cache or a mask, or for a
                model without a suffix automaton.
        """
        refuse_unused(self.config, output_attentions, token_type_ids)
        given_ids = require_tokens(self.config, input_ids, inputs_embeds)
        require_match(
            suffix_match,
            given_ids,
            has_automaton=self.config.residual_path == "suffix_automaton",
            is_continued=bool(use_cache)
            or any(x is not None for x in (attention_mask, past_key_values)),
        )
        if suffix_match is not None:
            use_cache = False
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        past_key_values = require_own_cache(past_key_values)
        if past_key_values is None:
            past = start_cache(self.config, given_ids, is_kept=use_cache)
        else:
            past_key_values.check(self, given_ids.shape[0])
            past = past_key_values
        padding = find_padding(attention_mask, given_ids, past.num_columns)
        has_table = self.embed_positions is not None
        require_positions(position_ids, given_ids, past.num_tokens, padding, has_table=has_table)
        lengths = None if padding is None else padding.lengths
        ids = given_ids if padding is None else padding.pack(given_ids)  # [B, T]

        # 2. Token features, and the position of each real token.
        if inputs_embeds is None:
            token_features = embed_tokens(self.embed_tokens, ids, backend=self.block.backend)
        else:
            token_features = inputs_embeds if padding is None else padding.pack(inputs_embeds)
        x = self.dropout(self._add_positions(token_features, past, lengths))

        # 3. What depends on token ids and their embeddings alone is computed once.
        sequence, automaton = self._prepare_sequence(
            ids, past, lengths, suffix_match, gives_up_cache=gives_up_cache, use_cache=use_cache
        )
        retrieval, associations = None, past.associations
        if not self.block.reads_hidden and self.block.selective_mixer is None:
            retrieval, associations = self.block.retrieve(token_features, sequence, associations)

        # 4. The same block at every depth step.
        show = partial(_show, padding) if output_hidden_states else None
        depth = self._apply_depth(x, sequence, past, retrieval, associations, use_cache, show)
        last, pointer = self._point(self.norm(depth.x), depth, sequence)
        if padding is not None:
            last = padding.unpack(last)
            pointer = _unpack_pointer(padding, pointer)
        num_new = ids.shape[1] if lengths is None else lengths
        if not handles_pointer and not splits_truly(self.config):
            last = PointedHidden.mark(last, self.config.vocab_size)
        output = UniMatrixModelOutput(
            last_hidden_state=last,
            # 7. Exactly what is needed to resume.
            past_key_values=UniMatrixCache(
                config_digest=past.config_digest,
                num_columns=past.num_columns + ids.shape[1],
                num_tokens=past.num_tokens + num_new,
                last_token_ids=take_last(ids, lengths, past.last_token_ids),
                depth=depth.carries,
                associations=depth.associations,
                automaton=automaton,
                # Embeddings are no text.
                text_hash=None
                if past.text_hash is None or inputs_embeds is not None
                else hash_text(ids, lengths, past.text_hash),
                origin=self.origin,
                is_sound=True,
            )
            if use_cache
            else None,
            hidden_states=(*depth.hidden_states, last) if output_hidden_states else None,
            pointer_token_ids=pointer.token_ids,
            pointer_weights=pointer.weights,
            pointer_log_weights=pointer.log_weights,
            hindsight_scale=pointer.hindsight_scale,
        )
        returns_dict = self.config.return_dict if return_dict is None else return_dict
        return output if returns_dict else output.to_tuple()

    def _add_positions(self, x: Tensor, past: UniMatrixCache, lengths: Tensor | None) -> Tensor:
        """Add the embedding of each real token's position, if the model has a table."""
        if self.embed_positions is None:
            return x
        num_tokens = x.shape[1]
        positions = past.num_tokens.unsqueeze(1) + torch.arange(num_tokens, device=x.device)
        needed = num_tokens
        if past.num_columns or lengths is not None:
            needed = int((past.num_tokens + (num_tokens if lengths is None else lengths)).max())
        num_rows = self.embed_positions.num_embeddings
        if needed > num_rows:
            raise InputError(
                f"the input reaches {needed} tokens and the position table has {num_rows}; pass "
                "fewer, or train a model with max_position_embeddings=None, which has no table"
            )
        located: Tensor = x + self.embed_positions(positions.clamp(max=num_rows - 1))  # [B, T, D]
        return located

    def _prepare_sequence(
        self,
        ids: Tensor,
        past: UniMatrixCache,
        lengths: Tensor | None,
        suffix_match: Tensor | None,
        *,
        gives_up_cache: bool,
        use_cache: bool,
    ) -> tuple[Sequence, AutomatonState | None]:
        """Return what every depth step sees of the tokens, and the automaton after them."""
        writable = torch.ones_like(ids, dtype=torch.bool)  # [B, T]
        writable[:, 0] = past.num_tokens > 0
        context, automaton, modulation, match = None, None, None, None
        if suffix_match is not None:
            assert self.residual_context is not None
            match = suffix_match[..., 0], suffix_match[..., 1]
            context = self.residual_context.embed_predicted(match[0], self.block.backend)
        elif self.residual_context is not None:
            context, automaton, match = self.residual_context(
                ids,
                past.last_token_ids,
                past.automaton,
                lengths,
                in_place=gives_up_cache,
                keeps_state=use_cache,
                passes=self.block.backend,
            )
        if self.token_modulation is not None:
            modulation = self.token_modulation(ids)
        return Sequence(ids, writable, lengths, context, modulation, match), automaton

    def _apply_depth(
        self,
        x: Tensor,
        sequence: Sequence,
        past: UniMatrixCache,
        retrieval: Retrieval | None,
        associations: Associations,
        use_cache: bool,
        show: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    ) -> "_Depth":
        """Apply the block L times; see ``_Depth`` for what comes out."""
        hidden_states, carries, votes = [], [], None
        weights = self._pack_block(x)
        for depth_step, carry in enumerate(past.depth):
            mixer = self.block.selective_mixer
            # A gate that sees the stream looks after the first depth step, others before it.
            if mixer is not None and depth_step == int(mixer.reads_hidden):
                read, state = mixer.retrieve(
                    self.embed_tokens,
                    sequence.token_ids,
                    x if mixer.reads_hidden else None,
                    state=past.associations.selective,
                    num_before=past.num_tokens,
                    lengths=sequence.lengths,
                    keeps_state=use_cache,
                )
                retrieval = Retrieval(read.context, None, read)
                associations = Associations(selective=state)
            if show is not None:
                x, shown = show(x)
                hidden_states.append(shown)
            if self.embed_depth is not None:
                x = x + self.embed_depth.weight[depth_step]
            is_last = depth_step == len(past.depth) - 1
            x, carried, votes, sequence, retrieval = self.block(
                x, sequence, carry, retrieval, is_last, weights
            )
            carries.append(carried)
        return _Depth(x, hidden_states, tuple(carries), votes, retrieval, associations)

    def _pack_block(self, x: Tensor) -> BlockWeights | None:
        """Return the weights that all depth steps share, packed once for all of them.

        A block that is wrapped (FSDP gathers its weights when it is called) or hooked, or computed
        again in the backward pass, packs its own at every depth step.
        """
        is_own = type(self.block) is UniMatrixBlock and is_bare(self.block)
        if not is_own or (self.block.gradient_checkpointing and self.training):
            return None
        packed: BlockWeights = self.block.pack(x)
        return packed

    def _point(self, h: Tensor, depth: "_Depth", sequence: Sequence) -> tuple[Tensor, "_Pointer"]:
        """Return the normalised last stream, and what retrieved tokens say about the output."""
        read = None if depth.retrieval is None else depth.retrieval.selective
        scale = None if read is None else read.scale
        if self.pointer_mixture is not None:
            found = read if self.config.pointer else None
            h, token_ids, log_weights = self.pointer_mixture(h, found, sequence.match)
            return h, _Pointer(token_ids, None, log_weights, scale)
        token_ids, votes = depth.votes or (None, None)
        return h, _Pointer(token_ids, votes, None, scale)


class _Depth(NamedTuple):
    """What the depth steps leave.

    Attributes:
        x: the stream after the last.
        hidden_states: the stream before each, in the caller's columns, where it is asked for.
        carries: what each carries to the next call.
        votes: ids and gated weights of the published pointer, [B, T, K] each.
        retrieval: what was read once for all depth steps.
        associations: bindings carried by all of them together.
    """

    x: Tensor
    hidden_states: list[Tensor]
    carries: tuple[DepthCarry, ...]
    votes: tuple[Tensor, Tensor] | None
    retrieval: Retrieval | None
    associations: Associations


class _Pointer(NamedTuple):
    """What ``UniMatrixModelOutput`` says of the pointer, under the same names."""

    token_ids: Tensor | None
    weights: Tensor | None
    log_weights: Tensor | None
    hindsight_scale: HindsightScale | None


def _show(padding: Padding | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stream to go on with, and in the caller's columns, on the way to all that follows.

    A copy beside the way would have no gradient.
    """
    if padding is None:
        return x, x
    shown = padding.unpack(x)
    return padding.pack(shown), shown


def _unpack_pointer(padding: Padding, pointer: _Pointer) -> _Pointer:
    """Return what the pointer says in the caller's columns; nothing at padding."""
    token_ids, weights, log_weights, _ = pointer
    if log_weights is not None:
        mask = padding.mask.unsqueeze(-1)
        others = padding.unpack(log_weights[..., 1:]).masked_fill(~mask, -torch.inf)
        log_weights = torch.cat([padding.unpack(log_weights[..., :1]), others], dim=-1)
    return pointer._replace(
        token_ids=None if token_ids is None else padding.unpack(token_ids),
        weights=None if weights is None else padding.unpack(weights),
        log_weights=log_weights,
    )


class UniMatrixForCausalLM(UniMatrixPreTrainedModel, UniMatrixGenerationMixin):
    """Predict the next token from the hidden states and the pointer.

    Args:
        config: see ``UniMatrixConfig``.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # `forward` divides by `num_items_in_batch`, so gradient accumulation is exact.
    accepts_loss_kwargs = True

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__(config)
        self.model = UniMatrixModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        # Trainers replace `forward` by functions that predict without the pointer.
        super().__setattr__(name, keep_pointer(self, value) if name == "forward" else value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: UniMatrixCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        loss_only: bool = False,
        logits_at: Tensor | None = None,
        gives_up_cache: bool = False,
        suffix_match: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        **options: Unpack[LossOptions],
    ) -> UniMatrixCausalLMOutput | tuple[Any, ...]:
        """Return the logits of every position, and the loss where labels are given.

        Args:
            input_ids: [B, T] int64 or int32, T >= 1.
            attention_mask: as in ``UniMatrixModel.forward``.
            past_key_values: as in ``UniMatrixModel.forward``.
            labels: [B, T] int64 of the same positions, -100 ignored; the shift happens here.
                Padding predicts nothing: the first token of a row padded on the left counts not.
            use_cache: as in ``UniMatrixModel.forward``.
            output_hidden_states: as in ``UniMatrixModel.forward``.
            return_dict: return a tuple if ``False``.
            logits_to_keep: compute the logits of the last so many positions only; 0 is all. [n]
                int64 are the positions themselves.
            num_items_in_batch: divide the summed loss by this instead of by the targets here. It
                stays as given: ``Trainer`` counts labels, the first token of a row that is padded
                on the left among them.
            loss_only: return no logits, and compute only what the loss needs: a task with few
                targets does not pay for a vocabulary's logits at every position.
            logits_at: [B, T] bool, the positions whose logits are wanted; they come as [n, V], row
                by row. Rules over ``logits_to_keep``.
            gives_up_cache: as in ``UniMatrixModel.forward``.
            suffix_match: as in ``UniMatrixModel.forward``.
            inputs_embeds: as in ``UniMatrixModel.forward``.
            position_ids: as in ``UniMatrixModel.forward``.
            token_type_ids: as in ``UniMatrixModel.forward``.
            output_attentions: as in ``UniMatrixModel.forward``.
            options: ``shift_labels``; see ``LossOptions``.

        Returns:
            a ``UniMatrixCausalLMOutput``.

        Raises:
            InputError: as in ``UniMatrixModel.forward``, for labels or ``logits_at`` that do not
                fit the tokens, or for ``logits_at`` beside labels.
            TypeError: for an unknown keyword.
        """
        shift_labels = take_shift_labels(options)
        if logits_at is not None and (labels is not None or shift_labels is not None):
            raise InputError("logits_at and labels exclude each other; pass loss_only with labels")
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            gives_up_cache=gives_up_cache,
            suffix_match=suffix_match,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            output_attentions=output_attentions,
            handles_pointer=True,
        )
        assert output.last_hidden_state is not None
        shape = list(output.last_hidden_state.shape[:2])
        require_shape("logits_at", logits_at, shape)
        keeps_some = isinstance(logits_to_keep, Tensor) or bool(logits_to_keep)
        labels = take_targets("labels", labels, shape)
        # Of a few positions, the targets of those are enough.
        shift_labels = take_targets("shift_labels", shift_labels, None if keeps_some else shape)
        # 5. The one shift.
        if shift_labels is None and labels is not None:
            shift_labels = pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        if shift_labels is not None and attention_mask is not None:
            shift_labels = ignore_padding(shift_labels, attention_mask)

        # 6. The tied head, and the votes of the pointer or the mixture with it.
        kept: slice | Tensor = slice(None)
        if isinstance(logits_to_keep, Tensor):
            kept = logits_to_keep
        elif keeps_some:
            kept = slice(-logits_to_keep, None)
        rows: Any = (slice(None), kept)
        only_labels = shift_labels if loss_only else None
        if only_labels is not None:
            rows = choose_rows(only_labels)
        elif logits_at is not None:
            rows = (logits_at,)
        predicted = self._predict(output, rows, is_scored_only=only_labels is not None)
        loss = None
        if shift_labels is not None:
            targets = shift_labels[rows]
            loss = compute_loss(predicted, targets, num_items_in_batch)
            if output.hindsight_scale is not None:
                loss = add_scale(loss, output.hindsight_scale, targets, num_items_in_batch)
        logits = None
        if only_labels is None:
            assert not isinstance(predicted, UnscoredRows)
            logits = mix_logits(predicted) if isinstance(predicted, MixedLogits) else predicted
        result = UniMatrixCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            pointer_token_ids=output.pointer_token_ids,
            pointer_weights=output.pointer_weights,
            pointer_log_weights=output.pointer_log_weights,
        )
        returns_dict = self.config.return_dict if return_dict is None else return_dict
        return result if returns_dict else result.to_tuple()

    def _predict(
        self, output: UniMatrixModelOutput, rows: Any, *, is_scored_only: bool
    ) -> Tensor | MixedLogits | UnscoredRows:
        """Return the logits of the positions wanted, or what their loss is computed from."""
        assert output.last_hidden_state is not None
        h = output.last_hidden_state[rows]
        token_ids, votes, log_weights = (
            None if part is None else part[rows]
            for part in (
                output.pointer_token_ids,
                output.pointer_weights,
                output.pointer_log_weights,
            )
        )
        shares = votes if log_weights is None else log_weights
        if is_scored_only:
            head = fuse_head(self.lm_head, h, self.model.block.backend)
            if head is not None:
                shares = None if shares is None else shares.to(h.dtype)
                return UnscoredRows(h, head, token_ids, shares)
        logits: Tensor = self.lm_head(h)  # [..., V]
        if token_ids is None:
            return logits
        if log_weights is not None:
            return MixedLogits(logits, token_ids, log_weights)
        assert votes is not None
        # In place: the head's product is not needed backward, and a copy is B x T x V.
        return logits.scatter_add_(-1, token_ids, votes.to(logits.dtype))
