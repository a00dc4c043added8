"""Measure comparisons where a sweep's file says `where`, and differences between two of them.

    estimands:
      short: {measure: percent, of: lora, over: full, where: {schedule: cosine, steps: fewest}}
      long: {measure: percent, of: lora, over: full, where: {schedule: cosine, steps: most}}
      growth: {difference: [long, short], says: "LoRA falls back by {n}"}

A cell is the runs of one base and data set with the values that `where` names. All comparisons of a
sweep name values of the same settings. A difference of ratios is the ratio of the two. `by_seed:
true` takes it seed by seed; without it the two sides err independently. `says` is the answer's
sentence.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.inference.decide import Gate, at_level
from analysis.inference.estimate import AT_LEAST, Estimate, from_draws
from analysis.inference.rows import Row, measured
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import Gap
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.curves import full_names, in_words
from analysis.runs.table import TableError

WHERE = ("schedule", "steps", "batch_size", "precision")
"""Settings that `where` may name. `steps` and `batch_size` are numbers, `fewest` or `most`."""
EXTREMES: dict[str, Callable[..., int]] = {"fewest": min, "most": max}
AT_CELL = ("measure", "of", "over", "times", "log", "where", "says")
"""Keys of an estimand with `where`."""
OF_DIFFERENCE = ("difference", "by_seed", "says")
"""Keys of a difference."""
Said = Mapping[str, Any]


@dataclass(frozen=True)
class Cells(base.Condition):
    """All runs of one base and data set, and the cells of the settings that `where` names."""

    settings: tuple[str, ...]
    task: Callable[[list[Optimum]], Any]
    """Make the condition of a cell; see `estimands.Task`."""
    estimands: Sequence[base.Estimand]

    @functools.cached_property
    def cells(self) -> dict[tuple[Any, ...], Any]:
        """The values of `settings`, in order -> the cell."""
        found = dict[tuple[Any, ...], list[Optimum]]()
        for o in self.optima:
            found.setdefault(tuple(o.curve.key[k] for k in self.settings), []).append(o)
        return {values: self.task(found[values]) for values in sorted(found)}

    def values(self, where: Said) -> tuple[Any, ...]:
        """Return the values of `settings` in a cell; of `fewest` and `most`, those of the runs."""
        found = []
        for k in self.settings:
            end = EXTREMES.get(where[k])
            found.append(end(o.curve.key[k] for o in self.optima) if end else where[k])
        return tuple(found)

    def at(self, where: Said) -> Any:
        """Return a cell; without curves if no run is there."""
        values = self.values(where)
        return self.cells[values] if values in self.cells else self.task([])

    def words(self, values: Iterable[Any]) -> str:
        """Name a cell."""
        units = {"steps": "{:.0f} updates", "batch_size": "batch {:.0f}"}
        return ", ".join(units.get(k, "{}").format(v) for k, v in zip(self.settings, values))

    @property
    def rests(self) -> list[Optimum]:
        known = (e for e in self.estimands if e.measure(self) is not None)
        return base.distinct(o for e in known for o in e.used(self) or ())


def at_cell(e: base.Estimand, where: Said) -> base.Estimand:
    """Return an estimand of a task as one of `Cells`, measured on the cell that `where` names."""

    def words(c: Cells) -> str:
        return c.words(c.values(where))

    def at(c: Cells) -> str:
        ranks = {r for o in e.used(c.at(where)) or () if (r := base.rank_of(o))}
        return ", ".join([*(f"rank {r}" for r in ranks if len(ranks) == 1), words(c)])

    of_seed = e.by_seed
    return replace(
        e,
        measure=lambda c: e.measure(c.at(where)),
        gates=lambda c: [g.at(f"{words(c)}: ") for g in e.gates(c.at(where))],
        absent=lambda c: f"{e.absent(c.at(where))} ({words(c)})",  # type: ignore[operator]
        applies=lambda c: isinstance(c, Cells),
        seeds=lambda c: e.seeds(c.at(where)),
        margin_gates=lambda c, high: e.margin_gates(c.at(where), high),
        used=lambda c: e.used(c.at(where)),
        at=at,
        by_seed=of_seed and (lambda c: of_seed(c.at(where))),
    )


def minus(a: Estimate, b: Estimate, log: bool = False, within: int = 0) -> Estimate:
    """Return a - b, or a / b if `log`; their errors count as independent. A bound gives nothing.

    The spread, which tells how many seeds are needed, is of the side that errs more. `within`: how
    many such differences the sides are made of, one in another. Each shuffles in its own way:
    shuffled alike, b and c of (a - b) - (c - d) would err together.
    """
    if a.draws is None or b.draws is None or AT_LEAST in (*a.flags, *b.flags):
        return base.UNKNOWN
    x, y = (np.log(draws) if log else draws for draws in (a.draws, b.draws))
    (less, _), (_, noisy) = sorted(
        [(float(np.std(x)), a), (float(np.std(y)), b)], key=lambda p: p[0]
    )
    rng = np.random.default_rng([20261201, *range(1, within + 1)])
    draws = x - rng.permutation(y)
    spread = noisy.spread and noisy.spread.sharing(less)
    return from_draws(np.exp(draws) if log else draws, min(a.n, b.n), spread=spread)


def difference(
    name: str, declared: Mapping[str, Said], found: Mapping[str, base.Estimand]
) -> base.Estimand:
    """Declare a difference of two estimands of cells."""
    sides = [found[n] for n in declared[name]["difference"]]
    is_paired, log = bool(declared[name].get("by_seed")), sides[0].log
    within = _differences(name, declared) - 1

    def by_seed(c: Cells) -> AtBest[float]:
        a, b = (e.by_seed(c) for e in sides if e.by_seed)
        return a.minus(b)

    def used(c: Cells) -> list[Optimum]:
        return base.distinct(o for e in sides for o in e.used(c) or ())

    def lacking(c: Cells) -> str:
        """Name what is missing; TableError: one arm's curves differ in more than `settings`."""
        for e in sides:
            if e.measure(c) is None:
                return str(e.absent(c))  # type: ignore[operator]
        a, b = ({*map(id, e.used(c) or ())} for e in sides)
        if a == b:
            return f"runs that differ in {' or '.join(c.settings)}"
        arms = dict[str, list[Optimum]]()
        for arm, o in _curves(name, declared, c):
            arms.setdefault(arm, []).append(o)
        for mine in arms.values():
            base.check_same((o.curve for o in mine), *c.settings, "warmup_steps")
        if a & b and not is_paired:
            raise TableError(f"estimands.{name}: both sides use one curve. Write by_seed: true.")
        return ""

    def measure(c: Cells) -> Estimate | None:
        if lacking(c):
            return None
        if is_paired:
            return over_seeds(by_seed(c))
        a, b = (e.measure(c) or base.UNKNOWN for e in sides)
        return minus(a, b, log, within)

    def gates(c: Cells) -> list[Gate]:
        each = [*dict.fromkeys(g for e in reversed(sides) for g in e.gates(c))]
        return each or (base.gates_on_pairs(by_seed(c)) if is_paired else [])

    def seeds(c: Cells) -> int:
        """Return the seeds of the side that errs more; see `minus`."""
        draws = [(e.measure(c) or base.UNKNOWN).draws for e in sides]
        if is_paired or any(d is None for d in draws):
            return base.fewest_seeds(used(c))
        errors = [float(np.std(np.log(d) if log else d)) for d in draws]
        return sides[errors.index(max(errors))].seeds(c)

    return base.Estimand(
        name,
        measure,
        gates,
        lacking,
        log=log,
        applies=lambda c: isinstance(c, Cells),
        seeds=seeds,
        margin_gates=lambda c, high: [g for e in sides for g in e.margin_gates(c, high)],
        used=used,
        by_seed=by_seed if is_paired else None,
        final=all(e.final for e in sides),
    )


def _curves(name: str, declared: Mapping[str, Said], c: Cells) -> Iterator[tuple[str, Optimum]]:
    """Yield the curves of an estimand, each with the arm that it is declared as."""
    said = declared[name]
    for side in said.get("difference", ()):
        yield from _curves(side, declared, c)
    if "where" in said:
        pair = c.at(said["where"]).pairs[name]
        yield from ((str(said["of"]), o) for o in pair.of)
        yield str(said["over"]), pair.over


def _differences(name: str, declared: Mapping[str, Said]) -> int:
    """Count the differences that an estimand is made of, one in another, without those by seed."""
    said = declared[name]
    inner = max((_differences(n, declared) for n in said.get("difference", ())), default=-1)
    return inner + (not said.get("by_seed"))


def measured_by(name: str, declared: Mapping[str, Said]) -> Said:
    """Return the declaration of an estimand; of a difference, that of its first comparison."""
    said = declared.get(name, {})
    return measured_by(said["difference"][0], declared) if "difference" in said else said


# ---------------------------------------------------------------- what is wrong


def is_sentence(text: Any) -> bool:
    """Return whether the answer can be written with `says`; see report/sentences.py."""
    known = re.compile(r"\{(n|of|over)\}")
    return isinstance(text, str) and "{n}" in text and not re.search("[{}]", known.sub("", text))


def problems_of_where(place: str, said: Said) -> Iterator[str]:
    """Yield what is wrong with `where`, which each comparison has if one has it."""
    where = said.get("where")
    if not isinstance(where, Mapping) or not where:
        known = ", ".join(WHERE)
        yield f"{place}.where: {where!r}. Write a value of each setting that others name: {known}."
        return
    for key, value in where.items():
        if key not in WHERE:
            yield f"{place}.where: unknown setting {key!r}. Use one of: {', '.join(WHERE)}."
        elif key in ("schedule", "precision"):
            if not isinstance(value, str) or value in EXTREMES:
                yield f"{place}.where.{key}: {value!r}. Write one name."
        elif value not in [*EXTREMES] and (type(value) is not int or value < 1):
            yield f"{place}.where.{key}: {value!r}. Write a number, fewest or most."


def problems_of_difference(
    name: str, declared: Mapping[str, Said], with_seeds: Sequence[str]
) -> Iterator[str]:
    """Yield what is wrong with a difference; `with_seeds`: measures that have values by seed."""
    said, place = declared[name], f"estimands.{name}"
    for key in said.keys() - {*OF_DIFFERENCE}:
        yield f"{place}: unknown key {key!r}. Use one of: {', '.join(OF_DIFFERENCE)}."
    sides, before = said["difference"], itertools.takewhile(lambda n: n != name, declared)
    able = [n for n in before if {"where", "difference"} & declared[n].keys()]
    if not isinstance(sides, list) or len(sides) != 2 or sides[0] == sides[1]:
        yield f"{place}.difference: {sides!r}. Write the names of two estimands."
    elif wrong := [n for n in sides if n not in able]:
        known = ", ".join(able) or "none"
        yield f"{place}.difference: {wrong[0]!r}. Name two of those above with `where`: {known}."
    else:
        one, two = (measured_by(n, declared).get("measure", "") for n in sides)
        each = [declared[n].get("by_seed", "where" in declared[n]) for n in sides]
        if one != two:
            yield f"{place}.difference: of {one} and {two}. Name two estimands of one measure."
        elif len({measured_by(n, declared).get("log") for n in sides}) > 1:
            yield f"{place}.difference: one side says log, and one not. Write it on both."
        elif said.get("by_seed") and not (one in with_seeds and all(each)):
            known = ", ".join(with_seeds)
            yield f"{place}.by_seed: a side has no values by seed. Those with measure: {known} do."


# ---------------------------------------------------------------- report


def report(asked: base.Asked, *conditions: Cells) -> tuple[list[Row], list[base.Section]]:
    """Return LoRA's regret in every cell; over the updates, its growth from length to length."""
    out, sections, level = list[Row](), [], base.level_of(asked)
    for k, c in enumerate(conditions, 1):
        rows, lines = [], dict[str, dict[int, Estimate]]()
        last = dict[str, tuple[int, Estimate]]()
        for values, t in c.cells.items():
            mine = base.lora_of(t.main) if t.whole else []
            said = [str(v) for s, v in zip(c.settings, values) if s not in ("steps", "batch_size")]
            for o, name in zip(mine, full_names([o.curve for o in mine])):
                gap: Gap = t.gap_of(o, t.whole)
                arm, steps, percent = (
                    ", ".join([name, *said]),
                    int(o.curve.key["steps"]),
                    gap.percent(),
                )
                place = replace(c.where([o]), arm=arm, at="")
                out.append(measured(place, "regret_percent", at_level(percent, level)))
                key = (
                    f"{arm}, batch {o.curve.key['batch_size']}"
                    if "batch_size" in c.settings
                    else arm
                )
                grown = None
                if key in last:
                    before, earlier = last[key]
                    grown, place = (
                        minus(percent, earlier),
                        replace(place, at=f"since {before} updates"),
                    )
                    out.append(measured(place, "regret_growth_percent", at_level(grown, level)))
                last[key] = steps, percent
                lines.setdefault(key, {})[steps] = percent
                best = [*map(base.best_lr, (gap.full, o)), ratio_of([o], gap.full)]
                rows.append(
                    [arm, *[v for v in values if not isinstance(v, str)], *best, percent, grown]
                )
        counts = [
            {"steps": "updates", "batch_size": "batch"}[s]
            for s in c.settings
            if s in ("steps", "batch_size")
        ]
        head = ["arm", *counts, "FullFT's best LR [95%]", "LoRA's [95%]", "ratio [95%]"]
        head += ["regret, % of the gain [95%]", "growth since fewer updates [95%]"]
        figure: tuple[Any, ...] = ()
        if any(len(of) > 1 for of in lines.values()):
            panel = base.panel_over("updates", in_words(c.name), "regret, % of the gain", lines)
            figure = (
                "regret.png" if k == 1 else f"regret_{k}.png",
                [panel],
                "LoRA's regret over the updates",
            )
        sections.append(base.Section.of(f"Regret, {c.name}", " | ".join(head), rows, (), *figure))
    return out, sections
