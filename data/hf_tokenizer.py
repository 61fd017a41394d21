"""Tokenizers of models from elsewhere, run by Hugging Face's `tokenizers`: WordPiece, Unigram, ...

load_tokenizer() in data/tokenizer.py uses this class for every folder whose tokenizer is neither
our characters nor GPT-2's kind of BPE. The ids equal transformers' ids:

    AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]

So, unlike in our own tokenizers, an added token such as <|user|> is recognized in a text. Some
tokenizers put tokens around each text, for example [CLS] text [SEP]. encode() leaves them out. In a
dataset, [CLS] begins each document, and end-of-text ends it, if the tokenizer has one (BERT has
none). encode_prompt() puts [CLS] before the text.

The ids depend on two files, tokenizer.json and tokenizer_config.json. If they contradict each
other, the versions of transformers do not agree on the ids, and the folder is refused.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from configurator import FolioError
from data.tokenizer_base import BYTE_DECODER, END_OF_TEXT, Tokenizer, decode_bytes

NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# These classes of transformers take the tokenizer from tokenizer.json.
GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
# These classes take only the vocabulary from there, and everything else from their own settings.
# These are the defaults.
CLASS_DEFAULTS = {
    "GPT2Tokenizer": {
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
    },
    "BertTokenizer": {
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
        "mask_token": "[MASK]", "do_lower_case": True, "tokenize_chinese_chars": True,
        "strip_accents": None,
    },
}  # fmt: skip
# config.json's model_type implies the class if tokenizer_config.json states none.
CLASS_OF_MODEL_TYPE = {  # None: a generic class
    None: None, "llama": None, "gpt2": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer",
    "bert": "BertTokenizer", "distilbert": "BertTokenizer",
}  # fmt: skip
ADVICE = (
    "if tokenizer.json is right, set tokenizer_class to PreTrainedTokenizerFast in "
    "tokenizer_config.json"
)


class HFTokenizer(Tokenizer):
    """A tokenizer that `tokenizers` runs.

    contents: of tokenizer.json. config: of tokenizer_config.json.
    Raises ValueError (or KeyError, TypeError, ...) if they are damaged or contradict each other.
    """

    can_encode_in_pieces = False

    def __init__(self, contents: dict[str, Any], config: dict[str, Any]):
        config = with_class_defaults(config)
        with tokenizers_errors_as(ValueError):
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(contents))
        vocab = self._backend.get_vocab()
        padding = self._backend.padding
        if padding and padding["pad_token"] not in vocab:
            raise ValueError(
                f"its padding token {padding['pad_token']!r} is not in the vocabulary; set padding "
                "to null in tokenizer.json"
            )
        self._backend.no_truncation()
        self._backend.no_padding()
        if not 0 <= max(vocab.values(), default=-1) < 2 * len(vocab):
            raise ValueError(f"{len(vocab):,} tokens with ids up to {max(vocab.values()):,}")
        check_consistency(self.to_dict(), config)
        add_missing_tokens(self._backend, config)
        self._backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        self.vocab_size = max(self._backend.get_vocab().values()) + 1
        self.special_tokens = named_tokens(config)
        added_tokens = self._backend.get_added_tokens_decoder()  # id -> AddedToken
        self._added = {token.content: i for i, token in added_tokens.items()}
        with tokenizers_errors_as(ValueError):
            self._prefix_ids = find_prefix(self._backend)
        self.eos_token = self.special_tokens.get("eos_token", END_OF_TEXT)
        eos = added_tokens.get(self._added.get(self.eos_token))
        is_eos = eos is not None and (eos.special or "eos_token" in self.special_tokens)
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
    def special_token_ids(self) -> dict[str, int | None]:
        own = {
            f"{name}_id": self._backend.token_to_id(self.special_tokens[name])
            for name in ("bos_token", "eos_token", "pad_token")
            if name in self.special_tokens
        }
        return super().special_token_ids | own

    @property
    def start_token_id(self) -> int:
        if len(self.prefix_ids):
            return int(self.prefix_ids[0])
        if "bos_token" in self.special_tokens:
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
        # As in the middle of a text, between two words: with the space before or after a word.
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
        return {**settings, **self.special_tokens}

    @property
    def _key(self) -> tuple[str, int | None, bool]:
        return self._backend.to_str(), self.eos_token_id, self._backend.encode_special_tokens


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


# --- tokenizer_config.json ---


def class_name(config: dict[str, Any]) -> str:
    """The class of transformers that opens the tokenizer, without "Fast"."""
    return (config.get("tokenizer_class") or "TokenizersBackend").removesuffix("Fast")


def with_class_defaults(config: dict[str, Any]) -> dict[str, Any]:
    return {**CLASS_DEFAULTS.get(class_name(config), {}), **config}


def named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """{"eos_token": "</s>", ...}; in the file, a token is a string or a dict with its flags."""
    names = [*NAMED_TOKENS, *(key for key in config if key.endswith("_token"))]
    tokens = {name: config[name] for name in names if isinstance(config.get(name), str | dict)}
    return {name: as_dict(token)["content"] for name, token in tokens.items()}


def listed_tokens(config: dict[str, Any]) -> list[dict[str, Any]]:
    """All tokens that tokenizer_config.json names, with their flags, in transformers' order."""
    decoder = config.get("added_tokens_decoder") or {}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if config.get("extra_special_tokens") and config.get("additional_special_tokens"):
        raise ValueError(
            "tokenizer_config.json has both extra_special_tokens and additional_special_tokens; "
            "if tokenizer.json has all of these tokens, delete both"
        )
    extra = extra.values() if isinstance(extra, dict) else extra
    return [
        *(decoder[i] for i in sorted(decoder, key=int)),
        *({"content": token} for token in config.get("added_tokens") or []),
        *({"content": token, "special": True} for token in named_tokens(config).values()),
        *({"special": True, **as_dict(token)} for token in extra),
    ]


def as_dict(token: str | dict[str, Any]) -> dict[str, Any]:
    """A token with its flags; a string has none."""
    if isinstance(token, str):
        return {"content": token}
    return {key: value for key, value in token.items() if key != "__type"}


def add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json names and tokenizer.json does not have."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in listed_tokens(config):
        if token["content"] not in known:
            backend.add_tokens([tokenizers.AddedToken(**token)])
            known.add(token["content"])


def check_consistency(contents: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise ValueError if transformers does not take the tokenizer from `contents` as it is.

    contents: of tokenizer.json, in full form. config: with the defaults of the class.
    """
    name, model = class_name(config), contents["model"]
    if name not in (*GENERIC_CLASSES, *CLASS_DEFAULTS):
        raise ValueError(f"Folio does not know tokenizer_class {name}; {ADVICE}")
    if model.get("dropout"):
        raise ValueError("with BPE dropout, the ids of a text are random")
    added = {token["content"]: token for token in contents["added_tokens"]}
    decoder = {t["content"]: t for t in (config.get("added_tokens_decoder") or {}).values()}
    for token in decoder.keys() & added.keys():
        if not decoder[token].items() <= added[token].items():
            raise ValueError(f"tokenizer_config.json has other flags for the token {token!r}")
    for token in {t["content"] for t in listed_tokens(config) if t.get("special")} & added.keys():
        if config.get("split_special_tokens") and not added[token]["special"]:
            raise ValueError(f"only tokenizer_config.json calls the token {token!r} special")
    found = parts_without_vocabulary(contents)
    prefix_space = found["pre_tokenizer"].get("add_prefix_space", False)
    if config.get("add_prefix_space", prefix_space) != prefix_space:
        raise ValueError("tokenizer.json and tokenizer_config.json differ in add_prefix_space")
    expected = found
    if name == "GPT2Tokenizer":
        expected = parts_without_vocabulary(byte_level_bpe_json({}, [], prefix_space))
    elif name == "BertTokenizer":
        expected = parts_without_vocabulary(bert_json(None, config))
    wrong = [key for key, value in expected.items() if (found.get(key) or None) != (value or None)]
    if decoder and name in CLASS_DEFAULTS:
        wrong += added.keys() - decoder.keys()
    if wrong:
        raise ValueError(
            f"transformers opens this folder with {name}, which ignores {', '.join(wrong)} in "
            f"tokenizer.json; {ADVICE}"
        )


def parts_without_vocabulary(contents: dict[str, Any]) -> dict[str, Any]:
    """The parts of tokenizer.json that decide about the ids, except for the vocabulary."""
    model = contents["model"]
    splitter = {**(contents["pre_tokenizer"] or {}), "trim_offsets": None}  # not about the ids
    return {
        "normalizer": contents["normalizer"],
        "pre_tokenizer": splitter,
        "model": model["type"],
        **{key: value for key, value in model.items() if key not in ("type", "vocab", "merges")},
    }


# --- tokenizer.json as classes of transformers build it ---


def byte_level_bpe_json(
    vocab: dict[str, int], merges: list[tuple[str, ...]], add_prefix_space: bool = False
) -> dict[str, Any]:
    """The contents of tokenizer.json for a BPE of GPT-2's kind."""
    with tokenizers_errors_as(ValueError):
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        backend.add_special_tokens([END_OF_TEXT])
    return json.loads(backend.to_str())


def bert_json(vocab: dict[str, int] | None, config: dict[str, Any]) -> dict[str, Any]:
    """The contents of tokenizer.json for BertTokenizer. config: of tokenizer_config.json."""
    config = with_class_defaults(config)
    names = named_tokens(config)
    special = ("unk_token", "sep_token", "cls_token", "pad_token", "mask_token")
    with tokenizers_errors_as(ValueError):
        tokenizer = tokenizers.BertWordPieceTokenizer(
            vocab,
            **{name: names[name] for name in special},
            lowercase=config["do_lower_case"],
            strip_accents=config["strip_accents"],
            handle_chinese_chars=config["tokenize_chinese_chars"],
        )
    return json.loads(tokenizer.to_str())
