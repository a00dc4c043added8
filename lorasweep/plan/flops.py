"""Estimate the floating-point operations of a run from shapes alone."""

from lorasweep.spec.run import RunSpec

TEXT_FILL = 0.4
"""Mean length of text rows as a share of max_length. Assumption: GSM8K has 0.37 of 512."""


def mean_length(spec: RunSpec) -> int:
    """Return the expected tokens per row: max_length, times TEXT_FILL for text."""
    fill = 1.0 if spec.dataset.source == "synthetic" else TEXT_FILL
    return round(spec.dataset.max_length * fill)


def train_flops(spec: RunSpec) -> float:
    """Estimate the operations of a run's updates. The formula is in Method.step_flops."""
    return spec.method.step_flops(spec.model, spec.batch_size * mean_length(spec)) * spec.steps


def run_flops(spec: RunSpec) -> float:
    """Estimate the operations of a run: its updates, and the evaluations of the held-out loss."""
    rows = spec.dataset.n_test + 8 * spec.dataset.n_test_curve
    return train_flops(spec) + 2.0 * spec.model.n_active_params * mean_length(spec) * rows
