"""What all tokenizers have in common. The tokenizers themselves are in data/tokenizer.py."""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from configurator import FolioError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Base class of the tokenizers.

    Two tokenizers are equal if they turn every text into the same ids.
    """

    vocab_size: int
    eos_token_id: int | None  # the end-of-text token, which separates documents
    eos_token = END_OF_TEXT  # its name
    # Whether a text that is cut before white space can be encoded piece by piece.
    can_encode_in_pieces = True
    # The token that begins a text without a prompt, in place of end-of-text. It is set if the model
    # does not know end-of-text: a BPE vocabulary has this token even if the training text is one
    # document, from which no model learns it. tokenizer_config.json keeps the value.
    known_start_id: int | None = None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The token ids of a text: 'hole' -> array([1, 3, 2, 0]), int64."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, which may be a part of a character: for decode(),
        decode_stream() and bits per byte.

        Raises ValueError if the id is out of range.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The contents of tokenizer.json."""

    @property
    @abstractmethod
    def _key(self) -> Any:
        """Two tokenizers are equal if their keys are equal: see __eq__()."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids: [1, 3, 2, 0] -> 'hole'. Invalid UTF-8 becomes U+FFFD (�).

        Raises ValueError if an id is out of range.
        """
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
        """Yield the text of each token as the token arrives.

        prompt: the tokens before. With some tokenizers of other models, they decide whether the
        first text begins with a space.
        A character may be spread over several tokens: until its last token arrives, yields ''. If
        the last character stays incomplete, yields U+FFFD (�) after the last token.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.token_bytes(int(i)))
        if incomplete := decoder.decode(b"", final=True):
            yield incomplete

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) number of UTF-8 bytes of each token, int64.

        0 for end-of-text and for the tokens that begin each document.
        """
        lengths = [len(self.token_bytes(i)) for i in range(self.vocab_size)]
        if self.eos_token_id is not None:
            lengths[self.eos_token_id] = 0
        for i in self.prefix_ids:
            lengths[i] = 0
        return np.array(lengths, dtype=np.int64)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Entries of tokenizer_config.json: what begins a text, ends it, and fills up a batch."""
        names = () if self.eos_token_id is None else ("bos_token", "eos_token", "pad_token")
        return dict.fromkeys(names, self.eos_token)

    @property
    def special_token_ids(self) -> dict[str, int | None]:
        """Entries of config.json: what begins a text, ends it, and fills up a batch."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = dict.fromkeys(names, self.eos_token_id)
        return ids if self.known_start_id is None else {**ids, "bos_token_id": self.known_start_id}

    @property
    def separator_ids(self) -> np.ndarray:
        """What separates documents: end-of-text; without such a token a newline; else nothing."""
        if self.eos_token_id is not None:
            return np.array([self.eos_token_id])
        return self.newline_ids

    @property
    def newline_ids(self) -> np.ndarray:
        """The newline; nothing if the vocabulary lacks it."""
        try:
            newline = self.encode("\n")  # BERT's tokenizer, for example, loses white space
            return newline if self.decode(newline) == "\n" else newline[:0]
        except FolioError:  # a character vocabulary without the newline
            return np.array([], dtype=np.int64)

    @property
    def prefix_ids(self) -> np.ndarray:
        """What begins each document and each prompt, such as [CLS]; nothing in most tokenizers."""
        return np.array([], dtype=np.int64)

    @property
    def start_token_id(self) -> int:
        """The token to start a text without a prompt: end-of-text, else a newline, else token 0.

        known_start_id comes first.
        """
        if self.known_start_id is not None:
            return self.known_start_id
        separator = self.separator_ids
        return int(separator[0]) if len(separator) else 0

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids from which to generate a continuation, int64: at least one.

        "<|endoftext|>" in the text becomes the end-of-text token, if the vocabulary has this token.
        (With the tokenizer of another model, which cannot encode in pieces, encode() decides what
        special tokens in a text become.)
        """
        has_end_of_text = self.eos_token_id is not None and self.can_encode_in_pieces
        parts = text.split(self.eos_token) if has_end_of_text else [text]
        ids = self.encode(parts[0])
        for part in parts[1:]:
            ids = np.concatenate((ids, [self.eos_token_id], self.encode(part)))
        if not len(ids) and not len(self.prefix_ids):
            return np.array([self.start_token_id])
        return np.concatenate((self.prefix_ids, ids))

    def config_dict(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json, for transformers."""
        settings = {
            # Without the class, AutoTokenizer builds GPT-2's tokenizer, even for characters.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # True: special tokens in a text are encoded like other text. Without end-of-text, the
            # padding token of a run is a character (see save_run_tokenizer()), and has to stay one.
            # With end-of-text, True would be a surprise: programs for finetuning append
            # "<|endoftext|>" to a text.
            "split_special_tokens": self.eos_token_id is None,
            **self.special_tokens,
        }
        if self.known_start_id is not None:
            # A key of Folio's own. No bos_token: the model does not know end-of-text, and
            # transformers would add a new token for a newline.
            settings |= {"known_start_id": self.known_start_id, "bos_token": None}
        return settings

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"

    def check_id(self, token_id: int) -> None:
        """Raise ValueError if the vocabulary has no such id."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is out of range (vocabulary size {self.vocab_size:,})"
            )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._key == other._key


# --- How GPT-2's vocabulary file spells bytes ---


def bytes_to_unicode() -> list[str]:
    """One printable character for each of the 256 bytes.

    JSON cannot store arbitrary bytes. So GPT-2's vocabulary file spells each byte as a character:
    printable Latin-1 bytes as themselves; all other bytes (space, control characters, ...) as
    the characters from U+0100 on, in order. A space becomes 'Ġ'. Source: OpenAI's encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_ENCODER = bytes_to_unicode()
BYTE_DECODER = {character: byte for byte, character in enumerate(BYTE_ENCODER)}


def encode_bytes(token: bytes) -> str:
    """b' the' -> 'Ġthe'"""
    return "".join(BYTE_ENCODER[byte] for byte in token)


def decode_bytes(token: str) -> bytes:
    """'Ġthe' -> b' the'"""
    return bytes(BYTE_DECODER[character] for character in token)
