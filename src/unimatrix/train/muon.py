"""Muon for the matrices of linear layers, AdamW for everything else, as one optimiser."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from unimatrix.errors import InputError


class MuonWithAdamW(Optimizer):
    """Step two optimisers of torch as one, so that one schedule and one checkpoint hold both.

    Muon moves a matrix by the nearest orthogonal matrix to its momentum. Its step is scaled to the
    size of AdamW's, so that one learning rate serves both.

    Source: Jordan et al., Muon (2024); the scale from arXiv:2502.16982, as ``torch.optim.Muon``
    has it.

    Args:
        model: whose parameters are trained.
        decayed: names of the parameters that weight decay applies to.
        lr, weight_decay: of both optimisers.
        betas, fused: AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        decayed: list[str],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        fused: bool,
    ) -> None:
        require_muon()
        matrices = list_matrices(model)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name in matrices, name in decayed), []).append(parameter)

        def gather(is_matrix: bool) -> list[dict[str, Any]]:
            return [
                {"params": parameters, "weight_decay": weight_decay * decays}
                for (kind, decays), parameters in groups.items()
                if kind == is_matrix
            ]

        self._parts: list[Optimizer] = []
        if for_muon := gather(True):
            muon = torch.optim.Muon(for_muon, lr=lr, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if for_adamw := gather(False):
            self._parts.append(AdamW(for_adamw, lr=lr, betas=betas, fused=fused))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both optimisers work on this one's groups and state."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = self.state
            first = last

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        super().load_state_dict(dict(state_dict))
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def require_muon() -> None:
    """Raise ``InputError`` if this torch has no Muon, which came with 2.9."""
    if not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"train.optimizer is 'muon' and torch {torch.__version__} has none; install torch 2.9 "
            "or later, or choose adamw_torch_fused"
        )


def list_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of linear layers, a head over the vocabulary apart."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
