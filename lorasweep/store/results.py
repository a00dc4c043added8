"""Read and write result.json: how a run ended and what it measured. Written once, last."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from lorasweep.store import files

Result = dict[str, Any]
"""JSON values; at least `run_id` and `state` (done or diverged)."""


def read(folder: Path) -> Result | None:
    """Return the result in a run's folder; None if it is missing or damaged.

    Raises:
        StoreError: it cannot be read now.
    """
    return _checked(files.read(folder / "result.json"))


def damaged(folder: Path) -> bool:
    """Return whether there is a result with a wrong checksum.

    Raises:
        StoreError: it cannot be read now.
    """
    content = files.read(folder / "result.json")
    return content is not None and _checked(content) is None


def _checked(content: bytes | None) -> Result | None:
    try:
        wrapped = json.loads(content or b"")
        body = wrapped["result"]
        return body if wrapped["sha256"] == checksum(body) else None
    except (ValueError, KeyError, TypeError):
        return None


def write_once(folder: Path, result: Result) -> bool:
    """Write the result of a run unless it has one; return whether this call wrote it."""
    body = json.loads(finite_json(result))
    content = json.dumps({"sha256": checksum(body), "result": body}).encode()
    return files.create_once(folder / "result.json", content)


def checksum(body: Result) -> str:
    """Return the SHA-256 of a result's canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def finite_json(value: dict[str, Any]) -> str:
    """Return values as JSON; numbers that are not finite become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
