"""The desk: a story is written passage by passage, by a person and a model."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets

from llmcore.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from llmcore.dataset import TokenDataset
from llmcore.files import display_path, one_line, resolve
from llmcore.generate import PIECE_CHARACTERS, Sampling
from llmcore.measure.memorised import LEAST, Run, recited
from llmcore.notebook.dashboard import SETTLED, output
from llmcore.notebook.drafts import ODDS_STYLE, Draft
from llmcore.notebook.explorers import LABELLED, row
from llmcore.notebook.recitation import marked, passages_of
from llmcore.notebook.safe_html import html_text
from llmcore.notebook.story import SAMPLING, Passage, Story, open_story

REFRESH = 0.05  # seconds between two updates of the text
LOOKED_UP = 100_000_000  # training tokens that are searched after each passage: a few seconds
SHOWN_STORY = 20_000  # characters of a story that are shown, and of a passage that can be changed here
MOST_FILES = 200  # of stories that the browser gets to choose from
SEEN_FROM = "▸"  # where the model's view of the story begins
PAGE = "max-height:36em;overflow:auto;white-space:pre-wrap;line-height:1.9;border:1px solid #888;padding:4px 12px"


class WritingDesk:
    """A story, written passage by passage. Its file grows with it.

    Under the story, a person types words, lets the model go on, and chooses between drafts. Each passage keeps the
    settings of sampling that it was written with. Point at a token of a draft, or press Tab, to see its probability and
    the likeliest alternatives; tokens less than 10% likely are underlined. A second checkpoint can write beside the
    first. All controls can be reached by Tab.

    Args:
        checkpoint: the model that writes, with its tokenizer.
        prompt: the words at first.
        max_new_tokens: how many tokens a passage has at first.
        others: checkpoints to compare with. Each is loaded when it is chosen.
        folder: of the stories' files.
        data: the training tokens, to mark what stands there word for word; not used if they are more than `LOOKED_UP`.
        sampling: values of `Sampling` at first, and `seed`.

    Attributes:
        story: what is written.
        drafts: of the last passage.
        panel: the controls and the texts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt: str = "",
        max_new_tokens: int = 100,
        others: Sequence[Path] = (),
        folder: str | Path = "outputs/stories",
        data: TokenDataset | None = None,
        **sampling: Any,
    ) -> None:
        self.checkpoint, self.folder = checkpoint, resolve(folder)
        self.data = data if data and len(data.tokens) <= LOOKED_UP else None
        self.story, self.drafts = Story(one_line(" ".join(prompt[:40].split()))[:20]), list[Draft]()
        self._second: Checkpoint | None = None
        self._known: dict[str, tuple[list[int], list[Run], str]] = {}  # by passage: tokens, runs, their sources
        self._task: asyncio.Task[None] | None = None
        self._stopped, self._unsaved = False, ""

        def text(words: str, value: str = "", kind: Any = ipywidgets.Text, **more: Any) -> Any:
            layout = {"flex": "1 1 12em", "max_width": "1000px"}
            return kind(value, description=words, style=LABELLED, layout=layout, **more)

        def slider(kind: Any, value: float, low: float, high: float, step: float, words: str) -> Any:
            style = {"description_width": "13em"}
            layout = {"flex": "1 1 30em", "min_width": "28em", "max_width": "36em"}
            limits = {"min": min(low, value), "max": max(high, value), "step": step}
            return kind(value=value, **limits, description=words, style=style, layout=layout)

        def button(words: str, icon: str, hint: str, action: Callable[[], Any]) -> ipywidgets.Button:
            made = ipywidgets.Button(description=words, icon=icon, tooltip=hint)
            made.on_click(lambda _: self._begin(action))
            return made

        # the sampling of the next passage
        whole, real = ipywidgets.IntSlider, ipywidgets.FloatSlider
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": ""}
        first: dict[str, Any] = {**off, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.0, "seed": 0}
        first |= {name: off[name] if value is None else value for name, value in sampling.items()}
        self.temperature = slider(real, first["temperature"], 0, 2, 0.05, "temperature (0: greedy)")
        self.top_k = slider(whole, first["top_k"], 0, 200, 1, "top-k (0: off)")
        self.top_p = slider(real, first["top_p"], 0.05, 1, 0.05, "top-p (1: off)")
        self.min_p = slider(real, first["min_p"], 0, 0.5, 0.01, "min-p (0: off)")
        self.repetition_penalty = slider(real, first["repetition_penalty"], 0.8, 2, 0.05, "repetition (1: off)")
        self.count = slider(whole, max(1, max_new_tokens), 1, 1000, 1, "tokens at most")
        self.seed = text("seed", str(first["seed"]), placeholder="empty: another text each time")
        self.several = slider(whole, 1, 1, 4, 1, "drafts")
        self.other = ipywidgets.Dropdown(
            options=[("nothing", None), *((one_line(f"{path.parent.name}/{path.name}"), path) for path in others)],
            description="compare with",
            style=LABELLED,
            layout={"flex": "0 1 30em", "max_width": "100%"},
        )

        # the story and its file
        self.title = text("title", self.story.title, continuous_update=False)
        self.notes = text("notes", kind=ipywidgets.Textarea, continuous_update=False)
        self.file = text("file", kind=ipywidgets.Combobox, ensure_option=False)
        self.open_button = button("open", "folder-open", "open the story in this file", self._open)
        self.new_button = button("new", "file", "begin another story; this one stays in its file", self._new)
        self.export_button = button("export", "download", "write title and text as .txt and .md", self._export)
        self.page = ipywidgets.HTML()

        # writing on, and the drafts
        usable = prompt[-PIECE_CHARACTERS * checkpoint.model.config.max_seq_len :]
        self.words = text("your words", usable, ipywidgets.Textarea)
        self.continue_button = button("continue", "play", "add your words, and let the model go on", self._continue)
        self.retry_button = button("retry", "refresh", "write the chosen passage anew", self._retry)
        self.undo_button = button("undo", "undo", "take the last change back", self._undo)
        self.stop_button = ipywidgets.Button(
            description="stop writing", icon="stop", tooltip="stop here", disabled=True
        )
        self.stop_button.on_click(lambda _: self._stop())
        self.state, self.result = ipywidgets.HTML("state: ready"), ipywidgets.HTML()
        self.choice = ipywidgets.ToggleButtons(description="draft", options=["1"], layout={"display": "none"})

        # one passage
        self.passage = ipywidgets.Dropdown(description="passage", layout={"flex": "1 1 20em", "max_width": "36em"})
        self.edit = text("its text", kind=ipywidgets.Textarea, rows=4)
        self.edit_button = button("keep the edit", "check", "change this passage; without text it goes", self._edit)
        self.back_button = button("write on here", "step-backward", "set later passages aside", self._go_back)
        self.about = ipywidgets.HTML()

        # where they stand
        self._busy = [self.continue_button, self.retry_button, self.undo_button, self.edit_button, self.back_button]
        self._busy += [self.open_button, self.new_button, self.export_button, self.choice]
        sliders = (self.temperature, self.min_p, self.top_k, self.repetition_penalty, self.top_p, self.count)
        rows: list[ipywidgets.Widget] = [
            row(self.title, self.file, self.open_button, self.new_button, self.export_button),
            self.page,
            row(self.words),
            row(self.continue_button, self.retry_button, self.undo_button, self.stop_button, self.state),
            self.choice,
            self.result,
            row(*sliders, self.several),
            row(self.seed, *([self.other] if others else [])),
            row(self.passage, self.edit_button, self.back_button, self.about),
            row(self.edit),
            row(self.notes),
        ]
        self.panel = ipywidgets.VBox(rows)
        self.choice.observe(self._take, "value")
        self.passage.observe(lambda _: self._show_passage(), "value")
        for each in (self.title, self.notes):
            each.observe(self._author, "value")
        self._show()

    # Actions: one at a time, each a little after its button, so that text that was typed before has arrived

    def start(self) -> asyncio.Task[None]:
        """Add the words and write on, as the continue button does. The kernel stays free for the stop button."""
        return self._begin(self._continue)

    def _begin(self, action: Callable[[], Any]) -> asyncio.Task[None]:
        if self._task is None or self._task.done():
            for each in self._busy:
                each.disabled = True
            self._stopped = False
            self._task = asyncio.ensure_future(self._act(action))
        return self._task

    async def _act(self, action: Callable[[], Any]) -> None:
        try:
            await asyncio.sleep(SETTLED)
            if waiting := action():
                await waiting
        except (ValueError, OSError, CheckpointError) as error:
            self._say(f"⚠ {error}")
        finally:
            for each in self._busy:
                each.disabled = False
            self.stop_button.disabled = True

    def _say(self, state: str) -> None:
        self.state.value = f"state: {html_text(state)}"

    def _stop(self) -> None:
        self._stopped = True

    async def _continue(self) -> None:
        drafts = self._begin_drafts(self.story.text() + self.words.value)
        if self.words.value:
            self.story.add(Passage(self.words.value))
            self.words.value = ""
            self._changed()
        await self._stream(drafts)

    async def _retry(self) -> None:
        number = self.passage.value
        if number is None or self.story.passages[number].settings is None:
            raise ValueError("no model wrote the chosen passage: choose another, or change its text below")
        drafts = self._begin_drafts(self.story.text(number))
        self.story.go_back(number)
        self._changed()
        await self._stream(drafts)

    def _undo(self) -> None:
        if not self.story.undo():
            raise ValueError("there is nothing to undo")
        self._changed()
        self._say("the last change is taken back")

    def _edit(self) -> None:
        if self.passage.value is not None and not self.edit.disabled:
            self.story.edit(self.passage.value, self.edit.value)
            self._changed()
            self._say("changed")

    def _go_back(self) -> None:
        if self.passage.value is not None:
            self.story.go_back(self.passage.value + 1)
            self._changed()
            self._say("the passages after this one are set aside; undo brings them back")

    def _take(self, change: Any) -> None:
        if self.drafts and change["new"] is not None:
            self.story.replace(len(self.story.passages) - 1, self.drafts[int(change["new"]) - 1].passage())
            self._changed(keep_drafts=True)

    def _open(self) -> None:
        path = self.folder / self.file.value.strip()
        if not path.is_file():
            raise ValueError(f"file={self.file.value[:200]!r}: there is no such story in {display_path(self.folder)}")
        self._take_up(open_story(path))
        self._say("opened" if self.story.file else "opened as far as it can be read; it goes on in a new file")

    def _new(self) -> None:
        self._take_up(Story())
        self._say("a new story")

    def _take_up(self, story: Story) -> None:
        self.story, self.drafts, self._unsaved = story, [], ""
        seeds = [each.settings["seed"] for each in (*story.passages, *story.aside) if each.settings]
        if seeds:
            self.seed.value = str(max(seeds) + 1)
        self._show()

    def _export(self) -> None:
        files = self.story.export(self.folder / "export")
        self._say(f"exported: {', '.join(map(display_path, files))}")

    def _author(self, change: Any) -> None:
        name = change["owner"].description  # title or notes
        if getattr(self.story, name) != change["new"]:
            setattr(self.story, name, change["new"])
            self._changed(keep_drafts=True)

    def _changed(self, keep_drafts: bool = False) -> None:
        """Save the story and show it. The drafts belong to its last passage: other changes end them."""
        if not keep_drafts:
            self.drafts = []
        try:
            self.story.save(self.folder)
            self._unsaved = ""
        except OSError as error:
            self._unsaved = f"⚠ not saved: {error}"
        self._show()

    # Writing

    def _begin_drafts(self, before: str) -> list[Draft]:
        """A draft for each seed, and one by the second checkpoint.

        Raises:
            ValueError: for a setting out of range, a text that cannot be encoded, or a checkpoint without tokenizer.
            CheckpointError: if the second checkpoint cannot be loaded.
        """
        written = self.seed.value.strip()
        if written and not (written.isdecimal() and len(written) <= 18):
            raise ValueError(f"seed={written[:40]!r} must be a whole number of up to 18 digits, or nothing")
        seed = int(written) if written else secrets.randbelow(10**9)
        values: dict[str, Any] = {name: round(getattr(self, name).value, 9) for name in SAMPLING}  # 0.95, not 0.95…01
        values["top_k"] = values["top_k"] or None
        Sampling(**values).check(self.count.value)
        values["max_new_tokens"] = self.count.value
        drafts = [Draft.begin(self.checkpoint, before, {**values, "seed": seed + n}) for n in range(self.several.value)]

        if path := self.other.value:
            if self._second is None or self._second.path != path:
                self._say(f"loading {display_path(path)}")
                self._second = load_checkpoint(path, device=str(self.checkpoint.model.tok_embeddings.weight.device))
            drafts.append(Draft.begin(self._second, before, {**values, "seed": seed}))
        if written:
            self.seed.value = str(seed + self.several.value)
        return drafts

    async def _stream(self, drafts: list[Draft]) -> None:
        """Let all drafts write, a token each in turn, and show them now and then. The first one is taken."""
        self.stop_button.disabled = False
        started, shown_at, tokens, unseen = time.perf_counter(), 0.0, 0, -1
        for _ in itertools.zip_longest(*(draft.write() for draft in drafts)):
            tokens += 1
            if time.perf_counter() - shown_at > REFRESH:
                self._show_drafts(drafts)
                if (now := drafts[0].unseen()) != unseen:
                    self._show_page(drafts[0])
                    unseen = now
                self._say(f"writing, {tokens} tokens so far")
                shown_at = time.perf_counter()
            await asyncio.sleep(0)
            if self._stopped:
                break

        seconds = time.perf_counter() - started
        self.drafts = [draft for draft in drafts if draft.text()]
        if self.drafts:
            self.story.add(self.drafts[0].passage())
        self._changed(keep_drafts=True)
        state = "done, the text ended itself" if all(draft.ended for draft in drafts) else "done"
        self._say(f"{'stopped' if self._stopped else state}: {tokens} tokens, {tokens / seconds:,.0f} per second")

    # Showing

    def _show(self) -> None:
        """The whole desk, as the story stands."""
        names = [str(number + 1) for number in range(len(self.drafts))]
        if list(self.choice.options) != names or not names:
            drafts, self.drafts = self.drafts, []  # so that nothing is taken
            self.choice.options, self.drafts = names or ["1"], drafts
        self.choice.layout.display = "flex" if len(names) > 1 else "none"
        self._show_drafts(self.drafts, with_odds=True)
        self._show_page()

        self.title.value, self.notes.value = self.story.title, self.story.notes
        self.file.value = one_line(self.story.file.name) if self.story.file else ""
        files = sorted(self.folder.glob("*.md"), key=lambda path: path.stat().st_mtime, reverse=True)
        self.file.options = [one_line(path.name) for path in files[:MOST_FILES]]
        passages = self.story.passages
        labels = [f"{n} · …{one_line(each.text[-12:])} · {each.by}" for n, each in enumerate(passages, 1)]
        self.passage.options = [(label, number) for number, label in enumerate(labels)] or [("none yet", None)]
        self.passage.value = len(passages) - 1 if passages else None
        self._show_passage()

    def _show_passage(self) -> None:
        """The chosen passage: its text, to edit, and how it was made."""
        number = self.passage.value
        passage = Passage("") if number is None else self.story.passages[number]
        self.edit.disabled = number is None or len(passage.text) > SHOWN_STORY
        self.edit.value = "" if self.edit.disabled else passage.text
        self.edit.placeholder = "too long to be changed here: change the file" if passage.text else ""
        settings = {name: value for name, value in (passage.settings or {}).items() if name != "sha256"}
        about = ", ".join(f"{name} {value:g}" for name, value in settings.items() if value is not None)
        changed = number is not None and passage.settings and not self.story.as_written(number)
        self.about.value = (
            f"<small>{html_text(about)}{'; it or the text before was changed since' * bool(changed)}</small>"
        )

    def _show_drafts(self, drafts: Sequence[Draft], with_odds: bool = False) -> None:
        columns = "".join(draft.as_html(with_odds) for draft in drafts)
        note = "<p><small>Point at a token, or press Tab, for its odds; dotted: below 10%.</small></p>"
        html = f'<div style="display:flex;flex-wrap:wrap;gap:2em">{columns}</div>' if drafts else ""
        self.result.value = html + ODDS_STYLE + note if with_odds and drafts else html

    def _show_page(self, draft: Draft | None = None) -> None:
        """The story, where the model's view begins (for a draft that grows, or the next), and what is recited."""
        text, notes = self.story.text(), [self._unsaved, *self.story.doubts]
        unseen, hidden = 0, max(0, len(text) - SHOWN_STORY)
        try:
            unseen = (draft or Draft.begin(self.checkpoint, text, {})).unseen()
            self._look_up()
        except ValueError as error:  # a text that cannot be encoded
            notes.append(f"⚠ {error}")

        # passage by passage, each cut where the model's view begins
        parts, sources, start = [f"({hidden:,} characters before are not shown)\n"] * bool(hidden), "", 0
        for number, passage in enumerate(self.story.passages, 1):
            end, cut = start + len(passage.text), min(max(unseen, start), start + len(passage.text))
            before, after = (
                self._part(passage.text, max(a, hidden) - start, b - start) for a, b in ((start, cut), (cut, end))
            )
            begins = f"<small> {SEEN_FROM} </small>" if start < unseen <= end else ""
            words = f'<span style="opacity:0.6">{before}</span>{begins}{after}' if cut > start else after
            if end > hidden:
                parts.append(f"<sup>¶{number}</sup>{words if passage.settings else f'<b>{words}</b>'}")
                if passage.text in self._known and (found := self._known[passage.text][2]):
                    sources += f"¶{number}{found}"
            start = end

        # what there is to say about it
        context = self.checkpoint.model.config.max_seq_len
        seen = f"from {SEEN_FROM} on" if unseen else "from its beginning"
        notes.append(f"Bold: yours. The model has a context of {context} tokens and sees the story {seen}.")
        if self.data:
            notes.append(f"Underlined, with a number: {LEAST} tokens or more, word for word as in the training text.")
        if self.story.aside:
            notes.append(f"Set aside, at the end of the file: {len(self.story.aside)}.")
        told = "<br>".join(html_text(note) for note in notes if note)
        self.page.value = f'<div tabindex="0" style="{PAGE}">{"".join(parts)}</div><small>{told}</small>{sources}'

    def _look_up(self) -> None:
        """Find the runs of passages that are new in the training tokens."""
        tokenizer, data = self.checkpoint.tokenizer, self.data
        texts = list(dict.fromkeys(each.text for each in self.story.passages if each.text not in self._known))
        if tokenizer is not None and data is not None and texts:
            ids = [tokenizer.encode(text) for text in texts]
            for text, own, runs in zip(texts, ids, recited(ids, data, LEAST, eos_id=tokenizer.eos_id), strict=True):
                self._known[text] = own, runs, passages_of(tokenizer, runs, data) if runs else ""

    def _part(self, text: str, start: int, end: int) -> str:
        """A part of a passage as HTML, from one character to another, cut between tokens, with its runs marked."""
        tokenizer, (ids, runs, _) = self.checkpoint.tokenizer, self._known.get(text, ([], [], ""))
        if tokenizer is None or not runs:
            return html_text(text[start:end])
        ends = list(itertools.accumulate(len(tokenizer.id_to_bytes(id)) for id in ids))
        first, last = (bisect.bisect_left(ends, len(text[:at].encode())) + 1 if at else 0 for at in (start, end))

        def inside(token: int) -> int:
            return min(max(token, first), last) - first

        clipped = [Run(inside(run.start), inside(run.end), run.place) for run in runs]
        return marked(tokenizer, ids[first:last], clipped)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        # pages that remove styles, as code hosts do, can show a title under the mouse
        drafts = self.result.value.replace(ODDS_STYLE, "").replace(" data-odds=", " title=")
        return output(self.panel, self.page.value + drafts)
