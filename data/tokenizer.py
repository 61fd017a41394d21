"""Text to integers and back: by character, or by byte pair encoding (BPE).

    tokenizer = CharTokenizer.of("hello")      # vocabulary: e h l o
    tokenizer.encode("hole")                   # array([1, 3, 2, 0])
    tokenizer.decode([1, 3, 2, 0])             # 'hole'

Every tokenizer has `vocab_size`, `end_of_text` (an id, or None), `encode`, `decode`, `token_bytes`
and `as_json`. Two are equal when they turn every text into the same ids. On disk a tokenizer is the
`tokenizer.json` of Hugging Face's `tokenizers` library, so AutoTokenizer opens it too.

Encoding treats text as text: a literal "<|endoftext|>" in it is thirteen characters, never the
token. Only the preparation of a dataset puts end-of-text tokens between documents.
"""

import codecs
import itertools
import json
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import requests
import tiktoken

from configurator import FolioError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """What every tokenizer can do; subclasses say how a text is cut."""

    vocab_size: int
    end_of_text: int | None

    def encode(self, text: str) -> np.ndarray:
        """'hole' -> array([1, 3, 2, 0]): the ids, as unsigned 32-bit integers."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes a token stands for, perhaps only a part of a character's."""
        raise NotImplementedError

    def as_json(self) -> dict:
        """The contents of tokenizer.json."""
        raise NotImplementedError

    def decode(self, tokens: Iterable[int]) -> str:
        """[1, 3, 2, 0] -> 'hole'. Bytes that are no UTF-8 become the replacement sign."""
        return b"".join(self.token_bytes(int(t)) for t in tokens).decode("utf-8", errors="replace")

    def decode_stream(self, tokens: Iterable[int]):
        """Yields the text of each token as it comes, '' while a character is not yet whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self.token_bytes(int(token)))

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) how many bytes of text each token stands for; none for end-of-text."""
        lengths = [len(self.token_bytes(token)) for token in range(self.vocab_size)]
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return np.array(lengths)

    @property
    def opening(self) -> int:
        """What stands before a text: end-of-text, else a line's end, else the first token."""
        if self.end_of_text is not None:
            return self.end_of_text
        try:
            return int(self.encode("\n")[0])
        except FolioError:
            return 0

    def __eq__(self, other):
        return type(self) is type(other) and self.identity == other.identity

    def __hash__(self):
        return hash(self.vocab_size)


# --- One token per character ---


class CharTokenizer(Tokenizer):
    """The vocabulary is a list of characters; a token is a place in it."""

    def __init__(self, characters: str, parts_documents: bool = False):
        if len(set(characters)) != len(characters):
            raise ValueError("a character stands twice in the vocabulary")
        self.characters = characters
        self.vocab_size = len(characters) + parts_documents
        self.end_of_text = len(characters) if parts_documents else None
        self._place = np.full(sys.maxunicode + 1, -1, dtype=np.int32)  # of each code point
        self._place[code_points(characters)] = np.arange(len(characters))

    @classmethod
    def of(cls, text: Iterable[str], parts_documents: bool = False) -> "CharTokenizer":
        """The vocabulary of a text: each of its characters once, in Unicode's order.

        parts_documents: whether it also has an end-of-text token, to stand between documents.
        """
        return cls("".join(sorted(set(text))), parts_documents)

    def encode(self, text: str) -> np.ndarray:
        places = self._place[code_points(text)]
        if (unknown := places < 0).any():
            position = int(unknown.argmax())
            raise FolioError(
                f"the character {text[position]!r} at position {position} is not in the "
                f"vocabulary of {len(self.characters)} characters"
            )
        return places.view(np.uint32)

    def token_bytes(self, token: int) -> bytes:
        return (END_OF_TEXT if token == self.end_of_text else self.characters[token]).encode()

    @property
    def identity(self):
        return self.characters, self.end_of_text

    def as_json(self) -> dict:
        vocab = {character: i for i, character in enumerate(self.characters)}
        if self.end_of_text is not None:
            vocab[END_OF_TEXT] = self.end_of_text
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special_tokens(self.end_of_text),
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": vocab,
                "unk_token": "<unk>",  # the format wants a name; no character has it
            },
        }

    @classmethod
    def from_json(cls, contents: dict) -> "CharTokenizer":
        check_cut(contents, "Split")
        vocab = contents["model"]["vocab"]
        characters = sorted(vocab, key=vocab.get)
        if [vocab[c] for c in characters] != list(range(len(vocab))):
            raise ValueError("the ids are not 0, 1, 2, ...")
        parts_documents = characters[-1:] == [END_OF_TEXT]
        characters = characters[: len(characters) - parts_documents]
        if any(len(character) != 1 for character in characters) or not characters:
            raise ValueError("the vocabulary is not one of single characters")
        return cls("".join(characters), parts_documents)


def code_points(text: str) -> np.ndarray:
    """'hé' -> array([104, 233]): the number Unicode gives each character."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


# --- Byte pair encoding ---

# How GPT-2 cuts text into words before it merges bytes within each: contractions, letters,
# digits, other signs, each with the space before it; then runs of white space.
# From OpenAI's tiktoken (MIT), where it is an argument of the encoding named "gpt2".
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class BPETokenizer(Tokenizer):
    """A token is a sequence of bytes; frequent neighbours have been merged into one.

    ranks: every token's bytes and its id. Encoding a word merges the neighbours whose union has
    the lowest id, again and again, until no two neighbours make a token (Sennrich et al. 2016).
    """

    def __init__(self, ranks: dict[bytes, int], end_of_text: int | None):
        special = {} if end_of_text is None else {END_OF_TEXT: end_of_text}
        ids = sorted([*ranks.values(), *special.values()])
        if ids != list(range(len(ids))):
            raise ValueError("the ids are not 0, 1, 2, ...")
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("not every byte is a token")
        self.ranks = ranks
        self.vocab_size = len(ids)
        self.end_of_text = end_of_text
        self._encoding = tiktoken.Encoding(
            "folio", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's vocabulary of 50,257 tokens, fetched and cached by tiktoken."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (requests.RequestException, OSError, ValueError) as error:
            raise FolioError(
                "GPT-2's vocabulary could not be fetched "
                f"({type(error).__name__}); on a machine without network, set TIKTOKEN_CACHE_DIR "
                "to a folder that has it (tiktoken fills that folder where there is a network)"
            ) from None
        return cls(encoding._mergeable_ranks, encoding.eot_token)

    def encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:  # half a character, as a terminal may hand on
            wrong = text[error.start]
            raise FolioError(f"{wrong!r} at position {error.start} is no character") from None

    def token_bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token)

    @property
    def identity(self):
        return self.ranks, self.end_of_text

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs in the order in which they were merged, found again from the ranks.

        The last merge that made a token joined the two parts into which the earlier merges alone
        would encode it.
        """
        return [
            split_by_earlier_merges(token, rank, self.ranks)
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
            if len(token) > 1
        ]

    def as_json(self) -> dict:
        vocab = {printable(token): rank for token, rank in self.ranks.items()}
        if self.end_of_text is not None:
            vocab[END_OF_TEXT] = self.end_of_text
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special_tokens(self.end_of_text),
            "normalizer": None,
            "pre_tokenizer": {**byte_level, "use_regex": True},
            "post_processor": None,
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                "merges": [[printable(left), printable(right)] for left, right in self.merges],
            },
        }

    @classmethod
    def from_json(cls, contents: dict) -> "BPETokenizer":
        check_cut(contents, "ByteLevel")
        if contents["pre_tokenizer"].get("add_prefix_space"):
            raise ValueError("it puts a space before every text")
        end_of_text = None
        for token in contents.get("added_tokens") or []:
            if token["content"] != END_OF_TEXT:
                raise ValueError(f"no use is known for the added token {token['content']!r}")
            end_of_text = token["id"]
        model = contents["model"]
        return cls.from_merges(model["vocab"], model["merges"], end_of_text)

    @classmethod
    def from_merges(cls, vocab: dict, merges: list, end_of_text: int | None) -> "BPETokenizer":
        """From GPT-2's own format: {'Ġthe': 262, ...}, ['Ġ t', 'Ġ a', ...] or pairs of texts."""
        ranks = {from_printable(t): i for t, i in vocab.items() if t != END_OF_TEXT}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        order = [ranks[from_printable(left + right)] for left, right in pairs]
        if order != sorted(order) or len(order) != len(ranks) - 256:
            raise ValueError("its ids are not in the order of its merges")
        return cls(ranks, end_of_text)


def split_by_earlier_merges(token: bytes, rank: int, ranks: dict[bytes, int]):
    """b'the', whose rank is 262, with b'th' at 258 -> (b'th', b'e')."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        earliest = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], rank))
        if ranks.get(pairs[earliest], rank) >= rank:
            raise ValueError(f"no merges lead to the token {token!r}")
        parts[earliest : earliest + 2] = [pairs[earliest]]
    return parts[0], parts[1]


def byte_alphabet() -> list[str]:
    """One printable character for each of the 256 bytes, as GPT-2's vocabulary file spells them.

    Bytes that print in Latin-1 stand for themselves; the others (space, control signs, ...) take
    the characters from U+0100 on, in order: a space becomes 'Ġ'. Source: OpenAI's encoder.py.
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


PRINTABLE = byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(PRINTABLE)}


def printable(token: bytes) -> str:
    """b' the' -> 'Ġthe'"""
    return "".join(PRINTABLE[byte] for byte in token)


def from_printable(token: str) -> bytes:
    """'Ġthe' -> b' the'"""
    return bytes(BYTE_OF[character] for character in token)


# --- On disk ---


def special_tokens(end_of_text: int | None) -> list[dict]:
    """What a tokenizer.json says of end-of-text, if there is such a token."""
    if end_of_text is None:
        return []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": end_of_text, "content": END_OF_TEXT, **flags, "special": True}]


def check_cut(contents: dict, wanted: str) -> None:
    """ValueError if a tokenizer.json changes or cuts its text in another way than ours do."""
    if contents.get("normalizer") or contents["pre_tokenizer"]["type"] != wanted:
        raise ValueError("it changes or cuts the text in a way of its own")


def tokenizer_text(tokenizer: Tokenizer) -> str:
    """The contents of a tokenizer.json, as text."""
    return json.dumps(tokenizer.as_json(), ensure_ascii=False, indent=1) + "\n"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a dataset, a run, or a folder of published weights.

    Reads tokenizer.json; where there is none, GPT-2's older pair of vocab.json and merges.txt.
    Raises FolioError if they are missing, damaged, or of a kind Folio does not have.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        if not path.exists() and (Path(folder) / "vocab.json").exists():
            return load_vocab_and_merges(Path(folder))
        contents = json.loads(path.read_text(encoding="utf-8"))
        model = contents["model"]
        kind = model.get("type") or ("BPE" if "merges" in model else None)  # older files lack it
        if kind == "WordLevel":
            return CharTokenizer.from_json(contents)
        if kind == "BPE":
            return BPETokenizer.from_json(contents)
        raise ValueError(f"a {kind!r} model is neither characters nor BPE")
    except FileNotFoundError as error:
        raise FolioError(f"{error.filename}: there is no tokenizer here") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FolioError(f"{path}: not a tokenizer Folio can read ({reason})") from None


def load_vocab_and_merges(folder: Path) -> BPETokenizer:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return BPETokenizer.from_merges(vocab, merges, vocab.get(END_OF_TEXT))
