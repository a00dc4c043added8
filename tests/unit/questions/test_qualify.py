"""Whether a task is fit to be asked about, from tables of planted runs."""

import json
import math

import pytest

from analysis.questions.qualify import qualify, verdict
from analysis.runs.prefixes import at_step, while_unsolved
from lorasweep.store.table import load_runs
from lorasweep.train.progress import eval_steps
from tests.planted import GAIN, START

pytestmark = pytest.mark.slow  # fits hundreds of curves


def test_prefixes_and_qualification(rank_answer):
    table = load_runs(rank_answer / "runs")
    short = at_step(table, 32)
    assert (short["steps"] == 32).all() and len(short) == len(table)
    first = json.loads(table.iloc[0]["result"])["curve"]
    assert short.iloc[0]["test_nll"] == next(p["test_nll"] for p in first if p["step"] == 32)
    told = qualify(table[table["init_seed"].fillna(0) == 0])
    assert verdict(told) == {"tiny64 on dialect_smoke, batch 4, steps 96": True}
    assert {c.ok for c in told if c.name == "to be learned"} == {None}  # the fake tells no floor
    flat = [{"step": s, "test_nll": 2.0} for s in (0, *eval_steps(96))]
    solved = table.assign(
        result=[json.dumps({**json.loads(t), "curve": flat}) for t in table["result"]]
    )
    assert not any(verdict(qualify(solved[solved["init_seed"].fillna(0) == 0])).values())


def test_runs_are_cut_where_their_task_is_over(rank_answer):
    """The planted loss falls by GAIN a doubling: at step s the best run has lost GAIN log2(1 + s)
    of what there was."""
    whole = load_runs(rank_answer / "runs")
    plain = whole[(whole["method"] == "fullft") | (whole["init_seed"].fillna(0) == 0)]
    assert while_unsolved(plain)[1] == ""  # the fake tells no floor
    learned = GAIN * math.log2(1 + 40)  # so that a fifth is left near step 40
    part, said = while_unsolved(plain.assign(floor_nats=START - learned / 0.8))
    assert set(part["steps"]) == {32} and said.startswith("Cut at 32 of 96 updates")
    assert (
        while_unsolved(plain.assign(floor_nats=0.0))[1] == ""
        and while_unsolved(plain.assign(floor_nats=3.39))[1] == ""
    )
