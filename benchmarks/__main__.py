"""Run one benchmark, or render its pages: `python -m benchmarks NAME [arguments]`."""

import importlib
import sys

NAMES = {
    "speed": "steps, memory, whole grids and a whole answer against TRL and PEFT (extra `bench`)",
    "rewards": "reinforcement learning against TRL's GRPO trainer (extra `bench`)",
    "fleet": "a fleet against one TRL process for each customer (extra `bench`)",
    "calibration": "intervals and verdicts on simulated sweeps with known optima",
    "search": "the search for learning rates against a grid and Optuna (extra `bench`)",
    "published": "the plan's memory and speed against published figures",
    "outcomes": "the adviser against published outcomes",
    "public_evidence": "runs published by others: TULU3_SWEEP.csv RL_RUNS.csv",
    "pages": "render the pages again from the files of figures, without measuring",
}


def main(arguments: list[str]) -> int:
    """Run a benchmark by name; return the exit status."""
    if not arguments or arguments[0] not in NAMES:
        print("python -m benchmarks NAME [arguments]", *arguments[:1], sep="\nno such name: ")
        print("\n".join(f"  {name:<16} {text}" for name, text in NAMES.items()))
        return 2
    name, *rest = arguments
    if name != "pages":
        importlib.import_module(f"benchmarks.{name}").main(rest)
        return 0
    for name in NAMES.keys() - {"pages"}:
        if page := getattr(importlib.import_module(f"benchmarks.{name}"), "PAGE", None):
            page.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
