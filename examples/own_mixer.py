"""Write your own mixer: a moving average of the stream, trained beside the matrix state.

Run it: ``python examples/own_mixer.py``. A mixer is one class. The block gates what it returns into
the stream, the cache carries its state under its name, and what no compiled path knows runs as the
module that it is.
"""

import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unimatrix import UniMatrixCache, UniMatrixConfig, UniMatrixForCausalLM
from unimatrix.nn.block import UniMatrixBlock
from unimatrix.nn.mixer import Mixer, Read, Tokens


class AverageState(NamedTuple):
    """What is carried from call to call: [B, D], the average after the last token."""

    average: Tensor


class AverageMixer(Mixer):
    """Read the average of the stream so far, each channel with a decay of its own.

    a_t = r a_{t-1} + (1 - r) W h_t, with r = sigmoid(decay), and a_t is what is read.
    """

    name, part = "average_mixer", "average"
    State, state_prefix = AverageState, "average."

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.value_proj = nn.Linear(width, width, bias=False)
        self.decay = nn.Parameter(torch.linspace(0.0, 4.0, width))
        self.read_gate = nn.Linear(width, width)

    @property
    def gate(self) -> nn.Module:
        return self.read_gate

    def forward(
        self, source: Tensor, tokens: Tokens, state: AverageState | None
    ) -> tuple[Read, AverageState]:
        decay = torch.sigmoid(self.decay)
        values = (1 - decay) * self.value_proj(source)  # [B, T, D]
        average = torch.zeros_like(source[:, 0]) if state is None else state.average
        averages = []
        for t in range(source.shape[1]):
            after = decay * average + values[:, t]
            if tokens.lengths is not None:  # padding comes last and changes nothing
                after = torch.where((t < tokens.lengths).unsqueeze(1), after, average)
            average = after
            averages.append(average)
        return Read(torch.stack(averages, dim=1)), AverageState(average)


class AverageBlock(UniMatrixBlock):
    """The block with one mixer more: a named attribute, and a place in the list."""

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__(config)
        self.average_mixer = AverageMixer(config)

    @property
    def mixers(self) -> list[Mixer]:
        return [*super().mixers, self.average_mixer]


class AverageForCausalLM(UniMatrixForCausalLM):
    """The model on that block; it trains, generates, saves and loads like every other."""

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__(config)
        self.model.block = AverageBlock(config)
        self.post_init()


def main(num_steps: int = 30) -> None:
    torch.manual_seed(0)
    model = AverageForCausalLM(UniMatrixConfig.preset("core", dropout=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([[257, *b"a mixer is one class. " * 5]])
    for _ in range(num_steps):
        loss: Any = model(ids, labels=ids, loss_only=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f} nats a byte after {num_steps} steps")

    model.eval()
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :40], use_cache=True).past_key_values
        with tempfile.TemporaryDirectory() as folder:
            cache.save(f"{folder}/average.safetensors")
            cache = UniMatrixCache.load(f"{folder}/average.safetensors")
        rest = model(ids[:, 40:], past_key_values=cache).logits
    difference = (rest - whole[:, 40:]).abs().max().item()
    parts = {part: count for part, count in cache.bytes_by_part().items() if count}
    print(f"state {cache.num_bytes():,} bytes: {parts}")
    print(f"in two parts the logits differ by {difference:.0e} from one pass")


if __name__ == "__main__":
    main()
