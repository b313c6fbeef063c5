"""A folder among the runs that is no run, or a broken one, is listed with the reason; the others are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcore.measure.compare_runs import find_runs, summarize, validations
from llmcore.measure.sweep import SweepError, finished
from llmcore.notebook import plots
from llmcore.notebook.run_page import write_index
from llmcore.notebook.widgets import run_table

from .helpers import quick, trainer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "good"
    trainer(folder, quick(max_steps=2, eval_interval=1)).fit()
    return folder


def changed(folder: Path, good: Path, **changes: Any) -> None:
    config = json.loads((good / "config.json").read_text(encoding="utf-8"))
    for place, value in changes.items():
        group, _, field = place.partition("__")
        if field:
            config[group][field] = value
        else:
            config[group] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def with_event(folder: Path, good: Path, **changes: Any) -> None:
    changed(folder, good)
    event = {"step": 1, "tokens": 10, "seconds": 1.0, "loss": 3.0, "val_loss": 3.0, **changes}
    kept = {name: value for name, value in event.items() if value != "left out"}
    (folder / "metrics.jsonl").write_text(json.dumps(kept) + "\n", encoding="utf-8")


def as_folder(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


def text(words: str) -> Callable[[Path, Path], Any]:
    return lambda folder, good: (folder / "config.json").write_text(words, encoding="utf-8")


NO_EVENT = "it holds no whole event"
ODD: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "empty object": (text("{}"), "'model' is a required property"),
    "no JSON": (text("{"), "is not JSON"),
    "a list": (text("[1]"), "is not of type 'object'"),
    "nested without end": (text("[" * 100_000), "nested too deeply"),
    "no UTF-8": (lambda folder, good: (folder / "config.json").write_bytes(b'"\xff"'), "is not JSON"),
    "newer version": (lambda f, g: changed(f, g, model__width_of_tomorrow=3), "width_of_tomorrow"),
    "words for numbers": (lambda f, g: changed(f, g, model__dim="32"), "model.dim: '32' is not of type 'integer'"),
    "a model of 1e400": (lambda f, g: changed(f, g, model__hidden_dim=10**400), "model.hidden_dim"),
    "steps as text": (lambda f, g: changed(f, g, train__max_steps="6"), "train.max_steps"),
    "train is a list": (lambda f, g: changed(f, g, train=[]), "train: [] is not of type 'object'"),
    "config is a folder": (lambda f, g: as_folder(f, "config.json"), "it is no file"),
    "metrics is a folder": (lambda f, g: (changed(f, g), as_folder(f, "metrics.jsonl")), "it is no file"),
    "a huge file": (lambda f, g: (f / "config.json").write_bytes(b" " * 10_000_001), "at most 10 MB"),
    "no tokens": (lambda f, g: with_event(f, g, tokens="left out"), NO_EVENT),
    "seconds as text": (lambda f, g: with_event(f, g, seconds="1"), NO_EVENT),
    "step 1e400": (lambda f, g: with_event(f, g, step=10**400), NO_EVENT),
    "loss null": (lambda f, g: with_event(f, g, val_loss=None), NO_EVENT),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_folder_is_listed_with_its_reason_beside_the_others(kind: str, tmp_path: Path, good: Path) -> None:
    make, reason = ODD[kind]
    (tmp_path / "good").symlink_to(good)
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "metrics.jsonl").write_text("", encoding="utf-8")
    make(odd, good)
    assert find_runs(tmp_path) == [odd]  # links are not followed
    runs = [odd, good]
    bad, fine = summarize(runs)
    assert bad["preset"].startswith("unreadable: ") and reason in bad["preset"]
    assert fine == summarize([good])[0] and bad.keys() == fine.keys()
    assert "unreadable" in run_table(runs).data and "good" in run_table(runs).data
    index = write_index(tmp_path).read_text(encoding="utf-8")
    assert "unreadable" in index
    figure = plots.compare_runs(runs)
    assert len(figure.axes[0].get_lines()) == 1 and "unreadable: odd" in figure.get_suptitle()
    with pytest.raises((OSError, ValueError)):
        validations(odd)
    with pytest.raises(SweepError, match=r"odd.* holds a run that cannot be read"):
        finished(odd, {})


def test_lines_that_are_no_events_do_not_hide_the_rest(tmp_path: Path, good: Path) -> None:
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    lines = (good / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    odd = ["5", "[]", '"words"', "null", "{}", '{"step": 1}', '{"step": "1", "tokens": 1, "seconds": 1}', "{", "\0"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*odd, *lines, *odd]) + "\n", encoding="utf-8")
    assert validations(tmp_path) == validations(good)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_in_any_place_is_shown_or_called_unreadable(data: st.DataObject, tmp_path: Path, good: Path) -> None:
    config = json.loads((good / "config.json").read_text(encoding="utf-8"))
    group = data.draw(st.sampled_from(sorted(config)))
    inner = config[group] if isinstance(config[group], dict) and data.draw(st.booleans()) else {}
    place, name = (inner, data.draw(st.sampled_from(sorted(inner)))) if inner else (config, group)
    place[name] = data.draw(JSON)
    event = json.loads((good / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    event[data.draw(st.sampled_from(sorted(event)))] = data.draw(JSON)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    [row, fine] = summarize([tmp_path, good])
    assert fine["preset"] == "–" and row["run"] == tmp_path.name
    plots.compare_runs([tmp_path, good])
    write_index(tmp_path)


@pytest.mark.parametrize("cost", ["seconds", "tokens"])
def test_a_run_that_cost_nothing_is_drawn_beside_others(tmp_path: Path, good: Path, cost: str) -> None:
    changed(tmp_path, good)
    events = [
        json.loads(line) | {cost: 0} for line in (good / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events), encoding="utf-8")
    assert len(plots.compare_runs([tmp_path, good]).axes[0].get_lines()) == 2
