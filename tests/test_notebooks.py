"""The notebooks themselves: pairs in sync, outputs fresh, headless runs with good and bad parameters.

`make test` also runs nbval over all at their default size.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from tests.tools.render import NOTEBOOKS, source_hash

ALL = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def read(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_six_pairs() -> None:
    five = ["01_tokenize", "02_dataset", "03_toyreverse", "04_scifi_train", "05_generate"]
    assert [*five, "06_scaling"] == ALL
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.py")) == ALL


@pytest.mark.parametrize("name", ALL)
def test_both_halves_of_a_pair_agree(name: str) -> None:
    halves = [jupytext.read(NOTEBOOKS / f"{name}{ending}") for ending in (".ipynb", ".py")]
    notebook, script = ([(c.cell_type, c.source, sorted(c.metadata.get("tags", []))) for c in h.cells] for h in halves)
    assert notebook == script


@pytest.mark.parametrize("name", ALL)
def test_committed_outputs_come_from_these_sources_run_once_in_order(name: str) -> None:
    notebook = read(name)
    assert notebook.metadata.llmcore.source_hash == source_hash(notebook), "stale: run `make notebooks`"
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "error"]
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ALL)
def test_each_notebook_has_parameters_pictures_and_checked_facts(name: str) -> None:
    cells = code_cells(read(name))
    tags = [cell.metadata.get("tags", []) for cell in cells]
    assert sum("parameters" in t for t in tags) == 1
    checked = [cell for cell, t in zip(cells, tags, strict=True) if "nbval-check-output" in t]
    assert len([cell for cell in checked if cell.outputs]) >= 4
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("name", ALL)
def test_outputs_stand_without_widgets_styles_and_scripts(name: str) -> None:
    """As on a code host, which runs nothing and drops styles."""
    shown = [output.data for cell in code_cells(read(name)) for output in cell.outputs if "data" in output]
    assert shown and all({"image/png", "text/html", "text/plain"} & data.keys() for data in shown)
    for data in shown:
        assert not [kind for kind in data if "widget" in kind], "a widget without its kernel is a blank"
        page = data.get("text/html", "")
        assert not re.search("<(style|script|img|link|iframe)", page)
        bare = re.sub("<[^>]*>", "", page)
        assert "text/html" not in data or len(bare.split()) > 10


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_shows_what_the_notebooks_found(name: str) -> None:
    readme = (NOTEBOOKS.parent / name).read_text(encoding="utf-8")
    training, writing = output_of(read("04_scifi_train")), output_of(read("05_generate"))
    [bits] = re.findall(r"\*\*([\d.]+) (?:bits\s+per\s+byte|比特)\*\*", readme)
    assert re.findall(r"bits/byte ([\d.]+)", training)[-1] == bits
    [sample] = re.findall(r"^> (却说曹操.*)$", readme, re.MULTILINE)
    assert sample in writing


def test_the_committed_toy_model_reverses_strings() -> None:
    """At full size; `run_nbval` trains for a few steps only."""
    text = output_of(read("03_toyreverse"))
    [tokens] = re.findall(r"([\d,]+) tokens of training, padding included", text)
    assert int(tokens.replace(",", "")) <= 3_500_000
    [percent] = re.findall(r"exact match on 10,000 held-out strings of 32 characters: ([\d.]+)%", text)
    assert float(percent) >= 99.9
    [of_three] = re.findall(r"12 characters, 3 different: ([\d.]+)% of 10,000", text)
    others = re.findall(r"\d+ characters, \d different: ([\d.]+)% of 2,000", text)
    assert float(of_three) >= 99.9 and len(others) == 4 and min(map(float, others)) >= 99.5
    tried = re.findall(r"^(\w+) +(\w+) +(\w+) +✓$", text, re.MULTILINE)
    assert len(tried) == 9 and "abcabcXYZ999" in {prompt for prompt, *_ in tried} and "✗" not in text
    assert all(prompt[::-1] == truth == answer for prompt, truth, answer in tried)


def test_the_committed_language_model_beats_xz_and_4_grams() -> None:
    """At full size; `run_nbval` trains for a few steps only."""
    text = output_of(read("04_scifi_train"))
    [validation] = re.findall(r"^validation: .* ([\d.]+) bits per byte$", text, re.MULTILINE)
    assert float(validation) <= 1.95
    xz, four_grams, model = (
        float(*re.findall(rf"^{name} +([\d.]+) bits per byte$", text, re.MULTILINE))
        for name in ("xz, training text known", "4-grams of the same tokens", "scifi-mini")
    )
    assert model < xz and model < four_grams
    costs = [
        *re.findall(r"^tokens +([\d,]+)$", text, re.MULTILINE),
        *re.findall(r"^compute +(\S+) FLOPs$", text, re.MULTILINE),
    ]
    assert costs == ["2,048,000", "3.36e+13"]
    assert "it reads the training text 4.5 times" in text
    assert "0.8 tokens for each" in text and "0.5M parameters, 10.6M tokens" in text


def test_both_readmes_name_the_same_files_and_presets() -> None:
    english, chinese = (
        (NOTEBOOKS.parent / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
    )
    for pattern in (r"notebooks/0\d\w+\.ipynb", r"^\| `[\w.-]+` \| [\d.]+[MB] \| \d+ \|", r"^make \w+|^papermill .*"):
        found = [re.findall(pattern, text, re.MULTILINE) for text in (english, chinese)]
        assert found[0] == found[1] and found[0], pattern


def test_the_readmes_pictures_exist_and_are_small() -> None:
    readme = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    pictures = [NOTEBOOKS.parent / path for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", readme)]
    assert len(pictures) == 5
    assert all(path.stat().st_size < 250_000 for path in pictures)


def run_nbval(notebook: Path, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    environment = {**os.environ, "LLM_WORKBOOK_ROOT": str(root)}
    return subprocess.run([*command, str(notebook)], env=environment, capture_output=True, text=True)


@pytest.fixture
def root(tmp_path: Path, sanguo: Path) -> Path:
    """A project root of its own, with the corpus in it, so that a run leaves nothing in the real outputs."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sanguo").symlink_to(sanguo)
    return tmp_path


@pytest.mark.slow
def test_nbval_notices_one_changed_output(root: Path) -> None:
    notebook = read("01_tokenize")
    cell = next(c for c in code_cells(notebook) if "nbval-check-output" in c.metadata.get("tags", []))
    cell.outputs[0].text = cell.outputs[0].text.replace("120 documents", "121 documents")
    changed = root / "changed.ipynb"
    nbformat.write(notebook, changed)
    result = run_nbval(changed, root)
    assert result.returncode == 1
    assert "1 failed" in result.stdout
    assert "121 document" in result.stdout


def papermill_run(name: str, root: Path, **parameters: object) -> NotebookNode:
    """Run a notebook headless, as `papermill notebooks/<name>.ipynb ... -p key value` does."""
    return papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb", root / f"{name}.ipynb", parameters=parameters, progress_bar=False, cwd=root
    )


def output_of(notebook: NotebookNode) -> str:
    return "".join(o.text for c in code_cells(notebook) for o in c.outputs if o.output_type == "stream")


@pytest.mark.slow
def test_the_chain_runs_headless_on_other_texts_and_parameters(
    tmp_path: Path, english: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_WORKBOOK_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = {"data_dir": str(english)}
    one = papermill_run("01_tokenize", tmp_path, **text, vocab_size=400, character_coverage=1.0, model_prefix="tok/en")
    assert "5 documents" in output_of(one)
    assert (tmp_path / "tok" / "en.model").is_file()
    files = {"tokenizer_model_file": "tok/en.model", "dataset_dir": "tokens"}
    two = papermill_run("02_dataset", tmp_path, **text, **files, context_size=32, val_fraction=0.2)
    assert "x (4, 32)" in output_of(two)
    run = {"max_steps": 12, "context_size": 32, "project": "english", "output_dir": "runs", "prompt": "The "}
    run |= {"dim": 64, "n_layers": 2}
    papermill_run(
        "04_scifi_train", tmp_path, **text, **files, **run, preset="scifi-mini", device="cpu", batch_size="16"
    )
    run["max_steps"] = 14
    more = {"checkpoint_dir": "runs/english", "init_step": 12}
    again = {"batch_size": 16, "precision": "fp32", "thorough": False}  # the first run has measured all there is
    four = papermill_run("04_scifi_train", tmp_path, **text, **files, **run, **more, **again)
    assert "every step is in the metrics once" in output_of(four)
    assert re.search(r"step 12: \d.*% recited \(held-out text: .*\), \d.* tokens continued", output_of(four))
    last = {"output_dir": "runs", "checkpoint_dir": "best", "dataset_dir": "tokens", "device": "cpu"}
    five = papermill_run("05_generate", tmp_path, **last, max_new_tokens=8, prompt="The ", temperature=0.7)
    assert "streamed or not, the same seed writes the same text" in output_of(five)
    assert "the model's longest run" in output_of(five) and "left out" not in output_of(five)


@pytest.mark.slow
def test_the_toy_runs_headless_with_other_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_WORKBOOK_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    toy = papermill_run("03_toyreverse", tmp_path, max_steps=10, test_strings=20, prompt="abc", seed=1)
    assert "abc" in output_of(toy)


# Each dictionary is one run of a notebook: its error names all that is wrong.
WRONG: list[tuple[str, dict[str, object]]] = [
    (
        "01_tokenize",
        {"data_dir": "no/such/folder", "vocab_size": 12, "vocab_sise": 4000, "character_coverage": 1.5},
    ),
    ("01_tokenize", {"vocab_size": "many"}),
    (
        "02_dataset",
        {
            "context_size": 0,
            "val_fraction": float("nan"),
            "tokenizer_model_file": "nothing.model",
            "errors": "ignore",
        },
    ),
    ("02_dataset", {"context_size": 100_000_000}),
    ("03_toyreverse", {"max_steps": -1, "output_dir": str(Path(__file__))}),
    (
        "04_scifi_train",
        {
            "preset": "scifi-117",
            "device": "gpu",
            "precision": "int8",
            "learning_rate": -0.1,
            "checkpoint_dir": "no/such/run",
            "project": "../../x",
            "dim": 0,
            "n_layers": 0,
        },
    ),
    (
        "05_generate",
        {
            "checkpoint_dir": "no/such/run",
            "max_new_tokens": -5,
            "temperature": "hot",
            "top_p": 5,
            "device": "cuda:99",
        },
    ),
    ("06_scaling", {"dims": "12 wide", "budgets": "1e12 -3", "workers": 0}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), WRONG)
def test_wrong_parameters_end_the_run_at_once_and_are_named(
    name: str, parameters: dict[str, object], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_WORKBOOK_ROOT", str(root))
    with pytest.raises(PapermillExecutionError) as error:
        papermill_run(name, root, **parameters)
    assert error.value.ename == "ParameterError"
    for parameter in parameters:
        assert re.search(rf"(^|; |unknown parameter ){parameter}[=:]", error.value.evalue), parameter
    assert not (root / "outputs").exists(), "something was written before the error"


def test_every_test_named_for_a_fault_exists() -> None:
    here = Path(__file__).parent
    rows = [line for line in (here / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    named = [
        (file, name)
        for row in rows
        for part in row.split("|")[2].split(";")
        if (file := part.strip().split(":")[0]) and (here / f"test_{file}.py").exists()
        for name in re.findall(r"`(\w+)`", part)
    ]
    assert len(named) > 50
    missing = [name for name in named if f"def test_{name[1]}(" not in (here / f"test_{name[0]}.py").read_text()]
    assert missing == []
