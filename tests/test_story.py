"""A story's passages, its file, and each passage made again from it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import mistune
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.checkpoint import Checkpoint
from llmcore.notebook import story as story_module
from llmcore.notebook.drafts import Draft, remake, window_start
from llmcore.notebook.story import Passage, Story, new_file, open_story, text_hash
from llmcore.tokenizer import Tokenizer

from .helpers import examples, tiny_model

ANY = st.text(st.characters(exclude_categories=()))  # half surrogates too
TRICKY = st.one_of(
    ANY, st.sampled_from(["\n", " \n ", "\r\n", "# a", "- a", "<!-- passage {} -->", "&lt;", "![x](y)", "$"])
)
SETTINGS: dict[str, Any] = {
    **{"temperature": 0.8, "top_k": None, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.1},
    **{"seed": 7, "max_new_tokens": 20, "tokens": 20, "sha256": "0"},
}
MADE = st.builds(Passage, TRICKY, st.sampled_from(["a/step=1 --> <b>", "b"]), st.just(SETTINGS))
PASSAGES = st.lists(st.one_of(st.builds(Passage, TRICKY), MADE), max_size=4).map(tuple)


@settings(max_examples=examples(200), deadline=None)
@given(passages=PASSAGES, aside=PASSAGES, notes=TRICKY, title=TRICKY)
def test_any_story_is_opened_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory, passages: Any, aside: Any, notes: str, title: str
) -> None:
    title = story_module.one_line(title)
    written = Story(title, notes, passages, aside)
    file = written.save(tmp_path_factory.mktemp("story"))
    again = open_story(file)
    assert again.doubts == () and again.file == file
    assert (again.title, again.notes, again.passages, again.aside) == (title, notes, passages, aside)
    trimmed = b"\n".join(line.rstrip() for line in file.read_bytes().replace(b"\n", b"\r\n").split(b"\n"))
    file.write_bytes(b"\xef\xbb\xbf" + trimmed)  # as other systems' editors save it
    assert open_story(file).passages == passages


@given(TRICKY)
def test_nothing_in_a_story_acts_as_markdown_or_html(text: str) -> None:
    passages = (Passage(text), Passage(text, "--> <b>of a hostile name</b>"))
    page = mistune.html(Story(text.replace("\n", " "), text, passages).as_markdown())
    assert set(re.findall(r"<\s*/?(\w+)", re.sub("<!--.*?-->", "", page))) <= {"h1", "p"}


def test_changes_are_undone_one_by_one_and_nothing_is_lost() -> None:
    story, states = Story(), []
    for change in (
        lambda: story.add(Passage("一")),
        lambda: story.add(Passage("二", "m", SETTINGS)),
        lambda: story.add(Passage("三")),
        lambda: story.edit(1, "两"),
        lambda: story.go_back(1),
        lambda: story.replace(0, Passage("1")),
        lambda: story.edit(0, ""),
    ):
        states.append((story.passages, story.aside))
        change()
    assert story.passages == () and [each.text for each in story.aside] == ["两", "三"]
    assert states[4][0][1] == Passage("两", "m", SETTINGS)
    for state in reversed(states):
        assert story.undo() and (story.passages, story.aside) == state
    assert not story.undo() and story.passages == ()


def writer(tokenizer: Tokenizer, seed: int = 0) -> Checkpoint:
    model = tiny_model(seed, std=0.3, vocab_size=tokenizer.vocab_size)
    return Checkpoint(model, tokenizer, {}, 3, Path("runs/novel/step=000003_loss=2.000"))


def written(checkpoint: Checkpoint, before: str, stop: int | None = None, **changes: Any) -> Passage:
    options = {name: SETTINGS[name] for name in (*story_module.SAMPLING, "seed", "max_new_tokens")} | changes
    draft = Draft.begin(checkpoint, before, options)
    for number, _ in enumerate(draft.write(), 1):
        if number == stop:
            break
    return draft.passage()


def test_a_passage_is_made_again_from_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    checkpoint = writer(tokenizer)
    story = Story("a", "", (Passage("却说曹操 <b>\n"),))
    for number, stop in enumerate([None, 5, None, 30, None]):  # longer than the context, some stopped by a person
        story.add(written(checkpoint, story.text(), stop, seed=number, max_new_tokens=40, top_k=50 + number))
    again = open_story(story.save(tmp_path))
    for number in range(1, 6):
        assert again.as_written(number) and len(again.passages[number].text) > 3
        assert remake(again, number, checkpoint) == story.passages[number].text
        assert remake(again, number, writer(tokenizer, seed=1)) != story.passages[number].text
    with pytest.raises(ValueError, match="passage 1 cannot be made again"):
        remake(again, 0, checkpoint)
    again.edit(2, again.passages[2].text + "!")
    assert [again.as_written(number) for number in range(6)] == [False, True, False, False, False, False]


def test_a_file_that_was_edited_by_hand_is_read_and_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    story = Story("a", "", (Passage("却说"),))
    story.add(written(writer(tokenizer), "却说"))
    file = story.save(tmp_path)
    text = file.read_text(encoding="utf-8")
    file.write_text(
        text.replace("却说\n", "\n\n话说 AT&T <i>\n又说\n\n\n").replace("# a", "#a\nmy notes"), encoding="utf-8"
    )
    again = open_story(file)
    assert (again.title, again.notes, again.doubts) == ("a", "my notes", ())
    assert again.passages == (Passage("话说 AT&T <i>\n又说"), story.passages[1]) and not again.as_written(1)
    assert again.save(tmp_path) == file and open_story(file).passages == again.passages


DAMAGE = {
    "no JSON": ('{"by": "m"', '{"by": "m'),
    "no object": ('{"by": "m"}', "[]"),
    "an unknown field": ('{"by": "m"}', '{"by": "m", "colour": "red"}'),
    "a part of the settings": ('{"by": "m"}', '{"by": "m", "seed": 3}'),
    "a setting out of range": ('"temperature": 0.8', '"temperature": -1'),
    "a setting that is no number": ('"temperature": 0.8', '"temperature": NaN'),
    "a seed that is too large": ('"seed": 7', f'"seed": {10**30}'),
    "too many brackets": ('{"by": "m"}', "[" * 100_000),
    "half a comment": ("<!-- passage", "<!-- pass"),
    "text before the first passage": ("<!-- story -->", "<!-- story -->\n零"),
    "no comments": ("<!--", "<--"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_file_is_read_as_far_as_it_can_be_and_stays(fault: str, tmp_path: Path) -> None:
    story = Story("a", "", (Passage("一", "m"), Passage("二", "m", SETTINGS), Passage("三", "m")))
    file = story.save(tmp_path)
    file.write_text(file.read_text(encoding="utf-8").replace(*DAMAGE[fault]), encoding="utf-8")
    damaged = file.read_bytes()
    again = open_story(file)
    assert again.doubts and all(file.name in doubt and len(doubt) < 500 for doubt in again.doubts)
    added = "零" if "零" in DAMAGE[fault][1] else ""
    assert re.sub("[^零一二三]", "", again.text()) == f"{added}一二三"
    assert again.save(tmp_path) != file and file.read_bytes() == damaged


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("却说".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.md is not a story.*save it as UTF-8"):
        open_story(tmp_path / "a.md")


def test_what_another_program_wrote_is_never_replaced(tmp_path: Path) -> None:
    story = Story("曹操", "", (Passage("一"),))
    file = story.save(tmp_path)
    assert file.name == "曹操.md" and story.save(tmp_path) == file
    file.write_text("of another", encoding="utf-8")
    other = story.save(tmp_path)
    assert other.name == "曹操-2.md" and file.read_text(encoding="utf-8") == "of another"
    other.unlink()
    assert story.save(tmp_path) == other and sorted(path.name for path in tmp_path.iterdir()) == [
        "曹操-2.md",
        "曹操.md",
    ]


def test_a_save_that_fails_leaves_the_file_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story("a", "", (Passage("一"),))
    file = story.save(tmp_path)
    before = file.read_bytes()
    story.add(Passage("二"))
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            story.save(tmp_path)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.md"]
    assert story.save(tmp_path) == file and open_story(file).text() == "一二"


def test_exports_hold_the_title_and_the_text_only(tmp_path: Path) -> None:
    story = Story(
        "A *title*", "my notes", (Passage("one\n\n tw"), Passage("o <b>\x1b", "m", SETTINGS)), (Passage("no"),)
    )
    plain, marked = story.export(tmp_path)
    assert plain.read_text(encoding="utf-8") == "A *title*\n\none\n\n two <b>⟨1B⟩\n"
    assert mistune.html(marked.read_text(encoding="utf-8")).split("\n") == [
        "<h1>A *title*</h1>",
        "<p>one</p>",
        "<p> two &lt;b&gt;⟨1B⟩</p>",
        "",
    ]
    assert [path.name for path in story.export(tmp_path)] == ["A-title-2.txt", "A-title-2.md"]
    assert new_file(tmp_path, "../..", ".md").name == "story.md"


@pytest.mark.parametrize("prompt", [1, 20, 24, 60])
def test_the_window_that_is_shown_is_the_one_that_the_model_reads(
    prompt: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = writer(tokenizer)
    model, context, read = checkpoint.model, checkpoint.model.config.max_seq_len, list[int]()
    hidden_states = model.hidden_states

    def recorded(ids: torch.Tensor, cache: Any = None, *rest: Any) -> torch.Tensor:
        read.append(cache.length + ids.shape[1])
        return hidden_states(ids, cache, *rest)

    monkeypatch.setattr(model, "hidden_states", recorded)
    text = "曹" * prompt
    draft = Draft.begin(
        checkpoint, text, {**SETTINGS, "max_new_tokens": 50, "temperature": 0, "repetition_penalty": 1.5}
    )
    assert len(draft.ids) == min(prompt, context)
    assert len(text) - draft.unseen() == draft.start - window_start(
        draft.start, 1, context
    )  # not the first token's view
    for step, _ in enumerate(draft.write()):
        start = window_start(draft.start, step, context)
        assert read[step] == draft.start + step - start, step
        if step:
            assert len(text) - draft.unseen() == max(0, draft.start - window_start(draft.start, step + 1, context))
    assert len(read) == 50 and draft.unseen() == prompt
    assert text_hash("a") != text_hash("b")
