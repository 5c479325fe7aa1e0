"""Every benchmark's short form, one after another: `python -m benchmarks [FOLDER]`.

FOLDER (default: `benchmarks/results`) gets a JSON file of each. Fails at the end if one of them fails. Goals
that are not met are reported but are no failure: often they are due to the machine.
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
        result = str(folder / f"{name}.json")
        command = [sys.executable, "-m", f"benchmarks.{name}", "--short", "--json", result]
        if subprocess.run(command).returncode:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
