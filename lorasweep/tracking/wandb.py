"""Copy finished runs to Weights & Biases. lorasweep reads results only from the run folder.

No other file imports wandb. WANDB_MODE defaults to offline, which needs neither network nor
account; WANDB_PROJECT, WANDB_DIR and WANDB_ENTITY decide where the copies go.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from lorasweep.errors import check_installed
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import run_names


def mirror(points: Sequence[Point], store: RunStore, group: str) -> int:
    """Copy newly finished runs; return how many. Raises SpecError if wandb is not installed."""
    check_installed("wandb", "mirror=wandb")
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    count, names = 0, run_names(points)
    for point in points:
        result = store.result(point.id)
        mark = store.folder(point.id) / f"mirrored-{mode}.json"
        if result is None or mark.exists():
            continue
        run = wandb.init(
            id=point.id,
            name=names[point.id],
            group=group,
            mode=mode,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "lorasweep"),
            config=point.spec.plain(),
            settings=wandb.Settings(
                x_disable_stats=True,
                x_disable_meta=True,
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
            ),
        )
        for record in store.records(point.id):
            values = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
            run.log(values, step=record["step"])
        run.summary.update({k: v for k, v in result.items() if isinstance(v, int | float | str)})
        run.finish()
        mark.write_text(json.dumps({"group": group}) + "\n")
        count += 1
    return count
