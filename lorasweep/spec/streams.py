"""Named random streams: every draw that a run makes belongs to one.

The only file of this room that needs numpy, and only to draw: planning starts faster without it.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def stream(*names: object) -> "np.random.Generator":
    """Make the random stream of this name: the same names give the same numbers, on any machine."""
    import numpy as np

    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
