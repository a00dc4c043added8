"""The report of declared arms: each arm against full fine-tuning, in losses or in rewards."""

import functools
import json
import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.inference.decide import MIN_SEEDS
from analysis.inference.estimate import Estimate, from_sample, number, rate, signed, with_interval
from analysis.measures import rewards
from analysis.measures.at_best import over_seeds
from analysis.measures.ratio import pool_ratios, ratio_of
from analysis.measures.regret import ALLOWED
from analysis.optimum.fit import Optimum
from analysis.questions import arms, base
from analysis.questions.arms import Pair, Task
from analysis.runs.lr_curves import full_names, runs_of, title
from analysis.runs.table import COLLAPSED_SHARE

ONE, TEN = "FullFT's best LR", "10 x FullFT's best LR"
RULES = {ONE: 1.0, TEN: 10.0}
"""Rules of thumb: factors on full fine-tuning's optimal learning rate."""
REWARD = "held-out reward"
HOW = (
    "Rewards are at the best stable LR, by a parabola through it and the stable LRs around it. An "
    f"LR is stable if at most {100 * rewards.MAX_COLLAPSED:.0f}% of its runs collapse: they were "
    f"stopped in training, or ended below {100 * COLLAPSED_SHARE:.0f}% of their own best reward. "
    "Means are over the other runs. The choice of the LR is part of the interval: it is repeated "
    "on resampled seeds. Good LRs: those whose fitted reward is within 2 points of the best one. "
    "Range over FullFT's: the width of a curve's range of good LRs, in doublings, divided by the "
    f"width of full fine-tuning's. It needs {MIN_SEEDS} seeds that ran at all LRs of both curves. "
    "In the figure, bars are intervals over seeds; an episode is a sampled completion."
)
SHORT = (
    *(("fullft, scope matrices", "full"), ("lora ", ""), ("attention", "attn")),
    *(("unembedding", "head"), ("+", "\n+"), (", ", ",\n"), ("divided ", "divided\n")),
)
"""Replacements in names of arms, for the axis of a figure."""
Regrets = dict[str, float | None]
"""Regret of each rule of thumb, in nats; None if its learning rate is outside the LRs tried."""


def names_of(t: Task) -> dict[int, str]:
    """Name a task's curves, by id: as the sweep's file does, else by their settings."""
    found = dict(zip(map(id, t.main), full_names([o.curve for o in t.main])))
    found |= {id(o): name.replace("_", " ") for name, o in t.variants.items()}
    return found | ({id(t.whole): "full fine-tuning"} if t.whole else {})


def against_full(t: Task) -> list[tuple[Optimum, str, Estimate, Regrets]]:
    """Return every arm but full fine-tuning: curve, name, ratio of optimal LRs, regrets of RULES.

    Empty without full fine-tuning.
    """
    best, names = t.whole and t.whole.best_lr.value, names_of(t)
    return [
        (
            o,
            names[id(o)],
            ratio_of([o], t.whole),
            {rule: o.regret(k * best) if best else None for rule, k in RULES.items()},
        )
        for o in t.main
        if t.whole and o is not t.whole
    ]


def report(asked: base.Asked, *tasks: Task) -> tuple[dict[str, Any], list[base.Section]]:
    """Return the arms' comparisons, and tables and figures of every task.

    `compared`: the curves that each estimand compares; `ratios`: every arm's ratio of learning
    rates. A curve is an index of the analysis' optima; a ratio over several ranks has none.
    """
    place = {id(o): k for k, o in enumerate(base.distinct(o for t in tasks for o in t.optima))}
    ratios, independent, out, panels = [], [], [], []
    of_rates = any("laws" in s for s in tasks[0].estimands.values())
    for k, t in enumerate(tasks, 1):
        rows = [(place[id(o)], o, name, r, lost) for o, name, r, lost in against_full(t)]
        for name, p in t.pairs.items():
            said = t.estimands[name]
            if said["measure"] == "best_lr" and "min_rank" in said["of"]:
                rows.append((None, p.one, name, ratio_of(p.of, p.over), {}))
            if said.get("laws") and ";" not in t.name:  # variants share a FullFT curve
                independent.append(ratio_of(p.of, p.over))
        for at, o, name, ratio, lost in rows if of_rates else ():
            rank = None if at is None else base.rank_of(o)
            row = {"group": t.name, "name": name, "rank": rank, "alpha": o.curve.key.get("alpha")}
            ratios.append({**row, "ratio": ratio, "regrets": lost, "at": at})
        if arms.is_rewarded(t.optima[0]):
            out.append(_rewarded(t, "rewards.png" if k == 1 else f"rewards_{k}.png"))
        else:
            section, mine = _compared(t)
            out.append(section)
            panels += mine
        out += _tokens(t)
    if panels:
        caption = "arms against full fine-tuning, each at its best LR"
        out.append(base.Section("Arms", [], [], "arms.png", panels, caption))
    if (pooled := pool_ratios(independent)) is not None:
        logs = [getattr(pooled, k) for k in ("mean", "low", "high", "tau", "low_next", "high_next")]
        mean, low, high, between, low_next, high_next = (number(math.exp(v)) for v in logs)
        text = (
            f"Ratio pooled over {pooled.k} groups (random effects): {mean} [{low}, {high}]. "
            f"Between groups it varies by a factor {between}; the next group would lie in "
            f"[{low_next}, {high_next}]."
        )
        out.append(base.Section("Ratio over all groups", text=[text]))
    compared = {
        t.name: {e: [place[id(o)] for o in (*p.of, p.over)] for e, p in t.pairs.items()}
        for t in tasks
    }
    return {"ratios": ratios, "compared": compared, "pooled": pooled}, out


def _compared(t: Task) -> tuple[base.Section, list[base.Panel]]:
    head = (
        "arm | trained parameters | best LR [95%] | over FullFT's [95%] | rho [95%] | best NLL | "
        "gap (nats) [95%] | regret, % of the gain [95%] | regret of FullFT's LR | of 10x FullFT's "
        "| share of the squared gradient"
    )
    rows: list[list[Any]] = []
    speeds, regrets = {}, {}
    if o := t.whole:
        rows.append(["full fine-tuning", f"{t.size(o):,}", base.best_lr(o), None, None])
        rows[0] += [number(o.best_nll, 5), None, None, None, None, arms.gradient_share(t, o)]
    for o, name, ratio, lost in against_full(t):
        gap = t.gap(pair := Pair([o], t.whole))
        rho, regret = arms.speed(t, pair, {}), gap.percent()
        tick = functools.reduce(lambda text, pair: text.replace(*pair), SHORT, name)
        speeds[tick], regrets[tick] = rho, regret
        row = [name, f"{t.size(o):,}", base.best_lr(o), ratio, rho, number(o.best_nll, 5)]
        row += [with_interval(gap.mean(), signed), regret, *map(signed, lost.values())]
        rows.append([*row, arms.gradient_share(t, o)])
    task, same = textwrap.fill(title(t.optima[0].curve), 45), {"full fine-tuning": 1.0}
    allowed = (-100 * ALLOWED, 100 * ALLOWED)
    panels = [
        base.panel_of(task, "rho: FullFT's updates / the arm's", speeds, lines=same),
        base.panel_of(task, "regret, % of FullFT's gain", regrets, band=allowed),
    ]
    asked = any(s.get("laws") for s in t.estimands.values())
    laws = "; ".join(f"{law}: {number(v)}" for law, v in arms.laws_of(t).items()) if asked else ""
    text = [f"The ratio of optimal LRs by published laws: {laws}."] if laws else []
    return base.Section.of(t.name, head, rows, text), panels if t.whole else []


def _tokens(t: Task) -> list[base.Section]:
    """Return the shares of each layer's tokens that the experts get, if they were recorded."""
    rows: list[list[Any]] = []
    for o in t.main:
        results = [json.loads(text) for text in runs_of(t.runs, o.curve).get("result", ())]
        known = [np.array(r["expert_tokens"], float) for r in results if r.get("expert_tokens")]
        mean = np.mean([k / k.sum(1, keepdims=True) for k in known], axis=0) if known else []
        for layer, shares in enumerate(mean):
            three = (f"{v:.1%}" for v in (min(shares), max(shares), 1 / len(shares)))
            rows.append([names_of(t)[id(o)], layer, *three])
    head = "curve | layer | fewest tokens per expert | most | if all were equal"
    text = ["Shares of a layer's training tokens, mean over the runs of a curve."]
    return [base.Section.of("Tokens per expert", head, rows, text)] if rows else []


# ---------------------------------------------------------------- rewards


def _rewarded(t: Task, figure: str) -> base.Section:
    head = (
        "curve | best LR [95%] | reward, points [95%] | collapsed there | behind FullFT, points "
        "[95%] | behind FullFT of LoRA's matrices | ratio of best LRs [95%] | good LRs | range "
        "over FullFT's [95%]"
    )
    rows, control, names = [], next(iter(t.find("control")), None), names_of(t)
    for o in t.main:
        band = o.band(rewards.GOOD)
        full = Pair([o], t.whole) if t.whole and o is not t.whole else None
        other = Pair([o], control) if control and o is not control else None
        row = [names[id(o)], base.best_lr(o), over_seeds(rewards.reward_of(o))]
        row += ["{} of {}".format(*rewards.collapsed_at_best(o.curve))]
        row += [arms.points(t, p, {}) if p else None for p in (full, other)]
        row += [ratio_of([o], t.whole) if full else None]
        row += ["-" if band is None else " to ".join(map(rate, band))]
        ranged = full and base.rank_of(o)
        rows.append([*row, rewards.range_ratio(o, t.whole)[0] if ranged else None])
    text = [f"Bits of the labels over the capacity of rank 1: {t.load:.2g}." if t.load else "", HOW]
    caption = "reward over episodes by arm"
    panels = [_progress(t), *_over_rates(t)]
    return base.Section.of(f"Rewards, {t.name}", head, rows, text, figure, panels, caption)


def _look(t: Task, o: Optimum) -> dict[str, Any]:
    k = [id(v) for v in t.main].index(id(o))
    return {"size": 4, "colour": k, "style": f"{'osD^v'[k % 5]}-"}


def _start(t: Task) -> dict[str, float]:
    start = -t.main[0].curve.nll_start
    return {"before training": start} if math.isfinite(start) else {}


def _progress(t: Task) -> base.Panel:
    """Return mean rewards over episodes; the legend counts collapsed runs."""
    key = t.main[0].curve.key
    series, completions, names = [], int(key["batch_size"]), names_of(t)
    for o in t.main:
        of_seeds = [dict(points) for points in t.at_stable[id(o)].best.values()]
        steps = sorted(set.intersection(*map(set, of_seeds))) if of_seeds else []
        means = [from_sample([-points[s] for points in of_seeds]) for s in steps]
        lost, n = rewards.collapsed_at_best(o.curve)
        name = names[id(o)] + (f" (without {lost} of {n} runs: collapsed)" if lost else "")
        series.append(base.Series.of(name, [s * completions for s in steps], means, **_look(t, o)))
    name = f"{key['model']} on {key['dataset']}, each at its best stable LR"
    return base.Panel(name, "episodes", REWARD, series, log_x=True, lines=_start(t))


def _over_rates(t: Task) -> list[base.Panel]:
    """Return rewards over the learning rate, and the share of runs that do not collapse there."""
    if all(len(np.unique(o.curve.x)) < 2 for o in t.main):
        return []
    rewarded, survived, names = [], [], names_of(t)
    for o in t.main:
        at, look = rewards.at_each_lr(o.curve), _look(t, o)
        known = {lr: e for lr, (e, _) in at.items() if e.value is not None}
        of_known = list(known), list(known.values())
        rewarded.append(base.Series.of(names[id(o)], *of_known, **look))
        share = [100 * left for _, left in at.values()]
        survived.append(base.Series(names[id(o)], list(at), share, **look))
    least = 100 * (1 - rewards.MAX_COLLAPSED)
    what, lr = "at the end, without the runs that collapsed", "learning rate"
    more: dict[str, Any] = {"log_x": True, "y_range": (0, 105)}
    more["lines"] = {f"stable: {least:.0f}% or more": least}
    return [
        base.Panel(what, lr, REWARD, rewarded, log_x=True, lines=_start(t)),
        base.Panel("runs that do not collapse", lr, "% of runs", survived, **more),
    ]


def question_of(said: Mapping[str, arms.Said], variants: Mapping[str, arms.Said]) -> base.Question:
    """Return the question that a sweep's `estimands` and `variants` declare.

    It is about learning rates themselves if published laws of their ratio are among its estimands.
    """
    found = {name: arms.on_task(name, s) for name, s in said.items() if "of" in s}
    for name, s in said.items():
        for key in s.keys() & arms.OVER_TASKS.keys():
            found[name] = arms.OVER_TASKS[key](name, s, found)
    of_rates = any(s.get("laws") for s in said.values())
    return base.Question(
        list(found.values()),
        lambda table: arms.conditions(table, said, variants, of_rates),
        report,
        ratios=lambda t: [(name, r) for _, name, r, _ in against_full(t)],
        by_base=True,
        of_rates=of_rates,
    )
