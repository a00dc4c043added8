"""Download base models; check by file names and headers that they are complete. No torch."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lorasweep.errors import ModelError, from_hub
from lorasweep.spec.model import ModelSpec
from lorasweep.store.files import safetensors_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = "pytorch_model*.bin*"
"""Weights in an older format."""
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Names of a tokenizer's vocabulary file; a tokenizer has at least one of them."""
OF_TOKENIZER = (
    *(*TOKENIZER, "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
)
"""Names of all files of a tokenizer that determine the tokens of a row."""
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
UNWANTED = ["original/*"]
"""Weights in Meta's format, which some repositories have in addition to transformers' format."""


def check_cached(spec: ModelSpec, needed: bool) -> Path | None:
    """Return the folder of a hub model in the cache; None if the first run will download it.

    Raises:
        ModelError: the model is inaccessible or damaged; or it is not completely downloaded,
            although `needed` or offline.
    """
    from huggingface_hub import constants

    folder = cached_config(spec)
    damaged, missing = _problems(folder)
    if damaged:
        again = f"hf download {spec.location} --revision {spec.revision or 'main'} --force-download"
        raise ModelError(
            f"model {spec.name!r}: {damaged}. Download it again: {again} --exclude 'original/*'"
        )
    if missing and (needed or constants.HF_HUB_OFFLINE):
        raise ModelError(
            f"model {spec.name!r}: {folder} has {missing}. To download all that the runs need, "
            "give the same command with action=fetch on a machine that reaches the hub."
        )
    return None if missing else folder


def check_folder(spec: ModelSpec, folder: Path) -> None:
    """Raise ModelError if the weights of a local model are incomplete."""
    damaged, missing = _problems(folder)
    if damaged or missing:
        raise ModelError(
            f"model {spec.name!r}: {folder} has {damaged or missing}. Copy the files again."
        )


def has_weights(folder: Path) -> bool:
    """Return whether a model's folder has files of weights, complete or not."""
    return any((folder / n).is_file() for n in weight_files(folder)) or any(folder.glob(PICKLED))


def is_complete(folder: Path) -> bool:
    """Return whether a model's folder has all files of weights, of the size in their headers."""
    return has_weights(folder) and not any(_problems(folder))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model's folder has a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER)


def matrix_types(spec: ModelSpec, folder: Path) -> set[str]:
    """Return the types of a model's matrices, such as 'BF16', without loading any.

    Those of a hub model that is not in the cache come from the headers of its files on the hub.
    Empty without safetensors, or where the hub cannot be reached.
    """
    files = [path for path in map(folder.joinpath, weight_files(folder)) if path.is_file()]
    if files or spec.source != "hub":
        return types_in(files)
    from huggingface_hub import get_safetensors_metadata

    with suppress(Exception):  # `check_cached` tells what is wrong, when weights are needed
        found = get_safetensors_metadata(spec.location, revision=folder.name).files_metadata
        tensors = [t for file in found.values() for t in file.tensors.values()]
        return {t.dtype for t in tensors if len(t.shape) > 1}
    return set()


def types_in(files: Iterable[Path]) -> set[str]:
    """Return the types of the matrices in safetensors files; norms often have another one."""
    headers = [header for header in map(safetensors_header, files) if header]
    tensors = [t for header in headers for t in header[0].values()]
    return {t["dtype"] for t in tensors if len(t["shape"]) > 1}


def cached_config(spec: ModelSpec) -> Path:
    """Cache a hub model's config.json; return its folder, named by commit. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(spec.location, "config.json", revision=spec.revision or None)
    except Exception as error:
        raise _unavailable(spec, error) from error
    return Path(path).parent


def fetch(spec: ModelSpec) -> tuple[Path, int]:
    """Download a hub model unless it is cached; return its folder and size in bytes.

    Raises:
        ModelError: the model is inaccessible or damaged.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        found = snapshot_download(
            spec.location,
            revision=spec.revision or None,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            local_files_only=constants.HF_HUB_OFFLINE,  # some releases list the files online
        )
    except Exception as error:
        raise _unavailable(spec, error) from error
    check_cached(spec, needed=True)
    return Path(found), sum(p.stat().st_size for p in Path(found).rglob("*") if p.is_file())


def weight_files(folder: Path) -> list[str]:
    """Name the safetensors files that a model's folder should have."""
    if (folder / SINGLE).is_file():  # transformers reads it, even beside an index
        return [SINGLE]
    with suppress(FileNotFoundError, ValueError, KeyError):  # an unreadable index counts as none
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return [SINGLE]


def _problems(folder: Path) -> tuple[str | None, str | None]:
    """Describe a damaged safetensors file (size not as in its header), and missing files."""
    names = weight_files(folder)
    damaged = missing = None
    absent = [name for name in names if not (folder / name).is_file()]
    for path in (folder / name for name in names if name not in absent):
        size, header = path.stat().st_size, safetensors_header(path)
        if header is None or size != header[1]:
            says = f"and its header says {header[1]:,}" if header else "and no readable header"
            damaged = f"an incomplete file of weights: {path} has {size:,} bytes, {says}"
            break
    if absent and not list(folder.glob(PICKLED)):
        there = len(names) - len(absent)
        missing = f"{there} of {len(names)} files of weights: no {absent[0]}"
    return damaged, missing


def _unavailable(spec: ModelSpec, error: Exception) -> ModelError:
    place = f"{spec.location}@{spec.revision}" if spec.revision else spec.location
    return ModelError(from_hub(f"model {spec.name!r}", place, error))
