"""Named random streams. Every random number of a run comes from one of them."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def stream(*names: object) -> "np.random.Generator":
    """Make the random stream of this name. The same name gives the same numbers on any machine."""
    import numpy as np  # not at the top: planning needs no numpy and starts faster without it

    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
