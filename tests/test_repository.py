"""The repository: import rules, typed functions, config files, commands in the README."""

import ast
import os
import re
import shutil
import string
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from configurator import configure, print_help, settings_of
from engine.train_config import TrainConfig
from tests.conftest import ROOT, TINY_TEXT, run_script
from tests.mutation_check import MUTATIONS, mutate

# Imports go downwards only: a module may import its own layer's modules and those of lower layers.
LAYERS = ("configurator", "data", "model", "engine", "programs", "tests")
# Modules for which "downwards" is not strict enough.
SPECIAL_RULES = {
    "configurator.py": set(),  # the standard library alone
    "model.py": {"torch"},
}
# import name -> the dependency in pyproject.toml that provides it, where the names differ
PACKAGES = {"urllib3": "requests"}


def source_files() -> list[str]:
    patterns = ("*.py", "data/*.py", "engine/*.py", "lessons/*.py")
    return sorted(
        p.relative_to(ROOT).as_posix() for pattern in patterns for p in ROOT.glob(pattern)
    )


def files_of_tests() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py"))


@cache
def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported_modules(path: str) -> set[str]:
    """The full names of all modules that a file imports: {'torch.nn', 'data.files', ...}."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(name: str) -> int | None:
    """The layer of a module of ours such as 'data.files' or 'train'; None for other modules."""
    top = name.split(".")[0]
    if top in LAYERS:
        return LAYERS.index(top)
    if top == "lessons" or (ROOT / f"{top}.py").exists():
        return LAYERS.index("programs")
    return None


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# --- Imports ---


@pytest.mark.parametrize("path", source_files())
def test_imports_go_downwards_only(path):
    own_layer = layer_of(module_name(path))
    for name in imported_modules(path):
        layer = layer_of(name)
        assert layer is None or layer <= own_layer, f"{path} imports {name}"
    if path in SPECIAL_RULES:
        tops = {name.split(".")[0] for name in imported_modules(path)}
        assert tops - sys.stdlib_module_names <= SPECIAL_RULES[path]


@pytest.mark.parametrize("path", source_files())
def test_no_program_imports_a_program(path):
    for name in imported_modules(path):
        is_program = layer_of(name) == LAYERS.index("programs")
        assert not is_program or name.split(".")[0] == "lessons" == path.split("/")[0], name


def test_modules_do_not_import_each_other_in_a_circle():
    modules = {module_name(path): imported_modules(path) for path in source_files()}
    graph = {name: imports & modules.keys() - {name} for name, imports in modules.items()}
    while free := {name for name, imports in graph.items() if not imports}:
        graph = {name: imports - free for name, imports in graph.items() if name not in free}
    assert not graph, f"circular imports among {sorted(graph)}"


@pytest.mark.parametrize("path", source_files())
def test_every_imported_package_is_declared(path):
    """Dependencies are imported anywhere, optional ones inside functions or `try` only."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [package for group in project["optional-dependencies"].values() for package in group]
    required, optional = (
        {re.split(r"[^\w-]", package)[0].replace("-", "_") for package in packages}
        for packages in (project["dependencies"], extras)
    )
    everywhere = {name.split(".")[0] for name in imported_modules(path)}
    at_top = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in parse(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for name in everywhere - sys.stdlib_module_names:
        package = PACKAGES.get(name, name)
        if layer_of(name) is None and package not in required:
            assert package in optional, f"{path}: {name} is not declared in pyproject.toml"
            assert name not in {top.split(".")[0] for top in at_top}, f"{path}: {name} is optional"


@pytest.mark.parametrize("path", source_files())
def test_nothing_happens_at_import(path):
    """Outside functions there are only imports, definitions and constants.

    What a file does when it is started stands below `if __name__ == "__main__"` (or, for a module
    of a package that is started as a file, `if not __package__`).
    """
    allowed = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign,
        ast.AugAssign,
    )  # fmt: skip
    for node in parse(path).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guard = isinstance(node, ast.If) and re.search(
            "__name__|__package__", ast.unparse(node.test)
        )
        is_import = isinstance(node, ast.Try) and isinstance(node.body[0], allowed[:2])
        fine = isinstance(node, allowed) or is_docstring or is_guard or is_import
        assert fine, f"{path}:{node.lineno}"


# --- Style ---


@pytest.mark.parametrize("path", [*source_files(), *files_of_tests()])
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(parse(path)) or not parse(path).body


@pytest.mark.parametrize("path", source_files())
def test_public_functions_are_fully_typed(path):
    for function in public_functions(parse(path)):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [a for a in (arguments.vararg, arguments.kwarg) if a]
        untyped = [a.arg for a in named if not a.annotation and a.arg not in ("self", "cls")]
        where = f"{path}:{function.lineno}: {function.name}"
        assert not untyped, f"{where}: arguments without a type: {untyped}"
        assert function.returns, f"{where}: no return type"


def public_functions(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef]:
    """Functions of a module and methods of its classes whose names do not begin with _."""
    functions = []
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            functions += public_functions(child)
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            functions.append(child)
    return functions


@pytest.mark.parametrize("path", source_files())
def test_functions_fit_a_screen(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{path}:{node.lineno}: {node.name} has {lines} lines"


# --- Config files and settings ---


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.stem)
def test_config_files_are_valid_for_train_py(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert configure(TrainConfig, [str(path)]).out_dir == f"out/{path.stem}"


def config_classes() -> list[tuple[str, ast.ClassDef]]:
    return [
        (path, node)
        for path in [*source_files(), *files_of_tests()]
        if re.search(r"^class \w+Config\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        for node in parse(path).body  # parsing all files would take every worker a second
        if isinstance(node, ast.ClassDef)
        and node.name.endswith("Config")
        and not path.startswith(("model", "tests/test_"))
    ]


@pytest.mark.parametrize(("path", "node"), config_classes(), ids=lambda x: getattr(x, "name", ""))
def test_every_program_has_help_in_80_columns_and_hints_for_old_names(
    path, node, monkeypatch, capsys
):
    module = __import__(module_name(path), fromlist=[node.name])
    cls = getattr(module, node.name)
    settings = settings_of(cls)
    monkeypatch.setenv("COLUMNS", "80")
    print_help(settings, "FILE")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    for setting in settings.values():
        assert setting.help, f"{path}: {setting.name}"
    for old_name in getattr(cls, "replaced_settings", {}):
        assert old_name not in settings


# --- Without the virtual environment ---


@pytest.mark.parametrize(
    "program", ["train.py", "sample.py", "explain.py", "prepare_shakespeare.py", "-mengine.plot"]
)
def test_without_a_package_a_program_says_how_to_activate_the_environment(program, tmp_path):
    missing = "torch" if program == "train.py" else "tqdm"
    error = f"raise ModuleNotFoundError('missing', name={missing!r})"
    (tmp_path / f"{missing}.py").write_text(error)
    result = run_script(program, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert f"{missing} is not installed here" in result.stderr
    assert ". .venv/bin/activate" in result.stderr
    assert "Traceback" not in result.stderr


# --- The mutation check ---


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.title)
def test_mutations_fit_the_source_and_name_existing_tests(mutation):
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert mutate(source, mutation) != source
    file, name = mutation.test.split("::")
    functions = {n.name: n for n in parse(f"tests/{file}").body if isinstance(n, ast.FunctionDef)}
    assert name in functions


def test_mutation_titles_are_unique():
    assert len({mutation.title for mutation in MUTATIONS}) == len(MUTATIONS)


def mutation_check(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.mutation_check", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_mutation_check_lists_its_titles():
    result = mutation_check("--list")
    assert result.returncode == 0
    assert all(mutation.title in result.stdout for mutation in MUTATIONS)


def test_the_mutation_check_refuses_words_that_match_no_title():
    result = mutation_check("mask", "nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("mutation_check.py: no title contains 'nonsense'")
    assert result.stderr.count("\n") == 1


def test_the_mutation_check_shows_the_changed_line_and_the_failing_test():
    result = mutation_check("without the causal mask")
    assert result.returncode == 0, result.stdout + result.stderr
    mutation = next(m for m in MUTATIONS if m.title == "without the causal mask")
    lines = result.stdout.splitlines()
    before = next(line for line in lines if line.startswith("    - "))
    after = next(line for line in lines if line.startswith("    + "))
    assert mutation.original.splitlines()[-1].strip() in before
    assert mutation.replacement.splitlines()[-1].strip() in after
    test = lines.index(f"    running {mutation.test}, for up to half a minute")
    assert lines[test + 1].startswith("    FAILED: AssertionError")
    assert mutation.meaning in " ".join(result.stdout.split())
    assert lines[-1] == "1 of 1 mutations were detected"


# --- The README ---


def readme_commands() -> list[str]:
    """The commands in the README's shell blocks that run our programs; `a && b` gives two."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    commands = [
        part.strip() for line in "\n".join(blocks).splitlines() for part in line.split("&&")
    ]
    return [c for c in commands if re.match(r"python (\S+\.py|-m (data|engine|tests))", c)]


def runs_here(command: str) -> bool:
    """Not those that need the network, a large GPU or another repository, or that never end."""
    skipped = (
        "gpt2", "finetune", "_gpu", "fineweb", "webtext", "--peer", "--forever", "mutation_check",
        "lessons",  # they have tests of their own
    )  # fmt: skip
    return not any(word in command for word in skipped)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository as a new user has it, with a short text in Shakespeare's place."""
    folder = tmp_path_factory.mktemp("clone") / "folio"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "mine.txt").write_text(TINY_TEXT * 40 + string.ascii_letters + string.punctuation)
    return folder


# Runs all commands in one process, because importing torch takes longer than most commands.
RUN_COMMANDS = """
import runpy, shlex, sys
for command in sys.argv[1:]:
    print("$", command, flush=True)
    sys.argv = shlex.split(command, comments=True)[1:]
    try:
        if sys.argv[0] == "-m":
            sys.argv.pop(0)
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        if exit_.code:
            raise
"""


def shorten(command: str) -> str:
    """The same command with fewer steps and tokens."""
    command = re.sub(" +#.*", "", command)
    if command.startswith("python train.py"):
        command += " --max_iters=2 --warmup_iters=1 --batch_size=2"
        command += " --eval_tokens=64 --sample_tokens=4"
    if command.startswith("python sample.py"):
        command += " --max_new_tokens=5"
    return command


def test_the_readmes_commands_run(clone):
    commands = [c for c in dict.fromkeys(readme_commands()) if runs_here(c)]
    assert len(commands) >= 10
    assert any(c.startswith("python train.py config/shakespeare_char.py") for c in commands)
    assert any(c.startswith("python sample.py") for c in commands)
    prepare = "python prepare_shakespeare.py --input_file=mine.txt --dataset=shakespeare_char"
    result = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS, prepare, *map(shorten, commands)],
        cwd=clone, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert result.stdout.count("$ python") == len(commands) + 1
