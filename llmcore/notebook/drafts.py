"""Drafts: what a model writes after a text, token by token, with each token's probability, and the same once more."""

from __future__ import annotations

import codecs
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmcore.checkpoint import Checkpoint
from llmcore.files import one_line
from llmcore.generate import generate_ids, prompt_ids
from llmcore.model import Transformer
from llmcore.notebook.safe_html import ending, html_text, piece_text
from llmcore.notebook.story import SAMPLING, Passage, Story, text_hash
from llmcore.tokenizer import Tokenizer

UNLIKELY = 0.1  # tokens less probable than this are underlined
# shows a token's probabilities above it when the mouse is over it, or when it has the keyboard's focus
ODDS_STYLE = (
    "<style>.llm-token{position:relative} .llm-token:hover::after,.llm-token:focus::after{content:attr(data-odds);"
    "position:absolute;left:0;bottom:1.6em;z-index:9;padding:4px 8px;white-space:pre;line-height:1.4;font-weight:400;"
    "background:#fff;color:#000;border:1px solid #555;border-radius:4px}</style>"
)
Alternatives = list[tuple[int, float]]  # ids and their probabilities


@torch.inference_mode()
def odds(model: Transformer, ids: Sequence[int], start: int, vocab_size: int, count: int = 5) -> list[Alternatives]:
    """The probability of each token from a place on, and the likeliest tokens there.

    The probabilities are the model's own, before temperature and the other parameters of sampling. Each is computed
    from at least half a context, or from all tokens before it.

    Args:
        model: the language model.
        ids: (time,) the whole text.
        start: the first place, 1 or more.
        vocab_size: of the tokenizer; ids from this number on are left out.
        count: how many of the likeliest tokens.

    Returns:
        For each place the token itself and its probability, then the `count` likeliest tokens there.
    """
    context, device = model.config.max_seq_len, model.tok_embeddings.weight.device
    alternatives: list[Alternatives] = []
    place = start
    while place < len(ids):
        first = max(0, place - max(1, context // 2))
        window = torch.as_tensor(ids[first : first + context], device=device)
        probabilities = model(window[None])[0, :, :vocab_size].float().softmax(-1)
        end = min(len(ids), first + len(window) + 1)
        for at in range(place, end):
            row = probabilities[at - 1 - first]
            top = row.topk(min(count, len(row)))
            own = ids[at], float(row[ids[at]])
            alternatives.append([own, *zip(top.indices.tolist(), top.values.tolist(), strict=True)])
        place = end
    return alternatives


@dataclass
class Draft:
    """The text that a model writes after another text, complete or not.

    Attributes:
        checkpoint: the model, and its name.
        before: the text before.
        settings: see `story.Passage`, without what is known only at the end.
        ids: of the text before (as much as fits into the context) and of the model's text.
        start: the place in `ids` where the model's text begins.
        steps: tokens drawn so far, the end of the text included.
        ended: whether the model has ended the text itself, with eos.
    """

    checkpoint: Checkpoint
    before: str
    settings: Mapping[str, Any]
    ids: list[int]
    start: int
    steps: int = 0
    ended: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's."""
        assert self.checkpoint.tokenizer is not None  # `begin` has refused it
        return self.checkpoint.tokenizer

    @classmethod
    def begin(cls, checkpoint: Checkpoint, before: str, settings: Mapping[str, Any]) -> Draft:
        """A draft without text.

        Raises:
            ValueError: if the checkpoint has no tokenizer, or the text cannot be encoded.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the desk shows how much of the text fits
            ids = prompt_ids(checkpoint.model, checkpoint.tokenizer, before)
        return cls(checkpoint, before, settings, ids, len(ids))

    def write(self) -> Iterator[None]:
        """Add tokens one by one, and yield after each."""
        tokenizer, options = self.tokenizer, {name: self.settings[name] for name in (*SAMPLING, "seed")}
        options |= {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
        for [id] in generate_ids(self.checkpoint.model, [self.ids], self.settings["max_new_tokens"], **options):
            self.steps += 1
            self.ended = id == tokenizer.eos_id
            if not self.ended:
                self.ids.append(id)
            yield

    def text(self) -> str:
        """The model's text, without half a character at the end."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(b"".join(map(self.tokenizer.id_to_bytes, self.ids[self.start :])))

    def passage(self) -> Passage:
        """The text with what is needed to write it again."""
        text = self.text()
        known = {"tokens": self.steps, "sha256": text_hash(self.before + text)}
        return Passage(text, name_of(self.checkpoint), {**self.settings, **known})

    def unseen(self) -> int:
        """How many characters of the text before the model no longer sees, from its next token but one on.

        (For its first token it sees a whole context; if that is full, the window then slides to the newest half.)
        """
        context = self.checkpoint.model.config.max_seq_len
        seen = self.ids[window_start(self.start, max(1, self.steps), context) : self.start]
        size = sum(len(self.tokenizer.id_to_bytes(id)) for id in seen)
        whole = self.before.encode(errors="surrogatepass")
        return len(whole[: max(0, len(whole) - size)].decode(errors="ignore"))

    def as_html(self, with_odds: bool = False) -> str:
        """The end of the text before, and the model's. With odds, each token shows its alternatives under the mouse."""
        written = self._spans() if with_odds else html_text(self.text())
        about = f"{name_of(self.checkpoint)}, seed {self.settings['seed']}"
        before = html_text(ending(self.before, 40))
        return (
            f'<div style="flex:1 1 20em;max-width:60em"><small>{html_text(about)}</small>'
            f'<p style="white-space:pre-wrap;line-height:1.9"><b>{before}</b>{written}</p></div>'
        )

    def _spans(self) -> str:
        """The text as HTML, one span a token. Tokens that are bytes of one character share a span."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokenizer = self.tokenizer
        alternatives = odds(self.checkpoint.model, self.ids, self.start, tokenizer.vocab_size)
        spans, hints, least = [], [], 1.0
        for id, [(_, own), *others] in zip(self.ids[self.start :], alternatives, strict=True):
            likeliest = "".join(f"\n{p:7.1%}  {piece_text(tokenizer, other)}" for other, p in others)
            hints.append(f"{piece_text(tokenizer, id)}  {own:.1%}\nlikeliest here:{likeliest}")
            least = min(least, own)
            if text := decoder.decode(tokenizer.id_to_bytes(id)):
                line = "text-decoration:underline dotted" if least < UNLIKELY else "text-decoration:none"
                hint = html_text("\n".join(hints))
                spans.append(
                    f'<span class="llm-token" tabindex="0" data-odds="{hint}" style="{line}">{html_text(text)}</span>'
                )
                hints, least = [], 1.0
        return "".join(spans)


def name_of(checkpoint: Checkpoint) -> str:
    """The run and the step of a checkpoint, on one line."""
    return one_line(f"{checkpoint.path.parent.name}/{checkpoint.path.name}")


def window_start(prompt: int, steps: int, context: int) -> int:
    """The first token that the model sees when it draws the next one, as in `generate_ids`.

    Args:
        prompt: tokens before the model's.
        steps: tokens of the model so far.
        context: of the model.
    """
    start = max(0, prompt - context)
    for length in range(prompt, prompt + steps + 1):
        if length - start > context:  # the window slides
            start = length - max(1, context // 2)
    return start


def remake(story: Story, number: int, checkpoint: Checkpoint) -> str:
    """Let the model write a passage again, counted from 0: with the same checkpoint, the same text.

    Raises:
        ValueError: if a person wrote it, or it or the text before was changed since.
    """
    if not story.as_written(number):
        raise ValueError(f"passage {number + 1} cannot be made again: no model wrote it, or the text was changed since")
    settings = dict(story.passages[number].settings or {})
    draft = Draft.begin(checkpoint, story.text(number), settings)
    for _ in itertools.islice(draft.write(), settings["tokens"]):
        pass
    return draft.text()
