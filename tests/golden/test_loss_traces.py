"""The losses of twenty train steps stay what they were, whatever is rearranged.

``traces.json`` was recorded by ``python -m tests.golden.test_loss_traces`` before the code was
rearranged; record it again only with a change that is meant to move numbers.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.models import build_model, draw_ids
from unimatrix.presets import PRESETS

FILE = Path(__file__).parent / "traces.json"
NUM_STEPS = 20
# Kind of the trace: dtype, back end, largest relative difference, with its reason.
KINDS = {
    # The reference path does the same arithmetic in the same order.
    "reference": (torch.float64, "reference", 1e-12),
    # Compiled passes may sum the same terms in another order.
    "default": (torch.float32, "auto", 1e-5),
}
SIZES = {"vocab_size": 31, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}


def trace(preset: str, kind: str) -> list[float]:
    """Return the losses of twenty steps of AdamW on small batches that are always the same."""
    dtype, backend, _ = KINDS[kind]
    model = build_model(preset, dtype=dtype, dropout=0.0, slot_key_size=None, **SIZES).train()
    model.set_backend(backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    losses = []
    for optim_step in range(NUM_STEPS):
        ids = draw_ids(2, 16, seed=optim_step)
        loss = model(ids, labels=ids, loss_only=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_of_twenty_train_steps_are_those_recorded(preset: str, kind: str) -> None:
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[preset][kind]
    found = trace(preset, kind)
    assert found == pytest.approx(recorded, rel=KINDS[kind][2], abs=0)


def main() -> None:
    """Record the traces."""
    traces = {preset: {kind: trace(preset, kind) for kind in KINDS} for preset in PRESETS}
    FILE.write_text(json.dumps(traces, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
