"""Customers: `action=fleet` from a table to folders that PEFT loads, trained once, changed, stopped, broken;
`action=verify_served` on a fleet that PEFT serves, right and with faults; `action=measure`. One's own model
and file: a run that is trained once wherever they lie; `+sweep=tune`, killed, asked again, and its adapter
in PEFT; and a `python -m lorasweep` that a message recommends."""

import contextlib
import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasweep.cli.actions import act
from lorasweep.data import tokenizing
from lorasweep.errors import LorasweepError, SpecError
from lorasweep.fleet.runs import folder_of
from lorasweep.launch.local import run_points
from lorasweep.launch.torch_trainer import TorchTrainer
from lorasweep.models.load import write_adapter
from lorasweep.store import checkpoint, folders
from lorasweep.store.run_store import RunStore
from lorasweep.work.fleet import plan_fleet
from tests import customers
from tests.customers import Counting, World, answering, changed, make_base, vllm, write_rows
from tests.integration.test_interruptions import killed_at, start
from tests.world import cli, write_json


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return [make_base(tmp_path_factory.mktemp(name)) for name in ("one", "two")]


@pytest.fixture
def world(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, bases)


@pytest.fixture(scope="module")
def advised_home(bases, tmp_path_factory):
    home = tmp_path_factory.mktemp("advised")
    with contextlib.chdir(home):
        assert World(home, bases).run("rates=advised") == 0
    return home


@pytest.fixture
def advised(advised_home, bases, tmp_path, monkeypatch):
    shutil.copytree(advised_home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, bases)


def snapshot(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def test_a_table_becomes_folders_and_only_changes_are_trained_again(world, tmp_path, capsys):
    begun = Counter(world.trained())  # at least three trials and a test, one run for the few rows
    assert begun["few"] == 1 and all(4 <= n <= 7 for name, n in begun.items() if name != "few")
    printed = capsys.readouterr().out
    assert "5 customers: 5 adapters, 0 not trained yet, 0 with" in printed
    kept = json.loads((world.folder / "fleet.json").read_text())
    assert (kept["answers"], kept["whole_prompt"]) == ("all", True)
    ann = world.facts("ann")
    losses = {t["lr"]: t["validation"] for t in ann["tried"]}
    assert ann["lr"] == min(losses, key=lambda lr: (losses[lr], lr)) and not ann["edge"]
    assert len(losses) == begun["ann"] - 1 and ann["seconds_used"] > ann["seconds"] > 0
    assert ann["gain"] > 0 and f"{ann['gain']:+.3f} ± " in printed
    assert world.facts("few")["gain"] is None and "nothing is known of" in world.card("few")
    # weights are kept of what was chosen, and of nothing else
    kept = {p.parent.name for p in world.store.root.glob("*/weights.safetensors")}
    facts = [json.loads(p.read_text()) for p in world.folder.glob("*/facts.json")]
    assert kept == {f["run"] for f in facts} and len(facts) == 5

    before = {p: p.stat().st_mtime_ns for p in world.folder.glob("*/*")}
    assert not world.trained()
    assert {p: p.stat().st_mtime_ns for p in world.folder.glob("*/*")} == before

    # facts of an earlier version are written again, unless the weights of the run are gone
    for name in ("bob", "eve"):
        facts = {**world.facts(name), "rank": 99}
        with folders.replaced(world.folder / name, "facts.json", whole=False) as partial:
            (partial / "facts.json").write_text(json.dumps(facts, indent=1))
    (world.store.folder(world.facts("eve")["run"]) / "weights.safetensors").unlink()
    assert not world.trained() and "5 adapters, 0 not trained yet, 0 with errors" in world.page
    assert world.facts("bob")["rank"] == 4 and world.facts("eve")["rank"] == 99

    before = {p: p.stat().st_mtime_ns for p in world.folder.glob("*/*")}
    write_rows(tmp_path / "bob.jsonl", 25, "Yes! {k}", question="Is it late? {k}")
    assert set(world.trained()) == {"bob"}
    moved = {p for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert moved == {p for p in before if p.parent.name == "bob"}


def check_same(one, other):
    paths = list(one.glob("*.safetensors")) or list(one.glob("*/*.safetensors"))
    assert paths
    for path in paths:
        a, b = load_file(path), load_file(other / path.relative_to(one))
        assert all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.fixture
def odd(world, tmp_path):
    """A customer whose held-out rows are of another kind: their loss rises while it learns."""
    write_rows(tmp_path / "odd/train.jsonl", 20, "aaaa bbbb {k}")
    write_rows(tmp_path / "odd/test.jsonl", 16, "zz", start=100)
    return {**world.table[0], "data": "odd", "epochs": 39}


def test_a_stopped_fleet_resumes_in_the_same_packs_to_the_same_adapters(world, odd):
    """Bit for bit as one that was not stopped; with early stopping, whose decision survives."""
    few, eve = world.table[2], world.table[4]
    world.set_table(odd, few, eve)
    settings = ("precision=fp64", "early_stopping=2")
    assert world.run(*settings, "exec.reports_dir=whole", "exec.runs_dir=whole_runs") == 0
    settings = (*settings, "exec.checkpoint_s=0")
    assert world.run(*settings, trainer=Counting(5)) == 130
    assert {p.name for p in world.folder.iterdir()} == {"fleet.json", ".lorasweep.jsonl"}
    rest = Counting()
    assert world.run(*settings, trainer=rest) == 0
    assert any(resumed for _, _, resumed in rest.asked)
    check_same(world.folder, Path("whole/fleet-customers"))
    ends = (world.store.result(i) for i in world.store.existing())
    assert not any(r["resumed_in_other_company"] for r in ends if r)
    ann = world.facts("ann")
    assert ann["best_step"] < ann["steps_done"] < ann["steps"] and " ended early" in world.page
    assert f"ended after update {ann['steps_done']} of {ann['steps']} (pa" in world.card("ann")
    assert "off, so it made all" in world.card("few")


def test_no_row_of_a_customer_reaches_another(advised, tmp_path):
    world = advised
    write_rows(tmp_path / "loud.jsonl", 30, "Yes")
    with (tmp_path / "loud.jsonl").open("a") as rows:
        rows.write(f'{{"prompt": "{customers.SECRET}"\n')
    row = {"model": world.table[0]["model"], "task": "sft", "epochs": 1}
    wrong = ({"name": "loud", "data": "loud.jsonl"}, {"name": "ann", "data": "owner"})
    world.set_table(*world.table, *({**row, **columns} for columns in wrong))
    assert world.run("rates=advised") == 1
    (owner,) = [p for p in world.folder.iterdir() if p.name.startswith("img_src")]
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and "owner" not in p.parts]:
        if path.name != "loud.jsonl" and ".tokens" not in path.parts:
            assert customers.SECRET.encode() not in path.read_bytes(), path
    others = [p for p in world.folder.iterdir() if p.is_dir() and p != owner]
    assert len(others) == 4
    for path in [q for p in others for q in p.iterdir()]:
        assert b"onerror" not in path.read_bytes() and b"owner" not in path.read_bytes()
    page, card = world.page, (owner / "README.md").read_text()
    assert "<img" not in page and "&lt;img src=x onerror" in page and "<script" not in page
    assert "http" not in page.split("<main>")[1] and "loud.jsonl:31: not a JSON row" in page
    assert "<img" not in card and "rows of owner/train.jsonl" in card


def test_data_that_break_between_plan_and_training_fail_their_customer_alone(world, tmp_path):
    class Breaking(TorchTrainer):
        def data(self, spec, exec_, base=None):
            if spec.dataset.name == "bob":
                (tmp_path / "bob.jsonl").write_text("{")
            return super().data(spec, exec_, base)

    assert world.run("rates=advised", trainer=Breaking()) == 1
    assert {p.name for p in world.folder.iterdir() if p.is_dir()} >= {"ann", "few", "eve"}
    assert not (world.folder / "bob").exists() and "but the revision" in world.page


def test_plan_and_status_are_of_the_customers(world, capsys):
    request = world.compose("action=plan", "rates=advised", "format=json")
    assert act(dataclasses.replace(request, action="status")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"ann", "bob", "few", "eve"} < {a["arm"] for a in shown["arms"]}
    assert act(request) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"]["total"] == 5 and found["cost"]["packs"] == 2  # a pack a base
    assert shown["customers"] == found["fleet"]["customers"]
    assert shown["customers"] == {"customers": 5, "adapters": 0, "open": 5, "errors": 0}
    four, one = found["fleet"]["bases"]
    sizes = [[b[k] for k in ("customers", "runs", "packs")] for b in (four, one)]
    assert sizes == [[4, 4, 1], [1, 1, 1]]
    assert four["hours"] + one["hours"] == pytest.approx(found["cost"]["hours"])
    assert world.run("hardware=h100", "precision=bf16", "rates=advised", action="plan") == 0
    assert "customers  runs  packs" in capsys.readouterr().out


def test_customers_without_an_adapter_keep_their_folder(advised, tmp_path, capsys):
    world = advised
    (tmp_path / "bob.jsonl").write_text("{")
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(world.table[0]["model"], half)
    world.write(few=None, lost=(half, "ann.jsonl", 1), gone=(half, "no.jsonl", 1))
    capsys.readouterr()
    assert world.run("rates=advised") == 1
    printed = capsys.readouterr()
    assert printed.err.count("no model.safetensors") == 2
    assert "6 customers: 3 adapters, 0 not trained yet, 3 with errors" in world.page
    for name in ("few", "bob"):
        assert (world.folder / name / "adapter_model.safetensors").is_file()


def fresh(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def test_adapters_load_and_are_switched_on_one_base(advised, bases, tmp_path):
    world = advised
    world.write(apart=(bases[0], str(tmp_path / "ann.jsonl"), 2))
    assert world.run("rates=advised") == 0
    for path in world.folder.glob("*/*"):  # none names a folder of this machine
        text = path.read_bytes()
        assert str(tmp_path).encode() not in text and b"pytest-of" not in text, path
    config = json.loads((world.folder / "ann/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == world.facts("ann")["base"]
    assert "a copy of your own" in world.card("ann")
    tokenizer = AutoTokenizer.from_pretrained(bases[0])
    ids = tokenizer("How many? 3\n", return_tensors="pt", add_special_tokens=False)

    def logits(model):
        with torch.no_grad():
            return model(**ids).logits

    alone = {}
    for name in ("ann", "bob", "few"):
        model = PeftModel.from_pretrained(fresh(bases[0]), world.folder / name)
        alone[name] = logits(model)
    assert not torch.allclose(alone["ann"], alone["bob"], atol=1e-4)
    served = PeftModel.from_pretrained(fresh(bases[0]), world.folder / "ann", "ann")
    for name in ("bob", "few"):
        served.load_adapter(world.folder / name, adapter_name=name)
    for name in ("few", "ann", "bob", "ann"):
        served.set_adapter(name)
        assert torch.allclose(logits(served), alone[name], atol=1e-5)


def test_a_mirror_has_a_run_a_customer_and_a_gain_is_by_prompts(advised, tmp_path, monkeypatch):
    world, mirror = advised, MagicMock()
    monkeypatch.setattr("lorasweep.tracking.wandb.mirroring", mirror)
    rows = [{"prompt": f"How many? {k % 40}", "completion": f"Yes {k}"} for k in range(200)]
    write_json(tmp_path / "bob.jsonl", rows)
    assert world.run("mirror=wandb", "rates=advised") == 0
    (_, group, words), name = mirror.call_args.args, mirror().__enter__()
    assert group not in words and "lr_ratio" in words
    assert world.facts("bob")["run"] in name.call_args_list[0].args[0]
    bob = world.facts("bob")
    assert (bob["n_same_prompt"], bob["n_test"], bob["n_test_prompts"]) == (160, 20, 4)
    # 4 prompts: Student's t of 3 degrees of freedom is 3.182
    assert bob["gain_interval"][1] - bob["gain"] == pytest.approx(3.182 * bob["gain_se"], rel=1e-3)
    assert "(Student's t over prompts)" in world.card("bob")


def test_the_prompt_form_is_the_bases_or_the_command_lines_and_is_kept(world, bases, tmp_path):
    instruct = shutil.copytree(bases[0], tmp_path / "instruct")
    (instruct / "chat_template.jinja").write_text(customers.CHAT_TEMPLATE)
    world.write(chat=(instruct, "ann.jsonl", 1), **{customers.HOSTILE: None})
    settings = ("precision=fp32", "rates=advised")
    assert world.run(*settings, "scale=small") == 0
    forms = [world.facts(name)["render"] for name in ("chat", "ann")]
    assert forms == ["chat_template", "role_eos"] and "⟦{completion}" in world.page
    assert not world.trained(*settings, "scale=tiny")
    assert len(world.trained(*settings, "dataset.template='Q: {prompt} A: '")) == 5
    assert not world.trained(*settings)  # named once, it is kept
    assert world.facts("chat")["template"] == "Q: {prompt} A: "
    with pytest.raises(SpecError, match=r"dataset.n_test has no effect.*Allowed"):
        world.run(*settings, "dataset.n_test=9")


def test_a_fleet_for_a_server_leaves_out_what_the_server_does_not_take(world, tmp_path, capsys):
    row = {"model": str(make_base(tmp_path / "base")), "task": "sft", "data": "tiny.jsonl"}
    world.set_table(*({"name": name, **row} for name in ("few", "a b")))
    with pytest.raises(SpecError, match=r"method.layers=.*serve=vllm.*Add method.layers=att"):
        world.run("serve=vllm", "method.layers=all")
    assert world.run("method.layers=all") == 0 and "served" not in world.facts("few")
    plain = world.facts("few")["run"]
    capsys.readouterr()
    assert world.run("serve=vllm") == 0
    line = "serve=vllm: no adapter of the unembedding for 2 of 2 customers: the base ties it"
    assert capsys.readouterr().err.count(line) == 1
    facts, kept = world.facts("few"), json.loads((world.folder / "fleet.json").read_text())
    assert facts["layers"] == "attention+mlp" and facts["run"] != plain and kept["serve"] == "vllm"
    form = "--chat-template ./{}chat_template.jinja"  # the base has none
    assert f"--lora-modules few=. {form.format('')}\n```" in world.card("few")
    names = " ".join(f"{f}=./{f}" for f in ("few", folder_of("a b")))
    ranks = "--max-lora-rank 8 --max-loras 2 --max-cpu-loras 2"
    command = f"vllm serve BASE --enable-lora {ranks} --lora-modules {names} {form.format('few/')}"
    assert world.page.count("vllm serve BASE") == 1 and f"{command}</pre>" in world.page
    assert world.trained() == [] and world.facts("few") == facts  # the folder keeps serve=vllm

    def broken(folder, *given):
        write_adapter(folder, *given)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))

    shutil.rmtree(world.folder / "few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorasweep.models.load.write_adapter", broken)
        assert world.run() == 1
    assert "would not serve it as trained: use_dora is true" in capsys.readouterr().out
    assert not (world.folder / "few/facts.json").exists()
    assert world.run("serve=peft") == 0 and world.facts("few")["run"] == plain
    assert "served" not in world.facts("few")


@pytest.mark.parametrize("precision, patience", [("fp64", 2), ("fp32", 0)])
def test_a_measured_run_is_the_run_that_is_trained_in_one_go(world, odd, precision, patience):
    """Weights, result and records are equal, bit for bit, where each run is a pack; and where the
    weights of the trial were lost, the run trains."""
    world.set_table(odd)
    alone = (f"precision={precision}", f"early_stopping={patience}", "exec.pack_size=1", "rates=3")
    assert world.run(*alone) == 0
    ann = world.facts("ann")
    store, plan = world.store, plan_fleet(world.request)
    (point,) = [p for p in plan.points if p.spec.test_rows]
    trial, measured = point.spec.trial.id, store.result(point.id)
    assert ann["run"] == point.id and measured["trial"] == trial in [t["run"] for t in ann["tried"]]
    assert "test_nll" not in store.result(trial)
    assert (store.result(trial)["steps_done"] < point.spec.steps) == bool(patience)
    assert measured["wall_s"] > store.result(trial)["wall_s"]
    assert not (store.folder(trial) / "weights.safetensors").exists()
    shutil.move(store.folder(point.id), "measured")
    run_points([point], store, plan.exec, lambda event: None, TorchTrainer())
    whole, timed = store.result(point.id), ("wall_s", "step_s", "attempt", "trial")
    a, b = ({k: v for k, v in r.items() if k not in timed} for r in (whole, measured))
    assert a == b and "trial" not in whole
    check_same(Path("measured"), store.folder(point.id))
    speed = ("step_s", "tokens_per_s")
    before = map(json.loads, Path("measured/metrics.jsonl").read_text().splitlines())
    for both in zip(store.records(point.id), before, strict=True):
        now, then = ({k: v for k, v in r.items() if k not in speed} for r in both)
        assert now == then


def finished(*arguments):
    command = start(*arguments, cwd=Path.cwd())
    assert command.wait(240) == 0, command.stderr.read()
    return RunStore("runs")


@pytest.mark.slow
@pytest.mark.full
def test_a_fleet_killed_between_its_stages_goes_on(world, tmp_path):
    """Killed with -9 when trials have ended, and again when further rates are tried."""
    arguments = ("action=fleet", "customers=customers.yaml", "exec.workers=1", "exec.threads=1")
    store = RunStore(tmp_path / "runs")

    def ended():
        return sum(store.result(i) is not None for i in store.existing())

    for n in (13, 15):
        killed_at(lambda: ended() >= n, *arguments, cwd=tmp_path)
    before = {i: store.last_attempt(i) for i in store.existing() if store.result(i)}
    finished(*arguments)
    assert all(store.last_attempt(i) == n for i, n in before.items())
    for name in ("ann", "bob", "eve"):
        facts = world.facts(name)
        assert not facts["edge"] and store.result(facts["run"])["trial"]
    shutil.move(world.folder, "killed")
    shutil.move(store.root, "killed_runs")
    finished(*arguments)
    kept = [json.loads(p.read_text()) for p in sorted(Path("killed").glob("*/facts.json"))]
    whole = [json.loads(p.read_text()) for p in sorted(world.folder.glob("*/facts.json"))]
    assert [f["run"] for f in kept] == [f["run"] for f in whole]


@pytest.mark.slow
@pytest.mark.full
def test_early_stopping_survives_a_kill(world, odd, tmp_path):
    """A command killed with -9 between the best evaluation of a run and its end, and asked again:
    weights, results and what was decided are the same, bit for bit."""
    world.set_table(odd)
    # one learning rate: of several, one may end before the kill, and the pack is then another
    fleet = ("action=fleet", "customers=customers.yaml", "early_stopping=3", "rates=advised")
    arguments = (*fleet, "exec.workers=1", "exec.threads=1", "exec.checkpoint_s=0.01")

    def best_is_behind():
        for run in (tmp_path / "runs").glob("[0-9a-f]*/checkpoint"):
            metas = [json.loads(p.read_text()) for p in run.glob("?.json")]
            last = max(metas, key=lambda m: m["step"], default={})
            if 0 < last.get("best", (0, 0))[1] < last.get("step", 0):
                return True
        return False

    killed_at(best_is_behind, *arguments, cwd=tmp_path)
    (rid,) = RunStore(tmp_path / "runs").existing()
    assert RunStore(tmp_path / "runs").result(rid) is None
    resumed = finished(*arguments).result(rid)
    shutil.move(tmp_path / "runs", tmp_path / "killed")
    whole = finished(*arguments).result(rid)
    timed = ("wall_s", "step_s", "attempt")
    a, b = ({k: v for k, v in r.items() if k not in timed} for r in (whole, resumed))
    assert a == b and a["best_step"] < a["steps_done"] and resumed["attempt"] == 2
    check_same(tmp_path / "killed", tmp_path / "runs")


def test_a_users_folder_and_a_full_disk_are_the_problem_of_one_customer(world, tmp_path, capsys):
    """Rows, contracts and links in the way stay; other customers are trained and served."""
    ann, few = world.table[0], world.table[2]
    world.set_table(few)
    assert world.run("rates=advised") == 0
    (world.folder / "few/README.md").write_text("my card")  # of a folder that is up to date
    contract = world.folder / "ann/contract.txt"
    write_rows(contract.with_name("train.jsonl"), 20, "Yes {k}")
    contract.write_text("the only copy")
    (tmp_path / "elsewhere").mkdir()
    (world.folder / "eve").symlink_to(tmp_path / "elsewhere")
    world.write(runs=(Path(ann["model"]).parent, "ann.jsonl", 1))
    trainer, save = Counting(), tokenizing.save_tokenizer

    def full(served, stop, folder):
        save(served, stop, folder)
        if folder.parent.name == "bob":
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "save_tokenizer", full)
        assert world.run("rates=advised", trainer=trainer) == 1
    out, err = capsys.readouterr()
    assert "ann has files, and no .lorasweep.jsonl" in err and "eve is a link" in err
    assert "bob cannot be written (No space left on device)" in out
    assert {name for name, *_ in trainer.asked}.isdisjoint({"ann", "eve"})
    assert contract.read_text() == "the only copy" and not [*(tmp_path / "elsewhere").iterdir()]
    assert not (world.folder / "bob/facts.json").exists() and world.card("few") == "my card"
    world.write(ann=None, eve=None)
    assert not world.trained("rates=advised") and world.facts("bob")["run"]


def test_a_folder_that_is_in_use_is_no_fleets_folder(world, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "owner")
    before = snapshot(tmp_path)
    for out in (".", "runs", "runs/x", "owner", "customers.yaml", "link"):
        with pytest.raises(LorasweepError, match=r"^out="):
            world.run(f"out={out}")
    assert snapshot(tmp_path) == before


def test_a_fleets_folder_of_version_0_2_is_read_and_never_written(world, tmp_path, capsys):
    """It has no marker, and its fleet.json says less."""
    world.set_table(*world.table[:3])
    earlier = dict.fromkeys(("template", "render", "mask"))
    earlier |= {"split": "prompt", "layers": "all", "answers": "all", "serve": "peft"}
    with folders.replaced(world.folder, "fleet.json") as partial:
        (partial / "fleet.json").write_text(json.dumps(earlier))
    assert world.run("rates=advised") == 0
    (world.folder / "fleet.json").write_text(json.dumps(earlier))
    for mark in world.folder.rglob(folders.MARK):
        mark.unlink()
    settings = ("rates=advised", f"out={shutil.move(world.folder, tmp_path / 'old')}")
    capsys.readouterr()
    for action, says in (("status", "3 done"), ("plan", "3 run"), ("verify_served", "3 folder is")):
        assert world.run(*settings, action=action) == 0
        assert says in capsys.readouterr().out
    write_rows(tmp_path / "bob.jsonl", 30, "Yes {k}")
    before = snapshot(tmp_path)
    with pytest.raises(SpecError, match=r"name a new folder with out="):
        world.run(*settings, trainer=Counting(1))
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- action=verify_served

NAMES = ("ann", "bob", "cat")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet of three: the folder with the base and the adapters; `check(...)` verifies it."""
    home = tmp_path_factory.mktemp("fleet")
    world = World(home, 2 * [make_base(home / "base")])
    rows = {n: write_rows(home / f"{n}.jsonl", 30, f"{n} {k} {{k}}") for k, n in enumerate(NAMES)}
    world.set_table(*({**world.table[0], "name": n, "data": str(p)} for n, p in rows.items()))
    settings = (f"out={home}/out", "rates=advised", "precision=fp32")
    assert world.run(*settings) == 0
    return home, lambda *more: world.run(*settings, *more, action="verify_served")


def peft_server(base, folders, broken=""):
    """Answers that PEFT computes from the folders, in fp32 with a little noise of its own.

    `broken`: the name of an adapter that is answered with an error."""
    torch.manual_seed(1)
    models = {"its-base": None} | dict.fromkeys(folders, "its-base")
    loaded = {n: PeftModel.from_pretrained(fresh(base), folder) for n, folder in folders.items()}
    loaded["its-base"] = fresh(base)

    @torch.no_grad()
    def log_p(name, tokens):
        ids = torch.tensor([tokens])
        found = loaded[name](input_ids=ids).logits[0, :-1].log_softmax(-1)
        found = found.gather(1, ids[0, 1:, None])[:, 0]
        return (found + 1e-3 * torch.randn_like(found)).tolist()

    @torch.no_grad()
    def complete(model, prompt, max_tokens, temperature, **_):
        how = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        found = loaded[model].generate(input_ids=torch.tensor([prompt]), **how)[0, len(prompt) :]
        tokenizer = AutoTokenizer.from_pretrained(base)
        ended = tokenizer.eos_token_id in found
        return tokenizer.decode(found, skip_special_tokens=True), "stop" if ended else "length"

    reply = vllm(models, log_p, complete)
    return answering(
        lambda path, body, headers: (
            (500, "no") if body and body["model"] == broken else reply(path, body, headers)
        )
    )


def verdicts(capsys):
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_right_fleet_is_served_and_each_fault_has_its_name(fleet, tmp_path, capsys):
    home, check = fleet
    right = {name: home / "out" / name for name in NAMES}
    with peft_server(home / "base", right) as url:
        assert check(f"url={url}/v1/") == 0
    assert "3 served" in capsys.readouterr().out
    factors = {"ann": 0.0, "bob": 0.5}
    wrong = {n: changed(right[n], tmp_path / n, factor) for n, factor in factors.items()}
    with peft_server(home / "base", wrong) as url:
        assert check(f"url={url}", "format=json") == 1
    found = verdicts(capsys)
    assert [found[name]["verdict"] for name in NAMES] == ["not applied", "differs", "missing"]
    assert 0.3 < found["bob"]["found"]["factor"] < 0.8
    # two servers; names swapped on one of them
    swapped = {"ann": right["bob"], "bob": right["ann"]}
    other = peft_server(home / "base", {"cat": right["cat"]})
    with peft_server(home / "base", swapped) as one, other as two:
        assert check(f"url=[{one},{two}]", "format=json") == 1
    found = verdicts(capsys)
    assert found["ann"]["notes"] == ["it is the adapter of bob"]
    assert [found[n]["verdict"] for n in NAMES] == [*2 * ["another customer's"], "served"]


def test_exact_answers_are_counted_once_and_again_by_a_server(world, tmp_path, capsys, monkeypatch):
    """What a customer's adapter learned to look up, and what it learned to say only at times."""
    colours = [{"prompt": f"Ask {k}: red or blue?", "completion": "blue"} for k in range(40)]
    write_json(tmp_path / "ann.jsonl", colours)
    for k, row in enumerate(colours):
        row["completion"] = ("blue", "red", "blue")[k % 3]
    write_json(tmp_path / "bob.jsonl", colours)
    write_rows(tmp_path / "long.jsonl", 40, "how long is this {k} " * 5)
    more = {"epochs": None, "steps": 200, "batch_size": 8}
    rows = {n: {**world.table[0], "name": n, **more} for n in ("ann", "bob", "long")}
    world.set_table(*(row | {"data": f"{name}.jsonl"} for name, row in rows.items()))
    settings = ("rates=advised", "precision=fp32")
    assert world.run(*settings) == 0
    ann, bob, long = (world.facts(name)["score"] for name in rows)
    n = ann["prompts"]
    assert (ann["before"], ann["after"]) == (0, n) and 0 < bob["after"] < n == ann["of"]
    said = f"0 of {n} before, {n} of {n} after "
    assert f"**exact answers:** {said}" in world.card("ann") and said in world.page
    assert f"0 → {n} of {n}" in capsys.readouterr().out and "after" not in long
    assert long["text"].startswith("not counted: answers have up to ") and "always" in long["text"]

    before = snapshot(world.folder)
    with monkeypatch.context() as patch:
        patch.setattr("lorasweep.train.sampling.sample", None)
        assert not world.trained(*settings) and snapshot(world.folder) == before
        assert world.run(*settings, "score=always") == 0  # the failure is long's alone
        assert "not callable" in world.facts("long")["score"]["text"]
        assert world.facts("ann")["score"] == ann
    assert world.run(*settings, "score=always") == 0 and world.facts("long")["score"]["before"] == 0
    capsys.readouterr()
    (world.store.folder(world.facts("long")["run"]) / "exact.json").write_text('{"damaged": 1}')
    base = Path(world.table[0]["model"]).parent
    with peft_server(base, {name: world.folder / name for name in rows}) as url:
        assert world.run(*settings, f"url={url}", "format=json", action="verify_served") == 0
    found = verdicts(capsys)
    assert found["ann"]["exact"] == f"{n} of {n} (here {n})"
    assert found["bob"]["exact"] == f"{bob['after']} of {n} (here {bob['after']})"
    assert found["long"]["exact"].startswith("not counted")
    assert world.run(*settings, "score=never") == 0 and world.facts("ann")["score"] == {}


def test_another_base_is_an_error_and_without_a_server_folders_are_checked(fleet, tmp_path, capsys):
    home, check = fleet
    torch.manual_seed(5)
    config = AutoModelForCausalLM.from_pretrained(home / "base").config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with (
        peft_server(tmp_path / "other", {"ann": home / "out/ann"}) as url,
        pytest.raises(SpecError, match=r"'its-base' is another base than .*Serve the base"),
    ):
        check(f"url={url}")
    with peft_server(home / "base", {n: home / f"out/{n}" for n in NAMES}, broken="bob") as url:
        assert check(f"url={url}", "format=json") == 1
    found = verdicts(capsys)
    assert [found[n]["verdict"] for n in NAMES] == ["served", "no answer", "served"]
    assert "500: no" in found["bob"]["notes"][0]
    assert check("format=json") == 0
    assert {row["verdict"] for row in verdicts(capsys).values()} == {"folder is right"}
    path = home / "out/bob/adapter_model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4])
    assert check("format=json") == 1
    path.write_bytes(kept)
    found = verdicts(capsys)["bob"]
    assert found["verdict"] == "folder refused" and "truncated" in found["notes"][0]
    table = json.loads((home / "customers.yaml").read_text())
    (home / "customers.yaml").write_text(json.dumps([*table, table[0]]))  # a name twice
    assert check("format=json") == 1
    found = [row["verdict"] for row in json.loads(capsys.readouterr().out)]
    assert found == [*3 * ["folder is right"], "no adapter"]


def test_facts_come_out_at_16_bits_each(tmp_path):
    facts = ("model=tiny64-facts", "dataset=facts", "dataset.generator_params.facts=1024")
    how = ("rates=2", "method.rank=8", "batch_size=4", "steps=24", "exec.threads=1", "format=json")
    found = json.loads(cli("action=measure", *facts, *how, cwd=tmp_path).stdout)
    known = 24 * 4 * 8 * 16
    for bits in (found[name]["bits"] for name in ("as_is", "prequential")):
        assert bits["measured"] == pytest.approx(known, rel=0.1)
        assert bits["per_token"] == pytest.approx(4, rel=0.1)
        assert bits["per_example"] == pytest.approx(128, rel=0.1)
        assert bits["all"]["low"] <= bits["all"]["value"] <= bits["all"]["high"]
        assert bits["all"]["value"] == pytest.approx(1024 * 16, rel=0.1)
    assert found["rows"] == {"measured": 96, "all": 128}
    for run in found["runs"]:
        result = RunStore(tmp_path / "runs").result(run["run"])
        assert run["nats"] == pytest.approx(result["code_nats"], rel=1e-9)


SMALL = ("dataset.max_length=64", "exec.workers=1", "exec.threads=1", "batch_size=4")
TUNE = ("+sweep=tune", "scale=smoke", "model=./base", "dataset=rows.csv", "steps=32", *SMALL)


@pytest.fixture
def home(tmp_path):
    make_base(tmp_path / "base")
    sums = [(7 * k // 3 % 10, 3 * k // 7 % 10) for k in range(80)]
    lines = [f"Case {k}: {a} + {b}?,It is {a + b}" for k, (a, b) in enumerate(sums)]
    (tmp_path / "rows.csv").write_text("\n".join(["instruction,output", *lines]))
    return tmp_path


@pytest.mark.slow
def test_a_run_on_ones_own_files_is_trained_once_wherever_they_lie(home):
    one = ("model=./base", "dataset=rows.csv", "method.rank=2", "steps=3", "lr=1e-3", *SMALL)
    first = cli(*one, cwd=home)
    assert "done, test NLL" in first.stdout
    model, data, example = first.stderr.splitlines()[:3]
    assert re.match("model base-.*llama, 0.03M parameters, 2 layers, bf16, context 2048", model)
    assert "csv, prompt_completion, columns instruction -> output" in data
    assert example.startswith("example, [[in the loss]]: <|begin_of_text|>Case ")
    elsewhere = home / "elsewhere"
    shutil.copytree(home / "base", elsewhere / "base")
    shutil.copy(home / "rows.csv", elsewhere)
    runs = f"exec.runs_dir={home}/runs"
    plan = cli(*one, "action=plan", "format=json", runs, cwd=elsewhere).stdout
    assert json.loads(plan)["runs"]["todo"] == 0
    assert json.loads(plan)["understood"] == [model, data, example]


@pytest.mark.slow
def test_a_killed_search_goes_on_and_its_best_adapter_loads_in_peft(home, command):
    tune = (*TUNE, "sweep.arms.lora.rank=2", "arms=lora", "budget=4runs")
    killed_at(lambda: len(list(home.glob("runs/*/result.json"))) >= 3, *tune, cwd=home)
    before = {p.parent.name: p.read_bytes() for p in home.glob("runs/*/result.json")}
    done = command(*tune, "out=best", "format=json")
    found = json.loads(done.stdout)
    now = {p.parent.name: p.read_bytes() for p in home.glob("runs/*/result.json")}
    assert now.items() >= before.items()
    answer, folder, (arm,) = found["answer"], home / "best", found["arms"]
    assert found["chosen_on"] == "validation" and answer["method"] == "lora" and answer["open"]
    # the run that is written is one at the learning rate of the answer, not the luckiest of all
    assert answer["out"] == f"written to best (learning rate {arm['best_tried']:g})"

    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), folder)
    assert adapter.peft_config["default"].r == answer["rank"] == 2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("base-")  # no path of this machine
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert json.loads((folder / "lorasweep.json").read_text())["prompt_form"]["messages"]


@pytest.mark.slow
def test_full_fine_tuning_alone_is_written_and_a_users_files_stay(home, command):
    asked = (*TUNE, "arms=fullft", "budget=5runs", "out=full")
    done = command(*asked)
    assert done.returncode == 0 and "\nexact answers: 0 of 20 before, " in done.stdout
    folder = home / "full"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert (folder / "chat_template.jinja").is_file()
    (folder / "notes.txt").write_text("mine")
    assert command(*asked).returncode == 0
    (folder / "lorasweep.json").write_text("mine")
    refused = command(*asked)
    assert refused.returncode == 2 and "lorasweep.json is not as lorasweep wr" in refused.stderr
    assert (folder / "notes.txt").read_text() == "mine" and "[" not in refused.stdout


SEARCH = (*TUNE, "steps=16", "budget=8runs", "out=best", "arms=fullft")
FLEET = ("action=fleet", "customers=customers.csv", "rates=advised", "exec.threads=1")


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "file"), [(SEARCH, ""), (FLEET, "adapter_")])
def test_weights_that_were_not_kept_come_from_the_recommended_command(
    command, home, monkeypatch, asked, file
):
    write_rows(home / "rows.jsonl", 60, "It is {k}.")
    row = "ann,base/config.json,sft,rows.jsonl,1"
    (home / "customers.csv").write_text(f"name,model,task,data,epochs\n{row}\n")
    monkeypatch.setattr(checkpoint, "load_weights", lambda folder: None)
    done = command(*asked)
    said = re.search(r"lorasweep (?:action=adapter run=|adapter )(\w+) out=\S", done.stdout)
    assert said, done
    # the folders of model and rows are not in the command: it works from elsewhere
    (home / "elsewhere").mkdir()
    where = (f"out={home}/out", f"exec.runs_dir={home}/runs")
    cli("action=adapter", f"run={said[1]}", *where, cwd=home / "elsewhere")
    monkeypatch.undo()
    trained = load_file(home / f"out/{file}model.safetensors")
    if not file:
        weights = checkpoint.load_weights(home / "runs" / said[1])
        assert weights and all(torch.equal(trained[n], t) for n, t in weights.items())
