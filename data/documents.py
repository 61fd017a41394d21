"""Read documents from text files, folders and .jsonl files.

    for document in read_documents(find_files(["novels/", "chat.jsonl"])):
        for piece in document:             # strings of about a megabyte
            ...

A text file is one document, or several with a separator between them. Each line of a .jsonl file is
a JSON object that holds one document. Files are read in pieces, however large they are.
"""

import codecs
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from configurator import FolioError
from data.files import explain_os_error, join_names, shell_command, user_path

PIECE_BYTES = 2**20  # read at a time
# What to do with files of other formats.
READ_BY_PANDAS = {
    ".json": "read_json({}, dtype=False)", ".parquet": "read_parquet({})",
    # Without these options, "007" would become the number 7, and "None" would be no text.
    ".csv": "read_csv({}, dtype=str, keep_default_na=False)",
    ".tsv": "read_table({}, dtype=str, keep_default_na=False)",
}  # fmt: skip
UNPACK = {
    ".gz": "gunzip --keep", ".bz2": "bunzip2 --keep", ".xz": "unxz --keep",
    ".zip": "python -m zipfile -e", ".tar": "python -m tarfile -e", ".tgz": "python -m tarfile -e",
}  # fmt: skip
FORMATTED = (".rtf", ".html", ".htm")  # text with formatting codes


# --- Which files ---


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The text files among the inputs and inside their folders, each content once.

    Hidden files in folders and empty files are ignored. Copies of a file, binary files and other
    formats are skipped and named.
    Raises FolioError if an input does not exist, cannot be read, or is not a text file.
    """
    files: list[Path] = []
    for path in map(user_path, inputs):
        with explain_os_error(path, "cannot read"):
            files += files_of_input(path)
    if not files:
        raise FolioError(f"{', '.join(map(str, inputs))}: no text files found")
    groups = group_by_content(files)
    if copies := [f"{copy} = {file}" for file, *others in groups for copy in others]:
        print(f"skipped {len(copies):,} (each text is read once): {join_names(copies)}")
    return [group[0] for group in groups]


def files_of_input(path: Path) -> list[Path]:
    if path.is_dir():
        return text_files_in(path)
    if not path.exists():
        raise FolioError(f"{path}: no such file or folder")
    if advice := format_advice(path):
        raise FolioError(f"{path}: not a text file; {advice}")
    if not path.is_file():
        raise FolioError(f"{path}: a pipe can be read only once; save its text in a file first")
    return [path]


def text_files_in(folder: Path) -> list[Path]:
    """The text files in a folder and its subfolders, sorted. Prints the names of skipped files."""
    paths: list[Path] = []
    for parent, subfolders, names in os.walk(folder, onerror=raise_error):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        # os.walk does not enter links to folders, so these links are among the skipped files.
        links = [name for name in subfolders if Path(parent, name).is_symlink()]
        paths += [Path(parent, name) for name in (*names, *links) if not name.startswith(".")]
    texts = [path for path in sorted(paths) if is_text(path)]
    if skipped := sorted({*paths} - {*texts}):
        names = [str(path.relative_to(folder)) for path in skipped]
        print(f"{folder}: skipped {len(skipped):,} (not text files): {join_names(names)}")
    return texts


def raise_error(error: OSError) -> NoReturn:
    raise FolioError(f"{error.filename}: cannot read this folder ({error.strerror})")


def is_text(path: Path) -> bool:
    """Whether it is a file, of no other format, that does not begin like a binary file."""
    # Most .json files in a folder are settings. A .json file with lines of JSON is read if the user
    # names the file itself.
    if not path.is_file() or path.suffix.lower() == ".json" or format_advice(path):
        return False
    with explain_os_error(path, "cannot read"), open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def group_by_content(files: Iterable[Path]) -> list[list[Path]]:
    """The files with equal contents together, in the order of the first ones; no empty files."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        sha256 = hashlib.sha256()
        for piece in read_pieces(path):
            sha256.update(piece.encode())
        groups.setdefault(sha256.hexdigest(), []).append(path)
    groups.pop(hashlib.sha256().hexdigest(), None)  # of the empty files
    return [*groups.values()]


def format_advice(path: Path) -> str:
    """What to do with a file of another format; "" if it is not known as one."""
    suffix = path.suffix.lower()
    if suffix in READ_BY_PANDAS and not is_jsonl(path):
        read = READ_BY_PANDAS[suffix].format(repr(str(path)))
        return (
            'convert it to .jsonl, with an object {"text": "..."} in each line; for example in '
            f"Python, after `pip install pandas`: import pandas; pandas.{read}"
            f".to_json({f'{path}.jsonl'!r}, orient='records', lines=True)"
        )
    if suffix in UNPACK:
        # An archive is unpacked into a folder of its own.
        folder = [] if "--keep" in UNPACK[suffix] else [str(path.with_suffix(""))]
        return f"unpack it: {UNPACK[suffix]} {shell_command(str(path), *folder)}"
    if suffix in FORMATTED:
        return "save it as plain text (UTF-8): the model would learn its formatting codes"
    return ""


# --- Which documents ---


def read_documents(
    files: Iterable[str | Path], json_key: str = "text", separator: str = ""
) -> Iterator[Iterator[str]]:
    """Yields each document as an iterator of pieces; consume it before the next document.

    json_key: the key of the text in each line of a .jsonl file.
    separator: what stands between the documents of a text file; "": each file is one document.
    """
    for path in map(Path, files):
        if is_jsonl(path):
            for text in read_jsonl(path, json_key):
                yield iter([text])
        elif separator:
            for text in split_documents(read_pieces(path), separator):
                yield iter([text])
        else:
            yield read_pieces(path)


def is_jsonl(path: Path) -> bool:
    """Whether each line of the file is a JSON object.

    The suffix decides. If the suffix is .json or missing, the first line decides.
    """
    suffix = path.suffix.lower()
    if suffix not in ("", ".json") or not path.is_file():
        return suffix in (".jsonl", ".ndjson", ".jsonlines")
    with explain_os_error(path, "cannot read"), open(path, "rb") as file:
        piece = file.read(PIECE_BYTES)
    line, newline, _ = piece.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not newline and len(piece) == PIECE_BYTES:  # the line is longer
        return line.startswith(b"{")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_jsonl(path: Path, json_key: str) -> Iterator[str]:
    """The text of each line. FolioError names a line that has none."""
    with explain_os_error(path, "cannot read"), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[json_key]
                text.encode()  # rejects half of a surrogate pair, "\\ud83d"
            except UnicodeDecodeError:
                raise FolioError(f"{path}:{number}: not UTF-8 text; convert this file") from None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise FolioError(
                    f'{path}:{number}: not a line like {{"{json_key}": "..."}}; '
                    "--json_key=KEY names the key of the text; first join the parts of a document, "
                    "such as the messages of a chat, into one text"
                )
            yield normalize_newlines(text)


def normalize_newlines(text: str) -> str:
    """Replace the line ends "\\r\\n" (Windows) and "\\r" by "\\n", as read_pieces() does."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_documents(pieces: Iterable[str], separator: str) -> Iterator[str]:
    """The documents between the separators, without those that are only white space."""
    parts, end = [], ""  # of the current document; the next separator may begin in `end`
    for piece in pieces:
        first, *others = (end + piece).split(separator)
        if others:
            complete = ["".join(parts) + first, *others[:-1]]
            yield from (document for document in complete if document.strip())
            parts, first = [], others[-1]
        cut = max(len(first) - len(separator), 0)
        parts.append(first[:cut])
        end = first[cut:]
    document = "".join(parts) + end
    if document.strip():
        yield document


def read_pieces(path: Path) -> Iterator[str]:
    """A file's text in pieces of about a megabyte. FolioError if it is not UTF-8.

    All line ends become "\\n": "\\r\\n" of Windows, and "\\r". Python's text files do the same.
    A piece ends before white space. GPT-2's split pattern never joins a word and the white space
    after it, so the pieces have the same token ids as the whole text. (Only a megabyte without any
    white space is cut within a word.)
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), True)
    rest, position = "", 0
    with explain_os_error(path, "cannot read"), open(path, "rb") as file:
        while True:
            raw = file.read(PIECE_BYTES)
            try:
                text = rest + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                offset = position + len(raw) - len(error.object) + error.start
                raise FolioError(
                    f"{path}: not UTF-8 text (invalid byte at offset {offset:,}); "
                    "exclude this file, or convert it, for example: iconv -f latin1 -t utf8"
                ) from None
            if position == 0 and raw.startswith(b"version https://git-lfs"):
                raise FolioError(f"{path}: a Git LFS pointer, not the text; run `git lfs pull`")
            if b"\0" in raw:
                raise FolioError(f"{path}: contains NUL bytes, so it is not UTF-8 text")
            position += len(raw)
            if not raw:
                break
            cut = last_safe_cut(text)
            rest = text[cut:]
            if cut:
                yield text[:cut]
    if text:
        yield text


def last_safe_cut(text: str) -> int:
    """The last index where white space follows another character; len(text) if there is none."""
    for i in range(len(text) - 1, 0, -1):
        # U+001C to U+001F are white space for Python, but not for GPT-2's pattern.
        is_space = text[i].isspace() and text[i] not in "\x1c\x1d\x1e\x1f"
        if is_space and not text[i - 1].isspace():
            return i
    return len(text)
