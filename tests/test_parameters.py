"""Notebook parameters are coerced where they are meant well, and refused by name where they are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

from llmcore.files import PROJECT_ROOT
from llmcore.notebook.parameters import PARAMETERS, ParameterError, check_parameters

from .helpers import examples


def parameters_cell(*names: str) -> str:
    return "\n".join(f"{name}: object = None  # what it is for" for name in names)


def checked(**values: Any) -> dict[str, Any]:
    namespace = {**values, "In": ["", parameters_cell(*values), "check_parameters(globals())"]}
    check_parameters(namespace)
    return namespace


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("vocab_size", "8000", 8000),
        ("vocab_size", 8000.0, 8000),
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", None, None),
        ("learning_rate", 1, 1.0),
        ("top_k", "None", None),
        ("output_dir", "outputs/runs", PROJECT_ROOT / "outputs" / "runs"),
        ("checkpoint_dir", "latest", "latest"),
        ("checkpoint_dir", "notebooks", PROJECT_ROOT / "notebooks"),
        ("prompt", "", ""),
        ("tracker", "none", None),
        ("tracker", "wandb", "wandb"),
        ("preset", "scifi-117M", "scifi-117M"),
        ("dims", "16 32", [16, 32]),
        ("dims", [16.0, "32"], [16, 32]),
        ("budgets", "1e9 2.5e9", [1e9, 2.5e9]),
        ("dim", "none", None),
        ("vocab_size", "3.0e3", 3000),
        ("vocab_size", " 8e3 ", 8000),
        ("max_steps", "1_000", 1000),
        ("grad_accum_steps", 4.0, 4),
        ("project", 2024, "2024"),
        ("project", 1.5, "1.5"),
        ("project", "三国 No. 1", "三国 No. 1"),
        ("prompt", 3, "3"),
        ("prompt", True, "True"),
        ("prompt", "None", "None"),
        ("output_dir", 2024, PROJECT_ROOT / "2024"),
    ],
)
def test_values_get_their_right_types(name: str, given: object, meant: object) -> None:
    value = checked(**{name: given})[name]
    assert value == meant
    assert type(value) is type(meant)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 12), ("vocab_size", -8000), ("vocab_size", 8000.5), ("vocab_size", True), ("vocab_size", None),
        ("vocab_size", "many"), ("vocab_size", [4000]), ("vocab_size", 10**12), ("learning_rate", float("nan")),
        ("learning_rate", "inf"), ("learning_rate", 0), ("temperature", -1), ("temperature", "hot"), ("top_p", 5),
        ("top_p", 0), ("top_k", 0), ("min_p", 2), ("max_new_tokens", -1), ("device", "gpu"), ("device", None),
        ("precision", "int8"), ("preset", "scifi-117"), ("project", None), ("data_dir", "no/such"),
        ("data_dir", ""), ("data_dir", 7), ("tokenizer_model_file", "no.model"), ("checkpoint_dir", "no/such"),
        ("tracker", "mlflow"), ("seed", -1), ("init_step", -3), ("val_fraction", 1), ("character_coverage", 0.5),
        ("dim", 1), ("n_layers", 0), ("n_heads", 2.5), ("dims", ""), ("dims", "16 wide"), ("dims", 16),
        ("dims", "16 0"), ("budgets", "1e12 nan"), ("budgets", []), ("workers", 0), ("min_steps", -1),
        ("held_back_epochs", 0), ("weight_decay", -0.1), ("seed", 10**400), ("seed", "9" * 5000),
        pytest.param("seed", 10**5000, id="seed-5000-digits"),
        pytest.param("project", 10**5000, id="project-5000-digits"),
        ("learning_rate", 10**400), ("vocab_size", "3.0005e3"), ("vocab_size", {}), ("prompt", ["a"]), ("prompt", None),
        ("prompt", "half \ud83d of it"), ("output_dir", "a\0b"), ("output_dir", "x" * 300), ("output_dir", "a/" * 5000),
        ("output_dir", "~nobody-of-this-name/x"), ("output_dir", "\ud800"), ("dataset_dir", "README.md/inside"),
        ("dims", "1e400"), ("dims", [True]), ("project", ""), ("project", " "), ("project", "."), ("project", ".."),
        ("project", "../../x"), ("project", "/tmp/x"), ("project", "a/b"), ("project", "a\\b"), ("project", "a\0b"),
        ("project", "a\nb"), ("project", "\x1b[31m"), ("project", "a\u202eb"), ("project", "x" * 300),
        ("project", "史" * 100), ("project", "\udcff"), ("project", "con"), ("project", "NUL.txt"), ("project", "a:b"),
        ("project", "ends."), ("project", " space"), ("project", ["a"]),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=f"^{name}") as error:
        checked(**{name: value})
    message = str(error.value)
    assert len(message) < 1000 and (message.isprintable() or ("\n" not in message and "\x1b" not in message))


@pytest.mark.parametrize(
    ("name", "value"), [("checkpoint_dir", "latest"), ("checkpoint_dir", "notebooks"), ("dim", 64), ("n_layers", "2")]
)
def test_what_the_first_model_decides_cannot_be_set_beside_it(name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=f"{name}=.* cannot be set with init_from"):
        checked(init_from="data/smollm2", **{name: value})
    assert checked(init_from="none", **{name: value})["init_from"] is None


def test_a_start_from_a_model_needs_no_tokenizer_and_may_go_on_by_itself() -> None:
    values = {"init_from": "data/smollm2", "tokenizer_model_file": "no.model", "checkpoint_dir": "auto"}
    assert checked(**values)["checkpoint_dir"] == "auto"
    with pytest.raises(ParameterError, match=r"tokenizer_model_file='no.model'"):
        checked(**{**values, "init_from": "None"})


def test_a_share_of_old_text_needs_a_folder_of_it() -> None:
    assert checked(replay_fraction=0.25, replay_dir="notebooks")["replay_fraction"] == 0.25
    with pytest.raises(ParameterError, match="replay_fraction needs replay_dir"):
        checked(replay_fraction=0.25, replay_dir=None)


def test_a_missing_path_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="looked for ") as error:
        checked(tokenizer_model_file="outputs/no-such.model")
    assert repr(str(PROJECT_ROOT / "outputs" / "no-such.model")) in str(error.value)
    with pytest.raises(ParameterError, match="looked for ") as error:
        checked(data_dir=str(tmp_path / "none"))
    assert repr(str(tmp_path / "none")) in str(error.value) and "relative" not in str(error.value)


@settings(deadline=None)
@given(name=st.text(max_size=250))
def test_every_project_that_is_taken_names_a_folder_right_there(tmp_path_factory: Any, name: str) -> None:
    try:
        project = checked(project=name)["project"]
    except ParameterError:
        return
    parent = tmp_path_factory.mktemp("p")
    (parent / project).mkdir()
    (parent / f"{project}.ipynb").touch()
    assert {path.name for path in parent.iterdir()} == {project, f"{project}.ipynb"}


@settings(deadline=None, max_examples=examples(200))
@given(st.sampled_from(sorted(PARAMETERS)), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
def test_any_value_is_taken_or_refused_by_name(name: str, value: object) -> None:
    try:
        checked(**{name: value})
    except ParameterError as error:
        assert name in str(error)


def test_all_faults_are_named_at_once_with_the_nearest_known_names() -> None:
    cells = [parameters_cell("vocab_size", "device"), "# Parameters\nvocab_sise = 9\n"]
    with pytest.raises(ParameterError) as error:
        check_parameters({"vocab_size": 1, "device": "cud", "In": cells})
    message = str(error.value)
    assert "vocab_size=1 must be between 262 and" in message
    assert "did you mean cuda" in message
    assert "unknown parameter vocab_sise: did you mean vocab_size" in message


@pytest.mark.parametrize(
    "given",
    [
        {"max_steps": 10, "epochs": 2.0},
        {"tokens_per_step": 4096, "batch_size": 4, "grad_accum_steps": 2},
    ],
)
def test_parameters_that_decide_each_other_are_refused_together(given: dict[str, object]) -> None:
    with pytest.raises(ParameterError) as error:
        checked(**given)
    for name, value in given.items():
        assert f"{name}={value}" in str(error.value)
        assert checked(**{**given, name: None})[name] is None


def test_the_latest_run_of_the_parameters_cell_counts() -> None:
    injected = "# Parameters\nsed = 1\n"
    cells = ["", parameters_cell("seed"), injected, "check_parameters(globals())", "%%time\nx", "seed: int = 1\nx = 2"]
    with pytest.raises(ParameterError, match="unknown parameter sed: did you mean seed"):
        check_parameters({"seed": 0, "In": cells})

    namespace = {"seed": "0", "In": [*cells, "# Parameters\nseed = 0\n"]}  # the typing error is mended
    check_parameters(namespace)
    assert namespace["seed"] == 0

    namespace = {"seed": "0", "device": "cpu", "In": [*cells, parameters_cell("seed", "device")]}
    check_parameters(namespace)
    assert namespace["seed"] == 0


def test_parameters_of_the_readers_own_are_left_alone() -> None:
    assert checked(seed="3", note=["mine"])["note"] == ["mine"]


def test_without_the_parameters_cell_the_error_says_so() -> None:
    with pytest.raises(ParameterError, match="run the cell with the parameters first"):
        check_parameters({"In": ["", "check_parameters(globals())"]})


def test_in_a_kernel_the_names_come_from_the_history() -> None:
    shell = InteractiveShell()
    for cell in ("seed: int = '7'  # of everything", "from llmcore.notebook.parameters import check_parameters"):
        shell.run_cell(cell, store_history=True).raise_error()
    shell.run_cell("check_parameters(globals())", store_history=True).raise_error()
    assert shell.user_ns["seed"] == 7
    shell.run_cell("# Parameters\nsede = 1\n", store_history=True).raise_error()
    with pytest.raises(ParameterError, match="unknown parameter sede"):
        shell.run_cell("check_parameters(globals())", store_history=True).raise_error()


@pytest.mark.parametrize("file", sorted((PROJECT_ROOT / "notebooks").glob("*.py")), ids=lambda file: file.stem)
def test_every_parameter_of_the_notebooks_is_known(file: Path) -> None:
    source = file.read_text(encoding="utf-8").split('# %% tags=["parameters"]\n')[1].split("# %%")[0]
    assert set(re.findall(r"^(\w+):", source, re.MULTILINE)) <= set(PARAMETERS)


def test_a_known_corpus_need_not_exist_yet(tmp_path: Path) -> None:
    assert checked(data_dir=str(tmp_path / "scifi"))["data_dir"] == tmp_path / "scifi"
