"""Commands that measure; see tests/README.md."""
