"""Which names of the hub are pinned: the content behind them cannot change."""

import re

from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec

COMMIT = re.compile("[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Return whether a revision is a commit; branches and tags can move."""
    return bool(COMMIT.fullmatch(revision))


def is_unpinned(part: ModelSpec | DatasetSpec) -> bool:
    """Return whether the content behind a name on the hub can change."""
    return part.source == "hub" and not is_commit(part.revision)
