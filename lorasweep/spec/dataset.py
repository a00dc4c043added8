"""Which examples a run is trained and tested on, and which of their tokens count in the loss."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from lorasweep.spec.canonical import Value, not_allowed

DATASET_SOURCES = ("hub", "jsonl", "synthetic")
FORMATS = ("prompt_completion", "messages", "tokens")
MASKS = ("completion", "last_assistant", "all")
RENDERS = ("role_colon", "role_eos")
FIRST_RENDER = "role_eos"
"""The only form of messages before `render` was a setting."""


@dataclass(frozen=True)
class DatasetSpec(Value):
    """Which examples, in which split and form, and which tokens count in the loss."""

    WHERE: ClassVar[str] = "dataset."

    name: str = "???"
    source: str = "???"
    location: str = ""
    """Hub name, generator name, or folder looked up under exec.data_dir."""
    config: str = ""
    """Configuration name on the hub."""
    revision: str = ""
    """Hub revision, or 'sha256:...' over the files. It pins the rows."""
    train_split: str = "train"
    test_split: str = "test"
    """Split names; for jsonl, file names without the ending."""
    format: str = "prompt_completion"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: str = "{prompt}\n"
    """Text put before the completion; {prompt} is the row's prompt."""
    mask: str = "completion"
    """Tokens that count in the loss: the completion, the last assistant message, or all."""
    max_length: int = 512
    """Tokens; a longer row is cut on the right."""
    n_train: int | None = None
    """Rows used, from the start of the split; None: all."""
    n_test: int = 1024
    """Held-out rows evaluated at the end."""
    n_test_curve: int = 256
    """The first of these rows, which are also evaluated at log-spaced steps before the end."""
    generator_params: dict[str, float] = field(default_factory=dict, metadata={"key": "knobs"})
    """Settings of a synthetic generator."""
    holdout: int = field(default=0, metadata={"added": 0})
    """Rows held out from the training split of a hub data set that has no test split: the first
    rows after a shuffle. 0: use test_split."""
    n_retain: int = field(default=0, metadata={"added": 0})
    """Rows of pretraining data (for facts: of facts that are never trained) that are evaluated once
    at the end, to measure forgetting."""
    exact_loss: bool = field(default=False, metadata={"added": False})
    """Whether held-out losses are taken over the true distribution of every next symbol instead of
    one sampled symbol: the same mean with less noise. Only where the generator knows it."""
    draw_by_seed: bool = field(default=False, metadata={"added": False})
    """Whether each seed has a draw of its own of what is to be learned. All draws have the same
    generator parameters, so the runs still form one curve."""

    render: str = field(default=FIRST_RENDER, metadata={"added": FIRST_RENDER})
    """How messages become text. role_colon: the study's form for base models, 'Role: content' and a
    blank line, which ends an answer. role_eos: the same words; the EOS token ends an answer."""

    def problems(self) -> Iterator[str]:
        where = f"dataset {self.name!r}: "
        choices = {
            "source": DATASET_SOURCES,
            "format": FORMATS,
            "mask": MASKS,
            "render": RENDERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield not_allowed(where + name, getattr(self, name), allowed)
        if self.render != FIRST_RENDER and self.format != "messages":
            yield (
                f"{where}render={self.render!r} has no effect with format={self.format!r}. Leave "
                "it out, or set format=messages."
            )
        if not self.location:
            yield (
                f"{where}location is missing. Set it to a hub name, a generator, or a folder under "
                "exec.data_dir."
            )
        if self.max_length < 4:
            yield f"{where}max_length={self.max_length}: expected at least 4 tokens."
        if self.n_test < 1:
            yield f"{where}n_test={self.n_test}: expected at least 1 row."
        if not 1 <= self.n_test_curve <= self.n_test:
            yield (
                f"{where}n_test_curve={self.n_test_curve}: expected 1 to n_test={self.n_test} rows."
            )
        if self.holdout != 0 and (self.source != "hub" or self.holdout < self.n_test):
            yield (
                f"{where}holdout={self.holdout}: expected 0, or for source=hub at least "
                f"n_test={self.n_test} rows."
            )
        if self.n_retain < 0:
            yield f"{where}n_retain={self.n_retain}: expected 0 or more rows."
        if self.n_retain and self.source != "synthetic":
            yield (
                f"{where}n_retain={self.n_retain}: only synthetic data sets know what the base was "
                "pretrained on. Leave it at 0."
            )
        for name in ("exact_loss", "draw_by_seed"):
            if getattr(self, name) and self.location != "dialect":
                yield f"{where}{name}=true: only the generator dialect can. Set it to false."
        if self.n_train is not None and self.n_train < 1:
            yield f"{where}n_train={self.n_train}: expected at least 1 row, or null for all."
