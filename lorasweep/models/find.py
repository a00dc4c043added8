"""Find a base model's files on this machine: weights, tokenizer, license, pinned content. No torch.

Commands that only plan, ask or wait for workers need no more than this; torch takes seconds.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.errors import ModelError, check_installed
from lorasweep.models import hub
from lorasweep.spec.model import ModelSpec
from lorasweep.store.files import read_json, write_atomic

SHIPPED = Path(__file__).parent / "bases"
"""Folder with the weights of recipes that come with the package."""
LICENSE = ("license", "license_name", "license_link")
"""Keys of a model card's head."""


def check_available(spec: ModelSpec, models_dirs: Sequence[str], fetched: bool = False) -> bool:
    """Check weights without loading them; return whether a tokenizer exists, or will be downloaded.

    Raises:
        ModelError: the weights are missing or incomplete; with `fetched`, not in the hub's cache.
    """
    if spec.source == "hub":
        folder = hub.check_cached(spec, fetched)
        return folder is None or hub.has_tokenizer(folder)
    if spec.source == "recipe":
        return False
    path = pinned_path(spec, models_dirs)
    if path.is_file() and not (converted_at(path, models_dirs[0]) / "config.json").is_file():
        check_installed("gguf", f"model {spec.name!r}")
    return path.is_file() or hub.has_tokenizer(path)


def pinned_path(spec: ModelSpec, models_dirs: Sequence[str]) -> Path:
    """Return the folder or file of a local model with the content that its revision pins.

    Raises:
        ModelError: it is missing or incomplete, or has another content.
    """
    tried = [Path(folder).expanduser() / spec.location for folder in models_dirs]
    is_gguf, pinned = spec.source == "gguf", spec.revision
    there = [p for p in tried if (p.is_file() if is_gguf else (p / "config.json").is_file())]
    if not there:
        get = "run `make weights`" if "SmolLM2" in spec.location else "put the weights there"
        raise ModelError(
            f"model {spec.name!r}: no {spec.source} at {' or '.join(map(str, tried))}. To get it, "
            f"{get}, or set exec.models_dir=[FOLDER]."
        )
    pins = []
    for path in there:  # a folder of models_dirs may have another model of this name
        if not is_gguf:
            hub.check_folder(spec, path)
        if not (pinned if is_gguf else pinned.startswith("sha256:")):
            return path
        pins.append(content_pin(path))
        if pinned in (pins[-1], content_pin(path, with_tokenizer=False)):
            return path
    raise ModelError(
        f"model {spec.name!r}: {there[0]} is {pins[0]}, but the model pins {pinned}. Get the "
        "pinned weights, or describe these as another model: model=FOLDER or FILE, or a file in "
        "conf/model with another name and revision."
    )


def content_pin(path: Path, with_tokenizer: bool = True) -> str:
    """Return 'sha256:...' of a GGUF file, or of a folder's config.json, weights and tokenizer.

    That of a folder is what `sha256sum FILES | sha256sum` prints in it, with config.json, the
    weights and the tokenizer's files in this order. Earlier versions pinned no tokenizer.
    """
    files = [path]
    if path.is_dir():
        weights = sorted(p for p in map(path.joinpath, hub.weight_files(path)) if p.is_file())
        files = [path / "config.json", *(weights or sorted(path.glob(hub.PICKLED)))]
        if with_tokenizer:
            files += [p for p in map(path.joinpath, hub.OF_TOKENIZER) if p.is_file()]
    digests = [_sha256(p, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    if path.is_dir():
        listed = "".join(f"{digest}  {p.name}\n" for digest, p in zip(digests, files))
        digests = [hashlib.sha256(listed.encode()).hexdigest()]
    return f"sha256:{digests[0]}"


@cache
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    """Hash a file, once for each state of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def converted_at(path: Path, models_dir: str) -> Path:
    """Return the folder for a GGUF file's weights as safetensors, whether or not it exists."""
    digest = content_pin(path).removeprefix("sha256:")
    return Path(models_dir).expanduser() / f"{path.stem}-{digest[:12]}"


def recipe_file_name(spec: ModelSpec) -> str:
    """Name the weights file of a recipe: model name, and hash of recipe and shape."""
    fields = spec.plain()
    for name in ("location", "revision", "attention", "mlp", "unembedding", "weights_dtype"):
        fields.pop(name, None)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return f"{spec.name}-{digest[:10]}.safetensors"


def recipe_weights(spec: ModelSpec, models_dirs: Sequence[str]) -> Path | None:
    """Find the weights of a recipe in the package or a models folder; None if there are none."""
    folders = [SHIPPED, *(Path(d).expanduser() for d in models_dirs)]
    paths = (folder / recipe_file_name(spec) for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def license_of(spec: ModelSpec, models_dirs: Sequence[str]) -> dict[str, str]:
    """Return license, license_name and license_link of a base; empty if the license is not known.

    They are keys of the head of a model card (github.com/huggingface/hub-docs, modelcard.md), and
    are read from the base's card or from a GGUF file.
    """
    given: dict[str, Any] = {}
    with suppress(Exception):  # a base without a readable card has no known license
        if spec.source == "gguf":
            path = pinned_path(spec, models_dirs)
            kept = converted_at(path, models_dirs[0]) / "license.json"
            given = read_json(kept) or _license_in_gguf(path)
            with suppress(OSError):  # for the next time: reading a GGUF file takes seconds
                write_atomic(kept, json.dumps(given).encode())
        elif spec.source != "recipe":
            from huggingface_hub import hf_hub_download, metadata_load

            name, revision = "README.md", spec.revision or None
            on_hub = spec.source == "hub"
            path = None if on_hub else pinned_path(spec, models_dirs) / name
            given = metadata_load(path or hf_hub_download(spec.location, name, revision=revision))
    found = {k: v for k in LICENSE if isinstance(v := (given or {}).get(k), str) and v.strip()}
    if "license" not in found:
        return {}
    found["license"] = found["license"].lower()
    link = found.get("license_link", "")
    if spec.source == "hub" and link and "://" not in link:  # a file of the base's repository
        found["license_link"] = f"https://huggingface.co/{spec.location}/blob/main/{link}"
    return found


def _license_in_gguf(path: Path) -> dict[str, str]:
    import gguf

    fields = gguf.GGUFReader(path).fields
    found = {name: fields.get(f"general.{name.replace('_', '.')}") for name in LICENSE}
    return {k: bytes(f.parts[f.data[0]]).decode() for k, f in found.items() if f}
