"""Tests of llmcore and of the notebooks, and the scripts behind `make demo` and `make notebooks`."""
