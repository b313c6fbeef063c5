"""From the files that people have to token files."""
