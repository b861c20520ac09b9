import hashlib
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from unimatrix.data import (
    ByteStream,
    ConsecutiveWindows,
    DocumentWindows,
    WindowDataset,
)
from unimatrix.errors import InputError
from unimatrix.tokenization import BOS_ID, EOS_ID

DATA = bytes(range(256)) * 3 + b"end"
BOTH_FORMS = pytest.mark.parametrize("leading_bos", [True, False])


def make_stream(data=DATA, **options):
    return ByteStream.from_bytes(data, name="the text", **options)


def list_rows(dataset, indices):
    return [
        (item["input_ids"].tolist(), item["shift_labels"].tolist())
        for item in dataset.__getitems__(indices)
    ]


def test_a_window_is_bos_and_the_bytes_before_each_label():
    dataset = WindowDataset(make_stream(), 16, 200, seed=1)
    assert len(dataset) == 200
    for item in dataset.__getitems__(range(200)):
        inputs, labels = item["input_ids"], item["shift_labels"]
        assert inputs.dtype == labels.dtype == torch.int64
        assert inputs.shape == labels.shape == (16,)
        assert inputs[0] == BOS_ID
        assert torch.equal(inputs[1:], labels[:-1])
        assert bytes(labels.tolist()) in DATA


def test_a_window_of_the_paper_is_any_tokens_of_the_stream():
    stream = make_stream(b"abcdef", ends_with_eos=True)
    dataset = WindowDataset(stream, 3, 400, seed=1, leading_bos=False)
    tokens = [BOS_ID, *b"abcdef", EOS_ID]
    possible = {(tuple(tokens[s : s + 3]), tuple(tokens[s + 1 : s + 4])) for s in range(5)}
    rows = {(tuple(inputs), tuple(labels)) for inputs, labels in list_rows(dataset, range(400))}
    assert rows == possible


def test_every_start_is_drawn_and_none_beyond():
    dataset = WindowDataset(make_stream(b"abcdef"), 4, 400, seed=1)
    labels = {bytes(labels) for _, labels in list_rows(dataset, range(400))}
    assert labels == {b"abcd", b"bcde", b"cdef"}


@BOTH_FORMS
def test_items_depend_on_seed_and_index_alone(leading_bos, scramble_global_rngs):
    options = {"leading_bos": leading_bos}
    scramble_global_rngs(0)
    first = list_rows(WindowDataset(make_stream(), 16, 64, 7, **options), range(64))
    scramble_global_rngs(1)
    longer = WindowDataset(make_stream(), 16, 10**9, 7, **options)
    order = np.random.default_rng(0).permutation(64)
    assert list_rows(longer, order) == [first[i] for i in order]
    assert [list_rows(longer, [i])[0] for i in range(64)] == first
    single = longer[5]
    assert (single["input_ids"].tolist(), single["shift_labels"].tolist()) == first[5]
    other = list_rows(WindowDataset(make_stream(), 16, 64, 8, **options), range(64))
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 8


def test_items_leave_global_generators_alone(scramble_global_rngs):
    scramble_global_rngs(3)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    list_rows(WindowDataset(make_stream(), 16, 64, 7), range(64))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@BOTH_FORMS
def test_the_windows_of_a_seed_are_the_same_for_ever(leading_bos):
    dataset = WindowDataset(make_stream(), 16, 64, 7, leading_bos=leading_bos)
    digest = hashlib.sha256()
    for inputs, labels in list_rows(dataset, range(64)):
        digest.update(np.array([inputs, labels], "<i8").tobytes())
    assert (
        digest.hexdigest()[:16]
        == {True: "03f916cee176742c", False: "a3d1e06306f54b7d"}[leading_bos]
    )


def test_the_loader_of_pytorch_takes_batches():
    dataset = WindowDataset(make_stream(), 16, 64, 7)
    batches = list(DataLoader(dataset, batch_size=16))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(16, 16)] * 4
    rows = torch.cat([batch["shift_labels"] for batch in batches]).tolist()
    assert rows == [labels for _, labels in list_rows(dataset, range(64))]


def test_mapped_files_give_the_same_windows(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_bytes(DATA[:300])
    paths[1].write_bytes(DATA[300:])
    mapped = ByteStream.from_files(paths, name="text", join_limit_bytes=0)
    for leading_bos in (True, False):
        rows = [
            list_rows(WindowDataset(stream, 40, 99, 5, leading_bos=leading_bos), range(99))
            for stream in (make_stream(), mapped, pickle.loads(pickle.dumps(mapped)))
        ]
        assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("ends_with_eos", [True, False])
def test_consecutive_windows_predict_every_token_once_in_order(ends_with_eos):
    stream = make_stream(ends_with_eos=ends_with_eos)
    dataset = ConsecutiveWindows(stream, 10)
    tokens = [BOS_ID, *DATA, *([EOS_ID] if ends_with_eos else [])]
    assert len(dataset) == (len(tokens) - 1) // 10
    rows = list_rows(dataset, range(len(dataset)))
    covered = 10 * len(dataset)
    assert [token for inputs, _ in rows for token in inputs] == tokens[:covered]
    assert [token for _, labels in rows for token in labels] == tokens[1 : covered + 1]


def test_consecutive_windows_stop_at_the_number_asked_for():
    assert len(ConsecutiveWindows(make_stream(), 10, 4)) == 4
    assert len(ConsecutiveWindows(make_stream(), 10, 10**6)) == 77
    # 771 bytes: exactly one window of 771 predictions.
    assert len(ConsecutiveWindows(make_stream(), 771)) == 1


@pytest.mark.parametrize("index", [-1, 64])
def test_an_index_outside_is_refused(index):
    dataset = WindowDataset(make_stream(), 16, 64, 7)
    with pytest.raises(IndexError, match=str(index)):
        dataset[index]


def test_a_stream_of_one_window_is_enough():
    (row,) = list_rows(WindowDataset(make_stream(b"abcd"), 4, 1, 0), [0])
    assert row == ([BOS_ID, *b"abc"], [*b"abcd"])
    (row,) = list_rows(WindowDataset(make_stream(b"abcd"), 4, 1, 0, leading_bos=False), [0])
    assert row == ([BOS_ID, *b"abc"], [*b"abcd"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: WindowDataset(make_stream(b"abcd"), 5, 1, 0),
        lambda: WindowDataset(make_stream(b"abcd"), 5, 1, 0, leading_bos=False),
        lambda: ConsecutiveWindows(make_stream(b"abcd"), 5),
    ],
)
def test_a_stream_shorter_than_a_window_is_refused(make):
    with pytest.raises(InputError, match=r"the text has 4 bytes.*5 tokens.*more text"):
        make()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: WindowDataset(make_stream(), 0, 1, 0), "window_tokens is 0"),
        (lambda: WindowDataset(make_stream(), 4, 0, 0), "num_windows is 0"),
        (lambda: WindowDataset(make_stream(), 4, 1, -1), "seed -1"),
        (lambda: ConsecutiveWindows(make_stream(), 0), "window_tokens is 0"),
        (lambda: ConsecutiveWindows(make_stream(), 4, 0), "num_windows is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, named):
    with pytest.raises(InputError, match=named):
        make()


DOCUMENTS = [b"abcdefghij", b"k", b"lmn", b"opqrstuvwxyz"]


def join_documents(tmp_path, limit=2**20):
    paths = [tmp_path / str(i) for i in range(len(DOCUMENTS))]
    for path, text in zip(paths, DOCUMENTS, strict=True):
        path.write_bytes(text)
    return ByteStream.from_files(paths, name="files", join_limit_bytes=limit)


@pytest.mark.parametrize("limit", [2**20, 0])
def test_a_stream_knows_where_its_files_start(tmp_path, limit):
    stream = join_documents(tmp_path, limit)
    assert stream.document_starts.tolist() == [0, 10, 11, 14]
    assert stream.slice(4, 16, name="part").document_starts.tolist() == [0, 6, 7, 10]
    assert stream.slice(11, 14, name="one").document_starts.tolist() == [0]
    inner = stream.slice(4, 16, name="part").slice(6, 12, name="inner")
    assert inner.document_starts.tolist() == [0, 1, 4]


@pytest.mark.parametrize("limit", [2**20, 0])
def test_no_window_of_documents_reads_over_an_edge(tmp_path, limit):
    dataset = DocumentWindows(join_documents(tmp_path, limit), 12, 300, seed=1)
    assert len(dataset) == 300
    seen = set()
    for item in dataset.__getitems__(range(300)):
        ids, labels, positions = (
            item[name].tolist() for name in ("input_ids", "shift_labels", "position_ids")
        )
        starts = [t for t, position in enumerate(positions) if position == 0]
        assert starts[0] == 0
        parts = list(zip(starts, [*starts[1:], 12], strict=True))
        for start, stop in parts:
            assert positions[start:stop] == list(range(stop - start))
            assert ids[start] == BOS_ID
            told, last = bytes(ids[start + 1 : stop]), labels[stop - 1]
            assert labels[start : stop - 1] == list(told)
            # Letters differ, so that the byte tells its document.
            document = next(text for text in DOCUMENTS if (told or bytes([last])) in text)
            after = document.index(told or bytes([last])) + len(told)
            assert last == (-100 if after == len(document) else document[after])
            seen.add(told)
    assert {b"k", b"lmn"} <= seen


def test_windows_of_documents_depend_on_seed_and_index_alone(tmp_path):
    stream = join_documents(tmp_path)
    dataset = DocumentWindows(stream, 8, 50, seed=3)
    whole = dataset.__getitems__(range(50))
    again = DocumentWindows(stream, 8, 99, seed=3)
    for i in (0, 7, 49):
        for name, value in again[i].items():
            assert torch.equal(value, whole[i][name])
    other = DocumentWindows(stream, 8, 50, seed=4).__getitems__(range(50))
    assert any(
        not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(whole, other, strict=True)
    )


def test_one_document_is_not_packed():
    with pytest.raises(InputError, match=r"the text is one document, .* leave out data.documents"):
        DocumentWindows(make_stream(), 8, 5, seed=0)
