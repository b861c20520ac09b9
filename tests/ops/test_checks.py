"""What an operator requires of the tensors it is handed."""

import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.ops.checks import find_real_tokens, require_dtype, require_shape


def test_shapes_set_and_meet_sizes() -> None:
    sizes: dict[str, int] = {}
    require_shape("keys", torch.zeros(2, 3, 4), "B T C", sizes)
    require_shape("ids", torch.zeros(2, 3), "B T", sizes)
    assert sizes == {"B": 2, "T": 3, "C": 4}
    with pytest.raises(
        InputError, match=r"ids has shape \[2, 5\]; pass \[B, T\] with B = 2, T = 3"
    ):
        require_shape("ids", torch.zeros(2, 5), "B T", sizes)
    with pytest.raises(InputError, match=r"pass \[X, Y\] with no empty dimension"):
        require_shape("ids", torch.zeros(2, 0), "X Y", {})
    with pytest.raises(InputError, match="ids has shape"):
        require_shape("ids", torch.zeros(2, 3, 1), "B T", sizes)


def test_dtypes() -> None:
    require_dtype("keys", torch.zeros(1, dtype=torch.bfloat16), None)
    require_dtype("ids", torch.zeros(1, dtype=torch.int64), torch.int64)
    with pytest.raises(InputError, match="pass a floating tensor"):
        require_dtype("keys", torch.zeros(1, dtype=torch.int64), None)
    with pytest.raises(InputError, match=r"has dtype torch.int32; pass torch.int64"):
        require_dtype("ids", torch.zeros(1, dtype=torch.int32), torch.int64)


def test_real_tokens_lead() -> None:
    like = torch.zeros(3, 2)
    assert find_real_tokens(None, like).all()
    real = find_real_tokens(torch.tensor([0, 1, 2]), like)
    assert real.tolist() == [[False, False], [True, False], [True, True]]
