"""The fleet's page and the cards: the picture of all gains, folded cards, the card's head."""

import dataclasses
import json
import re
from itertools import pairwise
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch
import yaml
from markupsafe import escape
from safetensors.torch import save_file

from lorasweep.fleet import adapters
from lorasweep.fleet.outcome import GAINED, UNKNOWN, WORSE, Outcome, Tried
from lorasweep.fleet.picture import KINDS, _ticks, picture_of
from lorasweep.fleet.rows import Rows
from lorasweep.fleet.runs import Member
from lorasweep.models.find import license_of
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from tests.bpe import llama_like
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
    return Outcome(member, [Tried(spec.lr, spec.id, "done", 1.0)], spec, result, "")


def failed(k):
    return dataclasses.replace(outcome(k, 0.1), spec=None, result={}, problem="it diverged")


def exported(found, folder, tokenizer=llama_like):
    store = RunStore(folder / "runs")
    for o in found:
        if o.spec:
            store.folder(o.spec.id).mkdir(parents=True, exist_ok=True)
            weights = store.folder(o.spec.id) / checkpoint.WEIGHTS
            save_file({"a": torch.zeros(1)}, weights)

    def save(partial, *rest):
        partial.mkdir(parents=True, exist_ok=True)
        (partial / adapters.ADAPTER).write_bytes(b"")

    with mock.patch.object(adapters, "problems", return_value=[]):  # the adapter is no real one
        return adapters.export(found, store, folder, "title", save, lambda model: tokenizer())


def svg_of(page):
    (found,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    return ElementTree.fromstring(found)


GAINS = [0.1, -0.3, 0.5, None, 0.001, 0.5, -0.002]
VERDICTS = [GAINED, WORSE, GAINED, None, UNKNOWN, GAINED, UNKNOWN]


def test_the_picture_has_a_mark_a_customer_in_sorted_order(tmp_path):
    found = [outcome(k, gain) for k, gain in enumerate(GAINS)] + [failed(7)]
    exported(found, tmp_path)
    page = (tmp_path / adapters.PAGE).read_text()
    svg = svg_of(page)
    marks = [a for a in svg.iter("a") if a.get("class") == "mark"]
    assert [a.get("href") for a in marks] == ["#c2", "#c5", "#c0", "#c4", "#c6", "#c1"]
    shape = {"gained": "circle", "worse": "rect", "unknown": "path"}
    for a in marks:
        k = int(a.get("href")[2:])
        kind = KINDS[VERDICTS[k]]
        (drawn,) = [e for e in a if e.tag in shape.values()]
        assert (drawn.tag, drawn.get("class")) == (shape[kind], kind)
        assert a.find("title").text.startswith(f"{NAME} {k}: {GAINS[k]:+.3g} nats per token, ")
        assert a.find("text").text == f"{NAME} {k}"
        (line,) = [e for e in a if e.tag == "line"]
        zero = float(svg.find("line[@class='zero']").get("x1"))
        left, right = float(line.get("x1")), float(line.get("x2"))
        assert {"gained": left > zero, "worse": right < zero}.get(kind, left < zero < right)
    assert "2 without an adapter or without held-out rows" in page
    assert svg.find("title").text and "3 gained, 1 got worse, 2 not known" in svg.find("desc").text
    legend = [e.text for e in svg.findall("text")]
    assert {"gained (3)", "got worse (1)", "not known (2)", "0"} <= set(legend)
    assert any("nats per token" in text for text in legend) and "<script" not in page
    # cards fold away; a link opens one because its target is inside
    cards = re.findall(r'<details class="card">.*?</details>', page, re.DOTALL)
    assert len(cards) == 8 and page.index("<svg") < page.index("<table") < page.index("<details")
    for k, card in enumerate(cards):
        assert f'<div id="c{k}">' in card and escape(f"{NAME} {k}") in card
        assert f'<td><a href="#c{k}">' in page
    assert "it diverged" in cards[7] and "gain not measured" in cards[3]


def test_the_picture_of_none_one_and_many():
    assert picture_of([failed(0), outcome(1, None)]) is None
    one = picture_of([outcome(0, 0.0, None)])
    assert one["marks"][0]["line"] == [] and one["left"] < one["zero"] < one["right"]
    many = picture_of([outcome(k, 0.01 * k, 0.001) for k in range(200)])
    assert [m["k"] for m in many["marks"]] == list(range(199, -1, -1))
    rows = [m["y"] for m in many["marks"]]
    assert all(b - a >= 7 for a, b in pairwise(rows)) and many["bottom"] < 1600
    named = [m["y"] for m in many["marks"] if m["name"]]
    assert len(named) == 100 and all(b - a >= 12 for a, b in pairwise(named))
    assert 3 <= len(many["ticks"]) <= 7


def test_one_wide_interval_hides_no_other():
    shown = picture_of([outcome(0, 0.1, 50.0), outcome(1, 0.2), outcome(2, 0.3)])
    places = [m["x"] for m in shown["marks"]]
    assert max(places) - min(places) > 100
    (wide,) = [m for m in shown["marks"] if m["k"] == 0]
    assert [way for _, way in wide["arrows"]] == [-1, 1]
    assert wide["line"] == [shown["left"], shown["right"]]


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (-0.1, 0.1, [-0.1, -0.05, 0, 0.05, 0.1]),
        (-1, 6, [0, 2, 4, 6]),
        (0, 7e-6, [0, 2e-6, 4e-6, 6e-6]),
    ],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert _ticks(low, high) == pytest.approx(ticks, abs=1e-12)


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


def test_without_its_tokenizer_or_form_a_customer_has_an_error_and_no_folder(tmp_path, monkeypatch):
    rows = {"messages": [{"role": "user", "content": "{prompt}"}], "example": [["{prompt}", False]]}
    here = outcome(0, 0.1)
    member = dataclasses.replace(here.member, rows=dataclasses.replace(here.member.rows, **rows))
    (found,) = exported([dataclasses.replace(here, member=member)], tmp_path)
    assert found.spec is None and "example: the chat template for servers" in found.problem
    assert not (tmp_path / "c0").exists() and not list(tmp_path.glob(".c0*"))


@pytest.mark.parametrize(
    "head, known",
    [
        ("license: Apache-2.0", {"license": "apache-2.0"}),
        ("license: other\nlicense_name: own", {"license": "other", "license_name": "own"}),
        ("license_name: own", {}),
        ("license: [a, b]", {}),
        ("language: en", {}),
    ],
)
def test_the_license_is_that_on_the_bases_card(head, known, tmp_path):
    spec = ModelSpec(name="my", source="folder", location="base")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "base/model.safetensors")
    assert license_of(spec, [str(tmp_path)]) == {}
    (tmp_path / "base/README.md").write_text(f"---\n{head}\n---\n# Base\n")
    assert license_of(spec, [str(tmp_path)]) == known
    assert license_of(spec, [str(tmp_path / "gone")]) == {}


def test_the_license_of_a_gguf_file_and_of_the_hub(tmp_path, monkeypatch):
    import gguf
    import huggingface_hub

    writer = gguf.GGUFWriter(tmp_path / "my.gguf", "llama")
    writer.add_license("MIT")
    writer.add_tensor("a", torch.zeros(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    spec = ModelSpec(name="my", source="gguf", location="my.gguf")
    assert license_of(spec, [str(tmp_path)]) == {"license": "mit"}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *name, revision: str(card))
    found = license_of(ModelSpec(name="my", source="hub", location="o/base"), [])
    link = "https://huggingface.co/o/base/blob/main/LICENSE"
    assert found == {"license": "other", "license_name": "own", "license_link": link}
