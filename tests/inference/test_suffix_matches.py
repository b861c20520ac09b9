import numpy as np
import pytest
import torch

from tests.data.test_windows import BOTH_FORMS, make_stream
from unimatrix.data import WindowDataset
from unimatrix.inference import suffix_matches
from unimatrix.inference.suffix_matches import match_stream
from unimatrix.ops.suffix_automaton import predict_from_suffix


@BOTH_FORMS
@pytest.mark.parametrize("window", [None, 8])
def test_matches_are_those_of_the_stream_before(leading_bos, window):
    stream = make_stream(b"abcdabceabcdabcf" * 4, ends_with_eos=True)
    matches = match_stream(stream, window)
    ids = torch.from_numpy(stream.read_tokens(0, stream.num_tokens))[None]
    expected, _ = predict_from_suffix(ids, window=window, backend="reference")
    expected = torch.stack(expected, dim=-1)[0]  # [n, 2]
    dataset = WindowDataset(stream, 6, 80, 3, leading_bos=leading_bos, matches=matches)
    plain = WindowDataset(stream, 6, 80, 3, leading_bos=leading_bos)
    tokens = ids[0].unfold(0, 6, 1)
    for item, same in zip(*(d.__getitems__(range(80)) for d in (dataset, plain)), strict=True):
        assert torch.equal(item["input_ids"], same["input_ids"])
        found, row = item["suffix_match"], item["input_ids"]
        assert found.dtype == torch.int64
        if leading_bos:
            assert found[0].tolist() == [-1, 0]
            found, row = found[1:], row[1:]
        starts = (tokens[:, -len(row) :] == row).all(-1).nonzero()[:, 0] + 6 - len(row)
        assert any(torch.equal(found, expected[s : s + len(row)]) for s in starts)


def test_a_long_stream_is_matched_in_pieces(monkeypatch):
    whole = match_stream(make_stream(), None)
    monkeypatch.setattr(suffix_matches, "_CHUNK_TOKENS", 100)
    pieces = match_stream(make_stream(), None)
    assert (whole.match_lengths > 250).any()
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one, other)
