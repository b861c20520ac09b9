"""What the models share with the rest of Hugging Face: loading, generation, back ends."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init

from unimatrix.cache import UniMatrixCache, require_own_cache
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.hub.packaged import replace_name
from unimatrix.hub.weights_origin import HasOrigin
from unimatrix.inference.loop import choose_loop, sample_seeded, sample_tokens
from unimatrix.inference.prompt import choose_new_tokens, prepare_prompt, read_prompt
from unimatrix.kernels.backends import name_backends, set_backend
from unimatrix.modeling_documents import find_starts, refuse_documents
from unimatrix.nn.indexed_attention import IndexedAttention
from unimatrix.nn.matrix_mixer import MatrixMixer
from unimatrix.nn.padding import align_right, cut_mask, find_padding
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.nn.selective_mixer import SelectiveMixer
from unimatrix.nn.token_modulation import TokenModulation
from unimatrix.ops.text_index.state import require_window


class UniMatrixPreTrainedModel(HasOrigin, PreTrainedModel):
    """What the models share with the rest of Hugging Face."""

    config_class = UniMatrixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UniMatrixBlock"]  # noqa: RUF012
    # Nothing here can be rolled back by cropping, so assisted generation is refused.
    _is_stateful = True

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__(config)
        self.passes_backend = "auto"

    def post_init(self) -> None:
        """Finish as transformers does, and note the shapes that compiled paths go by."""
        super().post_init()
        parameters = self.named_parameters(remove_duplicate=False)
        self.built_shapes = {name: parameter.shape for name, parameter in parameters}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as ``initializer_range`` says, then what a module starts elsewhere."""
        super()._init_weights(module)
        list_starts = getattr(type(module), "list_starts", None)
        for parameter, start in list_starts(module) if list_starts else []:
            init.copy_(parameter, start)  # Loaded weights stay.

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; what a fresh model freezes is frozen.

        The arguments, and what is returned, are those of ``PreTrainedModel.from_pretrained``; the
        name may also be of a model that comes with the package (``hub/packaged.py``).
        """
        loaded = super().from_pretrained(*replace_name(args, kwargs), **kwargs)
        # Loading makes every parameter anew, and each of them trainable.
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, MatrixMixer):
                module.freeze_unused()
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: every saved folder has an ``auto_map``, and not this file's source."""

    def _resize_token_embeddings(
        self,
        new_num_tokens: int | None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize every table that is indexed by token; called by ``resize_token_embeddings``.

        The arguments are those of ``PreTrainedModel.resize_token_embeddings``.

        Raises:
            InputError: if the vocabulary would lose a special token of the configuration.
        """
        if new_num_tokens is not None:
            self._require_special_tokens(new_num_tokens)
        embed: nn.Embedding = super()._resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        num_tokens = embed.num_embeddings
        for module in self.modules():
            if isinstance(module, (ResidualContext, TokenModulation)):
                # With the resized `num_tokens` in place of a multiple, which is of the first table.
                resized = self._get_resized_embeddings(
                    module.embed, num_tokens, mean_resizing=mean_resizing
                )
                module.embed = resized.requires_grad_(module.embed.weight.requires_grad)
            if isinstance(module, (ResidualContext, SelectiveMixer, IndexedAttention)):
                module.vocab_size = num_tokens
        return embed

    def _require_special_tokens(self, num_tokens: int) -> None:
        """Raise ``InputError`` unless a vocabulary of that size has all special tokens."""
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        special = {name: getattr(self.config, name) for name in names}
        outside = [
            f"{name} {i}" for name, i in special.items() if i is not None and i >= num_tokens
        ]
        if outside:
            raise InputError(
                f"a vocabulary of {num_tokens} tokens does not hold {', '.join(outside)}; set them "
                "in the configuration first, or keep more tokens"
            )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Tell ``generate`` that the model makes its own cache."""
        return False

    @staticmethod
    def _reorder_cache(past_key_values: UniMatrixCache, beam_idx: Tensor) -> UniMatrixCache:
        """Return the cache of the surviving beams."""
        return past_key_values.select_rows(beam_idx)

    def set_backend(self, backend: str | dict[str, str]) -> None:
        """Choose the back end of every operator in this model.

        Args:
            backend: one name for all operators the model has, or names by operator (keys of
                ``unimatrix.ops.backends.BACKENDS``); operators left out keep theirs.

        Raises:
            InputError: if an operator of this model has no such back end.
        """
        set_backend(self, backend)

    def set_window(self, num_tokens: int) -> None:
        """Remember exactly the last so many tokens from now on: the same weights in another state.

        Caches of another window are refused.

        Args:
            num_tokens: W; even, and at least 128, for a model with an index of the text.

        Raises:
            InputError: if the model remembers no text, or there is no such window.
        """
        has_index = self.config.associative_memory == "indexed"
        if not has_index and self.config.residual_path != "suffix_automaton":
            raise InputError(
                "the model has neither an index of the text nor a suffix automaton, whose window "
                f"{num_tokens} could be; leave the window out"
            )
        require_window("window", num_tokens, self.config.index_units if has_index else "none")
        self.config.automaton_window = num_tokens
        for mixer in self.base_model.mixers:
            if isinstance(mixer, IndexedAttention | ResidualContext):
                mixer.window = num_tokens

    def name_backends(
        self, num_tokens: int, device: torch.device | str | None = None
    ) -> dict[str, str]:
        """Return the back end of every operator this model has, with ``auto`` resolved.

        Args:
            num_tokens: T of a forward pass; 1 is decoding.
            device: where it would run; ``None`` is where the model is.
        """
        place = self.device if device is None else torch.device(device)
        return name_backends(self, num_tokens, place)


class UniMatrixGenerationMixin(GenerationMixin):
    """``generate`` with a recurrent cache and, where it can, the compiled step.

    Beside the arguments of transformers, ``generate`` takes:

    ``continues``: what ``input_ids`` are beside ``past_key_values``. ``True``: new tokens alone.
    ``False``: the whole text, which begins with what the cache has read. ``None``: the whole text
    if every row begins so, as a hash of what was read tells, new tokens if none does.

    ``generator``: a ``torch.Generator`` to sample with, in place of the global one.
    """

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Raise for an argument of ``generate`` that nobody knows; wrappers hide ours."""
        own = ("continues", "generator")
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in own})

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat every row, those of the cache with it, for beams and several answers."""
        cache = require_own_cache(model_kwargs.pop("past_key_values", None))
        if cache is not None and input_ids is not None and cache.batch_size == len(input_ids):
            rows = torch.arange(cache.batch_size).repeat_interleave(expand_size)
            cache = cache if expand_size == 1 else cache.select_rows(rows)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, model_kwargs | ({} if cache is None else {"past_key_values": cache})

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Take tokens one after the other, greedily or by sampling; called by ``generate``.

        The arguments are those of ``GenerationMixin._sample``, which runs where ``choose_loop`` is
        false, and the generator to sample with.
        """
        prepared = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "streamer": streamer,
        }
        if choose_loop(self, generation_config, synced_gpus):
            return sample_tokens(self, input_ids, generator=generator, **prepared, **model_kwargs)
        run = partial(super()._sample, input_ids, synced_gpus=synced_gpus, **model_kwargs)
        if generator is None or not generation_config.do_sample:
            return run(**prepared)
        return sample_seeded(run, generator, **prepared)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Read the prompt, in parts of ``prefill_chunk_size``; called by transformers' loops."""
        inputs = prepare_prompt(self, input_ids, generation_config, model_kwargs)
        return read_prompt(self, inputs, generation_config.prefill_chunk_size)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: Any) -> None:
        """Make no positions for ``generate`` to lengthen at every token: ``forward`` counts."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: UniMatrixCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        output_hidden_states: bool | None = None,
        continues: bool | None = None,
        position_ids: Tensor | None = None,
        **_unused: Any,
    ) -> dict[str, Any]:
        """Return the arguments of one ``forward`` call inside ``generate``.

        Rows with padding on their right are moved to the right, since the logits of the last
        column are those that count.

        Args:
            input_ids: [B, T] int64.
            next_sequence_length: how many of the last ids are to be read; ``None`` is what the
                cache has not read yet.
            past_key_values: a cache, of the first tokens or of what comes before all of them.
            attention_mask: [B, T], or beside a cache and new tokens alone [B, past + T].
            use_cache: whether to keep a cache.
            logits_to_keep: positions whose logits are wanted.
            output_hidden_states: whether the caller collects hidden states.
            continues: as ``generate`` takes it.
            position_ids: as in ``forward``, which counts by itself.
            _unused: bookkeeping of ``generate`` that a recurrent model has no use for.

        Raises:
            InputError: if ids, mask and cache do not fit each other, or a row has nothing to read.
        """
        refuse_documents(_unused)
        if position_ids is not None:
            has_table = past_key_values is None and bool(self.config.max_position_embeddings)
            _require_counted(position_ids, input_ids, attention_mask, has_table)
        cache = require_own_cache(past_key_values)
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
            if attention_mask is not None:
                attention_mask = attention_mask[:, -next_sequence_length:]
        elif cache is not None:
            cache.check(self.model, input_ids.shape[0])
            input_ids, attention_mask = choose_new_tokens(
                input_ids, attention_mask, cache, continues
            )
        if attention_mask is not None:
            mask = cut_mask(attention_mask, input_ids, 0)
            input_ids, attention_mask = align_right(input_ids, mask)
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": output_hidden_states,
        }


def _require_counted(
    position_ids: Tensor, ids: Tensor, attention_mask: Tensor | None, has_table: bool
) -> None:
    """Raise ``InputError`` unless the positions of a whole text, [B, T], count from its start."""
    mask = None if attention_mask is None else attention_mask[:, -ids.shape[1] :]
    counted = (position_ids, ids, ids.new_zeros(len(ids)), find_padding(mask, ids))
    if find_starts({}, *counted, has_table=has_table) is not None:
        raise InputError(
            "generate goes on with one text a row, and position_ids starts another in a row; leave "
            "it out, and give each text a row of its own"
        )
