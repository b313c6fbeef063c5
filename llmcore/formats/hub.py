"""The Hugging Face Hub: a checkpoint goes there as a Hugging Face folder with a model card, and comes back."""

from __future__ import annotations

import json
import math
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


def push_to_hub(
    checkpoint: AnyCheckpoint, repo_id: str, data: str = "", private: bool = True, token: str | None = None
) -> str:
    """Upload a checkpoint in Hugging Face's format, with a model card and the training curves.

    Args:
        checkpoint: a loaded one, or what `load_checkpoint` takes.
        repo_id: "<user or organisation>/<name>"; made if it is not there.
        data: what the model was trained on, in words, for the card.
        private: whether a new repository is.
        token: for this call only, and never written anywhere nor shown; white space around it is dropped. None: what
            `hf auth login` or HF_TOKEN has set up.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: if there is no such checkpoint.
        HubError: if the upload failed, or the token cannot be one.
    """
    import huggingface_hub  # here, because only the Hub's functions need it

    secret = _token(token)
    checkpoint = open_checkpoint(checkpoint)
    with temporary_folder(Path(tempfile.gettempdir())) as temporary:
        folder = to_hf(checkpoint, temporary / "model")
        write_card(checkpoint, folder, repo_id, data)
        api = huggingface_hub.HfApi(token=None if token is None else secret)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit: Any = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"Step {checkpoint.step} of {_run(checkpoint)}"
            )
            return str(commit.commit_url)
        except Exception as error:  # the library raises its HTTP client's errors too
            failure = hub_failure(error, secret)
    # only here: the error itself may show the token, and is not even the context of ours
    raise HubError(
        f"could not upload to {repo_id} ({failure}). Log in with `hf auth login`, or set HF_TOKEN to a token that may "
        "write there"
    )


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
        token: see `push_to_hub`.

    Raises:
        FormatError: if it is not a Llama that our model can follow.
        CheckpointError: for weights that do not fit.
        HubError: if the download failed, or the token cannot be one.
    """
    import huggingface_hub

    folder, failure = resolve(repo_id), None
    if not folder.is_dir():
        secret = _token(token)
        wanted = [name for name in HF_FILES if not name.startswith(("README", "training"))]
        wanted += ["model-*.safetensors", "model.safetensors.index.json"]
        try:
            options: dict[str, Any] = {"revision": revision, "allow_patterns": wanted}
            options["token"] = None if token is None else secret
            folder = Path(huggingface_hub.snapshot_download(repo_id, **options))
        except Exception as error:
            failure = hub_failure(error, secret)
    if failure:
        raise HubError(
            f"could not download {repo_id} ({failure}). Check its name; if it is private, log in with `hf auth login`"
        )
    return from_hf(folder, device, max_seq_len)


def _token(token: str | None) -> str | None:
    try:
        return hub_token(token)
    except ValueError as error:
        raise HubError(str(error)) from None


def write_card(checkpoint: Checkpoint, folder: Path, name: str, data: str = "") -> None:
    """Write README.md, the Hub's model card, and training.png where the run has metrics, into an exported folder."""
    events = [event for event in read_metrics(checkpoint.path.parent) if event["step"] <= checkpoint.step]
    if not checkpoint.path.name.startswith("step="):  # it was set aside: the run has gone on without it
        events = []
    (folder / "README.md").write_text(model_card(checkpoint, events, name, data), encoding="utf-8")
    if events:
        from llmcore.notebook import plots  # matplotlib takes its time

        plots.training_curves(events, _run(checkpoint)).savefig(folder / "training.png")


def model_card(checkpoint: Checkpoint, events: list[dict[str, Any]], name: str, data: str = "") -> str:
    """The card's text: data, tokens, loss, bits per byte and configuration, as the run's own files have them.

    Args:
        checkpoint: the model to describe.
        events: of its run, up to its step; none for no curves.
        name: the heading.
        data: what it was trained on, in words.
    """
    from huggingface_hub import ModelCardData

    about = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["llama", "llm-workbook"])
    config, shape = checkpoint.config, checkpoint.model.config
    validated: dict[str, Any] = next((event for event in reversed(events) if "val_loss" in event), {})
    if config.get("val_step") is not None:  # the checkpoint's own word
        validated = {"val_loss": config["val_loss"], "step": config["val_step"]}
    loss = validated.get("val_loss", config.get("loss", math.nan))
    at = f" at step {validated['step']:,}" if validated and validated["step"] != checkpoint.step else ""
    kind = "validation loss" if validated else f"{config.get('loss_of', '')} loss".strip()
    bytes_per_token = config.get("bytes_per_token")
    rows = {
        "parameters": f"{shape.n_params():,}",
        "context": f"{shape.max_seq_len:,} tokens",
        "vocabulary": f"{shape.vocab_size:,} ids",
        "trained on": data or "not said",
        "fingerprint of the data": (config.get("data") or {}).get("train") or "not known",
        "optimizer steps": f"{checkpoint.step:,}",
        "tokens seen": f"{config['tokens']:,}" if "tokens" in config else "not known",
        kind: f"{loss:.4f} nats per token{at}",
    }
    if bytes_per_token and validated:
        rows["bits per byte of held-out text"] = f"{loss / math.log(2) / bytes_per_token:.4f}{at}"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    settings = {key: config[key] for key in ("model", "train", "precision", "device", "environment") if key in config}
    curves = "\n![Training curves](training.png)\n" if events else ""
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

It writes what is likely after a text, in the manner of its training texts; nothing it says need be true.

## Configuration

```json
{json.dumps(settings, indent=1, ensure_ascii=False)}
```
"""


def _run(checkpoint: Checkpoint) -> str:
    return checkpoint.path.parent.name or "a run"
