"""From a folder of novels to a Llama-like language model that writes in their style."""
