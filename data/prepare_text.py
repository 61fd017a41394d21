"""Prepare your own text.

    python -m data.prepare_text diary.txt --dataset=diary
    python -m data.prepare_text novels/ --dataset=novels --tokenizer=bpe --vocab_size=2048
    python -m data.prepare_text chat.jsonl --dataset=chat --tokenizer=gpt2
    python -m data.prepare_text letters.txt --dataset=letters --tokenizer=out/shakespeare_char
    python -m data.prepare_text train.txt --val=val.txt --dataset=mine

Reads UTF-8 text files, folders of them, and .jsonl files with one document in each line. Documents
are separated by end-of-text tokens. Every tenth document is for validation; if there are few
documents, or a few hold most of the text, the last tenth of the text is for validation. A copy of
a file is skipped, and equal documents are never in both splits, unless --val is given.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file: python data/prepare_text.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Annotated, Any, ClassVar

from tqdm import tqdm

from configurator import ROOT, FolioError, PositiveInt, Range, parse_inputs, run_main
from data.documents import (
    find_files, group_by_content, is_jsonl, normalize_newlines, read_documents,
)  # fmt: skip
from data.files import join_names, user_path
from data.hub import is_hub_name
from data.prepare import (
    TOKENIZER_TYPES,
    check_replaceable,
    check_tokenizer_type,
    dataset_folder,
    dataset_lock,
    make_tokenizer,
    plural,
    summary,
    tokenizer_folder,
    train_command,
    write_dataset,
)
from data.tokenizer import CharTokenizer, Tokenizer, read_json
from data.tokenizer_base import END_OF_TEXT

CHANGED = "the text has changed while it was read; prepare a copy of it"
BPE_CHARACTERS = 100 * 2**20  # of the training split, from which BPE learns


@dataclass
class PrepareTextConfig:
    # --- Preparation ---
    dataset: str = ""  # folder under data/ for the new dataset
    tokenizer: str = "char"  # char, gpt2, bpe (learned from the text), FOLDER or OWNER/NAME
    vocab_size: PositiveInt = 1024  # vocabulary size of bpe
    val: str = ""  # file or folder for validation; empty: a part of the text
    val_fraction: Annotated[float, Range(0.0001, 0.5)] = 0.1  # fraction used for validation
    json_key: str = "text"  # key of the text in each line of a .jsonl file
    document_separator: str = ""  # between documents in a text file, such as "\n\n"; empty: none

    replaced_settings: ClassVar[dict[str, str]] = {
        "input_file": "give the file alone: python -m data.prepare_text FILE --dataset=NAME",
        "out_dir": "--dataset=NAME is the folder under data/ for the new dataset",
    }


def main() -> None:
    inputs, config = parse_inputs(PrepareTextConfig)
    if not inputs:
        raise FolioError(
            "which text? usage: python -m data.prepare_text FILE_OR_FOLDER --dataset=NAME"
        )
    folder = dataset_folder(config.dataset)
    check_replaceable(folder)
    check_tokenizer_type(config.tokenizer)
    corpus = open_corpus(inputs, config)
    tokenizer = choose_tokenizer(corpus, config)
    splits = {split: with_progress(corpus.pieces(split), split) for split in ("train", "val")}
    if not tokenizer.can_encode_in_pieces:
        splits = {split: join_pieces(pieces) for split, pieces in splits.items()}
    paths = [*inputs, *filter(None, [config.val])]
    source = join_names([os.path.abspath(user_path(path)) for path in paths])
    with dataset_lock(folder):
        meta = write_dataset(
            folder, tokenizer, splits, {"source": source, "documents": len(corpus.sizes)}
        )
    print(summary(folder, meta, plural(len(corpus.sizes), "document")))
    print(f"next:\n    {next_command(config, tokenizer, meta)}")


def next_command(config: PrepareTextConfig, tokenizer: Tokenizer, meta: dict[str, Any]) -> str:
    """The command that trains on the new dataset, or finetunes the model whose tokenizer it has."""
    flags = [f"--dataset={config.dataset}", f"--out_dir=out/{config.dataset}"]
    if config.tokenizer in TOKENIZER_TYPES:
        name = f"shakespeare_{config.tokenizer}"
        name = "finetune_shakespeare" if config.tokenizer == "gpt2" else name
        return train_command(name, meta, flags)
    folder = tokenizer_folder(config.tokenizer)
    model = read_json(folder / "config.json")  # empty for a dataset
    if model.get("model_type") != "gpt2":
        is_char = isinstance(tokenizer, CharTokenizer)
        return train_command(f"shakespeare_{'char' if is_char else 'bpe'}", meta, flags)
    source = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    if is_hub_name(config.tokenizer) and not user_path(config.tokenizer).is_dir():
        source = config.tokenizer
    flags = [f"--init_from={source}", *flags]
    config_name = "finetune_shakespeare"  # for OpenAI's GPT-2
    # A run of train.py or its snapshot (out/run/step_000500): a small model, usually trained with
    # Muon.
    if any((path / "settings.json").exists() for path in (folder, folder.parent)):
        config_name = ""
        flags += ["--max_iters=250", "--learning_rate=5e-4", "--muon_learning_rate=2e-3"]
    return train_command(config_name, meta, flags, model.get("n_positions"))


# --- The documents and their split ---


@dataclass(frozen=True)
class Corpus:
    """Documents that are read again for each purpose, because they may not fit into memory.

    Reading raises FolioError if a document has changed, or one was added, since it was measured.
    """

    read: Callable[[], Iterator[Iterator[str]]]
    sizes: list[int]  # characters of each document
    hashes: list[bytes]  # of each document: see measure()
    cuts: list[int]  # where the validation part of each document begins, in characters
    # Numbers of the documents that are equal to an earlier one: left out of validation, and out of
    # training if the earlier one is for validation.
    copies: set[int]
    separated: bool  # whether the end of each document is marked

    def pieces(self, split: str) -> Iterator[str | None]:
        """The pieces of one split, "train" or "val", with None at the end of each document."""
        documents, is_open = self.read(), False  # is_open: the end of a document is not marked yet
        for number, (size, cut) in enumerate(zip(self.sizes, self.cuts, strict=True)):
            document, position, text_hash = next(documents, ()), 0, new_hash()
            if split == "val" and number in self.copies:
                continue
            for piece in document:
                cut_in_piece = max(cut - position, 0)
                part = piece[:cut_in_piece] if split == "train" else piece[cut_in_piece:]
                if part:
                    if is_open:
                        yield None
                    yield part
                    is_open = False
                position += len(piece)
                text_hash.update(piece.encode())
            if text_hash.digest() != self.hashes[number]:
                raise FolioError(CHANGED)
            # A cut document ends in the validation split. Its training part gets an end if another
            # document follows. An empty document is left out.
            if self.separated and size > 0:
                if (split == "train") == (cut == size):  # the document ends in this split
                    yield None
                elif split == "train" and cut > 0:
                    is_open = True
        if next(documents, None) is not None:
            raise FolioError(CHANGED)

    def all_pieces(self) -> Iterator[str]:
        return (piece for document in self.read() for piece in document)


def open_corpus(inputs: list[Path], config: PrepareTextConfig) -> Corpus:
    """Find and measure all documents. FolioError if there is no text."""
    files = find_files(inputs)
    val_files: list[Path] = []
    if config.val:
        val_files = find_files([config.val])
        for _, *copies in group_by_content([*files, *val_files]):
            if copies:
                raise FolioError(f"--val={config.val}: {copies[0]} is also given for training")
    separator = config.document_separator
    for escaped, character in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        separator = separator.replace(escaped, character)
    separator = normalize_newlines(separator)  # as in the text

    def read(files: list[Path]) -> Iterator[Iterator[str]]:
        return read_documents(files, config.json_key, separator)

    train, val = ([measure(document) for document in read(group)] for group in (files, val_files))
    sizes = [size for size, _, _ in (*train, *val)]
    n_marks = sum(count for _, count, _ in (*train, *val))
    if separator and len(sizes) <= sum(not is_jsonl(path) for path in (*files, *val_files)):
        print(f"--document_separator={config.document_separator} divides no text into documents")
    is_ordinary = config.tokenizer in TOKENIZER_TYPES  # others may recognize END_OF_TEXT
    if n_marks and is_ordinary:
        print(f"{END_OF_TEXT} occurs {plural(n_marks, 'time')}, and is read as ordinary text")
        if not separator and not all(map(is_jsonl, files)):
            print(f"to divide the text there: --document_separator='{END_OF_TEXT}'")
    if not sum(sizes[: len(train)]):
        raise FolioError(f"{', '.join(map(str, inputs))}: no text found")
    numbers: dict[tuple[int, int, bytes], int] = {}
    firsts = [numbers.setdefault(key, number) for number, key in enumerate((*train, *val))]
    copies = {number for number, size in enumerate(sizes) if size and firsts[number] < number}
    if copies:
        note = "all are kept, as --val is given" if config.val else "no text is in both splits"
        print(f"equal to an earlier document: {len(copies):,} ({note})")
    if config.val:
        cuts, copies = [*sizes[: len(train)], *[0] * len(val)], set()
    else:
        once = [0 if number in copies else size for number, size in enumerate(sizes)]
        cuts = validation_cuts(once, config.val_fraction)
        cuts = [cuts[first] for first in firsts]
    separated = len(train) > 1 or len(val) > 1
    hashes = [text_hash for _, _, text_hash in (*train, *val)]
    return Corpus(lambda: read([*files, *val_files]), sizes, hashes, cuts, copies, separated)


def new_hash() -> Any:
    """A hash to which update() adds the pieces of a text."""
    return hashlib.blake2b(digest_size=16)


def measure(document: Iterable[str]) -> tuple[int, int, bytes]:
    """The number of characters of a document, how often END_OF_TEXT is in it, and a hash."""
    size, n_marks, text_hash = 0, 0, new_hash()
    for piece in document:
        size += len(piece)
        n_marks += piece.count(END_OF_TEXT)
        text_hash.update(piece.encode())
    return size, n_marks, text_hash.digest()


def validation_cuts(sizes: list[int], fraction: float) -> list[int]:
    """Where the validation part of each document begins: at 0 if all of it is for validation.

    Whole documents are for validation, at fraction = 0.1 every tenth, if they hold about this
    fraction of the text. Otherwise it is the last part of the whole text, as for one document:
    sizes [9000, 1000, 10000] -> cuts [9000, 1000, 8000].
    """
    total = sum(sizes)
    is_val = [int((i + 1) * fraction) > int(i * fraction) for i in range(len(sizes))]
    val_size = sum(size for size, chosen in zip(sizes, is_val, strict=True) if chosen)
    if fraction / 2 <= val_size / total <= fraction * 2:
        return [0 if chosen else size for size, chosen in zip(sizes, is_val, strict=True)]
    cut = int(total * (1 - fraction))
    starts = accumulate(sizes, initial=0)
    return [min(max(cut - start, 0), size) for start, size in zip(starts, sizes, strict=False)]


def join_pieces(pieces: Iterable[str | None]) -> Iterator[str | None]:
    """One string for each document: "a", "b", None, "c" -> "ab", None, "c"."""
    for is_end, group in groupby(pieces, key=lambda piece: piece is None):
        if is_end:
            yield from group
        else:
            yield "".join(group)


# --- The tokenizer ---


def choose_tokenizer(corpus: Corpus, config: PrepareTextConfig) -> Tokenizer:
    """Characters come from all of the text; BPE learns from the training split only."""
    texts = corpus.all_pieces()
    if config.tokenizer == "bpe":
        train_pieces = filter(None, corpus.pieces("train"))
        texts = sample_evenly(train_pieces, BPE_CHARACTERS / max(sum(corpus.cuts), 1))
    tokenizer = make_tokenizer(config.tokenizer, texts, config.vocab_size, corpus.separated)
    if corpus.separated and tokenizer.eos_token_id is None and not len(tokenizer.prefix_ids):
        separator = "newlines" if len(tokenizer.separator_ids) else "nothing"
        print(f"{separator} between documents: this vocabulary has no end-of-text token")
    return tokenizer


def sample_evenly(pieces: Iterable[str], fraction: float) -> Iterator[str]:
    """About this fraction of the text, in pieces that are spread over all of it."""
    seen = kept = 0
    for piece in pieces:
        if kept <= seen * fraction:
            yield piece
            kept += len(piece)
        seen += len(piece)


# --- Output ---


def with_progress(pieces: Iterable[str | None], split: str) -> Iterator[str | None]:
    """Yields the pieces, with a progress bar on terminals."""
    options = {"unit_scale": True, "delay": 1, "disable": None, "leave": False}
    with tqdm(desc=split, unit=" characters", **options) as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece or ""))


if __name__ == "__main__":
    run_main(main)
