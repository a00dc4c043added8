"""Planted rewards: what a policy gradient's runs would end with, as a known function of the run."""

import dataclasses
import math

import numpy as np

from analysis.report.study import page
from analysis.report.study.answers import read_answers
from lorasweep.spec.evaluations import eval_steps
from lorasweep.spec.metric import METRICS

START = 0.1


class Rewards:
    """`top(spec, step)`: the reward at the best rate; it falls by `bend(spec)` (ln rate off)^2."""

    def __init__(self, top, best, bend, more=lambda spec: {}, noise=1e-3):
        self.top, self.best, self.bend, self.also, self.noise = top, best, bend, more, noise

    def reward(self, spec, step):
        off = math.log(spec.lr / self.best(spec))
        rng = np.random.default_rng([int(spec.id, 16), step])
        shared = np.random.default_rng([spec.seed, step])  # the same prompts in every arm
        noise = shared.normal(0, 3 * self.noise) + rng.normal(0, self.noise)
        return self.top(spec, step) - self.bend(spec) * off**2 + noise

    def nll(self, spec):
        return -self.reward(spec, spec.steps)

    def curve(self, spec):
        points = [{"step": s, "test_reward": self.reward(spec, s)} for s in eval_steps(spec.steps)]
        points[-1]["test_reward_curve"] = points[-1]["test_reward"]
        return [{"step": 0, "test_reward": START}, *points]

    def more(self, spec):
        named = {"metric": dataclasses.asdict(METRICS["policy_gradient"])}
        return {**named, "test_reward": self.reward(spec, spec.steps), **self.also(spec)}


def study_of(folder):
    """The report in a test's folder, and the page of answers that shows it."""
    (made,) = (folder / "reports").iterdir()
    return (made / "report.md").read_text(), page.page(read_answers([folder / "reports"]), folder)
