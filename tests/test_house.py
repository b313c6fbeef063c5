"""The layout: which room may import which, how large the core may grow, and where a screen of code has to pause."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = [
    "config",
    "tokenizer",
    "byte_level",
    "dataset",
    "model",
    "optim",
    "train",
    "trainer_state",
    "checkpoint",
    "generate",
    "decode",
    "device",
    "files",
    "runs",
    "quantize",
]
# each room may import itself and these
ROOMS = {
    "core": set(),
    "corpus": {"core"},
    "formats": {"core"},
    "measure": {"core", "corpus"},
    "notebook": {"core", "corpus", "formats", "measure"},
}
DRAWING = {"ipywidgets", "IPython", "matplotlib"}
SCREEN = 50  # lines of a function's body that need no paragraphs
PARAGRAPH = 30  # lines of a longer body without a blank one
# The limits that are in force: the code is never to grow past them without a word.
CORE_LINES, ALL_LINES, MODEL_LINES, TRAIN_LINES = 5_240, 19_000, 350, 420


def modules(folder: Path) -> list[Path]:
    return sorted((folder / "llmcore").rglob("*.py"))


def room(dotted: str) -> str:
    """The room of a module such as `llmcore.measure.planner`; `core` for the root."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "core"


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, `from llmcore import x` as `llmcore.x`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            assert node.module
            yield from (
                (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "llmcore" else [node.module]
            )


def wrong_imports(folder: Path) -> list[str]:
    wrong = []
    for file in modules(folder):
        own = room(".".join(file.relative_to(folder).with_suffix("").parts))
        for name in imported(file):
            top = name.split(".")[0]
            if top == "llmcore" and room(name) not in {own, *ROOMS[own]}:
                wrong.append(f"{file.relative_to(folder)} imports {name}")
            if top in DRAWING and own != "notebook":
                wrong.append(f"{file.relative_to(folder)} imports {name}")
    return wrong


def test_imports_go_one_way() -> None:
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("train.py", "from llmcore.measure.memory import check_memory"),
        ("model.py", "from llmcore import measure"),
        ("corpus/prepare.py", "from llmcore.formats.hub import from_hub"),
        ("measure/planner.py", "import llmcore.notebook.plots"),
        ("generate.py", "def late():\n    from llmcore.notebook.widgets import run_table"),
        ("runs.py", "from matplotlib import pyplot"),
    ],
)
def test_an_import_the_wrong_way_is_found(tmp_path: Path, place: str, line: str) -> None:
    file = tmp_path / "llmcore" / place
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n", encoding="utf-8")
    assert len(wrong_imports(tmp_path)) == 1


def test_the_root_is_the_core_and_nothing_else() -> None:
    root = {path.stem for path in (ROOT / "llmcore").glob("*.py")} - {"__init__"}
    assert root == set(CORE)


def test_the_code_stays_small() -> None:
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in modules(ROOT)}
    core = sum(lines[ROOT / "llmcore" / f"{name}.py"] for name in CORE)
    assert core <= CORE_LINES
    assert sum(lines.values()) <= ALL_LINES
    assert lines[ROOT / "llmcore" / "model.py"] <= MODEL_LINES
    assert lines[ROOT / "llmcore" / "train.py"] <= TRAIN_LINES


def walls(folder: Path) -> list[str]:
    """Functions whose body is longer than a screen and has a long row of lines without a blank one."""
    found = []
    for file in modules(folder):
        lines = file.read_text(encoding="utf-8").split("\n")
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            body = lines[(first.end_lineno or 0) if documented else first.lineno - 1 : node.end_lineno]
            longest = max(map(len, "".join("x" if line.strip() else " " for line in body).split()), default=0)
            if len(body) > SCREEN and longest > PARAGRAPH:
                found.append(f"{file.relative_to(folder)}: {node.name}, {longest} lines in a row")
    return found


def test_no_function_is_a_wall() -> None:
    assert walls(ROOT) == []


def test_a_wall_is_found(tmp_path: Path) -> None:
    (tmp_path / "llmcore").mkdir()
    wall = "def wall():\n" + "    print()\n" * (SCREEN + 1)
    (tmp_path / "llmcore" / "train.py").write_text(wall, encoding="utf-8")
    assert walls(tmp_path) == [f"llmcore/train.py: wall, {SCREEN + 1} lines in a row"]


def test_the_core_imports_without_torch_where_it_says_so() -> None:
    assert not {
        name for name in imported(ROOT / "llmcore" / "config.py") if name.split(".")[0] not in sys.stdlib_module_names
    }
