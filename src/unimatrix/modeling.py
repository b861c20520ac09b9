"""From token ids to logits: embed, apply one block L times, predict.

The numbered comments are the steps of ``docs/forward.md``. ``kernels.plan`` says which parts run
compiled; every part of the plan has the signature of the module that it stands for.
"""

from typing import Any, Unpack

from torch import Tensor, nn

from unimatrix.cache import UniMatrixCache
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.hub.split_head import PointedHidden, keep_pointer, splits_truly
from unimatrix.kernels.plan import plan, plan_loss
from unimatrix.loss import (
    add_scale,
    choose_positions,
    choose_targets,
    compute_loss,
    ignore_unpredicted,
)
from unimatrix.modeling_documents import DocumentMarks
from unimatrix.modeling_inputs import Inputs, LossOptions, read_inputs, take_loss_options
from unimatrix.modeling_outputs import (
    Passed,
    UniMatrixCausalLMOutput,
    UniMatrixModelOutput,
    collect_scales,
    join_passes,
)
from unimatrix.nn.block import States, UniMatrixBlock
from unimatrix.nn.feed_forward import build_norm
from unimatrix.nn.mixer import Mixer, Tokens
from unimatrix.nn.pointer_mixture import MixedLogits, Pointer, PointerMixture, mix_logits, point
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.nn.token_modulation import TokenModulation
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
        selective = self.block.selective_mixer if config.pointer else None
        num_reads = 0 if selective is None else selective.num_reads
        mixture = PointerMixture(config, num_reads) if config.uses_mixture else None
        self.pointer_mixture = mixture
        self.post_init()

    @property
    def mixers(self) -> list[Mixer]:
        """Every mixer, the block's and the residual context."""
        residual = [] if self.residual_context is None else [self.residual_context]
        return [*self.block.mixers, *residual]

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
        pointer_targets: Tensor | None = None,
        **marks: Unpack[DocumentMarks],
    ) -> UniMatrixModelOutput | tuple[Any, ...]:
        """Return the hidden states of every position and the cache after the last.

        A row may hold several documents, each of which starts with nothing carried, as in a row of
        its own. ``position_ids`` or ``marks`` say where; there is no cache then.

        Args:
            input_ids: [B, T] int64 or int32, T >= 1.
            attention_mask: [B, T] or [B, past + T], 0 at padding, which may stand anywhere and
                leaves everything carried untouched; ``None`` is no padding.
            past_key_values: the cache to continue from; not altered unless it is given up.
            use_cache: return a cache; ``None`` is ``config.use_cache`` outside training.
            output_hidden_states: return the stream before every depth step.
            return_dict: return no tuple; of both, ``None`` is as the configuration says.
            gives_up_cache: the caller does not use ``past_key_values`` again, so its automaton
                and its text index, whose copies may take longer than the tokens, are changed in
                place.
            suffix_match: [B, T, 2] int64, predicted ids and match lengths of the suffix automaton
                in these rows, each document a stream of its own, where a data loader has found them
                while a GPU trains; ``None`` runs it.
            inputs_embeds: [B, T, D], embeddings instead of ``input_ids``, for a model that reads no
                ids beside them.
            position_ids: [B, T], [1, T] or [T], accepted where they count on, as the model does by
                itself, or start a document anew at 0 (or, without a table of positions, where the
                row's first starts).
            token_type_ids: [B, T], accepted where they are all 0.
            output_attentions: accepted unless true: there are no attention weights.
            handles_pointer: the caller predicts with the pointer as well. Otherwise, where there
                is one, the hidden states refuse to be multiplied with a head (``PointedHidden``).
            logits_to_keep: without effect; callers that split a causal model pass it.
            pointer_targets: [B, T] int64, the only tokens whose shares of a pointer mixture the
                caller needs: K of the output may then be 1. ``None`` is all.
            marks: where documents start; see ``DocumentMarks``.

        Raises:
            InputError: for arguments that do not fit the model, its cache or each other; for a
                cache, before or after, where a row holds several documents.
            TypeError: for an unknown keyword.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        texts = (input_ids, inputs_embeds, attention_mask, suffix_match, pointer_targets)
        others = (position_ids, past_key_values, use_cache, token_type_ids, output_attentions)
        inputs = read_inputs(self, *texts, *others, marks, in_one_pass=output_hidden_states)
        passes = [
            self._run(part, output_hidden_states, gives_up_cache=gives_up_cache)
            for part in inputs.passes
        ]
        output = join_passes(passes, inputs.rows)
        last = output.last_hidden_state
        assert last is not None
        if not handles_pointer and not splits_truly(self.config):
            output.last_hidden_state = last = PointedHidden.mark(last, self.config.vocab_size)
        if output_hidden_states:
            output.hidden_states = (*passes[0].hidden_states, last)
        returns_dict = self.config.return_dict if return_dict is None else return_dict
        return output if returns_dict else output.to_tuple()

    def _run(self, inputs: Inputs, output_hidden_states: bool, *, gives_up_cache: bool) -> Passed:
        """Run the layers over rows; the arguments are those of ``forward``."""
        ids, embeddings, positions, suffix_match, targets, past, rows, lengths, keeps_cache = inputs
        run = plan(self, like=ids)

        # 2. Token features, and the position of each real token.
        x = features = run.embed(ids) if embeddings is None else embeddings
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        x = self.dropout(x)

        # 3. What every depth step sees of the tokens.
        tokens = Tokens(
            ids=ids,
            embeddings=features,
            embed=lambda ids: run.embed(ids),
            lengths=lengths,
            num_before=past.num_tokens,
            last_ids=past.last_token_ids,
            modulation=None if self.token_modulation is None else self.token_modulation(ids),
            keeps_state=keeps_cache,
            gives_up_state=gives_up_cache,
            suffix_match=suffix_match,
            embed_weights=self.embed_tokens.parameters,
        )

        # 4. The same block at every depth step; some mixers read once, for all that follow.
        hidden_states: list[Tensor] = []
        carries: list[States] = []
        shared, votes = dict(past.shared), None
        for mixer in self.mixers:
            tokens, shared[mixer.name] = mixer.search(tokens, shared.get(mixer.name))
        for depth_step, carry in enumerate(past.depth):
            for mixer in self.mixers:
                if mixer.reads_at == depth_step:
                    read, state = run.mixers[mixer.name](x, tokens, shared.get(mixer.name))
                    tokens = tokens._replace(reads={**tokens.reads, mixer.name: read})
                    shared[mixer.name] = state
            if output_hidden_states:
                # The stream goes on from what is shown, so that its gradient reaches the caller.
                shown = x if rows is None else rows.unpack(x)
                x = x if rows is None else rows.pack(shown)
                hidden_states.append(shown)
            if self.embed_depth is not None:
                x = x + self.embed_depth(ids.new_tensor(depth_step))
            tokens = tokens._replace(is_last=depth_step + 1 == len(past.depth))
            x, states, votes = run.block(x, tokens, carry)
            carries.append(states)
        last: Tensor = run.norm(x)
        pointer, reads = Pointer(*(votes or ())), tokens.reads
        if self.pointer_mixture is not None:
            ids_found, log_weights = run.pointer(last, reads, targets)
            pointer = Pointer(ids_found, None, log_weights)
        cache = None
        if keeps_cache:  # 7. Exactly what is needed to resume.
            is_text = embeddings is None
            cache = past.advance(ids, lengths, carries, shared, self.origin, is_text)
        return Passed(last, hidden_states, pointer, collect_scales(reads), cache)


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
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Tensor | int | None = None,
        max_length_k: Tensor | int | None = None,
        **options: Unpack[LossOptions],
    ) -> UniMatrixCausalLMOutput | tuple[Any, ...]:
        """Return the logits of every position, and the loss where labels are given.

        Args that are not named here, and errors, are those of ``UniMatrixModel.forward``.

        Args:
            labels: [B, T] int64 of the same positions, -100 ignored; the shift happens here.
                Padding predicts nothing: the first token of a row padded on the left counts not.
                Nor does the first token of a document, which the document before it in the row
                would predict. ``shift_labels`` are targets already, and taken as they are.
            logits_to_keep: compute the logits of the last so many positions only; 0 is all. [n]
                int64 are the positions themselves.
            num_items_in_batch: divide the summed loss by this instead of by the targets here.
            loss_only: return neither logits nor what the pointer proposes, and compute only what
                the loss needs: a task with few targets does not pay for a vocabulary's logits at
                every position.
            logits_at: [B, T] bool, the positions whose logits are wanted; they come as [n, V], row
                by row. Takes precedence over ``logits_to_keep``.
            options: ``shift_labels``, ``loss_weights``; see ``LossOptions``.

        Raises:
            InputError: also for labels or ``logits_at`` that do not fit the tokens or each other.
            TypeError: for an unknown keyword.
        """
        shift_labels, weights = take_loss_options(options)
        if logits_at is not None and (labels is not None or shift_labels is not None):
            raise InputError("logits_at and labels exclude each other; pass loss_only with labels")
        # 5. The one shift.
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        targets = choose_targets(labels, shift_labels, weights, tokens, logits_to_keep)
        is_whole = targets is not None and tokens is not None and targets.shape == tokens.shape[:2]
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
            pointer_targets=targets if loss_only and is_whole else None,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        h = output.last_hidden_state
        assert h is not None
        if targets is not None:
            starts = output.document_starts if shift_labels is None else None
            targets = ignore_unpredicted(targets, attention_mask, starts)
        counted = targets if loss_only else None
        rows = choose_positions(counted, logits_at, logits_to_keep, h.shape[:2])
        counting = (num_items_in_batch, weights)
        loss, logits = self._predict(output, rows, targets, *counting, loss_only=loss_only)
        result = UniMatrixCausalLMOutput.of_model(output, loss, logits)
        returns_dict = self.config.return_dict if return_dict is None else return_dict
        return result if returns_dict else result.to_tuple()

    def _predict(
        self,
        output: UniMatrixModelOutput,
        rows: tuple[Any, ...] | None,
        targets: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        weights: Tensor | None,
        *,
        loss_only: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return loss and logits of the positions that an index chooses; ``None`` is all."""
        # 6. The tied head, and the votes of the pointer or the mixture with it.
        h, pointer = output.last_hidden_state, output.pointer
        assert h is not None
        if rows is not None:
            h, pointer = h[rows], pointer.select(rows)
            targets = None if targets is None else targets[rows]
            weights = None if weights is None else weights[rows]
        counting = (num_items_in_batch, weights)
        if targets is not None and loss_only:
            logits, loss = None, plan_loss(self, like=h)(h, pointer, targets, *counting)
        else:
            predicted = self.lm_head(h)
            predicted = predicted if pointer.token_ids is None else point(predicted, pointer)
            logits = mix_logits(predicted) if isinstance(predicted, MixedLogits) else predicted
            if targets is None:
                return None, logits
            loss = compute_loss(predicted, targets, *counting)
        if output.hindsight_scale is not None:
            loss = add_scale(loss, output.hindsight_scale, targets, *counting)
        return loss, logits
