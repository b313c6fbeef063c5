"""From a folder of novels to a Llama-like language model that writes in their style."""

import os

# OpenMP's threads spin while they wait, which costs nothing on an idle machine; but let any other program take one
# core, and a training step takes tens of times as long. Waiting passively is as fast alone, and bears company.
# It must be set before torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
