"""The decode step as compiled code: from new tokens to the logits of the next ones in one call.

The step of `model.py` is some 150 small operations, and to start each takes longer than to compute it. Here torch's
ahead-of-time compiler (AOTInductor) makes one function of it, for a number of texts that are written together. Of a
model of many blocks it makes two: one for a block, and one for what follows the blocks. The weights are arguments, so
one compilation serves every model of the same shape. It stays in the compiler's cache folder, for other processes too.
A process of low priority makes it, once enough was written to show that it pays; meanwhile, and where there is no
compiler, the model itself writes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore.config import ModelConfig
from llmcore.device import quote_library_folder, settle_cache_folder, use_huge_pages
from llmcore.files import replacing_folder
from llmcore.model import Attention, Block, KVCache, Transformer
from llmcore.quantize import Int8Linear, int8_weights, rounds_inputs

ENOUGH_TOKENS = 256  # in each text, written with one shape before it is compiled
ENOUGH_WEIGHTS = 1_000_000  # below, a model writes fast enough
CACHE = "llmcore_decode"  # a folder beside the compiler's own
FEW_BLOCKS = 6  # each takes some seconds to compile, and in a larger model a call takes little of the time
WHOLE, APART = ["step.pt2"], ["block.pt2", "head.pt2"]  # files
_written: dict[str, int] = {}  # tokens of each text by shape, in this process
_makers: dict[str, subprocess.Popen[bytes]] = {}  # by shape


class _Row(nn.Module):
    """A linear layer for one row: a loop over the weights as they are, which the compiler joins with its neighbours.

    Some parts of a row are added up side by side, so that an addition need not wait for the one before it: two for
    float32 and up to four for smaller weights, each of whole vectors of 16.
    """

    def __init__(self, linear: nn.Linear | Int8Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.scale = getattr(linear, "scale", None)
        possible = (2,) if self.weight.dtype == torch.float32 else (4, 3, 2)
        self.parts = next((parts for parts in possible if self.weight.shape[1] % (16 * parts) == 0), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(1, 1, inputs) -> (1, 1, outputs)."""
        weight, x_parts = self.weight.unflatten(1, (self.parts, -1)), x.float().reshape(self.parts, -1)
        products = [weight[:, part].float() * x_parts[part] for part in range(self.parts)]
        y = functools.reduce(torch.add, products).sum(-1)
        return (y if self.scale is None else y * self.scale).to(x.dtype)[None, None]


class _StepAttention(Attention):
    """Attention of one new token. The cache is (keys, values, past): what has room for all, and how many are held."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """(batch, 1, dim) -> the same shape. `mask`, (batch,), tells how many of the first tokens are padding."""
        q, k, v = self.project(x, cos, sin)
        keys, values, past = cache
        keys[:, :, past : past + 1] = k
        values[:, :, past : past + 1] = v
        keys, values = keys[:, :, :past], values[:, :, :past]
        q = q.unflatten(1, (self.n_kv_heads, -1)).float() / self.head_dim**0.5  # (batch, kv_heads, group, 1, head_dim)
        held, own = ((q * each[:, :, None].float()).sum(-1) for each in (keys, k))
        if mask is not None:
            held = held.masked_fill(torch.arange(past) < mask[:, None, None, None], -torch.inf)

        # a softmax over both, so that the keys held need not be copied to stand beside the new one
        top = torch.maximum(held.amax(-1, keepdim=True), own)
        held, own = (held - top).exp(), (own - top).exp()
        y = (held[..., None] * values[:, :, None].float()).sum(-2) + own * v.float()
        y = y / (held.sum(-1, keepdim=True) + own)
        return self.wo(y.to(x.dtype).flatten(1)[:, None])


def _layout(tensors: list[Tensor]) -> list[list[Any]]:
    """Of each tensor what compiled code takes for granted and does not check."""
    return [[str(each.dtype).removeprefix("torch."), *each.shape, each.is_contiguous()] for each in tensors]


def _kind(model: Transformer, count: int) -> dict[str, Any] | None:
    """All that the compiled code depends on, as JSON; None for what is not compiled."""
    weight = model.tok_embeddings.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    int8 = isinstance(model.output, Int8Linear)
    if int8 and count > 1 and not rounds_inputs(count):
        return None  # torch 2.13's compiler cannot place the product that is used here
    blocks, head = _arguments(model)
    block, *others = map(_layout, blocks)
    if any(other != block for other in others):
        return None
    files, n_layers = (WHOLE, len(blocks)) if len(blocks) <= FEW_BLOCKS else (APART, 1)
    return {
        "config": model.config.to_dict() | {"n_layers": n_layers},
        "files": files,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "int8": int8,
        "block": block,
        "head": _layout(head),
        "tables": _layout([weight, model.rope_cos, model.rope_sin]),
        "count": count,
        "threads": torch.get_num_threads(),
    }


@functools.cache
def _sources() -> bytes:
    """What the code is compiled from."""
    return b"\0".join((Path(__file__).parent / name).read_bytes() for name in ("decode.py", "model.py", "quantize.py"))


def _folder(kind: dict[str, Any]) -> Path:
    """Where the compiled code lies: another place for another torch, processor or source."""
    machine = [torch.__version__, torch.backends.cpu.get_cpu_capability(), json.dumps(kind, sort_keys=True)]
    key = hashlib.sha256(b"\0".join([_sources(), *map(str.encode, machine)])).hexdigest()[:32]
    return Path(settle_cache_folder()) / CACHE / key


def _arguments(model: Transformer) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Weights of each block and of what follows the blocks, in the order in which the compiled code takes them."""
    head = [model.norm.weight, *model.output.state_dict(keep_vars=True).values()]
    blocks = [list(block.state_dict(keep_vars=True).values()) for block in model.layers]
    return [[each.detach() for each in weights] for weights in blocks], [each.detach() for each in head]


def compile_step(kind: dict[str, Any], folder: Path) -> None:
    """Compile for a `_kind` and put its files into a folder, all or none.

    Raises:
        ValueError: for weights of other dtypes than `Transformer` and `int8_weights` make.
    """
    config = ModelConfig.from_dict(kind["config"])
    model = Transformer(config).to(getattr(torch, kind["dtype"])).eval().requires_grad_(False)
    if kind["int8"]:
        model = int8_weights(model)
    if kind["tables"][1][0] == "float32":  # as in a model that was loaded
        model.reset_rope()
    if (_kind(model, kind["count"]) or {}) | {each: kind[each] for each in ("files", "threads")} != kind:
        raise ValueError("a model of unusual weights, such as of several dtypes, is not compiled")
    blocks, head_weights = _arguments(model)
    block = model.layers[0]
    assert isinstance(block, Block)
    names = list(block.state_dict())
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear | Int8Linear) and kind["count"] == 1:  # several rows are a matrix
                setattr(module, name, _Row(child))
    block.attention.__class__ = _StepAttention

    def through_block(x: Tensor, held: Tensor, padding: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> Tensor:
        past, (keys, values, *weights) = held.shape[0], others
        mask = padding if kind["count"] > 1 else None
        inputs = (x, cos[past : past + 1], sin[past : past + 1], mask, (keys, values, past))
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), inputs)

    def through_head(x: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
        output = dict(zip(("weight", "scale"), weights, strict=False))
        normed = F.rms_norm(x, (config.dim,), norm, config.norm_eps)
        return torch.func.functional_call(model.output, output, (normed,))[:, -1]

    def through_all(tokens: Tensor, held: Tensor, padding: Tensor, *others: Tensor) -> Tensor:
        cos, sin, embeddings, *weights = others
        head, layers = weights[: len(head_weights)], weights[len(head_weights) :]
        x, size = embeddings[tokens], 2 + len(names)
        for start in range(0, len(layers), size):
            x = through_block(x, held, padding, cos, sin, *layers[start : start + size])
        return through_head(x, *head)

    # examples of the inputs, and the sizes that vary: how many tokens are held, and for how many there is room
    count, embeddings = kind["count"], model.tok_embeddings.weight
    cache = KVCache(config, count, dtype=embeddings.dtype)
    tokens, padding = torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    held = torch.empty(max(2, config.max_seq_len // 2))  # by this the compiler judges whether threads are worth it
    length = torch.export.Dim("length", min=2, max=config.max_seq_len - 1)
    room = torch.export.Dim("room", min=3, max=config.max_seq_len)
    step, sizes = (held, padding, model.rope_cos, model.rope_sin), ({0: length}, None, None, None)
    layers = [(*own, *weights) for *own, weights in zip(cache.keys, cache.values, blocks, strict=True)]
    layer_sizes, head_sizes = ({2: room}, {2: room}, *[None] * len(names)), [None] * len(head_weights)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder, kind["files"]) as new:
        files = [new / name for name in kind["files"]]
        if len(files) == 1:
            inputs = (tokens, *step, embeddings, *head_weights, *itertools.chain(*layers))
            all_sizes = (None, *sizes, None, *head_sizes, *layer_sizes * len(layers))
            _compile(through_all, inputs, all_sizes, kind["threads"], files[0])
        else:
            x = embeddings[tokens]
            _compile(through_block, (x, *step, *layers[0]), (None, *sizes, *layer_sizes), kind["threads"], files[0])
            _compile(through_head, (x, *head_weights), (None, *head_sizes), kind["threads"], files[1])


def _compile(function: Callable[..., Any], inputs: Any, sizes: Any, threads: int, file: Path) -> None:
    module = nn.Module()
    module.forward = lambda *arguments: function(*arguments)
    with torch.no_grad():
        program = torch.export.export(
            module,
            inputs,
            dynamic_shapes=(sizes,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # no two sizes are known to have an order
        )
        options = {
            "cpp.threads": threads,
            "cpp.min_chunk_size": 4096,  # less work is not worth waking a second thread
            "cpp.enable_floating_point_contract_flag": "fast",  # a product and its sum in one instruction
            "realize_reads_threshold": 1,  # what all rows of a matrix read, such as the norm, is computed once
            "memory_planning": True,  # one piece of memory for all that lies between
        }
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


@functools.lru_cache(8)
def _load(folder: Path, files: tuple[str, ...]) -> list[Any]:
    """The compiled functions: each takes a list of tensors, which it empties, and returns a list."""
    # what torch._inductor.aoti_load_package wraps, without the seconds that it takes to import the compiler
    load = torch._C._aoti.AOTIModelPackageLoader
    return [load(str(folder / name), "model", False, 1, -1) for name in files]


def prepare(model: Transformer, count: int = 1) -> bool:
    """Compile now, if it is not yet, what writes `count` texts at once with a model of this shape: about half a minute.

    Returns:
        Whether the model writes with compiled code from now on.
    """
    kind = _kind(model, count)
    if kind is None:
        return False
    return _folder(kind).is_dir() or _start(kind, _folder(kind)).wait() == 0


def _start(kind: dict[str, Any], folder: Path, nice: int = 0) -> subprocess.Popen[bytes]:
    """A process that compiles; there is one at most for each shape."""
    name = str(folder)
    if name not in _makers:
        command = [sys.executable, "-m", "llmcore.decode", json.dumps(kind), name, str(nice)]
        places = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        quiet: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        _makers[name] = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)}, **quiet)
    return _makers[name]


class Decoder:
    """What writes with a model: compiled code where there is some, else the model itself.

    Args:
        model: the language model.
        count: texts at once.
    """

    def __init__(self, model: Transformer, count: int) -> None:
        self.model, self.no_padding = model, torch.zeros(count, dtype=torch.int64)
        kind = _kind(model, count)
        self.kind, self.folder = kind, _folder(kind) if kind else None
        self.functions: list[Any] | None = None
        self.seen: KVCache | None = None  # the cache that `layers`, the arguments for each block, are made for
        if self.folder is not None and self.folder.is_dir():
            self._take(self.folder)

    def logits(self, tokens: Tensor, cache: KVCache, padding: Tensor | None = None) -> Tensor:
        """Logits (batch, vocab_size) of what follows the last of the tokens (batch, time), which join the cache.

        `padding`, (batch, held + time) bool, is True where a token is only padding on the left.
        """
        compilable = tokens.shape[1] == 1 and cache.length >= 2 and self.kind is not None
        if compilable and self.functions is None:
            self._wait_or_start()
        if not compilable or self.functions is None:
            with torch.inference_mode():
                return self.model.output(self.model.hidden_states(tokens, cache, padding)[:, -1])

        assert cache.length < cache.keys.shape[3]  # compiled code does not look
        if cache is not self.seen:
            self.seen = cache
            layers = zip(cache.keys, cache.values, self.weights, strict=True)
            self.layers = [[keys, values, *weights] for keys, values, weights in layers]
            self.all = [self.embeddings, *self.head, *itertools.chain(*self.layers)]
        first = self.no_padding if padding is None else padding.sum(1)
        step = (self.places[: cache.length], first, *self.rope)
        cache.length += 1
        if len(self.functions) == 1:
            return self.functions[0].boxed_run([tokens.contiguous(), *step, *self.all])[0]
        block, head = self.functions
        x = F.embedding(tokens, self.embeddings)  # in half the time of the module
        for layer in self.layers:
            [x] = block.boxed_run([x, *step, *layer])
        return head.boxed_run([x, *self.head])[0]

    def _take(self, folder: Path) -> None:
        assert self.kind is not None
        try:
            self.functions = _load(folder, tuple(self.kind["files"]))
        except Exception:  # of many kinds; the model itself can always write
            self.kind = None
            return
        self.weights, self.head = _arguments(self.model)
        self.embeddings = self.model.tok_embeddings.weight.detach()
        self.rope = self.model.rope_cos, self.model.rope_sin
        self.places = torch.empty(self.model.config.max_seq_len)  # its first ones tell how many tokens are held
        # in a large model this takes a second, in which the first tokens can be written
        weights = [self.embeddings, *self.head, *itertools.chain(*self.weights)]
        threading.Thread(target=use_huge_pages, args=(weights,), daemon=True).start()

    def _wait_or_start(self) -> None:
        """Count a token; have the shape compiled when there are enough, and use it when it is there."""
        assert self.kind is not None and self.folder is not None
        name = str(self.folder)
        _written[name] = _written.get(name, 0) + 1
        if _written[name] % 16:
            return
        if self.folder.is_dir():
            self._take(self.folder)
        elif _written[name] >= ENOUGH_TOKENS and self.model.config.n_params() >= ENOUGH_WEIGHTS:
            _start(self.kind, self.folder, nice=10)


if __name__ == "__main__":  # in a process of its own, see _start
    if hasattr(os, "nice"):
        os.nice(int(sys.argv[3]))
    quote_library_folder()
    compile_step(json.loads(sys.argv[1]), Path(sys.argv[2]))
