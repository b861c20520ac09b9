"""Callers that split a causal model into a base model and the weights of its head.

Most causal models are ``lm_head(base_model(x).last_hidden_state)``. A pointer or a mixture is no
product with ``lm_head.weight``, so a caller that splits the model so would drop it. Our hidden
states therefore refuse that product; and the fused head of TRL, which is recognised when TRL sets
it, is given our own logits.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.loss import IGNORED_LABEL, ignore_starts, raise_precision
from unimatrix.nn.pointer_mixture import MixedLogits, mix_logits, point

if TYPE_CHECKING:
    from unimatrix.modeling import UniMatrixForCausalLM

_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "baddbmm", "einsum", "inner"}


class PointedHidden(Tensor):
    """Hidden states of a model that does not predict from them and its head alone.

    A product with weights [V, D] or [D, V] is refused, because it would be the prediction of
    another model. Every other operation works, and its results of another width are plain tensors.
    Code compiled by ``torch.compile`` does not check; ahead-of-time back ends such as Inductor
    support no subclasses, and take ``hidden.as_subclass(torch.Tensor)`` only.

    Attributes:
        sizes: V and D.
    """

    sizes = (0, 0)

    @staticmethod
    def mark(hidden: Tensor, vocab_size: int) -> "PointedHidden":
        """Return the same hidden states [..., D], marked."""
        return hidden.as_subclass(_make_class(vocab_size, hidden.shape[-1]))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if torch.compiler.is_compiling():
            return Tensor.__torch_function__(func, [], args, options)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", None) in _PRODUCTS:
                factors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
                _refuse_head_weights(factors, set(cls.sizes))
            width = cls.sizes[1:]
            return tree_map_only(
                Tensor,
                lambda x: x if x.shape[-1:] != width else x.as_subclass(cls),
                func(*args, **options),
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Saved features must load without this library.
        plain = self.as_subclass(Tensor)
        return plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


@functools.cache
def _make_class(vocab_size: int, width: int) -> type[PointedHidden]:
    """Return the class of hidden states [..., D] of a model of V tokens."""
    return type("PointedHidden", (PointedHidden,), {"sizes": (vocab_size, width)})


def _refuse_head_weights(factors: list[Tensor], sizes: set[int]) -> None:
    """Raise ``InputError`` if one of the factors has the shape of a head's weights."""
    for factor in factors:
        is_matrix = factor.dim() == 2 and not isinstance(factor, PointedHidden)
        if is_matrix and set(factor.shape) == sizes:
            raise InputError(
                f"hidden states times weights {list(factor.shape)} are not what this model "
                "predicts: its pointer is no part of lm_head. Call the model itself for logits, "
                "loss or a distribution (in TRL: SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer "
                "and RLOOTrainer do); for the vocabulary's part alone, "
                "pass hidden.as_subclass(torch.Tensor)"
            )


def splits_truly(config: UniMatrixConfig) -> bool:
    """Return whether hidden states and the head's weights alone make the prediction."""
    return not (config.uses_pointer or config.uses_mixture)


def keep_pointer(model: "UniMatrixForCausalLM", forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function to set as a model's ``forward``, in place of one that splits the model.

    TRL's trainers replace ``forward`` by a function that computes, with ``fused_lm_head=True``,
    what they train on from hidden states and head. The function returned here computes the same
    from the model's own logits, and lets the gate that learns in hindsight learn from the trainer's
    loss.

    Args:
        model: the model that ``forward`` is set on.
        forward: what a caller sets; returned as it is unless it splits the model.

    Raises:
        InputError: if ``forward`` is a fused forward of another release of TRL.
    """
    fused = getattr(forward, "__func__", forward)
    learns = model.config.associative_memory == "selective" and model.config.hindsight != "none"
    if not _takes_fused_head(fused) or (splits_truly(model.config) and not learns):
        return forward
    reading = _read_fused(fused)

    @functools.wraps(type(model).forward)
    def own_forward(
        self: "UniMatrixForCausalLM",
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            kwargs |= {"labels": labels, "shift_labels": shift_labels}
            return forward(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        logits, is_normalized, scale, starts = _predict(self, *args, **kwargs)
        if shift_labels is None:
            assert labels is not None
            labels = labels if starts is None else ignore_starts(labels, starts)
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        if reading.temperature != 1:
            logits, is_normalized = logits / reading.temperature, False
        log_vocab = logits if is_normalized else logits.log_softmax(-1)
        targets = shift_labels.to(logits.device)
        fields = _score(logits, log_vocab, targets, reading.fields, scale)
        divisor = num_items_in_batch
        if divisor is None:
            divisor = fields["label_mask"].sum().clamp(min=1)
        return reading.output_class(loss=-fields["log_probs"].sum() / divisor, **fields)

    return MethodType(own_forward, model)


class _Reading(NamedTuple):
    """The settings of a fused forward of TRL.

    Attributes:
        temperature: divides the logits.
        fields: names of the fields wanted beside ``log_probs``.
        output_class: class of the output.
    """

    temperature: float
    fields: tuple[str, ...]
    output_class: Callable[..., Any]


def _read_fused(function: Any) -> _Reading:
    """Return the settings of a fused forward, read from its closure."""
    known = inspect.getclosurevars(function)
    try:
        settings = known.nonlocals["temperature"], known.nonlocals["outputs"]
        return _Reading(*settings, known.globals["FusedCausalLMOutput"])
    except KeyError as missing:
        raise InputError(
            "this release of TRL computes what it trains on from lm_head.weight alone, which drops "
            f"the model's pointer, and {missing} that says how is not found; install trl==1.16, "
            "or train with transformers.Trainer, which calls the model's own forward"
        ) from None


def _takes_fused_head(function: Any) -> bool:
    """Return whether a function itself, not one that it wraps, takes ``fused_lm_head``."""
    if not inspect.isfunction(function):
        return False
    return "fused_lm_head" in inspect.signature(function, follow_wrapped=False).parameters


def _predict(
    model: "UniMatrixForCausalLM", *args: Any, **kwargs: Any
) -> tuple[Tensor, bool, Any, Tensor | None]:
    """Return logits [B, T, V] in float32 or wider, and what belongs to them.

    Beside them come whether they are normalised, the scale of hindsight, and where documents start.

    The logits of a mixture are ln of probabilities. To normalise them again would spread the worth
    of a read over tokens that the read has not voted for.
    """
    options = {name: value for name, value in kwargs.items() if value is not None}
    options |= {"use_cache": False, "return_dict": True}
    output = model.model(*args, handles_pointer=True, **options)
    predicted = point(model.lm_head(output.last_hidden_state), output.pointer)
    others = output.hindsight_scale, output.document_starts
    if not isinstance(predicted, MixedLogits):
        return raise_precision(predicted), False, *others
    mixed = mix_logits(MixedLogits(*(raise_precision(part) for part in predicted)))
    return mixed, True, *others


def _score(
    logits: Tensor, log_vocab: Tensor, targets: Tensor, names: tuple[str, ...], scale: Any
) -> dict[str, Tensor]:
    """Return ``log_probs`` and the fields of ``names`` [B, T], 0 where the target is ignored.

    ``logits`` [B, T, V] are divided by the temperature, ``log_vocab`` are the same, normalised.
    """
    mask = targets != IGNORED_LABEL
    targets = targets.masked_fill(~mask, 0)
    log_probs = log_vocab.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if scale is not None:
        log_probs = _Scale.apply(log_probs, mask.sum(), *scale)  # type: ignore[no-untyped-call]
    fields = {"log_probs": log_probs}
    if "entropy" in names:
        fields["entropy"] = -(log_vocab.exp() * log_vocab).sum(-1)
    with torch.no_grad():
        if "log_sum_sq_probs" in names:
            fields["log_sum_sq_probs"] = (2 * log_vocab).logsumexp(-1)
        if "mean_logits" in names:
            fields["mean_logits"] = logits.mean(-1)
        if "is_top1" in names:
            fields["is_top1"] = logits.argmax(-1) == targets
    fields = {name: field.masked_fill(~mask, 0) for name, field in fields.items()}
    return fields | {"label_mask": mask}


class _Scale(torch.autograd.Function):
    """Identity on log probabilities whose backward pass tells ``ops.hindsight`` the loss's scale.

    ``add_scale`` does so for a loss that is their mean. Here the trainer makes the loss, so that
    the scale is read off the gradient. Only tokens that the loss makes likelier count, since the
    reads behind a text to be avoided deserve no slot.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, count: Tensor, *scale: Tensor) -> Tensor:
        ctx.save_for_backward(count)
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, d_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        (count,) = ctx.saved_tensors
        wanted = -d_log_probs.clamp(max=0).sum()
        return d_log_probs, None, wanted / count.clamp(min=1), wanted
