"""Refuse to add runs to lr curves that do not tell on which data they were trained.

Results hold a fingerprint of their data; those from before there was one do not. The analysis mixes
no known fingerprint with an unknown one in a curve, so such runs would be trained in vain.
"""

from collections.abc import Iterable, Sequence

from lorasweep.errors import StoreError
from lorasweep.plan.estimate import runs_to_do
from lorasweep.spec.execution import Exec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, curve_key


def refuse_mixing(points: Sequence[Point], store: RunStore, exec_: Exec) -> None:
    """Check that the missing runs of a sweep continue no curve of unknown data.

    Raises:
        StoreError: they do.
    """
    unknown = _of_unknown_data(points, store)
    if unknown:
        states = store.states(p.id for p in points)
        _refuse(unknown, runs_to_do(list(points), states, store, exec_), store)


def refuse_extending(points: Sequence[Point], more: Iterable[Point], store: RunStore) -> None:
    """Check that `more` runs, of curves of `points`, continue no curve of unknown data.

    Raises:
        StoreError: they do.
    """
    _refuse(_of_unknown_data(points, store), more, store)


def _of_unknown_data(points: Iterable[Point], store: RunStore) -> list[Point]:
    by_id = {p.id: p for p in points}
    finished = store.finished(by_id)
    return [by_id[i] for i, entry in finished.items() if entry.data_sha256 is None]


def _refuse(unknown: Sequence[Point], more: Iterable[Point], store: RunStore) -> None:
    curves = {curve_key(p) for p in unknown}
    mixed = [p for p in more if curve_key(p) in curves]
    if mixed:
        raise StoreError(
            f"{len(mixed)} runs to train would continue lr curves of finished runs that do not "
            f"tell on which data they were trained ({len(unknown)} in {store.root}, such as "
            f"{unknown[0].id}: from before results held a fingerprint of the data). The two are "
            "never mixed in one curve. Train the curves anew in a fresh run folder: "
            f"exec.runs_dir={store.root}-2. What is finished is judged as it is by the command "
            "that asks for no more runs than it."
        )
