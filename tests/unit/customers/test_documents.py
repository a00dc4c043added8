"""The page of customers and the guide are those of the table and of the columns."""

import csv
import re

from lorasweep.customers import pages
from lorasweep.customers.advice import answers
from lorasweep.customers.read import COLUMNS, Failed, read_customers
from tests.unit.customers.world import known
from tests.world import ROOT

CUSTOMERS = ROOT / "docs/customers.csv"


def test_the_customers_are_many_and_varied_and_all_are_answered():
    found = answers(read_customers(CUSTOMERS), known())
    assert len(found) >= 100 and not [a.error for a in found if isinstance(a, Failed)]
    sizes = [a.model.n_params for a in found]
    assert min(s for s in sizes if s > 1e8) < 0.7e9 and max(sizes) > 230e9
    assert {a.choice.method for a in found} == {"lora", "full", "open"}
    assert {a.choice.by for a in found} == {"map", "capacity"}
    assert {a.customer.task for a in found} == {"sft", "rl"}
    assert len({a.costs.hardware.name for a in found}) >= 4
    with CUSTOMERS.open() as text:
        filled = {k for row in csv.DictReader(text) for k, v in row.items() if v}
    assert COLUMNS.keys() - filled == {"data", "n_experts", "n_active_experts"}


def test_the_kept_page_is_that_of_the_table():
    """Made by `python -m lorasweep action=advise customers=docs/customers.csv out=docs/customers.md`."""
    found = answers(read_customers(CUSTOMERS), known())
    kept = (ROOT / "docs/customers.md").read_text()
    assert kept == pages.markdown(found, "customers"), "answers have changed: make the page again"


def test_the_guide_names_every_column():
    text = (ROOT / "docs/advice.md").read_text()
    rows = re.search(r"\| column \|.*?\n\n", text, re.DOTALL)[0]
    named = set(
        re.findall(r"`(\w+)`", "\n".join(r.split("|")[1] for r in rows.splitlines() if "|" in r))
    )
    assert named == COLUMNS.keys()
