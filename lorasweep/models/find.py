"""A base model's files: weights, tokenizer, license; in folders, in GGUF files or on the hub.

Complete by names and headers, pinned by content. No torch: commands that only plan, ask or wait for
workers need no more than this; torch takes seconds.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.errors import ModelError, check_installed, from_hub
from lorasweep.spec.model import ModelSpec
from lorasweep.store.files import safetensors_header

SHIPPED = Path(__file__).parent / "bases"
"""Folder with the weights of recipes that come with the package."""
LICENSE = ("license", "license_name", "license_link")
"""Keys of a model card's head (github.com/huggingface/hub-docs, modelcard.md)."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Names of a tokenizer's vocabulary file; a tokenizer has at least one of them."""
OF_TOKENIZER = (
    *(*TOKENIZER, "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
)
"""Names of all files of a tokenizer that determine the tokens of a row."""


def check_available(spec: ModelSpec, models_dirs: Sequence[str], fetched: bool = False) -> bool:
    """Check weights without loading them; return whether a tokenizer exists, or will be downloaded.

    ModelError: the weights are missing or incomplete; with `fetched`, not in the hub's cache.
    """
    if spec.source == "hub":
        folder = check_cached(spec, fetched)
        return folder is None or has_tokenizer(folder)
    if spec.source == "recipe":
        return False
    path = pinned_path(spec, models_dirs)
    if path.is_file() and not (converted_at(path, models_dirs[0]) / "config.json").is_file():
        check_installed("gguf", f"model {spec.name!r}")
    return path.is_file() or has_tokenizer(path)


# ---------------------------------------------------------------- folders and GGUF files


def pinned_path(spec: ModelSpec, models_dirs: Sequence[str]) -> Path:
    """Return the folder or file of a local model with the content that its revision pins.

    ModelError: it is missing or incomplete, or has another content.
    """
    tried = [Path(folder).expanduser() / spec.location for folder in models_dirs]
    is_gguf, pinned = spec.source == "gguf", spec.revision
    there = [p for p in tried if (p.is_file() if is_gguf else (p / "config.json").is_file())]
    if not there:
        raise ModelError(
            f"model {spec.name!r}: no {spec.source} at {' or '.join(map(str, tried))}. Put the "
            "weights there (of SmolLM2: run `make weights`), or set exec.models_dir=[FOLDER]."
        )
    for path in there:  # a folder of models_dirs may have another model of this name
        if not is_gguf:
            check_folder(spec, path)
        is_pinned = pinned if is_gguf else pinned.startswith("sha256:")
        if not is_pinned or pinned == content_pin(path):
            return path
    raise ModelError(
        f"model {spec.name!r}: {there[0]} is {content_pin(there[0])}, but the model pins {pinned}. "
        "Get the pinned weights, or describe these as another model: model=FOLDER or FILE."
    )


def content_pin(path: Path) -> str:
    """Return 'sha256:...' of a GGUF file, or of a folder's config.json, weights and tokenizer.

    That of a folder is what `sha256sum FILES | sha256sum` prints in it, with config.json, the
    weights and the tokenizer's files in this order.
    """
    names = ["config.json", *sorted(weight_files(path)), *OF_TOKENIZER]
    files = [path] if path.is_file() else [p for p in map(path.joinpath, names) if p.is_file()]
    digests = [_sha256(p, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    if path.is_file():
        return f"sha256:{digests[0]}"
    listed = "".join(f"{digest}  {p.name}\n" for digest, p in zip(digests, files))
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"


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
    left_out = {"location", "revision", "attention", "mlp", "unembedding", "weights_dtype"}
    fields = {name: value for name, value in spec.plain().items() if name not in left_out}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return f"{spec.name}-{digest[:10]}.safetensors"


def recipe_weights(spec: ModelSpec, models_dirs: Sequence[str]) -> Path | None:
    """Find the weights of a recipe in the package or a models folder; None if there are none."""
    folders = [SHIPPED, *(Path(d).expanduser() for d in models_dirs)]
    paths = (folder / recipe_file_name(spec) for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def check_folder(spec: ModelSpec, folder: Path) -> None:
    """Raise ModelError if the weights of a local model are incomplete."""
    if problem := _problem(folder)[0]:
        raise ModelError(
            f"model {spec.name!r}: {folder} has {problem}. Copy the files again; save weights in "
            "another format, such as pytorch_model.bin, as safetensors first (save_pretrained)."
        )


def is_complete(folder: Path) -> bool:
    """Return whether a model's folder has all files of weights, of the size in their headers."""
    return not _problem(folder)[0]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model's folder has a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER)


def weight_files(folder: Path) -> list[str]:
    """Name the safetensors files that a model's folder should have."""
    if not (folder / SINGLE).is_file():  # transformers reads it, even beside an index
        # an unreadable index counts as none
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            names = json.loads((folder / INDEX).read_text())["weight_map"].values()
            return sorted({*map(str, names)})
    return [SINGLE]


def _problem(folder: Path) -> tuple[str, bool]:
    """Name a file of weights that is damaged (size not as in its header; True) or missing."""
    names = weight_files(folder)
    absent = [name for name in names if not (folder / name).is_file()]
    for path in (folder / name for name in names if name not in absent):
        size, header = path.stat().st_size, safetensors_header(path)
        if header is None or size != header[1]:
            says = f"and its header says {header[1]:,}" if header else "and no readable header"
            return f"an incomplete file of weights: {path} has {size:,} bytes, {says}", True
    there = f"{len(names) - len(absent)} of {len(names)} files of weights"
    return (f"{there}: no {absent[0]}", False) if absent else ("", False)


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


# ---------------------------------------------------------------- the hub


def check_cached(spec: ModelSpec, needed: bool) -> Path | None:
    """Return the folder of a hub model in the cache; None if the first run will download it.

    ModelError: it is inaccessible or damaged; or incomplete, although `needed` or offline.
    """
    from huggingface_hub import constants

    folder = cached_config(spec)
    problem, damaged = _problem(folder)
    if problem and (damaged or needed or constants.HF_HUB_OFFLINE):
        remedy = "Give the same command with action=fetch on a machine that reaches the hub."
        if damaged:
            remedy = f"Download it again: hf download {spec.location} --revision "
            remedy += f"{spec.revision or 'main'} --force-download --exclude 'original/*'"
        raise ModelError(f"model {spec.name!r}: {folder} has {problem}. {remedy}")
    return None if problem else folder


def cached_config(spec: ModelSpec) -> Path:
    """Cache a hub model's config.json; return its folder, named by commit. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(spec.location, "config.json", revision=spec.revision or None)
    except Exception as error:
        raise ModelError(from_hub(f"model {spec.name!r}", spec.location, error)) from error
    return Path(path).parent


def fetch(spec: ModelSpec) -> tuple[Path, int]:
    """Download a hub model unless it is cached; return its folder and size in bytes.

    ModelError: it is inaccessible or damaged.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        found = snapshot_download(
            spec.location,
            revision=spec.revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"],
            ignore_patterns=["original/*"],  # weights in Meta's format
            local_files_only=constants.HF_HUB_OFFLINE,  # some releases list the files online
        )
    except Exception as error:
        raise ModelError(from_hub(f"model {spec.name!r}", spec.location, error)) from error
    check_cached(spec, needed=True)
    return Path(found), sum(p.stat().st_size for p in Path(found).rglob("*") if p.is_file())


def license_of(spec: ModelSpec, models_dirs: Sequence[str]) -> dict[str, str]:
    """Return license, license_name and license_link of a base, from its card or a GGUF file.

    Empty if the license is not known.
    """
    given: Any = {}
    with suppress(Exception):  # a base without a readable card has no known license
        if spec.source == "gguf":
            import gguf

            fields = gguf.GGUFReader(pinned_path(spec, models_dirs)).fields
            named = {name: fields.get(f"general.{name.replace('_', '.')}") for name in LICENSE}
            given = {k: bytes(f.parts[f.data[0]]).decode() for k, f in named.items() if f}
        elif spec.source != "recipe":
            from huggingface_hub import hf_hub_download, metadata_load

            on_hub, name, revision = spec.source == "hub", "README.md", spec.revision or None
            path = None if on_hub else pinned_path(spec, models_dirs) / name
            given = metadata_load(path or hf_hub_download(spec.location, name, revision=revision))
    found = {k: v for k in LICENSE if isinstance(v := (given or {}).get(k), str) and v.strip()}
    if "license" not in found:
        return {}
    link = found.get("license_link", "")
    if spec.source == "hub" and link and "://" not in link:  # a file of the base's repository
        found["license_link"] = f"https://huggingface.co/{spec.location}/blob/main/{link}"
    return {**found, "license": found["license"].lower()}
