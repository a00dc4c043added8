"""The training loop for a pack of N runs over one base model; a single run is N = 1.

Knows a method by its Trainables, and what is optimised by its Objective. Refuses to know the store,
the launcher and configuration files: it yields events, which the caller records.

Shapes: N members of the pack.
"""

import math
import time
from collections.abc import Iterator, Sequence

import torch

from lorasweep.models.backend import backend
from lorasweep.models.experts import ExpertTokens
from lorasweep.models.load import Base
from lorasweep.models.sharding import guard, shard
from lorasweep.models.targets import find_targets
from lorasweep.spec.evaluations import eval_steps
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State
from lorasweep.train.early_stopping import end_early, return_to_best
from lorasweep.train.evaluator import Evaluator
from lorasweep.train.events import Event, Record
from lorasweep.train.objectives.base import DIVERGENCE_RULE, BatchT, Objective
from lorasweep.train.optim import AdamW
from lorasweep.train.progress import Progress, gradient_shares


def train(
    pack: Sequence[RunSpec],
    base: Base,
    objective: Objective[BatchT],
    resume: dict[str, State] | None = None,
) -> Iterator[Event]:
    """Train the runs of `pack` together and yield an Event per update.

    `resume` maps every run id of the pack to its state from snapshot(), all at the same step.
    """
    # ---------------------------------------------------------------- setup
    model, mesh, members = base.model, base.mesh, list(pack)
    method, metric = pack[0].method, objective.metric
    # nothing is attached yet: all runs start as the base
    at_start = objective.start(base, members) if mesh.size == 1 else []
    targets = find_targets(model, pack[0].model, method.target_layers())
    trainables = method.attach(model, targets, [s.method for s in pack], [s.seed for s in pack])
    counts = ExpertTokens(model)
    try:
        if mesh.size > 1:  # the whole base may not fit; a run alone starts as the base here, too
            mesh = base.mesh = shard(model, trainables, mesh, pack[0].precision)
            at_start = mesh.run(objective.start, base, members)
        device = next(model.parameters()).device
        passes = backend(model, mesh.size)
        optimizer = AdamW.start(trainables, pack, mesh)
        evaluator = Evaluator(model, objective, trainables, mesh)
        progress = {m.id: Progress.start(measures) for m, measures in zip(members, at_start)}
        evaluations = {m.id: set(eval_steps(m.steps, m.has_curve)) for m in members}
        first_step = step = _resume(resume, members, optimizer, progress, objective)

        # ---------------------------------------------------------------- loop
        while members:
            started = time.perf_counter()
            batches = objective.batches(model, step, members)
            weight_N = torch.stack([objective.weights(b) for b in batches]).sum(0)
            divisor_N = weight_N.to(device)
            total_N = torch.zeros(len(members), dtype=torch.float64, device=device)
            for batch in mesh.share(batches):
                sums_N = mesh.run(objective.loss, model, batch)
                (sums_N / divisor_N.to(sums_N)).sum().backward()
                total_N += sums_N.detach()
            mesh.sum_(total_N)
            if step == 0:  # record the layer sets' shares of the first gradient
                for m, squares in zip(members, optimizer.grad_squares()):
                    shares = gradient_shares(squares, m.model)
                    progress[m.id].curve[0]["grad_share"] = shares
            norms = optimizer.grad_norms()
            if step == first_step:
                guard(model, trainables, mesh, [*total_N.tolist(), *norms])
            optimizer.step(step, norms)
            optimizer.zero_grad()
            step += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # otherwise only the kernel launches are timed
            seconds = (time.perf_counter() - started) / len(members)

            # ------------------------------------------------------------ records
            losses = (total_N / divisor_N.double()).tolist()
            laid_out = sum(b.laid_out for b in batches)
            records: dict[str, Record] = {}
            diverged = set()
            update = objective.metrics(losses)
            of_experts = counts.take(len(members), mesh)
            for k, m in enumerate(members):
                n_tokens = sum(b.tokens_N[k] for b in batches)
                progress[m.id].add(n_tokens, seconds, of_experts[k])
                records[m.id] = {
                    "step": step,
                    "examples": step * m.batch_size,
                    "tokens": progress[m.id].tokens,
                    **update[k],
                    "grad_norm": norms[k],
                    "step_s": seconds,
                    "tokens_per_s": n_tokens / seconds,
                    "padding": 1 - n_tokens / laid_out,
                }
                lost = objective.diverged(m.id, losses[k])
                if lost or not math.isfinite(losses[k]) or not math.isfinite(norms[k]):
                    records[m.id]["diverged"] = True
                    diverged.add(m.id)
            last = {m.id for m in members if step == m.steps}

            # ------------------------------------------------------------ held-out measures
            measured: dict[str, Record] = {}
            due = {m.id for m in members if step in evaluations[m.id]} - diverged
            for final, runs in ((True, due & last), (False, due - last)):
                for run, (measures, n_items) in evaluator.measure(members, runs, final).items():
                    measured[run] = measures
                    records[run] |= {**measures, "test_items": n_items}
                    progress[run].point(records[run], tuple(measures))
                    if not math.isfinite(measures[metric.name]):
                        diverged.add(run)
            last |= end_early(step, members, due - diverged, progress, optimizer, metric)
            back = return_to_best(step, members, last - diverged, progress, optimizer)
            for run, (measures, _) in evaluator.measure(members, back, True).items():
                measured[run] = measures
            done = last - diverged
            for run, found in evaluator.at_end(members, done).items():
                measured[run] |= found
            ended: dict[str, tuple[str, Record]] = {}
            for k, m in enumerate(members):
                if m.id not in diverged | last:
                    continue
                result = {
                    **objective.facts(m),
                    **metric.stored(),
                    "backend": passes,
                    "steps_done": step,
                    "tokens": progress[m.id].tokens,
                    **update[k],
                    "curve": progress[m.id].curve,
                    **progress[m.id].of_experts(),
                    "base_sha256": base.sha256,
                    "divergence_rule": DIVERGENCE_RULE,
                    **({"base_commit": base.commit} if base.commit else {}),
                }
                if m.id in done:
                    result |= {**measured[m.id], **progress[m.id].of_best()}
                    result["step_s"] = progress[m.id].median_step_s()
                ended[m.id] = ("done" if m.id in done else "diverged", result)

            def snapshot(step: int = step, members: list[RunSpec] = members) -> dict[str, State]:
                layout = [m.id for m in members]
                return {
                    run: {
                        "tensors": optimizer.member_tensors(k),
                        "meta": {
                            "step": step,
                            "layout": layout,
                            **progress[run].state(),
                            **objective.state(run),
                        },
                    }
                    for k, run in enumerate(layout)
                }

            event = Event(step, records, ended, snapshot, passes)
            yield event

            # ------------------------------------------------------------ compaction
            gone = ended.keys() | event.dropped
            stay = [k for k, m in enumerate(members) if m.id not in gone]
            if len(stay) < len(members):
                members = [members[k] for k in stay]
                if stay:
                    optimizer.keep(stay)
    finally:
        counts.close()
        trainables.detach()


def _resume(
    states: dict[str, State] | None,
    members: Sequence[RunSpec],
    optimizer: AdamW,
    progress: dict[str, Progress],
    objective: Objective[BatchT],
) -> int:
    """Restore the members from their states, if there are any; return the updates already made."""
    if states is None:
        return 0
    for m in members:
        progress[m.id].load(states[m.id]["meta"])
        objective.load_state(m.id, states[m.id]["meta"])
    return optimizer.load_members([states[m.id] for m in members])
