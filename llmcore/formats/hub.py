"""The Hugging Face Hub: models come from there, and go there as a Hugging Face folder with a model card."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from llmcore.checkpoint import Checkpoint
from llmcore.files import hub_failure, hub_token, resolve, temporary_folder
from llmcore.formats.huggingface import HF_FILES, from_hf, to_hf
from llmcore.formats.shared import AnyCheckpoint, open_checkpoint
from llmcore.runs import read_metrics


class HubError(RuntimeError):
    """The Hub could not be reached, or refused. The message says what to do, and never shows a token."""


def from_hub(
    repo_id: str,
    device: str = "auto",
    max_seq_len: int | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Checkpoint:
    """Download a Llama from the Hub, once, and open it with `from_hf`.

    Args:
        repo_id: "<user or organisation>/<name>", or a folder on this machine.
        device: "auto", "cpu", "cuda" or "mps".
        max_seq_len: see `from_hf`.
        revision: a branch, tag or commit. None: the newest.
        token: for this call only. It is never written to a file nor shown; white space around it is dropped. None: the
            token that `hf auth login` or HF_TOKEN has set up.

    Raises:
        FormatError: if it is not a Llama that our model supports.
        CheckpointError: for weights that do not fit.
        HubError: if the download failed, or the token is not valid.
    """
    import huggingface_hub  # here, because only the Hub's functions need it

    folder, failure = resolve(repo_id), None
    if not folder.is_dir():
        secret = _checked_token(token)
        wanted = [name for name in HF_FILES if not name.startswith(("README", "training"))]
        wanted += ["model-*.safetensors", "model.safetensors.index.json"]
        options: dict[str, Any] = {"revision": revision, "allow_patterns": wanted}
        options["token"] = None if token is None else secret
        try:
            folder = Path(huggingface_hub.snapshot_download(repo_id, **options))
        except Exception as error:  # the library raises its HTTP client's errors too
            failure = hub_failure(error, secret)
    if failure:  # only here: the error itself may show the token, and so must not even be the context of ours
        raise HubError(
            f"could not download {repo_id} ({failure}). Check its name; if it is private, log in with `hf auth login`"
        )
    return from_hf(folder, device, max_seq_len)


def push_to_hub(
    checkpoint: AnyCheckpoint, repo_id: str, data: str = "", private: bool = True, token: str | None = None
) -> str:
    """Upload a checkpoint in Hugging Face's format, with a model card, and the training curves if the run has them.

    Args:
        checkpoint: a `Checkpoint`, or what `load_checkpoint` takes.
        repo_id: "<user or organisation>/<name>"; a new repository is made if there is none.
        data: what the model was trained on, in words, for the card.
        private: whether a new repository is.
        token: see `from_hub`.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: if there is no such checkpoint.
        HubError: if the upload failed, or the token is not valid.
    """
    import huggingface_hub

    secret = _checked_token(token)
    checkpoint = open_checkpoint(checkpoint)
    with temporary_folder(Path(tempfile.gettempdir())) as temporary:
        folder = to_hf(checkpoint, temporary / "model")
        write_card(checkpoint, folder, repo_id, data)
        api = huggingface_hub.HfApi(token=None if token is None else secret)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit: Any = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"Step {checkpoint.step} of {_run_name(checkpoint)}"
            )
            return str(commit.commit_url)
        except Exception as error:
            failure = hub_failure(error, secret)
    raise HubError(  # only here, as in from_hub
        f"could not upload to {repo_id} ({failure}). Log in with `hf auth login`, or set HF_TOKEN to a token that may "
        "write there"
    )


def _checked_token(token: str | None) -> str | None:
    """The token that a call will send: see `hub_token`."""
    try:
        return hub_token(token)
    except ValueError as error:
        raise HubError(str(error)) from None


def write_card(checkpoint: Checkpoint, folder: Path, name: str, data: str = "") -> None:
    """Write README.md, the Hub's model card, into an exported folder.

    The run's own picture of its training curves, if there is one, is copied to training.png.
    """
    run_dir = checkpoint.path.parent
    own = checkpoint.path.name.startswith("step=")  # else it was set aside: the run has gone on without it
    events = [event for event in read_metrics(run_dir) if event["step"] <= checkpoint.step] if own else []
    has_curves = own and (run_dir / "curves.png").is_file()
    if has_curves:
        shutil.copyfile(run_dir / "curves.png", folder / "training.png")
    card = model_card(checkpoint, events, name, data, has_curves)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(
    checkpoint: Checkpoint, events: list[dict[str, Any]], name: str, data: str = "", has_curves: bool = False
) -> str:
    """The card's text: data, tokens, loss, bits per byte and configuration, from the files of the run.

    Args:
        checkpoint: the model to describe.
        events: of its run, up to its step.
        name: the heading.
        data: what it was trained on, in words.
        has_curves: show the picture training.png.
    """
    from huggingface_hub import ModelCardData

    about = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["llama", "llm-workbook"])
    config = checkpoint.config
    table = "\n".join(f"| {key} | {value} |" for key, value in _card_rows(checkpoint, events, data).items())
    settings = {key: config[key] for key in ("model", "train", "precision", "device", "environment") if key in config}
    curves = "\n![Training curves](training.png)\n" if has_curves else ""
    return f"""---
{about.to_yaml()}
---

# {name}

A Llama-like language model, trained with the llm workbook.

| | |
| --- | --- |
{table}
{curves}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```

It writes what is likely after a text, in the manner of its training texts; what it says need not be true.

## Configuration

```json
{json.dumps(settings, indent=1, ensure_ascii=False)}
```
"""


def _card_rows(checkpoint: Checkpoint, events: list[dict[str, Any]], data: str) -> dict[str, str]:
    """The rows of the card's table."""
    config, shape, start = checkpoint.config, checkpoint.model.config, checkpoint.config.get("init_from")

    # the last validation: the checkpoint's own, else that of the run's events
    validation: dict[str, Any] = next((event for event in reversed(events) if "val_loss" in event), {})
    if config.get("val_step") is not None:
        validation = {"val_loss": config["val_loss"], "step": config["val_step"]}
    loss = validation.get("val_loss", config.get("loss", math.nan))
    loss_name = "validation loss" if validation else f"{config.get('loss_of', '')} loss".strip()
    at_step = f" at step {validation['step']:,}" if validation and validation["step"] != checkpoint.step else ""

    rows = {
        "parameters": f"{shape.n_params():,}",
        "context": f"{shape.max_seq_len:,} tokens",
        "vocabulary": f"{shape.vocab_size:,} ids",
        **({"started from": f"{start['source']} (sha256 {start['sha256'][:16]})"} if start else {}),
        "trained on": data or "not said",
        "fingerprint of the data": (config.get("data") or {}).get("train") or "not known",
        "optimizer steps": f"{checkpoint.step:,}",
        "tokens seen": f"{config['tokens']:,}" if "tokens" in config else "not known",
        loss_name: f"{loss:.4f} nats per token{at_step}",
    }
    bytes_per_token = config.get("bytes_per_token")
    if bytes_per_token and validation:
        rows["bits per byte of held-out text"] = f"{loss / math.log(2) / bytes_per_token:.4f}{at_step}"
    return rows


def _run_name(checkpoint: Checkpoint) -> str:
    return checkpoint.path.parent.name or "a run"
