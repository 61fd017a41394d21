"""Train a byte pair encoding (BPE): merge the most frequent pair of adjacent tokens, repeatedly.

    words = count_words(["low low low lower lower newest"])
    learn_merges(words, 2)      # [(b'l', b'o'), (b'lo', b'w')]
    train_bpe(texts, 1024)      # a BPETokenizer: 256 bytes, 767 merges, end-of-text

Read lessons/bpe.py first: it has the training loop in 8 lines, and prints each merge. This module
is faster, and learns the same merges from English text. (The lesson splits a text into words with a
simpler pattern, in which only A to Z and a to z are letters.)

Training (Gage 1994; Sennrich et al. 2016) starts with the 256 bytes as tokens. The pair of adjacent
tokens that occurs most often becomes a new token, and so on until the vocabulary is full. The text
is first split into words with GPT-2's pattern, and no merge crosses the border of a word. So it is
enough to process each different word once, together with its number of occurrences.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

import regex
from tqdm import tqdm

from configurator import FolioError
from data.tokenizer import BYTE_ENCODER, GPT2_SPLIT_PATTERN, BPETokenizer

SPLIT_RE = regex.compile(GPT2_SPLIT_PATTERN)
MAX_WORD_BYTES = 1000  # longer "words" are not language (base64, for example) and are skipped
MAX_WORDS = 2**18  # different words; the rarer ones hardly change the merges
# The ids of the 256 bytes: any order would do. GPT-2 and lessons/bpe.py have this one: printable
# bytes first. BYTE_ENCODER has the character that stands for each byte in GPT-2's files.
BASE_TOKENS = [bytes([byte]) for byte in sorted(range(256), key=lambda byte: BYTE_ENCODER[byte])]


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a BPE tokenizer of vocab_size tokens on texts; the last token is end-of-text.

    Raises FolioError if vocab_size is below 257, or if the texts are too small for so many merges.
    """
    num_merges = vocab_size - len(BASE_TOKENS) - 1
    if num_merges < 0:
        raise FolioError(
            f"--vocab_size={vocab_size}: 256 bytes and end-of-text need at least "
            f"--vocab_size={len(BASE_TOKENS) + 1}"
        )
    merges = learn_merges(count_words(texts), num_merges)
    if len(merges) < num_merges:
        raise FolioError(
            f"--vocab_size={vocab_size}: the text has only {len(merges):,} merges; use "
            f"--vocab_size={len(BASE_TOKENS) + 1 + len(merges)} or less"
        )
    tokens = [*BASE_TOKENS, *(left + right for left, right in merges)]
    return BPETokenizer({token: i for i, token in enumerate(tokens)}, eos_token_id=len(tokens))


def count_words(texts: Iterable[str]) -> Counter[bytes]:
    """How often each word occurs: 'low low lower' -> {b'low': 1, b' low': 1, b' lower': 1}.

    The space before a word is part of the word. Only the MAX_WORDS most frequent words count.
    """
    words = Counter()
    for text in texts:
        words.update(SPLIT_RE.findall(text))
    # A text may contain a surrogate (in UTF-16: half of a character): the tokenizer refuses it.
    encoded = (
        (word.encode(errors="surrogatepass"), count) for word, count in words.most_common(MAX_WORDS)
    )
    return Counter({word: count for word, count in encoded if len(word) <= MAX_WORD_BYTES})


def learn_merges(word_counts: Mapping[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """The first num_merges merges, in order; fewer if no adjacent tokens are left.

    Of pairs with equal counts, the pair with the lower ids comes first, as in Hugging Face's
    trainer. A heap keeps the pairs sorted by count; after a merge, only the words that contain the
    merged pair are counted again.
    """
    tokens = list(BASE_TOKENS)
    id_of = {token[0]: i for i, token in enumerate(tokens)}
    words = [[id_of[byte] for byte in word] for word in word_counts]  # each word as token ids
    counts = list(word_counts.values())
    pair_counts = Counter()  # pair of ids -> number of occurrences
    words_with_pair = defaultdict(set)  # pair of ids -> indices of the words that contain it
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            words_with_pair[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # heapq pops the smallest
    heapq.heapify(heap)

    bar = tqdm(total=num_merges, desc="merges", delay=1, disable=None, leave=False)
    merges = []
    while len(merges) < num_merges and heap:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        # Each pair has one entry. A merge of another pair can only lower the count of this pair. So
        # an entry may be too large: then put it back with the right count.
        if count != -negative_count:
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        bar.update()
        new_id = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        new_pairs = set()
        for i in words_with_pair.pop(pair):  # a word that has lost the pair does not change
            for old_pair in pairwise(words[i]):
                pair_counts[old_pair] -= counts[i]
            words[i] = merge(words[i], pair, new_id)
            for new_pair in pairwise(words[i]):
                pair_counts[new_pair] += counts[i]
                if new_id in new_pair:
                    new_pairs.add(new_pair)
                    words_with_pair[new_pair].add(i)
        for new_pair in new_pairs:
            heapq.heappush(heap, (-pair_counts[new_pair], new_pair))
    bar.close()
    return merges


def merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace each pair by new_id, from left to right.

    merge([7, 8, 9, 7, 8], (7, 8), 300) -> [300, 9, 300];  merge([7, 7, 7], (7, 7), 300) -> [300, 7]
    """
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged
