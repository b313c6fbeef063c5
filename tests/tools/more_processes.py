"""Go on with an exported model in several processes, on GPUs or on a CPU:
torchrun --nproc_per_node 2 tests/tools/more_processes.py <export> <folder of .txt files> <new folder> <steps>"""

import shutil
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, LEARNING_RATE = 8, 1e-3  # windows in a step of each process
source, texts, target, steps = *map(Path, sys.argv[1:4]), int(sys.argv[4])
distributed.init_process_group()  # over NCCL between GPUs, over Gloo between CPUs
rank, gpus = distributed.get_rank(), torch.cuda.device_count()
device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
ids: list[int] = []
for file in sorted(texts.glob("*.txt")):
    ids += [*tokenizer(file.read_text("utf-8")).input_ids, tokenizer.eos_token_id]
tokens, context = torch.tensor(ids), model.config.max_position_embeddings
parallel = DistributedDataParallel(model)  # takes the mean of all processes' gradients
optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
chance = torch.Generator().manual_seed(rank)  # each process reads windows of its own
for _ in range(steps):
    starts = torch.randint(len(tokens) - context, (BATCH, 1), generator=chance)
    windows = tokens[starts + torch.arange(context)].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=gpus > 0):
        loss = parallel(input_ids=windows, labels=windows).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if rank == 0:
    model.save_pretrained(target)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)
    print(f"{steps} steps of {distributed.get_world_size()} processes, last loss {loss.item():.3f}: {target}")
distributed.destroy_process_group()
