"""A papermill engine that ends a notebook in order: `papermill --engine llmcore notebook.ipynb out.ipynb`.

On SIGTERM papermill itself dies at once and the run is lost; on SIGINT it gives the kernel two seconds. This engine
passes either signal on to the kernel as an interrupt and waits for the running cell, however long that takes: a
training cell finishes its step and saves. Then it leaves out the cells that follow, shuts the kernel down, writes the
notebook, and exits with 128 + the signal's number. A second signal does not wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from nbclient.exceptions import CellExecutionError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine
from papermill.log import logger


class InterruptibleClient(PapermillNotebookClient):
    """Executes cells until the end, an error, or a signal.

    Attributes:
        caught: the signal that ended the run.
    """

    caught: signal.Signals | None = None

    def execute(self, **kwargs: Any) -> Any:
        """Start the kernel and execute all cells.

        Raises:
            SystemExit: after a signal, when the running cell has ended and the kernel is gone.
        """
        with self._signals_interrupt():
            return super().execute(**kwargs)

    def execute_cell(self, cell: Any, cell_index: int, *args: Any, **kwargs: Any) -> Any:
        """Execute one cell; the last one if a signal came meanwhile."""
        try:
            return super().execute_cell(cell, cell_index, *args, **kwargs)
        except CellExecutionError as error:
            self.nb_man.cell_exception(cell, cell_index=cell_index, exception=error)
            raise
        finally:
            if self.caught is not None:
                self.nb.metadata.papermill["stopped_by"] = self.caught.name
                raise SystemExit(128 + self.caught)

    @contextlib.contextmanager
    def _signals_interrupt(self) -> Iterator[None]:
        """Pass SIGINT and SIGTERM on to the kernel. Only the main thread may set handlers."""
        if threading.current_thread() is not threading.main_thread() or os.name != "posix":
            yield
            return

        def handle(number: int, frame: Any) -> None:
            kernel = getattr(getattr(self.km, "provisioner", None), "pid", None)
            if self.caught is not None or kernel is None:
                raise KeyboardInterrupt
            self.caught = signal.Signals(number)
            logger.warning("%s: waiting for the running cell; a second one does not wait", self.caught.name)
            os.kill(kernel, signal.SIGINT)

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


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
