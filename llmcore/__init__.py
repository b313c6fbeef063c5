"""From a folder of novels to a Llama-like language model that writes in their style."""

import os

# While OpenMP's threads wait for each other they spin, by default for milliseconds: on an idle machine that costs
# nothing, but let any other program take one core, and a training step takes tens of times as long. Sleeping at once
# is no better: waking up takes longer than many a small product. Here they spin for some microseconds, then sleep.
# It must be set before torch is first imported; what the environment says goes first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
