"""Retrain the shipped bases from their recipes, or check that they can be retrained (`make bases`).

Usage: python -m lorasweep.cli.bases [--check] [NAME ...]
"""

import sys
from collections.abc import Sequence

from lorasweep.config.compose import shipped_model

NAMES = (
    *("tiny64", "tiny64-3m", "tiny64-s1", "tiny64-facts", "tiny64-knows", "tiny64-skills"),
    *("tiny64-skilled", "tiny64-experts", "tiny128", "tiny128-3m", "tiny128-4m"),
)
TOLERANCE_NATS = 0.02
"""Accepted difference of held-out losses between two trainings of a recipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Retrain bases; return 1 if --check finds a base whose retrained loss differs."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    check, names = "--check" in given, [name for name in given if name != "--check"]

    from lorasweep.models.find import SHIPPED, recipe_file_name
    from lorasweep.models.load import load
    from lorasweep.train import pretrain

    wrong = []
    for name in names or NAMES:
        spec = shipped_model(name)
        model, nll = pretrain.pretrain(spec, lambda step, nll: None)
        print(f"{name}: NLL {nll:.4f}", flush=True)
        if not check:
            pretrain.save(model, SHIPPED / recipe_file_name(spec))
            continue
        shipped = load(spec, []).model.cpu()
        shipped_nll = pretrain.held_out_nll(shipped, pretrain.pretraining_data(spec.recipe))
        if abs(nll - shipped_nll) > TOLERANCE_NATS:
            wrong.append(f"{name} ({shipped_nll:.4f} shipped)")
    if wrong:
        print(f"retraining gave another loss for: {', '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
