"""Export finished runs as a table, and import such a table into a store."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import StoreError
from lorasweep.methods.registry import METHODS, spec_from
from lorasweep.spec.method import parse_layers
from lorasweep.spec.metric import Metric, metric_of
from lorasweep.spec.run import TRAIN_VERSION, RunSpec, validate
from lorasweep.spec.trainer import TrainerSpec
from lorasweep.spec.values import build
from lorasweep.store.run_store import FINISHED, RunStore

if TYPE_CHECKING:
    import pandas as pd

_LATER = {"scaling_by": "rank", "init_scale": 1.0, "lr_b_ratio": 1.0, "start": "a", "init_seed": 0}
"""Fields of LoRA that old specs lack, with the values that reproduce the old behaviour."""
_OF_EXPERTS = {"expert_rank": "active", "expert_alpha": None, "expert_outer": "own"}
"""Fields of LoRA for models with experts, with their defaults. For other models they are None."""
_RESULT_COLUMNS = ["test_nll", "test_bpb", "nll_start", "floor_nats", "train_nll", "steps_done"]
_RESULT_COLUMNS += ["tokens", "n_trainable", "norm_a", "norm_b", "norm_delta", "retain_nll"]
_RESULT_COLUMNS += ["retain_start", "step_s", "base_sha256", "data_sha256", "wall_s", "imported"]


def load_runs(runs_dir: str | Path, ids: Sequence[str] | None = None) -> "pd.DataFrame":
    """Return the finished runs (done or diverged), one row each.

    Columns: run_id, status, model, dataset, method and its fields, the scalars of the spec, the
    measures (NLL in nats per loss token), and `spec` and `result` as JSON text, from which a store
    can be rebuilt. Missing values are NaN or None. Raises StoreError for another train_version.
    """
    import pandas as pd

    store = RunStore(runs_dir)
    ids = sorted(store.existing()) if ids is None else ids
    found = ((rid, result) for rid in ids if (result := store.result(rid)) is not None)
    return pd.DataFrame([table_row(store.spec(rid), result) for rid, result in found])


def table_row(spec: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return one run as a row of the table; raise StoreError for another train_version."""
    if spec.get("train_version") != TRAIN_VERSION:
        raise StoreError(
            f"run {result.get('run_id')} was trained with train_version "
            f"{spec.get('train_version')}; this lorasweep has version {TRAIN_VERSION}. Use another "
            "run folder (exec.runs_dir=FOLDER), or the lorasweep that trained the run."
        )
    method = spec["method"]
    row: dict[str, Any] = {"run_id": result["run_id"], "status": result["state"]}
    row |= {name: spec[name]["name"] for name in ("model", "dataset", "method")}
    row |= {k: method.get(k) for k in ("rank", "alpha", "layers", "scope")}
    lora = method["name"] == "lora"
    row |= {k: method.get(k, past if lora else None) for k, past in _LATER.items()}
    adapted = lora and spec["model"].get("n_experts") and "mlp" in parse_layers(method["layers"])
    row |= {k: method.get(k, past) if adapted else None for k, past in _OF_EXPERTS.items()}
    if adapted and row["expert_alpha"] is None:
        row["expert_alpha"] = method["alpha"]
    row |= {k: v for k, v in spec.items() if k not in ("model", "dataset", "method", "trainer")}
    if "trainer" in spec:
        trainer = build(TrainerSpec, spec["trainer"])
        # seeds of a trainer with an order of its own share no batches, but data that are drawn
        paired = trainer.in_order or spec["dataset"].get("draw_by_seed", False)
        row |= {"trainer": trainer.label, "block": row["seed"] * paired}
        row |= {k: result.get(k) for k in ("weights_sha256", "trainer_versions", "doubt")}
    row |= {"hidden_size": spec["model"]["hidden_size"]}
    row |= {k: result.get(k) for k in (*_RESULT_COLUMNS, *({"packages"} & result.keys()))}
    if "config" in method or method["name"] not in METHODS:  # with fields that have no columns
        own = (f"{k}={v}" for k, v in sorted(method.items()) if k not in row and k != "name")
        row |= {"method_fields": ", ".join(own)}
    metric = metric_of(result)
    if metric != Metric():
        row |= {"metric": metric.name, metric.name: metric.value(result)}
    row |= {"spec": json.dumps(spec, sort_keys=True), "result": json.dumps(result, sort_keys=True)}
    return row


def read_exported(path: Path) -> "pd.DataFrame":
    """Return an exported table, cells of CSV as text; StoreError: the file is none."""
    import pandas as pd

    try:
        as_text: Any = {"dtype": str, "keep_default_na": False}
        is_csv = path.suffix != ".parquet"
        table = pd.read_csv(path, **as_text) if is_csv else pd.read_parquet(path)
        # names of rows, such as R writes, are a column of the user's
        table = table if isinstance(table.index, pd.RangeIndex) else table.reset_index()
        return table.astype({"spec": object, "result": object})
    except (OSError, ValueError, KeyError) as error:  # errors of pandas and pyarrow are ValueErrors
        raise StoreError(
            f"{path} is no exported table, with columns spec and result ({error}). Name another, "
            "or write it with action=export."
        ) from None


def refuse_loss(path: Path, earlier: "pd.DataFrame", new: "pd.DataFrame") -> None:
    """Raise StoreError if a table lacks a column, run or cell of the earlier one in its file."""
    lost = [f"column {c}" for c in earlier.columns if c not in new.columns]

    def lines(table: "pd.DataFrame") -> list[str]:  # of whole numbers as of floats, beside a gap
        text = table[[*earlier.columns]].to_csv(index=False)
        return re.sub(r"(?m)(^|,)(-?\d+)\.0(?=,|$)", r"\1\2", text).splitlines()

    if lost or (lost := sorted({*lines(earlier)} - {*lines(new)})):
        raise StoreError(
            f"{path} has what this export would lose, {len(lost)} column(s) of yours, runs of "
            f"another folder or changed rows, such as: {lost[0][:60]}. It is not replaced: name "
            "another file with out=, or move it away."
        )


def import_table(runs_dir: str | Path, path: str | Path) -> int:
    """Add the runs of an exported table to a store as imported runs; return how many were new.

    All rows are checked first. Raises StoreError if a row is not a finished run, or if the file is
    not an exported table.
    """
    path = Path(path)
    rows: dict[str, tuple[RunSpec, dict[str, Any]]] = {}
    table = read_exported(path)
    for number, (spec_text, result_text) in enumerate(zip(table["spec"], table["result"]), start=1):
        try:
            spec, result = spec_from(json.loads(spec_text)), json.loads(result_text)
            validate(spec)
            if (rid := spec.id) != result["run_id"]:
                raise ValueError(f"the spec belongs to run {rid}, not to {result['run_id']}")
            if result["state"] not in FINISHED:
                raise ValueError(f"the state is {result['state']!r}, not {' or '.join(FINISHED)}")
            if rows.setdefault(rid, (spec, result))[1] != result:
                raise ValueError(f"run {rid} has another result in an earlier row")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(
                f"{path}, row {number}: not a finished run ({error}). Correct or remove the row."
            ) from None
    store = RunStore(runs_dir)
    store.prepare()
    return sum(store.put(spec, result) for spec, result in rows.values())
