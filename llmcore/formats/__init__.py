"""Other programs' models: one module a format, both directions in it."""
