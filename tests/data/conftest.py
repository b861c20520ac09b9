import random

import numpy as np
import pytest
import torch

from unimatrix.data import ByteStream


@pytest.fixture
def write_tree(tmp_path):
    """Return a function that writes ``{relative path: bytes}`` below a fresh folder."""

    def write(files):
        for name, data in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path

    return write


@pytest.fixture(params=["joined", "mapped"])
def open_stream(request, tmp_path):
    """Return a function that makes a stream of byte strings, one file each."""

    def open_parts(*parts, **options):
        paths = [tmp_path / f"part{number}" for number in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            path.write_bytes(part)
        limit = 2**20 if request.param == "joined" else 0
        return ByteStream.from_files(paths, name="text", join_limit_bytes=limit, **options)

    return open_parts


@pytest.fixture
def scramble_global_rngs():
    """Return a function that puts every global generator elsewhere, and one that reads them."""

    def scramble(salt):
        random.seed(salt)
        np.random.seed(salt)
        torch.manual_seed(salt)

    return scramble
