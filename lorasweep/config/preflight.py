"""Check that the weights and data of runs are present and fit together; download them."""

from collections.abc import Callable, Iterable

from lorasweep.errors import SpecError
from lorasweep.spec.metric import METRICS
from lorasweep.spec.run import RunSpec
from lorasweep.sweep.request import Request


def check_available(request: Request) -> None:
    """Check that the weights and data of all runs are on this machine.

    The first run that needs a file of the hub downloads it. On a cluster a missing file is an
    error, because jobs would hold GPUs during the download.

    Raises:
        ModelError, DataError: weights or data are missing; the message says how to get them.
        SpecError: a data set does not fit the model's vocabulary or tokenizer.
    """
    from lorasweep.data import load as data
    from lorasweep.data import rewards
    from lorasweep.data.synthetic.generators import generator
    from lorasweep.models import find

    specs, exec_ = [p.spec for p in request.points], request.exec
    fetched, reads_text = request.cluster.kind == "slurm", {}
    for model in {s.model.name: s.model for s in specs}.values():
        reads_text[model.name] = find.check_available(model, exec_.models_dir, fetched)
    for spec in {(s.dataset.name, s.objective): s for s in specs}.values():
        if METRICS[spec.objective].higher_is_better:
            rewards.check_available(spec.dataset)
        if not exec_.skip_broken_data:  # else bad data fails only its own runs
            data.check_available(spec.dataset, exec_.data_dir)
    for spec in {(s.model.name, s.dataset.name): s for s in specs}.values():
        is_text, model = spec.dataset.source != "synthetic", spec.model
        vocab = None if is_text else generator(spec.dataset.location).vocab
        if (vocab or 0) > model.vocab_size or (vocab is None and not reads_text[model.name]):
            few = f"only {model.vocab_size} of {vocab} symbols"
            raise SpecError(
                f"model {model.name!r} has {few if vocab else 'no tokenizer'} for dataset "
                f"{spec.dataset.name!r}. Choose a model made for it (conf/model), or put the "
                "tokenizer's files beside the weights."
            )


def fetch(specs: Iterable[RunSpec], tell: Callable[[str], None]) -> None:
    """Download the weights and rows of runs from the hub; `tell` is called with lines to show.

    Raises:
        ModelError, DataError: a download fails.
    """
    from lorasweep.data import sources as data
    from lorasweep.models import find as models

    specs = list(specs)
    wanted = {s.model.name: s.model for s in specs if s.model.source == "hub"}
    for name, model in wanted.items():
        tell(f"model {name}: {model.location} ...")
        folder, size = models.fetch(model)
        tell(f"model {name}: {size / 1e9:.1f} GB in {folder}")
    rows = {s.dataset.name: s.dataset for s in specs if s.dataset.source == "hub"}
    for name, dataset in rows.items():
        tell(f"dataset {name}: {dataset.location} ...")
        tell(f"dataset {name}: {data.fetch(dataset):,} rows")
    if not wanted and not rows:
        tell("nothing of these runs comes from the hub")
