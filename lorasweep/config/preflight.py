"""Check before anything starts that weights and data are on this machine and fit together."""

from lorasweep.errors import SpecError
from lorasweep.sweep.request import Request


def check_available(request: Request) -> None:
    """Check that the weights and data of every point are on this machine.

    Raises:
        ModelError, DataError: they are not; the message tells how to get them.
        SpecError: a data set has more symbols than the model's vocabulary.
    """
    from lorasweep.data import load as data
    from lorasweep.models import load as models

    specs = [p.spec for p in request.points]
    for model in {s.model.name: s.model for s in specs}.values():
        models.check_available(model, request.exec.models_dir)
    for dataset in {s.dataset.name: s.dataset for s in specs}.values():
        data.check_available(dataset, request.exec.data_dir)
    pairs = {(s.model.name, s.dataset.name): (s.model, s.dataset) for s in specs}
    for model, dataset in pairs.values():
        vocab = data.generator_vocab(dataset)
        if vocab is not None and vocab > model.vocab_size:
            raise SpecError(
                f"dataset {dataset.name!r} has {vocab} symbols, model {model.name!r} only "
                f"{model.vocab_size}. Choose a model made for it (conf/model)."
            )
