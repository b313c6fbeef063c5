"""`make bench`: every table, on the terminal and in `outputs/bench/`."""

from __future__ import annotations

import subprocess
import sys

from llmcore.files import PROJECT_ROOT, display_path

OUTPUT = PROJECT_ROOT / "outputs" / "bench"


def main() -> None:
    """Run the benchmarks one after the other, each in a process of its own."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name in ("steps", "decode", "memory", "prepare", "checkpoint", "startup"):
        print(f"\n## {name}\n", flush=True)
        with subprocess.Popen(
            [sys.executable, "-m", f"tests.benchmarks.{name}"], stdout=subprocess.PIPE, text=True, cwd=PROJECT_ROOT
        ) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if process.returncode:
            sys.exit(process.returncode)
        (OUTPUT / f"{name}.md").write_text("".join(lines), encoding="utf-8")
    print(f"\nwritten to {display_path(OUTPUT)}")


if __name__ == "__main__":
    main()
