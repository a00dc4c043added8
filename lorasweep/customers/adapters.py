"""Export adapters: a folder for each customer with its adapter, card and facts, and the page."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasweep.customers import fleet_page
from lorasweep.customers.outcome import Outcome
from lorasweep.errors import ModelError
from lorasweep.store import checkpoint, files
from lorasweep.store.run_store import RunStore

ADAPTER = "adapter_model.safetensors"
CARD, FACTS, PAGE = "README.md", "facts.json", "index.html"
WriteAdapter = Callable[..., None]
"""(folder, spec, weights, commit of the base, its name): writes a folder that PEFT loads."""


def export(
    found: Sequence[Outcome], store: RunStore, folder: Path, title: str, save: WriteAdapter
) -> list[Outcome]:
    """Write the folders of customers with an adapter, and the page; return the outcomes.

    A customer without an adapter keeps the folder of an earlier state of its data or settings, and
    so does one that is no longer in the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [_export(o, store, folder, save) if o.spec else o for o in found]
    page = fleet_page.page(found, title, _earlier(folder, found))
    files.write_atomic(folder / PAGE, page.encode(errors="replace"))
    return found


def _export(outcome: Outcome, store: RunStore, folder: Path, save: WriteAdapter) -> Outcome:
    """Write a customer's folder unless it is up to date; drop the weights of the other runs."""
    mine, facts = folder / outcome.member.folder, json.dumps(outcome.plain(), indent=1)
    there = mine / FACTS
    if not (there.is_file() and there.read_text() == facts and (mine / ADAPTER).is_file()):
        try:
            _write(outcome, store, mine, facts, save)
        except ModelError as error:
            return dataclasses.replace(outcome, spec=None, result={}, problem=str(error))
    for tried in outcome.tried:
        if tried.run != outcome.spec.id:
            (store.folder(tried.run) / checkpoint.WEIGHTS).unlink(missing_ok=True)
    return outcome


def _write(outcome: Outcome, store: RunStore, folder: Path, facts: str, save: WriteAdapter) -> None:
    """Replace a customer's folder as a whole, so that no reader finds an old card in it.

    Raises:
        ModelError: its weights are not there, or are not what PEFT would read.
    """
    spec = outcome.spec
    weights = checkpoint.load_weights(store.folder(spec.id))
    if weights is None:
        raise ModelError(
            f"the weights of run {spec.id} were not kept: another learning rate was chosen before, "
            "or it was trained in a sweep. Train it again: python -m lorasweep action=adapter "
            f"run={spec.id} out=FOLDER"
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-{os.urandom(3).hex()}")
    save(partial, spec, weights, outcome.result.get("base_commit"), outcome.base)
    # text that UTF-8 cannot hold is written with question marks
    card = fleet_page.card(outcome)
    (partial / CARD).write_text(card, encoding="utf-8", errors="replace")
    (partial / FACTS).write_text(facts)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:  # another command wrote the same, as a follow-up job does
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def _earlier(folder: Path, found: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Return the facts of adapters in the folder that are not of this table's state, by folder."""
    now = {o.member.folder for o in found if o.spec is not None}
    earlier = {}
    for path in sorted(folder.glob(f"*/{FACTS}")):
        if path.parent.name not in now and not path.parent.name.startswith("."):
            with suppress(OSError, ValueError):
                earlier[path.parent.name] = json.loads(path.read_text())
    return earlier
