"""The adviser against published outcomes: the kept page is made from the rules as they are."""

from lorasweep.bench import outcomes_page
from lorasweep.customers.evidence import published


def test_the_kept_page_is_the_rules_and_shows_its_misses():
    text = outcomes_page.PAGE.read_text()
    assert text == outcomes_page.page()
    misses = [j for j in (*outcomes_page.outcomes(), *outcomes_page.rates()) if j.verdict == "miss"]
    assert text.count("**miss**") == len(misses) > 0


def test_no_row_is_judged_by_its_own_source():
    for j in (*outcomes_page.outcomes(), *outcomes_page.rates()):
        source = j.entry["source"]
        assert f"({source})" not in j.advice.rate.source
        kept = j.advice.published.values
        assert not [
            e for name in ("rates", "least_rank") for e in kept[name] if e["source"] == source
        ]
        where = published().values["sources"] | outcomes_page.read()["sources"]
        assert source in where


def test_known_cases_come_out_as_they_did():
    """Code and maths corpora: full fine-tuning won; instruction data and RL at rank 1: close."""
    found = {(j.entry["source"], j.entry["what"]): j.says for j in outcomes_page.outcomes()}
    assert found["biderman", "Starcoder-Python, 20B tokens"] == "behind"
    assert found["biderman", "OpenWebMath, 14.7B tokens"] == "behind"
    assert found["biderman", "Magicoder-Evol-Instruct, 73M tokens"] == "close"
    assert found["opd", "OpenThoughts3, 400,000 prompts"] == "behind"
    assert found["study", "MATH, GRPO-like, 10,000 problems x 32"] == "close"
