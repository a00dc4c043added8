"""Which examples a run is trained and tested on, and which of their tokens bear loss."""

from dataclasses import dataclass, field

from lorasweep.spec.canonical import check, one_of

DATASET_SOURCES = ("hub", "jsonl", "synthetic")
FORMATS = ("prompt_completion", "messages", "tokens")
MASKS = ("completion", "last_assistant", "all")


@dataclass
class DatasetSpec:
    """Which examples, in which split and form, and where the loss looks."""

    name: str = "???"
    source: str = "???"
    location: str = ""
    """Hub name, generator name, or folder looked up under exec.data_dir."""
    config: str = ""
    """Configuration name on the hub."""
    revision: str = ""
    """Hub revision, or 'sha256:...' over the files: what makes two loads the same rows."""
    train_split: str = "train"
    test_split: str = "test"
    """Split names; for jsonl, file names without the ending."""
    format: str = "prompt_completion"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: str = "{prompt}\n"
    """Text put before the completion; {prompt} is the row's prompt."""
    mask: str = "completion"
    """Tokens that bear loss: the completion, the last assistant message, or all."""
    max_length: int = 512
    """Tokens; a longer row is cut on the right."""
    n_train: int | None = None
    """Rows used, from the start of the split; None: all."""
    n_test: int = 1024
    """Held-out rows evaluated at the end."""
    n_test_curve: int = 256
    """Of these, the first rows: evaluated at the log-spaced steps before the end."""
    knobs: dict[str, float] = field(default_factory=dict)
    """Settings of a synthetic generator."""
    holdout: int = field(default=0, metadata={"added": 0})
    """Rows held out from the training split of a hub data set that has no other: the first after a
    shuffle; 0: test_split."""
    n_retain: int = field(default=0, metadata={"added": 0})
    """Rows of what the base was pretrained on (facts: of facts never trained), evaluated once at
    the end."""


def validate_dataset(data: DatasetSpec) -> None:
    """Raise SpecError for a data set whose settings contradict each other."""
    where = f"dataset {data.name!r}: "
    one_of(where + "source", data.source, DATASET_SOURCES)
    one_of(where + "format", data.format, FORMATS)
    one_of(where + "mask", data.mask, MASKS)
    check(bool(data.location), f"{where}location is missing.")
    check(data.max_length >= 4, f"{where}max_length={data.max_length}: at least 4 tokens.")
    check(data.n_test >= 1, f"{where}n_test={data.n_test}: at least 1 row.")
    check(
        1 <= data.n_test_curve <= data.n_test,
        f"{where}n_test_curve={data.n_test_curve}: from 1 to n_test={data.n_test}.",
    )
    check(
        data.holdout == 0 or (data.source == "hub" and data.holdout >= data.n_test),
        f"{where}holdout={data.holdout}: 0, or for source=hub at least n_test={data.n_test} rows.",
    )
    check(data.n_retain >= 0, f"{where}n_retain={data.n_retain}: 0 or more rows.")
    check(
        data.n_retain == 0 or data.source == "synthetic",
        f"{where}n_retain={data.n_retain}: only synthetic data sets know what the base was pretrained on. Leave it at 0.",
    )
    check(
        data.n_train is None or data.n_train >= 1,
        f"{where}n_train={data.n_train}: at least 1, or null.",
    )
