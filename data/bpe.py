"""Learn a vocabulary of byte pairs from a text: count the pairs, merge the commonest, again.

    words = count_words(["low low low lower lower newest"])
    learn_merges(words, 2)      # [(b'l', b'o'), (b'lo', b'w')]
    train_bpe(texts, 1024)      # a BPETokenizer: 256 bytes, 767 merges, end-of-text

Byte pair encoding (Gage 1994; Sennrich et al. 2016) begins with the 256 bytes as tokens. The pair
of neighbours that stands in the text most often becomes a token of its own, and so on until the
vocabulary is full. Words are cut as GPT-2 cuts them and no merge crosses from word to word, so that
it is enough to look at each different word once, and to remember how often it comes.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

import regex

from configurator import FolioError
from data.tokenizer import GPT2_WORDS, PRINTABLE, BPETokenizer

WORD = regex.compile(GPT2_WORDS)
LONGEST = 1000  # bytes; what is longer is no word of a language, and has nothing to teach
# The bytes' ids, in the order of GPT-2's vocabulary: first those that print, from "!" on.
BYTES = [bytes([byte]) for byte in sorted(range(256), key=lambda byte: PRINTABLE[byte])]


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """The byte pair encoding of vocab_size tokens, the last being end-of-text, learned from texts.

    Raises FolioError if vocab_size has no room for the bytes, or the texts give too few merges.
    """
    wanted = vocab_size - len(BYTES) - 1
    if wanted < 0:
        raise FolioError(
            f"--vocab_size={vocab_size}: 256 bytes and end-of-text need at least {len(BYTES) + 1}"
        )
    merges = learn_merges(count_words(texts), wanted)
    if len(merges) < wanted:
        raise FolioError(
            f"--vocab_size={vocab_size}: the text gives only {len(merges):,} merges; "
            f"at most --vocab_size={len(BYTES) + 1 + len(merges)}"
        )
    tokens = [*BYTES, *(left + right for left, right in merges)]
    return BPETokenizer({token: i for i, token in enumerate(tokens)}, end_of_text=len(tokens))


def count_words(texts: Iterable[str]) -> Counter[bytes]:
    """'low low lower' -> {b' low': 1, b'low': 1, b' lower': 1}: a space belongs to what follows."""
    words = Counter()
    for text in texts:
        words.update(WORD.findall(text))
    encoded = {word.encode(): count for word, count in words.items()}
    return Counter({word: count for word, count in encoded.items() if len(word) <= LONGEST})


def learn_merges(words: Mapping[bytes, int], count: int) -> list[tuple[bytes, bytes]]:
    """The `count` merges, in order; fewer where no two neighbours are left.

    Between pairs that are equally common, the one of earlier tokens comes first, as in Hugging
    Face's trainer. Only the words that hold the merged pair are looked at again.
    """
    tokens = list(BYTES)
    id_of = {token[0]: i for i, token in enumerate(tokens)}
    spelled = [[id_of[byte] for byte in word] for word in words]  # each word as ids of tokens
    times = list(words.values())
    pairs, places = Counter(), defaultdict(set)  # how often a pair comes; in which words
    for i, word in enumerate(spelled):
        for pair in pairwise(word):
            pairs[pair] += times[i]
            places[pair].add(i)
    commonest = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(commonest)

    merges = []
    while len(merges) < count and commonest:
        n, pair = heapq.heappop(commonest)
        if pairs[pair] != -n:  # this count is out of date; there is a newer entry if any are left
            continue
        if n == 0:
            break
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in places.pop(pair):
            for old in pairwise(spelled[i]):
                pairs[old] -= times[i]
                changed.add(old)
            spelled[i] = merge(spelled[i], pair, len(tokens) - 1)
            for new in pairwise(spelled[i]):
                pairs[new] += times[i]
                places[new].add(i)
                changed.add(new)
        for other in changed:
            if pairs[other] > 0:
                heapq.heappush(commonest, (-pairs[other], other))
    return merges


def merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """[7, 8, 9, 7, 8] with (7, 8) -> 300: [300, 9, 300]. From left to right, as 7 7 7 -> 300 7."""
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged
