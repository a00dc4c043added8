"""Whatever ended in a store or stands in a table, every question and action answers, or says in one
line why not."""

import dataclasses
import functools
import math

import pandas as pd
import pytest

from lorasweep.cli import answer
from lorasweep.cli.actions import act
from lorasweep.config.compose import compose_request
from lorasweep.errors import LorasweepError
from lorasweep.spec.metric import METRICS
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import table_row
from lorasweep.sweep.request import question
from tests.conftest import FakeTrainer
from tests.world import ROOT, planted_end

SWEEPS = sorted({path.stem for path in (ROOT / "sweeps").glob("*.yaml")} - {"study"})
KEPT = {
    "all": lambda specs: specs,
    "one": lambda specs: specs[:1],
    "one rate": lambda specs: [
        s for s in specs if s.lr == min(t.lr for t in specs if t.method == s.method)
    ],
    "one seed": lambda specs: [s for s in specs if s.seed == specs[0].seed],
    "no fullft": lambda specs: [s for s in specs if s.method.name != "fullft"],
    "no lora": lambda specs: [s for s in specs if s.method.name != "lora"],
}
WITHOUT = ("no fullft", "no lora")
GOOD = {"fullft": "good", "lora": "good"}


@functools.cache
def _specs(sweep):
    """A sweep's runs at scale smoke, each with three seeds; and its request."""
    request = compose_request([f"+sweep={sweep}", "scale=smoke"])
    specs = [
        dataclasses.replace(p.spec, seed=p.spec.seed + k) for k in range(3) for p in request.points
    ]
    return request, list({s.id: s for s in specs}.values())


def result_of(spec, end="good", curve="whole"):
    """A run's result: its loss falls, rises, stays or is no number; the curve may be missing."""
    metric = METRICS[spec.objective]
    start, gain = (0.3, 0.1) if metric.higher_is_better else (2.0, -0.5)
    off = 0.01 * math.log(spec.lr / 1e-3) ** 2 + 0.001 * (spec.seed % 7)
    change = {"hurt": -gain, "equal": 0.0}.get(end, gain) + (end != "equal") * off
    value = {"nan": math.nan, "none": None, "infinite": math.inf, "diverged": None}
    value = value.get(end, start + change)
    points = [{"step": 0, metric.name: start, metric.on_part: start}]
    if curve == "whole" and end != "diverged":
        steps = sorted({1, 2, spec.steps})
        points += [{"step": s, metric.name: start + change * s / spec.steps} for s in steps]
        points[-1] |= {metric.name: value, metric.on_part: value}
    _, result = planted_end(spec, start, start, points if curve != "none" else [])
    more = {"run_id": spec.id, "state": "diverged" if end == "diverged" else "done"}
    return {**result, **more, metric.name: value, metric.on_part: value, **metric.stored()}


def answers(ask, *given):
    """`ask` returns, or raises an error of one line."""
    try:
        ask(*given)
    except LorasweepError as error:
        assert "\n" not in str(error)


def judge(sweep, kept, ends, curve, folder=None):
    """Ask all that is asked of a table; `ends`: method -> how its runs end."""
    request, specs = _specs(sweep)
    rows = [
        table_row(s.plain(), result_of(s, ends[s.method.name], curve)) for s in KEPT[kept](specs)
    ]
    table, asked = pd.DataFrame(rows), question(request)
    if len(table):
        answers(answer.judge, table, asked, folder, folder is None)
        answers(answer.next_round, table, asked)


CASES = [
    ("rank", "one seed", {**GOOD, "fullft": "diverged"}, "whole"),
    ("compute", "all", {**GOOD, "fullft": "diverged"}, "whole"),
    ("rl", "one rate", GOOD, "whole"),
    ("capacity", "all", dict.fromkeys(GOOD, "nan"), "whole"),
    ("invariance", "one seed", GOOD, "none"),
    ("tune", "no lora", {**GOOD, "fullft": "hurt"}, "start"),
    ("lr_ratio", "all", {**GOOD, "lora": "infinite"}, "whole"),  # ended in the pages
    *((sweep, arm, GOOD, "whole") for sweep in ("rank", "regime", "rl") for arm in WITHOUT),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:2]))
def test_a_table_that_once_ended_in_a_traceback_is_answered(case, tmp_path):
    judge(*case, tmp_path if case[0] == "lr_ratio" else None)


@pytest.mark.parametrize("action", ["status", "plan", "export", "extend"])
def test_actions_on_any_store_answer(compose, capsys, tmp_path, action):
    asked = compose("+sweep=lr_ratio", "scale=smoke", f"action={action}")
    for ends in ((), ("diverged",), ("good", "hurt", "nan"), ("none",)):
        exec_ = dataclasses.replace(asked.exec, runs_dir=f"{tmp_path}/{'-'.join(ends)}runs")
        more = {"table": f"{tmp_path}/{len(ends)}.csv"} if action == "export" else {}
        request = dataclasses.replace(asked, exec=exec_, **more)
        store = RunStore(exec_.runs_dir)
        store.prepare()
        for k, p in enumerate(request.points if ends else ()):
            store.put(p.spec, result_of(p.spec, ends[k % len(ends)]))
        answers(act, request, FakeTrainer(lambda spec: math.nan))
