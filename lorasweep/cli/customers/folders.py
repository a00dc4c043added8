"""A fleet's folder: one for each customer with its adapter and card, and the page over all."""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasweep.advise.advice import Failed
from lorasweep.cli.finished_runs import write_adapter
from lorasweep.errors import ModelError, SpecError
from lorasweep.fleet import pages
from lorasweep.fleet.outcome import Outcome
from lorasweep.fleet.rows import SPLITS, Rules
from lorasweep.spec.method import parse_layers
from lorasweep.store import checkpoint, files
from lorasweep.store.run_store import RunStore

ADAPTER = "adapter_model.safetensors"
CARD, FACTS, PAGE = "README.md", "facts.json", "index.html"
RULES = "fleet.json"
"""How the fleet reads rows and what it adapts, as it was decided when it was first asked for."""


def read_rules(folder: Path) -> Rules | None:
    """Return the rules that a fleet's folder keeps; None if there are none.

    Raises:
        SpecError: they cannot be read.
    """
    path = folder / RULES
    if not path.exists():
        return None
    try:
        found = Rules(**json.loads(path.read_text()))
        known = found.split in SPLITS and (found.render is None) == (found.template is None)
        parse_layers(found.layers)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} cannot be read ({error}). {_REMEDY}") from None
    if not known:
        raise SpecError(f"{path}: {json.dumps(dataclasses.asdict(found))} is not known. {_REMEDY}")
    return found


_REMEDY = (
    "It says how this fleet's rows are read. Get it back as it was, name another folder with "
    "out=DIR, or delete it, and what is trained by other rules is trained anew."
)


def write_rules(folder: Path, rules: Rules) -> None:
    """Keep the rules in a fleet's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(rules), indent=1)
    files.write_atomic(folder / RULES, text.encode())


def write(
    found: Sequence[Outcome | Failed], store: RunStore, folder: Path, title: str
) -> list[Outcome | Failed]:
    """Write the folders of customers with an adapter, and the page; return what became of each.

    A customer without an adapter keeps the folder that an earlier state of its data or of the
    settings left, and so does one that is no longer in the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [_kept(o, store, folder) if isinstance(o, Outcome) else o for o in found]
    page = pages.page(found, title, _earlier(folder, found))
    files.write_atomic(folder / PAGE, page.encode(errors="replace"))
    return found


def _kept(outcome: Outcome, store: RunStore, folder: Path) -> Outcome:
    """Write a customer's folder, unless it is there already; drop what other rates trained.

    A folder is exchanged as a whole, so a reader never meets a new adapter with an old card.
    """
    if outcome.spec is None:
        return outcome
    mine, facts = folder / outcome.member.folder, json.dumps(outcome.plain(), indent=1)
    there = mine / FACTS
    if not (there.is_file() and there.read_text() == facts and (mine / ADAPTER).is_file()):
        try:
            _write(outcome, store, mine, facts)
        except ModelError as error:
            return dataclasses.replace(outcome, spec=None, result={}, problem=str(error))
    for tried in outcome.tried:
        if tried.run != outcome.spec.id:
            (store.folder(tried.run) / checkpoint.WEIGHTS).unlink(missing_ok=True)
    return outcome


def _write(outcome: Outcome, store: RunStore, folder: Path, facts: str) -> None:
    """Write a customer's folder.

    Raises:
        ModelError: its weights are not there, or are not what PEFT would read.
    """
    spec = outcome.spec
    assert spec is not None
    weights = checkpoint.load_weights(store.folder(spec.id))
    if weights is None:
        raise ModelError(
            f"the weights of run {spec.id} were not kept, as other rates were chosen before or it "
            "was trained in a sweep. Train it again: python -m lorasweep action=adapter "
            f"run={spec.id} out=FOLDER"
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-{os.urandom(3).hex()}")
    write_adapter(partial, spec, weights, outcome.result.get("base_commit"), outcome.base)
    pages.write(partial / CARD, pages.card(outcome))
    (partial / FACTS).write_text(facts)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:  # another command wrote the same, as a job that follows does
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def _earlier(folder: Path, found: Sequence[Outcome | Failed]) -> dict[str, dict[str, Any]]:
    """Return the facts of adapters in the folder that are not of this table's state, by folder."""
    now = {o.member.folder for o in found if isinstance(o, Outcome) and o.spec is not None}
    earlier = {}
    for path in sorted(folder.glob(f"*/{FACTS}")):
        if path.parent.name not in now and not path.parent.name.startswith("."):
            with suppress(OSError, ValueError):
                earlier[path.parent.name] = json.loads(path.read_text())
    return earlier
