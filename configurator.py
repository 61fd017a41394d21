"""Settings: a dataclass, config files and command-line flags become one validated dataclass.

    @dataclass
    class TrainConfig:
        # --- Model ---
        n_layer: PositiveInt = 4      # number of blocks
        dropout: Probability = 0.0    # probability of zeroing an activation during training

    config = configure(TrainConfig)   # python train.py config/mine.py --n_layer=6 --dropout 0.1

The comment behind a field is its help text; its annotation says which values are valid. Flags win
over config files, and later files over earlier ones. A config file looks like Python
(`name = value` lines), but it is parsed and never executed.

This file also defines FolioError, the error that a user can fix, and run_main, which prints it.
"""

import ast
import dataclasses
import difflib
import gc
import inspect
import json
import math
import operator
import os
import re
import shlex
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

ROOT = Path(__file__).resolve().parent
NO_BREAK = "\xa0"  # a space where no line may end
LIMIT = 2**63  # larger integers fit neither torch nor numpy
# Other words for settings and values. They are refused, and did_you_mean() proposes the right word.
SYNONYMS = {
    "gpu": "cuda", "lr": "learning_rate", "steps": "max_iters", "prompt": "start",
    "text": "start", "temp": "temperature", "n": "num_samples", "length": "max_new_tokens",
    "model": "init_from", "resume": "init_from=resume", "checkpoint": "out_dir",
    "ckpt": "out_dir",
}  # fmt: skip
T = TypeVar("T")


class FolioError(Exception):
    """An error that the user can fix. The message says what is wrong, the value, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if there is no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def run_main(main: Callable[[], None]) -> None:
    """Call a program's main(); print a FolioError as one line and exit with status 2.

    On a terminal, the line is wrapped between words. All other errors keep their traceback.
    Ctrl-C exits with status 130. If the reader of stdout has closed it, as
    `python sample.py | head` does, the program exits silently with status 141.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            # Not every terminal can show every character. Files and pipes get UTF-8.
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)
    try:
        main()
        if sys.stdout:  # None if it was closed before the start: python sample.py >&-
            sys.stdout.flush()
    except FolioError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        message = f"{Path(sys.argv[0]).name}: {' '.join(lines)}"
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        print(wrap(message) if is_terminal else message, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        flush_output()
        # When a program ends, Python's garbage collector examines all objects, for up to a second
        # if torch has been imported. After freeze(), it skips the objects that exist now.
        gc.freeze()


def flush_output() -> None:
    """Write what is buffered for stdout and stderr. If that fails, discard it.

    Otherwise Python itself would try at the end, fail, and change the exit status to 120.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # a closed terminal or pipe, or a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_or_discard(text: str) -> None:
    """print(), but output to a closed terminal or pipe, or to a full disk, is discarded."""
    try:
        print(text, flush=True)
    except OSError:
        flush_output()


def wrap(text: str, indent: int = 0) -> str:
    """The text in lines that fit the terminal, all but the first line indented.

    What a user may copy stays whole, even if it is too long: words such as paths, and commands. A
    command is "python ..." or "pip ..." up to the end of the text or to a backtick.
    """
    text = re.sub(r"\b(python|pip) [^`]*", lambda command: command[0].replace(" ", NO_BREAK), text)
    lines = textwrap.fill(
        text, shutil.get_terminal_size().columns, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return lines.replace(NO_BREAK, " ")


# Control characters, which could clear or lock a terminal, without tab and newline.
CONTROL_CHARACTERS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10}, "\ufffd")


def for_terminal(text: str) -> str:
    """The text with U+FFFD (�) for control characters: a model may generate any byte."""
    return text.translate(CONTROL_CHARACTERS)


# --- What a setting may be ---


class Range(typing.NamedTuple):
    """The valid numbers, both ends included. Infinity, NaN and numbers beyond 64 bits never are."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and abs(value) < LIMIT

    def __str__(self) -> str:
        low = f" of at least {self.low}" if self.low > -math.inf else ""
        return f" from {self.low} to {self.high}" if self.high < math.inf else low


# Annotated[int, X] is an int for Python and type checkers; X is a note that settings_of() reads.
PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a dataclass of settings."""

    name: str
    value_type: type  # int, float or str
    choices: tuple[Any, ...]  # such as ("auto", True, False); (): any value is valid
    range: Range  # of a number
    default: Any
    help: str  # the comment behind the field
    section: str  # the heading above the field: `# --- Model ---`

    def parse(self, text: str) -> Any:
        """'6' -> 6. Text that cannot be converted is returned as it is; validate() rejects it."""
        for choice in self.choices:
            if text.lower() == str(choice).lower():
                return choice
        try:
            return self.value_type(text)
        except ValueError:
            return text

    def validate(self, value: Any, label: str) -> Any:
        """Return the value, an int as a float if needed; raise FolioError if it is not valid."""
        if self.value_type is float and type(value) is int and abs(value) < LIMIT:
            value = float(value)
        if self.choices:  # 1 == True, so the types count, too
            valid = any(type(value) is type(c) and value == c for c in self.choices)
        elif type(value) is str:
            valid = self.value_type is str and not re.search("[\0\ud800-\udfff]", value)
        else:
            valid = type(value) is self.value_type and value in self.range
        if valid:
            return value
        expected = {
            int: f"an integer{self.range}",
            float: f"a number{self.range}",
            str: "a string without NUL or surrogates",
        }[self.value_type]
        if self.choices:
            *others, last = map(str, self.choices)
            expected = f"{', '.join(others)} or {last}"
        guess = did_you_mean(value, map(str, self.choices))
        raise FolioError(f"{label} must be {expected}, not {format_value(value)}{guess}")


def settings_of(cls: type) -> dict[str, Setting]:
    """The settings of a dataclass by name; help texts and sections come from its source."""
    documentation, section, name = {}, "Settings", ""  # documentation: name -> (help, section)
    for line in textwrap.dedent(inspect.getsource(cls)).splitlines():
        if heading := re.match(r"    # --- (.*?) -+$", line):
            section = heading[1]
        if field := re.match(r"    (\w+):", line):
            name = field[1]
        # The first comment in the line of a field, or in a line after it, is the help text.
        if (comment := re.search(r"  # (.*)$", line)) and name not in documentation:
            documentation[name] = comment[1], section
    settings = {}
    for field in dataclasses.fields(cls):
        hint, limits = field.type, Range()
        if typing.get_origin(hint) is Annotated:
            hint, limits = typing.get_args(hint)
        choices = (True, False) if hint is bool else typing.get_args(hint)
        settings[field.name] = Setting(
            field.name, str if choices else hint, choices, limits, field.default,
            *documentation.get(field.name, ("", section)),
        )  # fmt: skip
    return settings


# --- From the command line to the dataclass ---


def configure(
    cls: type[T], argv: list[str] | None = None, defaults: dict[str, Any] | None = None
) -> T:
    """An instance of the dataclass `cls`, from config files and flags.

    argv: the arguments; None means sys.argv[1:]. `--help` prints all settings and exits.
    defaults: values that replace the dataclass's defaults; files and flags override them.
    Raises FolioError for an unknown setting or an invalid value.
    """
    saved = [(name, value, "saved settings: ") for name, value in (defaults or {}).items()]
    return cls(**validate_all(cls, saved) | parse_overrides(cls, argv))


def parse_overrides(cls: type, argv: list[str] | None = None) -> dict[str, Any]:
    """Only the settings that config files and flags give, validated."""
    files, flags = parse_command_line(cls, argv, "config/FILE.py")
    values = {}
    for file in files:
        values |= validate_all(cls, read_config_file(find_config_file(file, cls)))
    return values | flags


def parse_inputs(cls: type[T], argv: list[str] | None = None) -> tuple[list[Path], T]:
    """For programs that read other files: positional arguments are inputs, not config files."""
    files, flags = parse_command_line(cls, argv, "FILE")
    return [Path(os.path.expanduser(file)) for file in files], cls(**flags)


def parse_command_line(
    cls: type, argv: list[str] | None, positional: str
) -> tuple[list[str], dict[str, Any]]:
    """['a.py', '--seed', '7', '--no-bias'] -> ['a.py'], {'seed': 7, 'bias': False}.

    positional: what --help calls an argument that is not a flag.
    """
    settings = settings_of(cls)
    args = list(sys.argv[1:] if argv is None else argv)
    files, flags = [], []
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print_help(settings, positional)
            sys.exit(0)
        if not arg:
            raise FolioError('an argument is empty: "" (is a variable of the shell not set?)')
        if not arg.startswith("-"):
            files.append(arg)
            continue
        if not arg.startswith("--"):
            raise FolioError(f"{arg}: a flag begins with two dashes: -{arg}")
        name, equals, value = arg[2:].partition("=")
        if name.startswith("no-") and not equals:  # --no-bias means --bias=False
            name, value = name.removeprefix("no-"), "False"
            if name in settings and False not in settings[name].choices:
                raise FolioError(f"--{name} needs a value: --{name}=... ({arg} means False)")
        elif name in settings and not equals:  # the value may be the next argument
            follows = bool(args) and not args[0].startswith("--")
            choices = settings[name].choices
            # --bias alone means True; --bias False takes the next argument, if it is a valid value.
            if True in choices and not (follows and settings[name].parse(args[0]) in choices):
                value = "True"
            elif follows:
                value = args.pop(0)
                if value == "=":
                    raise FolioError(f"{arg} = ...: write {arg}=... without spaces")
            else:
                raise FolioError(f"{arg} needs a value: {arg}=...")
        flags.append((name, settings[name].parse(value) if name in settings else value, "--"))
    return files, validate_all(cls, flags)


def validate_all(cls: type, items: list[tuple[str, Any, str]]) -> dict[str, Any]:
    """Validate (name, value, source) items; source is "--" or, for example, "a.py:3: "."""
    settings = settings_of(cls)
    unknown = [(name, source) for name, _, source in items if name not in settings]
    if unknown:
        raise unknown_settings(cls, [name for name, _ in unknown], unknown[0][1])
    return {name: settings[name].validate(value, source + name) for name, value, source in items}


def unknown_settings(cls: type, names: list[str], source: str) -> FolioError:
    """One error for all unknown names: config files of nanoGPT have several."""
    replaced = {"config": "give the file alone: config/FILE.py"}
    replaced |= getattr(cls, "replaced_settings", {})
    names_by_hint: dict[str, list[str]] = {}
    for name in names:
        guess = did_you_mean(name, settings_of(cls)).removeprefix("; ")
        hint = replaced.get(name) or guess or "--help lists all settings"
        names_by_hint.setdefault(hint, []).append(f"--{name[:60]}" if source == "--" else name)
    text = "; ".join(f"{', '.join(group)} ({hint})" for hint, group in names_by_hint.items())
    plural = "s" if len(names) > 1 else ""
    return FolioError(f"{source.removeprefix('--')}unknown setting{plural}: {text}")


def print_help(settings: dict[str, Setting], positional: str) -> None:
    """Print what the program is for, and each setting with its meaning and default."""
    width, section = max(min(shutil.get_terminal_size().columns, 100) - 1, 60), ""
    summary = (sys.modules["__main__"].__doc__ or "").partition("\n\n")[0]
    print(f"usage: {Path(sys.argv[0]).name} [{positional} ...] [--name=value ...]\n")
    print(textwrap.fill(summary, width))
    for setting in settings.values():
        if setting.section != section:
            section = setting.section
            print(f"\n{section}:")
        values = "{" + ",".join(map(str, setting.choices)) + "}"
        flag = f"  --{setting.name} "
        flag += values if setting.choices else setting.value_type.__name__.upper()
        if len(flag) > 32:  # the help text begins on the next line
            print(flag)
            flag = ""
        text = f"{flag:<34}{setting.help} (default: {setting.default!r})"
        print(textwrap.fill(text, width, subsequent_indent=" " * 34))


def did_you_mean(word: Any, candidates: Iterable[str]) -> str:
    """'; did you mean n_layer?' for 'n_layers'; '' if no candidate is similar."""
    synonym, candidates = SYNONYMS.get(str(word)), list(candidates)
    close = difflib.get_close_matches(str(word)[:100], candidates, n=1)
    if synonym:
        close = [synonym] if synonym.partition("=")[0] in candidates else []
    return f"; did you mean {close[0]}?" if close else ""


def format_value(value: Any) -> str:
    """A value as an error message shows it: on one line, at most about 60 characters long."""
    if type(value) is int and abs(value) >= LIMIT:
        return "a number of more than 18 digits (too large)"
    if type(value) is float and abs(value) >= LIMIT:
        return f"{value} (too large)"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- Settings of a run, saved as JSON ---


def to_json(config: Any) -> str:
    """The contents of a settings.json, for read_settings()."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def read_settings(path: str | Path) -> dict[str, Any]:
    """The names and values in a settings.json; configure() validates them. Raises FolioError."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FolioError(f"{path}: these settings cannot be read ({reason})") from None
    if not isinstance(values, dict):
        raise FolioError(f"{path}: these settings cannot be read (not a JSON object)")
    return values


# --- Config files ---

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}


def find_config_file(name: str, cls: type) -> Path:
    """The file as named or, if there is none, in Folio's folder. Raises FolioError with advice."""
    path, settings = Path(os.path.expanduser(name)), settings_of(cls)
    for candidate in (path, ROOT / path):
        if os.path.isdir(candidate):
            hint = f"; did you mean --out_dir={shlex.quote(name)}?" if "out_dir" in settings else ""
            raise FolioError(f"{name}: a folder, not a config file{hint}")
        if os.path.exists(candidate) and candidate.suffix not in (".txt", ".jsonl"):
            return candidate
        if os.path.exists(candidate):
            advice = f"python -m data.prepare_text {shlex.quote(name)} --dataset=NAME"
            if "input_file" in settings:
                advice = f"--input_file={shlex.quote(name)}"
            elif "start" in settings:
                advice = f"--start=FILE:{shlex.quote(name)}"
            raise FolioError(f"{name}: a text, not a config file; try {advice}")
    stems = [file.stem for file in (ROOT / "config").glob("*.py")]
    similar = difflib.get_close_matches(path.stem, stems, n=1)
    if name.partition("=")[0] in settings:
        advice = f"; a flag begins with two dashes: --{name}"
    elif "start" in settings and path.suffix != ".py":
        advice = f"; a prompt is given by --start={shlex.quote(name)}"
    else:
        guess = f"did you mean config/{similar[0]}.py?" if similar else "see the folder config/"
        advice = f"; {guess}"
    raise FolioError(f"there is no config file {name[:200]!r}{advice[:200]}")


def read_config_file(path: Path) -> list[tuple[str, Any, str]]:
    """'n_embd = 6 * 64' -> [('n_embd', 384, 'path:1: ')]. The file is parsed, never executed."""
    try:
        tree = ast.parse(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FolioError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise FolioError(f"{path}: this file cannot be read ({error.strerror})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line, reason = getattr(error, "lineno", None) or 1, getattr(error, "msg", error)
        raise FolioError(f"{path}:{line}: not a `name = value` line ({reason})") from None
    items, names = [], {}
    for statement in tree.body if ast.get_docstring(tree) is None else tree.body[1:]:
        source = f"{path}:{statement.lineno}: "
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                try:
                    names[name] = evaluate(expression, names)
                except (ValueError, ArithmeticError, RecursionError) as error:
                    raise FolioError(f"{source}{error}") from None
                items.append((name, names[name], source))
            case _:
                raise FolioError(f"{source}only `name = value` lines are allowed")
    return items


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a literal, a name assigned above, or + - * / // of such values.

    Raises ValueError for anything else: calls, imports, attributes, subscripts, powers, ...
    """
    match node:
        case ast.Constant(value=bool() | str() | int() | float() as value):  # one of these types
            return value
        case ast.Name(id=name):
            if name not in names:
                raise ValueError(f"{format_value(name)} is not defined above (strings need quotes)")
            return names[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            operands = [evaluate(operand, names)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            operands = [evaluate(left, names), evaluate(right, names)]
        case _:
            raise ValueError("only literals, names assigned above and + - * / // are allowed")
    for value in operands:
        if type(value) not in (int, float) or abs(value) >= LIMIT:
            raise ValueError(f"+ - * / // are for numbers, not {format_value(value)}")
    return OPERATORS[type(op)](*operands)
