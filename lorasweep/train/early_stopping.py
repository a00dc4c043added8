"""End members of a pack by their held-out loss, and make them again what they were at their best.

The evaluations are those that a run has anyway, on the rows that choose between runs.
"""

from collections.abc import Mapping, Sequence

from lorasweep.spec.evaluations import no_better
from lorasweep.spec.metric import Metric
from lorasweep.spec.run import RunSpec
from lorasweep.train.optim import AdamW
from lorasweep.train.progress import Progress


def end_early(
    step: int,
    members: Sequence[RunSpec],
    measured: set[str],
    progress: Mapping[str, Progress],
    optimizer: AdamW,
    metric: Metric,
) -> set[str]:
    """Take up the evaluations at `step`, and keep the weights of those that are better than before.

    `measured`: runs with an evaluation at `step`. Returns those that end by it.
    """
    watched = [m for m in members if m.early_stopping and m.id in measured]
    for m in watched:
        point = progress[m.id].curve[-1]
        loss = metric.loss(point.get(metric.on_part, point[metric.name]))
        progress[m.id].best.note(step, loss)
    better = {m.id for m in watched if progress[m.id].best.step == step}
    optimizer.keep_best([k for k, m in enumerate(members) if m.id in better])
    ending = [m for m in watched if _since_best(m, progress[m.id]) >= m.early_stopping]
    for m in ending:  # a learning curve ends with what it says of the rows of its other points
        point = progress[m.id].curve[-1]
        point.setdefault(metric.on_part, point[metric.name])
    return {m.id for m in ending}


def _since_best(member: RunSpec, progress: Progress) -> int:
    evaluated = [point["step"] for point in progress.curve[1:]]
    return no_better(progress.best.step, evaluated, member.steps)


def return_to_best(
    step: int,
    members: Sequence[RunSpec],
    ending: set[str],
    progress: Mapping[str, Progress],
    optimizer: AdamW,
) -> set[str]:
    """Make members that end again what they were at their best; return those that were better.

    `ending`: runs that end after update `step`.
    """
    back = [
        k
        for k, m in enumerate(members)
        if m.early_stopping and m.id in ending and progress[m.id].best.step != step
    ]
    optimizer.back_to_best(back)
    return {members[k].id for k in back}
