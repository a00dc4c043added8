"""Run one benchmark, or render its pages: `python -m benchmarks NAME [arguments]`."""

import importlib
import sys

NAMES = {
    "speed": "steps, memory, whole grids and a whole answer against TRL and PEFT (extra `bench`)",
    "rewards": "reinforcement learning against TRL's GRPO trainer (extra `bench`)",
    "fleet": "a fleet against one TRL process for each customer (extra `bench`)",
    "cluster": "the time that Slurm adds",
    "calibration": "intervals and verdicts on simulated sweeps with known optima",
    "search": "the search for learning rates against a grid and Optuna (extra `bench`)",
    "published": "the plan's memory and speed against published figures",
    "outcomes": "the adviser against published outcomes",
    "public_evidence": "runs published by others: TULU3_SWEEP.csv RL_RUNS.csv",
    "pages": "render the pages again from the files of figures, without measuring",
}
PAGES = ("speed", "rewards", "fleet", "calibration.page", "search.page")
"""Modules that render a page from a file of figures."""


def main(arguments: list[str]) -> int:
    """Run a benchmark by name; return the exit status."""
    if not arguments or arguments[0] not in NAMES:
        print("python -m benchmarks NAME [arguments]", *arguments[:1], sep="\nno such name: ")
        print("\n".join(f"  {name:<16} {text}" for name, text in NAMES.items()))
        return 2
    name, *rest = arguments
    if name == "pages":
        for part in PAGES:
            importlib.import_module(f"benchmarks.{part}").write()
    else:
        module = f"{name}.run" if name in ("calibration", "search") else name
        importlib.import_module(f"benchmarks.{module}").main(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
