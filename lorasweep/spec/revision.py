"""Whether names of the hub are pinned to a commit, so that their content cannot change."""

import re

from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec

COMMIT = re.compile("[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Return whether a revision is a commit; branches and tags can move."""
    return bool(COMMIT.fullmatch(revision))


def is_unpinned(part: ModelSpec | DatasetSpec) -> bool:
    """Return whether the content behind a name on the hub can change."""
    if part.source != "hub":
        return False
    if isinstance(part, DatasetSpec) and part.test_location and not is_commit(part.test_revision):
        return True
    return not is_commit(part.revision)
