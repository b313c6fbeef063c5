"""Death at a chosen file operation, for programs that tests run in processes of their own. It needs no torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def kill_at(number: int, more: set[str] | None = None) -> Callable[..., None]:
    """Kill this process at its file operation of this number, counted from now on; never if the number is 0.

    Args:
        number: 1 for the next one.
        more: audit events of Python that count too.

    Returns:
        A function that counts an event by its name, for events that are not of Python.
    """
    watched, left = FILE_OPERATIONS | (more or set()), number

    def count(event: str, arguments: object = ()) -> None:
        nonlocal left
        if event in watched:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    return count


def survives(work: Callable[[], object]) -> bool:
    """Do some work in a copy of this process; whether it came to its end. Any other end than SIGKILL is an error."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0
