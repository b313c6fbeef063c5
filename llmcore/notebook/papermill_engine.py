"""A papermill engine that ends a notebook in order: `papermill --engine llmcore notebook.ipynb out.ipynb`.

On SIGTERM papermill itself dies at once and the run is lost. On SIGINT it gives the kernel two seconds. With this
engine both signals end the notebook in order, at any time. No other cell begins. The running cell is interrupted, and
papermill waits until it ends: a training cell finishes its step and saves. Then the kernel is shut down, the notebook
is written, and papermill exits with 128 + the signal's number. A second signal ends the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click
from nbclient.exceptions import CellExecutionError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine
from papermill.log import logger

REPLY_PATIENCE = 10  # seconds from the end of an interrupted cell to its reply


class InterruptibleClient(PapermillNotebookClient):
    """Executes cells until the end, an error, or a signal.

    Attributes:
        caught: the signal that ended the run.
    """

    caught: signal.Signals | None = None
    _begun = False  # the kernel has begun the cell; before that it would ignore an interrupt
    _interrupted = False

    def execute(self, **kwargs: Any) -> Any:
        """Start the kernel and execute all cells.

        Raises:
            SystemExit: after a signal, when the running cell has ended and the kernel is gone.
        """
        with self._signals_end_it():
            try:
                return super().execute(**kwargs)
            finally:
                if self.caught is not None:  # also after an error that the interrupt caused
                    self.nb.metadata.papermill["stopped_by"] = self.caught.name
                    raise SystemExit(128 + self.caught)

    def papermill_execute_cells(self) -> None:
        """Execute one cell after another. After a signal no other cell begins."""
        for index, cell in enumerate(self.nb.cells):
            if self.caught is not None:
                break
            try:
                self.nb_man.cell_start(cell, index)
                if self.caught is None:
                    self.execute_cell(cell, index)
            except CellExecutionError as error:
                self.nb_man.cell_exception(cell, cell_index=index, exception=error)
                break
            finally:
                self._begun = False
                self.nb_man.cell_complete(cell, cell_index=index)

    def process_message(self, message: Any, *args: Any, **kwargs: Any) -> Any:
        """Watch the kernel's messages for the beginning and the end of the cell."""
        if message["msg_type"] == "execute_input":
            self._begun = True
            if self.caught is not None:
                self._interrupt()
        elif message["content"].get("execution_state") == "idle" and self._interrupted:
            # the kernel may send no reply if the interrupt comes just as the cell ends: do not wait for ever
            asyncio.get_running_loop().call_later(REPLY_PATIENCE, self.task_poll_for_reply.cancel)
        return super().process_message(message, *args, **kwargs)

    def _interrupt(self) -> None:
        """Interrupt the kernel and the processes that it has started, once: a second interrupt would stop a save."""
        if not self._interrupted:
            self._interrupted = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.km.provisioner.pgid, signal.SIGINT)

    @contextlib.contextmanager
    def _signals_end_it(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the notebook. Only a main thread may set signal handlers."""
        if threading.current_thread() is not threading.main_thread() or os.name != "posix":
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self.caught is not None:
                raise KeyboardInterrupt
            self.caught = signal.Signals(number)
            message = f"{self.caught.name}: waiting for the running cell; a second one does not wait\n"
            os.write(2, message.encode())  # not by the logger, which may be in the middle of a line
            if self._begun:
                self._interrupt()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            # the command only has to write the notebook; a program that called papermill goes on
            command = click.get_current_context(silent=True) is not None
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_IGN if command else handler)


class InterruptibleEngine(NBClientEngine):
    """papermill's usual engine with that client."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        log_output: bool = False,
        stdout_file: Any = None,
        stderr_file: Any = None,
        start_timeout: int = 60,
        execution_timeout: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Execute the notebook that papermill manages, with papermill's own options."""
        kwargs.pop("input_path", None)
        options = {"log_output": log_output, "stdout_file": stdout_file, "stderr_file": stderr_file, "log": logger}
        limits = {"timeout": execution_timeout, "startup_timeout": start_timeout}
        return InterruptibleClient(nb_man, kernel_name=kernel_name, **limits, **options, **kwargs).execute()
