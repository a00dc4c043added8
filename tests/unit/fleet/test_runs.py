"""Customers become runs; which runs a customer still needs, and what is chosen, from planted losses on
validation rows; the fleet's page and the cards. A customer's rows: their form, which are training,
validation and test rows, and rows of the hub."""

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
from transformers import GenerationConfig

from lorasweep.advise.read import RowError, check_rows
from lorasweep.advise.rules import APART
from lorasweep.data import messages, splits, tokenizing
from lorasweep.errors import DataError, SpecError
from lorasweep.fleet import adapters
from lorasweep.fleet.choice import MOST_TRIED, Outcome, outcome_of, with_further
from lorasweep.fleet.rows import Rows, Rules, named_rows, rows_of
from lorasweep.fleet.runs import RULES, Member, build_runs, folder_of, planned, read_rules, rules_of
from lorasweep.methods.lora import LoRA
from lorasweep.models.find import license_of
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.recommended import LAYERS
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, around
from tests import small_hub
from tests.customers import CHAT_TEMPLATE, known, make_base, write_json, write_rows
from tests.small_hub import llama_like, qwen_like, with_chat
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
    request = dataclasses.replace(compose_request([]), **asked)
    return build_runs(customers, world or known(None), request, Rules(), lambda m: llama_like())


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


def test_new_fleets_adapt_the_recommended_layers_and_earlier_ones_go_on_as_they_were(tmp_path):
    """Also in the count of parameters from which the adviser takes the rank."""
    asked = ["action=fleet", "customers=c.csv", f"out={tmp_path}"]
    for more, layers in (([], LAYERS), (["method.layers=all"], "attention+mlp+unembedding")):
        found = rules_of(compose_request([*asked, *more]))
        assert parse_layers(found.layers) == parse_layers(found.counted_layers)
        assert parse_layers(found.layers) == parse_layers(layers)
    (tmp_path / RULES).write_text(json.dumps({"layers": "all", "answers": "all"}))
    found = rules_of(compose_request(asked))
    assert (found.layers, found.counted_layers) == ("all", "all")


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
    for share, says in ((None, ""), (0.5, ""), (0.6, "more than half"), (1.2, "more than all")):
        found.member.advised["load"] = share
        assert says in found.facts()["room"] and bool(found.facts()["room"]) == bool(says)


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
        mock.patch.object(adapters.tokenizing, "check_served", check),
        mock.patch("lorasweep.models.load.write_adapter", save),
    ):
        return adapters.export(found, store, folder, "title", lambda model: llama_like())


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
    (found,) = exported(
        [dataclasses.replace(here, member=member)], tmp_path, tokenizing.check_served
    )
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


def read(path, rules=None, tokenizer=None, validation=None):
    """A customer's rows, by rules of version 0.2 unless others are given."""
    return fitted(path, rules, tokenizer, validation=validation)[0]


def fitted(path, rules=None, tokenizer=None, length=None, validation=None):
    tokenizer = tokenizer or llama_like()
    return rows_of("any", str(path), rules or Rules(), tokenizer, validation, length)


def pairs(count, prompt, completion):
    """Rows with two columns; both are templates of the row's number."""
    said = ((prompt.format(k), completion.format(k)) for k in range(count))
    return [{"prompt": p, "completion": c} for p, c in said]


def turns(*said, weights=()):
    found = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
    for message, weight in zip(found, weights):
        message |= {} if weight is None else {"weight": weight}
    return {"messages": found}


def texts(spec):
    return [
        [tuple(messages.read(spec, row, where).messages) for where, row in source.rows()]
        for source in splits.sources_of(spec, ["."])
    ]


def prompts(spec, folder=".", **changes):
    """The prompts of the training, validation and test rows, as they are loaded."""
    spec = dataclasses.replace(spec, **{"max_length": 64, **changes})
    data = splits.load(spec, [folder], llama_like())
    parts = (data.train(0, 0, data.n_train), data.validation, data.test)
    return [[llama_like().decode(e.tokens[~e.loss]) for e in part] for part in parts]


def counts(found):
    return found.n_train, found.dataset.n_validation, found.dataset.n_test


@pytest.mark.parametrize(
    "rows, held_out, named",
    [(19, 0, 0), (20, 4, 0), (40, 4, 10), (60, 6, 15), (200, 20, 20), (3000, 128, 128)],
)
def test_a_tenth_is_validation_a_tenth_test_and_of_few_rows_none(tmp_path, rows, held_out, named):
    """Of a customer's rows; of rows given by name at least 20 are held out, or they are refused."""
    path = write_rows(tmp_path / "my.jsonl", rows, "Yes {k}")
    found = read(path)
    spec = found.dataset
    assert counts(found) == (rows - 2 * held_out, held_out, held_out or rows)
    assert found.held_out == (held_out > 0) and spec.holdout == 2 * held_out
    assert spec.problem is None and read(path).dataset == spec
    if named:
        spec, folder, _ = named_rows(str(path), {})
        assert (spec.location, folder, spec.held_out_by) == (".", str(tmp_path), "prompt")
        assert spec.problem is None and spec.revision.startswith("sha256:my=")
        assert spec.holdout == 2 * named
        assert [*map(len, prompts(spec, folder))] == [rows - 2 * named, named, named]
    changed = read(write_rows(path, rows, "No")).dataset
    assert changed.canonical != found.dataset.canonical


def test_duplicates_stay_in_one_split(tmp_path):
    """Some rows repeat up to forty times, with different values in other columns."""
    asked = [k for k in range(40) for _ in range(40 if k == 3 else 1 + k % 3)]
    rows = [pairs(40, "How many? {}", "Yes")[k] | {"id": n} for n, k in enumerate(asked)]
    path = write_json(tmp_path / "my.jsonl", rows)
    found = read(path)
    train, held = texts(found.dataset)
    assert found.repeated == len(rows) - 40 and found.dataset.unseen_rows
    assert len(held) == len(set(held)) == 8 and not set(train) & set(held)
    assert len(set(train)) == 32 and found.n_train == len(train)
    assert [len(p) for p in prompts(found.dataset)] == [len(train), 4, 4]
    # of few unique rows none is held out, however often they repeat
    few = read(write_json(path, rows[:6] * 9))
    assert not few.held_out and few.n_train == 54 and not few.dataset.unseen_rows


MANY = [row for n in range(5) for row in pairs(40, "How many? {}", f"Yes {n}")]
NOTES = pairs(100, "Write a note.", "Yes {}")
ASKED = pairs(70, "How many? {}", "No")
UNEVEN = [r for k in range(120) for r in pairs(1 + 11 * (k % 7 == 0), f"How many? {k}", "Yes {}")]
DIVIDED = {  # training file, test file, sizes of the parts, (same_prompt, left_out, repeated), by
    "forty prompts": (MANY, [], (160, 20, 20), (160, 0, 0), "prompt"),
    "one prompt": (NOTES, [], (80, 10, 10), (99, 0, 0), "row"),
    "one prompt in both files": (NOTES, pairs(30, "Write a note.", "No {}"), (100, 15, 15), (129, 0, 0), "row"),
    "prompts of a test file": (pairs(50, "How many? {}", "Yes"), ASKED[40:], (40, 15, 15), (10, 10, 0), "prompt"),
    "many answers to a prompt": (UNEVEN, [], (250, 33, 19), (198, 0, 0), "prompt"),
    "a test file sorted by topic": (pairs(50, "How many? {}", "Yes"), pairs(400, "Is it? {}", "No") + pairs(400, "So? {}", "No"), (50, 128, 128), (0, 0, 0), "prompt"),
    "rows of a test file": (ASKED[:9], 2 * ASKED[5:13], (5, 4, 4), (0, 4, 12), "prompt"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIVIDED)
def test_no_prompt_is_in_two_splits_unless_there_are_too_few(tmp_path, case):
    train, test, sizes, count, by = DIVIDED[case]
    write_json(tmp_path / "train.jsonl", train)
    if test:
        write_json(tmp_path / "test.jsonl", test)
    found = read(tmp_path)
    parts, divided_by = prompts(found.dataset), found.dataset.held_out_by
    assert (counts(found), divided_by) == (sizes, by) and tuple(map(len, parts)) == sizes
    assert (found.same_prompt, found.left_out, found.repeated) == count
    assert (found.dataset.holdout == 0) == bool(test)
    each = [parts] if by == "prompt" else []
    if len(train) + len(test) > 40 and each:  # rows by name, too
        spec, folder, _ = named_rows(str(tmp_path if test else tmp_path / "train.jsonl"), {})
        each.append(prompts(spec, folder))
        assert spec.revision.count("=") == 1 + bool(test)
        assert train is UNEVEN or len(each[1][1]) == len(each[1][2])
    for parts in each:
        assert len(set().union(*parts)) == sum(len(set(part)) for part in parts)


REFUSED = {  # rows by name or training file of a customer, test file
    "39 unique rows. Expected at least 40": (pairs(39, "So? {}", "Yes"), None),
    ": 1 unique rows": (pairs(50, "So?", "Yes"), None),
    "15 of 60 rows have no answer, the first is row 46": (pairs(45, "So? {}", "Yes") + pairs(15, "No? {}", ""), None),
    "Add rows to train on": (ASKED[:8], ASKED[:8]),
    "Expected at least 2": (ASKED[:8], ASKED[9:10]),
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_rows_that_are_too_few_or_have_no_answer_are_refused(tmp_path, says):
    train, test = REFUSED[says]
    path = write_json(tmp_path / ("my.jsonl" if test is None else "train.jsonl"), train)
    if test:
        write_json(tmp_path / "test.jsonl", test)
    with pytest.raises(DataError, match=re.escape(says)):
        named_rows(str(path), {}) if test is None else read(tmp_path)


def test_rows_that_are_left_out_or_cut_are_counted_and_most_of_them_an_error(tmp_path):
    """By a stated max_length, in a fleet as for rows given by name; the counts are those trained."""
    late = " late" * 99
    rows = [row for n in range(40) for row in pairs(5, f"So? {n} {{}}", "Yes")]
    rows = [{**r, "prompt": r["prompt"] + late * (k % 5 == 0)} for k, r in enumerate(rows)]
    path = write_json(tmp_path / "my.jsonl", rows)
    found, _ = fitted(path, length=64)
    data = splits.load(found.dataset, ["."], llama_like())
    n_read, cut, left_out, _ = data.fits["training"]
    enough = max(fit[-1] for fit in data.fits.values())
    assert (found.n_train, data.n_train, n_read, cut) == (n_read - left_out, found.n_train, 160, 0)
    assert f"leaves out {left_out} and cuts 0 of 160 training rows" in found.warning
    assert f"Set the column max_length to {enough}, with which 99% are whole" in found.warning
    whole, _ = fitted(path, length=enough)
    assert not whole.warning and whole.n_train == 160
    write_json(path, pairs(40, "So? {}" + late, "Yes " * 9))
    with pytest.raises(DataError, match=r"cuts 3. of 3. training rows. Set the column max_length"):
        fitted(path, length=enough)


def test_many_short_rows_of_one_part_do_not_hide_what_the_other_loses():
    def said(training, held_out):
        fits = {"training": training, "held-out": held_out}
        return tokenizing.check_fit(DatasetSpec("rows"), fits, "max_length=")

    assert "leaves out 48 and cuts 0 of 100 held" in said((120, 0, 0, 60), (100, 0, 48, 99))
    assert "leaves out 10 and cuts 0 of 100 train" in said((100, 0, 10, 99), (1024, 0, 0, 60))
    assert said((1000, 5, 5, 99), (100, 0, 0, 60)) == ""
    with pytest.raises(DataError, match=r"cuts 90 of 100 training rows. Set max_length=99"):
        said((100, 90, 0, 99), (256, 0, 0, 60))


@pytest.mark.parametrize("tokenizer", [llama_like, qwen_like])
def test_rows_begin_with_bos_where_a_server_sends_it(tmp_path, tokenizer):
    """As a server makes tokens of a text, and as it renders messages by the folder's template."""
    tokenizer, path = tokenizer(), write_rows(tmp_path / "my.jsonl", 60, "Yes {k}")
    fleet = read(path, Rules(whole_prompt=True), tokenizer).dataset
    for spec, folder in ((fleet, "."), named_rows(str(path), {})[:2]):
        row = next(iter(splits.load(spec, [folder], tokenizer).test))
        prompt = tokenizer.decode(row.tokens[~row.loss], skip_special_tokens=True)
        assert row.tokens[~row.loss].tolist() == tokenizer(prompt).input_ids
        served = tokenizing.with_template(spec, tokenizer)
        said = [{"role": "user", "content": prompt.removesuffix("\n")}]
        sent = served.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert served(sent, add_special_tokens=False).input_ids == row.tokens[~row.loss].tolist()


def test_rows_that_are_too_long_move_no_prompt_to_two_splits(tmp_path):
    said = [("Yes " * (40 if k % 3 == 0 else 2) + f"{k}") for k in range(120)]
    rows = [pairs(1, f"How many? {k // 4}", text)[0] for k, text in enumerate(said)]
    spec = read(write_json(tmp_path / "my.jsonl", rows)).dataset
    train, *held = prompts(spec, too_long="skip", max_length=32)
    validation, test = map(set, held)
    assert not (validation & test or set(train) & (validation | test)) and validation and test
    assert sum(map(len, held)) < spec.holdout


def test_the_prompt_of_a_conversation_ends_before_the_first_learned_answer(tmp_path):
    """With the last answer in the loss that is all before it: rows with one first question and
    another last one share nothing that is learned. With all answers it is the first question."""
    path = tmp_path / "my.jsonl"
    write_json(path, [turns("So?", "Yes", f"How many? {k % 40}", f"No {k}") for k in range(200)])
    by_last = read(path)
    assert (by_last.same_prompt, by_last.n_train) == (160, 160)
    assert by_last.dataset.held_out_by == "prompt"
    assert read(path, Rules(mask="completion")).same_prompt == 199
    said = [("So?", "Yes", f"Is it late? {k}", "No") for k in range(100)]
    weighted = [turns(*text, weights=(None, k % 2, None, None)) for k, text in enumerate(said)]
    assert read(write_json(path, weighted)).same_prompt == 49  # whose first answer is learned


def test_all_answers_of_messages_are_learned_in_new_fleets_and_of_conversations_the_last(tmp_path):
    rows, new = [turns("So?", "Yes", "How many?", "No")] * 30, Rules(answers="all")
    said = [{"from": m["role"], "value": m["content"]} for m in rows[0]["messages"]]
    for form, mask in ((rows, "completion"), ([{"conversations": said}] * 30, "last_assistant")):
        assert read(write_json(tmp_path / "my.jsonl", form), new).dataset.mask == mask


def test_a_validation_file_beside_the_training_file_is_divided_as_a_test_file(tmp_path):
    path = write_rows(tmp_path / "a/my.jsonl", 50, "Yes {k}")
    held = write_rows(tmp_path / "a/held.jsonl", 30, "No {k}", start=40)
    for name, given in (("train", path), ("test", held)):
        write_json(tmp_path / f"b/{name}.jsonl", given.read_text().splitlines())
    found, tested = read(path, validation=str(held)), read(tmp_path / "b")
    assert texts(found.dataset) == texts(tested.dataset) and counts(found) == counts(tested)
    assert (found.left_out, found.dataset.test_split) == (10, "held")
    in_folder = path.rename(tmp_path / "a/train.jsonl").parent
    assert texts(read(in_folder, validation=str(held)).dataset) == texts(tested.dataset)
    other = write_rows(tmp_path / "a/held.json", 3, "No")
    for wrong in (tmp_path / "b/test.jsonl", path, in_folder / "train.jsonl", other):
        with pytest.raises(RowError, match=r"is no other file beside train.jsonl.*NAME.jsonl"):
            read(in_folder, validation=str(wrong))


def test_the_example_has_nothing_of_the_rows_nor_of_their_tools(tmp_path):
    more = "{{ m.note }}{{ m.content }}{{ m.tool_calls }}"
    chat = with_chat("{{ tools }}" + CHAT_TEMPLATE.replace("{{ m.content }}", more), llama_like)
    called = [{"function": {"name": "secret", "arguments": '{"secret": "secret"}'}}]
    tools = [{"type": "function", "function": {"name": "secret", "parameters": {}}}]
    asked = {"role": "assistant", "content": None, "tool_calls": called, "note": "secret"}
    said = {"role": "tool", "content": "secret", "name": "secret"}
    rows = [{**turns(f"secret {k}", "secret"), "tools": tools} for k in range(30)]
    for row in rows:
        row["messages"][1:1] = [asked, said]
    path = write_json(tmp_path / "my.jsonl", rows)
    found, _ = fitted(path, Rules(answers="all"), chat)
    shown = "".join(text for text, _ in found.example) + str(found.messages)
    assert "secret" not in shown and "{user 1}" in shown and "{assistant 1}" in shown
    assert found.end.endswith(chat.eos_token)


SCHOOL, TULU = "openai/gsm8k", "allenai/tulu-3-sft-mixture"


def test_rows_of_the_hub_are_pinned_and_divided(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    given = {"source": "hub", "revision": small_hub.COMMIT}
    named = DatasetSpec(name="a", location=SCHOOL, config="main", **given)
    small_hub.make(tmp_path, [], [named, DatasetSpec(name="b", location=TULU, **given)])
    found, tulu = read(f"{SCHOOL}:main"), read(f"{TULU}@{small_hub.COMMIT}")
    spec = found.dataset
    where = (spec.source, spec.location, spec.config, spec.revision, spec.prompt_field)
    assert where == ("hub", SCHOOL, "main", small_hub.COMMIT, "question")
    data = splits.load(spec, [], llama_like())
    sizes = (data.n_train, len(data.validation), len(data.test))
    assert sizes == counts(found) == (4, 10, 10)  # 20 of 24 are in both
    assert counts(tulu) == (880, 110, 110) and tulu.dataset.mask == "last_assistant"
    with pytest.raises(DataError, match=r"no file or folder .*openai/gsm9k, and as a data set of"):
        read("openai/gsm9k")
    with pytest.raises(RowError, match=r"on the hub.*Leave the column empty"):
        read(f"{SCHOOL}:main", validation="held.jsonl")


def test_a_template_that_breaks_on_a_row_and_one_that_servers_could_not_use(tmp_path, monkeypatch):
    rows = [turns("How many?", f"Yes {k}") for k in range(30)]
    rows[27] = {"messages": [{"role": "system", "content": "Say yes."}, *rows[27]["messages"]]}
    path = write_json(tmp_path / "my.jsonl", rows)
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    breaking = with_chat(no_system + CHAT_TEMPLATE, llama_like)
    with pytest.raises(DataError, match=r"my.jsonl:28: the tokenizer's chat template .*no system"):
        fitted(path, tokenizer=breaking)
    monkeypatch.setattr(tokenizing, "_extended", lambda spec, given: f"!{given}")
    with pytest.raises(DataError, match=r"my.jsonl:1: the chat template for servers gives '!<user"):
        fitted(path, tokenizer=with_chat(CHAT_TEMPLATE, llama_like))


EOS, ENDS = llama_like().eos_token, CHAT_TEMPLATE.replace("{{ eos_token }}", "<|end|>\n")
FORMS = [  # rules, chat template of the base, prompt, [what is in the loss], what a request needs
    (Rules(), None, "{prompt}\n", f"{{completion}}{EOS}", {}),
    (Rules(), CHAT_TEMPLATE, f"<user>{{prompt}}{EOS}<assistant>", f"{{completion}}{EOS}", {}),
    (Rules("Q: {prompt} A: ", "role_eos"), CHAT_TEMPLATE, "Q: {prompt} A: ", f"{{completion}}{EOS}", {}),
    (Rules("{prompt}", "role_colon"), CHAT_TEMPLATE, "<|begin_of_text|>User: {prompt}\n\nAssistant:", " {completion}\n\nUser:", {"stop": ["\n\nUser:"]}),
    (Rules(), ENDS, None, None, {"stop_token_ids": [len(llama_like())]}),
    (Rules(), ENDS.replace("<|end|>", "##"), None, None, {"stop": ["##\n"]}),
]  # fmt: skip


@pytest.mark.parametrize("rules, template, prompt, learned, stop", FORMS)
def test_the_form_is_the_bases_chat_template_else_plain_unless_it_is_named(
    tmp_path, rules, template, prompt, learned, stop
):
    """And a request names the end of an answer if the end token does not end it."""
    tokenizer = with_chat(template, llama_like)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    found, _ = fitted(write_rows(tmp_path / "my.jsonl", 30, "Yes {k}"), rules, tokenizer)
    texts = ["".join(t for t, in_loss in found.example if in_loss == k) for k in (False, True)]
    assert found.stop == stop and texts == [prompt or texts[0], learned or texts[1]]
    assert [m["content"] for m in found.messages] == ["{prompt}", "{completion}"]
    tokenizing.save_tokenizer(
        tokenizing.with_template(found.dataset, tokenizer), found.stop, tmp_path
    )
    ends = GenerationConfig.from_pretrained(tmp_path)
    assert ends.eos_token_id == [1, *stop.get("stop_token_ids", [])]
    assert ends.stop_strings == stop.get("stop")
