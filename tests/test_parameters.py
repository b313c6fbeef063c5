"""Notebook parameters are coerced where they are meant well, and refused by name where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.files import PROJECT_ROOT
from llmcore.parameters import PARAMETERS, ParameterError, check_parameters


def checked(**values: Any) -> dict[str, Any]:
    check_parameters(values, " ".join(values))
    return values


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
        ("precision", "int8"), ("preset", "scifi-117"), ("prompt", 3), ("project", None), ("data_dir", "no/such"),
        ("data_dir", ""), ("data_dir", 7), ("tokenizer_model_file", "no.model"), ("checkpoint_dir", "no/such"),
        ("tracker", "mlflow"), ("seed", -1), ("init_step", -3), ("val_fraction", 1), ("character_coverage", 0.5),
        ("dim", 1), ("n_layers", 0), ("n_heads", 2.5), ("dims", ""), ("dims", "16 wide"), ("dims", 16),
        ("dims", "16 0"), ("budgets", "1e12 nan"), ("budgets", []), ("workers", 0), ("min_steps", -1),
        ("held_back_epochs", 0), ("weight_decay", -0.1),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=f"^{name}"):
        checked(**{name: value})


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(PARAMETERS)), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
def test_any_value_is_taken_or_refused_by_name(name: str, value: object) -> None:
    try:
        checked(**{name: value})
    except ParameterError as error:
        assert name in str(error)


def test_all_faults_are_named_at_once_with_the_nearest_known_names() -> None:
    values: dict[str, Any] = {"vocab_size": 1, "device": "cud", "In": ["x = 1", "# Parameters\nvocab_sise = 9\n"]}
    with pytest.raises(ParameterError) as error:
        check_parameters(values, "vocab_size device")
    message = str(error.value)
    assert "vocab_size=1 must be between 262 and" in message
    assert "did you mean cuda" in message
    assert "unknown parameter vocab_sise: did you mean vocab_size" in message


def test_a_known_corpus_need_not_exist_yet(tmp_path: Path) -> None:
    assert checked(data_dir=str(tmp_path / "scifi"))["data_dir"] == tmp_path / "scifi"
