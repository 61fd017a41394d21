"""Byte pair encoding (BPE): merge the most frequent pair of neighbors, again and again.

    python lessons/bpe.py                       # about ten seconds

A tokenizer by characters makes long sequences. BPE makes them shorter: frequent groups of letters
become one token. BPE starts with the 256 possible bytes as tokens 0 ... 255 (in GPT-2's order).
Each merge adds one token.
"""

import re
import sys
import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path

# The 256 bytes in GPT-2's order: first the bytes that can be printed (33 to 126, 161 to 172, 174 to
# 255). The id of a byte is its position in this order, not its value: "e" is byte 101 and token 68.
# Any order works.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = [bytes([b]) for b in [*VISIBLE, *(b for b in range(256) if b not in VISIBLE)]]

# GPT-2's pattern (for English) splits a text into words: 's, 't and so on, letters, digits, other
# signs, white space. A word includes the space before it: of several spaces, only the last belongs
# to the next word. \s+(?!\S) takes the spaces before this last one; the second \s+ takes, for
# example, one newline before a word. No merge crosses the border of a word.
#     "We'll go, 2 of us" -> "We", "'ll", " go", ",", " 2", " of", " us"
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")

Word = tuple[int, ...]  # token ids
Merges = dict[tuple[int, int], int]  # two neighbors and the id that replaces them, in order


def count_words(text: str) -> Counter[Word]:
    """How often each word occurs. It is enough to process each different word once."""
    counts = Counter(WORD.findall(text))
    return Counter({bytes_to_ids(word.encode()): n for word, n in counts.items()})


def bytes_to_ids(word: bytes) -> Word:
    return tuple(BYTES.index(bytes([byte])) for byte in word)


def merge(word: Word, pair: tuple[int, int], new_id: int) -> Word:
    """Replace the pair wherever it occurs: (7, 8, 9, 7, 8), (7, 8), 300 -> (300, 9, 300)."""
    merged, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def learn_merges(words: dict[Word, int], num_merges: int, num_shown: int = 0) -> Merges:
    """Learn num_merges merges, and print the first num_shown of them."""
    merges, tokens = {}, list(BYTES)
    for new_id in range(256, 256 + num_merges):
        counts = Counter()
        for word, n in words.items():
            for pair in pairwise(word):  # (5, 9, 2) has the pairs (5, 9) and (9, 2)
                counts[pair] += n
        best = max(sorted(counts), key=counts.get)  # sorted: of equal counts, the lowest ids
        words = {merge(word, best, new_id): n for word, n in words.items()}
        merges[best] = new_id

        left, right = best
        tokens.append(tokens[left] + tokens[right])
        if new_id < 256 + num_shown:
            parts = f"{show(tokens[left])} + {show(tokens[right])}"
            print(f"  {new_id}  {parts:16} -> {show(tokens[-1]):8} {counts[best]:7,} times")
    return merges


def encode(text: str, merges: Merges) -> list[int]:
    """Text -> token ids. In each word, apply the earliest merge, until no pair has a merge."""
    ids = []
    for word in WORD.findall(text):
        word = bytes_to_ids(word.encode())
        while pairs := [pair for pair in pairwise(word) if pair in merges]:
            earliest = min(pairs, key=merges.get)
            word = merge(word, earliest, merges[earliest])
        ids.extend(word)
    return ids


def decode(ids: list[int], merges: Merges) -> str:
    """Token ids -> text."""
    tokens = token_bytes(merges)
    return b"".join(tokens[i] for i in ids).decode()


def token_bytes(merges: Merges) -> list[bytes]:
    """The bytes of each token. A merged token has the bytes of its two parts."""
    tokens = list(BYTES)
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def read_text() -> str:
    """Shakespeare if prepare_shakespeare.py has downloaded it, else the replacement text."""
    data = Path(__file__).resolve().parent.parent / "data"
    shakespeare = data / "shakespeare" / "input.txt"
    path = shakespeare if shakespeare.exists() else data / "replacement.txt"
    return path.read_text(encoding="utf-8")


def show(token: bytes) -> str:
    return repr(token.decode(errors="replace"))


def equal_to_strong_form(text: str, words: dict[Word, int], merges: Merges) -> bool:
    """Whether data/bpe.py learns these merges, and data/tokenizer.py (tiktoken) gives these ids."""
    import data.bpe
    from data.tokenizer import BPETokenizer

    tokens = token_bytes(merges)
    strong_merges = data.bpe.learn_merges(data.bpe.count_words([text]), len(merges))
    tokenizer = BPETokenizer({token: i for i, token in enumerate(tokens)}, eos_token_id=None)
    part = text[:20_000]
    equal_merges = [(tokens[left], tokens[right]) for left, right in merges] == strong_merges
    equal_ids = encode(part, merges) == tokenizer.encode(part).tolist()
    return equal_merges and equal_ids


def main(num_merges: int = 100) -> None:
    text = read_text()
    words = count_words(text)
    print(f"{len(text):,} characters, {len(words):,} different words. A text is split like this:")
    example = "We'll go, 2 of us"
    print(f'   "{example}" ->', ", ".join(f'"{word}"' for word in WORD.findall(example)))
    print("\nThe most frequent pairs:")
    merges = learn_merges(words, num_merges, num_shown=20)
    print(f"... and so on, up to token {255 + num_merges}. The longest tokens:")
    tokens = token_bytes(merges)
    print("  ", ", ".join(show(token) for token in sorted(tokens, key=len, reverse=True)[:7]))

    sentence = "What light through yonder window?"
    ids = encode(sentence, merges)
    print(f"\n{len(sentence)} characters become {len(ids)} tokens:")
    print("  ", "|".join(tokens[i].decode() for i in ids))
    print(textwrap.fill(" ".join(map(str, ids)), 78, initial_indent="   ", subsequent_indent="   "))
    print("Decoded:", decode(ids, merges))

    print("\nA token is a group of bytes, so any text has ids. A rare letter has several:")
    names = {"e": "e", "\u00e9": "e with an accent", "\u732b": "Chinese for cat"}
    for letter, name in names.items():
        print(f"   {name:17} {letter.encode()!s:16} {encode(letter, merges)}")
    print("The ids of bytes are positions in GPT-2's order, not byte values: e is byte 101.")

    part = text[:20_000]
    ratio = len(part) / len(encode(part, merges))
    print(f"\nOn average, one token is {ratio:.2f} characters. A model that reads 64 tokens")
    print(f"now reads {64 * ratio:.0f} characters. The price: {len(tokens)} rows in its embedding.")

    print("\nThe strong forms: data/bpe.py learns; after a merge it counts only the words")
    print("that have changed. data/tokenizer.py encodes with tiktoken, OpenAI's library.")
    print("Comparing with the strong forms (loading torch takes some seconds) ...", flush=True)
    print("Equal merges and ids:", equal_to_strong_form(text, words, merges))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of data/
    main()
