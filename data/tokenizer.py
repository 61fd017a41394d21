"""Tokenizers: text to token ids and back, by character or by byte pair encoding (BPE).

    tokenizer = CharTokenizer.from_text("hello")    # vocabulary: e h l o
    tokenizer.encode("hole")                        # array([1, 3, 2, 0])
    tokenizer.decode([1, 3, 2, 0])                  # 'hole'

    tokenizer = BPETokenizer.gpt2()                 # vocabulary of 50,257 tokens
    tokenizer.encode("Hello world")                 # array([15496, 995])

    tokenizer = load_tokenizer("out/shakespeare_char")

encode() never makes special tokens: it encodes the characters "<|endoftext|>" in a text like any
other 13 characters. The preparation of a dataset puts end-of-text tokens between documents.
encode_prompt() turns "<|endoftext|>" in a prompt into the token. (With the tokenizer files of a
run, transformers does so in every text.) Models from elsewhere may have other tokenizers: see
data/hf_tokenizer.py.
"""

import contextlib
import json
import sys
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from configurator import FolioError, first_line
from data.files import explain_os_error, user_path, write_json, write_text
from data.hf_tokenizer import open_with_transformers, tokenizers_errors_as
from data.tokenizer_base import (
    BYTE_ENCODER, END_OF_TEXT, Tokenizer, decode_bytes, encode_bytes,
)  # fmt: skip

# --- One token per character ---


class CharTokenizer(Tokenizer):
    """One token per character: the id of a character is its index in the vocabulary.

    add_eos: add an end-of-text token, with the last id, to separate documents.
    Tokenizer in data/tokenizer_base.py says what each method is for.
    """

    def __init__(self, characters: str, add_eos: bool = False):
        if len(set(characters)) != len(characters):
            raise ValueError("the vocabulary contains a character twice")
        for character in characters:
            if "\ud800" <= character <= "\udfff":  # in UTF-16: half of a character
                raise FolioError(f"invalid character {character!r} in the vocabulary")
        self.characters = characters
        self.eos_token_id = len(characters) if add_eos else None
        self.vocab_size = len(characters) + int(add_eos)
        self._tokens = [*characters, END_OF_TEXT] if add_eos else list(characters)
        # Unicode number -> id; -1 for characters outside the vocabulary. This is an array and not a
        # dict because numpy looks up all characters of a text at once.
        self._id_of = np.full(sys.maxunicode + 1, -1, dtype=np.int64)
        self._id_of[code_points(characters)] = np.arange(len(characters))

    @classmethod
    def from_text(cls, text: Iterable[str], add_eos: bool = False) -> "CharTokenizer":
        """The different characters of a text (a str, or its characters one by one), sorted."""
        return cls("".join(sorted(set(text))), add_eos)

    def encode(self, text: str) -> np.ndarray:
        """'hole' -> array([1, 3, 2, 0]), int64.

        Raises FolioError if the text contains a character outside the vocabulary.
        """
        ids = self._id_of[code_points(text)]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())  # the first True
            raise FolioError(
                f"the character {text[position]!r} at position {position} is not in the "
                f"vocabulary of {len(self.characters)} characters"
            )
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        self.check_id(token_id)
        return self._tokens[token_id].encode()

    @property
    def _key(self) -> tuple[str, int | None]:  # compared by ==
        return self.characters, self.eos_token_id

    def to_dict(self) -> dict[str, Any]:
        """The contents of tokenizer.json, Hugging Face's format. (Skip it in a first reading.)"""
        vocab = {token: i for i, token in enumerate(self._tokens)}
        # The format needs the name of a token for unknown text. This one is not in the vocabulary.
        backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        if self.eos_token_id is not None:
            backend.add_special_tokens([END_OF_TEXT])
        return json.loads(backend.to_str())


def code_points(text: str) -> np.ndarray:
    """The Unicode number of each character: 'hé' -> array([104, 233]), uint32.

    UTF-32 writes each character as a number of 4 bytes: its Unicode number. surrogatepass: half of
    a character gets a number, too, so encode() can say that it is not in the vocabulary.
    """
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


# --- Byte pair encoding ---

# GPT-2 splits a text into words and then merges bytes within each word. A word consists of letters,
# of digits, of other signs, or of white space; or it is the end of a contraction, such as 's. The
# space before letters, digits or other signs belongs to their word:
#     "Hello, it's 42" -> ["Hello", ",", " it", "'s", " 42"]
# \p{L} is a letter of any language, \p{N} a digit or a number such as ½; ++ is + without
# backtracking, which is faster.
# Of several spaces, only the last one belongs to the next word: see lessons/bpe.py.
# Source: OpenAI's tiktoken (MIT), where this is pat_str of the encoding "gpt2".
GPT2_SPLIT_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)


class BPETokenizer(Tokenizer):
    """Byte-level BPE: a token is a sequence of bytes.

    Encoding starts with the bytes of a word. It merges the two adjacent tokens whose concatenation
    is the token with the lowest id, again and again, until no two adjacent tokens form a token
    (Sennrich et al. 2016). lessons/bpe.py has this loop in Python; here tiktoken runs it.

    mergeable_ranks: the id of each token except end-of-text; all 256 bytes must be tokens.
    """

    def __init__(self, mergeable_ranks: dict[bytes, int], eos_token_id: int | None):
        special_tokens = {} if eos_token_id is None else {END_OF_TEXT: eos_token_id}
        ids = sorted([*mergeable_ranks.values(), *special_tokens.values()])
        if ids != list(range(len(ids))):
            raise ValueError("the ids are not 0, 1, 2, ...")
        if not all(bytes([byte]) in mergeable_ranks for byte in range(256)):
            raise ValueError("the vocabulary does not contain all 256 bytes")
        self.mergeable_ranks = mergeable_ranks
        self.vocab_size = len(ids)
        self.eos_token_id = eos_token_id
        self._encoding = tiktoken.Encoding(
            "folio",
            pat_str=GPT2_SPLIT_PATTERN,
            mergeable_ranks=mergeable_ranks,
            special_tokens=special_tokens,
        )

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's vocabulary of 50,257 tokens, downloaded and cached by tiktoken.

        Raises FolioError if it is not cached and cannot be downloaded.
        """
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise FolioError(
                f"cannot download GPT-2's vocabulary ({type(error).__name__}); without a network, "
                "set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled on another machine"
            ) from None
        return cls(encoding._mergeable_ranks, encoding.eot_token)

    def encode(self, text: str) -> np.ndarray:
        """'Hello world' -> array([15496, 995]), int64.

        Raises FolioError if the text contains a surrogate (in UTF-16: half of a character).
        """
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())  # uint32
        except UnicodeEncodeError as error:
            character = text[error.start]
            raise FolioError(f"invalid character {character!r} at position {error.start}") from None
        return ids.astype(np.int64)

    def token_bytes(self, token_id: int) -> bytes:
        self.check_id(token_id)
        return self._encoding.decode_single_token_bytes(token_id)

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merged pairs in the order of training, recovered from the ids.

        tokenizer.json needs them; tiktoken knows the ids only.
        """
        by_id = sorted(self.mergeable_ranks.items(), key=lambda item: item[1])
        return [
            recover_merge(token, rank, self.mergeable_ranks)
            for token, rank in by_id
            if len(token) > 1
        ]

    def to_dict(self) -> dict[str, Any]:
        vocab = {encode_bytes(token): i for token, i in self.mergeable_ranks.items()}
        if self.eos_token_id is not None:
            vocab[END_OF_TEXT] = self.eos_token_id
        merges = [(encode_bytes(left), encode_bytes(right)) for left, right in self.merges]
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if self.eos_token_id is not None:
            backend.add_special_tokens([END_OF_TEXT])
        return json.loads(backend.to_str())

    def config_dict(self) -> dict[str, Any]:
        settings = super().config_dict()
        # As in GPT-2's own file. CTranslate2, another program that runs GPT-2, needs an unk_token.
        if self.eos_token_id is not None:
            settings["unk_token"] = settings["eos_token"]
        return settings

    @property
    def _key(self) -> tuple[dict[bytes, int], int | None]:
        return self.mergeable_ranks, self.eos_token_id


def recover_merge(
    token: bytes, rank: int, mergeable_ranks: dict[bytes, int]
) -> tuple[bytes, bytes]:
    """The two tokens that were merged into `token`: GPT-2's b'the' -> (b't', b'he').

    With the earlier merges alone, b'the' is encoded as b't', b'he'. So these two were merged last.
    Raises ValueError if the earlier merges leave more than two tokens.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in pairwise(parts)]
        # A pair that is no token gets `rank` itself: it is not an earlier merge.
        ranks = [mergeable_ranks.get(pair, rank) for pair in pairs]
        first = min(range(len(pairs)), key=ranks.__getitem__)
        if ranks[first] >= rank:
            raise ValueError(f"no merges lead to the token {token!r}")
        parts[first : first + 2] = [pairs[first]]
    return parts[0], parts[1]


# --- The file tokenizer.json ---
#
# From here on: the file format of Hugging Face's `tokenizers`, in which AutoTokenizer opens our
# tokenizers, and we open tokenizers of other programs. Nothing here is about language models.

# A folder with a tokenizer has one of these files. Only transformers reads the older formats: all
# files but tokenizer.json.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in the folder of a dataset, a run, or a published model.

    Characters and BPE of GPT-2's kind are read here; transformers opens all other tokenizers.
    Raises FolioError if the files are missing, unreadable or damaged, or if transformers is needed
    and is not installed.
    """
    folder = user_path(folder)
    path = folder / "tokenizer.json"
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise FolioError(missing_tokenizer(folder))
    try:
        config, tokenizer = read_tokenizer_config(folder), None
        if contents := read_json(path):
            tokenizer = char_from_dict(contents, config) or bpe_from_dict(contents, config)
        if tokenizer is None:
            opened = open_with_transformers(folder)
            # GPT-2's older files, and models with other classes, may have a BPE of GPT-2's kind.
            tokenizer = bpe_from_dict(opened.to_dict(), opened.config_dict()) or opened
        start = config.get("known_start_id")
        if type(start) is int and 0 <= start < tokenizer.vocab_size:
            tokenizer.known_start_id = start
        return tokenizer
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        if type(error) is not ValueError:
            reason = f"{type(error).__name__}: {reason}"
        raise FolioError(f"{path}: unsupported tokenizer ({reason})") from None


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, **settings: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json; settings: more entries for the latter."""
    folder = user_path(folder)
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    write_json(folder / "tokenizer_config.json", {**tokenizer.config_dict(), **settings})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if the file does not exist.

    Raises FolioError if it is unreadable or damaged.
    """
    try:
        with explain_os_error(path, "cannot be read"):
            contents = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise FolioError(f"{path}: damaged, not valid JSON ({error})") from None
    if not isinstance(contents, dict):
        raise FolioError(f"{path}: damaged, not a JSON object")
    return contents


def missing_tokenizer(folder: Path) -> str:
    """The message about a folder without tokenizer files."""
    if folder.is_dir():
        return f"{folder / 'tokenizer.json'}: tokenizer not found"
    return (
        f"{folder}: no such folder (for a model on the hub: resolve_model_dir(NAME) of "
        "engine/run_folder.py gives its folder)"
    )


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The contents of tokenizer_config.json, with the class that config.json implies."""
    config = read_json(folder / "special_tokens_map.json")  # written before 2023
    config |= read_json(folder / "tokenizer_config.json")
    model_config = read_json(folder / "config.json")
    implied = model_config.get("tokenizer_class") or model_config.get("model_type")
    config["tokenizer_class"] = config.get("tokenizer_class") or implied
    if (folder / "added_tokens.json").exists():  # also written before 2023
        config["added_tokens"] = list(read_json(folder / "added_tokens.json"))
    return config


def char_from_dict(contents: Any, config: dict[str, Any]) -> CharTokenizer | None:
    """The tokenizer if `contents` mean what CharTokenizer.to_dict() makes, else None."""
    model = contents["model"]
    if model.get("type") != "WordLevel":
        return None
    if config.get("tokenizer_class") == "gpt2":
        # tokenizer_config.json is missing, and "gpt2" is the model_type of config.json.
        # transformers would open GPT-2's class, which has an end-of-text token.
        config = {**config, "tokenizer_class": None}
    characters = sorted(model["vocab"], key=model["vocab"].get)
    add_eos = characters[-1:] == [END_OF_TEXT]
    characters = characters[: len(characters) - add_eos]
    if not characters or any(len(character) != 1 for character in characters):
        return None
    tokenizer = CharTokenizer("".join(characters), add_eos)
    with tokenizers_errors_as(ValueError):  # the form of this version of `tokenizers`
        contents = json.loads(tokenizers.Tokenizer.from_str(json.dumps(contents)).to_str())
    # transformers' save_pretrained() adds an empty post-processor, and the padding token, which may
    # be a character. Where special tokens are split, it is encoded like all other characters.
    if adds_nothing(contents["post_processor"]):
        contents["post_processor"] = None
    if config.get("split_special_tokens"):
        added = contents["added_tokens"]
        contents["added_tokens"] = [t for t in added if t["content"] not in tokenizer.characters]
    is_ours = tokenizer.to_dict() == contents and named_tokens(config) <= set(model["vocab"])
    return tokenizer if is_ours else None


BPE_OPTIONS = (  # GPT-2 uses none of them
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
    "byte_fallback", "ignore_merges",
)  # fmt: skip
# These classes of transformers, and a folder without a class, add nothing to tokenizer.json.
# GPT-2's class, which model_type gpt2 implies, adds only <|endoftext|>: named_tokens() knows it.
PLAIN_CLASSES = (None, "PreTrainedTokenizer", "TokenizersBackend", "GPT2Tokenizer", "gpt2")


def bpe_from_dict(contents: Any, config: dict[str, Any]) -> BPETokenizer | None:
    """The tokenizer if it is of GPT-2's kind, so that tiktoken gives the same ids, else None."""
    model, splitter = contents["model"], contents["pre_tokenizer"] or {}
    added = {token["content"]: token["id"] for token in contents.get("added_tokens") or []}
    if not (
        model.get("type", "BPE") == "BPE"  # older files lack the type
        and not any(model.get(option) for option in BPE_OPTIONS)
        and not contents.get("normalizer")
        and not contents.get("padding")
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not (splitter.get("add_prefix_space", True) or config.get("add_prefix_space"))
        and class_name(config) in PLAIN_CLASSES
        and adds_nothing(contents.get("post_processor"))
        and added.keys() <= {END_OF_TEXT}
        and named_tokens(config) <= added.keys()
        and all(character in model["vocab"] for character in BYTE_ENCODER)
    ):
        return None
    eos_token_id = added.get(END_OF_TEXT)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    # KeyError: a token is not made of bytes. ValueError: no merges lead to a token.
    with contextlib.suppress(KeyError, ValueError):
        ranks = {decode_bytes(t): i for t, i in model["vocab"].items() if i != eos_token_id}
        tokenizer = BPETokenizer(ranks, eos_token_id)
        # tiktoken merges by ids alone. That gives the same only if the merges follow from the ids.
        if tokenizer.merges == [(decode_bytes(left), decode_bytes(right)) for left, right in pairs]:
            return tokenizer
    return None


def class_name(config: dict[str, Any]) -> str | None:
    """The class of transformers that opens the tokenizer, without "Fast"; None if none is named."""
    name = config.get("tokenizer_class")
    return name.removesuffix("Fast") if name else None


def named_tokens(config: dict[str, Any]) -> set[str]:
    """All tokens that tokenizer_config.json names: strings, or dicts with their flags."""
    tokens = [token for name, token in config.items() if name.endswith("_token") and token]
    tokens += (config.get("added_tokens_decoder") or {}).values()
    for name in ("added_tokens", "extra_special_tokens", "additional_special_tokens"):
        extra = config.get(name) or []
        tokens += extra.values() if isinstance(extra, dict) else extra
    if class_name(config) in ("GPT2Tokenizer", "gpt2"):
        tokens.append(END_OF_TEXT)
    return {token["content"] if isinstance(token, dict) else token for token in tokens}


def adds_nothing(post_processor: dict[str, Any] | None) -> bool:
    """Whether a post-processor adds no tokens to a text."""
    if not post_processor or post_processor["type"] == "ByteLevel":
        return True
    return post_processor["type"] == "TemplateProcessing" and not post_processor["special_tokens"]
