"""Copy finished runs to Weights & Biases. lorasweep reads results only from the run folder.

No other file imports wandb. WANDB_MODE defaults to offline, which needs neither network nor
account; WANDB_PROJECT, WANDB_DIR and WANDB_ENTITY decide where the copies go. After a kill
a copy is made again: online, W&B resumes the run of that id; offline, the old one was still hidden.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError, check_installed
from lorasweep.store.files import check_writable
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, run_names


def check() -> Path:
    """Return W&B's folder. Raises SpecError without wandb, StoreError if it cannot be written."""
    check_installed("wandb", "mirror=wandb")
    if os.environ.get("WANDB_MODE", "offline") == "online":
        import wandb  # takes a moment to load

        if not wandb.api.api_key:
            raise SpecError("WANDB_MODE=online, but no key is known. Type: wandb login")
    folder = Path(os.environ.get("WANDB_DIR") or ".")
    check_writable(folder, "WANDB_DIR")
    return folder / "wandb"


def mirror(points: Sequence[Point], store: RunStore, group: str) -> int:
    """Copy newly finished runs; return how many. Raises as `check` does."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    count, names, home = 0, run_names(points), check()
    for point in points:
        result = store.result(point.id)
        mark = store.folder(point.id) / f"mirrored-{mode}.json"
        if result is None:
            continue
        partial = home / f".lorasweep-{point.id}"
        if not mark.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                run = wandb.init(
                    dir=partial if mode == "offline" else None,
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
            except wandb.errors.Error as error:  # the results are in the run folder
                print(f"not copied to W&B, run the command again: {error}", file=sys.stderr)
                break
            for r in store.records(point.id):
                numbers = {k: v for k, v in r.items() if isinstance(v, int | float)}
                run.log({k: v for k, v in numbers.items() if k != "step"}, step=r["step"])
            run.summary.update(
                {k: v for k, v in result.items() if isinstance(v, int | float | str)}
            )
            run.finish()
            mark.write_text(json.dumps({"group": group}) + "\n")
            count += 1
        for copy in partial.glob("wandb/offline-run-*"):
            copy.rename(home / copy.name)
        shutil.rmtree(partial, ignore_errors=True)
    return count
