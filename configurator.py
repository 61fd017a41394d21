"""Settings: a dataclass, config files and flags go in; one checked dataclass comes out.

    @dataclass
    class TrainConfig:
        batch_size: Count = 12        # sequences per forward pass
        dropout: Fraction = 0.0       # share of activations zeroed while training

    config = configure(TrainConfig)   # python train.py config/mine.py --batch_size=4

The comment behind a setting is its help text, its annotation says what it may be, its default
stands once. Flags win over files, wherever they stand; later files win over earlier ones. A
config file looks like Python (`name = value`) but is parsed, never executed.

Errors are for people: whatever a user can get wrong raises FolioError, and `run_main` turns it
into one line and exit status 2. A traceback means a bug in Folio.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import itertools
import json
import math
import operator
import os
import sys
import textwrap
import tokenize
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any


class FolioError(Exception):
    """Something a person can mend: what was wrong, the value, and what to type instead."""


class SettingsError(FolioError):
    """A setting that is unknown, of the wrong type, or out of range."""


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main(); an error for people becomes one line and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter of the text
    try:
        main()
    except FolioError as error:
        fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `python sample.py | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


# --- What a setting may be ---


class Range(typing.NamedTuple):
    """Both ends belong to it; infinity, NaN and numbers beyond 64 bits never do."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value):
        return self.low <= value <= self.high and abs(value) < 2**63

    def __str__(self):
        low = f"at least {self.low}" if self.low > -math.inf else "finite"
        return f"{low} and at most {self.high if self.high < math.inf else 2**63 - 1}"


Count = Annotated[int, Range(1)]  # 1, 2, 3, ...
Whole = Annotated[int, Range(0)]  # 0, 1, 2, ...
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the dataclass: what it is called, what it may be, what it means."""

    name: str
    kind: type | None  # int, float or str; None for a choice
    choices: tuple  # of a choice: ("auto", True, False); empty otherwise
    range: Range
    default: Any
    help: str
    section: str  # the heading it stands under: `# --- Model ---`

    def read(self, text: str) -> Any:
        """The value a flag's text spells; text that spells nothing is left for check()."""
        for choice in self.choices:
            if text == str(choice) or (isinstance(choice, bool) and text == str(choice).lower()):
                return choice
        try:
            return self.kind(text) if self.kind else text
        except ValueError:
            return text

    def check(self, value: Any, where: str) -> Any:
        """`value` itself, as a float where one is wanted; SettingsError if it does not fit."""
        if self.choices:
            if any(value is c or (type(value) is str and value == c) for c in self.choices):
                return value
            guess = did_you_mean(value, [str(choice) for choice in self.choices])
            raise SettingsError(f"{where}: {self.name} is {self.wanted}, not {shown(value)}{guess}")
        if self.kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not self.kind:
            raise SettingsError(f"{where}: {self.name} is {self.wanted}, not {shown(value)}")
        if self.kind is not str and value not in self.range:
            raise SettingsError(f"{where}: {self.name} must be {self.range}, not {shown(value)}")
        return value

    @property
    def wanted(self) -> str:
        if self.choices:
            return " or ".join(map(str, self.choices))
        return {int: "a whole number", float: "a number", str: "a text"}[self.kind]

    @property
    def is_switch(self) -> bool:
        return True in self.choices


def settings_of(cls: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, with the help that stands in its source."""
    hints = typing.get_type_hints(cls, include_extras=True)
    comments = comments_of(cls)
    settings = {}
    for field in dataclasses.fields(cls):
        hint, limits = hints[field.name], Range()
        if typing.get_origin(hint) is Annotated:
            hint, limits = typing.get_args(hint)
        choices = (True, False) if hint is bool else typing.get_args(hint)
        settings[field.name] = Setting(
            field.name, None if choices else hint, choices, limits, field.default,
            *comments[field.name],
        )  # fmt: skip
    return settings


def comments_of(cls: type) -> dict[str, tuple[str, str]]:
    """Each field's trailing comment and the section it stands in, read from the source."""
    source = textwrap.dedent(inspect.getsource(cls))
    fields = {
        line: node.target.id
        for node in ast.parse(source).body[0].body
        if isinstance(node, ast.AnnAssign)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    found, section = dict.fromkeys(fields.values(), ("", "")), "settings"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("# ")
        if text.startswith("--- "):
            section = text.strip("- ")
        elif line in fields:
            found[fields[line]] = (text, section)
    return found


# --- From the command line to the dataclass ---


def configure(cls: type, argv: list[str] | None = None, base: dict[str, Any] | None = None) -> Any:
    """An instance of the dataclass `cls`, from config files and flags.

    argv: the words behind the script's name; None takes the command line's own.
    base: values that take the place of the dataclass's defaults; files and flags win over them.
    Raises SettingsError for whatever does not fit; `--help` prints the settings and exits.
    """
    settings = settings_of(cls)
    saved = {
        name: known(cls, settings, name, "saved settings").check(value, "saved settings")
        for name, value in (base or {}).items()
    }
    return cls(**saved | given_settings(cls, argv))


def given_settings(
    cls: type, argv: list[str] | None = None, inputs: list[Path] | None = None
) -> dict[str, Any]:
    """The settings that files and flags name, checked one by one; configure() adds the others.

    inputs: where given, words that are no flags are added to it and not read as config files.
    """
    settings = settings_of(cls)
    words = ("FILE", "what to read") if inputs is not None else CONFIG_FILES
    argv = sys.argv[1:] if argv is None else argv
    files, flags = read_command_line(cls, settings, argv, words)
    if inputs is not None:
        inputs += map(Path, files)
        files = []
    values = {}
    for file in files:
        for name, value, where in read_file(Path(file)):
            values[name] = known(cls, settings, name, where).check(value, where)
    for name, text in flags.items():
        where = f"--{name}={shown(text, quote=False)}"
        values[name] = settings[name].check(settings[name].read(text), where)
    return values


def as_json(config: Any) -> str:
    """The contents of a settings.json, which read_settings() reads."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def read_settings(path: Path) -> dict[str, Any]:
    """The names and values of a settings.json, for configure() to check."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: cannot read these settings: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: damaged: not names and values")
    return values


CONFIG_FILES = ("config/FILE.py", "config files, read in order; flags win over them")


def read_command_line(cls, settings, argv, words) -> tuple[list[str], dict[str, str]]:
    """['config/a.py', '--seed', '7'] -> ['config/a.py'], {'seed': '7'}.

    words: what the help calls the words that are no flags, and says of them.
    """
    parser = Parser(
        description=(inspect.getmodule(cls).__doc__ or "").partition("\n\n")[0],
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
        usage=f"%(prog)s [{words[0]} ...] [--name=value ...]",
    )
    parser.add_argument("files", nargs="*", metavar=words[0], help=words[1])
    sections = {}
    for setting in settings.values():
        if setting.section not in sections:
            sections[setting.section] = parser.add_argument_group(setting.section)
        choices = "{" + ",".join(map(str, setting.choices)) + "}"
        sections[setting.section].add_argument(
            f"--{setting.name}",
            default=argparse.SUPPRESS,
            metavar=choices if setting.choices else setting.kind.__name__.upper(),
            help=f"{setting.help} (default: {setting.default!r})".replace("%", "%%"),
        )
    found, unknown = parser.parse_known_intermixed_args(spell_out(argv, settings))
    for word in unknown:
        name = known(cls, settings, word.lstrip("-").partition("=")[0], word).name
        raise SettingsError(f"{word}: a flag begins with two dashes, --{name}=...")
    flags = vars(found)
    return flags.pop("files"), flags


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in our own voice."""

    def error(self, message):
        raise SettingsError(f"{message} (--help lists all settings)")


def spell_out(argv: list[str], settings: dict[str, Setting]) -> list[str]:
    """A switch may stand alone: ['--compile', 'a.py', '--no-bias'] -> =True, 'a.py', =False."""
    words = []
    for word, after in itertools.pairwise([*argv, ""]):
        name = word.removeprefix("--")
        switch = settings.get(name) if word.startswith("--") else None
        negated = settings.get(name.removeprefix("no-")) if word.startswith("--no-") else None
        if negated and negated.is_switch:
            word = f"--{negated.name}=False"
        elif switch and switch.is_switch and switch.read(after) not in switch.choices:
            word = f"--{name}=True"
        words.append(word)
    return words


def known(cls: type, settings: dict[str, Setting], name: str, where: str) -> Setting:
    """The setting of that name; an unknown name is told what it might have meant."""
    if name in settings:
        return settings[name]
    instead = getattr(cls, "instead", {}).get(name)
    if instead:
        raise SettingsError(f"{where}: there is no setting {name}: {instead}")
    guess = did_you_mean(name, settings) or "; --help lists all settings"
    raise SettingsError(f"{where}: no setting is called {shown(name)}{guess}")


def did_you_mean(word: Any, candidates) -> str:
    close = difflib.get_close_matches(str(word)[:100], list(candidates), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: Any, quote: bool = True) -> str:
    """A value as an error shows it: on one line, and never a page long."""
    if type(value) is int and abs(value) >= 2**63:
        return "a number of more than 18 digits"
    text = repr(value)
    if not quote and isinstance(value, str):
        text = text[1:-1]
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- Config files ---


def read_file(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, value, "path:line") for each setting of a config file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"{path}: cannot read this config file: {reason}") from None
    return read_assignments(path, text)


ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def read_assignments(path: Path, text: str) -> Iterator[tuple[str, Any, str]]:
    """'n_embd = 6 * 64' -> ('n_embd', 384, 'path:1'). Parsed and calculated, never executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" is the user's business
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f"{path}:{getattr(error, 'lineno', None) or 1}"
        raise SettingsError(f"{where}: not readable as `name = value` lines: {error}") from None
    names = {}
    for statement in tree.body if ast.get_docstring(tree) is None else tree.body[1:]:
        where = f"{path}:{statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                try:
                    names[name] = calculate(expression, names)
                except (ValueError, ArithmeticError, RecursionError) as error:
                    raise SettingsError(f"{where}: {error}") from None
                yield name, names[name], where
            case _:
                raise SettingsError(f"{where}: only `name = value` lines may stand here")


def calculate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a literal, a name assigned above, or + - * / // on numbers.

    Raises ValueError for anything else: calls, imports, attributes, subscripts, powers, ...
    """
    match node:
        case ast.Constant(value=bool() | str() | int() | float() as value):
            return value
        case ast.Name(id=name):
            if name not in names:
                raise ValueError(f"{shown(name)} is not assigned above (a text needs quotes)")
            return names[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in ARITHMETIC:
            terms = [calculate(operand, names)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            terms = [calculate(left, names), calculate(right, names)]
        case _:
            raise ValueError("only literals, names assigned above and + - * / // may stand here")
    if not all(type(term) in (int, float) and abs(term) < 2**63 for term in terms):
        raise ValueError("arithmetic takes numbers of at most 18 digits")
    return ARITHMETIC[type(op)](*terms)
