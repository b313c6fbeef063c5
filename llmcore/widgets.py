"""What a person watching can touch: a training dashboard, a token explorer, text boxes for trained models.

Headless, under papermill or nbval, the dashboard prints a line at each validation and leaves one static picture,
and the explorers stay away: nobody is there to use them, and a saved widget shows as a blank.
"""

from __future__ import annotations

import asyncio
import html
import io
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import ipywidgets
from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.figure import Figure

from llmcore.generate import stream
from llmcore.model import Transformer
from llmcore.plots import training_curves
from llmcore.tokenizer import Tokenizer
from llmcore.train import Event, Trainer

DRAWING_BUDGET = 0.02  # share of the time that live drawing may take


def is_watched() -> bool:
    """Whether a person sees this notebook: papermill and nbval forbid input, JupyterLab allows it.

    The environment variable LLM_WORKBOOK_WATCHED (0 or 1) overrides.
    """
    override = os.environ.get("LLM_WORKBOOK_WATCHED")
    if override is not None:
        return override == "1"
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(kernel is not None and getattr(kernel, "_allow_stdin", False))


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


class TrainingDashboard:
    """Runs a trainer step by step, showing it live to a person and as text and one picture to a log.

    Args:
        title: of the picture.
        metric: what to draw beside the training loss: see `plots.training_curves`.
        metric_label: its name and unit.

    Attributes:
        events: all the trainer's events.
        drawing_share: the part of the time that went into drawing.
    """

    def __init__(
        self, title: str = "", metric: str = "val_loss", metric_label: str = "validation loss (nats per token)"
    ) -> None:
        self.events: list[Event] = []
        self.figure = lambda: training_curves(self.events, title, metric, metric_label)
        self.drawing_share = 0.0
        self._drawing = 0.0
        self._paused = False

    async def run(self, trainer: Trainer) -> None:
        """Train to the end, until stopped or interrupted. Await it in a cell: clicks arrive between two steps."""
        started = time.perf_counter()
        watched = is_watched()
        picture, panel = self._panel(trainer) if watched else (None, None)
        handle = display(panel, display_id=True) if watched else None
        next_draw = 0.0
        steps = trainer.steps()
        try:
            for event in steps:
                self.events.append(event)
                now = time.perf_counter()
                if picture is not None:
                    self._label.value = html.escape(progress_line(event, trainer))
                    if now >= next_draw:
                        picture.value = png(self.figure())
                        cost = time.perf_counter() - now
                        self._drawing += cost
                        next_draw = time.perf_counter() + cost / DRAWING_BUDGET
                elif "val_loss" in event:
                    print(progress_line(event, trainer), flush=True)
                await asyncio.sleep(0)
                while self._paused and not trainer.stop_requested:
                    await asyncio.sleep(0.05)
        finally:
            steps.close()  # saves if the loop did not end by itself
            self.drawing_share = self._drawing / max(1e-9, time.perf_counter() - started)
            if self.events:
                last = Image(png(self.figure()), alt="training curves", embed=True, width=1000)
                if handle is not None:
                    handle.update(last)
                    print(progress_line(self.events[-1], trainer))
                else:
                    display(last)

    def _panel(self, trainer: Trainer) -> tuple[ipywidgets.Image, ipywidgets.Widget]:
        picture = ipywidgets.Image(format="png", layout={"max_width": "1000px"})
        self._label = ipywidgets.HTML("starting: the first step compiles the model")
        buttons = []
        for text, icon, action in (
            ("pause / resume", "pause", self._toggle),
            ("stop and save", "stop", trainer.stop),
            ("save now", "save", trainer.save),
            ("sample now", "pencil", trainer.sample),
        ):
            button = ipywidgets.Button(description=text, icon=icon, tooltip=text)
            button.on_click(lambda _, action=action: action())
            buttons.append(button)
        return picture, ipywidgets.VBox([ipywidgets.HBox(buttons), self._label, picture])

    def _toggle(self) -> None:
        self._paused = not self._paused


def progress_line(event: Event, trainer: Trainer) -> str:
    """One line about a step: what it cost, how good it is, how long it will take still."""
    parts = [f"step {event['step']:,}/{trainer.config.max_steps:,}", f"loss {event['loss']:.3f}"]
    if "val_loss" in event:
        parts.append(f"validation {event['val_loss']:.3f}")
    if "val_bits_per_byte" in event:
        parts.append(f"{event['val_bits_per_byte']:.3f} bits/byte")
    if "exact_match" in event:
        parts.append(f"exact match {event['exact_match']:.2%}")
    left = (trainer.config.max_steps - event["step"]) * event["seconds"]
    parts += [f"{event['tokens_per_second']:,.0f} tokens/s", f"about {left:.0f} s left"]
    return " | ".join(parts)


def token_explorer(tokenizer: Tokenizer, text: str) -> ipywidgets.Widget:
    """Type a text, see its pieces as coloured boxes with their ids."""
    box = ipywidgets.Textarea(value=text, description="text", layout={"width": "95%", "height": "5em"})
    shown = ipywidgets.HTML()

    def show(_: Any = None) -> None:
        ids = tokenizer.encode(box.value)
        shown.value = (
            f"<p>{len(ids)} tokens, {len(box.value)} characters, {len(box.value.encode())} bytes</p>"
            + pieces_html(tokenizer, ids)
        )

    box.observe(show, "value")
    show()
    return ipywidgets.VBox([box, shown])


def pieces_html(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Pieces as coloured boxes, ids in small print below; text from outside is escaped."""
    colors = ("#cfe4f3", "#fbe6bd", "#c9e9dd", "#f2d9e6")
    spans = [
        f'<span style="background:{colors[n % 4]};color:#000;display:inline-block;padding:2px 4px;margin:1px;'
        f'border-radius:4px;text-align:center">{html.escape(show_piece(tokenizer, id))}'
        f"<br><small>{id}</small></span>"
        for n, id in enumerate(ids)
    ]
    return "<div>" + "".join(spans) + "</div>"


def show_piece(tokenizer: Tokenizer, id: int) -> str:
    """A token as a person reads it: "⏎" for a newline, "␣" for spaces, ⟨E4⟩ for a lone byte."""
    if tokenizer.is_byte(id):
        return f"⟨{tokenizer.id_to_bytes(id)[0]:02X}⟩"
    text = tokenizer.id_to_bytes(id).decode()
    return text.replace("\n", "⏎").replace(" ", "␣") or tokenizer.id_to_piece(id)


def answer_box(answer: Callable[[str], str], text: str, description: str) -> ipywidgets.Widget:
    """A line to type in, and the model's answer below."""
    box = ipywidgets.Text(value=text, description=description, continuous_update=False, layout={"width": "60%"})
    shown = ipywidgets.HTML()

    def show(_: Any = None) -> None:
        try:
            shown.value = f"<code>{html.escape(answer(box.value))}</code>"
        except ValueError as error:
            shown.value = f"⚠ {html.escape(str(error))}"

    box.observe(show, "value")
    show()
    return ipywidgets.VBox([box, shown])


def generation_panel(
    model: Transformer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 100
) -> ipywidgets.Widget:
    """A prompt, the sampling controls, and the text as it comes, with a button to stop it."""
    box = ipywidgets.Textarea(value=prompt, description="prompt", layout={"width": "95%"})
    temperature = ipywidgets.FloatSlider(value=0.8, min=0, max=2, step=0.05, description="temperature")
    top_p = ipywidgets.FloatSlider(value=0.95, min=0.05, max=1, step=0.05, description="top_p")
    count = ipywidgets.IntSlider(value=max_new_tokens, min=1, max=1000, description="tokens")
    write = ipywidgets.Button(description="write", icon="play", tooltip="continue the prompt")
    halt = ipywidgets.Button(description="stop", icon="stop", tooltip="stop writing")
    shown = ipywidgets.HTML()
    halted = False

    async def go() -> None:
        nonlocal halted
        halted, write.disabled, text = False, True, ""
        try:
            for piece in stream(model, tokenizer, box.value, count.value, temperature.value, top_p=top_p.value):
                text += piece
                shown.value = f"<p style='white-space:pre-wrap'><b>{html.escape(box.value)}</b>{html.escape(text)}</p>"
                await asyncio.sleep(0)
                if halted:
                    break
        finally:
            write.disabled = False

    def stop(_: Any) -> None:
        nonlocal halted
        halted = True

    write.on_click(lambda _: asyncio.ensure_future(go()))
    halt.on_click(stop)
    controls = ipywidgets.HBox([temperature, top_p, count])
    return ipywidgets.VBox([box, controls, ipywidgets.HBox([write, halt]), shown])
