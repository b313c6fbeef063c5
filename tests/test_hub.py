"""The Hub: what is sent, what comes back, and that no token stays behind."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmcore.checkpoint import load_checkpoint
from llmcore.files import hub_failure, hub_token
from llmcore.formats.hub import HubError, from_hub, push_to_hub, write_card
from llmcore.formats.huggingface import to_hf
from llmcore.runs import read_metrics
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer

from .helpers import Batches, quick, tiny_model
from .test_sources import Answer, Hub

REPO, TOKEN = "someone/novels-mini", "hf_" + "x1y2z3" * 5


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A short real run with validation, and a picture as the dashboard leaves one."""
    model, data = tiny_model(vocab_size=tokenizer.vocab_size), Batches()
    folder = tmp_path / "runs" / "novels"
    Trainer(model, data, data, quick(eval_interval=3), folder, tokenizer=tokenizer).fit()
    (folder / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def test_the_card_says_what_the_run_says(run: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(run, device="cpu")
    folder = to_hf(checkpoint, tmp_path / "hf")
    write_card(checkpoint, folder, REPO, "三国演义, 112 chapters")
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    last = read_metrics(run)[-1]
    for said in (
        f"| validation loss | {last['val_loss']:.4f} nats per token |",
        f"| bits per byte of held-out text | {last['val_bits_per_byte']:.4f} |",
        f"| tokens seen | {last['tokens']:,} |",
        "| optimizer steps | 6 |",
        "| trained on | 三国演义, 112 chapters |",
        f"| parameters | {sum(p.numel() for p in checkpoint.model.parameters()):,} |",
        '"learning_rate": 0.01',
        "![Training curves](training.png)",
    ):
        assert said in body
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    again = to_hf(checkpoint, folder)  # an export with a card is still replaced
    assert not (again / "README.md").exists()
    (run / "curves.png").unlink()  # a run without a dashboard
    write_card(checkpoint, folder, REPO)
    assert "training.png" not in (folder / "README.md").read_text(encoding="utf-8")
    assert not (folder / "training.png").exists()


def test_a_folder_on_this_machine_opens_without_the_hub(run: Path, tmp_path: Path) -> None:
    folder = to_hf(run, tmp_path / "hf")
    assert from_hub(str(folder), device="cpu").model.config == load_checkpoint(run, device="cpu").model.config


class ModelHub(Hub):
    """A Hub that takes a model, too: it keeps what is committed, and whom it was asked by."""

    def __init__(self) -> None:
        super().__init__({})
        self.RequestHandlerClass = ModelAnswer
        self.asked_by: set[str | None] = set()
        self.visibility: list[str] = []
        self.refuses = False  # with a message that repeats the token


class ModelAnswer(Answer):
    """One request to the model hub."""

    server: ModelHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked_by.add(self.headers["Authorization"])
        here = "http://" + self.headers["Host"]
        if self.server.refuses:
            self.send_response(403)
            self.send_header("X-Error-Message", f"not allowed: {self.headers['Authorization']}")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
        elif self.path == "/api/repos/create":
            self.server.visibility.append(json.loads(body)["visibility"])
            self._json({"url": f"{here}/{REPO}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._json({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitOid": Hub.commit, "commitUrl": f"{here}/{REPO}/commit/{Hub.commit}"})
        else:
            self._json({})  # validate-yaml has nothing to say

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{REPO}") and "/tree/" not in self.path:
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": REPO, "sha": Hub.commit, "siblings": siblings, "private": True})
        else:
            super().do_GET()


@pytest.fixture
def hub() -> Iterator[ModelHub]:
    server = ModelHub()
    with server.serving():
        yield server


def elsewhere(program: str, endpoint: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own: the library reads its endpoint when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2", **more}
    start = "from llmcore.formats.hub import from_hub, push_to_hub\nfrom pathlib import Path\n"
    command = [sys.executable, "-c", start + program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_model_pushed_and_pulled_is_the_same_and_no_token_is_stored(
    by: str, run: Path, hub: ModelHub, tmp_path: Path
) -> None:
    endpoint, home = f"http://127.0.0.1:{hub.server_address[1]}", tmp_path / "home"
    argument, more = (f", token={TOKEN!r}", {}) if by == "argument" else ("", {"HF_TOKEN": TOKEN})
    done = elsewhere(f"print(push_to_hub({str(run)!r}, {REPO!r}, 'novels'{argument}))", endpoint, home, **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{endpoint}/{REPO}/commit/{Hub.commit}"
    assert hub.asked_by == {f"Bearer {TOKEN}"} and hub.visibility == ["private"]
    names = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer.model"
    assert set(hub.files) == {*names.split(), "tokenizer_config.json", "training.png"}
    assert b"| trained on | novels |" in hub.files["README.md"]
    back = elsewhere(
        f"""
import torch
from llmcore.checkpoint import load_checkpoint
ours, theirs = load_checkpoint({str(run)!r}, device="cpu"), from_hub({REPO!r}, device="cpu"{argument})
for name, tensor in ours.model.state_dict().items():
    assert torch.equal(tensor, theirs.model.state_dict()[name]), name
assert theirs.tokenizer.fingerprint == ours.tokenizer.fingerprint
""",
        endpoint,
        home,
        **more,
    )
    assert back.returncode == 0, back.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" and home in path.parents for path in written)
    for content in (*hub.files.values(), *(path.read_bytes() for path in written), done.stdout.encode()):
        assert TOKEN.encode() not in content


ODD = ["\n", "\r", "\0", "\t", " ", "é", "\u2028", "\ud800", '"', "\\", "\x1b"]


@given(st.sampled_from(["", "\n", " ", "\r\n", "\t\n", "\u3000"]), st.sampled_from(["", "\n", "\r\n", " \n"]))
def test_white_space_around_a_token_is_dropped(before: str, after: str) -> None:
    assert hub_token(before + TOKEN + after) == TOKEN


@pytest.mark.parametrize("token", [*(f"hf_x1y2z3{sign}x1y2z3" for sign in ODD), "", " \n", b"hf_x1y2z3", 12345678])
def test_a_token_that_cannot_be_one_is_refused_unshown(token: object) -> None:
    for call in (lambda: from_hub(REPO, token=token), lambda: push_to_hub("nowhere", REPO, token=token)):  # type: ignore[arg-type]
        with pytest.raises(HubError, match=r"the argument token .*(copy it again|cannot be read)") as error:
            call()
        shown = "".join(traceback.format_exception(error.value))
        assert "x1y2z3" not in shown and "12345678" not in shown


@pytest.mark.parametrize("sign", [sign for sign in ODD if sign not in "\n\r\0\ud800"])
def test_a_token_of_the_environment_is_refused_unshown(sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hf_x1y2z3{sign}x1y2z3\n")
    with pytest.raises(HubError, match="the token of HF_TOKEN or `hf auth login`") as error:
        from_hub(REPO)
    assert "x1y2z3" not in "".join(traceback.format_exception(error.value))
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\r\n")
    assert hub_token() == TOKEN


def test_a_failure_is_told_without_the_token() -> None:
    error = OSError(f"Illegal header value b'Bearer {TOKEN}' of {TOKEN}")
    assert hub_failure(error, TOKEN) == "OSError: Illegal header value b'Bearer [token]' of [token]"
    assert "Bearer" in hub_failure(error, None)


def everything_of(error: BaseException | None) -> str:
    """What a tool that follows every cause and context of an error can show of them."""
    return "" if error is None else f"{error!r} {everything_of(error.__cause__)} {everything_of(error.__context__)}"


def test_not_even_the_context_of_an_error_holds_a_token(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any, **__: Any) -> None:
        raise OSError(f"Illegal header value b'Bearer {TOKEN}'")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refusing)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refusing)
    calls: list[Callable[[], Any]] = [lambda: from_hub(REPO, token=TOKEN), lambda: push_to_hub(run, REPO, token=TOKEN)]
    for call in calls:
        with pytest.raises(HubError, match=r"\[token\]") as failure:
            call()
        assert TOKEN not in everything_of(failure.value)


def test_a_token_file_that_is_no_text_is_not_even_in_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_bytes(TOKEN.encode() + b"\xff")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ValueError, match="cannot be read as text") as odd:
        hub_token()
    assert TOKEN not in everything_of(odd.value)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_what_the_hub_repeats_of_a_token_is_not_shown(by: str, run: Path, hub: ModelHub, tmp_path: Path) -> None:
    hub.refuses = True
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    argument = f", token={TOKEN!r} + chr(10)" if by == "argument" else ""
    more = {"HF_TOKEN": TOKEN + "\n"} if by == "environment" else {}
    done = elsewhere(f"push_to_hub({str(run)!r}, {REPO!r}{argument})", endpoint, tmp_path / "home", **more)
    assert hub.asked_by == {f"Bearer {TOKEN}"}
    assert f"HubError: could not upload to {REPO}" in done.stderr and "not allowed: Bearer [token]" in done.stderr
    assert TOKEN not in done.stderr + done.stdout


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_an_error_in_words(run: Path, tmp_path: Path) -> None:
    for program, said in (
        (f"push_to_hub({str(run)!r}, {REPO!r})", f"HubError: could not upload to {REPO}"),
        (f"from_hub({REPO!r})", f"HubError: could not download {REPO}"),
    ):
        done = elsewhere(program, "http://127.0.0.1:9", tmp_path / "home")
        assert done.returncode == 1
        assert said in done.stderr and "hf auth login" in done.stderr
