"""Supervised fine-tuning of N runs: the NLL in nats per loss token, averaged over a run's batch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lorasweep.data.examples import (
    Batch,
    Data,
    Example,
    by_length,
    collate,
    eval_batches,
    merge,
    prompts_of,
)
from lorasweep.models.load import Base
from lorasweep.spec.metric import CURVE_START, METRICS
from lorasweep.spec.run import RunSpec
from lorasweep.train.divergence import Measured
from lorasweep.train.events import Record
from lorasweep.train.loop import Objective
from lorasweep.train.objectives import nll
from lorasweep.train.objectives.nll import evaluate, nll_sums, row_nlls

ROWS = "rows"
"""Key of the summed NLLs of rows among the measures of a run. It is removed before recording."""
EVAL_TOKENS, EVAL_NUMBERS, GPU_EVAL_TOKENS = 1024, 1 << 17, 8192
"""Padded tokens per forward pass in evaluation. On a GPU: of all runs together. On a CPU: of each
run, so that every pack sums held-out losses over the same rows; for wide models fewer, at most
EVAL_NUMBERS / hidden size: SmolLM2 takes 0.85 of the time (docs/log/2026-11-28.md)."""


class SupervisedFineTuning(Objective):
    """Supervised fine-tuning of each run on a data set of examples with a loss mask."""

    metric = METRICS["sft"]

    def __init__(self, data: Mapping[str, Data], *settings: Any, **more: Any) -> None:
        super().__init__(data, *settings, **more)
        self._runs = {run_id: Measured() for run_id in data}
        self._eval_tokens = EVAL_TOKENS

    def start(self, base: Base, runs: Sequence[RunSpec]) -> list[Record]:
        """Measure the base's NLL once on each data set, and on the pretraining rows (`retain`)."""
        super().start(base, runs)
        if next(base.model.parameters()).device.type == "cpu":
            most = min(EVAL_TOKENS, EVAL_NUMBERS // runs[0].model.hidden_size)
        else:
            most = GPU_EVAL_TOKENS // len(runs)
        self._eval_tokens = max(1, most // self._forward_parts)
        for run in runs:
            data, known, name = self._data[run.id], self._runs[run.id], self.metric.name
            key = f"{run.dataset.canonical}/{run.draw}/{self._precision}"
            on_curve, retain, first = f"{key}/curve", f"{key}/retain", self.curve_rows(run)
            on_curve = on_curve if len(first) < len(data.test) or data.validation else key
            parts = {key: data.test, on_curve: first, retain: data.retain}
            for part, examples in parts.items():
                if examples and part not in base.at_start:
                    by_row = part == key and bool(data.validation)
                    base.at_start[part] = self._measure(base.model, [examples], [by_row])[0]
            known.start = {**base.at_start[key], self.metric.on_part: base.at_start[on_curve][name]}
            known.rows, known.held_out = known.start.pop(ROWS, None), known.start[name]
            if data.retain:
                known.retain = base.at_start[retain][name]
        return [self._runs[run.id].start for run in runs]

    def groups(self, step: int, runs: Sequence[RunSpec]) -> list[int]:
        # at the first update, runs that differ in the rate only have the same weights and rows
        if step:
            return super().groups(step, runs)
        found: dict[str, int] = {}
        return [found.setdefault(replace(r, lr=runs[0].lr).id, len(found)) for r in runs]

    def batches(self, model: nn.Module, step: int, runs: Sequence[RunSpec]) -> list[Batch]:
        # Rows of similar length are together. Consecutive micro-batches, one for each process, have
        # equally many rows.
        processes, by_run, groups = self._mesh.size, [], self.groups(step, runs)
        # a pass has the same number of rows at all updates
        most = (self._micro_batch_size or 0) * len(runs) // (max(groups) + 1)
        for k, run in enumerate(runs):
            size = run.batch_size
            if (first := groups.index(groups[k])) < k:
                self._runs[run.id].n_loss = self._runs[runs[first].id].n_loss
                continue
            rows = processes * min(most or size, size // processes)
            examples = self._data[run.id].train(run.seed, step * size, size)
            examples = sorted(examples, key=lambda e: len(e.tokens))
            own = []
            for part in (examples[k : k + rows] for k in range(0, size, rows)):
                share = len(part) // processes
                for k in range(0, len(part), share):
                    own.append(collate(part[k : k + share]))
            self._runs[run.id].n_loss = sum(b.n_loss for b in own)
            by_run.append(own)
        return [merge(parts) for parts in zip(*by_run)]

    def weights(self, batch: Batch) -> torch.Tensor:
        return torch.from_numpy(batch.weight_NM.sum(1))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return nll_sums(model, batch, self._precision)

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        return [{"train_nll": loss} for loss in losses]

    def diverged(self, run_id: str, loss: float) -> bool:
        known = self._runs[run_id]
        known.code_nats += loss * known.n_loss
        return known.note(loss)

    def evaluate(self, model: nn.Module, runs: Sequence[RunSpec], final: bool) -> list[Record]:
        """Return each run's NLL and related measures on its validation rows, or first test rows.

        At the end of training they are measured on all test rows. Then `test_nll_curve` is the NLL
        on the rows of earlier evaluations; a trial (RunSpec.test_rows) is measured on these only.
        With validation rows, `gain_se` is the standard error of the gain. `test_bpb`: bits per
        byte, for text. With exact_loss the NLL is also given for PARTS. `code_nats`: sum of the
        train NLLs of all updates, each measured before its update. This is the length of a
        prequential code of the training data (Dawid 1984).
        """
        data, name = [self._data[run.id] for run in runs], self.metric.name
        firsts = [self.curve_rows(run) for run in runs]
        tested = [final and run.test_rows for run in runs]
        rows = [d.test if every else f for every, f, d in zip(tested, firsts, data)]
        by_row = [every and bool(d.validation) for every, d in zip(tested, data)]
        found = at_first = self._measure(model, rows, by_row)
        if any(
            every and self._runs[run.id].on_first is None and (d.validation or len(f) < len(d.test))
            for run, every, f, d in zip(runs, tested, firsts, data)
        ):
            at_first = self._measure(model, firsts, [False] * len(firsts))
        for run, own, measures, first in zip(runs, data, found, at_first):
            known, tokens = self._runs[run.id], _loss_tokens(own.test)
            n_bytes = [e.n_bytes for e in own.test]
            is_text = None not in n_bytes and any(n_bytes)
            if is_text and (run.test_rows or not final):
                bytes_per_token = sum(n_bytes) / int(tokens.sum())
                measures["test_bpb"] = measures[name] / math.log(2) / bytes_per_token
            if final:
                on_first = first[name] if known.on_first is None else known.on_first
                measures[self.metric.on_part] = on_first
            if final and not run.test_rows:
                del measures[name]
            after = measures.pop(ROWS, None)
            if after is not None and known.rows is not None:
                prompts = _prompts(run, own.test)
                measures["gain_se"] = nll.gain_se(known.rows, after, tokens, prompts)
            measures["code_nats"] = known.code_nats
        return found

    def _measure(
        self, model: nn.Module, rows: Sequence[Sequence[Example]], by_row: Sequence[bool]
    ) -> list[Record]:
        """Return each run's NLL on its rows; where `by_row` is True, also those of rows (ROWS)."""
        name = self.metric.name
        batches = [eval_batches(own, self._eval_tokens) for own in rows]
        sums: Sequence[np.ndarray] = ()
        nlls: Sequence[float] = ()
        with nll.in_evaluation(batches):
            if all(b.truth is not None for own in batches for b in own):
                return nll.evaluate_exact(model, batches, self._precision, name, self._mesh)
            # Sums by row round differently. Each run gets the sum that it would get without others.
            if any(by_row):
                sums = row_nlls(model, rows, batches, self._precision, self._mesh)
            if not all(by_row):
                nlls = evaluate(model, batches, self._precision, self._mesh)
        return [
            {name: float(sums[k].sum() / _loss_tokens(own).sum()), ROWS: sums[k]}
            if wanted
            else {name: nlls[k]}
            for k, (own, wanted) in enumerate(zip(rows, by_row, strict=True))
        ]

    def at_end(self, model: nn.Module, runs: Sequence[RunSpec]) -> list[Record]:
        """Measure the NLL on rows of the pretraining task, for data sets that have such rows."""
        rows = [self._data[run.id].retain for run in runs]
        some = next(filter(None, rows), None)
        if some is None:
            return super().at_end(model, runs)
        # A forward pass needs rows of every run. A run without such rows gets those of another run,
        # and no result.
        found = self._measure(model, [own or some for own in rows], [False] * len(rows))
        return [
            {"retain_nll": of[self.metric.name], "retain_start": self._runs[run.id].retain}
            if own
            else {}
            for run, own, of in zip(runs, rows, found)
        ]

    def facts(self, run: RunSpec) -> Record:
        # `bits_...`: new information in the run's training data, for known generators
        data, known = self._data[run.id], self._runs[run.id]
        bits = data.bits(run.steps * known.n_loss) if data.bits else {}
        prompts = _prompts(run, data.test)
        changed = [e.truth.changed for e in data.test if e.truth is not None]
        return {
            "nll_start": known.start[self.metric.name],
            CURVE_START: known.start[self.metric.on_part],
            "floor_nats": data.entropy_floor_nats,
            **super().facts(run),
            **({"n_test_prompts": len(set(prompts))} if prompts else {}),
            **({"changed_share": float(np.concatenate(changed).mean())} if changed else {}),
            **{f"bits_{measure}": value for measure, value in bits.items()},
        }

    def state(self, run_id: str) -> dict[str, Any]:
        known = self._runs[run_id]
        judged = {"above": known.above, "first_nll": known.first, "code_nats": known.code_nats}
        return {**judged, **super().state(run_id)}

    def load_state(self, run_id: str, state: dict[str, Any]) -> None:
        """Restore the values of `state`, or of the result of the run's trial."""
        super().load_state(run_id, state)
        known = self._runs[run_id]
        known.first, known.above = state.get("first_nll"), state.get("above", 0)
        known.code_nats, known.on_first = state["code_nats"], state.get(self.metric.on_part)


def _loss_tokens(examples: Sequence[Example]) -> np.ndarray:
    """Count each row's loss tokens, in the order of evaluation."""
    return np.array([int(examples[i].loss.sum()) for i in by_length(examples)])


def _prompts(run: RunSpec, examples: Sequence[Example]) -> list[int] | None:
    """Return each row's prompt number, in order of evaluation; None unless held_out_by=prompt."""
    if run.dataset.held_out_by != "prompt":
        return None
    return prompts_of([examples[i] for i in by_length(examples)])


class FirstLoss(NamedTuple):
    """The summed NLL of the rows of one update under the base, and number of loss tokens."""

    nats: float
    tokens: int


@torch.no_grad()
def first_pass(
    spec: RunSpec, base: Base, data: Data, micro_batch_size: int | None = None
) -> list[FirstLoss]:
    """Return the loss of every batch of a supervised run under the base, before any update."""
    objective = SupervisedFineTuning({spec.id: data}, spec.precision, micro_batch_size)
    found = []
    for step in range(spec.steps):
        parts = objective.batches(base.model, step, [spec])
        nats = sum(float(objective.loss(base.model, part).double().sum()) for part in parts)
        found.append(FirstLoss(nats, sum(part.n_loss for part in parts)))
    return found
