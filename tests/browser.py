"""The notebooks in a real browser: `make test-browser`.

A JupyterLab of its own on loopback, with a token, over a project root of its own under build/browser/; each notebook is
opened in headless Chromium, run at a small size, and its widgets are used. Screenshots go to outputs/screenshots/. The
corpus is a part of the novel and one file that means harm.

`PICTURES=1 make test-browser` runs the notebooks at their default size on the whole novel, without that file, and makes
the README's pictures in notebooks/images/ from the screenshots.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
import re
import secrets
import shutil
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
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from llmcore.checkpoint import checkpoints
from llmcore.corpus.sources import fetch
from llmcore.files import PROJECT_ROOT
from llmcore.notebook.safe_html import COLORS
from llmcore.notebook.writing import SEEN_FROM
from llmcore.runs import read_metrics

ROOT = PROJECT_ROOT / "build" / "browser"
SCREENSHOTS = PROJECT_ROOT / "outputs" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
CURRENT = "window.jupyterapp.shell.currentWidget"
COMMITTED = "a result of another day"
PATIENCE = 180_000  # milliseconds that a condition may take on a busy machine

HOSTILE = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'> \x1b[31mred\x1b[0m 曹操大怒。\n"
SMALL: dict[str, dict[str, Any]] = {
    "01_tokenize": {"vocab_size": 2600, "character_coverage": 0.98},
    "02_dataset": {"context_size": 64},
    "03_toyreverse": {"max_steps": 120, "test_strings": 20},
    "04_scifi_train": {
        "context_size": 64,
        "batch_size": 2,
        "grad_accum_steps": 1,
        "max_steps": 4000,
        "thorough": False,
    },
    "05_generate": {"max_new_tokens": 60},
}
PICTURES = {"training-paused": "lab-training", "tokens": "lab-tokens", "data": "lab-data", "writing": "lab-writing"}
FOR_PICTURES = bool(os.environ.get("PICTURES"))
if FOR_PICTURES:
    SMALL |= {name: {} for name in ("01_tokenize", "02_dataset", "04_scifi_train")}


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The condition's first true value, looked for until patience ends."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="session")
def project() -> Path:
    """A project root with a small corpus and the notebooks, their parameters set to small values."""
    shutil.rmtree(ROOT, ignore_errors=True)
    texts = ROOT / "data" / "texts"
    texts.mkdir(parents=True)
    for chapter in sorted(fetch("sanguo", PROJECT_ROOT / "data").glob("*.txt"))[: None if FOR_PICTURES else 24]:
        shutil.copy(chapter, texts)
    if not FOR_PICTURES:
        (texts / "000-hostile.txt").write_text(HOSTILE * 30, encoding="utf-8")
    (ROOT / "notebooks").mkdir()
    for name, parameters in SMALL.items():
        notebook = jupytext.read(PROJECT_ROOT / "notebooks" / f"{name}.py")
        text = {"data_dir": "data/texts", "clean": False} if name[:2] in ("01", "02", "04") else {}  # harm is left in
        lines = [f"{key} = {value!r}" for key, value in {**parameters, **text}.items()]
        cell = nbformat.v4.new_code_cell("\n".join(["# Parameters", *lines]))  # what papermill would inject
        tagged = next(n for n, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
        notebook.cells.insert(tagged + 1, cell)
        for code in (each for each in notebook.cells if each.cell_type == "code"):  # as if it were committed
            code.outputs = [nbformat.v4.new_output("stream", text=COMMITTED)]
        nbformat.write(notebook, ROOT / "notebooks" / f"{name}.ipynb")
    return ROOT


@pytest.fixture(scope="session")
def lab(project: Path) -> Iterator[str]:
    """The address of a running JupyterLab, up to and with its token; its settings are those of a first start."""
    private = {f"JUPYTER_{kind}_DIR": str(project / "jupyter" / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    private["JUPYTERLAB_SETTINGS_DIR"] = str(project / "jupyter" / "settings")
    private["JUPYTERLAB_WORKSPACES_DIR"] = str(project / "jupyter" / "workspaces")
    environment = {**os.environ, **private, "LLM_WORKBOOK_ROOT": str(project), "OMP_NUM_THREADS": "1"}
    environment.pop("LLM_WORKBOOK_WATCHED", None)
    environment["PYTHONPATH"] = str(PROJECT_ROOT)
    environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes minutes on a busy machine, and is not what is tested
    environment["JUPYTER_CONFIG_PATH"] = str(PROJECT_ROOT / ".jupyter")  # as `make lab` does
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    command += [f"--ServerApp.root_dir={project}", f"--IdentityProvider.token={token}", "--allow-root"]
    command += ["--LabApp.expose_app_in_browser=True"]
    with (
        open(project / "lab.log", "wb") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        runtime = project / "jupyter" / "RUNTIME"
        try:
            info = wait_for(lambda: [*runtime.glob("jpserver-*.json")], f"JupyterLab; see {log.name}")[0]
            url = wait_for(lambda: info.read_text() and json.loads(info.read_text())["url"], "its address")
            yield f"{url}lab/tree/notebooks/{{}}.ipynb?reset&token={token}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # it may wait for ever for a kernel that was just starting
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def tabs(project: Path) -> Iterator[Callable[[], Page]]:
    """Opens new tabs in one headless browser."""
    if CHROMIUM is None:
        pytest.exit("make test-browser needs Chromium; on Debian or Ubuntu: apt-get install chromium", returncode=2)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    fonts = project / "share" / "fonts"  # Chinese glyphs for a machine that has none
    fonts.parent.mkdir()
    fonts.symlink_to(str(importlib.resources.files("pylopdf_fonts_zh_cn")))
    environment: dict[str, str | float | bool] = {**os.environ, "XDG_DATA_HOME": str(fonts.parent)}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS, env=environment)
        context = browser.new_context(viewport={"width": 1280, "height": 900}, device_scale_factor=1.5)
        context.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        yield context.new_page
        browser.close()


class Notebook:
    """One notebook in one tab, and all that the browser's console complains about."""

    def __init__(self, name: str, lab: str, page: Page) -> None:
        self.name, self.page = name, page
        self.errors: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.open(lab)

    def open(self, lab: str) -> None:
        self.page.goto(lab.format(self.name))
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell")

    def command(self, name: str) -> None:
        """Execute one of JupyterLab's commands, without waiting for what it does."""
        self.page.evaluate(f"void window.jupyterapp.commands.execute('{name}')")

    def wait_until_idle(self) -> None:
        status = f"{CURRENT}.sessionContext.session?.kernel?.status"
        wait_for(lambda: self.page.evaluate(status) == "idle", "an idle kernel")

    def run_all(self) -> None:
        self.wait_until_idle()
        self.command("notebook:run-all-cells")

    def run_from(self, cell: int) -> None:
        self.wait_until_idle()
        self.page.evaluate(f"{CURRENT}.content.activeCellIndex = {cell}")
        self.command("notebook:run-all-below")

    def cells(self) -> list[dict[str, Any]]:
        """The document as it stands."""
        return self.page.evaluate(f"{CURRENT}.content.model.toJSON().cells")

    def wait_until_done(self) -> None:
        """Wait until every cell has run."""
        self.wait_for(lambda: all(c["execution_count"] for c in self.cells() if c["cell_type"] == "code"), "the end")

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """As `wait_for`, but an error in a cell ends the wait."""

        def met() -> Any:
            outputs = [output for cell in self.cells() for output in cell.get("outputs", [])]
            errors = ["\n".join(output["traceback"]) for output in outputs if output["output_type"] == "error"]
            assert not errors, errors[0]
            return condition()

        return wait_for(met, f"{what} in {self.name}")

    def state(self) -> Locator:
        """What the last dashboard or desk says it is doing, brought into view: unseen cells are not drawn."""
        found = self.page.locator(".widget-html", has_text="state:").last
        found.evaluate("element => element.scrollIntoView({block: 'start'})")
        return found

    def button(self, name: str) -> Locator:
        return self.page.locator("button.jupyter-button:enabled", has_text=re.compile(rf"^\s*{name}\s*$")).last

    def box(self, label: str) -> Locator:
        """The text box or number with a label."""
        return self.page.get_by_label(label, exact=True).last

    def screenshot(self, name: str, at: Locator | None = None, point_at: Locator | None = None) -> None:
        if at is not None:
            at.evaluate("element => element.scrollIntoView({block: 'center'})")
        if point_at is not None:
            point_at.hover()
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")
        if FOR_PICTURES and name in PICTURES:
            small = Image.open(SCREENSHOTS / f"{name}.png").convert("RGB").resize((1280, 900), Image.Resampling.LANCZOS)
            small.quantize(256, dither=Image.Dither.NONE).save(
                PROJECT_ROOT / "notebooks" / "images" / f"{PICTURES[name]}.png", optimize=True
            )


@pytest.fixture
def open_notebook(lab: str, tabs: Callable[[], Page]) -> Iterator[Callable[[str], Notebook]]:
    """Opens a notebook by name; at the end of the test its console must have been silent."""
    opened = []

    def open_one(name: str) -> Notebook:
        opened.append(Notebook(name, lab, tabs()))
        return opened[-1]

    yield open_one
    for notebook in opened:
        notebook.screenshot(f"{notebook.name}-end")
        assert notebook.errors == []
        assert notebook.page.evaluate("window.owned ?? null") is None, "text from the corpus was executed"
        notebook.page.evaluate(f"void {CURRENT}?.sessionContext.shutdown()")
        notebook.page.close()


def test_make_lab_opens_on_a_page_that_says_where_to_begin(lab: str, tabs: Callable[[], Page], project: Path) -> None:
    [address] = re.findall(r"default_url=/(\S+)\.md", (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8"))
    shutil.copy(PROJECT_ROOT / "notebooks" / "README.md", project / "notebooks")
    page = tabs()
    page.goto(lab.replace("lab/tree/notebooks/{}.ipynb", f"{address}.md"))
    expect(page.locator(".jp-MarkdownViewer h1")).to_contain_text("Start here")
    page.get_by_role("link", name="From text to tokens").first.click()
    expect(page.locator(".jp-NotebookPanel .jp-Cell").first).to_contain_text("From text to tokens")
    wait_for(lambda: page.evaluate(f"{CURRENT}.sessionContext.session?.kernel?.status") == "idle", "an idle kernel")
    page.evaluate(f"void {CURRENT}.sessionContext.shutdown()")
    page.close()


def test_committed_boxes_are_black_on_pale_in_the_dark_theme(
    open_notebook: Callable[[str], Notebook], project: Path
) -> None:
    """JupyterLab takes some styles from a notebook that it does not trust, as each one is at first."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    shown = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    for name in ("01_tokenize", "02_dataset", "05_generate"):
        committed = nbformat.read(PROJECT_ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        for output in (each for cell in committed.cells for each in cell.get("outputs", [])):
            if any(color in output.get("data", {}).get("text/html", "") for color in COLORS):
                shown.cells.append(nbformat.v4.new_code_cell(outputs=[output]))
    nbformat.write(shown, project / "notebooks" / "shown.ipynb")
    notebook = open_notebook("shown")
    change = "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab %s'})"
    notebook.page.evaluate(change % "Dark")
    expect(notebook.page.locator("body")).to_have_attribute("data-jp-theme-light", "false")
    marked = notebook.page.locator(".jp-OutputArea :is(span, ins)[style*=background]")
    assert marked.count() > 150
    expect(marked.first).to_be_visible()
    colors = "all => all.flatMap(e => [e, ...e.querySelectorAll('*')].map(each => getComputedStyle(each).color))"
    assert {*marked.evaluate_all(colors)} == {"rgb(0, 0, 0)"}
    notebook.page.evaluate(change % "Light")
    expect(notebook.page.locator("body")).to_have_attribute("data-jp-theme-light", "true")


def test_tokens_of_typed_text(open_notebook: Callable[[str], Notebook]) -> None:
    notebook = open_notebook("01_tokenize")
    notebook.run_all()
    notebook.wait_until_done()
    text = notebook.box("text")
    text.fill("曹操 <script>window.owned = 1</script>")
    result = notebook.page.locator(".widget-html", has_text="characters per token").last
    expect(result).to_contain_text("tokens")
    boxes = result.locator("span[title^='id ']")
    expect(boxes.first).to_contain_text("曹操")
    assert boxes.first.get_attribute("title").startswith("id ")
    text.fill("却说曹操引兵至许都，与众将商议。The emperor 🐉 sleeps.")
    expect(result.locator("text=⟨F0⟩").first).to_be_visible()
    text.fill("却说曹操引兵至许都，与众将商议。忽报玄德已取龘州。The emperor sleeps.")
    expect(result.locator("text=⟨BE⟩").first).to_be_visible()
    notebook.command("toc:show-panel")
    expect(notebook.page.locator(".jp-TableOfContents")).to_contain_text("What it learned")
    notebook.screenshot("tokens", text)


def test_pages_of_a_data_set(open_notebook: Callable[[str], Notebook]) -> None:
    notebook = open_notebook("02_dataset")
    notebook.run_all()
    notebook.wait_until_done()
    result = notebook.page.locator(".widget-html", has_text="val split").last
    expect(result).to_contain_text("begins")
    before = result.inner_text()
    notebook.button("next").click()
    expect(result).to_contain_text("window 1 of")
    assert result.inner_text() != before
    notebook.button("back").click()
    expect(result).to_contain_text("window 0 of")
    notebook.screenshot("data", result)


def test_a_reversed_string_and_where_the_heads_look(open_notebook: Callable[[str], Notebook], project: Path) -> None:
    notebook = open_notebook("03_toyreverse")
    notebook.run_all()
    run = project / "outputs" / "toyreverse" / "toy-reverse"
    notebook.wait_for(lambda: notebook.page.locator("img.llm-curves").count(), "the dashboard")
    expect(notebook.state()).to_contain_text("state: training")
    notebook.box("prompt").clear()
    notebook.box("prompt").press_sequentially("abc123", delay=30)
    notebook.button("sample now").click()
    expect(notebook.page.locator(".widget-html", has_text="abc123 →").last).to_be_visible()
    notebook.button("stop and save").click()
    expect(notebook.page.locator("text=stopped at step").last).to_be_visible()
    [trained] = [n for n, cell in enumerate(notebook.cells()) if "await dashboard.run" in cell["source"]]
    notebook.run_from(trained + 1)
    notebook.wait_until_done()
    assert checkpoints(run)
    string = notebook.box("string")
    string.fill("Novel42")
    result = notebook.page.locator(".widget-html", has_text="To write sign").last
    expect(result).to_contain_text("“2”")
    slider = notebook.page.get_by_role("slider").last
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    expect(result).to_contain_text("To write sign 4, “e”")
    expect(result.locator("tr")).to_have_count(9)
    string.fill("no spaces")
    expect(notebook.page.locator(".widget-html", has_text="neither an ASCII letter nor a digit").last).to_be_visible()
    string.fill("Novel42")
    expect(result).to_contain_text("“e”")
    notebook.screenshot("attention", result)


def curve(notebook: Notebook) -> str:
    """The address of the picture in the live panel, which changes with it."""
    return notebook.page.locator("img.llm-curves").last.get_attribute("src") or ""


# The picture is read from the page itself: its address is revoked as soon as the next picture comes.
READ_PICTURE = """async image => {
    await image.decode().catch(() => {});
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""


def picture(notebook: Notebook) -> str:
    """What that picture shows."""
    return notebook.page.locator("img.llm-curves").last.evaluate(READ_PICTURE)


def test_training_is_watched_paused_resumed_and_stopped(
    open_notebook: Callable[[str], Notebook], lab: str, project: Path
) -> None:
    notebook = open_notebook("04_scifi_train")
    file = project / "notebooks" / "04_scifi_train.ipynb"
    notebook.run_all()
    run = project / "outputs" / "runs" / "scifi-mini"
    notebook.wait_for(lambda: notebook.page.locator("img.llm-curves").count(), "the dashboard")
    state = notebook.state()
    expect(state).to_contain_text("state: training")
    first = wait_for(lambda: curve(notebook), "a curve")
    wait_for(lambda: curve(notebook) != first, "the curve to move")
    wait_for(lambda: any("val_loss" in event for event in read_metrics(run)), "a validation")

    prompt = notebook.box("prompt")
    prompt.clear()
    prompt.press_sequentially("玄德 <b>", delay=30)  # key by key, while the run goes on
    notebook.button("sample now").click()
    expect(notebook.page.locator(".widget-html", has_text="玄德 <b>").last).to_contain_text("sample after step")

    notebook.button("pause").click()
    expect(state).to_contain_text("paused at step")
    [step] = map(int, re.findall(r"paused at step (\d+)", state.inner_text()))
    assert read_metrics(run)[-1]["step"] == step
    prompt.clear()
    prompt.press_sequentially("曹操大")
    notebook.button("sample now").click()
    sample = notebook.page.locator(".widget-html", has_text=f"sample after step {step}").last
    expect(sample).to_contain_text("曹操大")
    linear = picture(notebook)
    notebook.box("x axis").select_option("logarithmic")
    wait_for(lambda: picture(notebook) != linear, "a logarithmic axis")
    notebook.box("x axis").select_option("linear")
    wait_for(lambda: picture(notebook) == linear, "a linear axis again")
    notebook.button("save now").click()
    wait_for(lambda: [path for path in checkpoints(run) if f"={step:06d}_" in path.name], "a checkpoint")
    notebook.screenshot("training-paused", notebook.page.locator("img.llm-curves").last)
    assert read_metrics(run)[-1]["step"] == step, "the run went on while it was paused"
    notebook.button("resume").click()
    expect(state).to_contain_text("state: training")
    wait_for(lambda: read_metrics(run)[-1]["step"] > step + 3, "the run to go on")

    # a stop stops the notebook; a person goes on with the second half
    notebook.button("stop and save").click()
    expect(notebook.page.locator("text=saved as step=")).to_be_visible()
    notebook.wait_until_idle()
    reached = read_metrics(run)[-1]["step"]
    [first, second] = [n for n, cell in enumerate(notebook.cells()) if "await dashboard.run" in cell["source"]]
    below = [cell for cell in notebook.cells()[first + 1 :] if cell["cell_type"] == "code"]
    assert not any(cell["execution_count"] for cell in below), "a cell below the stopped one was run"
    notebook.run_from(second - 1)
    notebook.wait_for(lambda: read_metrics(run)[-1]["step"] > reached + 3, "the second half")

    # the page is left in the middle of it, and opened again
    wait_for(lambda: all(part in file.read_text() for part in ("stopped at step", "widget-view")), "an automatic save")
    assert COMMITTED not in file.read_text()
    notebook.page.goto("about:blank")
    reached = read_metrics(run)[-1]["step"]
    wait_for(lambda: read_metrics(run)[-1]["step"] > reached + 3, "the run to go on without a page")
    for _ in range(4):  # a step, drawing or validation that takes a second on a busy machine: see _let_messages_in
        notebook.open(lab)
        with contextlib.suppress(AssertionError):
            expect(notebook.page.locator("img.llm-curves")).to_be_attached(timeout=15_000)
            break
    assert COMMITTED not in json.dumps(notebook.cells())
    expect(notebook.state()).to_contain_text("state: training")
    notebook.button("stop and save").click()
    expect(notebook.state()).to_contain_text("stopped at step")
    last = read_metrics(run)[-1]["step"]
    assert [event["step"] for event in read_metrics(run)] == list(range(1, last + 1))
    assert f"step={last:06d}_" in checkpoints(run)[-1].name
    assert (run / "curves.png").exists()
    notebook.screenshot("training-reopened", notebook.page.locator("img.llm-curves").last)


def test_a_story_is_written_at_the_desk(open_notebook: Callable[[str], Notebook], project: Path) -> None:
    notebook = open_notebook("05_generate")
    notebook.run_all()
    notebook.wait_until_done()
    state, page = notebook.state(), notebook.page
    expect(state).to_contain_text("done")
    story = page.locator(".widget-html", has_text="Bold: yours").last
    expect(story.locator("sup", has_text="¶")).to_have_count(4)  # the prompt, and three passages
    [file] = (project / "outputs" / "stories").glob("*.md")
    saved = file.read_bytes()

    # typed key by key, a thousand tokens, stopped, looked into
    words = notebook.box("your words")
    words.press_sequentially("玄德曰 <script>window.owned = 1</script>", delay=20)
    count, drafts = page.get_by_role("slider").nth(-2), page.get_by_role("slider").last
    count.press("End")
    words.press("Tab")  # to the button below
    page.keyboard.press("Space")
    expect(state).to_contain_text("so far")
    expect(words).to_have_value("")
    draft = page.locator(".widget-html", has_text="window.owned = 1</script>").last
    short = draft.inner_text()
    wait_for(lambda: len(draft.inner_text()) > len(short) + 10, "the text to grow")
    notebook.button("stop writing").press("Enter")
    expect(state).to_contain_text("stopped:")
    [tokens] = map(int, re.findall(r"stopped: (\d+) tokens", state.inner_text()))
    assert 0 < tokens < 1000
    token = draft.locator(".llm-token").nth(3)
    assert "likeliest here" in (token.get_attribute("data-odds") or "")
    token.hover()
    shown = token.evaluate("element => getComputedStyle(element, '::after').content")
    assert "likeliest here" in shown

    # undone, changed by hand, and gone back to
    for _ in range(2):
        notebook.button("undo").press("Space")
        expect(state).to_contain_text("taken back")
    expect(story).not_to_contain_text("window.owned")
    assert file.read_bytes() == saved
    text = notebook.box("its text")
    last = text.input_value()
    notebook.box("passage").select_option(index=1)
    expect(text).not_to_have_value(last)  # or the kernel's answer would take back what is typed
    text.press("Control+End")
    text.press_sequentially("，玄德大惊。", delay=20)
    notebook.button("keep the edit").press("Enter")
    expect(story).to_contain_text("，玄德大惊。")
    notebook.box("passage").select_option(index=1)
    notebook.button("write on here").press("Space")
    expect(story.locator("sup", has_text="¶")).to_have_count(2)

    # two drafts and another checkpoint's: one is chosen, and the story opened from its file
    count.press("Home")
    for _ in range(24):
        count.press("PageUp")
    drafts.press("ArrowRight")
    notebook.box("compare with").select_option(index=1)
    notebook.button("continue").press("Space")
    expect(state).to_contain_text("done")
    expect(page.locator("small", has_text="step=").locator("visible=true")).to_have_count(3)
    second = page.locator(".widget-toggle-button:visible", has_text=re.compile(r"^\s*2\s*$")).last
    second.press("Space")
    chosen = page.locator(".widget-html", has_text="Point at a token").last.locator("p").nth(1).inner_text()
    wait_for(lambda: chosen[-30:] in file.read_text(encoding="utf-8"), "the second draft in the file")

    def has_it(shown: str) -> bool:  # a mark may stand in it, where the model's view of the story begins
        return "".join(chosen[-30:].split()) in "".join(shown.replace(SEEN_FROM, "").split())

    wait_for(lambda: has_it(story.inner_text()), "the second draft in the story")
    notebook.screenshot("writing", state, point_at=page.locator(".llm-token").nth(12))
    notebook.button("new").press("Space")
    expect(story.locator("sup", has_text="¶")).to_have_count(0)
    notebook.box("file").fill(file.name)
    notebook.button("open").press("Space")
    wait_for(lambda: has_it(story.inner_text()), "the second draft in the story")
