"""The matrix mixer (E1 to E4, E18, E19, E24): against a loop over tokens and heads."""

import pytest
import torch
from torch import Tensor

from tests.models import build_model
from tests.nn.streams import build_mixer, check_gradients, check_padding, check_split, draw_stream
from unimatrix.nn.matrix_mixer import MatrixMixer, MatrixState
from unimatrix.nn.mixer import Read

# Outer products and mixed rules, the guard, unit vectors, the delta rule; with a convolution.
VARIANTS = ("core", "core+mixed", "discovery", "core+conv", "selective", "selective+small")
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str) -> MatrixMixer:
    mixer: MatrixMixer = build_mixer("matrix_mixer", variant)
    return mixer


def write(mixer: MatrixMixer, S: Tensor, h: Tensor, vectors: list[Tensor], head: int) -> Tensor:
    """Return one head's state after a token."""
    _, k, v, *d = vectors
    rho = torch.sigmoid(mixer.retention_proj(h))[head]
    if mixer.write_proj is not None:
        beta = torch.sigmoid(mixer.write_proj(h))[head]
        return rho * S + beta * torch.outer(k - rho * S @ v, v)
    U = torch.outer(k, v)
    if mixer.mixes_rules:
        pi = mixer.rule_proj(h).view(-1, 3)[head].softmax(-1)
        U = pi[0] * U + pi[1] * torch.diag(d[0]) + pi[2] * (U + U.T) / 2
    S = rho * S + (1 - rho) * U
    return S / S.norm().clamp_min(1) if mixer.norm_guard else S


def read_by_hand(mixer: MatrixMixer, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return what one row [T, D] reads and the states [H, N, N]."""
    H, N = mixer.num_heads, mixer.head_dim
    states, contexts = [torch.zeros(N, N, dtype=torch.float64) for _ in range(H)], []
    for t in range(len(h)):
        mixed = h[t]
        if mixer.short_conv is not None:
            filters = mixer.short_conv.weight.flip(0)
            mixed = sum(f * h[t - back] for back, f in enumerate(filters) if back <= t)
        readouts = []
        for head in range(H):
            vectors = [layer(mixed).view(H, N)[head] for layer in mixer.vector_layers]
            if mixer.normalized_keys:
                bound = [vector / vector.norm() for vector in vectors]
                # What the delta rule stores is not bounded.
                vectors = [bound[0], vectors[1], bound[2]] if mixer.uses_delta else bound
            else:
                vectors = [vector.tanh() for vector in vectors]
            states[head] = write(mixer, states[head], h[t], vectors, head)
            y = states[head] @ vectors[0]
            readouts.append(y / (y.square().mean() + 1e-6).sqrt() if mixer.normalized_keys else y)
        contexts.append(mixer.out_proj(torch.cat(readouts)))
    return torch.stack(contexts), torch.stack(states)


@variants
@torch.no_grad()
def test_equals_a_loop(variant: str) -> None:
    mixer, stream = build(variant), draw_stream(2, 9)
    read, state = stream.read(mixer)
    assert isinstance(read, Read)
    assert isinstance(state, MatrixState)
    for row in range(2):
        context, matrix_state = read_by_hand(mixer, stream.source[row])
        torch.testing.assert_close(read.context[row], context)
        torch.testing.assert_close(state.matrix_state[row], matrix_state)
    assert (state.recent is None) == (mixer.short_conv is None)


@variants
@torch.no_grad()
def test_two_parts_equal_one_and_padding_is_nothing(variant: str) -> None:
    check_split(build(variant))
    check_padding(build(variant))


@variants
def test_gradients(variant: str) -> None:
    check_gradients(build(variant), beside=("residual_gate",))


def test_vectors_that_are_bound_already_are_not_bound_again() -> None:
    mixer, source = build("core"), draw_stream(2, 9).source
    vectors = torch.cat([layer(source) for layer in mixer.vector_layers], dim=-1)
    controls = mixer.retention_proj(source)
    assert mixer.squashes
    expected = mixer.scan(vectors, controls, None, None)
    torch.testing.assert_close(
        mixer.scan(vectors.tanh(), controls, None, None, is_bound=True), expected
    )


def test_a_diagonal_that_no_rule_uses_is_frozen() -> None:
    frozen = {
        variant: not build(variant).diag_proj.weight.requires_grad for variant in VARIANTS[:3]
    }
    assert frozen == {"core": True, "core+mixed": False, "discovery": False}
    assert not hasattr(build("selective+small"), "diag_proj")


def test_the_heads_start_on_scales_from_two_tokens_on() -> None:
    mixer = build_model("selective").model.block.matrix_mixer
    ((bias, start),) = mixer.retention_proj.list_starts()
    assert bias is mixer.retention_proj.bias
    lasts = 1 / (1 - torch.sigmoid(start.double()))
    torch.testing.assert_close(lasts, torch.tensor([2.0, 32.0, 512.0]).double(), rtol=1e-3, atol=0)
    assert build("core").retention_proj.list_starts() == []
