"""Turn texts of your own into the integers that train.py reads.

    python -m data.prepare_text diary.txt --dataset=diary
    python -m data.prepare_text novels/ --dataset=novels --tokenizer=bpe --vocab_size=2048
    python -m data.prepare_text chat.jsonl --dataset=chat --tokenizer=gpt2

Takes UTF-8 text files, folders of them, and .jsonl files with a text in each line's "text". Several
documents are parted by an end-of-text token, and some of them are held out for validation; of a
single document the end is held out. Files are read piece by piece, however large they are.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from configurator import Count, FolioError, Range, given_settings, run_main
from data.prepare import dataset_folder, make_tokenizer, write_dataset

PIECE = 2**20  # bytes read at a time
LEARNED_FROM = 100  # pieces of text from which merges are learned

try:
    from tqdm import tqdm
except ImportError:  # the bar is for the eyes only
    tqdm = None


@dataclass
class PrepareTextConfig:
    # --- Preparation ---
    dataset: str = ""  # the folder under data/ to write
    tokenizer: Literal["char", "gpt2", "bpe"] = "char"  # characters; GPT-2's; or learned from it
    vocab_size: Count = 1024  # tokens of a vocabulary that is learned (bpe)
    val_fraction: Annotated[float, Range(0.0001, 0.5)] = 0.1  # share held out for validation


def main() -> None:
    inputs = []
    config = PrepareTextConfig(**given_settings(PrepareTextConfig, inputs=inputs))
    if not inputs:
        raise FolioError("which text? python -m data.prepare_text FILE_OR_FOLDER --dataset=NAME")
    folder = dataset_folder(config.dataset)
    files = find_files(inputs)
    sizes = [sum(map(len, document)) for document in documents(files)]  # in characters
    if not sum(sizes):
        raise FolioError(f"{', '.join(map(str, inputs))}: there is no text here")
    several = len(sizes) > 1

    def pieces(split):
        return part(documents(files), split, sizes, config.val_fraction)

    # An alphabet may come from all of the text; merges are learned, from what is for learning.
    alphabet_from = (piece for document in documents(files) for piece in document)
    merges_from = islice((piece for piece in pieces("train") if piece), LEARNED_FROM)
    learn_from = alphabet_from if config.tokenizer == "char" else merges_from
    tokenizer = make_tokenizer(config.tokenizer, learn_from, config.vocab_size, several)
    splits = {split: shown(pieces(split), split) for split in ("train", "val")}
    origin = {"source": ", ".join(str(path.resolve()) for path in inputs), "documents": len(sizes)}
    meta = write_dataset(folder, tokenizer, splits, origin)
    recipe = (
        "finetune_shakespeare" if config.tokenizer == "gpt2" else f"shakespeare_{config.tokenizer}"
    )
    print(
        f"{folder}: {len(sizes):,} document{'s' * several}, a vocabulary of "
        f"{meta['vocab_size']:,}; {meta['train_tokens']:,} tokens to train on and "
        f"{meta['val_tokens']:,} held out\n"
        f"next: python train.py config/{recipe}.py --dataset={config.dataset} "
        f"--out_dir=out/{config.dataset}"
    )


# --- What is for training, what is held out ---


def is_held_out(number: int, documents: int, fraction: float) -> bool:
    """Whether this one of several documents is held out: 3 of 30 at 0.1, and never none."""
    if int(documents * fraction) == 0:
        return number == documents - 1
    return int((number + 1) * fraction) > int(number * fraction)


def part(
    documents: Iterable[Iterator[str]], split: str, sizes: list[int], fraction: float
) -> Iterator[str | None]:
    """The pieces of one split, "train" or "val", with None at the end of each of its documents."""
    if len(sizes) == 1:
        (document,) = documents
        yield from part_of_one(document, split, int(sizes[0] * (1 - fraction)))
        return
    for number, document in enumerate(documents):
        if is_held_out(number, len(sizes), fraction) == (split == "val"):
            yield from document
            yield None
        else:
            for _ in document:  # read on to the next
                pass


def part_of_one(document: Iterator[str], split: str, cut: int) -> Iterator[str]:
    """What stands before (train) or behind (val) character number `cut` of a document."""
    for piece in document:
        before, behind = piece[: max(cut, 0)], piece[max(cut, 0) :]
        yield before if split == "train" else behind
        cut -= len(piece)


# --- Reading ---


def find_files(inputs: list[Path]) -> list[Path]:
    """The text files that are meant; hidden and binary ones in folders are passed over."""
    found = []
    for path in inputs:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
            open_ones = [p for p in inside if not is_hidden(p.relative_to(path))]
            texts = [p for p in open_ones if not is_binary(p)]
            if len(texts) < len(open_ones):
                print(f"{path}: passing over {len(open_ones) - len(texts)} binary files")
            found += texts
        elif path.exists():
            found.append(path)
        else:
            raise FolioError(f"{path}: there is no such file or folder")
    if not found:
        raise FolioError(f"{', '.join(map(str, inputs))}: there is no text file in it")
    return found


def is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def documents(files: Iterable[Path]) -> Iterator[Iterator[str]]:
    """Each document of these files as an iterator of pieces, to be used up before the next."""
    for path in files:
        if path.suffix == ".jsonl":
            for text in lines_of_json(path):
                yield iter([text])
        else:
            yield read_pieces(path)


def lines_of_json(path: Path) -> Iterator[str]:
    """The "text" of each line; FolioError names the line that has none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # half a character, "\\ud83d", is JSON but no text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise FolioError(f'{path}:{number}: not a line like {{"text": "..."}}')
            yield text


def read_pieces(path: Path) -> Iterator[str]:
    """A file's text in pieces of about a megabyte, cut where no tokenizer joins what it parts.

    A token of GPT-2's kind may begin with white space but does not go on from something else into
    it: between a letter and the white space behind it a text can be cut without changing its ids.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    kept, position = "", 0
    with open(path, "rb") as file:
        while True:
            raw = file.read(PIECE)
            try:
                text = kept + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                offset = position + len(raw) - len(error.object) + error.start
                raise FolioError(
                    f"{path}: not UTF-8 text (the byte at offset {offset:,} belongs to no "
                    "character); convert it, or leave it out"
                ) from None
            position += len(raw)
            if not raw:
                break
            cut = last_cut(text)
            kept = text[cut:]
            if cut:
                yield text[:cut]
    if text:
        yield text


def last_cut(text: str) -> int:
    """The last place in `text` between a character and white space; all of it if there is none."""
    for i in range(len(text) - 1, 0, -1):
        if text[i].isspace() and not text[i - 1].isspace():
            return i
    return len(text)


def shown(pieces: Iterable[str | None], split: str) -> Iterator[str | None]:
    """The same pieces, with a count of their characters on a terminal if they take a while."""
    bar = tqdm and tqdm(
        desc=split, unit=" characters", unit_scale=True, delay=1, disable=None, leave=False
    )
    for piece in pieces:
        yield piece
        if bar is not None:
            bar.update(len(piece or ""))
    if bar is not None:
        bar.close()


if __name__ == "__main__":
    run_main(main)
