"""Watching a run and steering it: the training dashboard.

The trainer is a generator of events. The dashboard passes them to two functions, `run_status` and
`plots.training_curves`. A person sees a panel with buttons. A log gets a line at each validation, and one picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
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
from llmcore.notebook.safe_html import ending, html_text
from llmcore.runs import read_metrics, signals_call
from llmcore.train import Event, Trainer

DRAWING_BUDGET = 0.01  # share of the time that live drawing may take
REFRESH = 0.5  # seconds between two updates of the numbers
LOOP_ROUNDS = 10  # of the event loop between two steps
SLOW_SAVE = 1.0  # seconds of a save from which on they are shown
SETTLED = 0.2  # seconds that a button waits for the text that was typed before: two threads may handle the two messages
BY_HAND = 1.0  # seconds between two cells; a program sends the next cell sooner, a person later
VALIDATED = ("val_loss", "val_bits_per_byte", "exact_match")  # measured at a validation, shown until the next one


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
    """What to display: the widget for a person who watches, and HTML where a widget cannot be shown.

    A code host, a headless run and a notebook opened without its kernel would otherwise show nothing.
    """
    return {"text/html": stand_in, "text/plain": "", **(panel._repr_mimebundle_() if is_watched() else {})}


def run_status(event: Event, trainer: Trainer, seconds_left: float) -> dict[str, str]:
    """How a run stands after a step: names and values, both as text."""
    status = {"step": f"{event['step']:,}/{trainer.config.max_steps:,}", "loss": f"{event['loss']:.3f}"}
    validated_at = event.get("validated_at", event["step"])
    at = f" at step {validated_at:,}" if validated_at != event["step"] else ""
    if "val_loss" in event:
        status["validation"] = f"{event['val_loss']:.3f}{at}"
    if "val_bits_per_byte" in event:
        status["bits/byte"] = f"{event['val_bits_per_byte']:.3f}{at}"
    if "exact_match" in event:
        status["exact match"] = f"{event['exact_match']:.2%}{at}"
    status["tokens/s"] = f"{event['tokens_per_second']:,.0f}"
    status["learning rate"] = f"{event['learning_rate']:.2e}"
    status["gradient norm"] = f"{event['grad_norm']:.2f}"
    status["memory"] = f"{memory_used(trainer.device) / 1e9:.2f} GB"
    status["skipped"] = f"{event['skipped']}"
    if event.get("checkpoint_seconds", 0) > SLOW_SAVE:
        status["saved in"] = duration(event["checkpoint_seconds"])
    status["left"] = duration(seconds_left)
    return status


def duration(seconds: float) -> str:
    """Seconds as text for a person: 42 s, 3 min 20 s, 5 h 7 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def memory_used(device: torch.device) -> int:
    """Bytes in use: on a GPU torch's peak there, else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class RunStoppedError(RuntimeError):
    """A cell would train although the notebook was stopped. It trains when it is run again."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # without a stack: nothing is wrong in the code


class TrainingDashboard:
    """Runs a trainer step by step, and shows it live to a person or as text and one picture in a log.

    If the cell is run again, the run goes on with its whole curve: the events are read from its folder. If the tab is
    closed, the run goes on in the kernel, and the reopened page shows its state. If the kernel is interrupted, the run
    stops and saves.

    A person who stops a run, by its button, an interrupt or a signal, also stops the notebook. Cells that wait for the
    kernel are not run. The next cell that would train by itself ends in an error.

    Args:
        title: of the picture.
        metric: what to draw beside the training loss: see `plots.training_curves`.
        metric_label: its name and unit.

    Attributes:
        events: all the run's events, those before a resume too.
        overhead: the share of the last `run` that did not go into training, without pauses.
        panel: everything below; None until a person watches.
        pause_button, resume_button, stop_button, save_button, sample_button: buttons.
        prompt: what "sample now" continues.
        log_x: whether steps are drawn on a logarithmic axis.
        status, numbers, sample, picture: the state, the values of `run_status`, the newest sample, the curves.
    """

    def __init__(
        self, title: str = "", metric: str = "val_loss", metric_label: str = "validation loss (nats per token)"
    ) -> None:
        self.title, self.metric, self.metric_label = title, metric, metric_label
        self.events: list[Event] = []
        self.overhead = 0.0
        self.panel: ipywidgets.Widget | None = None
        self._paused = self._asked_to_stop = self._asked_to_draw = False
        self._sample_asked_at: float | None = None
        self._validated: Event = {}

    @staticmethod
    def attach() -> None:
        """Show the panel of the run that this kernel is training once more.

        The cell that trains holds the kernel, and another cell would wait for its end. A console opened with
        JupyterLab's "New Subshell Console for Notebook" does not wait.
        """
        if _running is None or _running.panel is None:
            print("this kernel shows no run at the moment")
        else:
            display(_running.panel)

    def figure(self, log_x: bool = False) -> Figure:
        """The curves so far."""
        return plots.training_curves(self.events, self.title, self.metric, self.metric_label, log_x=log_x)

    async def run(self, trainer: Trainer) -> None:
        """Train to the end, or until stopped or interrupted. Await it in a cell: clicks arrive between two steps.

        Raises:
            RunStoppedError: if the notebook was stopped, and this cell was not run by hand since.
        """
        _refuse_after_stop()
        global _running
        _running = self
        try:
            with self._stops_on_signals(trainer), _messages_answered():
                await self._train(trainer)
        finally:
            _running = None
        if self._asked_to_stop:
            _stop_notebook()

    async def _train(self, trainer: Trainer) -> None:
        self._begin(trainer)
        display_handle = await self._display_panel(trainer)
        first_step = trainer.step
        next_draw = next_refresh = 0.0
        ended = "ended by an error, shown below"
        clock = _Clock()
        steps = trainer.steps()
        try:
            while (event := clock.training(functools.partial(next, steps, None))) is not None:
                self.events.append(event)
                self._remember(event)
                seconds_left = clock.seconds_per_step() * (trainer.config.max_steps - trainer.step)

                # show it
                now = time.perf_counter()
                if display_handle is None:
                    if "val_loss" in event or event.get("checkpoint_seconds", 0) > SLOW_SAVE:
                        self._print(event, trainer, seconds_left)
                elif now >= next_refresh or self._asked_to_draw or "val_loss" in event or "sample" in event:
                    self._show(event, trainer, seconds_left)
                    next_refresh = now + REFRESH
                    if now >= next_draw or self._asked_to_draw:
                        cost = self._draw()
                        next_draw = time.perf_counter() + cost / DRAWING_BUDGET

                # do what was asked for
                await _let_messages_in()
                if self._asked_to_stop:  # by a signal that may have come before the first step
                    trainer.request_stop()
                self._request_sample(trainer)
                if self._paused and not trainer.stop_requested:
                    await self._wait(trainer, seconds_left, clock)

            self._asked_to_stop |= trainer.interrupted
            at_end = trainer.step >= trainer.config.max_steps
            ended = "finished" if at_end else f"stopped at step {trainer.step:,} and saved; run the cell again to go on"
        finally:
            clock.training(steps.close)  # saves if the loop was left by an error
            self.overhead = clock.overhead()
            if self.events:
                self._show_end(trainer, ended, display_handle, trained=trainer.step > first_step)

    def _begin(self, trainer: Trainer) -> None:
        """Take over the events up to the trainer's step. The trainer removes later ones at its first step."""
        self.events = [event for event in read_metrics(trainer.run_dir) if event["step"] <= trainer.step]
        self._paused, self._sample_asked_at = False, None
        self._validated = {}
        for event in self.events:
            self._remember(event)

    async def _display_panel(self, trainer: Trainer) -> Any:
        """Display the panel if a person watches. Returns the handle of the output; None if nobody watches."""
        if not is_watched():
            return None
        self.panel = self._build(trainer)
        stand_in = f"<p>Training was going on when this was saved; its run is in {display_path(trainer.run_dir)}.</p>"
        handle = display(output(self.panel, stand_in), raw=True, display_id=True)
        await _let_messages_in()
        return handle

    def _remember(self, event: Event) -> None:
        """Keep the values of a validation, and its step."""
        values = {name: event[name] for name in VALIDATED if name in event}
        if values:
            self._validated |= {**values, "validated_at": event["step"]}

    @contextlib.contextmanager
    def _stops_on_signals(self, trainer: Trainer) -> Iterator[None]:
        """Stop the run on a signal between two steps too. During a step the trainer has its own handlers."""
        self._asked_to_stop = False

        def stop() -> None:
            if self._asked_to_stop:  # by the button
                raise KeyboardInterrupt
            self._asked_to_stop = True
            trainer.request_stop()

        with signals_call(stop):
            yield

    async def _wait(self, trainer: Trainer, seconds_left: float, clock: _Clock) -> None:
        """Pause until a person presses resume or stop. Save and sample when asked to."""
        event = self.events[-1]
        self._show(event, trainer, seconds_left)
        self._draw()
        started = time.perf_counter()
        while self._paused and not trainer.stop_requested:
            self._request_sample(trainer)
            if served := trainer.serve_requests():
                event |= served
                self._show(event, trainer, seconds_left)
            if self._asked_to_draw:
                self._draw()
            await asyncio.sleep(0.05)
        clock.paused += time.perf_counter() - started
        self._say("stopping after this step" if trainer.stop_requested else "training")

    def _request_sample(self, trainer: Trainer) -> None:
        """Pass a click on "sample now" to the trainer, with the text that is in the box a moment after it."""
        if self._sample_asked_at is not None and time.monotonic() >= self._sample_asked_at + SETTLED:
            self._sample_asked_at = None
            trainer.request_sample(self.prompt.value)

    def _print(self, event: Event, trainer: Trainer, seconds_left: float) -> None:
        """A line that fits on a page: the picture has the rate and the gradient."""
        left_out = {"learning rate", "gradient norm"} | (set() if event["skipped"] else {"skipped"})
        status = run_status(event, trainer, seconds_left)
        print(", ".join(f"{name} {value}" for name, value in status.items() if name not in left_out), flush=True)

    def _show_end(self, trainer: Trainer, ended: str, handle: Any, trained: bool) -> None:
        """Write the picture and the page into the run's folder, and show the last state in the notebook."""
        figure = self.figure()
        if trained:  # else the run was refused or is at its end, and its folder stays as it is
            with contextlib.suppress(OSError):  # a full disk: the notebook still has the picture
                write_atomic(trainer.run_dir / "curves.png", plots.png(figure))
                write_summary(trainer.run_dir)
        if handle is None:
            display(figure)
            return

        # a page that was closed and opened again keeps the panel; other pages replace it by the picture
        self._show(self.events[-1], trainer, 0.0)
        self._say(ended)
        self._draw()
        for control in self._controls:
            control.disabled = True
        handle.update(figure)
        self._print(self.events[-1], trainer, 0.0)
        print(ended)

    # The panel

    def _build(self, trainer: Trainer) -> ipywidgets.Widget:
        def button(text: str, icon: str, tooltip: str, action: Callable[[], None]) -> ipywidgets.Button:
            new = ipywidgets.Button(description=text, icon=icon, tooltip=tooltip, layout={"width": "auto"})
            new.on_click(lambda _: action())
            return new

        def stop() -> None:
            self._asked_to_stop = True
            trainer.request_stop()
            self._say("stopping after this step")

        def pause(paused: bool) -> None:
            self._paused = paused
            self._say("pausing after this step" if paused else "training")

        def sample() -> None:
            self._sample_asked_at = time.monotonic()
            self.sample.value = "<p>a sample comes after this step</p>"

        self.pause_button = button("pause", "pause", "stop for a while after this step", lambda: pause(True))
        self.resume_button = button("resume", "play", "go on from here", lambda: pause(False))
        self.stop_button = button("stop and save", "stop", "end the run after this step and write a checkpoint", stop)
        self.save_button = button("save now", "save", "write a checkpoint after this step", trainer.request_save)
        self.sample_button = button("sample now", "pencil", "continue the prompt after this step", sample)

        self.prompt = ipywidgets.Text(
            trainer.config.sample_prompt,
            description="prompt",
            tooltip="what sample now continues",
            continuous_update=False,  # the whole text is sent before the click on "sample now"
        )
        self.log_x = ipywidgets.Dropdown(
            description="x axis", options=[("linear", False), ("logarithmic", True)], layout={"width": "14em"}
        )
        self.log_x.observe(lambda _: self._draw_again(), "value")

        steering = [self.pause_button, self.resume_button, self.stop_button, self.save_button]
        asking = [self.sample_button, self.prompt] if trainer.sampler else []
        self._controls = [*steering, *asking]
        self.status, self.numbers, self.sample = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "1000px"})
        self.picture.add_class("llm-curves")
        first_row = ipywidgets.HBox([*steering, self.log_x], layout={"flex_flow": "row wrap"})
        second_row = ipywidgets.HBox(asking)
        self._say("starting: the first step may compile the model")
        self._draw()  # the first picture takes longest: it loads the fonts
        return ipywidgets.VBox([first_row, second_row, self.status, self.numbers, self.picture, self.sample])

    def _say(self, state: str) -> None:
        """Show the state in words, and disable the button that would change nothing."""
        self.status.value = f"<b>state: {html_text(state)}</b>"
        self.pause_button.disabled, self.resume_button.disabled = self._paused, not self._paused

    def _show(self, event: Event, trainer: Trainer, seconds_left: float) -> None:
        cells = "".join(
            f'<td style="padding:0 1.2em 0 0"><small>{html_text(name)}</small><br><b>{html_text(value)}</b></td>'
            for name, value in run_status(self._validated | event, trainer, seconds_left).items()
        )
        self.numbers.value = f"<table><tr>{cells}</tr></table>"

        if trainer.stop_requested:
            self._say("stopping after this step")
        elif self._paused:
            self._say(f"paused at step {trainer.step:,}: press resume to go on")
        else:
            self._say("training")

        if "sample" in event:
            prompt, written = html_text(ending(event["sample_prompt"])), html_text(event["sample"])
            self.sample.value = (
                f'<p style="white-space:pre-wrap;max-width:60em"><small>sample after step {event["step"]:,}</small><br>'
                f"<b>{prompt}</b>{written}</p>"
            )
        elif "checkpoint" in event:
            self.status.value += f" <small>saved {html_text(display_path(event['checkpoint']))}</small>"

    def _draw_again(self) -> None:
        """Draw the curves at once, or leave it to the cell that trains: matplotlib must not draw in two threads."""
        self._asked_to_draw = _running is self
        if not self._asked_to_draw:
            self._draw()

    def _draw(self) -> float:
        """Draw the curves; returns the seconds it took."""
        self._asked_to_draw, started = False, time.perf_counter()
        self.picture.value = plots.png(self.figure(self.log_x.value), live=True)
        return time.perf_counter() - started


# Stopping the notebook, and messages of widgets while a cell trains: ipykernel does neither by itself

_running: TrainingDashboard | None = None
_stopped_cell: tuple[Any, Any] | None = None  # the cell that was stopped; later cells do not train by themselves
_last_cell_ended = 0.0


def _kernel() -> Any:
    return getattr(get_ipython(), "kernel", None)


def _running_cell(kernel: Any) -> tuple[Any, Any]:
    request = kernel.get_parent("shell")
    return request.get("metadata", {}).get("cellId"), request.get("content", {}).get("code")


def _cell_begins(_: Any) -> None:
    """Forget the stop if a person runs this cell: a person needs more time before it than a program."""
    global _stopped_cell
    if is_watched() and time.monotonic() - _last_cell_ended >= BY_HAND:
        _stopped_cell = None


def _cell_ended(_: Any) -> None:
    global _last_cell_ended
    _last_cell_ended = time.monotonic()


def _stop_notebook() -> None:
    """Let the kernel skip the cells that wait for it, and remember that the notebook was stopped.

    JupyterLab's Run All sends all cells at once, and the kernel skips them only after an error. Other programs
    (papermill, some editors) send each cell when the one before has ended.
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
        """Forget the stop if a cell waited: then all cells were sent at once, and a later one is sent by hand."""
        global _stopped_cell
        _stopped_cell, kernel._send_abort_reply = None, answer
        answer(*message)

    kernel._send_abort_reply = left_out
    kernel._abort_queues()


def _refuse_after_stop() -> None:
    """After a stop, refuse to train in another cell, once, unless a person has run a cell by hand since.

    Raises:
        RunStoppedError: if each cell since the stop was sent as soon as the one before had ended, or nobody watches.
    """
    global _stopped_cell
    stopped, _stopped_cell = _stopped_cell, None
    if stopped is not None and stopped != _running_cell(_kernel()):
        raise RunStoppedError("training was stopped in a cell before; run this cell again to go on from there")


@contextlib.contextmanager
def _messages_answered() -> Iterator[None]:
    """Tell the page after each message of a widget that the kernel has handled it.

    A page sends a widget's next value only after the status "idle". ipykernel does not send it for messages that come
    while a cell runs. Then the page would send the first letter that a person types, and keep the others.
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
    """Let the kernel handle the messages that a page has sent. This takes some tens of microseconds.

    A message needs several rounds of the event loop. With one round a step, a click would take several steps. So would
    the request of a reopened page for its widgets, and JupyterLab waits for the answer only one second.
    """
    for _ in range(LOOP_ROUNDS):
        await asyncio.sleep(0)


class _Clock:
    """The time that training took, and the time around it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.in_training = self.paused = 0.0
        self.steps = 0
        self.first_ended = 0.0

    def training(self, part: Callable[[], Any]) -> Any:
        """Call a function (one step, or the end of the run) and count its time as training."""
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
        """The mean so far, validations included. The first step, which compiles, counts only while it is alone."""
        if self.steps == 1:
            return self.in_training
        return (time.perf_counter() - self.first_ended - self.paused) / (self.steps - 1)

    def overhead(self) -> float:
        """The share of the time, without pauses, that was not training."""
        total = time.perf_counter() - self.started - self.paused
        return max(0.0, 1 - self.in_training / max(1e-9, total))
