"""Customers become runs; which runs a customer still needs, and what is chosen, from planted losses on
validation rows; the fleet's page and the cards."""

import dataclasses
import json
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from markupsafe import escape
from safetensors.torch import save_file

from lorasweep.advise.read import check_rows
from lorasweep.advise.rules import APART
from lorasweep.data import text
from lorasweep.errors import SpecError
from lorasweep.fleet import adapters
from lorasweep.fleet.choice import MOST_TRIED, Outcome, outcome_of, with_further
from lorasweep.fleet.rows import Rows, Rules
from lorasweep.fleet.runs import RULES, Member, build_runs, folder_of, planned, read_rules
from lorasweep.methods.lora import LoRA
from lorasweep.models.find import license_of
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, around
from tests.customers import known, make_base, write_json, write_rows
from tests.small_hub import llama_like
from tests.world import ROOT, compose_request, tiny_spec


@pytest.fixture
def data(tmp_path):

    row = {"model": f"{make_base(tmp_path / 'base')}/config.json", "task": "sft"}

    def write(name, count, **more):
        path = write_rows(tmp_path / f"{name}.jsonl", count, "Yes {k}")
        return {**row, "name": name, "data": str(path), **more}

    return write


def plan(rows, rates=3, instead_of_full="", world=None, **fields):
    point = Point("lora", tiny_spec(**{"method": LoRA(rank=16), **fields}))
    asked = {"points": [point], "rates": rates, "instead_of_full": instead_of_full}
    customers = check_rows([(f"row {k}", r) for k, r in enumerate(rows, 2)])
    request, tokenizer = (
        dataclasses.replace(compose_request([]), **asked),
        lambda model: llama_like(),
    )
    return build_runs(customers, world or known(None), request, Rules(), tokenizer)


def test_one_name_one_folder_whatever_the_name(tmp_path):
    names = ["acme", "Acme", "ACME", "../../etc", "a/b", "a b", "<script>", "", "é", "x" * 300]
    names += ["..", "\ud800"]
    folders = [folder_of(n) for n in names]
    assert len(set(folders)) == len(names) and folders[0] == "acme"
    for folder in folders:
        (tmp_path / folder).mkdir()
        assert (tmp_path / folder).parent == tmp_path and len(folder) <= 64 and folder.islower()


def test_a_customer_becomes_a_run_for_each_learning_rate(data):
    member, small = plan([data("good", 40, epochs=4), data("few", 4)])
    low, middle, high = (p.spec.lr for p in member.points)
    assert [low, high] == pytest.approx([middle / 3, 3 * middle], rel=0.01)
    spec = member.points[0].spec
    assert (spec.batch_size, spec.steps) == (8, 16) and spec.dataset.n_validation == 4
    assert spec.method.rank == member.advised["rank"] and spec.method.alpha == 32
    assert len(small.points) == 1 and not small.rows.held_out
    assert [len(m.points) for m in plan([data("good", 40)], rates=1)] == [1]


WRONG = {  # columns beside those of a good customer -> the problem
    "no rows": {"data": "silent.jsonl", "max_length": 16},
    "has the columns text": {"data": "other.jsonl"},
    "no token counts in the loss": {"data": "unlearned.jsonl"},
    "brackets.jsonl:41: not a JSON row": {"data": "brackets.jsonl"},
    "digits.jsonl:41: not a JSON row": {"data": "digits.jsonl"},
    "training rows. Set the column max_length to": {"data": "long.jsonl", "max_length": 64},
    "has no rows": {"data": "empty.jsonl"},
    "is no file": {"data": "gone"},
    "not by rl": {"task": "rl"},
    "data: missing": {"data": ""},
    "column validation: only with data": {"data": "", "validation": "a.jsonl"},
    "column validation: gone.jsonl is no other file beside good": {"validation": "gone.jsonl"},
    "column model: model 'gone' not found": {"model": "gone"},
    "the adviser says full": {"data": "big.jsonl", "bits_per_token": 20},
}


def test_a_wrong_customer_affects_no_other(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "silent.jsonl", 40, "Yes {k}", question="How many? " * 40)
    write_rows(tmp_path / "long.jsonl", 40, "Yes " * 99)
    write_rows(tmp_path / "big.jsonl", 300, "Yes {k}")
    write_json(tmp_path / "other.jsonl", [{"text": "a"}])
    write_json(tmp_path / "empty.jsonl", [])
    answer = {"role": "assistant", "content": "Yes", "weight": 0}
    said = [[{"role": "user", "content": f"So? {k}"}, answer] for k in range(40)]
    write_json(tmp_path / "unlearned.jsonl", [{"messages": messages} for messages in said])
    for name, odd in (("brackets", "[" * 100_000), ("digits", "9" * 5000)):
        path = write_rows(tmp_path / f"{name}.jsonl", 40, "Yes {k}")
        path.write_text(path.read_text() + odd + "\n")
    good = data("good", 40)
    first, *found = plan([good, *({**good, "name": k, **WRONG[k]} for k in WRONG)])
    assert len(first.points) == 3 and not first.problem
    for k, (says, wrong) in enumerate(zip(WRONG, found, strict=True)):
        assert says in wrong.problem and wrong.problem.startswith(f"row {k + 3}: ")
        assert not wrong.points
    (asked,) = plan([{**good, **WRONG["the adviser says full"]}], instead_of_full="lora")
    assert asked.advised["method"] == "full" and asked.points[0].spec.method.name == "lora"


def test_early_stopping_is_left_out_where_it_could_do_nothing_and_survives_json(data):
    table = [data("good", 40, epochs=4), data("few", 4), data("short", 40, steps=3)]
    found = plan([*table, data("wrong", 40, task="rl")], early_stopping=2)
    good, few, short, _ = found
    assert {p.spec.early_stopping for p in good.points} == {2} and not good.not_early
    assert {p.spec.early_stopping for m in (few, short) for p in m.points} == {0}
    assert "4 are the fewest" in few.not_early and "3 updates" in short.not_early
    values = json.loads(json.dumps([m.plain() for m in found]))
    assert planned(values, [p for m in found for p in m.points]) == found


def test_a_base_of_more_than_one_gpu_is_its_customers_error(data):
    small = data("small", 40)
    on_h100 = dataclasses.replace(known(None), hardware=known(None).machines["h100"]())
    large = {**small, "name": "large", "model": "llama-3.1-70b"}
    fits, refused = plan([small, large], world=on_h100, precision="bf16")
    assert fits.points and "llama-3.1-70b takes" in refused.problem


GOLDEN = json.loads((ROOT / "tests/golden/fleet_ids.json").read_text())


@pytest.fixture
def customers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("ann.jsonl"), 40, "357 in all {k}")
    prompts = [f"Is it late? {k % 40}" for k in range(200)]
    shared = [{"prompt": p, "completion": f"No! {k}"} for k, p in enumerate(prompts)]
    write_json(Path("bob.jsonl"), shared)
    write_rows(Path("own/train.jsonl"), 30, "Yes {k}")
    write_rows(Path("own/test.jsonl"), 9, "Yes {k}", start=100)
    turns = [(("user", f"So? {k}"), ("assistant", f"No {k}")) for k in range(25)]
    chats = [[{"role": role, "content": text} for role, text in t] for t in turns]
    write_json(Path("chat.jsonl"), [{"messages": chat} for chat in chats])
    write_rows(Path("few.jsonl"), 5, "Yes {k}")
    row = {"model": "smollm2-135m", "task": "sft", "epochs": 2}
    data = {n: f"{n}.jsonl" for n in ("ann", "bob", "chat", "few")} | {"own": "own"}
    return check_rows([(n, {"name": n, "data": d, **row}) for n, d in data.items()])


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("kind", GOLDEN)
def test_runs_keep_their_ids(customers, scale, kind):
    """By the rules of new fleets, and of those whose folder says less; at every scale the same."""
    rules = Rules(answers="all", whole_prompt=True) if kind == "new" else Rules()
    options = ["action=fleet", "customers=c.csv", f"scale={scale}", "precision=fp32"]
    request, tokenizer = compose_request(options), lambda model: llama_like()
    found = build_runs(customers, known(None), request, rules, tokenizer)
    assert {m.name: [p.id for p in m.points] for m in found} == GOLDEN[kind]


def test_the_rules_are_kept_in_the_folder_and_earlier_ones_said_less(tmp_path):
    earlier = {"template": None, "render": None, "mask": None, "split": "prompt", "layers": "all"}
    rules = Rules(answers="all", serve="vllm")
    (tmp_path / RULES).write_text(json.dumps(vars(rules)))
    assert read_rules(tmp_path) == rules
    (tmp_path / RULES).write_text(json.dumps(earlier))
    assert read_rules(tmp_path) == Rules() and (Rules().answers, Rules().serve) == ("last", "peft")
    for odd in ({"answers": "some"}, {"split": "row"}, {"render": "role_eos"}):
        (tmp_path / RULES).write_text(json.dumps(earlier | odd))
        with pytest.raises(SpecError, match="is not known"):
            read_rules(tmp_path)


# ---------------------------------------------------------------- which rate is chosen

# Rates are counted in steps of APART from the advised one, which is 0.
ADVISED = 1e-3
DATA = DatasetSpec("ann", source="jsonl", location="ann", n_validation=4, n_test=4, n_test_curve=4)


def place(spec):
    return round(math.log(spec.lr / ADVISED, APART))


def around_advised(rates=3, centre=ADVISED, **fields):
    spec = tiny_spec(method=LoRA(rank=4), dataset=DATA, **fields)
    lrs = around(centre, rates, APART)
    return [Point("ann", dataclasses.replace(spec, lr=lr)) for lr in lrs]


def end(store, spec, loss, **more):
    """Write how a run ended; `loss` is that on validation rows, None if it diverged."""
    result = {"state": "diverged" if loss is None else "done", "wall_s": 1.0, "nll_start": 9.0}
    if loss is not None:
        result |= {"test_nll_curve": loss, **({"test_nll": loss + 1} if spec.test_rows else {})}
    store.put(spec, {**result, **more})


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


def played(store, loss, first=None, go_on=True, start=99.0):
    """Train what is asked for until nothing is; returns all runs, and how many each stage had."""
    points, stages = with_further(first or around_advised(), store, go_on), []
    while todo := [p for p in points if store.result(p.id) is None]:
        stages.append(len(todo))
        for p in todo:
            measured = {"trial": p.spec.trial.id, "wall_s": 1.5}
            more = measured if p.spec.test_rows else {"nll_start_curve": start}
            end(store, p.spec, loss(place(p.spec)), **more)
        points = with_further(points, store, go_on)
    return points, stages


def outcome(points, store):
    rows = Rows(dataset=DATA, n_train=9, held_out=True)
    advised = dict.fromkeys(("method", "why", "rank", "load", "lr_source", "warnings"))
    return outcome_of(Member("row 2", "ann", "ann", "", advised, rows, points), store)


def valley(best):
    return lambda k: 2.0 + abs(k - best)


@pytest.mark.parametrize("best", range(-4, 5))
def test_rates_go_on_until_the_best_is_inside_or_six_were_tried(store, best):
    points, stages = played(store, valley(best))
    found = outcome(points, store)
    tried = [place(p.spec) for p in points if not p.spec.test_rows]
    n = min(3 + abs(best), MOST_TRIED)
    assert len(tried) == n and tried == sorted(tried) == list(range(tried[0], tried[0] + n))
    assert [t["lr"] for t in found.tried] == [p.spec.lr for p in points[:n]]
    edge = {4: "highest", -4: "lowest"}.get(best, "")
    assert place(found.spec) == best and found.spec.test_rows and found.facts()["edge"] == edge
    assert found.result["test_nll"] == 3.0 and stages == [3, *[1] * (n - 3), 1]
    # the seconds of the run that was measured include its trial's
    assert found.seconds_used == pytest.approx(n + 0.5)
    assert all(with_further(p, store, True) == points for p in (points, around_advised()))


def test_a_diverged_rate_is_worse_than_any_and_of_equal_losses_the_lower_rate_is_better(store):
    found = outcome(played(store, lambda k: None if k > 1 else 5.0 - k)[0], store)
    assert (place(found.spec), found.facts()["edge"]) == (1, "")
    assert found.tried[-1]["validation"] is None
    found = outcome(played(store, lambda k: 1.0, around_advised(seed=7))[0], store)
    assert found.facts()["edge"] == "lowest" and len(found.tried) == MOST_TRIED
    # all diverge: an error after six
    points, stages = played(store, lambda k: None, around_advised(seed=8))
    found = outcome(points, store)
    assert sum(stages) == MOST_TRIED == len(points) and place(points[0].spec) == -4
    assert found.spec is None and "every learning rate diverged" in found.problem and not found.open


@pytest.mark.parametrize(
    ("slope", "bend", "hurts"), [(1.0, 0.0, True), (1.0, 1.0, True), (-0.3, 1.0, False)]
)
def test_no_lower_rate_is_tried_where_training_hurts_at_every_rate(store, slope, bend, hurts):
    """Loss 2 + slope * lr + bend * lr^2 in units of the lowest rate: lower ones only train less."""
    losses = {k: 2.0 + slope * 3.0 ** (k + 1) + bend * 9.0 ** (k + 1) for k in range(-9, 9)}
    points, _ = played(store, losses.get, start=2.0)
    found = outcome(points, store)
    assert found.hurts == found.facts()["hurts"] == hurts and found.facts()["edge"] == ""
    assert len(found.tried) == (3 if hurts else 6)
    assert place(found.spec) == (-1 if hurts else -3)


@pytest.mark.parametrize("rates", [1, 3, 5])
def test_rates_that_are_given_are_tried_and_no_others(store, rates):
    points, _ = played(store, valley(4), around_advised(rates), go_on=False)
    found = outcome(points, store)
    assert len(found.tried) == rates and len(points) == rates + (rates > 1)
    edge = "highest" if rates > 1 else ""
    assert (place(found.spec), found.facts()["edge"]) == (rates // 2, edge)


def test_what_is_left_is_open_and_no_rate_is_tried_that_a_run_may_not_have(store):
    points = with_further(around_advised(), store, True)
    for k, p in enumerate(points):
        found = outcome(points, store)
        assert found.open and found.problem == f"not trained yet: {3 - k} of 3 runs"
        end(store, p.spec, 5.0 - place(p.spec))
    # the fourth run is not in `points` yet, but the best of three may not be the best
    assert outcome(points, store).open
    further = with_further(points, store, True)
    assert [place(p.spec) for p in further] == [-1, 0, 1, 2]
    high = around_advised(3, 20.0, seed=3)
    assert len(played(store, valley(99), high)[1]) == 2  # 60 is the highest below 100


def test_a_rate_that_breaks_on_test_rows_counts_as_diverged(store):
    points, _ = played(store, valley(0))
    again = RunStore(store.root.with_name("other"))
    for p in points:
        end(again, p.spec, None if p.spec.test_rows else valley(0)(place(p.spec)))
    found = outcome(played(again, valley(0))[0], again)
    assert (place(found.spec), found.facts()["edge"]) == (-1, "")
    assert found.tried[2]["validation"] is None


@pytest.mark.parametrize(
    "before, error, gained",
    [(9.5, 0.1, "gained"), (9.2, 0.1, "gain uncertain"), (8.5, 0.1, "got worse"), (8.5, None, "gain uncertain")],
)  # fmt: skip
def test_the_verdict_of_a_gain_is_by_its_interval(store, before, error, gained):
    """4 rows: Student's t of 3 degrees of freedom is 3.18."""
    found = outcome(played(store, valley(0))[0], store)
    result = {"nll_start": before, "test_nll": 9.0, "gain_se": error, "n_test": 4}
    facts = dataclasses.replace(found, result=found.result | result).facts()
    assert facts["gained"] == gained
    ends = error and pytest.approx((before - 9.318, before - 8.682), abs=1e-3)
    assert facts["gain_interval"] == ends


# ---------------------------------------------------------------- the page and the cards

NAME = '<b>&"x"'


def with_gain(k, gain, error=0.01, **more):
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


def test_the_page_has_a_row_and_a_folded_card_for_each_customer(tmp_path):
    failed = dataclasses.replace(with_gain(7, 0.1), spec=None, result={}, problem="it diverged")
    gains = (0.1, -0.3, 0.5, None, 0.001, 0.5, -0.002)
    exported([*(with_gain(k, gain) for k, gain in enumerate(gains)), failed], tmp_path)
    page = (tmp_path / adapters.PAGE).read_text()
    cards = re.findall(r'<details class="card">.*?</details>', page, re.DOTALL)
    assert len(cards) == 8 and "<script" not in page and "it diverged" in cards[7]
    for k, card in enumerate(cards):  # a link opens a card because its target is inside
        assert f'<div id="c{k}">' in card and escape(f"{NAME} {k}") in card
        assert f'<td><a href="#c{k}">' in page
    for note in ("3 gained", "1 got worse", "2 gain uncertain", "1 too few unique"):
        assert f"<li>{note}" in page


def test_the_head_of_a_card_names_license_and_data_sets_of_the_hub(tmp_path):
    here = with_gain(0, 0.1)
    hub = dataclasses.replace(here.spec.model, source="hub", location="o/base", recipe=None)
    data = dataclasses.replace(here.spec.dataset, source="hub", location="o/rows", revision="ab")
    spec = dataclasses.replace(here.spec, model=hub, dataset=data)
    example = [["```", False], ["x", True]]
    rows = dataclasses.replace(here.member.rows, dataset=data, example=example)
    license = {"license": "other", "license_name": "my-own", "license_link": "LICENSE"}
    named = {"folder": "a--b-", "rows": rows, "points": [Point("a", spec)], "license": license}
    member = dataclasses.replace(here.member, **named)
    exported([here, dataclasses.replace(here, member=member, spec=spec)], tmp_path)
    common = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    named = {"base_model": "o/base", **license, "datasets": ["o/rows"], **common}
    plain, card = ((tmp_path / name / "README.md").read_text() for name in ("c0", "a--b-"))
    assert [yaml.safe_load(text.split("---\n")[1]) for text in (plain, card)] == [common, named]
    assert "**license:** not known" in plain and "my-own, the license of the base (LI" in card
    assert "hf upload OWNER/a-b a--b- --private" in card and "````text\n```⟦x⟧\n````" in card


def test_without_a_form_for_servers_a_customer_has_an_error_and_no_folder(tmp_path):
    rows = {"messages": [{"role": "user", "content": "{prompt}"}], "example": [["{prompt}", False]]}
    here = with_gain(0, 0.1)
    member = dataclasses.replace(here.member, rows=dataclasses.replace(here.member.rows, **rows))
    (found,) = exported([dataclasses.replace(here, member=member)], tmp_path, text.check_served)
    assert found.spec is None and "example: the chat template for servers" in found.problem
    assert not (tmp_path / "c0").exists() and not list(tmp_path.glob(".c0*"))


def test_the_license_is_that_on_the_bases_card(tmp_path, monkeypatch):
    spec = ModelSpec(name="my", source="folder", location="base")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "base/model.safetensors")
    assert license_of(spec, [str(tmp_path)]) == {}
    card, link = tmp_path / "base/README.md", "https://huggingface.co/o/base/blob/main/LICENSE"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *name, revision: str(card))
    for head, found in (
        ("license: Apache-2.0", {"license": "apache-2.0"}),
        ("license: other\nlicense_name: own", {"license": "other", "license_name": "own"}),
        ("license: [a, b]", {}),
    ):
        card.write_text(f"---\n{head}\nlicense_link: LICENSE\n---\n# Base\n")
        assert license_of(spec, [str(tmp_path)]) == (found and {**found, "license_link": "LICENSE"})
        of_hub = license_of(ModelSpec(name="my", source="hub", location="o/base"), [])
        assert of_hub == (found and {**found, "license_link": link})
