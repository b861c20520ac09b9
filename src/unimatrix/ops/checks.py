"""What an operator requires of the tensors it is handed, checked once at its entry."""

import torch
from torch import Tensor

from unimatrix.errors import InputError


def require_shape(name: str, tensor: Tensor, letters: str, sizes: dict[str, int]) -> None:
    """Check a tensor's shape against the sizes that earlier arguments have set.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        letters: one word a dimension, such as ``"B T C"``.
        sizes: known sizes by word; words that are new here are added.

    Raises:
        InputError: if the number of dimensions or a known size differs, or a new one is 0.
    """
    words = letters.split()
    shape = tuple(tensor.shape)
    expected = [sizes.get(word) for word in words]
    fits = len(shape) == len(words) and all(
        size > 0 if known is None else size == known
        for size, known in zip(shape, expected, strict=True)
    )
    if not fits:
        known = ", ".join(f"{word} = {sizes[word]}" for word in words if word in sizes)
        raise InputError(
            f"{name} has shape {list(shape)}; pass [{', '.join(words)}]"
            + (f" with {known}." if known else " with no empty dimension.")
        )
    sizes.update(zip(words, shape, strict=True))


def require_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    """Check a tensor's dtype; ``None`` is any floating dtype.

    Raises:
        InputError: if it is another.
    """
    if dtype is None:
        if not tensor.is_floating_point():
            raise InputError(f"{name} has dtype {tensor.dtype}; pass a floating tensor.")
    elif tensor.dtype != dtype:
        raise InputError(f"{name} has dtype {tensor.dtype}; pass {dtype}.")


def require_lengths(lengths: Tensor, num_tokens: int) -> None:
    """Check the real tokens of each row, [B] int64 on any device; the values on the CPU only.

    Raises:
        InputError: if one is not in 0..T.
    """
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    shortest, longest = (int(x) for x in lengths.aminmax())
    if shortest < 0 or longest > num_tokens:
        raise InputError(
            f"lengths go from {shortest} to {longest}; pass values in 0..{num_tokens}."
        )


def read_ids(input_ids: Tensor, lengths: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """Return ids and lengths for an operator on the CPU, contiguous; ids at padding are 0.

    Args:
        input_ids: [B, T] int64.
        lengths: [B] int64 in 0..T, leading real tokens of each row; ``None`` is T for all.
        most: the largest id.

    Raises:
        InputError: if a shape, type, length or id is not as above.
    """
    sizes: dict[str, int] = {}
    require_shape("input_ids", input_ids, "B T", sizes)
    require_dtype("input_ids", input_ids, torch.int64)
    ids = input_ids.detach().cpu().contiguous()
    if lengths is None:
        lengths = torch.full((sizes["B"],), sizes["T"], dtype=torch.int64)
    else:
        require_shape("lengths", lengths, "B", sizes)
        require_dtype("lengths", lengths, torch.int64)
        lengths = lengths.cpu().contiguous()
        if ((lengths < 0) | (lengths > sizes["T"])).any():
            raise InputError(f"lengths is {lengths.tolist()}; pass values in 0 .. {sizes['T']}.")
        ids = torch.where(find_real_tokens(lengths, ids), ids, 0)
    smallest, largest = (int(bound) for bound in ids.aminmax())
    if smallest < 0 or largest > most:
        raise InputError(
            f"input_ids holds {smallest if smallest < 0 else largest}; pass 0 .. {most}."
        )
    return ids, lengths


def find_real_tokens(lengths: Tensor | None, like: Tensor) -> Tensor:
    """Return which positions hold real tokens.

    Args:
        lengths: [B] int64, leading real tokens of each row; ``None`` is T for all.
        like: [B, T], any tensor of that shape and device.

    Returns:
        [B, T] bool.
    """
    if lengths is None:
        return torch.ones_like(like, dtype=torch.bool)
    return torch.arange(like.shape[1], device=like.device) < lengths.unsqueeze(1)


def is_autocast(device_type: str) -> bool:
    """Return whether matrix products on a device change their inputs' dtype now."""
    known = torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` is on: compiled code cannot read its tensors."""
    # A captured graph holds whole operators, and what captures it is no transform of the caller.
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None
