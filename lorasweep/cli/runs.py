"""The actions on finished runs: report, answer, fit, extend, export, import; and cancel."""

import json
from pathlib import Path

from lorasweep.errors import SpecError
from lorasweep.launch.slurm.submit import cancel
from lorasweep.store import files, looks
from lorasweep.store.exported import import_table, load_runs, read_exported, refuse_loss
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request, question
from lorasweep.work import answer
from lorasweep.work.printed import Answer, notifier, table
from lorasweep.work.run import answered
from lorasweep.work.search import all_points, is_search, judged


def report(request: Request, store: RunStore) -> Answer:
    """Judge the finished runs of a sweep; SpecError: there are none, or it is a search."""
    points, name = all_points(request, store), request.sweep_name
    if is_search(request):
        raise SpecError("action=report: a search answers itself. Give its command again.")
    missing = [p for p in points if not store.result(p.id)]
    if len(missing) == len(points):
        kept = any(answer.KEPT.glob(f"{name or 'lr_ratio'}-*"))
        raise SpecError(
            f"no run of this command has finished in {store.root}. Train them: the same command "
            "without report." + f" The kept answer: lorasweep answer {name or 'lr_ratio'}" * kept
        )
    if missing:
        left = f"{len(missing)} of {len(points)} runs have not finished: this answer may change"
        notifier(request, always=True)(left)
    return answered(request, store, points)


def fit(request: Request, store: RunStore) -> Answer:
    """Fit every learning-rate curve of a user's table, and write the fits to request.out."""
    if not request.table:
        raise SpecError("action=fit needs table=FILE: one run per row, .csv, .parquet or .jsonl.")
    path = Path(request.out).expanduser() if request.out else None
    page = path if path and path.suffix == ".html" else None
    if page and request.show:
        raise SpecError(f"out={request.out} has curves, fits and ratios: leave show= out.")
    how = (request.columns, request.higher, request.within, request.show)
    fits, lines, notes = answer.fit_table(Path(request.table).expanduser(), *how, page)
    for note in notes:
        notifier(request)(f"note: {note}")
    if path and not page:
        content = answer.own_file(path, json.dumps(fits, indent=1), comment="")
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, content)
    return Answer(fits, lines)


def answer_again(request: Request, store: RunStore) -> Answer:
    """Judge a report again, or show all claims; SpecError: `out` or the name is missing."""
    if not request.name:
        raise SpecError("action=answer needs name=QUESTION, or name=study for all claims.")
    reports, as_json = Path(request.exec.reports_dir), request.format == "json"
    runs, out = (Path(f).expanduser() if f else None for f in (request.table, request.out))
    if runs and (not out or request.name == "study"):
        raise SpecError("table=FILE is judged by one question, and out=DIR says where to write.")
    if request.name == "study":
        head, *rows = answer.of_study(reports, out)
        claims = [dict(zip(head, row)) for row in rows]
        return Answer(claims, table(claims, *head))
    name = request.name + (f"-{request.scale}" if "scale" in request.given else "")
    text, note = answer.of_report(name, reports, runs, out, as_json)
    if note:
        notifier(request)(note)
    return Answer(json.loads(text) if as_json else None, text)


def cancel_jobs(request: Request, store: RunStore) -> Answer:
    """Cancel the sweep's jobs on the cluster (Ctrl-C stops local runs)."""
    n_jobs, n_runs = cancel(request, store, notifier(request))
    text = f"cancelled {n_jobs} job(s) with {n_runs} unfinished run(s), which may be resumed"
    return Answer({"jobs": n_jobs, "runs": n_runs}, text if n_jobs else "nothing to cancel")


def export(request: Request, store: RunStore) -> Answer:
    """Write the finished runs of the sweep, or without a sweep of the store, as a table."""
    path = Path(request.out).expanduser()
    if path.suffix not in (".parquet", ".csv"):
        raise SpecError(f"out={request.out!r}: expected a file name in .parquet or .csv.")
    if path.is_symlink():
        raise SpecError(f"out={request.out!r} is a link. Name the file itself.")
    earlier = read_exported(path) if path.exists() else None
    ids = [p.id for p in judged(request, all_points(request, store))] if request.sweep else None
    found = load_runs(store.root, ids)
    if found.empty:
        raise SpecError(f"no finished runs in {store.root}. Run a sweep, or set exec.runs_dir.")
    if earlier is not None:
        refuse_loss(path, earlier, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        content = found.to_parquet(index=False, compression="zstd", compression_level=12)
    else:
        content = found.to_csv(index=False).encode()
    files.write_atomic(path, content)  # a full disk leaves an earlier table as it is
    return Answer(text=f"{len(found)} runs written to {path}")


def import_(request: Request, store: RunStore) -> Answer:
    """Add the runs of an exported table to the store."""
    new = import_table(request.exec.runs_dir, Path(request.table).expanduser())
    return Answer(text=f"{new} runs imported into {request.exec.runs_dir}")


def extend(request: Request, store: RunStore) -> Answer:
    """Add the runs that help most to decide claims, as the next round; start none."""
    if request.sweep is None:
        raise SpecError("action=extend needs a sweep: +sweep=NAME.")
    if is_search(request):
        raise SpecError("a search adds runs itself: run it again with a larger budget.")
    points = all_points(request, store)
    missing = [p for p in points if not store.result(p.id)]
    if missing:
        raise SpecError(
            f"{len(missing)} of {len(points)} runs have not finished. Run the sweep first, without "
            "action=extend."
        )
    asked = question(request)
    runs, lines = answer.next_round(load_runs(store.root, [p.id for p in points]), asked)
    if not runs:
        return Answer(text="nothing to add: every claim is decided, or more runs cannot help")
    path = looks.path_of(store.root, request.title)
    number = looks.append(path, runs, answer.claims_hash(asked), points)
    added = (
        f"round {number}: {len(runs)} runs added; run the command without action=extend to train"
    )
    return Answer(text=[*lines, added])
