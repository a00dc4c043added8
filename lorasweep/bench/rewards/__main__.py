"""Measure rewarded runs against TRL's GRPO trainer, and in packs, one thread.

    python -m lorasweep.bench.rewards OUT.json [curves] [flips]

Needs the extra `bench`. Other parts stay in the file.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

from lorasweep.bench.rewards import curves, flips
from lorasweep.store import files
from lorasweep.tracking import provenance

PARTS = {"curves": curves.measure, "flips": flips.measure}


def main(out: str, wanted: list[str]) -> None:
    """Measure the parts in `wanted` and write the file."""
    path, started = Path(out), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.is_file() and wanted else {}

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    for part in wanted or PARTS:
        content[part] = PARTS[part](log)
        packages = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
        content |= {"processor": provenance.processor(), "packages": packages}
        files.write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
