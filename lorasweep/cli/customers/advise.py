"""LoRA or full fine-tuning for a table of customers: reads it, prints the answers, writes pages."""

import json
from collections.abc import Sequence
from pathlib import Path

from lorasweep.advise import information, kept, page, settle, table
from lorasweep.advise.advice import Advice, Failed, Known, answers
from lorasweep.cli.answer import KEPT
from lorasweep.config import catalogue
from lorasweep.errors import SpecError, unknown
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.sweep.aligned import aligned
from lorasweep.sweep.request import Request

WIDTH = 34
"""Letters of a name in the table of the terminal."""


def show(request: Request) -> int:
    """Answer the customers of a request; return 1 if a row could not be answered."""
    rows = _rows(request)
    found = answers(rows, known(request))
    if request.why or request.write_sweep:
        return _one(request, found)
    title = Path(request.customers).stem if request.customers else "customer"
    if request.out:
        _write(Path(request.out), found, title)
    if request.format == "json":
        print(json.dumps([a.plain() for a in found]))
    else:
        out = request.out or str(Path(request.exec.reports_dir) / f"advice-{title}.html")
        if not request.out:
            _write(Path(out), found, title)
        print(
            "\n".join([*_table(found), "", *_errors(found), *page.summary_lines(found), page.BASIS])
        )
        print(f"page: {out}. Reasons: why=NAME. A sweep that settles it: write_sweep=NAME")
    return 1 if any(isinstance(a, Failed) for a in found) else 0


def known(request: Request) -> Known:
    """Return what the rules rest on: the user's and the shipped models and cards, kept answers."""
    folders = [Path(folder) for folder in request.folders]
    return Known(
        models=catalogue.models(folders),
        machines=catalogue.machines(folders),
        kept=kept.read(KEPT, catalogue.widths(folders)),
        hardware=hardware_of(request) if request.hardware else None,
        information=information.read([Path(request.exec.reports_dir), KEPT]),
    )


def _rows(request: Request) -> list[table.Row]:
    if bool(request.customers) == bool(request.customer):
        raise SpecError(
            "action=advise needs customers=FILE (CSV or YAML), or one customer by columns: "
            "+customer.model=llama-3.1-8b +customer.task=sft +customer.examples=50000. "
            + ("Give one of the two." if request.customers else table.expected())
        )
    if request.customers:
        return table.read(Path(request.customers).expanduser())
    return [table.Row("customer", {"name": "customer", **request.customer})]


def _one(request: Request, found: Sequence[Advice | Failed]) -> int:
    """Print the reasons of one customer, or write the sweep that settles the question."""
    name = request.why or request.write_sweep
    mine = next((a for a in found if name in (a.name, settle.plain_name(a.name))), None)
    if mine is None:
        names = unknown("customer", name, (a.name for a in found))
        raise SpecError(f"{names} A name in small letters and underscores will do: big_co.")
    if isinstance(mine, Failed):
        raise SpecError(mine.error)
    if request.write_sweep:
        print("\n".join(settle.write(mine, Path(request.out or settle.FOLDER))))
    elif request.format == "json":
        print(json.dumps([reason.plain() for reason in mine.trace.reasons.values()]))
    else:
        print("\n".join(_reasons(mine)))
    return 0


def _reasons(advice: Advice) -> list[str]:
    lines = [f"{advice.name}: {advice.model.name}, {advice.customer.task}", ""]
    lines += [reason.line() for reason in advice.trace.reasons.values()]
    lines += ["", "conditions under which LoRA gives up nothing"]
    for c in advice.conditions:
        lines += [f"  {c.state}: {c.name}: {c.why}. {c.sure.value}"]
        lines += [f"      {line}" for line in c.evidence]
    if advice.trace.warnings:
        lines += ["", "warnings", *(f"  {text}" for text in advice.trace.warnings)]
    return lines


def _write(path: Path, found: Sequence[Advice | Failed], title: str) -> None:
    writers = {".html": page.html, ".md": page.markdown}
    if path.suffix not in writers:
        raise SpecError(f"out={path}: expected a file that ends on {' or '.join(writers)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(writers[path.suffix](found, title))
    except OSError as error:
        raise SpecError(f"out={path}: {error}") from None


def _table(found: Sequence[Advice | Failed]) -> list[str]:
    rows = [list(page.HEAD), *(page.cells(a) for a in found)]
    rows = [[page.printable(c)[:WIDTH] for c in r] for r in rows]
    return aligned(rows, [page.HEAD.index(h) for h in page.NUMBERS])


def _errors(found: Sequence[Advice | Failed]) -> list[str]:
    lines = [f"error in {a.error}" for a in found if isinstance(a, Failed)]
    return [*lines, ""] if lines else []
