"""Planted truths: runs whose losses are known functions of what they are, answered in full but for
the training."""

import json
import math

import numpy as np

from analysis.optimum.valley import linex
from analysis.questions.registry import analyse
from analysis.report.report import results_of
from lorasweep.cli import answer
from lorasweep.cli.actions import act
from lorasweep.spec.evaluations import eval_steps

FULL_BEST = 1.3e-3
"""Best rate of full fine-tuning in a `Valley`: off the grid."""


class Valley:
    """NLL over the rate: an asymmetric valley; LoRA's best rate is `ratio` times full fine-tuning's.

    From `cliff` times the best rate on, a run diverges. `drift`: doublings of LoRA's best rate a
    doubling of the rank.
    """

    def __init__(self, ratio, noise=5e-4, steep=0.7, cliff=None, drift=0.0):
        self.ratio, self.noise, self.steep, self.cliff, self.drift = (
            ratio,
            noise,
            steep,
            cliff,
            drift,
        )

    def nll(self, spec):
        best = FULL_BEST
        if spec.method.name == "lora":
            best *= self.ratio * 2 ** (self.drift * math.log2(spec.method.rank / 4))
        if self.cliff is not None and spec.lr > self.cliff * best:
            return math.nan
        rng = np.random.default_rng(int(spec.id, 16))
        shared = np.random.default_rng(spec.seed)  # one seed sees the same batches at every rate
        valley = 0.16 * float(linex(np.array(math.log(spec.lr / best)), self.steep))
        return 2.0 + valley + shared.normal(0, 3 * self.noise) + rng.normal(0, self.noise)

    def rates(self, full="1.5e-4,3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3,9.6e-3"):
        """Overrides of `lr_ratio` whose rates lie around both optima."""
        lora = ",".join(f"{FULL_BEST * self.ratio * 2.0**k:.3g}" for k in range(-3, 4))
        return (f"sweep.arms.fullft.lr=[{full}]", f"sweep.arms.lora.lr=[{lora}]")


START, GAIN, CURVATURE, NOISE = 3.4, 0.14, 0.06, 4e-4
FULL, LORA = 1.6e-3, 3.2e-3  # best rates of a World: on the grids of scale smoke
FULL_LR, LORA_LR = "${around:1.6e-3,7,2}", "${around:3.2e-3,7,2}"
GRIDS = (f"sweep.arms.fullft.lr={FULL_LR}", f"sweep.arms.lora.lr={LORA_LR}")


class World:
    """Losses fall by GAIN a doubling of the updates; an arm with rho is at update s where full
    fine-tuning is at s * rho * falls(s)."""

    def __init__(
        self, rho=lambda spec: 0.5, best=None, more=lambda spec: {}, falls=lambda step: 1.0
    ):
        self.rho, self.more, self.falls = rho, more, falls
        self.best = best or (lambda spec, step: FULL if spec.method.name == "fullft" else LORA)

    def loss(self, spec, step):
        whole = spec.method.name == "fullft" and spec.method.scope == "all"
        off = math.log(spec.lr / self.best(spec, step))
        rng = np.random.default_rng([int(spec.id, 16), step])
        shared = np.random.default_rng([spec.seed, step])  # the same batches in every arm
        return (
            START
            - GAIN * math.log2(1 + step * (1.0 if whole else self.rho(spec) * self.falls(step)))
            + CURVATURE * off**2
            + shared.normal(0, 3 * NOISE)
            + rng.normal(0, NOISE)
        )

    def nll(self, spec):
        return self.loss(spec, spec.steps)

    def curve(self, spec):
        losses = [{"step": s, "test_nll": self.loss(spec, s)} for s in eval_steps(spec.steps)]
        return [{"step": 0, "test_nll": START}, *losses]


def analysed(table, question, folder, as_json):
    """What `lorasweep.cli.answer.judge` returns as JSON, without a report's files and figures."""
    return json.dumps(results_of(analyse(table, question, answer.KEPT), question, table))


def answer_to(request, trainer, capsys):
    """Run a request to its end; returns its JSON and the verdicts by claim."""
    assert act(request, trainer) == 0
    out = json.loads(capsys.readouterr().out)
    return out, {v["claim"]: v for v in out["verdicts"]}
