"""The dashboard and the explorers, used as a person uses them: values set, buttons clicked, results read."""

from __future__ import annotations

import asyncio
import html
import itertools
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pytest
import torch
from IPython.display import HTML

from llmcore.checkpoint import Checkpoint, checkpoints, save_checkpoint
from llmcore.config import ModelConfig
from llmcore.corpus.library import open_library
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.dataset import TokenDataset
from llmcore.generate import generate
from llmcore.model import Transformer
from llmcore.notebook import toy_reverse
from llmcore.notebook.dashboard import TrainingDashboard, duration, run_status
from llmcore.notebook.drafts import odds, remake
from llmcore.notebook.explorers import DataExplorer, ReversalExplorer, TokenExplorer
from llmcore.notebook.plots import png
from llmcore.notebook.safe_html import boxes, html_text, piece_text, table, visible
from llmcore.notebook.story import Passage, Story, open_story
from llmcore.notebook.widgets import run_table
from llmcore.notebook.writing import WritingDesk
from llmcore.runs import read_metrics
from llmcore.tokenizer import Tokenizer
from llmcore.train import Event, Trainer

from .helpers import quick, tiny_model, trainer

HOSTILE = "<script>window.owned = true</script> \x1b[31mred\x1b[0m <img src=x onerror=alert(1)> \u202eback & \x00 $x$"


def words(markup: str) -> str:
    """What a reader sees of some HTML."""
    return html.unescape(re.sub(r"<[^>]*>", " ", markup))


def tags(markup: str) -> set[str]:
    return set(re.findall(r"<\s*/?\s*(\w+)", markup))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_WORKBOOK_WATCHED", "1")


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_WORKBOOK_WATCHED", "0")


class Screen:
    """What `display` was given, in order, and what was put in its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[Any] = []
        monkeypatch.setattr("llmcore.notebook.dashboard.display", self.display)

    def display(self, thing: Any, **_: Any) -> Screen:
        self.shown.append(thing)
        return self

    def update(self, thing: Any) -> None:
        self.shown[-1] = thing


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch)


class Person:
    """Does one thing after another between the steps of a run, each as soon as its condition holds."""

    def __init__(self, run: Trainer) -> None:
        self.run, self.dashboard = run, TrainingDashboard("a run")

    async def act(self, *acts: tuple[Callable[[], bool], Callable[[], None]]) -> None:
        async def play() -> None:
            for condition, deed in acts:
                while not condition():
                    await asyncio.sleep(0)
                deed()

        await asyncio.wait_for(asyncio.gather(self.dashboard.run(self.run), play()), 120)

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in words(self.dashboard.status.value)


# Safety


def test_nothing_from_outside_acts() -> None:
    for shown in (html_text(HOSTILE), boxes([HOSTILE], [HOSTILE], [HOSTILE]), table([{HOSTILE: HOSTILE}], HOSTILE)):
        assert not tags(shown) & {"script", "img"}
        assert not set(shown) & {"\x1b", "\x00", "\u202e"}
    assert "⟨1B⟩[31mred⟨1B⟩[0m" in visible(HOSTILE) and visible("一\n二\t三 ⏎ é🙂") == "一\n二\t三 ⏎ é🙂"
    bare = re.sub(r"<[^>]*>", "", boxes(["曹操", "大⏎", "怒"], ["7", "8", "9"]))  # what code hosts leave of it
    assert bare.split() == ["曹操", "7", "大⏎", "8", "怒", "9"]
    assert boxes(["曹操", "大"]).count("<code") == 2  # code hosts drop styles and keep code apart from other text
    hint = re.search(r'title="([^"]*)"', boxes(["a"], hints=['" onmouseover="alert(1)']))
    assert hint and html.unescape(hint[1]) == '" onmouseover="alert(1)'


def test_bytes_that_are_letters_show_as_letters(tokenizer: Tokenizer) -> None:
    shown = [piece_text(tokenizer, id) for id in tokenizer.encode("GPT 龘\x07")]
    assert shown == ["G", "P", "T", "␣", "⟨E9⟩", "⟨BE⟩", "⟨98⟩", "⟨07⟩"]


def test_chinese_has_the_english_of_its_words_beside_it(tokenizer: Tokenizer) -> None:
    explorer = TokenExplorer({"one": tokenizer}, "却说曹操引兵，曹操大怒。")
    assert "In English: 却说曹操 now, Cao Cao · 引兵 led troops · 曹操 Cao Cao" in words(explorer.result.value)
    explorer.text.value = "no Chinese"
    assert "In English" not in explorer.result.value


# The dashboard


def test_headless_prints_each_validation_and_leaves_one_picture(
    tmp_path: Path, headless: None, screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=6, eval_interval=2))
    dashboard = TrainingDashboard("a run")
    asyncio.run(dashboard.run(run))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    assert max(map(len, lines)) < 110, "a line is wider than the page"
    assert all("validation" in line and "bits/byte" in line and "memory" in line for line in lines)
    [figure] = screen.shown
    [x, _] = figure.axes[0].get_lines()[0].get_data()
    assert list(x) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "curves.png").read_bytes() == png(figure)
    assert dashboard.panel is None


def test_pause_resume_and_stop(tmp_path: Path, watched: None, screen: Screen) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=100_000))
    person = Person(run)
    board, at = person.dashboard, []

    def paused() -> None:
        at.append((run.step, len(read_metrics(run.run_dir)), board.pause_button.disabled, board.resume_button.disabled))
        board.resume_button.click()

    asyncio.run(
        person.act(
            (lambda: run.step >= 3, lambda: board.pause_button.click()),
            (person.says("paused at step"), paused),
            (lambda: run.step >= at[0][0] + 3, lambda: board.stop_button.click()),
        )
    )
    [(step, lines, cannot_pause, cannot_resume)] = at
    assert step == lines and cannot_pause and not cannot_resume
    assert run.result().stopped_early and run.last_checkpoint
    assert read_metrics(run.run_dir)[-1]["step"] == run.step == checkpoint_step(run)
    assert "stopped at step" in words(board.status.value) and board.stop_button.disabled
    assert f"{run.step:,}/100,000" in words(board.numbers.value)
    assert not isinstance(screen.shown[-1], dict), "the panel was not replaced by a picture"


def test_what_a_page_sends_during_a_step_has_acted_before_the_next(
    tmp_path: Path, watched: None, screen: Screen
) -> None:
    sent, acted = [], []

    async def message() -> None:
        for _ in range(8):  # what a reopened page asks takes about seven, in ipykernel 7.4
            await asyncio.sleep(0)
        acted.append(run.step)

    async def train() -> None:
        def step_done(_: Event) -> None:
            sent.append(asyncio.get_running_loop().create_task(message()))

        run.callbacks.append(step_done)
        await TrainingDashboard("a run").run(run)

    run = trainer(tmp_path / "run", quick(max_steps=5))
    asyncio.run(train())
    assert acted == [1, 2, 3, 4, 5]


def test_drawing_takes_a_hundredth_of_the_time(
    tmp_path: Path, watched: None, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, drawn = 0.0, []
    monkeypatch.setattr("llmcore.notebook.dashboard.time", types.SimpleNamespace(perf_counter=lambda: now))

    def picture_changed(_: Any) -> None:
        nonlocal now
        drawn.append(now)
        now += 0.5

    def step_done(event: Event) -> None:
        nonlocal now
        if event["step"] == 1:
            board.picture.observe(picture_changed, "value")
        now += 1.0

    run, board = trainer(tmp_path / "run", quick(max_steps=160), callbacks=[step_done]), TrainingDashboard("a run")
    asyncio.run(board.run(run))
    *while_running, _ = drawn  # the last one is drawn at the end
    assert len(while_running) >= 3 and all(b - a >= 50 for a, b in itertools.pairwise(while_running))
    assert board.overhead == pytest.approx(0.5 * len(while_running) / (160 + 0.5 * len(while_running)))


def checkpoint_step(run: Trainer) -> int:
    return int(checkpoints(run.run_dir)[-1].name.split("=")[1].split("_")[0])


def test_a_paused_run_saves_and_samples_at_once(tmp_path: Path, watched: None, screen: Screen) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=100_000), sampler=lambda prompt: prompt[::-1] + HOSTILE)
    person = Person(run)
    board = person.dashboard

    def ask() -> None:
        board.prompt.value = "<b>曹操"
        board.sample_button.click()
        board.save_button.click()

    asyncio.run(
        person.act(
            (lambda: run.step >= 2, lambda: board.pause_button.click()),
            (person.says("paused at step"), ask),
            (
                lambda: "操曹" in board.sample.value and bool(checkpoints(run.run_dir)),
                lambda: board.stop_button.click(),
            ),
        )
    )
    assert checkpoint_step(run) == run.step, "stop took a step although the run was paused"
    assert not tags(board.sample.value) & {"script", "img"} and "\x1b" not in board.sample.value
    assert "<b>曹操" in words(board.sample.value)


def test_text_that_arrives_just_after_the_click_is_sampled(tmp_path: Path, watched: None, screen: Screen) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=100_000), sampler=lambda prompt: prompt[::-1])
    person = Person(run)
    board = person.dashboard

    def ask() -> None:  # ipykernel may handle the message of the button before that of the box
        board.sample_button.click()
        board.prompt.value = "曹操"

    asyncio.run(
        person.act(
            (lambda: run.step >= 2, lambda: board.pause_button.click()),
            (person.says("paused at step"), ask),
            (lambda: "after step" in board.sample.value, lambda: board.stop_button.click()),
        )
    )
    assert "操曹" in board.sample.value


def test_of_a_long_prompt_the_dashboard_shows_the_end(tmp_path: Path, watched: None, screen: Screen) -> None:
    config = quick(max_steps=2, sample_interval=1, sample_prompt="曹" * 200_000 + "操")
    board = TrainingDashboard()
    asyncio.run(board.run(trainer(tmp_path / "run", config, sampler=lambda prompt: "written")))
    shown = words(board.sample.value)
    assert "characters) …曹" in shown and "操 written" in shown and len(board.sample.value) < 2000


def test_a_prompt_that_cannot_be_sampled_is_said_and_the_run_goes_on(
    tmp_path: Path, watched: None, screen: Screen
) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=100_000), sampler=lambda text: "".join(toy_reverse.encode(text)))
    person = Person(run)
    board = person.dashboard

    def ask() -> None:
        board.prompt.value = "曹"
        board.sample_button.click()

    told = "'曹' is neither an ASCII letter nor a digit"
    asyncio.run(
        person.act(
            (lambda: run.step >= 2, ask),
            (lambda: told in words(board.sample.value), lambda: board.stop_button.click()),
        )
    )
    assert [event for event in read_metrics(run.run_dir) if told in event.get("sample", "")]


def test_run_again_goes_on_with_the_whole_curve(tmp_path: Path, watched: None, screen: Screen) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=12))
    run.callbacks.append(lambda event: run.request_stop() if event["step"] == 5 else None)
    for steps in (5, 12, 12):  # the third time there is nothing left to do
        board = TrainingDashboard("again")
        asyncio.run(board.run(run))
        assert [event["step"] for event in board.events] == list(range(1, steps + 1))
        assert list(screen.shown[-1].axes[0].get_lines()[0].get_xdata()) == list(range(1, steps + 1))
    assert len(read_metrics(run.run_dir)) == 12
    assert "finished" in words(board.status.value)


def test_an_error_in_training_is_said_and_raised(tmp_path: Path, watched: None, screen: Screen) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=12))

    def fail(event: Event) -> None:
        if event["step"] == 4:
            raise ZeroDivisionError

    run.callbacks.append(fail)
    board = TrainingDashboard("fails")
    with pytest.raises(ZeroDivisionError):
        asyncio.run(board.run(run))
    assert "error" in words(board.status.value)
    assert checkpoint_step(run) == 4


def test_the_axis_of_steps_is_linear_or_logarithmic(tmp_path: Path, watched: None, screen: Screen) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=5))
    board = TrainingDashboard("axis")
    asyncio.run(board.run(run))
    before = board.picture.value
    board.log_x.value = True
    assert board.picture.value != before
    assert board.figure(log_x=True).axes[0].get_xscale() == "log" and board.figure().axes[0].get_xscale() == "linear"


def test_numbers_have_words_and_units(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=2000))
    event = {"step": 1500, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 0.25, "skipped": 3}
    said = run_status({**event, "tokens_per_second": 1e4, "val_loss": 3.0}, run, seconds_left=200)
    assert said["step"] == "1,500/2,000" and said["skipped"] == "3" and said["left"] == "3 min 20 s"
    assert said["validation"] == "3.000" and said["tokens/s"] == "10,000" and said["memory"].endswith(" GB")
    assert [duration(s) for s in (0.2, 59.6, 3600)] == ["0 s", "1 min 0 s", "1 h 0 min"]


# The explorers


def test_an_explorer_is_a_panel_to_a_person_and_html_to_everyone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = TokenExplorer({"one": tokenizer}, "曹操")
    view = "application/vnd.jupyter.widget-view+json"
    for seen in ("0", "1"):
        monkeypatch.setenv("LLM_WORKBOOK_WATCHED", seen)
        bundle = explorer._repr_mimebundle_()
        assert "曹操" in words(bundle["text/html"]) and (view in bundle) == (seen == "1")


def test_typed_text_is_shown_in_the_pieces_of_both_tokenizers(
    tokenizer: Tokenizer, english: Path, tmp_path: Path
) -> None:
    other = train_tokenizer(english.iterdir(), tmp_path / "en", 400, character_coverage=1.0)
    explorer = TokenExplorer({"<novel>": tokenizer, "english": other}, "")
    explorer.text.value = "曹操 the engines the\n" + HOSTILE
    shown = words(explorer.result.value)
    for each in (tokenizer, other):
        ids = each.encode(explorer.text.value)
        assert f"{len(ids)} tokens" in shown
        for id in ids:
            assert re.search(rf"{re.escape(piece_text(each, id))}\s+{id} · {len(each.id_to_bytes(id))} B", shown)
    assert re.search(r" the\s+\d+ · \d B · 2×", shown.replace("␣", " "))
    assert "<novel>" in shown and not tags(explorer.result.value) & {"script", "img", "novel"}
    assert "\x1b" not in explorer.result.value
    explorer.text.value = "\ud800"
    assert "surrogate" in words(explorer.result.value)


@pytest.fixture
def small_data(english: Path, tmp_path: Path) -> tuple[TokenDataset, Tokenizer]:
    texts = tmp_path / "texts"
    texts.mkdir()
    for file in english.iterdir():
        (texts / file.name).write_text(file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    (texts / "<b>hostile.txt").write_text(HOSTILE * 3, encoding="utf-8")
    library = open_library(texts, encoding="utf-8", clean=False)
    tok = train_tokenizer(library.kept, tmp_path / "en", 400, character_coverage=1.0)
    prepare_dataset(library, tok, tmp_path / "data", 0.2)
    return TokenDataset(tmp_path / "data", "train", 32), tok


@pytest.fixture
def small_library(tokenizer: Tokenizer, sanguo: Path, tmp_path: Path) -> TokenDataset:
    """The training tokens of two chapters."""
    (tmp_path / "novel").mkdir()
    for number, file in enumerate(sorted(sanguo.glob("*.txt"))[:3]):
        text = file.read_text(encoding="utf-8")[:2000]
        (tmp_path / "novel" / f"<b>{number:03}.txt").write_text(text, encoding="utf-8")
    prepare_dataset(open_library(tmp_path / "novel"), tokenizer, tmp_path / "tokens", 0.2)
    return TokenDataset(tmp_path / "tokens", "train", 32)


def test_windows_and_documents_begin_where_the_data_set_says(
    small_data: tuple[TokenDataset, Tokenizer],
) -> None:
    data, tok = small_data
    explorer = DataExplorer(data, tok)
    assert len(explorer.names) == len(data.offsets) - 1 > 2
    for number in range(data.n_windows):
        assert explorer.window.value == number
        ids = data.tokens[number * 32 : number * 32 + 32].tolist()
        pieces = re.findall(r'<span title="place (\d+), id (\d+)"', explorer.result.value)
        assert pieces == [(str(number * 32 + n), str(id)) for n, id in enumerate(ids)]
        begins = [int(o) for o in data.offsets[:-1] if number * 32 <= o < number * 32 + len(ids)]
        assert words(explorer.result.value).count(" begins") == len(begins)
        assert not tags(explorer.result.value) & {"script", "img"} and "\x1b" not in explorer.result.value
        explorer.next_button.click()
    explorer.next_button.click()
    assert explorer.window.value == data.n_windows - 1
    for name, offset in zip(explorer.names, data.offsets, strict=False):
        explorer.document.value = name
        assert explorer.window.value == min(int(offset) // 32, data.n_windows - 1)
        assert name in words(explorer.result.value)


def test_the_jump_box_says_what_it_does_not_find_and_what_is_near(small_data: tuple[TokenDataset, Tokenizer]) -> None:
    explorer = DataExplorer(*small_data)
    explorer.document.value = explorer.names[-1]
    place, page = explorer.window.value, explorer.result.value
    for typed, hint in (("STORY", "story-0.txt"), ("stroy-1.tx", "story-1.txt"), ("<img src=x>\x1b", "first of")):
        explorer.document.value = typed
        said = words(explorer.notice.value)
        assert "no document" in said and hint in said and html_text(typed) in explorer.notice.value
        assert not tags(explorer.notice.value) & {"img"}
        assert (explorer.window.value, explorer.result.value) == (place, page)
    for right in ("", f" {explorer.names[0]} "):
        explorer.document.value = right
        assert explorer.notice.value == ""


@pytest.fixture
def toy() -> Transformer:
    torch.manual_seed(0)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 3, "head_dim": 8, "hidden_dim": 48}
    return Transformer(ModelConfig(vocab_size=toy_reverse.VOCAB_SIZE, max_seq_len=80, **shape))


def test_each_head_is_shown_where_it_looks_most(toy: Transformer) -> None:
    explorer = ReversalExplorer(toy, "ab")
    explorer.text.value = "Hello"
    assert explorer.answer == toy_reverse.answers(toy, ["Hello"])[0] and explorer.answer in words(explorer.result.value)
    assert explorer.place.max == 6
    explorer.place.value = 3
    ids = [*toy_reverse.question("Hello"), *toy_reverse.encode("olleH")]
    weights = toy.attention_weights(torch.tensor([ids]))[:, 0, :, 8, :9].detach()
    rows = re.findall(r"<tr><th scope=.row.>(.*?)</tr>", explorer.result.value)
    assert len(rows) == 6
    for row, looks in zip(rows, weights.reshape(6, 9), strict=True):
        shades = [float(alpha) for alpha in re.findall(r"rgba\(0,114,178,([\d.]+)\)", row)]
        assert shades == pytest.approx(looks.tolist(), abs=0.006)
        assert f"{float(looks.max()):.0%} at" in row and f"place {int(looks.argmax())}" in row
    assert "To write sign 3" in words(explorer.result.value) and "“l”" in words(explorer.result.value)
    explorer.text.value = "<script>"
    assert "'<' is neither" in words(explorer.result.value) and "script" not in tags(explorer.result.value)


def test_a_wrong_answer_is_said_in_words(toy: Transformer) -> None:
    explorer = ReversalExplorer(toy, "abcdef")  # untrained: it cannot know
    assert "wrong: it should be fedcba" in words(explorer.result.value)


def wide_model(tokenizer: Tokenizer, seed: int = 0) -> Transformer:
    return tiny_model(seed, std=0.3, vocab_size=tokenizer.vocab_size)


@pytest.fixture
def desk(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., WritingDesk]:
    """Makes a desk whose stories lie in the test's folder."""

    def make(prompt: str = "曹操", count: int = 30, **options: Any) -> WritingDesk:
        checkpoint = Checkpoint(wide_model(tokenizer), tokenizer, {}, 3, Path("runs/novel/step=000003_loss=2.000"))
        return WritingDesk(checkpoint, prompt, count, folder=tmp_path / "stories", **options)

    return make


def press(desk: WritingDesk, button: ipywidgets.Button, then: Callable[[], None] = lambda: None) -> None:
    """Click, do something else just after, and wait until the desk is free again."""

    async def act() -> None:
        button.click()
        for _ in range(8):  # rounds of the event loop that a second message may take
            await asyncio.sleep(0)
        then()
        assert desk._task
        await desk._task

    asyncio.run(asyncio.wait_for(act(), 60))


def saved(desk: WritingDesk) -> str:
    assert desk.story.file
    return open_story(desk.story.file).text()


def test_the_desk_writes_what_generate_writes(desk: Callable[..., WritingDesk]) -> None:
    sampling = {"temperature": 1.1, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 7}
    one = desk(**sampling)
    press(one, one.continue_button)
    expected = generate(one.checkpoint.model, one.checkpoint.tokenizer, "曹操", 30, **sampling)
    spans = re.findall(r'<span class="llm-token"[^>]*>([^<]*)</span>', one.result.value)
    assert visible(expected).startswith(html.unescape("".join(spans))) and len(spans) > 10
    assert "done" in one.state.value and "30 tokens" in one.state.value
    assert saved(one) == one.story.text() and expected.startswith(one.story.text()[2:])
    stand_in = one._repr_mimebundle_()["text/html"]
    assert stand_in.count(' title="') == len(spans) and "<style>" not in stand_in
    assert one.seed.value == "8" and one.words.value == ""


def test_a_story_is_written_retried_cut_undone_and_opened_again(desk: Callable[..., WritingDesk]) -> None:
    one = desk(count=12)
    press(one, one.continue_button)
    one.several.value = 3
    press(one, one.continue_button, then=lambda: setattr(one.words, "value", "玄德曰"))
    drafts = [draft.text() for draft in one.drafts]
    assert len(set(drafts)) == 3 and one.choice.layout.display != "none"
    one.choice.value = "2"
    assert [each.text for each in one.story.passages[2:]] == ["玄德曰", drafts[1]] and saved(one).endswith(drafts[1])

    one.several.value, one.passage.value, one.temperature.value = 1, 3, 1.3
    press(one, one.retry_button)
    assert one.story.passages[3].text not in drafts and one.story.aside[0].text == drafts[1]
    assert [each.settings and each.settings["temperature"] for each in one.story.passages] == [None, 0.8, None, 1.3]
    one.passage.value = 2
    press(one, one.edit_button, then=lambda: setattr(one.edit, "value", "孔明曰"))
    one.passage.value = 1
    press(one, one.back_button)
    assert len(one.story.passages) == 2 and one.story.aside[1].text == "孔明曰"
    press(one, one.undo_button)
    assert one.story.passages[2].text == "孔明曰"
    one.notes.value, one.title.value = "of the first", "a title"
    whole, file = one.story, one.story.file

    two = desk()
    two.notes.value, two.title.value = "of another", "another"
    other, two.file.value = two.story.file, file.name
    press(two, two.open_button)
    assert (two.story.passages, two.story.aside) == (whole.passages, whole.aside)
    assert (two.title.value, two.notes.value) == ("a title", "of the first")
    assert open_story(other).notes == "of another" and open_story(file).notes == "of the first"
    assert two.seed.value == one.seed.value == "5"
    assert remake(two.story, 1, two.checkpoint) == whole.passages[1].text
    press(two, two.export_button)
    exported = [path.read_text(encoding="utf-8") for path in sorted((file.parent / "export").iterdir())]
    assert len(exported) == 2 and visible(whole.text()) in exported[1]
    press(two, two.new_button)
    press(two, two.undo_button)
    assert two.story == Story() and two.file.value == "" and "nothing to undo" in two.state.value


def test_what_is_switched_off_at_first_is_off_at_the_desk(desk: Callable[..., WritingDesk]) -> None:
    one = desk(temperature=2.5, top_k=None, top_p=None, min_p=None, seed=None)
    press(one, one.continue_button)
    settings = one.story.passages[1].settings
    assert (settings["temperature"], settings["top_k"], settings["top_p"], settings["min_p"]) == (2.5, None, 1, 0)
    expected = generate(one.checkpoint.model, one.checkpoint.tokenizer, "曹操", 30, 2.5, seed=settings["seed"])
    assert expected.startswith(one.story.passages[1].text) and one.seed.value == ""


def test_a_passage_of_a_person_cannot_be_retried(desk: Callable[..., WritingDesk]) -> None:
    one = desk()
    one.story.add(Passage("曹操"))
    one._show()
    press(one, one.retry_button)
    assert "no model wrote" in one.state.value and one.story.text() == "曹操"


def test_an_open_story_is_not_replaced_by_another_desk(desk: Callable[..., WritingDesk]) -> None:
    one, two = desk(), desk()
    press(one, one.continue_button)
    two.file.value = one.story.file.name
    press(two, two.open_button)
    for each in (one, two):
        press(each, each.continue_button)
    assert one.story.file != two.story.file and saved(one) == one.story.text() and saved(two) == two.story.text()


def test_the_page_shows_where_the_models_view_begins(desk: Callable[..., WritingDesk]) -> None:
    one = desk(prompt="曹操引兵" * 3, count=20)  # a context of 24 tokens
    assert "from its beginning" in one.page.value
    press(one, one.continue_button)
    assert "from ▸ on" in one.page.value
    before, after = one.page.value.split("<small> ▸ </small>")
    seen = re.sub(r"[¶\d]", "", words(after.split("</div>")[0])).replace(" ", "")
    assert visible(one.story.text()).replace(" ", "").endswith(seen) and len(seen) > 5 and "opacity" in before


def test_a_recited_run_is_marked_with_its_source(desk: Callable[..., WritingDesk], small_library: TokenDataset) -> None:
    text = small_library.tokens[40:60].tolist()
    one = desk(prompt="", data=small_library)
    copied = one.checkpoint.tokenizer.decode(text)
    one.story.add(Passage("却却却" + copied + "却却却"))
    one._show()
    story, source = one.page.value.split("</div>", 1)
    marked = re.findall("(?s)<ins [^>]*>(.*?)</ins><sup>.1]</sup>", story)  # cut where the model's view begins
    assert len(marked) == 2 and html.unescape("".join(marked)) == copied
    assert re.sub(r"¶1|\[1]| ▸ ", "", html.unescape(re.sub("<[^>]*>", "", story))) == one.story.text()
    assert "¶1 [1] 20 tokens of <b>000.txt, from its token 40 on" in " ".join(words(source).split())


def test_text_that_arrives_just_after_the_click_is_continued(desk: Callable[..., WritingDesk]) -> None:
    one = desk("却说", 5)
    press(one, one.continue_button, then=lambda: setattr(one.words, "value", "曹操"))
    assert one.story.passages[0] == Passage("曹操")


def test_stop_ends_the_writing_and_keeps_what_is_there(desk: Callable[..., WritingDesk]) -> None:
    one = desk(count=1000)

    async def stop_soon() -> None:
        one.continue_button.click()
        while "so far" not in one.state.value:
            await asyncio.sleep(0)
        assert one.continue_button.disabled and not one.stop_button.disabled
        one.stop_button.click()
        await one._task

    asyncio.run(asyncio.wait_for(stop_soon(), 60))
    found = re.search(r"stopped: (\d+) tokens", one.state.value)
    assert found and 0 < int(found[1]) < 1000
    settings = one.story.passages[1].settings
    assert settings and (settings["tokens"], settings["max_new_tokens"]) == (int(found[1]), 1000)
    assert not one.continue_button.disabled and remake(one.story, 1, one.checkpoint) == one.story.passages[1].text


def test_a_prompt_of_a_million_characters_makes_a_small_panel(desk: Callable[..., WritingDesk]) -> None:
    one = desk("却说曹操" * 250_000, 5)
    assert len(one.words.value) < 2000 and one.words.value.endswith("却说曹操" * 10)
    one.story.add(Passage("却说曹操" * 250_000))
    press(one, one.continue_button)
    page = one.page.value + one.result.value + str([each.get_state() for each in (one.words, one.edit, one.passage)])
    assert "done" in one.state.value and len(page) < 50_000 and "characters before are not shown" in page
    assert len(saved(one)) > 1_000_000
    one.passage.value = 0
    assert one.edit.disabled and "change the file" in one.edit.placeholder


def test_no_row_of_controls_is_wider_than_a_narrow_page(desk: Callable[..., WritingDesk]) -> None:
    """On 1000 pixels of a window the cells are about 700 wide: rows wrap, and no control needs more than that."""
    rows = [box for box in desk(others=[Path("run/step=1_x")]).panel.children if type(box) is ipywidgets.Box]
    assert len(rows) > 5 and all(box.layout.flex_flow == "row wrap" for box in rows)
    knobs = [each for box in rows for each in box.children if "Slider" in type(each).__name__]
    assert len(knobs) == 7
    for knob in knobs:
        ems = float(knob.layout.min_width.removesuffix("em")), float(knob.style.description_width.removesuffix("em"))
        assert ems[0] * 13 < 600 and ems[1] >= 0.55 * len(knob.description)  # 13 pixels, half as wide as high


def test_two_checkpoints_write_side_by_side(
    desk: Callable[..., WritingDesk], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    two = wide_model(tokenizer, seed=1)
    path = save_checkpoint(tmp_path / "run", two, tokenizer, step=3, loss=2.0)
    one = desk(count=12, others=[path])
    one.other.value = path
    press(one, one.continue_button)
    shown = words(re.sub(r"</?span[^>]*>", "", one.result.value))
    for model in (one.checkpoint.model, two):
        written = generate(model, tokenizer, "曹操", 12, 0.8, top_p=0.95, seed=0)
        assert visible(written).rstrip("�")[:10] in shown
    assert "run/step=000003" in shown
    one.choice.value = "2"
    assert one.story.passages[1].by == f"run/{path.name}"


def test_a_wrong_seed_or_a_missing_checkpoint_is_said_in_words(
    desk: Callable[..., WritingDesk], tmp_path: Path
) -> None:
    one = desk(count=5, others=[tmp_path / "step=1_gone"])
    for seed in ("seven", "9" * 30):
        one.seed.value = seed
        press(one, one.continue_button)
        assert "whole number" in one.state.value
    one.seed.value, one.other.value = "", tmp_path / "step=1_gone"
    press(one, one.continue_button)
    assert "gone" in one.state.value and not one.continue_button.disabled
    one.file.value = "<b>none"
    press(one, one.open_button)
    assert "there is no such story" in one.state.value
    assert one.words.value == "曹操" and not (tmp_path / "stories").exists(), "something was written before the error"
    one.other.value = None
    press(one, one.continue_button)  # without a seed: one is drawn, so that the passage can be made again
    assert remake(one.story, 1, one.checkpoint) == one.story.passages[1].text and one.seed.value == ""


def test_a_story_that_cannot_be_saved_goes_on_with_a_word(desk: Callable[..., WritingDesk], tmp_path: Path) -> None:
    (tmp_path / "stories").write_text("a file in the way", encoding="utf-8")
    one = desk()
    for _ in range(2):
        press(one, one.continue_button)
        assert "⚠ not saved" in one.page.value
    assert len(one.story.passages) == 3
    (tmp_path / "stories").unlink()
    press(one, one.continue_button)
    assert "⚠" not in one.page.value and saved(one) == one.story.text()


def test_odds_are_the_models_own_in_the_window_before_the_token(tokenizer: Tokenizer) -> None:
    model = wide_model(tokenizer)
    context = model.config.max_seq_len
    ids = np.random.default_rng(0).integers(300, 4000, 2 * context + 5).tolist()
    found = odds(model, ids, 1, tokenizer.vocab_size)
    assert len(found) == len(ids) - 1
    with torch.inference_mode():
        first = model(torch.tensor([ids[:context]]))[0].softmax(-1)
    for place in (1, 2, context - 1, context):
        (token, own), *rivals = found[place - 1]
        assert token == ids[place] and own == pytest.approx(float(first[place - 1, ids[place]]), rel=1e-3)
        assert [id for id, _ in rivals] == first[place - 1].topk(5).indices.tolist()
    assert all(0 < own <= max(p for _, p in rivals) + 1e-6 for (_, own), *rivals in found)


def test_written_text_is_escaped_token_by_token(tmp_path: Path, english: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text((HOSTILE + "\n") * 200, encoding="utf-8")
    library = open_library(texts, encoding="utf-8", clean=False)
    tok = train_tokenizer(library.kept, tmp_path / "t", 320, character_coverage=1.0)
    checkpoint = Checkpoint(wide_model(tok), tok, {}, 3, Path(f"runs/{HOSTILE}/step=000003_loss=2.000"))
    one = WritingDesk(checkpoint, HOSTILE, 60, folder=tmp_path / "stories", temperature=2.0)
    one.title.value = one.notes.value = HOSTILE
    press(one, one.continue_button)
    shown = one.result.value + one.page.value + one.state.value + one.about.value
    assert not tags(shown) - {"div", "small", "p", "b", "br", "span", "style", "sup"}
    assert not set(shown + one.story.file.name) & {"\x1b", "\x00", "\u202e"}


def test_every_control_has_a_label(
    desk: Callable[..., WritingDesk], tokenizer: Tokenizer, toy: Transformer, tmp_path: Path, watched: None
) -> None:
    board = TrainingDashboard()
    board.panel = board._build(trainer(tmp_path / "run", quick(), sampler=str.upper))
    panels = [board.panel, TokenExplorer({"a": tokenizer}, "").panel, ReversalExplorer(toy, "ab").panel]
    panels.append(desk(others=[tmp_path]).panel)
    controls = []
    while panels:
        each = panels.pop()
        panels += getattr(each, "children", ())
        if "value" in each.traits() or "icon" in each.traits():
            controls.append(each)
    named = [c for c in controls if type(c).__name__ not in ("HTML", "Image")]
    assert len(named) > 30 and all(control.description for control in named)


# Runs side by side


def test_the_table_says_what_each_run_was(tmp_path: Path) -> None:
    for rate in (1e-3, 1e-2):
        trainer(tmp_path / f"lr-{rate}", quick(max_steps=4, eval_interval=2, learning_rate=rate)).fit()
    shown = run_table(sorted(tmp_path.iterdir()))
    assert isinstance(shown, HTML)
    text = words(shown.data)
    for rate in (1e-3, 1e-2):
        last = read_metrics(tmp_path / f"lr-{rate}")[-1]
        assert f"lr-{rate}" in text and f"learning_rate={rate}" in text
        assert f"{last['val_loss']:.3f}" in text and f"{last['val_bits_per_byte']:.3f}" in text
    assert "4 of 4" in text and "cpu, fp32" in text
