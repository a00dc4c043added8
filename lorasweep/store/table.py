"""Finished runs as a table, and a table back into a store."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import StoreError
from lorasweep.methods.registry import spec_from
from lorasweep.spec.run import TRAIN_VERSION, validate
from lorasweep.store.run_store import RunStore

if TYPE_CHECKING:
    import pandas as pd

_METHOD_COLUMNS = ("rank", "alpha", "layers", "scope")
_LATER = {"scaling_by": "rank", "init_scale": 1.0, "lr_b_ratio": 1.0, "start": "a", "init_seed": 0}
"""LoRA's fields that came later, and what they were before: absent from old specs."""
_RESULT_COLUMNS = (
    "test_nll",
    "test_bpb",
    "nll_start",
    "floor_nats",
    "train_nll",
    "steps_done",
    "tokens",
    "n_trainable",
    "norm_a",
    "norm_b",
    "norm_delta",
    "retain_nll",
    "retain_start",
    "step_s",
    "base_sha256",
    "wall_s",
    "imported",
)


def load_runs(runs_dir: str | Path, ids: Sequence[str] | None = None) -> "pd.DataFrame":
    """Return the finished runs (done or diverged), one row each.

    Read from spec.json and result.json only. Columns: run_id, status, model, dataset, method and
    its fields, the spec's scalars, the measures (NLL in nats per loss-bearing token), and `spec`,
    `result` as JSON text, from which a store can be rebuilt. Missing values are NaN or None.

    Raises:
        StoreError: a run was trained by another train_version.
    """
    import pandas as pd

    store = RunStore(runs_dir)
    rows = []
    for rid in sorted(store.existing()) if ids is None else ids:
        result = store.result(rid)
        if result is not None:
            rows.append(table_row(store.spec(rid), result))
    return pd.DataFrame(rows)


def table_row(spec: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Flatten one run for the table."""
    if spec.get("train_version") != TRAIN_VERSION:
        raise StoreError(
            f"run {result.get('run_id')} was trained by train_version {spec.get('train_version')}, "
            f"this lorasweep is version {TRAIN_VERSION}. Use another run folder "
            "(exec.runs_dir=FOLDER) or the lorasweep that made it."
        )
    method = spec["method"]
    row: dict[str, Any] = {"run_id": result["run_id"], "status": result["state"]}
    row |= {
        "model": spec["model"]["name"],
        "dataset": spec["dataset"]["name"],
        "method": method["name"],
    }
    row |= {k: method.get(k) for k in _METHOD_COLUMNS}
    row |= {
        k: method.get(k, past if method["name"] == "lora" else None) for k, past in _LATER.items()
    }
    row |= {k: v for k, v in spec.items() if k not in ("model", "dataset", "method")}
    row |= {"hidden_size": spec["model"]["hidden_size"]}
    row |= {k: result.get(k) for k in _RESULT_COLUMNS}
    row |= {"spec": json.dumps(spec, sort_keys=True), "result": json.dumps(result, sort_keys=True)}
    return row


def import_table(runs_dir: str | Path, path: str | Path) -> int:
    """Put the runs of an exported table into a store, marked as imported; return how many were new.

    Raises:
        StoreError: the file is no such table, or a row's result is of another run than its spec.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise StoreError(f"no table {path}. Give a .parquet or .csv made by `action=export`.")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's errors are ValueErrors
        raise StoreError(f"{path} cannot be read as a table ({error}).") from None
    if not {"spec", "result"} <= set(table.columns):
        raise StoreError(
            f"{path} has no columns 'spec' and 'result': only tables made by `action=export` "
            "carry runs."
        )
    rows = []
    for number, (spec_text, result_text) in enumerate(zip(table["spec"], table["result"]), start=1):
        try:
            spec, result = spec_from(json.loads(spec_text)), json.loads(result_text)
            validate(spec)
            rid, named = spec.id, result["run_id"]
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{path}, row {number}: not a run ({error}).") from None
        if rid != named:
            raise StoreError(
                f"{path}, row {number}: the spec's name is {rid}, the result's {named}."
            )
        rows.append((spec, result))
    store = RunStore(runs_dir)
    store.prepare()
    return sum(store.put(spec, result) for spec, result in rows)
