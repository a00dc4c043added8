"""What must hold before anything starts: weights and data are on this machine and fit together."""

from lorasweep.errors import SpecError
from lorasweep.sweep.request import Request


def check_available(request: Request) -> None:
    """Check that the weights and data of every point are on this machine.

    Raises:
        ModelError, DataError: they are not; the message names what to do.
        SpecError: a data set has more symbols than the model's vocabulary.
    """
    from lorasweep.data import load as data
    from lorasweep.models import load as models

    seen: set[str] = set()
    for p in request.points:
        for spec, check, dirs in (
            (p.spec.model, models.check_available, request.exec.models_dir),
            (p.spec.dataset, data.check_available, request.exec.data_dir),
        ):
            if spec.name not in seen:
                seen.add(spec.name)
                check(spec, dirs)
        vocab = data.generator_vocab(p.spec.dataset)
        if vocab is not None and vocab > p.spec.model.vocab_size:
            raise SpecError(
                f"dataset {p.spec.dataset.name!r} has {vocab} symbols, model {p.spec.model.name!r} "
                f"only {p.spec.model.vocab_size}. Choose a model made for it (conf/model)."
            )
