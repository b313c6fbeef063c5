"""Watching a run and steering it: the training dashboard.

The trainer is a plain generator of events. The dashboard takes them one by one and hands each to the same two
functions, `run_status` and `plots.training_curves`, whoever is there: a person gets a panel with buttons, a log gets a
line at each validation and one picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets
import psutil
import torch
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from llmcore.files import display_path, write_atomic
from llmcore.notebook import plots
from llmcore.notebook.run_page import write_summary
from llmcore.notebook.safe_html import html_text
from llmcore.runs import read_metrics
from llmcore.train import Event, Trainer

DRAWING_BUDGET = 0.01  # share of the time that live drawing may take
REFRESH = 0.5  # seconds between two updates of the numbers
LOOP_ROUNDS = 10  # of the event loop between two steps
BY_HAND = 1.0  # seconds between two cells that only a person takes: a program sends the next cell sooner
VALIDATED = ("val_loss", "val_bits_per_byte", "exact_match")  # measured now and then, shown until the next time


def is_watched() -> bool:
    """Whether a person sees this notebook: papermill and nbval forbid input, JupyterLab allows it.

    The environment variable LLM_WORKBOOK_WATCHED (0 or 1) overrides.
    """
    override = os.environ.get("LLM_WORKBOOK_WATCHED")
    if override is not None:
        return override == "1"
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(kernel is not None and getattr(kernel, "_allow_stdin", False))


def output(panel: ipywidgets.Widget, stand_in: str) -> dict[str, Any]:
    """What to display: the widget for a person who watches, and HTML wherever it cannot live.

    A code host, a headless run and a notebook opened without its kernel would show a blank instead.
    """
    return {"text/html": stand_in, "text/plain": "", **(panel._repr_mimebundle_() if is_watched() else {})}


def run_status(event: Event, trainer: Trainer, seconds_left: float) -> dict[str, str]:
    """How a run stands after a step, as words by name: what it cost, how good it is, how long it will take still."""
    found = {"step": f"{event['step']:,}/{trainer.config.max_steps:,}", "loss": f"{event['loss']:.3f}"}
    since = event.get("validated_at", event["step"])
    at = f" at step {since:,}" if since != event["step"] else ""
    if "val_loss" in event:
        found["validation"] = f"{event['val_loss']:.3f}{at}"
    if "val_bits_per_byte" in event:
        found["bits/byte"] = f"{event['val_bits_per_byte']:.3f}{at}"
    if "exact_match" in event:
        found["exact match"] = f"{event['exact_match']:.2%}{at}"
    found["tokens/s"] = f"{event['tokens_per_second']:,.0f}"
    found["learning rate"] = f"{event['learning_rate']:.2e}"
    found["gradient norm"] = f"{event['grad_norm']:.2f}"
    found["memory"] = f"{memory_used(trainer.device) / 1e9:.2f} GB"
    found["skipped"] = f"{event['skipped']}"
    found["left"] = duration(seconds_left)
    return found


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 5 h 7 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def memory_used(device: torch.device) -> int:
    """Bytes in use: on a GPU torch's peak there, else what the process holds of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class RunStoppedError(RuntimeError):
    """A cell would train although the notebook was stopped. It trains when it is run again."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # its reader needs no stack


class TrainingDashboard:
    """Runs a trainer step by step, showing it live to a person and as text and one picture to a log.

    Run the cell again, and the run goes on with its whole curve: the events are read from its folder. Close the tab,
    and it goes on in the kernel; the reopened page shows where it is. Interrupt the kernel, and it stops and saves.

    A person who stops a run, by its button, an interrupt or a signal, stops the notebook: cells that wait for the
    kernel are left out, and the next one that would train by itself ends in an error.

    Args:
        title: of the picture.
        metric: what to draw beside the training loss: see `plots.training_curves`.
        metric_label: its name and unit.

    Attributes:
        events: all the run's events, those of earlier sittings too.
        overhead: the share of the last `run` that did not go into training, pauses left out.
        panel: everything below; None until somebody watches.
        pause_button, resume_button, stop_button, save_button, sample_button: to press.
        prompt: what "sample now" continues.
        log_x: whether steps are drawn on a logarithmic axis.
        status, numbers, newest, picture: what it shows: state, facts, the newest sample, the curves.
    """

    def __init__(
        self, title: str = "", metric: str = "val_loss", metric_label: str = "validation loss (nats per token)"
    ) -> None:
        self.title, self.metric, self.metric_label = title, metric, metric_label
        self.events: list[Event] = []
        self.overhead = 0.0
        self.panel: ipywidgets.Widget | None = None
        self._paused = self._asked_to_stop = False
        self._validated: Event = {}

    @staticmethod
    def attach() -> None:
        """Show the panel of the run that this kernel is training once more, to watch and steer it.

        The cell that trains holds the kernel, and another one would wait for its end. JupyterLab's "New Subshell
        Console for Notebook" does not wait.
        """
        if _running is None or _running.panel is None:
            print("no run is shown by this kernel at the moment")
        else:
            display(_running.panel)

    def figure(self, log_x: bool = False) -> Figure:
        """The curves so far."""
        return plots.training_curves(self.events, self.title, self.metric, self.metric_label, log_x=log_x)

    async def run(self, trainer: Trainer) -> None:
        """Train to the end, until stopped or interrupted. Await it in a cell: clicks arrive between two steps.

        Raises:
            RunStoppedError: if the notebook was stopped, and nobody has run this cell by hand since.
        """
        _refuse_to_go_on()
        global _running
        _running = self
        try:
            with self._signals_noted(trainer), _messages_answered():
                await self._run(trainer)
        finally:
            _running = None
        if self._asked_to_stop:
            _stop_notebook()

    async def _run(self, trainer: Trainer) -> None:
        # later events are set aside when the first step has been taken
        self.events = [event for event in read_metrics(trainer.run_dir) if event["step"] <= trainer.step]
        started_at = trainer.step
        self._paused = False
        self._validated = {}
        for event in self.events:
            self._remember(event)
        watched = is_watched()
        handle = None
        if watched:
            self.panel = self._build(trainer)
            stand_in = (
                f"<p>Training was going on when this was saved; its run is in {display_path(trainer.run_dir)}.</p>"
            )
            handle = display(output(self.panel, stand_in), raw=True, display_id=True)
            await _let_messages_in()
        clock = _Clock()
        steps = trainer.steps()
        next_draw = next_refresh = 0.0
        ended = "ended by an error, shown below"
        try:
            while (event := clock.training(functools.partial(next, steps, None))) is not None:
                self.events.append(event)
                self._remember(event)
                left = clock.seconds_per_step() * (trainer.config.max_steps - trainer.step)
                now = time.perf_counter()
                if not watched:
                    if "val_loss" in event:
                        self._print(event, trainer, left)
                elif now >= next_refresh or "val_loss" in event or "sample" in event:
                    self._show(event, trainer, left)
                    next_refresh = now + REFRESH
                    if now >= next_draw:
                        cost = self._draw()
                        next_draw = time.perf_counter() + cost / DRAWING_BUDGET
                await _let_messages_in()
                if self._asked_to_stop:  # by a signal before the first step, too
                    trainer.request_stop()
                if self._paused and not trainer.stop_requested:
                    await self._wait(trainer, left, clock)
            self._asked_to_stop |= trainer.interrupted
            done = trainer.step >= trainer.config.max_steps
            ended = "finished" if done else f"stopped at step {trainer.step:,} and saved; run the cell again to go on"
        finally:
            clock.training(steps.close)  # saves if the loop did not end by itself
            self.overhead = clock.overhead()
            if self.events:
                self._leave(trainer, ended, handle, trained=trainer.step > started_at)

    def _remember(self, event: Event) -> None:
        """Keep the figures of a validation, and its step."""
        if found := {name: event[name] for name in VALIDATED if name in event}:
            self._validated |= {**found, "validated_at": event["step"]}

    @contextlib.contextmanager
    def _signals_noted(self, trainer: Trainer) -> Iterator[None]:
        """Take a signal outside the trainer's steps, which have handlers of their own, for a wish to stop as well."""
        self._asked_to_stop = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self._asked_to_stop:
                raise KeyboardInterrupt
            self._asked_to_stop = True
            trainer.request_stop()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def _wait(self, trainer: Trainer, left: float, clock: _Clock) -> None:
        """Stand still until somebody presses resume or stop; save and sample when asked to."""
        event = self.events[-1]
        self._show(event, trainer, left)
        self._draw()
        started = time.perf_counter()
        while self._paused and not trainer.stop_requested:
            if done := trainer.serve_requests():
                event |= done
                self._show(event, trainer, left)
            await asyncio.sleep(0.05)
        clock.paused += time.perf_counter() - started
        self._say("stopping after this step" if trainer.stop_requested else "training")

    def _print(self, event: Event, trainer: Trainer, left: float) -> None:
        print(" | ".join(f"{name} {value}" for name, value in run_status(event, trainer, left).items()), flush=True)

    def _leave(self, trainer: Trainer, ended: str, handle: Any, trained: bool) -> None:
        """The last state, where the reader of a page, a file or a folder looks for it."""
        figure = self.figure()
        with contextlib.suppress(OSError):  # a full disk: the notebook still has the picture
            if trained:  # a run that was refused, or was at its end, leaves its folder as it is
                write_atomic(trainer.run_dir / "curves.png", plots.png(figure))
                write_summary(trainer.run_dir)
        if handle is None:
            display(figure)
            return
        # a page that was closed and opened again shows the panel for good, the others replace it by the picture
        self._show(self.events[-1], trainer, 0.0)
        self._say(ended)
        self._draw()
        for control in self._controls:
            control.disabled = True
        handle.update(figure)
        self._print(self.events[-1], trainer, 0.0)
        print(ended)

    # What a person sees and touches

    def _build(self, trainer: Trainer) -> ipywidgets.Widget:
        def button(text: str, icon: str, tooltip: str, action: Callable[[], None]) -> ipywidgets.Button:
            made = ipywidgets.Button(description=text, icon=icon, tooltip=tooltip, layout={"width": "auto"})
            made.on_click(lambda _: action())
            return made

        def stop() -> None:
            self._asked_to_stop = True
            trainer.request_stop()
            self._say("stopping after this step")

        def pause(paused: bool) -> None:
            self._paused = paused
            self._say("pausing after this step" if paused else "training")

        def sample() -> None:
            trainer.request_sample(self.prompt.value)
            self.newest.value = "<p>a sample comes after this step</p>"

        self.pause_button = button("pause", "pause", "stand still after this step", lambda: pause(True))
        self.resume_button = button("resume", "play", "go on from here", lambda: pause(False))
        self.stop_button = button("stop and save", "stop", "end the run after this step and write a checkpoint", stop)
        self.save_button = button("save now", "save", "write a checkpoint after this step", trainer.request_save)
        self.sample_button = button("sample now", "pencil", "continue the prompt after this step", sample)
        self.prompt = ipywidgets.Text(
            trainer.config.sample_prompt,
            description="prompt",
            tooltip="what sample now continues",
            continuous_update=False,  # whole, and before the click that follows
        )
        self.log_x = ipywidgets.Dropdown(
            description="x axis", options=[("linear", False), ("logarithmic", True)], layout={"width": "14em"}
        )
        self.log_x.observe(lambda _: self._draw(), "value")
        self._controls = [
            self.pause_button,
            self.resume_button,
            self.stop_button,
            self.save_button,
            self.sample_button,
            self.prompt,
        ]
        self.status, self.numbers, self.newest = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "1000px"})
        self.picture.add_class("llm-curves")
        steering = ipywidgets.HBox(
            [self.pause_button, self.resume_button, self.stop_button, self.save_button, self.log_x]
        )
        steering.layout.flex_flow = "row wrap"
        asking = ipywidgets.HBox([self.sample_button, self.prompt] if trainer.sampler else [])
        self._say("starting: the first step may compile the model")
        self._draw()  # the first picture takes longest: it loads the fonts
        return ipywidgets.VBox([steering, asking, self.status, self.numbers, self.picture, self.newest])

    def _say(self, state: str) -> None:
        """Put the state into words, and let only those buttons be pressed that do something."""
        self.status.value = f"<b>state: {html_text(state)}</b>"
        self.pause_button.disabled, self.resume_button.disabled = self._paused, not self._paused

    def _show(self, event: Event, trainer: Trainer, left: float) -> None:
        cells = "".join(
            f'<td style="padding:0 1.2em 0 0"><small>{html_text(name)}</small><br><b>{html_text(value)}</b></td>'
            for name, value in run_status(self._validated | event, trainer, left).items()
        )
        self.numbers.value = f"<table><tr>{cells}</tr></table>"
        if trainer.stop_requested:
            self._say("stopping after this step")
        elif self._paused:
            self._say(f"paused at step {trainer.step:,}: press resume to go on")
        else:
            self._say("training")
        if "sample" in event:
            self.newest.value = (
                f'<p style="white-space:pre-wrap;max-width:60em"><small>sample after step {event["step"]:,}</small><br>'
                f"<b>{html_text(event['sample_prompt'])}</b>{html_text(event['sample'])}</p>"
            )
        elif "checkpoint" in event:
            self.status.value += f" <small>saved {html_text(display_path(event['checkpoint']))}</small>"

    def _draw(self) -> float:
        """Draw the curves; returns the seconds it took."""
        started = time.perf_counter()
        self.picture.value = plots.png(self.figure(self.log_x.value), live=True)
        return time.perf_counter() - started


# What a notebook's kernel must be told, since it does not know that a cell trains

_running: TrainingDashboard | None = None
_stopped_cell: tuple[Any, Any] | None = None  # which cell was stopped: what follows it does not train by itself
_last_cell_ended = 0.0


def _kernel() -> Any:
    return getattr(get_ipython(), "kernel", None)


def _running_cell(kernel: Any) -> tuple[Any, Any]:
    request = kernel.get_parent("shell")
    return request.get("metadata", {}).get("cellId"), request.get("content", {}).get("code")


def _cell_begins(_: Any) -> None:
    """Forget the stop where a person goes on: whatever cell they run, they take their time before it."""
    global _stopped_cell
    if is_watched() and time.monotonic() - _last_cell_ended >= BY_HAND:
        _stopped_cell = None


def _cell_ended(_: Any) -> None:
    global _last_cell_ended
    _last_cell_ended = time.monotonic()


def _stop_notebook() -> None:
    """Have the kernel leave out the cells that wait for it, and remember that the notebook was stopped.

    JupyterLab's Run All sends all cells at once, and the kernel drops them only after an error. Others (papermill, some
    editors) send each when the one before has ended.
    """
    global _stopped_cell
    if (kernel := _kernel()) is None:
        return
    _stopped_cell = _running_cell(kernel)
    for event, callback in (("pre_run_cell", _cell_begins), ("post_run_cell", _cell_ended)):
        with contextlib.suppress(ValueError):  # raised where it is not registered yet
            get_ipython().events.unregister(event, callback)
        get_ipython().events.register(event, callback)
    if not hasattr(kernel, "_abort_queues"):  # ipykernel has no public name for it
        return
    answer = kernel._send_abort_reply

    def left_out(*message: Any) -> None:
        """Forget the stop where a cell did wait: there all are sent at once, and what comes later is sent by hand."""
        global _stopped_cell
        _stopped_cell, kernel._send_abort_reply = None, answer
        answer(*message)

    kernel._send_abort_reply = left_out
    kernel._abort_queues()


def _refuse_to_go_on() -> None:
    """After a stop, let no cell train that nobody has run by hand. The error comes once.

    Raises:
        RunStoppedError: if all cells since were sent as soon as the one before had ended, or if nobody is there to send
            one by hand.
    """
    global _stopped_cell
    stopped, _stopped_cell = _stopped_cell, None
    if stopped is not None and stopped != _running_cell(_kernel()):
        raise RunStoppedError("training was stopped in a cell before; run this cell again to go on from there")


@contextlib.contextmanager
def _messages_answered() -> Iterator[None]:
    """Tell the page after each message of a widget that the kernel is done with it.

    A page sends the next value of a widget only then. ipykernel says so by the status "idle", but not for a message
    that comes while a cell runs: of what is typed key by key, the page would send the first letter and keep the rest.
    """
    kernel = _kernel()
    handler = kernel.shell_handlers.get("comm_msg") if kernel else None
    if handler is None:
        yield
        return
    cell = kernel.get_parent("shell")

    def handle(stream: Any, ident: Any, message: Any) -> None:
        try:
            handler(stream, ident, message)
        finally:
            kernel._publish_status("idle", "shell", message)
            kernel._publish_status("busy", "shell", cell)

    kernel.shell_handlers["comm_msg"] = handle
    try:
        yield
    finally:
        kernel.shell_handlers["comm_msg"] = handler


async def _let_messages_in() -> None:
    """Let the kernel act on all that a page has sent, for some tens of microseconds.

    A message passes through several rounds of the event loop before it acts. With one round a step, a click would take
    several steps, and so would the question that a reopened page asks for its widgets: JupyterLab sends it after three
    seconds without an answer to its first one, which waits for the end of the cell, and gives up one second later.
    """
    for _ in range(LOOP_ROUNDS):
        await asyncio.sleep(0)


class _Clock:
    """How long training took, and everything around it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.in_training = self.paused = 0.0
        self.steps = 0
        self.first_ended = 0.0

    def training(self, part: Callable[[], Any]) -> Any:
        """Run one step, or what ends the run, and count its time as training."""
        started = time.perf_counter()
        try:
            return part()
        finally:
            ended = time.perf_counter()
            self.in_training += ended - started
            self.steps += 1
            if self.steps == 1:
                self.first_ended = ended

    def seconds_per_step(self) -> float:
        """The mean so far, validations included, without the first step, which compiles, where there are others."""
        if self.steps == 1:
            return self.in_training
        return (time.perf_counter() - self.first_ended - self.paused) / (self.steps - 1)

    def overhead(self) -> float:
        """The share of the time, pauses left out, that was not training."""
        total = time.perf_counter() - self.started - self.paused
        return max(0.0, 1 - self.in_training / max(1e-9, total))
