"""What the models share with the rest of Hugging Face: loading, generation, back ends."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init

from unimatrix.cache import UniMatrixCache
from unimatrix.configuration import UniMatrixConfig
from unimatrix.decoding.loop import choose_loop, sample_tokens
from unimatrix.errors import InputError
from unimatrix.nn.block import UniMatrixBlock
from unimatrix.nn.feed_forward import GatedFeedForward
from unimatrix.nn.matrix_mixer import MatrixMixer, RetentionProjection
from unimatrix.nn.norm import RowNorm
from unimatrix.nn.pointer_mixture import PointerMixture
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.nn.selective_mixer import SelectiveMixer
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.ops import matrix_state, selective_slots, slots
from unimatrix.ops.backends import BACKENDS, require_backend

_USE_FUSED_PASSES = (UniMatrixBlock, RowNorm, GatedFeedForward, ShortConvolution, PointerMixture)


class UniMatrixPreTrainedModel(PreTrainedModel):
    """What the models share with the rest of Hugging Face."""

    config_class = UniMatrixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UniMatrixBlock"]  # noqa: RUF012
    # Nothing here can be rolled back by cropping, so assisted generation is refused.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as ``initializer_range`` says, then what a module starts elsewhere."""
        super()._init_weights(module)
        # transformers knows norms by the name of their class, which ours is not.
        if isinstance(module, RowNorm):
            init.ones_(module.weight)
        if isinstance(module, (RetentionProjection, SelectiveMixer, ShortConvolution)):
            for parameter, start in module.list_starts():
                init.copy_(parameter, start)  # Loaded weights stay.

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; what a fresh model freezes is frozen.

        The arguments, and what is returned, are those of ``PreTrainedModel.from_pretrained``.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading makes every parameter anew, and each of them trainable.
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, MatrixMixer):
                module.freeze_unused()
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: every saved folder has an ``auto_map``, and not this file's source."""

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
        chosen = dict.fromkeys(BACKENDS, backend) if isinstance(backend, str) else dict(backend)
        if isinstance(backend, str) and backend not in ("auto", *BACKENDS["fused_passes"]):
            # Fused passes are no scan and have no other form: they stay as they are.
            del chosen["fused_passes"]
        blocks = [module for module in self.modules() if isinstance(module, UniMatrixBlock)]
        contexts = [module for module in self.modules() if isinstance(module, ResidualContext)]
        users: dict[str, list[nn.Module | None]] = {
            "matrix_state": [block.matrix_mixer for block in blocks],
            "slots": [block.slot_mixer for block in blocks],
            "selective_slots": [block.selective_mixer for block in blocks],
            "dense_memory": [block.dense_mixer for block in blocks],
            "suffix_automaton": [context for context in contexts if context.uses_automaton],
            "fused_passes": [m for m in self.modules() if isinstance(m, _USE_FUSED_PASSES)],
        }
        for op, name in chosen.items():
            if op not in users:
                raise InputError(f"unknown operator {op!r}; choose from {', '.join(BACKENDS)}")
            modules = [module for module in users[op] if module is not None]
            if modules and name != "auto":
                require_backend(op, name)
            for module in modules:
                setattr(module, "backend", name)  # noqa: B010

    def name_backends(
        self, num_tokens: int, device: torch.device | str | None = None
    ) -> dict[str, str]:
        """Return the back end of every operator this model has, with ``auto`` resolved.

        Args:
            num_tokens: T of a forward pass; 1 is decoding.
            device: where it would run; ``None`` is where the model is.
        """
        place = self.device if device is None else torch.device(device)
        block = next(module for module in self.modules() if isinstance(module, UniMatrixBlock))
        contexts = [module for module in self.modules() if isinstance(module, ResidualContext)]
        chosen: dict[str, tuple[nn.Module, str]] = {}
        if block.matrix_mixer is not None:
            auto = matrix_state.choose_backend(
                num_tokens,
                place,
                norm_guard=block.matrix_mixer.norm_guard,
                is_delta=block.matrix_mixer.uses_delta,
                head_dim=block.matrix_mixer.head_dim,
                is_double=self.dtype == torch.float64,
            )
            chosen["matrix_state"] = block.matrix_mixer, auto
        if block.slot_mixer is not None:
            num_slots, key_size = self.config.num_slots, self.config.slot_key_size
            auto = slots.choose_backend(place, num_tokens, num_slots, key_size)
            chosen["slots"] = block.slot_mixer, auto
        if block.selective_mixer is not None:
            bounded = block.selective_mixer.bounded_training or not self.training
            auto = selective_slots.choose_backend(place, self.config.num_slots, bounded=bounded)
            chosen["selective_slots"] = block.selective_mixer, auto
        if block.dense_mixer is not None:
            chosen["dense_memory"] = block.dense_mixer, "parallel"
        if contexts and contexts[0].uses_automaton:
            chosen["suffix_automaton"] = contexts[0], "native"
        native = place.type == "cpu" and num_tokens > 1
        chosen["fused_passes"] = block, "native" if native else "reference"
        return {
            op: auto if module.backend == "auto" else str(module.backend)
            for op, (module, auto) in chosen.items()
        }


class UniMatrixGenerationMixin(GenerationMixin):
    """``generate`` with a recurrent cache and, where it can, the compiled step."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Take tokens one after the other, greedily or by sampling; called by ``generate``.

        The arguments are those of ``GenerationMixin._sample``, which runs where ``choose_loop`` is
        false.
        """
        prepared = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "streamer": streamer,
        }
        if choose_loop(self, generation_config, synced_gpus):
            return sample_tokens(self, input_ids, **prepared, **model_kwargs)
        return super()._sample(input_ids, synced_gpus=synced_gpus, **prepared, **model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: Any) -> None:
        """Make no positions for ``generate`` to lengthen at every token: ``forward`` counts."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: UniMatrixCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        output_hidden_states: bool | None = None,
        **_unused: Any,
    ) -> dict[str, Any]:
        """Return the arguments of one ``forward`` call inside ``generate``.

        Args:
            input_ids: [B, past + T] int64, the whole sequence so far.
            past_key_values: the cache of its first columns.
            attention_mask: [B, past + T].
            use_cache: whether to keep a cache.
            logits_to_keep: positions whose logits are wanted.
            output_hidden_states: whether the caller collects hidden states.
            _unused: bookkeeping of ``generate`` that a recurrent model has no use for.

        Raises:
            InputError: if the cache already covers the whole of ``input_ids``.
        """
        if past_key_values is not None:
            num_columns = past_key_values.get_seq_length()
            if input_ids.shape[1] <= num_columns:
                raise InputError(
                    f"the cache covers {num_columns} columns and input_ids has "
                    f"{input_ids.shape[1]}; pass the whole sequence with at least one new token"
                )
            input_ids = input_ids[:, num_columns:]
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": output_hidden_states,
        }
