"""Product keys (E20): the nearest entries, and gradients to keys and codebooks."""

import torch
from torch.nn.functional import cosine_similarity

from unimatrix.nn.product_keys import ProductKeys


def test_each_half_becomes_its_nearest_entry() -> None:
    product_keys = ProductKeys(6, 4).double()
    keys = torch.randn(2, 5, 6, dtype=torch.float64)
    quantised = product_keys(keys)
    for b, t, half in [(b, t, half) for b in range(2) for t in range(5) for half in range(2)]:
        part = slice(3 * half, 3 * half + 3)
        table = product_keys.codebooks[half].weight
        cosines = [cosine_similarity(keys[b, t, part], entry, dim=0).item() for entry in table]
        nearest = table[cosines.index(max(cosines))]
        torch.testing.assert_close(quantised[b, t, part], nearest / nearest.norm())


def test_equal_codes_give_equal_keys() -> None:
    product_keys = ProductKeys(4, 2)
    keys = torch.randn(1, 50, 4)
    assert len(product_keys(keys)[0].detach().unique(dim=0)) <= 4


def test_keys_and_codebooks_learn() -> None:
    product_keys = ProductKeys(6, 4)
    keys = torch.randn(1, 5, 6, requires_grad=True)
    (product_keys(keys) * torch.randn(6)).sum().backward()
    for tensor in (keys, *(codebook.weight for codebook in product_keys.codebooks)):
        assert tensor.grad.abs().sum() > 0


def test_gradients_are_those_of_a_softmax_over_the_cosines() -> None:
    """The key is the nearest entry; its gradient is that of the mean of all, by their cosines."""
    product_keys, keys = ProductKeys(6, 4).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    weigh = torch.randn(2, 5, 6, dtype=torch.float64)
    leaves = [keys.requires_grad_(), *product_keys.parameters()]
    found = torch.autograd.grad((product_keys(keys) * weigh).sum(), leaves)
    soft = []
    for half in range(2):
        table = product_keys.codebooks[half].weight
        codes = table / table.norm(dim=-1, keepdim=True)
        part = keys[..., 3 * half : 3 * half + 3]
        cosines = (part / part.norm(dim=-1, keepdim=True)) @ codes.T
        soft.append(cosines.softmax(dim=-1) @ codes)
    expected = torch.autograd.grad((torch.cat(soft, dim=-1) * weigh).sum(), leaves)
    torch.testing.assert_close(found, expected)
