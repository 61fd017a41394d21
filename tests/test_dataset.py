"""data/dataset.py: batches, windows, shards, and the checks of a dataset's folder."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configurator import FolioError
from data import dataset, show
from data.bpe import train_bpe
from data.dataset import (
    HEADER_BYTES, IGNORE_INDEX, SHARD_MAGIC, SHARD_VERSION, ShardedTokens, derive_seed,
    evaluation_batches, inputs_and_targets, open_dataset, prefetch, training_batch,
)  # fmt: skip
from data.tokenizer import CharTokenizer, load_tokenizer
from tests.conftest import TINY_TEXT, assert_one_line_error
from tests.fuzzing import Count, fuzz_settings
from tests.test_tokenizer import toy_bpe


def write_shards(folder, *shards, dtype="<u2", vocab_size=1000) -> ShardedTokens:
    for i, shard in enumerate(shards):
        np.array(shard, dtype=dtype).tofile(folder / f"train_{i:06}.bin")
    return ShardedTokens(folder, "train", {"dtype": np.dtype(dtype).name}, vocab_size)


def with_header(ids: bytes, count: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, count
    return header.tobytes() + ids


def id_bytes(ids) -> bytes:
    return np.array(ids, dtype="<u2").tobytes()


# --- Batches ---


def test_targets_are_inputs_shifted_by_one():
    inputs, targets = inputs_and_targets(torch.tensor([[5, 9, 2, 7]]))
    assert inputs.tolist() == [[5, 9, 2]]
    assert targets.tolist() == [[9, 2, 7]]


def test_training_batch_holds_windows_of_the_tokens(tmp_path):
    tokens = write_shards(tmp_path, range(100))
    inputs, targets = training_batch(tokens, 5, 8, seed=1, step=2, micro_batch=3)
    assert inputs.shape == targets.shape == (5, 8)
    assert torch.equal(targets, inputs + 1)  # in these tokens, each next token is one larger
    assert torch.equal(inputs - inputs[:, :1], torch.arange(8).expand(5, 8))


def test_training_batch_is_a_function_of_seed_step_and_micro_batch(tmp_path):
    tokens = write_shards(tmp_path, range(1000))

    def batch(*numbers):
        return training_batch(tokens, 4, 8, *numbers)[0].tolist()

    assert batch(1, 2, 3) == batch(1, 2, 3)
    others = [batch(0, 2, 3), batch(1, 0, 3), batch(1, 2, 0), batch(1, 3, 2)]
    assert batch(1, 2, 3) not in others
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3) != derive_seed(1, 3, 2)


def test_training_batches_include_every_window(tmp_path):
    tokens = write_shards(tmp_path, range(12))
    starts = training_batch(tokens, 500, 8, 0, 0, 0)[0][:, 0]
    assert sorted(set(starts.tolist())) == [0, 1, 2, 3]  # the last window is tokens 3 to 11


def test_evaluation_predicts_each_token_except_the_first_exactly_once(tmp_path):
    tokens = write_shards(tmp_path, range(30), range(100, 109))
    targets = torch.cat([t[t != IGNORE_INDEX] for _, t in evaluation_batches(tokens, 4, 8)])
    assert sorted(targets.tolist()) == [*range(1, 30), *range(101, 109)]


def test_evaluation_of_ten_tokens_by_hand(tmp_path):
    """The example in the docstring of evaluation_windows."""
    tokens = write_shards(tmp_path, range(10))
    [(inputs, targets)] = evaluation_batches(tokens, batch_size=4, block_size=4)
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [-1, -1, -1, 9], [-1, -1, -1, -1]]


def test_max_tokens_counts_each_token_of_several_shards_once(tmp_path):
    """Shards of 6 and 30 tokens, windows of 4: 4 and 1 tokens of the first, then 4 and 4."""
    tokens = write_shards(tmp_path, range(6), range(30))
    targets = [
        sum(int((t != IGNORE_INDEX).sum()) for _, t in evaluation_batches(tokens, 2, 4, max_tokens))
        for max_tokens in (4, 5, 6, 9, 10, 0)
    ]
    assert targets == [4, 5, 9, 9, 13, 5 + 29]


def test_evaluation_batches_have_one_shape_and_stop_at_max_tokens(tmp_path):
    tokens = write_shards(tmp_path, range(100))
    batches = list(evaluation_batches(tokens, 4, 8))
    assert {tuple(inputs.shape) for inputs, _ in batches} == {(4, 8)}
    limited = evaluation_batches(tokens, 4, 8, max_tokens=20)
    targets = torch.cat([t[t != IGNORE_INDEX] for _, t in limited])
    assert targets.tolist() == [*range(1, 25)]  # 20 tokens, rounded up to 3 windows of 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_ranks_together_evaluate_the_batches_of_one_process(tmp_path, world_size, monkeypatch):
    tokens = write_shards(tmp_path, range(100), range(200, 260))
    expected = list(evaluation_batches(tokens, 4, 8))
    built = []  # every window that any rank gathers
    original = ShardedTokens.windows
    monkeypatch.setattr(
        ShardedTokens, "windows", lambda *args: built.append(args[1]) or original(*args)
    )
    of_ranks = [
        list(evaluation_batches(tokens, 4, 8, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len(built) == len(expected)  # no rank builds another rank's batches
    assert sum(map(len, of_ranks)) == len(expected)
    for i, (inputs, targets) in enumerate(expected):
        rank_inputs, rank_targets = of_ranks[i % world_size][i // world_size]
        assert torch.equal(rank_inputs, inputs) and torch.equal(rank_targets, targets)


def test_prefetch_computes_the_next_item_while_this_one_is_in_use():
    computed = []
    items = prefetch(computed.append(i) or i for i in range(3))
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while computed != [0, 1]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert list(items) == [1, 2]


def test_prefetch_keeps_the_order_and_raises_errors_in_turn():
    assert list(prefetch(i * i for i in range(5))) == [0, 1, 4, 9, 16]
    assert list(prefetch(iter([]))) == []
    items = prefetch(1 // i for i in (1, 0))
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)


# --- Shards ---


def test_windows_do_not_cross_shards(tmp_path):
    tokens = write_shards(tmp_path, range(20), [900], range(100, 115))
    assert len(tokens) == 36
    assert tokens.num_windows(9) == 12 + 0 + 7
    windows = tokens.windows(np.arange(12 + 7), 9)
    assert (np.diff(windows) == 1).all()
    assert windows[:, 0].tolist() == [*range(12), *range(100, 107)]


def test_header_of_a_shard_is_skipped_and_its_count_is_checked(tmp_path):
    ids = id_bytes(range(50))
    (tmp_path / "train_0.bin").write_bytes(with_header(ids, count=50))
    tokens = ShardedTokens(tmp_path, "train", {}, 1000)
    assert tokens.windows(np.array([7]), 3).tolist() == [[7, 8, 9]]
    (tmp_path / "train_0.bin").write_bytes(with_header(ids, count=51))
    with pytest.raises(FolioError, match="states 51 tokens, but the file has 50"):
        ShardedTokens(tmp_path, "train", {}, 1000)
    assert HEADER_BYTES == 1024


def test_ids_above_65535_are_read_from_uint32(tmp_path):
    tokens = write_shards(tmp_path, [70000, 1, 69999], dtype="<u4", vocab_size=70001)
    assert tokens.windows(np.array([0]), 3).tolist() == [[70000, 1, 69999]]


def test_id_outside_the_vocabulary_is_refused_when_opening(tmp_path):
    with pytest.raises(FolioError, match="token id 1000 is out of range"):
        write_shards(tmp_path, [1, 2, 1000, 3], vocab_size=1000)


def test_id_outside_the_vocabulary_is_refused_in_each_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("data.dataset.CHECKED_IDS", 2)
    tokens = write_shards(tmp_path, [1, 2, 1000, 3], vocab_size=1000)
    with pytest.raises(FolioError, match="token id 1000 is out of range"):
        tokens.windows(np.array([1]), 2)


def test_opening_reads_only_a_small_part_of_each_shard(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(ShardedTokens, "check_ids", lambda self, ids: checked.append(len(ids)))
    write_shards(tmp_path, np.zeros(10**6), np.zeros(10**6))
    assert sum(checked) <= 2**17


@pytest.mark.parametrize("position", [0, 199_999])
def test_the_checksum_sees_the_first_and_the_last_ids(tmp_path, position):
    ids = np.full(200_000, 7, "<u2")
    before = write_shards(tmp_path, ids).checksum()
    ids[position] = 1
    assert write_shards(tmp_path, ids).checksum() != before


# --- The folder ---


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "val.bin").unlink(), "not found"),
        (lambda folder: (folder / "train.bin").write_bytes(b""), "empty"),
        (lambda folder: (folder / "train.bin").write_bytes(b"123"), "not a multiple .* uint16"),
        (lambda folder: (folder / "train.bin").write_bytes(with_header(b"", 0)), "empty"),
        (lambda folder: shorten(folder / "train.bin"), "1,542 tokens, but meta.json states 3085"),
        (lambda folder: set_meta(folder, train_tokens=3000), "3,085 tokens, but .* states 3000"),
        (lambda folder: set_meta(folder, val_tokens="many"), "meta.json states 'many'"),
        (lambda folder: set_meta(folder, val_tokens=None), "meta.json states None"),
        (lambda folder: make_folder(folder / "train.bin"), "cannot be read"),
        (lambda folder: make_folder(folder / "meta.json"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "--tokenizer=gpt2"),
        (lambda folder: (folder / "meta.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "meta.json").write_text("[" * 10**5), "damaged"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff"), "damaged"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "damaged"),
        (lambda folder: rename_a_character(folder), "not the tokenizer of this dataset"),
        (lambda folder: (folder / "meta.json").write_text('{"dtype": "int8"}'), "damaged"),
        (lambda folder: (folder / "meta.json").write_text('{"dtype": [1]}'), "damaged"),
        (lambda folder: (folder / "meta.json").write_text('{"sha256": [[1]]}'), "damaged"),
    ],
)
def test_damaged_dataset_is_refused_with_the_reason(tiny_dataset, damage, message):
    open_dataset(tiny_dataset, block_size=8)
    damage(tiny_dataset)
    with pytest.raises(FolioError, match=message):
        open_dataset(tiny_dataset, block_size=8)


def shorten(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4 * 2])


def set_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename_a_character(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"b": ', '"B": '))


def make_folder(path):
    path.unlink()
    path.mkdir()


def test_shards_may_hold_more_tokens_than_meta_json_states(tiny_dataset):
    """A preparation adds shards while another program reads the dataset."""
    (tiny_dataset / "train.bin").rename(tiny_dataset / "train_000001.bin")
    for name in ("train_holdout", "train_000001 (copy)", "train_000001_old", "train2"):
        shutil.copy(tiny_dataset / "val.bin", tiny_dataset / f"{name}.bin")  # these are no shards
    set_meta(tiny_dataset, train_tokens=3000)
    assert len(open_dataset(tiny_dataset, 8).train) == 3085


def test_copies_beside_train_bin_are_no_shards(tiny_dataset):
    expected = len(open_dataset(tiny_dataset, 8).train)
    shutil.copy(tiny_dataset / "train.bin", tiny_dataset / "train_backup.bin")
    assert len(open_dataset(tiny_dataset, 8).train) == expected


def test_text_shorter_than_a_window_is_refused(tiny_dataset):
    with pytest.raises(FolioError, match=r"only 343 tokens, .* block_size \+ 1 = 344"):
        open_dataset(tiny_dataset, block_size=343)


def test_shards_that_hold_no_window_are_reported(tiny_dataset, capsys):
    open_dataset(tiny_dataset, 8)
    assert capsys.readouterr().out == ""
    (tiny_dataset / "val.bin").rename(tiny_dataset / "val_0.bin")
    for i in (1, 2):
        (tiny_dataset / f"val_{i}.bin").write_bytes(id_bytes([1] * (7 + i)))  # 8 and 9 tokens
    open_dataset(tiny_dataset, 8)
    assert capsys.readouterr().out == (
        f"{tiny_dataset}/val*.bin: unused shards: 1 of 3; "
        "a window needs block_size + 1 = 9 tokens\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_dataset_does_not_stay_in_the_memory_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("data.dataset.LARGE_BYTES", 2**20)
    ids = np.arange(2**22, dtype="<u2")  # 8 MiB
    ids.tofile(tmp_path / "train.bin")
    tokens = ShardedTokens(tmp_path, "train", {}, 2**16)
    windows = tokens.windows(np.arange(0, len(ids) - 8, 512), 8)
    assert (windows == ids[: len(ids) - 8 : 512, None] + np.arange(8)).all()
    assert memory_of(tmp_path / "train.bin") < 100
    tokens.is_large = False
    tokens.windows(np.arange(0, len(ids) - 8, 512), 8)
    assert memory_of(tmp_path / "train.bin") == 8192


def memory_of(path) -> int:
    """KiB of a mapped file that count as memory of this process."""
    _, *mappings = Path("/proc/self/smaps").read_text().split(f"{path}\n")
    return sum(int(re.search(r"Rss: +(\d+) kB", mapping)[1]) for mapping in mappings)


@pytest.mark.parametrize("dtype", ["<u4", "<i8", ".npy of <u2"])
def test_wider_ids_without_meta_json_are_refused(tiny_dataset, dtype):
    """As uint16 each would be an id and one or three zeros: a text that is easy to predict."""
    path, tokenizer = tiny_dataset / "train.bin", load_tokenizer(tiny_dataset)
    ids = np.fromfile(path, "<u2")
    for name in ("tokenizer.json", "tokenizer_config.json", "meta.json"):
        (tiny_dataset / name).unlink()
    assert len(open_dataset(tiny_dataset, 8, tokenizer).train) == len(ids)
    if dtype == ".npy of <u2":
        with open(path, "wb") as file:
            np.save(file, ids)
    else:
        ids.astype(dtype).tofile(path)
    with pytest.raises(FolioError, match=r"train\.bin: seems to .* over 16 bits"):
        open_dataset(tiny_dataset, 8, tokenizer)
    if dtype == "<i8":
        (tiny_dataset / "meta.json").write_text('{"dtype": "uint32"}')
        with pytest.raises(FolioError, match="over 32 bits"):
            open_dataset(tiny_dataset, 8, tokenizer)


def test_missing_dataset_is_refused_with_the_available_names(data_folder, tiny_dataset):
    tiny_dataset.rename(data_folder / "rhyme")
    shutil.copytree(data_folder / "rhyme", data_folder / ".other.tmp")  # left by a killed process
    with pytest.raises(FolioError, match="did you mean rhyme"):
        open_dataset("rhymes", 8)
    with pytest.raises(FolioError, match="available: rhyme;"):
        open_dataset("something_else", 8)


@pytest.mark.parametrize("name", ["a\0b", "half \ud83d"])
def test_name_that_no_folder_can_have_is_refused(name):
    with pytest.raises(FolioError, match="not a valid path"):
        open_dataset(name, 8)


def test_a_folder_without_tokens_is_no_dataset(data_folder):
    (data_folder / "shakespeare").mkdir()
    (data_folder / "shakespeare" / "input.txt").write_text("a text, as it was downloaded")
    with pytest.raises(FolioError, match=r"shakespeare: not a dataset; .*data\.prepare_text"):
        open_dataset("shakespeare", 8)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fineweb", r"python -m data\.prepare_fineweb --shards=100"),
        ("shakespeare_char", r"python prepare_shakespeare\.py"),
        ("shakespeare_bpe", r"python prepare_shakespeare\.py --tokenizer=bpe"),
    ],
)
def test_missing_dataset_that_folio_can_prepare_is_refused_with_the_command(
    data_folder, name, command
):
    with pytest.raises(FolioError, match=rf"not found .*; prepare it with {command}$"):
        open_dataset(name, 8)


def test_nanogpt_folder_without_meta_json_is_read_as_uint16(tiny_dataset):
    expected = open_dataset(tiny_dataset, 8)
    (tiny_dataset / "meta.json").unlink()
    assert len(open_dataset(tiny_dataset, 8).train) == len(expected.train) > 1000


def test_nanogpt_characters_are_refused_with_the_command_that_prepares_them(tiny_dataset):
    """nanoGPT's meta.pkl is never opened, and its characters are never taken for GPT-2's tokens."""
    (tiny_dataset / "tokenizer.json").unlink()
    (tiny_dataset / "meta.json").unlink()
    (tiny_dataset / "meta.pkl").write_bytes(b"not even a pickle")
    for tokenizer in (None, toy_bpe()):
        with pytest.raises(FolioError, match=r"meta\.pkl: nanoGPT's .*prepare_text FILE"):
            open_dataset(tiny_dataset, 8, tokenizer)


def test_tokenizer_other_than_that_of_the_dataset_is_refused(tiny_dataset):
    own = open_dataset(tiny_dataset, 8).tokenizer
    assert open_dataset(tiny_dataset, 8, own).tokenizer == own
    with pytest.raises(FolioError, match="a tokenizer of its own; omit --tokenizer"):
        open_dataset(tiny_dataset, 8, toy_bpe())


def test_unreadable_folder_is_not_called_missing(tiny_dataset, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(FolioError, match=r"cannot be read \(Permission denied\)"):
        open_dataset(tiny_dataset, 8)


def test_meta_json_describes_the_files(tiny_dataset):
    meta = json.loads((tiny_dataset / "meta.json").read_text())
    dataset = open_dataset(str(tiny_dataset), 8)
    assert meta["train_tokens"] == len(dataset.train)
    assert meta["val_tokens"] == len(dataset.val)
    assert meta["vocab_size"] == dataset.tokenizer.vocab_size
    ids = dataset.train.windows(np.array([0]), 24)[0]
    assert dataset.tokenizer.decode(ids)[:4] in ("twin", "how ", "up a")


def test_any_bytes_are_a_dataset_or_are_refused(data_folder, n_trials):
    folder, count = data_folder / "fuzz", Count()
    folder.mkdir()
    (folder / "tokenizer.json").write_text(CharTokenizer("abc").to_json(), encoding="utf-8")
    valid = st.lists(st.integers(0, 2), min_size=9, max_size=40).map(id_bytes)
    headed = st.tuples(valid, st.integers(-3, 60)).map(lambda pair: with_header(*pair))
    contents = st.one_of(valid, valid, headed, st.binary(max_size=60))

    @fuzz_settings(n_trials)
    @given(contents, valid)
    def check(train, val):
        (folder / "train.bin").write_bytes(train)
        (folder / "val.bin").write_bytes(val)
        count.inputs += 1
        try:
            found = open_dataset("fuzz", block_size=8)
        except FolioError as error:
            assert "fuzz" in str(error)
        else:
            count.accepted += 1
            windows = found.train.windows(np.arange(found.train.num_windows(9)), 9)
            assert windows.min() >= 0 and windows.max() <= 2

    check()
    assert count.fraction_accepted() > 0.1


def test_a_dataset_that_is_replaced_while_it_is_opened_is_never_a_mixture(
    tiny_dataset, tmp_path, monkeypatch
):
    other, splits = tmp_path / "other", {}
    shutil.copytree(tiny_dataset, other)
    for split in ("train", "val"):  # another text of equal size
        splits[split] = np.fromfile(other / f"{split}.bin", "<u2")[::-1]
        splits[split].tofile(other / f"{split}.bin")

    def replace_before_val(folder, split, *args):
        if split == "val" and other.exists():
            tiny_dataset.rename(tmp_path / "old")
            other.rename(tiny_dataset)
        return ShardedTokens(folder, split, *args)

    monkeypatch.setattr(dataset, "ShardedTokens", replace_before_val)
    opened = open_dataset(tiny_dataset, 8)
    for tokens, split in ((opened.train, "train"), (opened.val, "val")):
        assert np.array_equal(tokens.shards[0], splits[split])


# --- python -m data.show ---


def test_show_prints_ids_and_characters_of_inputs_and_targets(tiny_dataset, call):
    flags = ("--batch_size=5", "--block_size=16", "--seed=5", "--rows=3", "--tokens=4")
    result = call(show, str(tiny_dataset), *flags)
    assert result.returncode == 0, result.stderr
    assert "each (5, 16)\nthe first 3 of 5 rows, the first 4 of 16 tokens\n" in result.stdout
    dataset = open_dataset(tiny_dataset, 16)
    inputs, targets = training_batch(dataset.train, 5, 16, seed=5, step=0, micro_batch=0)
    rows = [line.split("->")[0] for line in result.stdout.splitlines() if "->" in line]
    table = [row for row in rows if row.split()[0].isdigit()]
    assert len(table) == 3 * 4
    first_window = dataset.tokenizer.decode(inputs[0])
    for t, row in enumerate(table[:4]):
        assert row.split()[:2] == [str(t), str(int(inputs[0, t]))]
        assert f" {int(targets[0, t])} " in row
        assert repr(first_window[: t + 1]) in row


def test_show_fits_80_columns_for_long_tokens(tmp_path, tiny_dataset):
    text = "an-incomprehensibilities incomprehensibilities " * 50
    tokenizer = train_bpe([text], 280)
    ids = torch.from_numpy(tokenizer.encode(text * 2 + TINY_TEXT))
    table = show.format_window(ids[:60], ids[1:61], tokenizer)
    assert max(map(len, table.splitlines())) <= 80
    assert len(table.splitlines()) == 61


def test_show_without_a_name_is_refused(call):
    assert_one_line_error(call(show), "python -m data.show shakespeare_char")
