"""Every benchmark's short form, one after another: `python -m benchmarks [FOLDER]`.

FOLDER (default: `benchmarks/results`) gets a JSON file of each. Fails when one of them does, at the end;
goals that are not met are told and fail nothing: that is a machine's doing as often as ours.
"""

import subprocess
import sys
import time
from pathlib import Path

NAMES = ("startup", "decode", "embed", "extract", "retrieval", "training", "reindex")


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in NAMES:
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        words = [
            sys.executable,
            "-m",
            f"benchmarks.{name}",
            "--short",
            "--json",
            str(folder / f"{name}.json"),
        ]
        if subprocess.run(words).returncode:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
