"""The page of the comparison, and its figure: the share of right choices over updates."""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from analysis.inference.estimate import number, rate
from analysis.questions.base import Panel, Series
from analysis.report import plots
from analysis.report.text import Rows, text_hash
from benchmarks.harness import RESULTS, render
from benchmarks.search.methods import APART, FAR, N_GRID, OPTUNA, RIGHT
from benchmarks.search.real import CASES
from benchmarks.search.simulated import LATER, LEVELS, NOISE

FOLDER = RESULTS / "search"
TUNE, GRID = "tune", "plain grid"
GRIDS = (GRID, "plain grid, random order")
HALF, OFTEN, COVERED = 0.5, 0.95, 0.93
"""Aims: tune's share of the grid's updates, the share of right choices, and the coverage."""
Content = dict[str, Any]


def page(content: Content) -> str:
    """Render the page."""
    replays, coverage = content.get("replays", []), content.get("coverage", [])
    return render(
        "search",
        packages=", ".join(f"{k} {v}" for k, v in content["packages"].items()),
        processor=content["processor"],
        right=RIGHT,
        n_grid=N_GRID,
        apart=APART,
        far=FAR,
        aims=aims(content),
        settings=_settings(),
        tables=_tables(replays),
        replays=_replays(replays),
        looked=_looked(replays),
        looked_n=max((r["looked"]["replays"] for r in replays), default=0),
        coverage=_coverage(coverage),
        searches=sum(r["searches"] for r in coverage),
        noise=NOISE,
        levels=LEVELS,
        later=LATER,
        cases=[_case(content[name], name) for name in CASES if name in content],
    )


def aims(content: Content) -> Rows:
    """Return the aims with what was found, one row for each aim and table."""
    rows = [["aim", "where", "found", "met"]]

    def add(aim: str, where: str, found: str, met: bool) -> None:
        rows.append([aim, where, found, "yes" if met else "**no**"])

    for r in content.get("replays", []):
        m, where = r["methods"], r["table"]
        share = m[TUNE]["end"] / m[GRID]["end"]
        text = f"{m[TUNE]['end']:.1f} of {m[GRID]['end']:.0f}: {_percent(share)}"
        add(
            f"at most {_percent(HALF)} of the grid's updates, each at its end",
            where,
            text,
            share <= HALF,
        )
        least = min((_or_inf(m[g]["median"]), g) for g in GRIDS)
        share = _or_inf(m[TUNE]["median"]) / least[0]
        text = f"{number(m[TUNE]['median'], 2)} of {least[0]:.2g} ({least[1]}): {_percent(share)}"
        add(
            f"at most {_percent(HALF)} of the grid's updates, until right",
            where,
            text,
            share <= HALF,
        )
        for key, what in (("median", "median"), ("most", "90% of searches")):
            best = min((_or_inf(m[o][key]), o) for o in OPTUNA)
            text = f"{number(m[TUNE][key], 2)} against {number(best[0], 2)} ({best[1]})"
            met = _or_inf(m[TUNE][key]) <= best[0]
            add(f"no more updates than Optuna until right, {what}", where, text, met)
        right = m[TUNE]["right"]
        add(f"right in {_percent(OFTEN)}", where, f"{100 * right:.1f}%", right >= OFTEN)
    for key, what in (("lr", "the best learning rate"), ("gap", "LoRA's gap")):
        cells = content.get("coverage", [])
        n, held = (sum(c[k][key] for c in cells) for k in ("intervals", "held"))
        if n:
            aim = f"intervals of {what} hold the truth in {_percent(COVERED)}"
            text = f"{100 * held / n:.1f}% of {n}"
            add(aim, "simulated", text, held / n >= COVERED)
    for case in (content[name] for name in CASES if name in content):
        m, where = case["methods"], case["model"]
        end, whole = (fmean(m[k]["ends"]) for k in (TUNE, GRID))
        text = f"{end:.1f} of {whole:.0f}: {_percent(end / whole)}"
        add(
            f"at most {_percent(HALF)} of the grid's updates, each at its end",
            where,
            text,
            end / whole <= HALF,
        )
        needed = {k: fmean(map(_or_inf, m[k]["needed"])) for k in m}
        best = min((v, k) for k, v in needed.items() if k in OPTUNA)
        text = f"{number(needed[TUNE], 2)} against {number(best[0], 2)} ({best[1]})"
        add(
            "no more updates than Optuna until right, mean of the arms",
            where,
            text,
            needed[TUNE] <= best[0],
        )
    return rows


def _settings() -> Rows:
    head = "name|range (start / factor to start x factor)|reduction factor|random first trials"
    return [head.split("|"), *([k, *(f"{v:g}" for v in values)] for k, values in OPTUNA.items())]


def _tables(replays: Sequence[Content]) -> Rows:
    head = "table|model and data|updates|short runs|seeds|arm|learning rates|optimum"
    rows = [[*head.split("|"), "noise, % of the gain"]]
    for r in replays:
        for k, arm in enumerate(r["arms"]):
            first = [
                *(f"[{r['table']}](../{r['table']}/report.md)", f"{r['model']} on {r['dataset']}"),
                *(str(r[key]) for key in ("steps", "prefix", "seeds")),
            ]
            lrs = f"{arm['lrs']}: {rate(arm['low'])} to {rate(arm['high'])}"
            noise = number(100 * arm["noise"] / arm["gain"], 2)
            own = [arm["arm"], lrs, rate(arm["optimum"]), noise]
            rows.append([*(first if k == 0 else [""] * len(first)), *own])
    return rows


def _replays(replays: Sequence[Content]) -> Rows:
    head = "table|method|searches|until right: median|90%|at the end: updates|right"
    rows = [head.split("|")]
    for r in replays:
        for k, (method, m) in enumerate(r["methods"].items()):
            cells = [number(m[key], 2) for key in ("median", "most")]
            end = [f"{m['end']:.1f}", f"{100 * m['right']:.1f}%"]
            rows.append(["" if k else r["table"], method, f"{m['searches']:,}", *cells, *end])
    return rows


def _looked(replays: Sequence[Content]) -> Rows:
    rows = [["table", "full runs per arm", "right"]]
    for r in replays:
        found = r["looked"]
        rows.append([r["table"], f"{found['updates']:.1f}", f"{100 * found['right']:.1f}%"])
    return rows if replays else []


def _coverage(cells: Sequence[Content]) -> Rows:
    head = (
        "family|arms|right|full runs per arm|best LR: intervals|hold the truth|gap: intervals|hold"
    )
    rows = [head.split("|")]
    for c in cells:
        found = []
        for key in ("lr", "gap"):
            n, held = c["intervals"][key], c["held"][key]
            found += [str(n), f"{100 * held / n:.1f}%" if n else "-"]
        right = f"{100 * c['right']:.1f}%"
        rows.append([c["family"], str(c["arms"]), right, f"{c['updates']:.1f}", *found])
    return rows if cells else []


def _case(found: Content, name: str) -> Content:
    """Return title, text and table of a real case."""
    arms = [a["arm"] for a in found["arms"]]
    head = [
        "method",
        *(f"{arm}: {what}" for arm in arms for what in ("until right", "at the end", "regret")),
    ]
    rows = [head]
    for method, m in found["methods"].items():
        cells = []
        for needed, end, regret in zip(m["needed"], m["ends"], m["regrets"]):
            cells += [number(needed, 2), f"{end:.1f}", f"{number(regret, 2)}%"]
        rows.append([method, *cells])
    starts = ", ".join(
        f"{a['arm']} {rate(lr)} (optimum {rate(a['optimum'])})"
        for a, lr in zip(found["arms"], found["starts"])
    )
    text = (
        f"Runs of {found['steps']} updates of {found['batch_size']} rows, short runs of "
        f"{found['prefix']}; one seed to the end of tune's range. Every method starts at the "
        f"published learning rate: {starts}. The optimum is the fit of the {found['runs']} full "
        f"runs of all methods. The grid and Optuna train the start in full first, so a start near "
        f"the optimum makes them right at once. Optuna spends {CASES[name].budget:g} full runs per "
        f"arm.{found.get('note', '')}"
    )
    return {"title": f"{found['model']} on {found['dataset']}", "text": text, "rows": rows}


def panels(replays: Sequence[Content]) -> list[Panel]:
    """Return the share of searches whose choice is right, over updates."""
    found = []
    for r in replays:
        series = [
            Series(name, [float(u) for u in m["shares"]], list(m["shares"].values()), style="-")
            for name, m in r["methods"].items()
        ]
        found.append(Panel(r["table"], "full runs per arm", "share that is right", series))
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _or_inf(value: float | None) -> float:
    return float("inf") if value is None else value


def write() -> None:
    """Write README.md and search.png next to search.json."""
    text = (FOLDER / "search.json").read_text()
    content = json.loads(text)
    (FOLDER / "README.md").write_text(page(content))
    plots.panels(panels(content["replays"]), FOLDER / "search.png", text_hash(text))
