"""From a text to batches: token ids, one long stream in a file, windows, training examples.

    python lessons/stream.py                    # about two seconds

The documents of a text become one stream of token ids, with an end-of-text token after each
document. Training cuts windows out of this stream. A window of T + 1 ids holds T examples.

Shapes: N = 22 ids in the stream, B = 2 windows in a batch, T = 4 inputs in a window.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["to be", "or not", "to sleep"]
END_OF_TEXT = "<|endoftext|>"
B, T = 2, 4


def make_vocabulary(documents: list[str]) -> list[str]:
    """All different characters, sorted, and end-of-text. The id of a token is its index."""
    return [*sorted(set("".join(documents))), END_OF_TEXT]


def encode(text: str, vocabulary: list[str]) -> list[int]:
    id_of = {token: i for i, token in enumerate(vocabulary)}
    return [id_of[character] for character in text]


def decode(ids: list[int], vocabulary: list[str]) -> str:
    return "".join(vocabulary[i] for i in ids)


def make_stream(documents: list[str], vocabulary: list[str]) -> np.ndarray:
    """The ids of all documents in a row, with the id of end-of-text after each one: (N,)."""
    stream = []
    for document in documents:
        stream += [*encode(document, vocabulary), vocabulary.index(END_OF_TEXT)]
    return np.array(stream)


def write_file(path: Path, stream: np.ndarray) -> None:
    """Nothing but the ids, two bytes each: uint16 holds the numbers from 0 to 65,535."""
    stream.astype(np.uint16).tofile(path)


def random_batch(path: Path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (B, T) and targets (B, T). The target of each token is the token after it."""
    ids = np.memmap(path, np.uint16, "r")  # only the windows are read, however large the file is
    starts = rng.integers(len(ids) - T, size=B)  # the last window starts at N - T - 1
    windows = np.stack([ids[start : start + T + 1] for start in starts])  # (2, 5)
    return windows[:, :-1], windows[:, 1:]  # ids 5 9 2 -> inputs 5 9, targets 9 2


def show_stream(vocabulary: list[str]) -> np.ndarray:
    print("Three documents:", ", ".join(map(repr, DOCUMENTS)))
    print(f"The vocabulary has {len(vocabulary)} tokens. The id of each token:")
    print("  ", "  ".join(f"{token!r} {i}" for i, token in enumerate(vocabulary[:-1])))
    print("  ", f"{END_OF_TEXT} {len(vocabulary) - 1}, which no character has")
    stream = make_stream(DOCUMENTS, vocabulary)
    print(f"\nThe stream, {len(stream)} ids, and the token of each id (| is end-of-text):")
    print("  ", "".join(f"{i:3}" for i in stream))
    shown = [*vocabulary[:-1], "|"]
    print("  ", "".join(f"{shown[i]:>3}" for i in stream))
    return stream


def show_batch(path: Path, vocabulary: list[str]) -> None:
    seed, step, micro_batch = 1337, 0, 0
    inputs, targets = random_batch(path, np.random.default_rng([seed, step, micro_batch]))
    print(f"\nA batch: {B} windows that start at random positions of the stream")
    print(f"   inputs  {inputs.shape}: {inputs.tolist()}")
    print(f"   targets {targets.shape}: {targets.tolist()}")
    print(f"The first window holds {T} training examples:")
    for t in range(T):
        context = decode(inputs[0, : t + 1].tolist(), vocabulary)
        print(f"   {context!r:24} -> {vocabulary[targets[0, t]]!r}")


def show_play(folder: Path) -> None:
    """One document: the first nine tenths are for training, the last tenth for validation."""
    shakespeare = ROOT / "data" / "shakespeare" / "input.txt"
    path = shakespeare if shakespeare.exists() else ROOT / "data" / "replacement.txt"
    text = path.read_text(encoding="utf-8")
    vocabulary = sorted(set(text))  # one document needs no end-of-text token
    cut = len(text) * 9 // 10
    print(f"\n{path.relative_to(ROOT).as_posix()}: {len(text):,} characters, {len(vocabulary)} of")
    print("them different. Its two files:")
    for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
        write_file(folder / name, np.array(encode(part, vocabulary)))
        print(f"   {name:10} {len(part):9,} ids, {(folder / name).stat().st_size:9,} bytes")


def equal_to_strong_form(path: Path, folder: Path) -> bool:
    """Whether data/prepare.py writes this file, and data/dataset.py makes this batch."""
    from data.dataset import open_dataset, training_batch
    from data.prepare import write_dataset
    from data.tokenizer import CharTokenizer

    tokenizer = CharTokenizer.from_text("".join(DOCUMENTS), add_eos=True)
    pieces = [piece for document in DOCUMENTS for piece in (document, None)]  # None: its end
    write_dataset(folder, tokenizer, {"train": pieces, "val": pieces}, source_meta={})
    equal_files = (folder / "train.bin").read_bytes() == path.read_bytes()
    tokens = open_dataset(folder, block_size=T).train
    strong_batch = training_batch(tokens, B, T, seed=1337, step=0, micro_batch=0)
    batch = random_batch(path, np.random.default_rng([1337, 0, 0]))
    equal_batches = all(map(np.array_equal, batch, strong_batch))
    return equal_files and equal_batches


def main() -> None:
    vocabulary = make_vocabulary(DOCUMENTS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stream = show_stream(vocabulary)
        write_file(folder / "stream.bin", stream)
        print(f"The file has {(folder / 'stream.bin').stat().st_size} bytes: two for each id.")
        show_batch(folder / "stream.bin", vocabulary)
        show_play(folder)
        print("\nOther tokens, such as those of lessons/bpe.py, change only the vocabulary and")
        print("encode(): stream, file and windows stay as they are.")
        print("\nThe strong forms: data/tokenizer.py, data/prepare.py, data/dataset.py.")
        print("Comparing with the strong forms (loading torch takes some seconds) ...", flush=True)
        print("Equal files and batches:", equal_to_strong_form(folder / "stream.bin", folder / "d"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the folder of data/
    main()
