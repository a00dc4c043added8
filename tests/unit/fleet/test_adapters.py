"""The fleet's page and the cards: a mark for each gain, folded cards, the card's head."""

import dataclasses
import json
import re
from unittest import mock

import pytest
import torch
import yaml
from markupsafe import escape
from safetensors.torch import save_file

from lorasweep.data import text
from lorasweep.fleet import adapters
from lorasweep.fleet.choice import Outcome
from lorasweep.fleet.rows import Rows
from lorasweep.fleet.runs import Member
from lorasweep.models.find import license_of
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from tests.small_hub import llama_like
from tests.world import tiny_spec

NAME = '<b>&"x"'


def outcome(k, gain, error=0.01, **more):
    """A customer's outcome with a planted gain; without a gain, no row was held out."""
    data = DatasetSpec(name=f"c{k}", source="jsonl", location="data", template="{prompt}\n", **more)
    spec = tiny_spec(dataset=dataclasses.replace(data, train_split="train", test_split="train"))
    advised = {"method": "lora", "why": "it fits", "rank": 4, "load": 0.1, "lr_source": "a law"}
    rows = Rows(spec.dataset, 20, gain is not None)
    points = [Point(f"c{k}", spec)]
    member = Member("row", f"{NAME} {k}", f"c{k}", "", {**advised, "warnings": []}, rows, points)
    result = {"nll_start": 2 + (gain or 0), "test_nll": 2.0, "gain_se": error, "n_test": 9}
    tried = [{"lr": spec.lr, "run": spec.id, "state": "done", "validation": 1.0}]
    return Outcome(member, "", {}, tried, spec, result)


def failed(k):
    return dataclasses.replace(outcome(k, 0.1), spec=None, result={}, problem="it diverged")


def exported(found, folder, check=lambda *form: None):
    store = RunStore(folder / "runs")
    for o in found:
        if o.spec:
            store.folder(o.spec.id).mkdir(parents=True, exist_ok=True)
            weights = store.folder(o.spec.id) / checkpoint.WEIGHTS
            save_file({"a": torch.zeros(1)}, weights)

    def save(partial, *rest):
        partial.mkdir(parents=True, exist_ok=True)
        (partial / adapters.ADAPTER).write_bytes(b"")

    with (  # neither adapter nor rows are real ones
        mock.patch.object(adapters, "problems", return_value=[]),
        mock.patch.object(adapters.text, "check_served", check),
    ):
        return adapters.export(found, store, folder, "title", save, lambda model: llama_like())


GAINS = [0.1, -0.3, 0.5, None, 0.001, 0.5, -0.002]
MARKS = ["2 gained", "5 gained", "0 gained", "4 unknown", "6 unknown", "1 worse"]


def test_the_page_has_a_mark_a_row_and_a_folded_card_for_each_customer(tmp_path):
    exported([outcome(k, gain) for k, gain in enumerate(GAINS)] + [failed(7)], tmp_path)
    page = (tmp_path / adapters.PAGE).read_text()
    marks = re.findall(r'<a href="#c(\d)" title=.*?class="point (\w+)"', page)
    assert [" ".join(mark) for mark in marks] == MARKS and "Not shown: 2 without" in page
    cards = re.findall(r'<details class="card">.*?</details>', page, re.DOTALL)
    assert len(cards) == 8 and "<script" not in page and "it diverged" in cards[7]
    assert page.index("<figure") < page.index("<table") < page.index("<details")
    for k, card in enumerate(cards):  # a link opens a card because its target is inside
        assert f'<div id="c{k}">' in card and escape(f"{NAME} {k}") in card
        assert f'<td><a href="#c{k}">' in page
    for note in ("3 gained", "1 got worse", "2 gain uncertain", "1 too few unique"):
        assert f"<li>{note}" in page


def test_one_wide_interval_hides_no_other_and_no_gain_is_no_picture():
    facts = [o.facts() for o in (outcome(0, 0.1, 50.0), outcome(1, 0.2), outcome(2, 0.0, None))]
    small, wide, none = adapters._marks(facts)
    assert small["at"] - none["at"] > 10 and (wide["left"], wide["width"]) == (4, 92)
    assert none["width"] == 0 and none["zero"] == none["at"]
    assert adapters._marks([failed(0).facts(), outcome(1, None).facts()]) == []


def head_of(path):
    return yaml.safe_load(path.read_text().split("---\n")[1])


def test_the_head_of_a_card_names_license_and_data_sets_of_the_hub(tmp_path):
    here = outcome(0, 0.1)
    hub = dataclasses.replace(here.spec.model, source="hub", location="o/base", recipe=None)
    data = dataclasses.replace(here.spec.dataset, source="hub", location="o/rows", revision="ab")
    spec = dataclasses.replace(here.spec, model=hub, dataset=data)
    rows = dataclasses.replace(
        here.member.rows, dataset=data, example=[["```", False], ["x", True]]
    )
    license = {"license": "other", "license_name": "my-own", "license_link": "LICENSE"}
    member = dataclasses.replace(
        here.member, folder="a--b-", rows=rows, points=[Point("a", spec)], license=license
    )
    exported([here, dataclasses.replace(here, member=member, spec=spec)], tmp_path)
    common = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    assert head_of(tmp_path / "c0/README.md") == common
    assert "**license:** not known" in (tmp_path / "c0/README.md").read_text()
    named = {"base_model": "o/base", **license, "datasets": ["o/rows"], **common}
    assert head_of(tmp_path / "a--b-/README.md") == named
    card = (tmp_path / "a--b-/README.md").read_text()
    assert "**license:** my-own, the license of the base (LICENSE)" in card
    assert "hf upload OWNER/a-b a--b- --private" in card and "````text\n```⟦x⟧\n````" in card
    facts = json.loads((tmp_path / "a--b-/facts.json").read_text())
    assert facts["license"] == license and facts["seconds_used"] == 0


def test_without_a_form_for_servers_a_customer_has_an_error_and_no_folder(tmp_path):
    rows = {"messages": [{"role": "user", "content": "{prompt}"}], "example": [["{prompt}", False]]}
    here = outcome(0, 0.1)
    member = dataclasses.replace(here.member, rows=dataclasses.replace(here.member.rows, **rows))
    (found,) = exported([dataclasses.replace(here, member=member)], tmp_path, text.check_served)
    assert found.spec is None and "example: the chat template for servers" in found.problem
    assert not (tmp_path / "c0").exists() and not list(tmp_path.glob(".c0*"))


OWN = {"license": "other", "license_name": "own"}


@pytest.mark.parametrize(
    "head, known",
    [
        ("license: Apache-2.0", {"license": "apache-2.0"}),
        ("license: other\nlicense_name: own", OWN),
        ("license_name: own", {}),
        ("license: [a, b]", {}),
        ("language: en", {}),
    ],
)
def test_the_license_is_that_on_the_bases_card(head, known, tmp_path, monkeypatch):
    import huggingface_hub

    spec = ModelSpec(name="my", source="folder", location="base")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "base/model.safetensors")
    assert license_of(spec, [str(tmp_path)]) == {}
    card = tmp_path / "base/README.md"
    card.write_text(f"---\n{head}\n---\n# Base\n")
    assert license_of(spec, [str(tmp_path)]) == known
    assert license_of(spec, [str(tmp_path / "gone")]) == {}
    card.write_text(f"---\n{head}\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *name, revision: str(card))
    link = {"license_link": "https://huggingface.co/o/base/blob/main/LICENSE"}
    of_hub = license_of(ModelSpec(name="my", source="hub", location="o/base"), [])
    assert of_hub == (known and {**known, **link})
