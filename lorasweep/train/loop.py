"""The loop that trains a pack of N runs (N >= 1) over one base; the interface of objectives to it.

Yields events, which the caller records. Must not import methods and objectives, the launcher or
configuration; of the store only `checkpoint`. Shapes: N runs of the pack, in order.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lorasweep.data.examples import Batch, Data, Example, collate
from lorasweep.errors import DataError, SpecError
from lorasweep.methods.trainables import Trainables
from lorasweep.models.forward import backend, frozen_in_bf16
from lorasweep.models.load import Base, find_targets
from lorasweep.models.sharding import Mesh, guard, shard
from lorasweep.spec.metric import EARLY_STOPPING_RULE, Best, Metric, eval_steps, no_better
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State, weights_of
from lorasweep.train.events import EVALUATION, Event, Record, phase
from lorasweep.train.objectives.nll import token_log_p
from lorasweep.train.optim import AdamW

DIVERGENCE_RULE = 2
"""Version of the divergence rule, stored in every result. Results without a version were judged by
rule 1, for which the base was measured on held-out rows only."""


class Objective:
    """A training objective: its loss, its held-out measures, and its divergence rule.

    `runs`: those still in the pack; in `evaluate` and `at_end`, those to measure. For an update the
    loop calls `batches`, then `loss` of each batch. It divides each run's summed loss by the run's
    summed `weights`. So a mean over tokens does not depend on the micro-batches. In batches N
    counts groups of runs, see `groups`; it is the number of runs after the first update.
    """

    metric: Metric

    def __init__(
        self,
        data: Mapping[str, Data],
        precision: str,
        micro_batch_size: int | None = None,
        forward_parts: int = 1,
    ) -> None:
        """Set up the objective; for `forward_parts` see Exec.

        `data`: run id -> the run's data set. `micro_batch_size`: sequences (rows or completions)
        per run and forward pass with gradients; None: all of an update.
        """
        self._data, self._precision, self._micro_batch_size = data, precision, micro_batch_size
        self._forward_parts, self._mesh = forward_parts, Mesh()

    def groups(self, step: int, runs: Sequence[RunSpec]) -> list[int]:
        """Return the group of each run, numbered by the first runs, which alone are in the batches.

        Runs of a group have the same gradient at update `step`.
        """
        return list(range(len(runs)))

    def start(self, base: Base, runs: Sequence[RunSpec]) -> list[Record]:
        """Return each run's measures, the metric included, under the base without adapters."""
        self._mesh = base.mesh
        return []

    def batches(self, model: nn.Module, step: int, runs: Sequence[RunSpec]) -> Sequence[Batch]:
        """Return the micro-batches of update `step` (0-based). May sample from the model.

        All processes return the same list, whose length is a multiple of their number.
        """

    def weights(self, batch: Any) -> torch.Tensor:
        """Return each run's weight of a batch, [N]. It is known before the forward pass."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the summed loss of each run, [N], with gradient."""

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        """Return the record of an update for each run, from the mean losses of the runs."""

    def diverged(self, run_id: str, loss: float) -> bool:
        """Note the mean loss of an update; return whether the run diverged. The loop checks NaN."""

    def evaluate(self, model: nn.Module, runs: Sequence[RunSpec], final: bool) -> list[Record]:
        """Return measures of runs by name, the metric included; on all held-out items if `final`.

        The model has only the adapters of these runs.
        """

    def at_end(self, model: nn.Module, runs: Sequence[RunSpec]) -> list[Record]:
        """Return more measures of finished runs; the model has only the adapters of these runs."""
        return [{} for _ in runs]

    def facts(self, run: RunSpec) -> Record:
        """Return the facts that the result of this run contains, finished or diverged."""
        data = self._data[run.id]
        commit = {"data_commit": data.commit} if data.commit else {}
        counts = {"n_test": len(data.test), "n_train": data.n_train}
        return {**counts, "data_sha256": data.sha256, **commit}

    def state(self, run_id: str) -> dict[str, Any]:
        """Return a run's state for its checkpoint, as JSON values, beside the keys of the loop."""
        return {"data_sha256": self._data[run_id].sha256}

    def load_state(self, run_id: str, state: dict[str, Any]) -> None:
        """Restore the values of `state`; DataError: the run resumes with other data."""
        then, now = state["data_sha256"], self._data[run_id].sha256
        if then != now:
            raise DataError(
                f"run {run_id} was started on other data (fingerprint {then}) than are there now "
                f"({now}). Restore those data, or delete the folder {run_id} in the run folder, "
                "which starts the run from the beginning."
            )

    def curve_rows(self, run: RunSpec) -> Sequence[Example]:
        """Return the held-out rows of evaluations before the end: validation or first test rows."""
        data = self._data[run.id]
        return data.validation or data.test[: run.dataset.n_test_curve or None]


@contextmanager
def attached(
    pack: Sequence[RunSpec], base: Base, weights: Sequence[Mapping[str, torch.Tensor]] = ()
) -> Iterator[Trainables]:
    """Attach the trainables of a pack to the base, and detach them at the end.

    `weights`: values for each run, by the names of tensors in a state.
    """
    model, method = base.model, pack[0].method
    if len(pack) > (method.MAX_PACK or len(pack)):
        raise SpecError(f"method={method.name} trains one run at a time. Set exec.pack_size=1.")
    targets = find_targets(model, pack[0].model, method.target_layers())
    trainables = method.attach(model, targets, [s.method for s in pack], [s.seed for s in pack])
    try:
        for name, tensor in trainables.parameters().items() if weights else ():
            in_state, runs = trainables.part_of(name)
            for k in range(runs.start, runs.stop):
                mine = tensor[k - runs.start] if trainables.stacked else tensor
                mine.data.copy_(weights[k][in_state])
        yield trainables
    finally:
        trainables.detach()


def train(
    pack: Sequence[RunSpec],
    base: Base,
    objective: Objective,
    resume: dict[str, State] | None = None,
) -> Iterator[Event]:
    """Train the runs of `pack` together and yield an Event per update.

    `resume` maps every run id of the pack to its state from snapshot(), all at the same step.
    """
    model, mesh, runs, metric = base.model, base.mesh, list(pack), objective.metric
    # no adapter is attached yet: this measures the base, from which all runs start
    at_start = objective.start(base, runs) if mesh.size == 1 else []
    with ExitStack() as at_end:
        trainables = at_end.enter_context(attached(pack, base))
        # Measure here: only a sharded base may fit, and new adapters change no output yet.
        if mesh.size > 1:
            mesh = base.mesh = shard(model, trainables, mesh, pack[0].precision)
            at_start = mesh.run(objective.start, base, runs)
        else:
            at_end.enter_context(frozen_in_bf16(model, pack[0].precision))
        device = next(model.parameters()).device
        computed_by = backend(model, mesh.size)
        optimizer = AdamW(trainables, pack, mesh)
        held_out = partial(measure, model, objective, trainables, mesh)
        none: Record = {"step": 0, "examples": 0, "tokens": 0}
        progress = {run.id: Progress([none | first]) for run, first in zip(runs, at_start)}
        evaluations = {run.id: set(eval_steps(run.steps, run.has_curve)) for run in runs}
        first_step = step = 0
        if resume is not None:
            for run in runs:
                progress[run.id].load(resume[run.id]["meta"])
                objective.load_state(run.id, resume[run.id]["meta"])
            first_step = step = optimizer.load_runs([resume[run.id] for run in runs])

        # ---------------------------------------------------------------- loop
        while runs:
            started = time.perf_counter()
            groups = objective.groups(step, runs)
            batches = objective.batches(model, step, runs)
            weight_N = torch.stack([objective.weights(b) for b in batches]).sum(0)
            divisor_N = weight_N.to(device)
            total_N = torch.zeros(len(weight_N), dtype=torch.float64, device=device)
            with trainables.grouped(groups):
                for batch in mesh.share(batches):
                    sums_N = mesh.run(objective.loss, model, batch)
                    (sums_N / divisor_N.to(sums_N)).sum().backward()
                    total_N += sums_N.detach()
            mesh.sum_(total_N)
            if step == 0:
                for run, squares in zip(runs, optimizer.grad_squares()):
                    total, shares = (
                        sum(squares.values()) or math.nan,
                        defaultdict[str, float](float),
                    )
                    for name, value in squares.items():  # embedding and norms are 'rest'
                        shares[run.model.set_of(name)] += value / total
                    progress[run.id].curve[0]["grad_share"] = dict(shares)
            norms = optimizer.grad_norms()
            if step == first_step:
                guard(model, trainables, mesh, [*total_N.tolist(), *norms])
            optimizer.step(step, norms)
            optimizer.zero_grad()
            step += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # otherwise only the kernel launches are timed
            seconds = (time.perf_counter() - started) / len(runs)

            # ------------------------------------------------------------ records
            losses = (total_N / divisor_N.double())[groups].tolist()
            records: dict[str, Record] = {}
            diverged = set()
            update = objective.metrics(losses)
            for k, run in enumerate(runs):
                n_tokens, mine = sum(b.tokens_N[groups[k]] for b in batches), progress[run.id]
                mine.tokens += n_tokens
                mine.step_s.append(seconds)
                records[run.id] = {
                    "step": step,
                    "examples": step * run.batch_size,
                    "tokens": mine.tokens,
                    **update[k],
                    "grad_norm": norms[k],
                    "step_s": seconds,
                    "tokens_per_s": n_tokens / seconds,
                }
                lost = objective.diverged(run.id, losses[k])
                if lost or not math.isfinite(losses[k]) or not math.isfinite(norms[k]):
                    records[run.id]["diverged"] = True
                    diverged.add(run.id)
            last = {run.id for run in runs if step == run.steps}

            # ------------------------------------------------------------ held-out measures
            measured: dict[str, Record] = {}
            due = {run.id for run in runs if step in evaluations[run.id]} - diverged
            for final, ids in ((True, due & last), (False, due - last)):
                for i, measures in held_out(runs, ids, final).items():
                    measured[i] = measures
                    records[i] |= measures
                    names = ("step", "examples", "tokens", *measures)
                    progress[i].curve.append({name: records[i][name] for name in names})
                    if not math.isfinite(measures.get(metric.name, metric.on_first(measures))):
                        diverged.add(i)
            better = []
            for k, run in enumerate(runs):
                if not run.early_stopping or run.id not in due - diverged:
                    continue
                best, points = progress[run.id].best, progress[run.id].curve[1:]
                best.note(step, metric.loss(metric.on_first(points[-1])))
                better += [k] * (best.step == step)
                steps = [point["step"] for point in points]
                if no_better(best.step, steps, run.steps) >= run.early_stopping:
                    # the metric on the rows of earlier evaluations, which are these rows
                    points[-1].setdefault(metric.on_part, metric.on_first(points[-1]))
                    last.add(run.id)
            optimizer.keep_best(better)
            done = last - diverged
            at = [k for k, run in enumerate(runs) if run.id in done]
            finished = [runs[k] for k in at]
            past = [
                k for k in at if runs[k].early_stopping and progress[runs[k].id].best.step != step
            ]
            optimizer.keep_best(past, restore=True)
            measured |= held_out(runs, {runs[k].id for k in past}, True)
            if finished:
                with phase(EVALUATION), trainables.only(at):
                    more = mesh.run(objective.at_end, model, finished)
                    spectra = trainables.spectra()
                for run, found, norms_by_matrix in zip(finished, more, spectra):
                    measured[run.id] |= {**found, "spectra": norms_by_matrix}
            ended: dict[str, tuple[str, Record]] = {}
            for k, run in enumerate(runs):
                if run.id not in diverged | last:
                    continue
                mine = progress[run.id]
                result = {
                    **objective.facts(run),
                    **metric.stored(),
                    "backend": computed_by,
                    "steps_done": step,
                    "tokens": mine.tokens,
                    **update[k],
                    "curve": mine.curve,
                    "base_sha256": base.sha256,
                    "divergence_rule": DIVERGENCE_RULE,
                    **({"base_commit": base.commit} if base.commit else {}),
                }
                if run.id in done:
                    result |= measured[run.id] | {"step_s": statistics.median_high(mine.step_s)}
                    if mine.best.step:  # the update with the best weights
                        result["best_step"] = mine.best.step
                        result["early_stopping_rule"] = EARLY_STOPPING_RULE
                ended[run.id] = ("done" if run.id in done else "diverged", result)

            def snapshot(step: int = step, runs: list[RunSpec] = runs) -> dict[str, State]:
                layout, found = [run.id for run in runs], dict[str, State]()
                for k, i in enumerate(layout):
                    own = {**progress[i].state(), **objective.state(i)}
                    meta = {"step": step, "layout": layout, **own}
                    found[i] = {"tensors": optimizer.run_tensors(k), "meta": meta}
                return found

            event = Event(step, records, ended, snapshot, computed_by)
            yield event

            # ------------------------------------------------------------ remaining runs
            gone = ended.keys() | event.dropped
            stay = [k for k, run in enumerate(runs) if run.id not in gone]
            if len(stay) < len(runs):
                runs = [runs[k] for k in stay]
                if stay:
                    optimizer.keep(stay)


def measure_trials(
    pack: Sequence[RunSpec], base: Base, objective: Objective, trials: dict[str, State]
) -> Iterator[Event]:
    """Measure the runs of `pack` on all held-out items, with the weights of their trials.

    Yields one Event, in which all runs end. For one process. `trials`: run id -> the weights of the
    trial, and in `meta` its result and last record.
    """
    model, metric, records, ended = base.model, objective.metric, {}, {}
    objective.start(base, pack)
    weights = [weights_of(trials[run.id]) for run in pack]
    with attached(pack, base, weights) as trainables, frozen_in_bf16(model, pack[0].precision):
        for run in pack:
            objective.load_state(run.id, trials[run.id]["meta"]["result"])
        found = measure(model, objective, trainables, base.mesh, pack, set(trials), True)
        for i, measures in found.items():
            result, last = (trials[i]["meta"][key] for key in ("result", "last"))
            if result.get("best_step", result["steps_done"]) == result["steps_done"]:
                # else the last evaluation was of other weights
                last = {**last, **measures}
                curve = [*result["curve"][:-1], {**result["curve"][-1], **measures}]
                result = {**result, "curve": curve}
            records[i] = last
            state = "done" if math.isfinite(measures[metric.name]) else "diverged"
            ended[i] = (state, {**result, **measures})
        step = max(state["meta"]["step"] for state in trials.values())
        yield Event(step, records, ended, lambda: trials, backend(model, base.mesh.size))


@torch.no_grad()
def log_p(
    base: Base,
    run: RunSpec,
    rows: Sequence[Example],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> np.ndarray:
    """Return log p of the loss tokens of rows, float64 [loss tokens], in nats.

    `weights`: the tensors that a LoRA run kept (store/checkpoint.load_weights); None: the base.
    """
    with ExitStack() as at_end:
        if weights is not None:
            at_end.enter_context(attached([run], base, [weights]))
        at_end.enter_context(frozen_in_bf16(base.model, run.precision))
        found = [token_log_p(base.model, collate([row]), run.precision)[0] for row in rows]
    values = [f[: int(row.loss.sum())].double().cpu().numpy() for f, row in zip(found, rows)]
    return np.concatenate([np.zeros(0), *values])


def measure(
    model: nn.Module,
    objective: Objective,
    trainables: Trainables,
    mesh: Mesh,
    runs: Sequence[RunSpec],
    ids: set[str],
    final: bool,
) -> dict[str, Record]:
    """Return the held-out measures of the runs `ids`, with weight norms.

    `runs`: all runs of the pack. `final`: measure on all held-out items, else on a part of them.
    """
    # On a CPU each pass measures the runs of one data set. A larger pass is hardly faster, and pads
    # all rows to the longest: 1.4 times the tokens for 100 customers (docs/log/2026-11-27.md).
    # On a GPU one pass measures all runs. Assumption: small passes cost more there.
    on_cpu = next(model.parameters()).device.type == "cpu"
    groups: dict[str, list[int]] = {}
    for k, run in enumerate(runs):
        if run.id in ids:
            groups.setdefault(run.dataset.canonical if on_cpu else "", []).append(k)
    measured: dict[str, Record] = {}
    norms = trainables.norms() if ids else []
    for at in groups.values():
        some = [runs[k] for k in at]
        with phase(EVALUATION), trainables.only(at):
            found = mesh.run(objective.evaluate, model, some, final)
        measured |= {runs[k].id: {**measures, **norms[k]} for k, measures in zip(at, found)}
    return measured


@dataclass
class Progress:
    """The state of one run that the loop keeps between updates."""

    curve: list[Record]
    """The learning curve: one point per evaluation, the first before training."""
    tokens: int = 0
    step_s: list[float] = field(default_factory=list)
    """Seconds of each update in this attempt: time of the pack divided by its number of runs."""
    best: Best = field(default_factory=Best)

    def load(self, meta: dict[str, Any]) -> None:
        """Restore the values of a checkpoint."""
        self.curve, self.tokens = list(meta["curve"]), meta["tokens"]
        self.best = Best(*meta.get("best", ())[:2])  # old checkpoints have a third value

    def state(self) -> dict[str, Any]:
        """Return the values for a checkpoint."""
        best = {"best": astuple(self.best)} if self.best.step else {}
        return {"curve": self.curve, "tokens": self.tokens, **best}
