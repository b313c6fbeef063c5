"""Real kernels stopped in every way: by Jupyter's button, by papermill's signals, by a kill."""

from __future__ import annotations

import itertools
import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from papermill.clientwrap import PapermillNotebookClient
from papermill.exceptions import PapermillExecutionError
from papermill.execute import execute_notebook as papermill_in_process

from llmcore.checkpoint import find_checkpoint, load_checkpoint
from llmcore.runs import read_metrics

from .helpers import FIND_TESTS, ROOT, quick, trainer

TRAIN = """
import os, time
from pathlib import Path
import llmcore.checkpoint
from tests.helpers import quick, trainer

Path("kernel").write_text(str(os.getpid()))
disk = llmcore.checkpoint.fsync
llmcore.checkpoint.fsync = lambda path: (time.sleep(slow_disk), disk(path))
config = quick(max_steps=max_steps, schedule="plateau", checkpoint_interval=0)
folder = Path("run").absolute()
run = trainer(folder, config, resume="latest" if folder.exists() else None)
"""
RUN = "result = run.fit()\nprint('stopped early:', result.stopped_early)"
AFTER = "Path('after').touch()"


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """A notebook that trains a tiny model, and does something else afterwards."""
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    made.cells = [
        nbformat.v4.new_code_cell(source) for source in ("slow_disk, max_steps = 0, 10**6", TRAIN, RUN, AFTER)
    ]
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, tmp_path / "in.ipynb")
    return tmp_path / "in.ipynb"


def papermill(notebook: Path, **parameters: float) -> subprocess.Popen[str]:
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "--engine", "llmcore", "in.ipynb", "out.ipynb", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": FIND_TESTS}
    return subprocess.Popen(command, cwd=notebook.parent, env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_trained(folder: Path, steps: int = 3) -> bool:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.exists() and metrics.read_bytes().count(b"\n") >= steps


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def printed(folder: Path) -> str:
    outputs = [o for c in nbformat.read(folder / "out.ipynb", as_version=4).cells for o in c.get("outputs", [])]
    return "".join(output.get("text", "") + "\n".join(output.get("traceback", [])) for output in outputs)


DASHBOARD = """
from pathlib import Path
from llmcore.notebook.widgets import TrainingDashboard
from tests.helpers import quick, trainer

one = trainer(Path("run").absolute(), quick(max_steps=10**6, schedule="plateau"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["await TrainingDashboard().run(one)", "one.fit()"])
def test_jupyters_interrupt_button_saves_and_ends_the_cell_normally(
    cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", FIND_TESTS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kernel, client = start_new_kernel(cwd=str(tmp_path))
    try:
        assert client.execute_interactive(DASHBOARD, timeout=60)["content"]["status"] == "ok"
        running = client.execute(cell)
        deadline = time.monotonic() + 60
        while not has_trained(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kernel.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != running:
            pass
        assert reply["content"]["status"] == "ok", reply["content"]
        said: list[str] = []
        client.execute_interactive(
            "print(one.step, one.result().stopped_early)",
            timeout=60,
            output_hook=lambda message: said.append(message["content"].get("text", "")),
        )
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    checkpoint = load_checkpoint(find_checkpoint(tmp_path / "run"))
    assert "".join(said).strip() == f"{checkpoint.step} True"
    assert checkpoint.step == read_metrics(tmp_path / "run")[-1]["step"]


class Kernel:
    """A real kernel, and what it answered to each cell."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", FIND_TESTS)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        self.folder = folder
        self.manager, self.client = start_new_kernel(cwd=str(folder))
        self.replies: dict[str, dict[str, Any]] = {}

    def reply(self, sent: str) -> dict[str, Any]:
        while sent not in self.replies:
            message = self.client.get_shell_msg(timeout=60)
            self.replies[message["parent_header"]["msg_id"]] = message["content"]
        return self.replies[sent]

    def wait_until_idle(self, sent: str) -> None:
        """As JupyterLab does. A cell that comes between the reply and this is left out if the one before failed."""
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") == sent and message["content"].get("execution_state") == "idle":
                return

    def run(self, code: str, watched: bool = True) -> dict[str, Any]:
        return self.reply(self.client.execute(code, allow_stdin=watched))

    def wait_until_trained(self, steps: int = 3) -> None:
        deadline = time.monotonic() + 60
        while not has_trained(self.folder, steps):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel(tmp_path, monkeypatch)
    yield made
    made.client.stop_channels()
    made.manager.shutdown_kernel(now=True)


FIRST = "board = TrainingDashboard()\nawait board.run(one)\nfirst = one.step"
SECOND = "two = trainer(one.run_dir, quick(max_steps=first + 5, schedule='plateau'), resume='latest')\n"
SECOND += "await TrainingDashboard().run(two)"
STOPS: dict[str, Callable[[Kernel], None]] = {
    "interrupt": lambda kernel: kernel.manager.interrupt_kernel(),
    "SIGTERM": lambda kernel: os.kill(kernel.manager.provisioner.pid, signal.SIGTERM),
    "button": lambda kernel: None,
}


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_stops_run_all_and_a_person_goes_on(stop: str, kernel: Kernel) -> None:
    assert kernel.run(DASHBOARD)["status"] == "ok"
    if stop == "button":
        kernel.run("one.callbacks.append(lambda event: board.stop_button.click() if event['step'] == 5 else None)")
    cells = [FIRST, "Path('after').touch()", SECOND]
    queued = [kernel.client.execute(cell) for cell in cells]  # as JupyterLab's Run All does: all at once
    kernel.wait_until_trained()
    STOPS[stop](kernel)
    assert [kernel.reply(sent)["status"] for sent in queued] == ["ok", "aborted", "aborted"]
    assert not (kernel.folder / "after").exists()
    last = read_metrics(kernel.folder / "run")[-1]["step"]
    assert load_checkpoint(find_checkpoint(kernel.folder / "run")).step == last
    assert kernel.run(SECOND)["status"] == "ok"
    assert read_metrics(kernel.folder / "run")[-1]["step"] == last + 5


@pytest.mark.slow
@pytest.mark.parametrize("watched", [False, True])
def test_after_a_stop_no_cell_trains_by_itself(watched: bool, kernel: Kernel) -> None:
    assert kernel.run(DASHBOARD, watched)["status"] == "ok"
    running = kernel.client.execute(FIRST, allow_stdin=watched)  # as papermill does: one after the other
    kernel.wait_until_trained()
    kernel.manager.interrupt_kernel()
    assert kernel.reply(running)["status"] == "ok"
    last = read_metrics(kernel.folder / "run")[-1]["step"]
    assert kernel.run("Path('after').touch()", watched)["status"] == "ok"
    sent = kernel.client.execute(SECOND, allow_stdin=watched)
    refused = kernel.reply(sent)
    assert refused["ename"] == "RunStoppedError" and len(refused["traceback"]) == 1, refused
    kernel.wait_until_idle(sent)
    assert read_metrics(kernel.folder / "run")[-1]["step"] == last
    assert kernel.run(SECOND, watched)["status"] == "ok"
    assert read_metrics(kernel.folder / "run")[-1]["step"] == last + 5


@pytest.mark.slow
def test_after_a_stop_a_person_runs_any_cell(kernel: Kernel) -> None:
    anybody = "import llmcore.notebook.dashboard\nllmcore.notebook.dashboard.BY_HAND = 0"  # whoever comes is a person
    assert kernel.run(DASHBOARD + anybody)["status"] == "ok"
    running = kernel.client.execute(FIRST)
    kernel.wait_until_trained()
    kernel.manager.interrupt_kernel()
    assert [kernel.reply(running)["status"], *(kernel.run(cell)["status"] for cell in ("1", SECOND))] == ["ok"] * 3


@pytest.mark.slow
def test_a_callbacks_stop_lets_the_notebook_go_on(kernel: Kernel) -> None:
    assert kernel.run(DASHBOARD)["status"] == "ok"
    kernel.run("one.callbacks.append(lambda event: one.request_stop() if event['step'] == 5 else None)")
    queued = [kernel.client.execute(cell) for cell in (FIRST, SECOND)]
    assert [kernel.reply(sent)["status"] for sent in queued] == ["ok", "ok"]
    assert read_metrics(kernel.folder / "run")[-1]["step"] == 10


@pytest.mark.slow
def test_a_message_during_training_is_answered_by_idle(kernel: Kernel) -> None:
    """A page holds back what is typed until then."""
    client = kernel.client
    assert kernel.run(DASHBOARD)["status"] == "ok"
    running = client.execute(FIRST)
    opened: dict[str, str] = {}  # what each widget shows or says it is, and its comm
    states: list[tuple[str, str]] = [("", "")]

    def listen(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline
            message = client.get_iopub_msg(timeout=60)
            content = message["content"]
            if message["msg_type"] == "comm_open":
                opened[content["data"]["state"].get("description", "")] = content["comm_id"]
            elif message["msg_type"] == "status":
                states.append((message["parent_header"].get("msg_id", ""), content["execution_state"]))

    listen(lambda: {"prompt", "x axis", "stop and save"} <= set(opened))
    kernel.wait_until_trained()

    def send(widget: str, data: dict[str, Any]) -> str:
        message = client.session.msg("comm_msg", {"comm_id": opened[widget], "data": data})
        client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    changes: list[tuple[str, dict[str, Any]]] = [("prompt", {"value": text}) for text in ("曹", "曹操")]
    changes += [("x axis", {"index": index}) for index in (1, 0)]
    for widget, state in changes:
        sent = send(widget, {"method": "update", "state": state, "buffer_paths": []})
        listen(lambda sent=sent: (sent, "idle") in states)  # type: ignore[misc]
    listen(lambda: states[-1] == (running, "busy"))  # the page must still see a kernel at work
    assert (running, "idle") not in states
    send("stop and save", {"method": "custom", "content": {"event": "click"}})
    assert kernel.reply(running)["status"] == "ok"
    assert kernel.run("assert board.prompt.value == '曹操' and board.log_x.value is False")["status"] == "ok"


@pytest.mark.slow
def test_a_second_view_finds_the_run_that_is_going_on(kernel: Kernel) -> None:
    """As JupyterLab's subshell console does it: in another thread, while the cell holds the kernel."""
    client = kernel.client
    assert kernel.run(DASHBOARD)["status"] == "ok"
    running = client.execute(FIRST)
    kernel.wait_until_trained()
    client.control_channel.send(client.session.msg("create_subshell_request"))
    subshell = client.get_control_msg(timeout=60)["content"]["subshell_id"]
    code = "TrainingDashboard.attach()\nprint(board.panel.model_id)\nboard.stop_button.click()"
    request = client.session.msg("execute_request", {"code": code, "silent": False})
    request["header"]["subshell_id"] = subshell
    client.shell_channel.send(request)
    assert kernel.reply(request["header"]["msg_id"])["status"] == "ok"
    assert kernel.reply(running)["status"] == "ok"
    shown, said = "", ""
    while not said:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == request["header"]["msg_id"]:
            said = message["content"].get("text", "").strip()
            view = message["content"].get("data", {}).get("application/vnd.jupyter.widget-view+json", {})
            shown = view.get("model_id", shown) if isinstance(view, dict) else shown
    assert shown == said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "slow_disk"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1)]
)
def test_a_signal_lets_the_cell_save_and_leaves_nothing_behind(
    number: signal.Signals, slow_disk: int, notebook: Path
) -> None:
    folder = notebook.parent
    with papermill(notebook, slow_disk=slow_disk) as process:
        wait_until(lambda: has_trained(folder), process)
        process.send_signal(number)
        assert process.wait(120) == 128 + number
    assert "stopped early: True" in printed(folder)
    assert nbformat.read(folder / "out.ipynb", as_version=4).metadata.papermill["stopped_by"] == number.name
    assert not (folder / "after").exists(), "a later cell was executed"
    assert not is_alive(int((folder / "kernel").read_text()))
    checkpoint = load_checkpoint(find_checkpoint(folder / "run"))
    assert checkpoint.step == read_metrics(folder / "run")[-1]["step"]


@pytest.mark.slow
def test_a_signal_in_another_cell_ends_that_cell(notebook: Path) -> None:
    folder = notebook.parent
    made = nbformat.read(notebook, as_version=4)
    made.cells[2].source = "Path('busy').touch()\nwhile True: pass"
    nbformat.write(made, notebook)
    with papermill(notebook) as process:
        wait_until((folder / "busy").exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "KeyboardInterrupt" in printed(folder)
    assert not (folder / "after").exists()
    assert not is_alive(int((folder / "kernel").read_text()))


def touches(count: int) -> nbformat.NotebookNode:
    """A notebook whose code cells each leave a file, with text between them."""
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    for number in range(count):
        made.cells.append(nbformat.v4.new_code_cell(f"open('{number}', 'w').write('')"))
        made.cells.append(nbformat.v4.new_markdown_cell("some words"))
    return made


MOMENTS = {  # what is about to be called when the signal comes, the call's number, the cells that run
    "the kernel is not started": ("papermill.clientwrap.PapermillNotebookClient.start_new_kernel", 0, 0),
    "the first cell is next": ("papermill.engines.NotebookExecutionManager.cell_start", 0, 0),
    "text is next": ("papermill.engines.NotebookExecutionManager.cell_start", 1, 1),
    "a cell is over": ("papermill.engines.NotebookExecutionManager.cell_complete", 2, 2),
    "the last is over": ("papermill.engines.NotebookExecutionManager.cell_complete", 5, 3),
    "the kernel goes": ("papermill.clientwrap.PapermillNotebookClient._cleanup_kernel", 0, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_outside_a_running_cell_begins_no_other(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, number, ran = MOMENTS[moment]
    owner, method = pkgutil.resolve_name(where.rsplit(".", 1)[0]), where.rsplit(".", 1)[1]
    before, calls, kernels = getattr(owner, method), itertools.count(), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return before(*args, **kwargs)

    def started(self: Any, **kwargs: Any) -> None:
        start(self, **kwargs)
        kernels.append(self.km.provisioner.pid)

    monkeypatch.setattr(owner, method, signalled)
    start = PapermillNotebookClient.start_new_kernel
    monkeypatch.setattr(PapermillNotebookClient, "start_new_kernel", started)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    nbformat.write(touches(3), tmp_path / "in.ipynb")
    with pytest.raises(SystemExit) as end:
        papermill_in_process(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", engine_name="llmcore", cwd=tmp_path, progress_bar=False
        )
    assert end.value.code == 128 + signal.SIGTERM
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == "") == [str(n) for n in range(ran)]
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).metadata.papermill["stopped_by"] == "SIGTERM"
    assert not is_alive(kernels[0])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_the_notebook(tmp_path: Path) -> None:
    """Many short cells, so that many signals come between two of them, and as one begins or ends."""
    tries, ended = 12, []
    for attempt in range(tries):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        made = touches(60)
        made.cells.insert(0, nbformat.v4.new_code_cell("import os\nopen('kernel', 'w').write(str(os.getpid()))"))
        nbformat.write(made, folder / "in.ipynb")
        with papermill(folder / "in.ipynb") as process:
            wait_until((folder / "kernel").exists, process)
            time.sleep(random.Random(attempt).uniform(0, 1.5))  # the moment under test
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        written = nbformat.read(folder / "out.ipynb", as_version=4)
        last = max([int(p.name) for p in folder.iterdir() if p.name.isdecimal()], default=-1)
        assert process.returncode == 128 + signal.SIGTERM or (process.returncode == 0 and last == 59)
        ended.append(last)
        assert process.returncode == 0 or written.metadata.papermill["stopped_by"] == "SIGTERM"
        begun = sum(cell.execution_count is not None for cell in written.cells if cell.cell_type == "code")
        assert last + 1 <= begun, "a cell ran that the notebook does not show"
        assert not is_alive(int((folder / "kernel").read_text()))
    assert sum(last < 59 for last in ended) > tries // 2, "the notebook is too short for this test"


@pytest.mark.slow
def test_a_second_signal_does_not_wait(notebook: Path) -> None:
    folder = notebook.parent
    made = nbformat.read(notebook, as_version=4)
    made.cells[2].source = (
        "import signal\nsignal.signal(signal.SIGINT, lambda *_: Path('deaf').touch())\n"
        "Path('busy').touch()\nwhile True: pass"
    )
    nbformat.write(made, notebook)
    with papermill(notebook) as process:
        wait_until((folder / "busy").exists, process)
        process.send_signal(signal.SIGTERM)
        wait_until((folder / "deaf").exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    assert not is_alive(int((folder / "kernel").read_text()))


@pytest.mark.slow
def test_a_killed_kernel_ends_papermill_and_the_next_run_resumes(notebook: Path) -> None:
    folder = notebook.parent
    with papermill(notebook) as process:
        wait_until(lambda: has_trained(folder), process)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    saved = load_checkpoint(find_checkpoint(folder / "run")).step
    with papermill(notebook) as process:
        wait_until(lambda: has_trained(folder, saved + 3), process)
        os.kill(int((folder / "kernel").read_text()), signal.SIGKILL)
        assert process.wait(120) not in (0, None)
    assert (folder / "out.ipynb").exists()
    with papermill(notebook, max_steps=saved + 5) as process:
        assert process.wait(120) == 0, process.stderr and process.stderr.read()
    assert [event["step"] for event in read_metrics(folder / "run")] == [*range(1, saved + 6)]
    assert (folder / "after").exists()


@pytest.mark.slow
def test_without_a_signal_it_is_papermill(notebook: Path) -> None:
    with papermill(notebook, max_steps=4) as process:
        assert process.wait(120) == 0, process.stderr and process.stderr.read()
    assert "stopped early: False" in printed(notebook.parent)
    assert (notebook.parent / "after").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("max_steps", "last"), [(3, 3), (4, 4), (None, 4)])  # of the run, where none is given
def test_notebook_4_refuses_a_resume_with_no_steps_left(
    max_steps: int | None, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_WORKBOOK_ROOT", str(tmp_path))
    trainer(tmp_path / "outputs" / "runs" / "old", quick(max_steps=4)).fit()
    before = sorted(tmp_path.rglob("*"))
    notebook = jupytext.read(ROOT / "notebooks" / "04_scifi_train.py")
    notebook_file = str(tmp_path / "in.ipynb")  # any file: it is not opened before the refusal
    nbformat.write(notebook, notebook_file)
    with pytest.raises(PapermillExecutionError, match=rf"max_steps={last},.*old/step=000004.*at step 4"):
        papermill_in_process(
            tmp_path / "in.ipynb",
            tmp_path / "out.ipynb",
            {
                "checkpoint_dir": "outputs/runs/old",
                "max_steps": max_steps,
                "data_dir": "outputs",
                "tokenizer_model_file": notebook_file,
            },
            cwd=tmp_path,
            progress_bar=False,
        )
    assert {*tmp_path.rglob("*")} == {*before, tmp_path / "in.ipynb", tmp_path / "out.ipynb"}
