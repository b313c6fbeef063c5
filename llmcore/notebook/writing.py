"""The writing panel: a prompt, every knob of sampling, and the text as it comes, with the odds behind each token."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets
import torch

from llmcore.checkpoint import CheckpointError, load_checkpoint
from llmcore.files import display_path, one_line
from llmcore.generate import PIECE_CHARACTERS, check_sampling, generate_ids, prompt_ids
from llmcore.model import Transformer
from llmcore.notebook.dashboard import output
from llmcore.notebook.explorers import LABELLED, WIDE, Explorer, row
from llmcore.notebook.safe_html import ending, html_text, piece_text
from llmcore.tokenizer import Tokenizer

REFRESH = 0.05  # seconds between two updates of the text
UNLIKELY = 0.1  # tokens less probable than this are underlined
# shows a token's odds at once, above it, under the mouse or when it has the keyboard's focus
ODDS = (
    "<style>.llm-token{position:relative} .llm-token:hover::after,.llm-token:focus::after{content:attr(data-odds);"
    "position:absolute;left:0;bottom:1.6em;z-index:9;padding:4px 8px;white-space:pre;line-height:1.4;font-weight:400;"
    "background:#fff;color:#000;border:1px solid #555;border-radius:4px}</style>"
)
Alternatives = list[tuple[int, float]]  # ids and their probabilities


@torch.inference_mode()
def odds(model: Transformer, ids: Sequence[int], start: int, vocab_size: int, count: int = 5) -> list[Alternatives]:
    """How likely each token from a place on was, and what might have stood there instead.

    The probabilities are the model's own, before temperature and the other knobs. A token sees at least half a context.

    Args:
        model: the language model.
        ids: (time,) the whole text.
        start: the first place to tell about, 1 or more.
        vocab_size: of the tokenizer; further ids are left out.
        count: how many alternatives.

    Returns:
        For each place the token itself and its probability, then the `count` likeliest tokens there.
    """
    context, device = model.config.max_seq_len, model.tok_embeddings.weight.device
    found: list[Alternatives] = []
    place = start
    while place < len(ids):
        first = max(0, place - max(1, context // 2))
        window = torch.as_tensor(ids[first : first + context], device=device)
        probabilities = model(window[None])[0, :, :vocab_size].float().softmax(-1)
        end = min(len(ids), first + len(window) + 1)
        for at in range(place, end):
            row = probabilities[at - 1 - first]
            top = row.topk(min(count, len(row)))
            found.append([(ids[at], float(row[ids[at]])), *zip(top.indices.tolist(), top.values.tolist(), strict=True)])
        place = end
    return found


@dataclass
class Draft:
    """What one model writes after a prompt, while it comes and when it is done.

    Attributes:
        name: of the model, as shown.
        prompt: the text before.
        ids: of the prompt (as much as fits into the context) and of all that came after.
        start: where what came after begins.
        ended: whether the model ended the text itself.
    """

    name: str
    model: Transformer
    tokenizer: Tokenizer
    prompt: str
    ids: list[int]
    start: int
    ended: bool = False

    def write(self, count: int, **sampling: Any) -> Iterator[None]:
        """Add tokens one by one."""
        tokenizer = self.tokenizer
        options = {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size, **sampling}
        for [id] in generate_ids(self.model, [self.ids], count, **options):
            self.ended = id == tokenizer.eos_id
            if not self.ended:
                self.ids.append(id)
            yield

    def text(self) -> str:
        """What came after the prompt, without half a character at the end."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(b"".join(map(self.tokenizer.id_to_bytes, self.ids[self.start :])))

    def as_html(self, with_odds: bool = False) -> str:
        """Prompt and text; with odds, each token says its own and those of its rivals under the mouse."""
        written = self._spans() if with_odds else html_text(self.text())
        return (
            f'<div style="flex:1 1 20em;max-width:60em"><small>{html_text(self.name)}</small>'
            f'<p style="white-space:pre-wrap;line-height:1.9"><b>{html_text(ending(self.prompt))}</b>{written}</p></div>'
        )

    def _spans(self) -> str:
        """The text, one span a token; bytes of one character share a span."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokenizer, spans, hints, least = self.tokenizer, [], [], 1.0
        alternatives = odds(self.model, self.ids, self.start, tokenizer.vocab_size)
        for id, [(_, own), *others] in zip(self.ids[self.start :], alternatives, strict=True):
            rivals = "".join(f"\n{p:7.1%}  {piece_text(tokenizer, other)}" for other, p in others)
            hints.append(f"{piece_text(tokenizer, id)}  {own:.1%}\nlikeliest here:{rivals}")
            least = min(least, own)
            if text := decoder.decode(tokenizer.id_to_bytes(id)):
                line = "text-decoration:underline dotted" if least < UNLIKELY else "text-decoration:none"
                hint = html_text("\n".join(hints))
                spans.append(
                    f'<span class="llm-token" tabindex="0" data-odds="{hint}" style="{line}">{html_text(text)}</span>'
                )
                hints, least = [], 1.0
        return "".join(spans)


class WritingPanel(Explorer):
    """A prompt, the knobs of sampling, and the text as it comes, with a button to stop it.

    When the text is complete, the mouse over a token, or the Tab key, shows its probability and the likeliest
    alternatives; what was less than 10% likely is underlined. A second checkpoint may write beside the first, on the
    same prompt.

    Args:
        model: the language model.
        tokenizer: it was trained with.
        prompt: to begin with.
        max_new_tokens: to begin with.
        others: checkpoints to compare with; each is loaded when chosen.

    Attributes:
        prompt, temperature, top_k, top_p, min_p, repetition_penalty, seed, count, other: the controls.
        write, stop: buttons.
        state: in words, what is going on.
        result: the text.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        prompt: str,
        max_new_tokens: int = 100,
        others: Sequence[Path] = (),
    ) -> None:
        self.name, self.model, self.tokenizer = "this checkpoint", model, tokenizer
        self._stopped = False
        self._second: tuple[Path, Transformer, Tokenizer] | None = None

        def slider(kind: Any, value: float, low: float, high: float, step: float, words: str) -> ipywidgets.Widget:
            style, layout = (
                {"description_width": "13em"},
                {"flex": "1 1 30em", "min_width": "28em", "max_width": "36em"},
            )
            return kind(value=value, min=low, max=high, step=step, description=words, style=style, layout=layout)

        whole, real = ipywidgets.IntSlider, ipywidgets.FloatSlider
        usable = prompt[-PIECE_CHARACTERS * model.config.max_seq_len :]
        self.prompt = ipywidgets.Textarea(usable, description="prompt", layout=WIDE)
        self.temperature = slider(real, 0.8, 0, 2, 0.05, "temperature (0: greedy)")
        self.top_k = slider(whole, 0, 0, 200, 1, "top-k (0: off)")
        self.top_p = slider(real, 0.95, 0.05, 1, 0.05, "top-p (1: off)")
        self.min_p = slider(real, 0, 0, 0.5, 0.01, "min-p (0: off)")
        self.repetition_penalty = slider(real, 1, 0.8, 2, 0.05, "repetition (1: off)")
        self.count = slider(whole, max(1, min(1000, max_new_tokens)), 1, 1000, 1, "tokens at most")
        self.seed = ipywidgets.Text("0", description="seed", placeholder="empty: another text each time")
        self.other = ipywidgets.Dropdown(
            options=[("nothing", None), *((one_line(f"{path.parent.name}/{path.name}"), path) for path in others)],
            description="compare with",
            style=LABELLED,
            layout={"flex": "0 1 30em", "max_width": "100%"},
        )
        self.write_button = ipywidgets.Button(description="write", icon="play", tooltip="continue the prompt")
        self.stop_button = ipywidgets.Button(
            description="stop writing", icon="stop", tooltip="stop here", disabled=True
        )
        self.state = ipywidgets.HTML("state: ready")
        knobs = row(self.temperature, self.min_p, self.top_k, self.repetition_penalty, self.top_p, self.count)
        choices = row(self.seed, *([self.other] if others else []))
        super().__init__(self.prompt, knobs, choices, row(self.write_button, self.stop_button, self.state))
        self.write_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self._stop())

    def start(self) -> asyncio.Task[None]:
        """What the write button does: begin, and leave the kernel free for the stop button."""
        self.write_button.disabled, self.stop_button.disabled, self._stopped = True, False, False
        return asyncio.ensure_future(self._write())

    def _stop(self) -> None:
        self._stopped = True

    async def _write(self) -> None:
        try:
            await self._stream(self._drafts(), self._sampling())
        except (ValueError, CheckpointError) as error:
            self._say(f"⚠ {error}")
        finally:
            self.write_button.disabled, self.stop_button.disabled = False, True

    def _say(self, state: str) -> None:
        self.state.value = f"state: {html_text(state)}"

    def _sampling(self) -> dict[str, Any]:
        seed = self.seed.value.strip()
        if seed and not (seed.isdecimal() and len(seed) <= 18):
            raise ValueError(f"seed={seed[:40]!r} must be a whole number of up to 18 digits, or nothing")
        values = {
            "temperature": self.temperature.value,
            "top_k": self.top_k.value or None,
            "top_p": self.top_p.value,
            "min_p": self.min_p.value,
            "repetition_penalty": self.repetition_penalty.value,
        }
        check_sampling(self.count.value, **values)
        return {**values, "seed": int(seed) if seed else None}

    def _drafts(self) -> list[Draft]:
        writers = [(self.name, self.model, self.tokenizer)]
        if path := self.other.value:
            if self._second is None or self._second[0] != path:
                self._say(f"loading {display_path(path)}")
                checkpoint = load_checkpoint(path, device=str(self.model.tok_embeddings.weight.device))
                if checkpoint.tokenizer is None:
                    raise ValueError(f"{display_path(path)} has no tokenizer: it is of the toy task")
                self._second = (path, checkpoint.model, checkpoint.tokenizer)
            writers.append((display_path(path), *self._second[1:]))
        drafts = []
        for name, model, tokenizer in writers:
            ids = prompt_ids(model, tokenizer, self.prompt.value)
            drafts.append(Draft(name, model, tokenizer, self.prompt.value, ids, len(ids)))
        return drafts

    async def _stream(self, drafts: list[Draft], sampling: dict[str, Any]) -> None:
        started, shown_at, steps = time.perf_counter(), 0.0, 0
        going = [draft.write(self.count.value, **sampling) for draft in drafts]
        self._show(drafts)
        while going and not self._stopped:
            going = [text for text in going if next(text, "over") is None]
            steps += bool(going)
            if time.perf_counter() - shown_at > REFRESH:
                self._show(drafts)
                self._say(f"writing, {steps} tokens so far")
                shown_at = time.perf_counter()
            await asyncio.sleep(0)
        rate = f"{steps} tokens, {steps / (time.perf_counter() - started):,.0f} per second"
        self._show(drafts, with_odds=True)
        ended = all(draft.ended for draft in drafts)
        self._say(("stopped" if self._stopped else "done, the text ended itself" if ended else "done") + f": {rate}")

    def _show(self, drafts: list[Draft], with_odds: bool = False) -> None:
        columns = "".join(draft.as_html(with_odds) for draft in drafts)
        note = f"{ODDS}<p><small>Point at a token, or press Tab, for its odds; dotted: below 10%.</small></p>"
        self.result.value = f'<div style="display:flex;flex-wrap:wrap;gap:2em">{columns}</div>' + note * with_odds

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        # pages without this style, as code hosts, show a title under the mouse
        return output(self.panel, self.result.value.replace(ODDS, "").replace(" data-odds=", " title="))
