"""The writing panel: a prompt, the parameters of sampling, and the text as the model writes it, with probabilities."""

from __future__ import annotations

import asyncio
import codecs
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets
import torch

from llmcore.checkpoint import CheckpointError, load_checkpoint
from llmcore.files import display_path, one_line
from llmcore.generate import PIECE_CHARACTERS, Sampling, generate_ids, prompt_ids
from llmcore.model import Transformer
from llmcore.notebook.dashboard import SETTLED, output
from llmcore.notebook.explorers import LABELLED, WIDE, Explorer, row
from llmcore.notebook.safe_html import ending, html_text, piece_text
from llmcore.tokenizer import Tokenizer

REFRESH = 0.05  # seconds between two updates of the text
UNLIKELY = 0.1  # tokens less probable than this are underlined
# shows a token's probabilities above it when the mouse is over it, or when it has the keyboard's focus
ODDS_STYLE = (
    "<style>.llm-token{position:relative} .llm-token:hover::after,.llm-token:focus::after{content:attr(data-odds);"
    "position:absolute;left:0;bottom:1.6em;z-index:9;padding:4px 8px;white-space:pre;line-height:1.4;font-weight:400;"
    "background:#fff;color:#000;border:1px solid #555;border-radius:4px}</style>"
)
Alternatives = list[tuple[int, float]]  # ids and their probabilities


@torch.inference_mode()
def odds(model: Transformer, ids: Sequence[int], start: int, vocab_size: int, count: int = 5) -> list[Alternatives]:
    """The probability of each token from a place on, and the likeliest tokens there.

    The probabilities are the model's own, before temperature and the other parameters of sampling. Each is computed
    from at least half a context, or from all tokens before it.

    Args:
        model: the language model.
        ids: (time,) the whole text.
        start: the first place, 1 or more.
        vocab_size: of the tokenizer; ids from this number on are left out.
        count: how many of the likeliest tokens.

    Returns:
        For each place the token itself and its probability, then the `count` likeliest tokens there.
    """
    context, device = model.config.max_seq_len, model.tok_embeddings.weight.device
    alternatives: list[Alternatives] = []
    place = start
    while place < len(ids):
        first = max(0, place - max(1, context // 2))
        window = torch.as_tensor(ids[first : first + context], device=device)
        probabilities = model(window[None])[0, :, :vocab_size].float().softmax(-1)
        end = min(len(ids), first + len(window) + 1)
        for at in range(place, end):
            row = probabilities[at - 1 - first]
            top = row.topk(min(count, len(row)))
            own = ids[at], float(row[ids[at]])
            alternatives.append([own, *zip(top.indices.tolist(), top.values.tolist(), strict=True)])
        place = end
    return alternatives


@dataclass
class Draft:
    """The text that a model writes after a prompt, complete or not.

    Attributes:
        name: of the model, as shown.
        prompt: the text before.
        ids: of the prompt (as much as fits into the context) and of the model's text.
        start: the place in `ids` where the model's text begins.
        ended: whether the model has ended the text itself, with eos.
    """

    name: str
    model: Transformer
    tokenizer: Tokenizer
    prompt: str
    ids: list[int]
    start: int
    ended: bool = False

    def write(self, count: int, **sampling: Any) -> Iterator[None]:
        """Add tokens one by one, and yield after each."""
        tokenizer = self.tokenizer
        options = {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size, **sampling}
        for [id] in generate_ids(self.model, [self.ids], count, **options):
            self.ended = id == tokenizer.eos_id
            if not self.ended:
                self.ids.append(id)
            yield

    def text(self) -> str:
        """The model's text, without half a character at the end."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(b"".join(map(self.tokenizer.id_to_bytes, self.ids[self.start :])))

    def as_html(self, with_odds: bool = False) -> str:
        """Prompt and text. With odds, each token shows its alternatives under the mouse."""
        prompt = html_text(ending(self.prompt))
        written = self._spans() if with_odds else html_text(self.text())
        return (
            f'<div style="flex:1 1 20em;max-width:60em"><small>{html_text(self.name)}</small>'
            f'<p style="white-space:pre-wrap;line-height:1.9"><b>{prompt}</b>{written}</p></div>'
        )

    def _spans(self) -> str:
        """The text as HTML, one span a token. Tokens that are bytes of one character share a span."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokenizer = self.tokenizer
        alternatives = odds(self.model, self.ids, self.start, tokenizer.vocab_size)
        spans, hints, least = [], [], 1.0
        for id, [(_, own), *others] in zip(self.ids[self.start :], alternatives, strict=True):
            likeliest = "".join(f"\n{p:7.1%}  {piece_text(tokenizer, other)}" for other, p in others)
            hints.append(f"{piece_text(tokenizer, id)}  {own:.1%}\nlikeliest here:{likeliest}")
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
    """A prompt, the parameters of sampling, and the text as the model writes it, with a button to stop it.

    When the text is complete, point at a token, or press Tab, to see its probability and the likeliest alternatives.
    Tokens less than 10% likely are underlined. A second checkpoint can write beside the first, on the same prompt.

    Args:
        model: the language model.
        tokenizer: the one that it was trained with.
        prompt: the prompt at first.
        max_new_tokens: how many tokens at first.
        others: checkpoints to compare with. Each is loaded when it is chosen.

    Attributes:
        prompt, temperature, top_k, top_p, min_p, repetition_penalty, seed, count, other: the controls.
        write_button, stop_button: begin to write, and stop.
        state: what the panel does now, in words.
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
            style = {"description_width": "13em"}
            layout = {"flex": "1 1 30em", "min_width": "28em", "max_width": "36em"}
            return kind(value=value, min=low, max=high, step=step, description=words, style=style, layout=layout)

        # the controls
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

        # where they stand
        sliders = row(self.temperature, self.min_p, self.top_k, self.repetition_penalty, self.top_p, self.count)
        choices = row(self.seed, *([self.other] if others else []))
        super().__init__(self.prompt, sliders, choices, row(self.write_button, self.stop_button, self.state))
        self.write_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self._stop())

    def start(self) -> asyncio.Task[None]:
        """Begin to write, as the write button does. The kernel stays free for the stop button."""
        self.write_button.disabled, self.stop_button.disabled, self._stopped = True, False, False
        return asyncio.ensure_future(self._write())

    def _stop(self) -> None:
        self._stopped = True

    async def _write(self) -> None:
        try:
            await asyncio.sleep(SETTLED)
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
        Sampling(**values).check(self.count.value)
        return {**values, "seed": int(seed) if seed else None}

    def _drafts(self) -> list[Draft]:
        writers = [(self.name, self.model, self.tokenizer)]
        if path := self.other.value:
            if self._second is None or self._second[0] != path:
                self._say(f"loading {display_path(path)}")
                checkpoint = load_checkpoint(path, device=str(self.model.tok_embeddings.weight.device))
                if checkpoint.tokenizer is None:
                    raise ValueError(f"{display_path(path)} has no tokenizer: it belongs to the toy task")
                self._second = (path, checkpoint.model, checkpoint.tokenizer)
            writers.append((display_path(path), *self._second[1:]))
        drafts = []
        for name, model, tokenizer in writers:
            ids = prompt_ids(model, tokenizer, self.prompt.value)
            drafts.append(Draft(name, model, tokenizer, self.prompt.value, ids, len(ids)))
        return drafts

    async def _stream(self, drafts: list[Draft], sampling: dict[str, Any]) -> None:
        """Let all drafts write, a token each in turn, and show them now and then."""
        started, shown_at, tokens = time.perf_counter(), 0.0, 0
        self._show(drafts)
        for _ in itertools.zip_longest(*(draft.write(self.count.value, **sampling) for draft in drafts)):
            tokens += 1
            if time.perf_counter() - shown_at > REFRESH:
                self._show(drafts)
                self._say(f"writing, {tokens} tokens so far")
                shown_at = time.perf_counter()
            await asyncio.sleep(0)
            if self._stopped:
                break

        seconds = time.perf_counter() - started
        self._show(drafts, with_odds=True)
        state = "done, the text ended itself" if all(draft.ended for draft in drafts) else "done"
        self._say(f"{'stopped' if self._stopped else state}: {tokens} tokens, {tokens / seconds:,.0f} per second")

    def _show(self, drafts: list[Draft], with_odds: bool = False) -> None:
        columns = "".join(draft.as_html(with_odds) for draft in drafts)
        note = "<p><small>Point at a token, or press Tab, for its odds; dotted: below 10%.</small></p>"
        html = f'<div style="display:flex;flex-wrap:wrap;gap:2em">{columns}</div>'
        self.result.value = html + ODDS_STYLE + note if with_odds else html

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        # pages that remove styles, as code hosts do, can show a title under the mouse
        return output(self.panel, self.result.value.replace(ODDS_STYLE, "").replace(" data-odds=", " title="))
