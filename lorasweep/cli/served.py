"""Compare the adapters of a fleet on a running server with what they do in training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.advise.pages import printable
from lorasweep.cli.printed import Answer
from lorasweep.config import catalogue
from lorasweep.data.examples import Data, Example
from lorasweep.errors import SpecError
from lorasweep.fleet import runs, served
from lorasweep.fleet.outcome import Outcome, outcome_of
from lorasweep.fleet.served import Server
from lorasweep.fleet.serving import Profile, problems
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.spec.execution import Exec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.names import aligned
from lorasweep.sweep.request import Request

COMMON_ROWS, OWN_ROWS, TOKENS = 8, 2, 5
"""Rows that all adapters of a base are asked, further rows of each customer, and answer tokens of a
row: 50 tokens an adapter, and as many requests to a vLLM server."""
HEAD = ("customer", "verdict", "change", "distance", "accepted", "factor", "notes")
FITS, REFUSED, MISSING, NONE = "folder is right", "folder refused", "missing", "no adapter"


Row = dict[str, Any]
"""Of a customer: name, folder (also the adapter's name on a server), verdict, notes, Finding."""


def verify(request: Request, store: RunStore) -> Answer:
    """Check a fleet's folders, and with url= the servers; the status is 1 unless all is right.

    Raises:
        SpecError: there is no server at a url, it serves none of the customers or another base, or
            it returns no log-probabilities.
    """
    outcomes = [outcome_of(m, store) for m in runs.planned(request.members, request.points)]
    profile = catalogue.profiles([Path(folder) for folder in request.folders])[request.serve]()
    rows = {o.member.folder: _of_folder(o, Path(request.out), profile) for o in outcomes}
    urls = [request.url] if isinstance(request.url, str) else request.url
    servers = [Server(str(url)) for url in urls if url]
    at = {name: s for s in servers for name in s.models if name in rows}
    if servers and not at:
        names = ", ".join(sorted({name for s in servers for name in s.models}))
        raise SpecError(
            f"url={','.join(urls)}: serves {names}, and no customer of {request.customers} "
            f"(expected {', '.join([*rows][:5])}). The page {request.out}/index.html has the "
            "command to start it."
        )
    groups: dict[Any, list[Outcome]] = {}
    for o in outcomes if servers else ():
        if o.spec is not None:
            groups.setdefault((o.spec.model, o.spec.precision), []).append(o)
    trainer = TorchTrainer()
    lines = [_compare(g, at, rows, trainer, store, request.exec) for g in groups.values()]

    def text() -> list[str]:
        table = [[*HEAD]]
        for row in rows.values():
            f, notes = row["found"], printable("; ".join(row["notes"]))
            cells = [f"{f[k]:.4f}" if f else "" for k in ("change", "distance", "bound")]
            factor = f"{f['factor']:.2f} ± {served.ERRORS * f['factor_se']:.2f}" if f else ""
            table.append([printable(row["name"]), row["verdict"], *cells, factor, notes])
        counts = Counter(verdicts)
        total = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        return [*aligned(table, (2, 3, 4, 5)), "", *lines, total]

    verdicts = [row["verdict"] for row in rows.values()]
    return Answer([*rows.values()], text, int(not {*verdicts} <= {served.SERVED, FITS}))


def _of_folder(outcome: Outcome, fleet: Path, profile: Profile) -> Row:
    """Check a customer's folder for what the server would refuse or ignore."""
    member, spec, verdict, notes = outcome.member, outcome.spec, NONE, [outcome.problem]
    if spec is not None:
        rank = profile.largest_rank(member.advised["rank"])
        class_of = member.served.get("architecture", "")
        notes = problems(fleet / member.folder, profile, spec.model, rank, class_of)
        verdict = REFUSED if notes else FITS
    named = {"name": member.name, "folder": member.folder}
    return {**named, "verdict": verdict, "notes": notes, "found": None}


def _compare(
    group: Sequence[Outcome],
    at: Mapping[str, Server],
    rows: Mapping[str, Row],
    trainer: TorchTrainer,
    store: RunStore,
    exec_: Exec,
) -> str:
    """Compare the adapters of one base with the trainer, in `rows`; return a line on the noise.

    The reference is computed from the weights in the run's folder, never from the exported folder.
    """
    spec = group[0].spec
    assert spec is not None
    specs = {o.member.folder: o.spec for o in group}
    there = {name: at[name] for name in specs if name in at}
    for name in specs.keys() - there.keys():
        rows[name]["verdict"] = MISSING
    if not there:
        return f"{spec.model.name}: no adapter is served"
    own = {name: _rows(trainer.data(s, exec_), spec.seed) for name, s in specs.items()}
    each = -(-COMMON_ROWS // len(own))
    common = [row for mine in own.values() for row in mine[:each]][:COMMON_ROWS]
    own = {name: mine[each : each + OWN_ROWS] for name, mine in own.items()}
    of_common = trainer.log_p(spec, exec_, common)
    here = {n: np.append(of_common, trainer.log_p(spec, exec_, mine)) for n, mine in own.items()}
    # before the adapters: a server may load these at their first request, and mix them up
    first = {s.url: (s, s.base_of(name, at)) for name, s in there.items()}
    by_url = {url: s.log_p(of, common) for url, (s, of) in first.items()}
    base = {
        name: np.append(by_url[s.url], s.log_p(s.base_of(name, at), own[name]))
        for name, s in there.items()
    }
    noise = served.rms(np.concatenate([base[name] - here[name] for name in there]))
    spread = float(np.std(np.concatenate([*here.values()])))
    if noise > served.OTHER_BASE * spread:
        name, server = next(iter(there.items()))
        raise SpecError(
            f"url={server.url}: {server.base_of(name, at)!r} is another base than the trainer's "
            f"{spec.model.name!r}. Their log-probabilities of the same tokens differ by "
            f"{noise:.2g} nats; between tokens they vary by {spread:.2g}. Serve the base that the "
            "adapters were trained on. On a CPU, vLLM gives its base the adapter in its last slot: "
            "set --max-loras above the number of adapters."
        )
    trained = {}
    for name, one in specs.items():
        weights = checkpoint.load_weights(store.folder(one.id))
        if weights is None:
            rows[name]["verdict"] = NONE
            rows[name]["notes"].append(f"the weights of run {one.id} were not kept")
        else:
            trained[name] = trainer.log_p(one, exec_, [*common, *own[name]], weights)
    shared = {name: values[: len(of_common)] for name, values in trained.items()}
    for name in (n for n in there if n in trained):
        answers = there[name].log_p(name, [*common, *own[name]])
        probe = served.Probe(here[name], trained[name], base[name], answers)
        row, found = rows[name], served.judge(name, probe, shared, noise)
        row["found"] = vars(found)
        if row["verdict"] == FITS:
            row["verdict"] = found.verdict
        if found.verdict == served.ANOTHERS:
            row["notes"].append(f"it is the adapter of {rows[found.nearest]['name']}")
    return f"{spec.model.name}: noise {noise:.2g} nats (the server's base against the trainer's)"


def _rows(data: Data, seed: int) -> list[Example]:
    """Return the first test rows (or validation or training rows), cut after their first TOKENS."""
    found, count = data.test or data.validation, COMMON_ROWS + OWN_ROWS
    if not found:
        found = data.train(seed, 0, min(count, data.n_train or count))
    ends = [int(np.flatnonzero(row.loss)[:TOKENS][-1]) + 1 for row in found[:count]]
    return [Example(row.tokens[:end], row.loss[:end]) for row, end in zip(found, ends)]
