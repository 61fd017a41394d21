"""One long stream of integers, windows of it, T examples in each, and batches without luck."""

import json
import time

import numpy as np
import pytest
import torch

from configurator import FolioError
from data.dataset import (
    HEADER_BYTES, IGNORED, TokenStream, evaluation_batches, inputs_and_targets, open_dataset,
    prefetch, seed_for, training_batch,
)  # fmt: skip


def stream_of(folder, *shards, dtype="<u2", split="train", vocab_size=1000) -> TokenStream:
    for i, shard in enumerate(shards):
        np.array(shard, dtype=dtype).tofile(folder / f"{split}_{i:06}.bin")
    return TokenStream(folder, split, {"dtype": np.dtype(dtype).name}, vocab_size)


def with_header(tokens, count=None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


def test_targets_are_inputs_shifted_by_one():
    inputs, targets = inputs_and_targets(torch.tensor([[5, 9, 2, 7]]))
    assert inputs.tolist() == [[5, 9, 2]]
    assert targets.tolist() == [[9, 2, 7]]


def test_a_batch_is_made_of_windows_of_the_stream(tmp_path):
    stream = stream_of(tmp_path, range(100))
    inputs, targets = training_batch(stream, 5, 8, seed=1, step=2, micro_batch=3)
    assert inputs.shape == targets.shape == (5, 8)
    assert torch.equal(targets, inputs + 1)  # in this stream each token's successor is one more
    assert torch.equal(inputs - inputs[:, :1], torch.arange(8).expand(5, 8))


def test_the_same_seed_step_and_micro_batch_give_the_same_batch(tmp_path):
    stream = stream_of(tmp_path, range(1000))

    def batch(*numbers):
        return training_batch(stream, 4, 8, *numbers)[0].tolist()

    assert batch(1, 2, 3) == batch(1, 2, 3)
    others = [batch(0, 2, 3), batch(1, 0, 3), batch(1, 2, 0), batch(1, 3, 2)]
    assert batch(1, 2, 3) not in others
    assert seed_for(1, 2, 3) == seed_for(1, 2, 3) != seed_for(1, 3, 2)


def test_every_window_is_drawn_from_time_to_time(tmp_path):
    stream = stream_of(tmp_path, range(12))
    starts = training_batch(stream, 500, 8, 0, 0, 0)[0][:, 0]
    assert sorted(set(starts.tolist())) == [0, 1, 2, 3]  # the last window is tokens 3 to 11


def test_no_window_crosses_from_shard_to_shard(tmp_path):
    stream = stream_of(tmp_path, range(20), [900], range(100, 115))
    assert len(stream) == 36
    count = stream.window_count(9)
    assert count == 12 + 0 + 7
    windows = stream.windows(np.arange(count), 9)
    assert (np.diff(windows) == 1).all()
    assert windows[:, 0].tolist() == [*range(12), *range(100, 107)]


def test_an_evaluation_asks_for_every_token_but_the_first_exactly_once(tmp_path):
    stream = stream_of(tmp_path, range(30), range(100, 109))
    asked = torch.cat([t[t != IGNORED] for _, t in evaluation_batches(stream, 4, 8)])
    assert sorted(asked.tolist()) == [*range(1, 30), *range(101, 109)]


def test_evaluation_batches_have_one_shape_and_end_where_they_are_told(tmp_path):
    stream = stream_of(tmp_path, range(100))
    batches = list(evaluation_batches(stream, 4, 8))
    assert {tuple(inputs.shape) for inputs, _ in batches} == {(4, 8)}
    asked = torch.cat([t[t != IGNORED] for _, t in evaluation_batches(stream, 4, 8, at_most=20)])
    assert asked.tolist() == [*range(1, 25)]  # 20 tokens are 3 windows of 8


def test_shards_with_a_header_are_read_behind_it(tmp_path):
    (tmp_path / "train_0.bin").write_bytes(with_header(range(50)))
    stream = TokenStream(tmp_path, "train", {}, 1000)
    assert stream.windows(np.array([7]), 3).tolist() == [[7, 8, 9]]
    (tmp_path / "train_0.bin").write_bytes(with_header(range(50), count=51))
    with pytest.raises(FolioError, match="promises 51 tokens"):
        TokenStream(tmp_path, "train", {}, 1000)
    assert HEADER_BYTES == 1024


def test_ids_beyond_sixteen_bits_are_read_from_wider_files(tmp_path):
    stream = stream_of(tmp_path, [70000, 1, 69999], dtype="<u4", vocab_size=70001)
    stream.check(2)
    assert stream.windows(np.array([0]), 3).tolist() == [[70000, 1, 69999]]


def test_an_id_outside_the_vocabulary_is_found_before_the_first_step(tmp_path):
    stream = stream_of(tmp_path, [1, 2, 1000, 3], vocab_size=1000)
    with pytest.raises(FolioError, match="holds the token 1000"):
        stream.check(2)
    with pytest.raises(FolioError, match="holds the token 1000"):
        stream.windows(np.array([1]), 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "val.bin").unlink(), "no such file"),
        (lambda folder: (folder / "train.bin").write_bytes(b""), "empty"),
        (lambda folder: (folder / "train.bin").write_bytes(b"123"), "no whole number of uint16"),
        (lambda folder: (folder / "val.bin").write_bytes(b"\0" * 16), "too few for a window"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "--tokenizer=gpt2"),
        (lambda folder: (folder / "meta.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "meta.json").write_text('{"dtype": "int8"}'), "damaged"),
    ],
)
def test_a_damaged_dataset_is_refused_in_words(rhyme, damage, message):
    open_dataset(str(rhyme), block_size=8)
    damage(rhyme)
    with pytest.raises(FolioError, match=message):
        open_dataset(str(rhyme), block_size=8)


def test_a_missing_dataset_is_told_what_there_is(data_folder, rhyme):
    rhyme.rename(data_folder / "rhyme")
    with pytest.raises(FolioError, match="did you mean rhyme"):
        open_dataset("rhymes", 8)
    with pytest.raises(FolioError, match="there are: rhyme"):
        open_dataset("something_else", 8)


def test_nanogpts_folders_without_meta_are_read_as_uint16(rhyme):
    before = open_dataset(str(rhyme), 8)
    (rhyme / "meta.json").unlink()
    assert len(open_dataset(str(rhyme), 8).train) == len(before.train) > 1000


def test_meta_says_what_is_in_the_files(rhyme):
    meta = json.loads((rhyme / "meta.json").read_text())
    dataset = open_dataset(str(rhyme), 8)
    assert meta["train_tokens"] == len(dataset.train)
    assert meta["val_tokens"] == len(dataset.val)
    assert meta["vocab_size"] == dataset.tokenizer.vocab_size
    ids = dataset.train.windows(np.array([0]), 24)[0]
    assert dataset.tokenizer.decode(ids)[:4] in ("twin", "how ", "up a")


def test_the_next_batch_is_fetched_while_this_one_is_in_use():
    fetched = []
    arriving = prefetch(lambda key: fetched.append(key) or key, range(3))
    assert next(arriving) == 0
    deadline = time.monotonic() + 5
    while fetched != [0, 1]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert list(arriving) == [1, 2]


def test_prefetching_keeps_the_order_and_passes_errors_on():
    assert list(prefetch(lambda key: key * key, range(5))) == [0, 1, 4, 9, 16]
    assert list(prefetch(str, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda key: 1 // key, [1, 0]))
