"""Estimate the floating-point operations of a run from shapes alone."""

from lorasweep.spec.run import RunSpec

TEXT_FILL = 0.4
"""Mean length of text rows as a share of max_length. Assumption: GSM8K has 0.37 of 512. Taken for
prompts and sampled answers of text, too."""
CURVE_POINTS = 8
"""Evaluations on the first held-out rows, before the last one."""


def _fill(spec: RunSpec) -> float:
    return 1.0 if spec.dataset.source == "synthetic" else TEXT_FILL


def mean_length(spec: RunSpec) -> int:
    """Return the expected tokens per row: max_length, times TEXT_FILL for text."""
    return round(spec.dataset.max_length * _fill(spec))


def answer_tokens(spec: RunSpec) -> float:
    """Return the expected tokens of a sampled answer; 0 for runs that sample none."""
    return spec.max_new_tokens * _fill(spec)


def prompt_tokens(spec: RunSpec) -> float:
    """Return the expected tokens of a prompt that is sampled from."""
    return (spec.dataset.max_length - spec.max_new_tokens) * _fill(spec)


def evaluated_answers(spec: RunSpec) -> list[int]:
    """Return how many answers each evaluation of a run samples, one a prompt.

    None where generators bring the one right answer, whose probability is the reward. The first and
    the last are on all held-out rows, and the last on those of the others again.
    """
    if not spec.max_new_tokens or spec.dataset.source == "synthetic":
        return []
    few, every = spec.dataset.n_test_curve, spec.dataset.n_test
    return [every, *[few] * CURVE_POINTS, every, few] if few else [every, every]


def sampling_flops(spec: RunSpec, answers: int, prompts: int) -> float:
    """Estimate the operations of sampling: a forward pass over prompts and answers."""
    tokens = prompts * prompt_tokens(spec) + answers * answer_tokens(spec)
    return 2.0 * spec.model.n_active_params * tokens


def train_flops(spec: RunSpec) -> float:
    """Estimate the operations of a run's updates, with what they sample.

    The formula is in Method.step_flops.
    """
    update = spec.method.step_flops(spec.model, spec.batch_size * mean_length(spec))
    if spec.max_new_tokens:
        update += sampling_flops(spec, spec.batch_size, spec.batch_size // spec.group_size)
    return update * spec.steps


def run_flops(spec: RunSpec) -> float:
    """Estimate the operations of a run: its updates, and the evaluations on held-out rows."""
    if sampled := sum(evaluated_answers(spec)):
        return train_flops(spec) + sampling_flops(spec, sampled, sampled)
    d = spec.dataset
    few = (d.n_validation or d.n_test_curve) if spec.has_curve else 0
    rows = d.n_test + d.n_validation + CURVE_POINTS * few
    return train_flops(spec) + 2.0 * spec.model.n_active_params * mean_length(spec) * rows
