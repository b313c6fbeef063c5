"""Large corpora: `python -m tests.benchmarks.prepare [--full]`, up to 100 MB of text, or up to 1 GB.

How fast text becomes tokens beside SentencePiece alone, how much memory that and learning the pieces take, and how soon
a billion tokens give their first batch. The text is the default novel again and again, its lines cut and joined anew.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llmcore import config
from llmcore.corpus.library import open_library
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.sources import fetch
from llmcore.corpus.texts import find_texts, read_text
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.dataset import TokenDataset
from llmcore.files import PROJECT_ROOT
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer
from tests.benchmarks.peers import machine
from tests.benchmarks.token_files import write_tokens

MB = 10**6
ROUNDS = 9
TOKENS, WINDOW, BATCH = 10**9, 256, 8

# Run in a process of its own, which prints its peak of resident memory in bytes, and seconds.
WORK = {
    "prepare": "prepare_dataset(sys.argv[1], Tokenizer(sys.argv[2]), sys.argv[3], progress=False)",
    "learn": "train_tokenizer(find_texts(sys.argv[1]), sys.argv[3], 4000, character_coverage=0.98, progress=False)",
}
ALONE = """
import re, sys, time
from pathlib import Path
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.texts import find_texts
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.tokenizer import Tokenizer

started = time.perf_counter()
{}
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]  # getrusage counts the parent's too
print(1024 * int(peak), time.perf_counter() - started)
"""


def write_corpus(folder: Path, megabytes: float, joint: str = "\n", files: bool = False) -> Path:
    """A folder with so much text: one file, or one for each time round the novel. A joint of "" makes one line."""
    novel = find_texts(fetch("sanguo", PROJECT_ROOT / "data"))
    lines = [line for file in novel for line in read_text(file).splitlines()]
    chance, size, number = random.Random(0), 0, 0
    folder.mkdir()
    while size < megabytes * MB:
        pairs = zip(chance.sample(lines, len(lines)), chance.sample(lines, len(lines)), strict=True)
        cuts = ((a, b, chance.randrange(len(a) + 1)) for a, b in pairs)
        text = "".join(f"{a[:cut]}{b[cut:]}{joint}" for a, b, cut in cuts).encode()
        with open(folder / f"{number:04d}.txt", "ab") as file:
            size += file.write(text)
        number += files
    return folder


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of all cores together."""
    clock, cores = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - cores


def measure_rate(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Preparation, from texts on disk to token files on disk, in turns with SentencePiece on lines in memory.

    First of a library that is open already, then all in all: to open a library is to find out encodings, copies and
    lines that recur.
    """
    in_utf8 = write_corpus(folder / "utf-8", 18, files=True)
    (folder / "gb18030").mkdir()
    for file in find_texts(in_utf8):
        (folder / "gb18030" / file.name).write_bytes(read_text(file).encode("gb18030"))
    lines = [line for file in find_texts(in_utf8) for line in read_text(file).splitlines(keepends=True)]
    size = sum(file.stat().st_size for file in find_texts(in_utf8)) / MB
    encode, cores = tokenizer._processor.encode, os.cpu_count() or 1
    said = []
    for encoding in ("utf-8", "gb18030"):
        texts, to = folder / encoding, folder / "rate"
        library = open_library(texts, duplicates="keep")  # all lines are the novel's, so that all texts are copies
        ways = {
            "SentencePiece": lambda: encode(lines, num_threads=1),
            "prepared": lambda: prepare_dataset(library, tokenizer, to, progress=False),  # noqa: B023
            "opened": lambda: open_library(texts, duplicates="keep"),  # noqa: B023
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, run in ways.items():
                shutil.rmtree(to, ignore_errors=True)
                seconds[way].append(timed(run)[0])
        rounds = list(zip(*seconds.values(), strict=True))
        opened = statistics.median(opened / prepared for _, prepared, opened in rounds)
        alone = statistics.median(one / prepared for one, prepared, _ in rounds) / cores
        whole = statistics.median(one / (prepared + opened) for one, prepared, opened in rounds) / cores
        said.append(
            f"- {encoding}: {size / statistics.median(seconds['prepared']):.0f} MB/s on {cores} cores, {alone:.2f} of "
            f"cores × SentencePiece (target {0.9 if encoding == 'utf-8' else 0.7}); to open the library takes "
            f"{opened:.2f} of that time (target 1), and all in all it is {whole:.2f} of cores × SentencePiece"
        )
    return said


def measure_memory(folder: Path, model: Path, sizes: list[int]) -> None:
    """Rows of the table: each size as one file, and preparation also as one file of a single line."""
    for size in sizes:
        for kind, joint, work in (("lines", "\n", "prepare"), ("one line", "", "prepare"), ("lines", "\n", "learn")):
            with tempfile.TemporaryDirectory(dir=folder) as here:
                corpus = write_corpus(Path(here, "texts"), size, joint)
                command = [sys.executable, "-c", ALONE.format(WORK[work]), corpus, model, Path(here, "out")]
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT_ROOT)
            memory, seconds = map(float, done.stdout.split())
            print(f"| {work} | {size} MB, {kind} | {memory / MB:,.0f} | {seconds:.0f} |", flush=True)


def measure_batches(folder: Path) -> list[str]:
    """The first batch of a billion tokens, and what later ones cost beside a training step."""
    shape, how = config.preset("scifi-mini")
    write_tokens(folder / "tokens", shape.vocab_size, TOKENS)
    first, _ = timed(lambda: TokenDataset(folder / "tokens", "train", WINDOW).batch(0, BATCH))
    data = TokenDataset(folder / "tokens", "train", WINDOW)
    data.batch(0, BATCH)
    batches = [timed(lambda step=step: data.batch(step, BATCH))[0] for step in range(1, 500)]  # type: ignore[misc]
    how = how.replace(max_steps=10**6, compile="on", eval_interval=0, sample_interval=0, checkpoint_interval=0)
    events = Trainer(Transformer(shape), data, None, how, str(folder / "run")).steps()
    next(events), next(events)  # the first compiles
    step = statistics.median(next(events)["seconds"] for _ in range(15))
    events.close()
    batch = statistics.median(batches)
    return [
        f"- the first batch of {TOKENS:,} tokens is there {first * 1e3:.0f} ms after opening (target: 1000)",
        f"- a batch of {BATCH} × {WINDOW} out of blocks not read before takes {batch * 1e3:.2f} ms, "
        f"{batch / step:.2%} of a step of scifi-mini, {step * 1e3:.0f} ms (target 1%)",
    ]


def main() -> None:
    """Print the table and the figures."""
    print(f"Large corpora on {machine()}\n")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        novel = find_texts(fetch("sanguo", PROJECT_ROOT / "data"))
        tokenizer = train_tokenizer(novel, folder / "t", 4000, character_coverage=0.99, progress=False)
        said = [*measure_rate(folder, tokenizer), *measure_batches(folder)]
        print("| work | text | peak of resident memory, MB | seconds |\n| --- | --- | --- | --- |")
        measure_memory(folder, folder / "t.model", [10, 100, 1000] if "--full" in sys.argv else [10, 100])
    print("\n" + "\n".join(said))


if __name__ == "__main__":
    main()
