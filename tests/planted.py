"""Planted truths: tables of runs, ours and as users write them, whose losses are known, and their answers."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest

from analysis.optimum.fit import linex
from analysis.questions.registry import analyse
from analysis.report import report
from analysis.runs.curves import LrCurve
from analysis.runs.table import read
from lorasweep.__main__ import main
from lorasweep.config.compose import compose_request
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.spec.metric import METRICS, eval_steps
from lorasweep.store.exported import table_row
from lorasweep.sweep.request import question
from lorasweep.work import answer
from tests.world import planted_end

FULL_BEST = 1.3e-3
"""Optimal LR of full fine-tuning in a `Valley`: off the grid."""
START, GAIN, CURVATURE, NOISE = 3.4, 0.14, 0.06, 4e-4
FULL, LORA = 1.6e-3, 3.2e-3  # optimal LRs of a World: on the grids of scale smoke


class World:
    """Losses fall by GAIN a doubling: an arm is at s where full fine-tuning is at s * rho * falls(s)."""

    start = START

    def __init__(self, rho=lambda spec: 0.5, best=None, more=lambda spec: {}, falls=lambda t: 1.0):
        self.rho, self.more, self.falls = rho, more, falls
        self.best = best or (lambda spec, step: FULL if is_full(spec) else LORA)

    def loss(self, spec, step):
        whole = is_full(spec) and spec.method.scope == "all"
        off = math.log(spec.lr / self.best(spec, step))
        progress = step * (1.0 if whole else self.rho(spec) * self.falls(step))
        noise = _noise(spec, step, NOISE)
        return START - GAIN * math.log2(1 + progress) + CURVATURE * off**2 + noise

    def nll(self, spec):
        return self.loss(spec, spec.steps)

    def curve(self, spec):
        losses = [{"step": s, "test_nll": self.loss(spec, s)} for s in eval_steps(spec.steps)]
        return [{"step": 0, "test_nll": START}, *losses]


def _noise(spec, step, sd):
    """What all arms share of one seed (the same batches), and a run's own part."""
    own, shared = (np.random.default_rng([k, step]) for k in (int(spec.id, 16), spec.seed))
    return shared.normal(0, 3 * sd) + own.normal(0, sd)


class Valley(World):
    """NLL over the LR: an asymmetric valley; LoRA's optimum is `ratio` times full fine-tuning's.

    From `cliff` times the optimum on, a run diverges.
    """

    steep = 0.7

    def __init__(self, ratio, noise=5e-4, cliff=math.inf):
        super().__init__()
        self.ratio, self.noise, self.cliff = ratio, noise, cliff

    def nll(self, spec):
        off = spec.lr / (FULL_BEST * (1 if is_full(spec) else self.ratio))
        if off > self.cliff:
            return math.nan
        valley = 0.16 * float(linex(np.array(math.log(off)), self.steep))
        return 2.0 + valley + _noise(spec, 0, self.noise)

    def curve(self, spec):
        return [{"step": 1, "test_nll": self.nll(spec)}]

    def rates(self, full="1.5e-4,3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3,9.6e-3"):
        """Overrides of `lr_ratio` whose LRs lie around both optima."""
        lora = ",".join(f"{FULL_BEST * self.ratio * 2.0**k:.3g}" for k in range(-3, 4))
        return (f"sweep.arms.fullft.lr=[{full}]", f"sweep.arms.lora.lr=[{lora}]")


class Rewards(World):
    """`top(spec, step)`: the reward at the optimum; it falls by `bend(spec)` (ln(lr) off)^2."""

    start_reward = 0.1

    def __init__(self, top, best, bend):
        super().__init__(best=best, more=self.results)
        self.top, self.bend = top, bend

    def reward(self, spec, step):
        off = math.log(spec.lr / self.best(spec))
        return self.top(spec, step) - self.bend(spec) * off**2 + _noise(spec, step, 1e-3)

    def nll(self, spec):
        return -self.reward(spec, spec.steps)

    def curve(self, spec):
        points = [{"step": s, "test_reward": self.reward(spec, s)} for s in eval_steps(spec.steps)]
        points[-1]["test_reward_curve"] = points[-1]["test_reward"]
        return [{"step": 0, "test_reward": self.start_reward}, *points]

    def results(self, spec):
        named = {"metric": dataclasses.asdict(METRICS["policy_gradient"])}
        return {**named, "test_reward": self.reward(spec, spec.steps)}


@functools.cache
def base(model="tiny64", dataset="dialect", *overrides, **params):
    """A run of a shipped base and data set; `params`: parameters of the data's generator."""
    spec = compose_request([f"model={model}", f"dataset={dataset}", *overrides]).points[0].spec
    shown = ", ".join(f"{k}={v:g}" for k, v in params.items())
    changed = {"generator_params": {**spec.dataset.generator_params, **params}}
    changed |= {"name": f"{spec.dataset.name}({shown})"} if params else {}
    return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, **changed))


smoke = functools.partial(base, dataset="dialect_smoke")


def around(best, n=7):
    return [best * 2.0 ** (k - n // 2) for k in range(n)]


def runs(spec, method, lrs, seeds=range(4), **changes):
    return [
        dataclasses.replace(spec, method=method, lr=lr, seed=seed, **changes)
        for lr in lrs
        for seed in seeds
    ]


def arms(spec, ranks=(1, 4), full=FULL, lora=LORA, n=7, seeds=range(4), alpha=32.0, **changes):
    """Full fine-tuning and LoRA of several ranks, with LRs around their optima."""
    methods = [(FullFT(), full), *((LoRA(rank=rank, alpha=alpha), lora) for rank in ranks)]
    return [s for m, best in methods for s in runs(spec, m, around(best, n), seeds, **changes)]


def is_full(spec):
    return spec.method.name == "fullft"


def rank_of(spec):
    return getattr(spec.method, "rank", 0)


def lost(of, **world):
    class Lost(World):
        def loss(self, spec, step):
            return super().loss(spec, step) + of(spec, step)

    return Lost(lambda spec: 1.0, **world)


class Gaps(World):
    """LoRA lies `gap(rank, step, exceptions)` of full fine-tuning's whole gain behind it, in the
    changed contexts (0.4 of all) or in the unchanged ones. `also`: loss to add; `stored`: results."""

    def __init__(self, gap=lambda r, s, e: 0.0, part="changed", bits=1e4, also=None, stored=None):
        super().__init__(lambda spec: 1.0, more=self.results)
        self.gap, self.also = gap, also or (lambda spec, step: 0.0)
        self.part, self.bits, self.stored = part, bits, stored or (lambda spec: {})

    def behind(self, spec, step):
        if is_full(spec):
            return 0.0
        exceptions = spec.plain()["dataset"]["knobs"]["new_exceptions"]
        return GAIN * math.log2(1 + spec.steps) * self.gap(spec.method.rank, step, exceptions)

    def loss(self, spec, step):
        return super().loss(spec, step) + self.behind(spec, step) + self.also(spec, step)

    def results(self, spec):
        behind = self.behind(spec, spec.steps)
        is_new = spec.plain()["dataset"]["knobs"]["rule_shift"] > 0
        parts = dict.fromkeys(("test_nll_changed", "test_nll_unchanged"), self.nll(spec) - behind)
        parts[f"test_nll_{self.part}"] += behind / (0.4 if self.part == "changed" else 0.6)
        bits = {"bits_generator": self.bits * is_new, "changed_share": 0.4}
        return {**bits, **parts, **self.stored(spec)}


RANKS = {"attention": 8, "mlp": 4, "attention+mlp": 4}


def layers(speeds, models=("tiny64",), of=RANKS, also=lambda s, t: 0.0, **world):
    """LoRA of each layer set at the rank of the shipped sweep."""
    specs = []
    for spec in map(smoke, models):
        specs += arms(spec, (), steps=64)
        for name, rank in of.items():
            specs += runs(spec, LoRA(rank=rank, layers=name), around(LORA), steps=64)
    world = lost(also, **world)
    world.rho = lambda s: speeds(s)[s.method.layers]
    return "layers", world, specs


def facts(stored, lrs=3, seeds=range(4), most=1.0):
    """`stored(updates)`: bits per parameter that LoRA stores; full fine-tuning: a share of all."""
    parameters = 4 * (127 + 79 + 79 + 127)

    class Facts(World):
        def loss(self, spec, step):
            noise = np.random.default_rng(int(spec.id, 16)).normal(0, 1e-3)
            bits = most * 16 * 512 if is_full(spec) else stored(spec.steps) * parameters
            off = 0.05 * math.log(spec.lr / (3e-3 if is_full(spec) else 1e-2)) ** 2
            return math.log(16) - bits / 512 / 4 * math.log(2) + off + noise

    spec, lora = base("tiny64-facts", "facts", facts=512.0), LoRA(rank=1, layers="attention")
    arms = ((FullFT(), around(3e-3, lrs)), (lora, around(1e-2, lrs)))
    of = [s for n in (200, 400) for m, lrs in arms for s in runs(spec, m, lrs, seeds, steps=n)]
    return "capacity", Facts(more=lambda s: {"retain_nll": 3.0, "retain_start": 2.8}), of


def rank_runs(ranks=(1, 4, 8), steps=96, seeds=range(4), **params):
    """Full fine-tuning and all ranks, and redraws of A at one LR."""
    spec = smoke(**params)
    found = arms(spec, ranks, steps=steps, seeds=seeds)
    for rank, draw in ((r, d) for r in ranks for d in (1, 2)):
        found += runs(spec, LoRA(rank=rank, init_seed=draw), [LORA], seeds, steps=steps)
    return found


def batches(ranks=(4,), lengths=((4, 256), (16, 128), (64, 32))):
    """Runs of several batch sizes: size -> updates."""
    found = []
    for size, steps in dict(lengths).items():
        found += arms(smoke(), ranks, n=5, seeds=range(3), batch_size=size, steps=steps)
    return found


def rewarded(top, ranks=(1, 8), lrs=5, ratio=4.0, bends=(0.03, 0.03), **more):
    """`ratio` of optima. `seeds`, LoRA's (`lora`) if they are others, `start`: the reward, `sweep`;
    `control`: with full fine-tuning of LoRA's matrices."""
    words = ("objective=policy_gradient", "batch_size=64", "group_size=8", "max_new_tokens=6")
    spec, control = base("tiny64-skilled", "words", *words, "steps=64"), more.get("control", False)
    seeds, full = more.get("seeds", range(4)), around(1e-4, lrs)
    found = runs(spec, FullFT(), full, seeds)
    found += runs(spec, FullFT(scope="matrices"), full, seeds) if control else []
    for rank in ranks:
        lora = around(ratio * 1e-4, lrs)
        found += runs(spec, LoRA(rank=rank), lora, more.get("lora", seeds))
    world = Rewards(top, lambda s: 1e-4 * (is_full(s) or ratio), lambda s: bends[not is_full(s)])
    world.start_reward = more.get("start", Rewards.start_reward)
    return more.get("sweep", "rl_matrices" if control else "rl"), world, found


def planted_table(world, specs):
    """The table that finished runs give, in the columns of the kept ones."""
    rows = []
    for spec in specs:
        state, result = planted_end(spec, world.start, world.nll(spec), world.curve(spec))
        result |= {"run_id": spec.id, "state": state, **world.more(spec)}
        rows.append(table_row(spec.plain(), result))
    return pd.DataFrame(rows)


ANSWERS = sorted(path.parent for path in answer.KEPT.glob("*/table.parquet"))
"""Folders of the kept answers."""


def kept_answer(folder: Path):
    return read(folder / "table.parquet"), json.loads((folder / "question.json").read_text())


def kept_question(sweep, claims=None):
    """The question of a kept answer, as of another scale; `claims` replaces or adds some."""
    path = answer.KEPT / f"{sweep}-tiny" / "question.json"
    if path.is_file():
        asked = json.loads(path.read_text())
    else:  # not answered yet
        asked = question(compose_request([f"+sweep={sweep}", "scale=tiny"]))
    asked |= {"scale": "smoke", "withdrawn": "", "claims": {**asked["claims"], **(claims or {})}}
    return asked


def ask(sweep, world, specs, claims=None):
    """Ask a kept question of planted runs: results.json, with the page, and verdicts by claim."""
    table, asked = planted_table(world, specs), kept_question(sweep, claims)
    found = analyse(table, asked, answer.KEPT)
    out = json.loads(json.dumps(report.results_of(found, asked, table), allow_nan=False))
    out["page"] = report.render(found, asked, table)
    return out, {v["claim"]: v for v in out["verdicts"]}


def check(found, **expected):
    """Compare verdicts by claim: an outcome or gate, a part of the reason, a value, or several."""
    for claim, wanted in expected.items():
        v = found[claim]
        said = (v["outcome"], *(g["code"] for g in v["gates"]))
        for w in wanted if isinstance(wanted, tuple) else (wanted,):
            if isinstance(w, str):
                assert w in (said if w.isupper() else v["why"]), (claim, said, v["why"])
            else:
                assert v["estimate"]["value"] == w, (claim, v["why"])


def analysed(table, question, folder, as_json):
    """What `lorasweep.work.answer.judge` returns as JSON, without a report's files and figures."""
    found = analyse(table, question, answer.KEPT)
    return json.dumps(report.results_of(found, question, table))


GRID = np.array([1e-4 * 2**k for k in range(7)])


def table(loss, seeds=(0,), lrs=GRID, rank=4, start=5.0):
    """One LoRA curve as our own stores export it: `loss(lr, seed)`, diverged where not finite."""
    rows = [{"lr": lr, "seed": s, "test_nll": loss(lr, s)} for lr in lrs for s in seeds]
    found = pd.DataFrame(rows)
    status = np.where(np.isfinite(found["test_nll"]), "done", "diverged")
    arm = {"model": "m", "dataset": "d", "method": "lora", "rank": rank}
    return found.assign(**arm, status=status, nll_start=start)


def lr_curve(x, y, seed, start=math.nan, **key):
    """One curve of losses `y` at ln(lr) = `x`; a run without a loss has diverged."""
    key = {"model": "m", "dataset": "d", "method": "lora", "rank": 4.0, **key}
    return LrCurve(key, x, y, seed, seed, np.isfinite(y), start, math.nan)


def planted(ranks=(None, 4, 16), seeds=(0, 1, 2), ratio=10.0, noise=1e-3, higher=False):
    """Seven LRs around 1.3e-4 (full fine-tuning, rank None) and `ratio` times that (LoRA)."""
    rng, rows = np.random.default_rng(3), []
    for rank in ranks:
        best = 1.3e-4 * (1 if rank is None else ratio)
        for k in range(7):
            lr = float(f"{best * 1.15 * 2.0 ** (k - 3):.3g}")
            valley = 2 + 0.1 * float(linex(np.array(math.log(lr / best)), 0.5))
            for seed in seeds:
                y = valley + 0.004 * seed + noise * rng.standard_normal()
                run = {"model": "m", "rank": rank, "lr": lr, "seed": seed, "status": "done"}
                rows.append({**run, "test_nll": 1 - y / 10 if higher else y})
    return pd.DataFrame(rows)


def write(tmp_path, table, name="runs.csv"):
    path = tmp_path / name
    table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
    return path


def run(capsys, *argv):
    """Run the command line: (exit status, stdout, stderr)."""
    with patch("sys.argv", ["lorasweep", *map(str, argv)]), pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()
