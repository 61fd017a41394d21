"""Whatever is typed or found on disk: an answer or one line of complaint, never a traceback.

Hypothesis makes up the inputs: some dozens of each kind here, thousands with `pytest --nightly`. So
that a lesson cannot pass by refusing everything, it also asks for a share that was accepted.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import FolioError, as_json, configure, read_settings, settings_of
from data.dataset import open_dataset
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, tokenizer_text
from tests.test_checkpoint import random_model
from tests.test_tokenizer import AWKWARD, toy_bpe
from train import TrainConfig
from training.checkpoint import read_config, save_model


@pytest.fixture
def examples(trials):
    """The number of cases, and how hypothesis is told of it."""
    count = trials(60, 2500)
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count, deadline=None, suppress_health_check=quiet, database=None,
        derandomize=count < 100,
    )  # fmt: skip


class Count:
    """How many cases there were, and how many of them were accepted."""

    def __init__(self):
        self.cases = self.accepted = 0

    def share(self) -> float:
        return self.accepted / self.cases


# --- Settings ---

NAMES = sorted(settings_of(TrainConfig))
values = st.one_of(
    st.integers(-10, 10**20), st.floats(), st.booleans(), st.text(max_size=20),
    st.sampled_from(["auto", "muon", "cpu", "gpt2", "float32", 1, 8, 0.5, True]),
)  # fmt: skip
likely = st.one_of(
    st.tuples(st.sampled_from(["max_iters", "batch_size", "n_layer"]), st.integers(1, 99)),
    st.tuples(st.sampled_from(["learning_rate", "dropout"]), st.floats(0, 1)),
    st.tuples(st.sampled_from(NAMES), values),
)
CODE = (
    "open({0!r}, 'w')",
    "__import__('os').system('touch {0}')",
    "[x for x in (1,)]",
    "1 if 1 else 2",
)


def test_any_config_file_is_understood_or_refused_and_never_run(tmp_path, examples):
    marker, file, counts = tmp_path / "marker", tmp_path / "config.py", Count()
    evil = st.sampled_from([code.format(str(marker)) for code in CODE])
    line = st.one_of(
        likely.map(lambda pair: f"{pair[0]} = {pair[1]!r}"),
        likely.map(lambda pair: f"{pair[0]} = {pair[1]!r}"),
        st.tuples(st.sampled_from(NAMES), evil).map(lambda pair: f"{pair[0]} = {pair[1]}"),
        st.text(max_size=40),
    )

    @examples
    @given(st.lists(line, max_size=3))
    def check(lines):
        file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        counts.cases += 1
        try:
            config = configure(TrainConfig, [str(file)])
        except FolioError as error:
            assert str(error)
        else:
            counts.accepted += 1
            assert config == read_back(config, tmp_path / "settings.json")
        assert not marker.exists()

    check()
    assert counts.share() > 0.1


def read_back(config: TrainConfig, path: Path) -> TrainConfig:
    """The same settings, by way of a settings.json."""
    path.write_text(as_json(config), encoding="utf-8")
    return configure(TrainConfig, [], base=read_settings(path))


def test_any_flags_are_understood_or_refused(tmp_path, examples):
    counts = Count()
    flag = st.one_of(
        likely.map(lambda pair: f"--{pair[0]}={pair[1]}"),
        likely.map(lambda pair: f"--{pair[0]}={pair[1]}"),
        st.sampled_from([f"--{name}" for name in NAMES] + ["--no-bias", "--compile", "-h1", "--"]),
        st.text(max_size=20).filter(lambda text: text not in ("-h", "--help")),
    )

    @examples
    @given(st.lists(flag, max_size=3))
    def check(flags):
        counts.cases += 1
        try:
            config = configure(TrainConfig, flags)
        except FolioError as error:
            assert str(error)
        else:
            counts.accepted += 1
            assert config == read_back(config, tmp_path / "settings.json")

    check()
    assert counts.share() > 0.1


# --- Texts ---


def test_any_text_comes_back_from_its_tokens(examples):
    bpe = toy_bpe()

    @examples
    @given(st.text())
    def check(text):
        assert bpe.decode(bpe.encode(text)) == text
        assert "".join(bpe.decode_stream(bpe.encode(text))) == text
        if text:
            characters = CharTokenizer.of(text)
            assert characters.decode(characters.encode(text)) == text

    check()


# --- Files ---


def test_any_bytes_are_a_dataset_or_are_refused(tmp_path, data_folder, examples):
    folder, counts = data_folder / "fuzz", Count()
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer_text(CharTokenizer("abc")), encoding="utf-8")
    header = np.zeros(256, dtype="<i4")
    small = st.lists(st.integers(0, 2), min_size=9, max_size=40).map(
        lambda ids: np.array(ids, dtype="<u2").tobytes()
    )
    headed = st.tuples(st.integers(-3, 60), small).map(lambda pair: begin(header, *pair))
    contents = st.one_of(small, small, headed, st.binary(max_size=60))

    @examples
    @given(contents, small)
    def check(train, val):
        (folder / "train.bin").write_bytes(train)
        (folder / "val.bin").write_bytes(val)
        counts.cases += 1
        try:
            found = open_dataset("fuzz", block_size=8)
        except FolioError as error:
            assert "fuzz" in str(error)
        else:
            counts.accepted += 1
            windows = found.train.windows(np.arange(found.train.window_count(9)), 9)
            assert windows.min() >= 0 and windows.max() <= 2

    check()
    assert counts.share() > 0.2


def begin(header: np.ndarray, count: int, ids: bytes) -> bytes:
    header[:3] = 20240520, 1, count
    return header.tobytes() + ids


def mutations(original: dict):
    """The same JSON with a value, anywhere in it, replaced, removed or added."""
    paths = list(paths_in(original))
    odd = st.one_of(
        st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
        st.just([]), st.just({}), st.just([[]]),
    )  # fmt: skip

    def change(pair):
        path, value = pair
        changed = copy.deepcopy(original)
        place = changed
        for key in path[:-1]:
            place = place[key]
        if value == "remove" and isinstance(place, dict):
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return changed

    return st.tuples(st.sampled_from(paths), st.one_of(st.just("remove"), odd)).map(change)


def paths_in(node, path=()):
    """The paths to all values in nested dicts and lists; of long ones, to the first few."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items)[:12]:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths_in(value, (*path, key))


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_any_tokenizer_file_is_understood_or_refused(tmp_path, examples, kind):
    tokenizer = CharTokenizer.of(AWKWARD) if kind == "char" else toy_bpe()
    original, counts = json.loads(tokenizer_text(tokenizer)), Count()

    @examples
    @given(mutations(original))
    def check(contents):
        (tmp_path / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
        counts.cases += 1
        try:
            found = load_tokenizer(tmp_path)
        except FolioError as error:
            assert "tokenizer.json" in str(error)
        else:
            counts.accepted += 1
            assert isinstance(found, CharTokenizer | BPETokenizer)
            text = found.decode(range(min(found.vocab_size, 50)))
            assert isinstance(text, str)

    check()
    assert counts.share() > 0.1


def test_any_config_json_is_understood_or_refused(tmp_path, examples):
    save_model(random_model(), tmp_path)
    path, counts = tmp_path / "config.json", Count()

    @examples
    @given(mutations(json.loads(path.read_text())))
    def check(contents):
        path.write_text(json.dumps(contents), encoding="utf-8")
        counts.cases += 1
        try:
            found = read_config(tmp_path)
        except FolioError as error:
            assert "config.json" in str(error)
        else:
            counts.accepted += 1
            assert 0 < found.n_embd < 2**24 and found.n_embd % found.n_head == 0

    check()
    assert counts.share() > 0.1
