"""Tokenizers of models from elsewhere: WordPiece, Unigram, BPE with added tokens, ...

load_tokenizer() in data/tokenizer.py uses this class for every folder whose tokenizer is neither
our characters nor GPT-2's kind of BPE. transformers opens the folder (`pip install transformers`),
because each family of models has a class there, with settings of its own. The ids equal
transformers' ids:

    AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]

So, unlike in our own tokenizers, an added token such as <|user|> is recognized in a text. Some
tokenizers put tokens around each text, for example [CLS] text [SEP]. encode() leaves them out. In a
dataset, [CLS] begins each document, and end-of-text ends it, if the tokenizer has one (BERT has
none). encode_prompt() puts [CLS] before the text.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from configurator import FolioError
from data.tokenizer_base import BYTE_DECODER, END_OF_TEXT, Tokenizer, decode_bytes


class HFTokenizer(Tokenizer):
    """A tokenizer that transformers has opened, run by `tokenizers`, the library below it.

    backend: the tokenizer of the library `tokenizers`. special_tokens: {"eos_token": "</s>", ...}.
    split_special_tokens: encode special tokens in a text like other text.
    Raises ValueError if the ids are random, or much larger than the number of tokens.
    """

    can_encode_in_pieces = False

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        split_special_tokens: bool = False,
    ):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        self._backend, self._special_tokens = backend, special_tokens
        vocab = backend.get_vocab()
        if not 0 <= max(vocab.values(), default=-1) < 2 * len(vocab):
            raise ValueError(f"{len(vocab):,} tokens with ids up to {max(vocab.values()):,}")
        if self.to_dict()["model"].get("dropout"):
            raise ValueError("with BPE dropout, the ids of a text are random")
        self.vocab_size = max(vocab.values()) + 1
        added_tokens = backend.get_added_tokens_decoder()  # id -> AddedToken
        self._added = {token.content: i for i, token in added_tokens.items()}
        with tokenizers_errors_as(ValueError):
            self._prefix_ids = find_prefix(backend)
        self.eos_token = special_tokens.get("eos_token", END_OF_TEXT)
        eos = added_tokens.get(self._added.get(self.eos_token))
        is_eos = eos is not None and (eos.special or "eos_token" in special_tokens)
        self.eos_token_id = self._added[self.eos_token] if is_eos else None

    def encode(self, text: str) -> np.ndarray:
        """The ids of the text alone, int64. Raises FolioError if the text cannot be encoded."""
        with tokenizers_errors_as(FolioError, "the text cannot be encoded: "):
            # Tokenizer.encode() would also find the position of each token: more time and memory.
            ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.array(ids, dtype=np.int64)

    @property
    def prefix_ids(self) -> np.ndarray:
        return self._prefix_ids

    @property
    def special_tokens(self) -> dict[str, str]:
        return self._special_tokens

    @property
    def special_token_ids(self) -> dict[str, int | None]:
        own = {
            f"{name}_id": self._backend.token_to_id(self.special_tokens[name])
            for name in ("bos_token", "eos_token", "pad_token")
            if name in self.special_tokens
        }
        if self.known_start_id is not None:
            own["bos_token_id"] = self.known_start_id
        return super().special_token_ids | own

    @property
    def start_token_id(self) -> int:
        if len(self.prefix_ids):
            return int(self.prefix_ids[0])
        if "bos_token" in self.special_tokens and self.known_start_id is None:
            return self._backend.token_to_id(self.special_tokens["bos_token"])
        return super().start_token_id

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        for i in ids:
            self.check_id(i)
        with tokenizers_errors_as(FolioError, "tokenizer.json has a damaged decoder: "):
            return self._backend.decode(ids, skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
        # The text of a token depends on its neighbors: "##ing" follows without a space. So the
        # last tokens are decoded together, and what is new is yielded.
        window = list(prompt[-20:])
        shown = self.decode(window)
        for i in ids:
            window.append(i)
            text = self.decode(window)
            if text.endswith("\ufffd"):  # probably an incomplete character
                yield ""
                continue
            yield text[len(shown) :] if text.startswith(shown) else self.decode([i])
            shown = text
            if len(window) > 100 and text.endswith(recent := self.decode(window[-20:])):
                window, shown = window[-20:], recent
        if window and (incomplete := self.decode(window)[len(shown) :]):
            yield incomplete

    def token_bytes(self, token_id: int) -> bytes:
        self.check_id(token_id)
        token = self._backend.id_to_token(token_id)
        if token is None:  # no token has this id
            return b""
        if token in self._added:
            return token.encode()
        if "ByteLevel" in self._decoder_types and set(token) <= BYTE_DECODER.keys():
            return decode_bytes(token)
        if "ByteFallback" in self._decoder_types and (byte := re.fullmatch("<0x(..)>", token)):
            return bytes.fromhex(byte[1])
        # Decode the token between two words, with the space before or after it, and cut off the
        # words. (Decoded alone, a token may lose its space.)
        a = self._anchor
        start, rest = len(self.decode([a])), len(self.decode([a, a])) - len(self.decode([a]))
        between = self.decode([a, token_id, a])[start:]
        return between[: max(len(between) - rest, 0)].encode()

    @cached_property
    def _anchor(self) -> int:
        """A token that is a word."""
        ids = range(self.vocab_size)
        return next((i for i in ids if self.decode([i]).strip().isalnum()), 0)

    @cached_property
    def _decoder_types(self) -> set[str]:
        return set(re.findall(r'"type": "(\w+)"', json.dumps(self.to_dict()["decoder"])))

    def to_dict(self) -> dict[str, Any]:
        return json.loads(self._backend.to_str())

    def config_dict(self) -> dict[str, Any]:
        settings = super().config_dict()
        settings["split_special_tokens"] = self._backend.encode_special_tokens
        if (self.to_dict()["pre_tokenizer"] or {}).get("add_prefix_space"):
            settings["add_prefix_space"] = True
        return settings

    @property
    def _key(self) -> tuple[str, int | None, bool]:
        return self._backend.to_str(), self.eos_token_id, self._backend.encode_special_tokens


def open_with_transformers(folder: Path) -> HFTokenizer:
    """Open the tokenizer files of a folder. Nothing in them is executed.

    Raises FolioError if transformers is not installed, ValueError if it cannot open the files.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise FolioError(
            f"{folder}: this tokenizer is opened by transformers, which is not installed; "
            "pip install transformers"
        ) from None
    with tokenizers_errors_as(ValueError):
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not fast.is_fast:  # transformers calls a tokenizer fast if `tokenizers` runs it
        raise ValueError(f"{type(fast).__name__} cannot be run by `tokenizers`")
    names = fast.special_tokens_map.items()
    special_tokens = {name: token for name, token in names if isinstance(token, str)}
    return HFTokenizer(fast.backend_tokenizer, special_tokens, fast.split_special_tokens)


def find_prefix(backend: tokenizers.Tokenizer) -> np.ndarray:
    """The tokens that tokenizer.json puts before each text, such as [CLS]."""
    for text in ("a", *backend.get_vocab()):
        with contextlib.suppress(Exception):  # not every text can be encoded
            encoding = backend.encode(text)
            # 1: a token around the text; 0: a token of the text.
            first_of_text = encoding.special_tokens_mask.index(0)
            return np.array(encoding.ids[:first_of_text], np.int64)
    return np.array([], np.int64)


@contextlib.contextmanager
def tokenizers_errors_as(error_class: type[Exception], message: str = "") -> Iterator[None]:
    """Turn each error of `tokenizers` in the block into an error_class.

    They are plain Exceptions, or BaseExceptions if its Rust code panics.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise error_class(f"{message}{error}") from None
