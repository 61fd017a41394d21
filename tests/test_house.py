"""The whole: which module may import which, and commands in the README that do what they say."""

import ast
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.break_and_see import CHANGES, broken
from tests.conftest import RHYME, ROOT

STANDARD = sys.stdlib_module_names

# What each module may import, beside the standard library. Imports run downwards only.
DATA = {
    "configurator",
    "data",
    "numpy",
    "torch",
    "tiktoken",
    "regex",
    "requests",
    "tqdm",
    "pyarrow",
}
ALLOWED = {
    "configurator.py": set(),
    "model.py": {"torch"},
    "train.py": {
        "configurator", "data", "model", "torch", "training.checkpoint", "training.machine",
        "training.optimizer", "training.report", "training.run", "training.world",
    },
    "sample.py": {
        "configurator", "data", "model", "torch", "training.checkpoint", "training.kernels",
        "training.machine", "training.world",
    },
    "prepare_shakespeare.py": {"configurator", "data"},
    "training/__init__.py": set(),
    "training/optimizer.py": {"torch"},
    "training/machine.py": {"configurator", "torch"},
    "training/kernels.py": {"model", "torch", "training.machine"},
    "training/checkpoint.py": {"configurator", "data", "model", "safetensors", "torch"},
    "training/world.py": {"configurator", "torch", "training.machine"},
    "training/run.py": {
        "configurator", "data", "model", "torch", "training.checkpoint", "training.kernels",
        "training.machine", "training.optimizer", "training.world",
    },
    "training/report.py": {
        "data", "matplotlib", "tqdm", "training.checkpoint", "training.machine", "training.run",
    },
}  # fmt: skip


def sources() -> list[str]:
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("training/*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if path.stat().st_size)


def imports_of(path: str) -> set[str]:
    """The modules and packages that a file imports: outermost names, those of training/ in full."""
    names = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return {name if name.startswith("training.") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sources())
def test_a_module_knows_only_those_below(path):
    allowed = DATA if path.startswith("data/") else ALLOWED[path]
    assert imports_of(path) - STANDARD <= allowed


@pytest.mark.parametrize("path", sources())
def test_nothing_happens_at_import(path):
    """Outside functions stand only imports, definitions and constants; main() is guarded."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in tree.body:
        loose = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        assert not loose, f"{path}:{node.lineno}"
        assert not isinstance(node, ast.For | ast.While | ast.With), f"{path}:{node.lineno}"
    assert ast.get_docstring(tree), f"{path} does not say what it is for"


@pytest.mark.parametrize("path", [p.name for p in (ROOT / "config").glob("*.py")])
def test_a_recipe_is_data_that_train_py_understands(path):
    from configurator import configure
    from train import TrainConfig

    recipe = ROOT / "config" / path
    assert ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8")))
    assert configure(TrainConfig, [str(recipe)]).out_dir == f"out/{recipe.stem}"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.title)
def test_what_can_be_broken_is_there_to_break(change):
    """The changes of break_and_see.py fit the source as it is, and their lessons exist."""
    source = (ROOT / change.file).read_text(encoding="utf-8")
    assert broken(source, change) != source
    file, name = change.lesson.split("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


# --- The README ---


def readme_commands() -> list[str]:
    """What the README's shell blocks do with our scripts, each part of a chain by itself."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    commands = [
        part.strip() for line in "\n".join(blocks).splitlines() for part in line.split("&&")
    ]
    return [c for c in commands if re.match(r"python (\S+\.py|-m (data|tests))", c)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the whole as a newcomer has it, Shakespeare having been prepared from a rhyme."""
    folder = tmp_path_factory.mktemp("newcomer") / "folio"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "mine.txt").write_text(RHYME * 40 + string.ascii_letters + string.punctuation)
    command = "python prepare_shakespeare.py --input=mine.txt --dataset=shakespeare_char"
    assert run_in(folder, command).returncode == 0
    return folder


def run_in(folder, command):
    words = [sys.executable, *shlex.split(command, comments=True)[1:]]
    if "train.py" in command:
        words += ["--max_iters=2", "--eval_tokens=64", "--sample_tokens=4"]
    if "sample.py" in command and "train.py" not in command:
        words += ["--max_new_tokens=5"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two run at a time
    return subprocess.run(
        words, cwd=folder, env=one_thread, capture_output=True, text=True, timeout=120
    )


def test_the_readmes_commands_run(clone):
    commands = [c for c in dict.fromkeys(readme_commands()) if can_run_here(c)]
    assert len(commands) >= 6
    assert any(c.startswith("python train.py config/shakespeare_char.py") for c in commands)
    assert any(c.startswith("python sample.py") for c in commands)
    # Two strands that have nothing to do with one another: the first recipe, and all others.
    others = [c for c in commands if re.search("mine|_quick|_long|_bpe", c)]
    strands = [[c for c in commands if c not in others], others]

    def run_all(strand):
        return [(command, run_in(clone, command)) for command in strand]

    with ThreadPoolExecutor() as both:
        results = [result for done in both.map(run_all, strands) for result in done]
    assert len(results) == len(commands)
    for command, result in results:
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        assert "Traceback" not in result.stderr


def can_run_here(command: str) -> bool:
    """Not those that need a network, a large GPU or a peer's code, or that take their time."""
    others = ("gpt2", "finetune", "_gpu", "fineweb", "webtext", "--peer", "--forever", "break_and")
    return not any(word in command for word in others)
