"""The command line in this process: refused requests, help, users' own files, advice; packages that are
missing; names that no configuration file describes; keys of `format=json`. After a change of those that
is wanted, delete the golden file: a test writes it, and fails once."""

import json
import math
import re
import subprocess
import sys
from pkgutil import resolve_name
from unittest.mock import Mock

import pandas as pd
import pytest

from analysis.report.report import judge_and_report
from analysis.runs.table import read
from lorasweep.__main__ import main as lorasweep
from lorasweep.cli.actions import ACTIONS, VERBS, act, as_overrides
from lorasweep.data import sources, splits
from lorasweep.errors import ClusterError, DataError, SpecError, StoreError
from lorasweep.launch import local
from lorasweep.models.describe import describe_model
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.work import run
from lorasweep.work.inputs import understood
from lorasweep.work.search import all_points
from tests import small_hub
from tests.conftest import SMOKE, FakeTrainer
from tests.customers import CHAT_TEMPLATE, make_base, write_rows
from tests.planted import Valley
from tests.small_hub import llama_like
from tests.world import ROOT, compose_request, write_json, write_splits

OF_FLEET = "action=fleet customers=customers.csv"


def refused(done, *words):
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("+sweep=lr_ration", "Did you mean 'lr_ratio'"),
        ("scale=huge", "tiny"),
        ("lr=abc", "abc"),
        ("+learning_rate=1e-3", "'learning_rate' not found"),
        ("rank=4", "Available: method.rank"),
        ("-m lr=1", "-m is not supported"),
        ("--resolve", "--cfg job"),
        ("+sweep=lr_ratio exec.runs_dir='~nobody9/r'", "no such user"),
        ("model=tiny64,tiny128 lr=1e-3", "sweep.axes.model"),
        ("model@x=tiny64 lr=1e-3", "expected KEY=VALUE"),
        ("lora.rank=4", "method=lora method.rank=..."),
        ("+sweep=lr_ratio lora.rnak=4", "Did you mean 'rank'"),
        ("+sweep=lr_ratio lora=5", "METHOD.FIELD is for the arms of a sweep"),
        ("+sweep=lr_ratio lora.method=fullft,lora", "METHOD.FIELD is for"),
        ("+sweep=lr_ratio lora.rank=4 sweep.arms.lora.rank=8", "Write sweep.arms.lora.rank=4"),
        ("+sweep=lr_ratio method.rank=4", "Write lora.rank=4"),
        ("+sweep=lr_ratio model=tiny64 +sweep.axes.model=[tiny128]", "sweep.axes.model=tiny64"),
        ("+sweep=lr_ratio lora.rank=range(1,3)", "lora.rank=A,B"),
        ("+sweep=invariance fullft.lr=1e-3", "no arm of the sweep has method=fullft"),
        ("plam lr_ratio", "Did you mean 'plan'"),
        ("plan lr_ration", "Did you mean 'lr_ratio'"),
        ("customers.csv", "lorasweep tune customers.csv"),
        ("check-gpu here", "expected only settings"),
        ("plan lr_ratio action=status", "'action=status' sets what"),
        ("lr_ratio sweep=rank", "has set"),
        ("tune tiny64 rows.csv model=tiny128", "has set"),
        ("action=layers", "matrices, measure"),
        (
            "export lr_ratio table=x.csv",
            "table is only for action=fit and action=answer and action=import",
        ),
        ("export lr_ratio out=customers.csv", "no exported table"),
        ("fit customers.csv", "no column 'lr'"),
        ("report lr_ratio", "no run of this command has finished"),
        ("+sweep=lr_ratio scale.name=small", "scale=NAME"),
        ("steps", "steps"),
        ("hardware=h100", "Add action=plan"),
        ("table=x.csv", "action=fit and action=answer and action=import"),
        ("watch=5s", "only for action=status"),
        ("action=status watch=5", "watch=5s"),
        ("--follow", "--follow"),
        ("+sweep=lr_ratio exec.runs_dir=customers.csv/runs", "cannot be written"),
        ("method=lora exec.world_size=3 batch_size=8", "does not divide batch_size=8"),
        ("action=advise", "needs customers=FILE"),
        ("action=advise customers=c.csv +customer.model=x", "Give one of the two"),
        ("customers=c.csv", "customers is only for action=advise"),
        ("action=advise +sweep=rank customers=c.csv", "Leave +sweep=rank out"),
        ("action=advise customers=customers.csv why=acne", "Did you mean 'acme'"),
        ("action=advise customers=customers.csv out=page.pdf", ".html"),
        ("advise customers.csv out=mine.html", "mine.html has other content"),
        ("action=measure data=no.jsonl", "no file"),
        ("action=measure cluster=slurm", "srun python -m"),
        ("action=measure dataset=facts model=tiny64-facts batch_size=1000", "has 64 rows"),
        (f"{OF_FLEET} exec.world_size=2", "in one process"),
        (f"{OF_FLEET} early_stopping=2 objective=policy_gradient", "objective=sft"),
        (f"{OF_FLEET} rates=many", "rates='many'"),
        ("action=fleet", "customers=FILE"),
        *((f"{OF_FLEET} rates={rates}", "3 to 9") for rates in (2, 10)),
        (f"{OF_FLEET} instead_of_full=yes", "Allowed: lora"),
        (f"{OF_FLEET} method.rank=4", "method.rank has no effect"),
        ("+sweep=lr_ratio sweep.axes.batch_size=[4]", "To add it: +sweep.axes.batch_size=[4]"),
        ("+sweep=lr_ratio sweep.arms.lra.rank=[4]", "Did you mean 'sweep.arms.lora'"),
        ("+sweep=lr_ratio sweep.arms.lora.rank=[64]", "and 2 other runs: method.rank=64"),
        ("+sweep=lr_ratio +sweep.arms.lora.rnak=[1]", "Did you mean 'rank'"),
        ("+sweep=large_batches scale=paper", "no scale 'paper'. Its file has: smoke, tiny"),
        ("+sweep=study sweep.parts=[study]", "no part of 'study'"),
        ("+sweep=study sweep.parts=[large_batches] scale=paper", "no part of sweep 'study'"),
        ("+sweep=lr_ratio exec.runs_dir=", "expected a folder"),
        ("model= dataset=dialect", "model '' not found"),
        ("action=go", "Available: adapter"),
        ("+sweep=lr_ratio scale=small exec.models_dir=[/no]", "make weights"),
        ("dataset=gsm8k exec.data_dir=[/no]", "exec.data_dir"),
        ("dataset=skills model=tiny64", "48 symbols"),
        *((f"~{key}", "must have a value") for key in ("lr", "lr.x", "exec", "cluster.options")),
        *((f"{key}=null", f"{key}=None: expected") for key in ("exec", "cluster.options")),
        ("cluster=slurm cluster.container_mounts=[/x]", "expected a cluster.container=IMAGE"),
        *(
            (f"cluster=slurm +cluster.options.{k}=x", "expected none of array, dependency")
            for k in ("dependency", "job_name")
        ),
        ("cluster=slurm cluster.work_max=1", "at least cluster.work_min"),
        ("model=llama-3.1-8b method=fullft cluster=slurm hardware=h100 exec.max_gpus=1", "no run"),
        ("cluster=slurm cluster.gpus=3 cluster.workers=2", "a multiple of cluster.workers"),
        ("+sweep=lr_ratio arms=5", "'5' not found"),
        *((f"+sweep=lr_ratio sweep.axes.model={v}", "expected a name") for v in ("[5]", "null")),
        ("+sweep=lr_ratio +sweep.axes.generator_params=5", "expected numbers by name"),
    ],
)
def test_wrong_requests_end_with_status_2_and_start_nothing(command, tmp_path, arguments, words):
    (tmp_path / "customers.csv").write_text("name,model,task\nacme,llama-3.1-8b,sft\n")
    (tmp_path / "mine.html").write_text("mine")
    scale = () if "scale=" in arguments else ("scale=smoke",)
    refused(command(*scale, *arguments.split()), words)
    assert not list(tmp_path.glob("runs/*/spec.json"))


def test_jobs_are_submitted_with_a_warning_of_names_that_change(tmp_path, monkeypatch, capsys):
    given = ("model=llama-3.1-8b", "model.revision=main", "cluster=slurm", "scale=smoke")
    request = compose_request([*given, f"exec.runs_dir={tmp_path}/runs"])
    monkeypatch.setattr(run, "check", lambda request: None)
    monkeypatch.setattr(run, "submit", Mock(side_effect=ClusterError("full")))
    with pytest.raises(ClusterError):
        run.run(request, RunStore(tmp_path / "runs"))
    assert "names no commit of the hub" in capsys.readouterr().err


def test_every_action_has_a_function_and_stands_in_the_help(command, tmp_path):
    assert all(callable(resolve_name(a.does)) for a in ACTIONS.values())
    text, short = command("--help").stdout, command().stdout
    assert all(w in text for w in ("sweep: batch_size, capacity", "${geom:1e-4,1e-2,4}"))
    assert short.index("lorasweep tune ./my-model rows.csv") < short.index("lorasweep run")
    assert "lr_ratio        Is LoRA's best" in short and "scale=tiny_beyond  as tiny" in short
    for verb in ("tune", *VERBS):
        assert f"\nlorasweep {verb}" in text and f"  lorasweep {verb}" in short
        for asked in (("help", verb), (verb, "--help")):
            assert f"example: lorasweep {verb}" in command(*asked).stdout
    assert "Alpha is 32" in command("help", "lr_ratio").stdout
    refused(command("plan"), "example: lorasweep plan lr_ratio")
    assert list(tmp_path.iterdir()) == []  # nothing is dropped into the current folder


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("plan lr_ratio scale=small", "+sweep=lr_ratio action=plan scale=small"),
        ("lr_ratio", "+sweep=lr_ratio"),
        ("run layers", "+sweep=layers"),
        ("layers sweep.arms.lora.rank=[4]", "+sweep=layers sweep.arms.lora.rank=[4]"),
        ("tune ./m r.csv budget=2h", "+sweep=tune model='./m' dataset='r.csv' budget=2h"),
        ("plan tune ./m r.csv", "+sweep=tune model='./m' dataset='r.csv' action=plan"),
        ("fleet c.csv", "action=fleet customers='c.csv'"),
        ("status fleet c.csv", "action=status customers='c.csv'"),
        (
            "verify-served c.csv url=http://x:1",
            "action=verify_served customers='c.csv' url=http://x:1",
        ),
        ("check-gpu", "action=check_gpu"),
        ("adapter 0123 out=d", "action=adapter run='0123' out=d"),
        ("sweep=rank ~sweep.arms.common", "+sweep=rank ~sweep.arms.common"),
    ],
)
def test_verbs_are_overrides(words, overrides):
    assert sorted(as_overrides(words.split(), ("lr_ratio", "layers", "tune", "plan"))) == sorted(
        overrides.split()
    )


def test_the_composed_configuration_of_a_verb_is_shown(command):
    by_verb = command("plan", "lr_ratio", "tiny64", "--cfg", "job").stdout
    assert (
        by_verb == command("+sweep=lr_ratio", "model=tiny64", "action=plan", "--cfg", "job").stdout
    )


ODD = ("a,b", "c=d", "e f", "${oc.env:HOME}", "g'h", 'i"j', "k\\", "k\\l", "[x]")


@pytest.mark.parametrize("name", ODD)
def test_words_are_literals(here, name):
    """A model and a folder of rows of any name; of a table, as of every setting, too."""
    (here / "support-model").rename(here / name)
    (here / f"of {name}").mkdir()
    (here / "rows.jsonl").rename(here / f"of {name}/rows.jsonl")
    words = ["tune", f"./{name}", f"./of {name}/rows.jsonl"]
    spec = compose_request(as_overrides(words, ["tune"])).points[0].spec
    assert (spec.model.location, spec.dataset.source) == (name, "jsonl")
    asked = compose_request(as_overrides(["fleet", f"./{name}.csv"], []))
    assert asked.customers == f"./{name}.csv" and asked.action == "fleet"


def test_a_sweep_takes_a_base_data_and_settings_of_a_method(compose, here):
    sweep = ("+sweep=lr_ratio", "scale=tiny")
    one = compose(*sweep, "model=tiny64", "dataset=rows.jsonl")  # without generator parameters
    assert {p.spec.model.name for p in one.points} == {"tiny64"} and one.changed
    assert {p.spec.dataset.source for p in one.points} == {"jsonl"}
    two = compose(
        *sweep,
        "dataset=rows.jsonl",
        "model=tiny64,./support-model",
        "lora.rank=1,4",
        "lora.lr=1e-3",
    )
    found = {(p.spec.model.name[:7], getattr(p.spec.method, "rank", 0)) for p in two.points}
    assert found == {(m, r) for m in ("tiny64", "support") for r in (0, 1, 4)}
    assert {p.spec.lr for p in two.points if p.arm == "lora"} == {1e-3}
    nested = compose("+sweep=layers", "model=tiny128", "dataset=dialect", "lora.lr=1e-3,2e-3")
    assert {(p.spec.model.name, p.spec.dataset.name[:7]) for p in nested.points} == {
        ("tiny128", "dialect")
    }
    assert {p.spec.lr for p in nested.points if p.spec.method.name == "lora"} == {1e-3, 2e-3}
    steps = {
        p.arm: p.spec.steps for p in compose("+sweep=rl", "scale=smoke", "fullft.steps=2").points
    }
    assert steps == {"fullft": 2, "lora": 4}  # whose task is that of the other arm
    rates = compose("+sweep=layers", "scale=smoke", "lora.lr=${around:1e-3,3,2}").points
    assert {p.spec.lr for p in rates if p.arm == "lora"} == {5e-4, 1e-3, 2e-3}
    with pytest.raises(SpecError, match="artificial language: which rows"):
        compose(*sweep, "model=./support-model", "dataset.n_train=9")
    assert compose("action=measure", "model=./support-model", "data=rows.jsonl").points
    parts = compose(*STUDY, "model=tiny128", "lora.rank=2")
    assert {p.spec.model.name for part in parts.parts for p in part.points} == {"tiny128"}


def own(folder, name, text):
    """Write a user's configuration file; return the options that include it."""
    write_json(folder / "mine" / name, [text])
    return "--config-dir", folder / "mine"


def test_a_users_sweep_and_model_come_in_by_config_dir_and_wrong_ones_are_named(command, tmp_path):
    text = (ROOT / "sweeps/lr_ratio.yaml").read_text().replace("model: tiny64,", "model: narrow,")
    own(tmp_path, "sweep/my_ratio.yaml", text)
    model = (ROOT / "conf/model/tiny64.yaml").read_text()
    model = model.replace("tiny64", "narrow").replace("steps: 670", "steps: 3")
    mine = own(tmp_path, "model/narrow.yaml", model)
    plan = command(*mine, "+sweep=my_ratio", "scale=smoke", "action=plan", "format=json")
    assert json.loads(plan.stdout)["arms"][0]["model"] == "narrow"
    scale = "# @package sweep\nquestion: So?\nanalysis: lr_ratio\nscales:\n  tiny: "
    for name, body, *says in (
        ("lr_ratio", text, "would be ignored. Rename it"),
        ("odd", text.replace("question:", "quesion:"), "Did you mean 'question'"),
        ("broken", "question: [", "YAML"),
        ("arm", f"{scale}{{armz: {{}}}}\n", "sweep 'arm'", "at scale tiny", "armz"),
        ("round", f"{scale}{{rounds: two}}\n", "sweep 'round'", "at scale tiny", "roun"),
        ("empty", f"{scale}\n", "sweep 'empty'"),
        ("number", f"{scale}3\n", "sweep 'number', scales"),
        ("listed", scale.replace("\n  tiny: ", " [tiny]\n"), "sweep 'listed', scales"),
    ):
        own(tmp_path, f"sweep/{name}.yaml", body)
        refused(command(*mine, f"+sweep={name}", "action=plan"), *says)
        (tmp_path / f"mine/sweep/{name}.yaml").unlink()
    (tmp_path / "mine/sweep/latin.yaml").write_bytes(b"question: \xc9t\xe9?\n")
    refused(command(*mine, "+sweep=latin", "action=plan"), "UTF-8")
    assert command(*mine).returncode == 0  # the list of all sweeps
    own(tmp_path, "scale/odd.yaml", "# @package _global_\nstepz: 3\nscale: {name: odd}\n")
    refused(command(*mine, "scale=odd", "lr=1e-3"), "Did you mean 'steps'")
    own(tmp_path, "model/123.yaml", model.replace("narrow", "'123'"))
    assert command(*mine, "model=123", "dataset=dialect", "lr=1e-3", "action=plan").returncode == 0


def test_an_unreadable_row_is_named_before_anything_starts(command, tmp_path):
    text = (ROOT / "conf/dataset/gsm8k.yaml").read_text().replace("name: gsm8k", "name: mine")
    lines = [line for line in text.splitlines() if not line.startswith("revision")]
    mine = own(tmp_path, "dataset/mine.yaml", "\n".join(lines))
    write_splits(tmp_path / "gsm8k", [{"question": "a", "answer": "b"}, '{"question": '])
    data = ("dataset=mine", f"exec.data_dir=[{tmp_path}]")
    refused(command(*mine, *data, "model=tiny64", "method.rank=4"), "train.jsonl:2: not a JSON row")
    assert not list((tmp_path / "runs").glob("*/spec.json"))


def test_a_hub_name_without_a_commit_is_named_and_shipped_ones_have_one(command):
    arguments = ("model.revision=main", "dataset=tulu3", "method.rank=4", "action=plan")
    text = command("model=llama-3.1-8b", *arguments).stdout
    assert "model llama-3.1-8b (meta-llama/Llama-3.1-8B) names no commit of the hub" in text
    assert "dataset tulu3" not in text
    files = [p for group in ("model", "dataset") for p in (ROOT / "conf" / group).glob("*.yaml")]
    shipped = [text for p in files if "source: hub" in (text := p.read_text())]
    assert len(shipped) > 17
    assert all(re.search(r"^revision: [0-9a-f]{40}$", text, re.M) for text in shipped)


@pytest.mark.parametrize("action", ["run", "check_gpu", "measure", "status", "plan", "adapter"])
def test_a_folder_that_cannot_be_written_is_an_error_before_training(command, tmp_path, action):
    (tmp_path / "a").write_text("")
    asked = {"measure": ("model=tiny64", "dataset=dialect"), "adapter": ("run=x", "out=y")}
    trains, place = action in ("run", "check_gpu", "measure"), f"{tmp_path}/a"
    folder = f"exec.reports_dir={place}/b" if trains else f"exec.runs_dir={place}"
    more = asked.get(action, ("+sweep=lr_ratio", "scale=smoke") if action == "run" else ())
    says = f"{place}: it is no folder. Choose another folder" if trains else place
    refused(command(f"action={action}", *more, folder), says)
    assert not (tmp_path / "runs").exists()


def test_quotes_of_a_name_and_a_folder_are_no_part_of_it(command, tmp_path):
    mine = own(tmp_path / "it's", "sweep/mine.yaml", (ROOT / "sweeps/layers.yaml").read_text())
    two = (*mine, "--config-dir", str(tmp_path))  # both are read
    assert command(*two, "+sweep=mine", "scale=smoke", "action=plan").returncode == 0
    done = command(*two, "+sweep='lr_ratio'", "scale=smoke", "action=status")
    assert done.returncode == 0 and done.stdout.startswith("lr_ratio at scale smoke")


TABLE = (
    "name,model,task,examples,tokens_per_example,hardware\n"
    'acme,llama-3.1-8b,sft,"50,000",300,\n'
    "lab,Qwen/Qwen3-30B-A3B,rl,10000,800,h200\n"
)


def test_a_table_is_answered_in_text_with_a_page_and_as_a_list(command, tmp_path):
    table = tmp_path / "customers.csv"
    table.write_text(TABLE)
    asked = ("action=advise", f"customers={table}")
    page = tmp_path / "p.html"
    done = command(*asked, f"out={page}")
    assert "2 customers: 2 LoRA" in done.stdout and f"{page}" in done.stdout
    assert command(*asked).returncode == done.returncode == 0
    assert "acme" in page.read_text() and (tmp_path / "reports/advice-customers.html").exists()
    why = command(*asked, "why=acme")
    assert why.returncode == 0 and "source: " in why.stdout and "lr_factor = 10" in why.stdout
    assert "lorasweep tune llama-3.1-8b ROWS lora.rank=" in why.stdout
    table.write_text(f"{TABLE}bad,gpt-9,sft,10,10,\n")  # a wrong row makes the status 1
    done = command(*asked, "format=json", "hardware=a100")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and [a["name"] for a in found] == ["acme", "lab", "bad"]
    assert found[2].keys() == {"name", "error"}
    assert "NaN" not in done.stdout and [a["gpu"] for a in found[:2]] == ["a100", "h200"]
    assert found[2]["error"].startswith("row 4: column model: model 'gpt-9' not found")
    table.write_text("name,model,task\nbad,gpt-9,sft\n")  # a fleet without runs
    done = command("action=plan", f"customers={table}", "format=json")
    (only,) = json.loads(done.stdout)
    assert done.returncode == 1 and only["name"] == "bad" and "row 2" in only["error"]


@pytest.fixture
def without(monkeypatch):
    """Make packages look as if they were not installed."""

    def block(*packages):
        for name in [m for m in sys.modules if m.split(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return block


HUB = DatasetSpec(name="rows", source="hub", location="org/rows", format="text")
NEEDED = {
    "wandb": ("mirror=wandb", lambda: act(compose_request(["scale=smoke", "mirror=wandb"]))),
    "submitit": ("cluster=slurm", lambda: act(compose_request(["scale=smoke", "cluster=slurm"]))),
    "gguf": ("some.gguf", lambda: describe_model("some.gguf")),
    "datasets": ("rows", lambda: sources.of_hub(HUB, False)),
}


@pytest.mark.parametrize("package", NEEDED)
def test_what_needs_a_package_is_refused_before_it_trains(without, tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    without(package)
    what, ask = NEEDED[package]
    with pytest.raises(SpecError, match=f"(?s){what}.*pip install {package} .*make wheelhouse"):
        ask()
    assert not list(tmp_path.glob("runs/*/spec.json"))


def test_a_python_without_the_environment_is_named(without, monkeypatch, capsys):
    without("hydra")
    monkeypatch.setattr(sys, "argv", ["lorasweep", "+sweep=lr_ratio"])
    with pytest.raises(SystemExit) as end:
        lorasweep()
    said = capsys.readouterr().err
    assert end.value.code == 2 and sys.executable in said and "activate" in said


@pytest.mark.parametrize("absent", [(), ("matplotlib",), ("plotly", "jinja2")])
def test_a_report_without_a_package_is_the_same_answer_without_pages(without, tmp_path, absent):
    """The pages of an earlier report are gone, so that none is older than the answer beside it."""
    folder, pages = ROOT / "analysis/results/lr_ratio-tiny", {"report.md", "report.html"}
    asked = json.loads((folder / "question.json").read_text())
    for old in (*pages, "own.png"):
        (tmp_path / old).write_text("old")
    without(*absent)
    text = judge_and_report(read(folder / "table.parquet"), asked, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["verdicts"]
    there = {p.name for p in tmp_path.iterdir()}
    assert "expected" in text and (tmp_path / "own.png").read_text() == "old"
    assert ("left out: " in text) == bool(absent) == (not pages & there)
    assert all(package in text for package in absent) and ("lr_nll.png" in there) == (not absent)


FILE = ROOT / "tests/golden/json_keys.json"
VALLEY = Valley(10, noise=0.05)
RATES = ("sweep.replicate.seeds=[1,2]", *VALLEY.rates("6e-4,1.2e-3,2.4e-3"))
STUDY = ("+sweep=study", "scale=smoke", "sweep.parts=[lr_ratio,rank]")
ROWS = "name,model,task,examples,data\nann,./base/config.json,sft,,ann.jsonl\n"
FLEET = ("customers=fleet.csv", "rates=advised", "precision=fp32", "exec.workers=1")

CASES = {  # in this order: later cases read what earlier ones leave
    "run alone": ("scale=smoke", "method=lora", "lr=5e-3"),
    "plan alone": ("scale=smoke", "action=plan"),
    "verify": ("scale=smoke", "method=lora", "lr=5e-3", "action=verify", "sample=1"),
    "matrices": ("matrices", "scale=smoke"),
    "plan": (*SMOKE, "action=plan"),
    "plan gpus": (*SMOKE, "action=plan", "hardware=h100"),
    "plan study": (*STUDY, "action=plan"),
    "plan slurm": (*SMOKE, "action=plan", "hardware=h100", "cluster=slurm"),
    "plan search": ("+sweep=tune", "scale=smoke", "model=./base", "dataset=ann.jsonl", "action=plan"),
    "status": (*SMOKE, *RATES, "action=status"),
    "extend": (*SMOKE, *RATES, "action=extend"),
    "report": ("report", *SMOKE, *RATES),
    "export": ("export", *SMOKE, *RATES, "out=runs.csv"),
    "fit": ("fit", "runs.csv"),
    "answer": ("answer", "lr_ratio", "format=json"),
    "cancel": (*SMOKE, "action=cancel"),
    "status study": (*STUDY, "action=status"),
    "advise": ("action=advise", "customers=advised.csv"),
    "advise why": ("action=advise", "customers=advised.csv", "why=ann"),
    "fleet plan": (*FLEET, "action=plan"),
    "fleet": (*FLEET, "action=fleet"),
    "fleet status": (*FLEET, "action=status"),
    "verify_served": (*FLEET, "action=verify_served"),
    "measure": ("action=measure", "data=ann.jsonl", "model=./base", "rates=1", "batch_size=4", "steps=5"),
}  # fmt: skip


def keys(value, path=""):
    """Return the paths of all values, as text; the entries of a list have one path."""
    if isinstance(value, dict) and value:
        return set().union(*(keys(v, f"{path}.{k}" if path else k) for k, v in value.items()))
    if isinstance(value, list):
        return set().union({f"{path}[]"}, *(keys(v, f"{path}[]") for v in value))
    return {path}


def test_a_full_disk_leaves_an_earlier_table_and_is_named(compose, tmp_path, monkeypatch):
    assert act(compose(*SMOKE, *RATES), FakeTrainer(VALLEY.nll)) == 0
    (tmp_path / "runs.csv").write_text(earlier := "spec,result\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(files, "_write_new", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"runs\.csv"):
        act(compose(*SMOKE, *RATES, "action=export", "out='~/runs.csv'"))
    assert (tmp_path / "runs.csv").read_text() == earlier


@pytest.mark.parametrize("end", ["csv", "parquet"])
def test_an_export_that_would_lose_runs_columns_or_cells_is_refused(compose, tmp_path, end):
    def export(*more):
        act(compose(*SMOKE, *RATES, "action=export", f"out={path}", *more))
        return path.read_bytes()

    path, alone = tmp_path / f"runs.{end}", ("arms=lora",)
    assert act(compose(*SMOKE, *RATES), FakeTrainer(VALLEY.nll)) == 0
    few = export(*alone)  # a column of whole numbers, which has gaps beside full fine-tuning
    assert len(export()) > len(few)
    with pytest.raises(StoreError, match="runs of another folder"):
        export(*alone)
    load = (lambda: pd.read_csv(path)) if end == "csv" else (lambda: pd.read_parquet(path))
    for change in ({"my_notes": "an hour"}, {"status": "hand-made"}):
        table, before = load().assign(**change), path.read_bytes()
        table.to_csv(path, index=False) if end == "csv" else table.to_parquet(path)
        changed = path.read_bytes()
        with pytest.raises(StoreError, match=rf"runs\.{end} has what this export would lose"):
            export()
        assert path.read_bytes() == changed
        path.write_bytes(before)
    noted = load().set_axis([f"note {k}" for k in range(len(load()))])  # names of rows
    text = noted.to_csv().removeprefix(",")  # as R writes them
    path.write_text(text) if end == "csv" else noted.to_parquet(path)
    with pytest.raises(StoreError, match="column index"):
        export()
    (link := path.with_stem("link")).symlink_to(path)
    with pytest.raises(SpecError, match="is a link"):
        act(compose(*SMOKE, *RATES, "action=export", f"out={link}"))


def test_a_page_of_advice_that_was_changed_stays(command, tmp_path):
    (tmp_path / "customers.csv").write_text(ROWS)
    page = tmp_path / "page.html"
    advise = ("advise", "customers.csv", f"out={page}")
    assert command(*advise).returncode == command(*advise).returncode != 2
    page.write_text(changed := page.read_text().replace("</h1>", ": my notes</h1>"))
    refused = command(*advise)
    assert refused.returncode == 2 and "page.html has other content" in refused.stderr
    assert "out=FILE" in refused.stderr and page.read_text() == changed


@pytest.mark.slow
def test_the_keys_of_json_are_kept(command, compose, capsys, tmp_path):
    make_base(tmp_path / "base")
    write_rows(tmp_path / "ann.jsonl", 40, "ann {k}")
    (tmp_path / "advised.csv").write_text(f"{ROWS}big,llama-3.1-8b,rl,900,\nbad,gpt-9,sft,10,\n")
    (tmp_path / "fleet.csv").write_text(ROWS)
    now = {}
    asked = compose(*SMOKE, *RATES, "format=json")  # planted, so that the answer has all its parts
    assert act(asked, FakeTrainer(VALLEY.nll)) == 0
    now["run"] = sorted(keys(json.loads(capsys.readouterr().out)))
    for name, arguments in CASES.items():
        done = command(*arguments, "format=json")
        assert done.returncode == (name == "advise"), (name, done.stderr)  # a wrong row
        now[name] = sorted(keys(json.loads(done.stdout)))
    if not FILE.exists():
        FILE.write_text(json.dumps(now, indent=1) + "\n")
        pytest.fail(f"{FILE} is written anew: commit it")
    assert now == json.loads(FILE.read_text())


@pytest.mark.parametrize(("asked", "pictures"), [(SMOKE, 2), (STUDY, 3)])  # 3: a second stage
def test_a_watch_shows_until_all_runs_have_ended(compose, capsys, monkeypatch, asked, pictures):
    """Pictures before and after the runs, at a terminal in the same place; JSON a line each."""
    cases = ((True, "text", 2), (False, "text", 4), (False, "json", 8))
    for (terminal, form, batch), every in zip(cases, ("1min", "60s", "99999999999h")):
        whole = compose(
            *asked, f"batch_size={batch}", "action=status", f"watch={every}", f"format={form}"
        )

        def train(seconds, parts=whole.parts or [whole]):
            assert seconds == (86400 if form == "json" else 60)  # a clock holds no more
            for part in parts:
                store, trainer = RunStore(part.exec.runs_dir), FakeTrainer(VALLEY.nll)
                points = all_points(part, store)  # those of the second stage, too
                local.run_points(points, store, part.exec, lambda event: None, trainer)

        monkeypatch.setattr("lorasweep.cli.status.time.sleep", train)
        monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
        assert act(whole) == 0
        out = capsys.readouterr().out
        assert out.count("\033[2J\033[H") == pictures * terminal
        if form == "json":
            found = [keys(json.loads(line)) for line in out.splitlines()]
            missing = [any("runs.missing" in key for key in picture) for picture in found]
            assert missing[0] and not missing[-1] and len(found) == pictures
        else:
            assert "6 missing" in out and "missing" not in out.rpartition(" at scale")[2]


RUN = ("method.rank=1", "steps=2", "batch_size=2")


@pytest.fixture
def here(tmp_path_factory, monkeypatch):
    """A folder with a model and rows, beside which commands are given."""
    folder = tmp_path_factory.mktemp("mine")
    make_base(folder / "support-model")
    write_rows(folder / "rows.jsonl", 60, "Yes {k}")
    same = {"prompt": "So?", "completion": "Yes"}
    rows = [{"frage": f"So? {k}", "antwort": f"Yes {k}", **same} for k in range(60)]
    write_json(folder / "deutsch.jsonl", rows)
    monkeypatch.chdir(folder)
    return folder


def test_a_folder_and_a_file_are_a_model_and_a_data_set(compose, here):
    found = compose("model=./support-model", "dataset=rows.jsonl", *RUN)
    (point,) = found.points
    model, data = point.spec.model, point.spec.dataset
    assert (model.source, model.location, model.n_layers) == ("folder", "support-model", 2)
    assert (data.source, data.location, data.n_validation) == ("jsonl", ".", 15)
    assert found.exec.models_dir[-1] == found.exec.data_dir[-1] == str(here)
    assert found.described == [model.name, data.name]
    (again,) = compose(f"model={here}/support-model/", f"dataset='{here}/rows.jsonl'", *RUN).points
    assert again.id == point.id and str(here) not in point.spec.canonical


def test_the_same_names_are_values_of_axes(compose, here):
    sweep = ("+sweep=lr_ratio", "scale=smoke", "sweep.arms.fullft.lr=[1e-3]")
    axes = "sweep.axes.model=[./support-model,tiny64]", "sweep.axes.dataset=[rows.jsonl]"
    found = compose(*sweep, *axes)
    specs = [p.spec for p in found.points]
    assert {s.model.location for s in specs} == {"support-model", ""}
    assert {s.dataset.source for s in specs} == {"jsonl"} and found.changes[-2:] == [*axes]
    assert str(here) in found.exec.models_dir and str(here) in found.exec.data_dir
    arm = compose(*sweep, "+sweep.arms.lora.dataset=rows.jsonl")
    assert {p.spec.dataset.source for p in arm.points if p.arm == "lora"} == {"jsonl"}


def test_a_file_may_have_any_name(compose, here):
    path = here / "donn\u00e9es (1).jsonl"
    path.write_bytes((here / "rows.jsonl").read_bytes())
    (point,) = compose("model=./support-model", f"dataset='{path}'", *RUN).points
    grid = ("+sweep=lr_ratio", "scale=smoke", f"sweep.axes.dataset=['{path}']")
    names = {p.spec.dataset.name for p in compose(*grid).points}
    assert names == {point.spec.dataset.name} and names.pop().startswith("donn\u00e9es (1)-")


def test_a_search_takes_what_the_command_line_says(compose, here):
    asked = ("+sweep=tune", "model=./support-model", "dataset=rows.jsonl", "batch_size=2")
    (steps,) = {p.spec.steps for p in compose(*asked).points}
    assert steps == math.ceil(3 * 30 / 2)  # three passes over 60 rows less 30 held out
    for more, steps in (("+sweep.axes.steps=50", 50), ("dataset.n_train=28", 42)):
        assert {p.spec.steps for p in compose(*asked, more).points} == {steps}
    search = compose(*asked, "+sweep.arms.lora.lr=3e-3")
    store = RunStore(search.exec.runs_dir)
    lora = [p.spec.lr for p in all_points(search, store) if p.arm == "lora"]
    assert 3e-3 in lora and 3e-3 not in [p.spec.lr for p in all_points(compose(*asked), store)]


def test_a_search_takes_the_chat_template_of_the_base(compose, here):
    chats = make_base(here / "chat-model")
    (chats / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    plain, chat = ("role_eos", "{prompt}\n", True), ("chat_template", "{prompt}", False)
    for form, *given in (
        (chat, "model=./chat-model"),
        (plain, "model=./support-model"),
        (plain, "model=./chat-model", "dataset.render=role_eos"),
    ):
        data = [p.spec.dataset for p in compose("+sweep=tune", "dataset=rows.jsonl", *given).points]
        assert {(d.render, d.template, d.bos) for d in data} == {form}


def test_the_counts_are_those_of_training(compose, here):
    asked = [f"So? {k}" + " late" * 90 * (k % 4 == 0) for k in range(80)]
    write_json(here / "long.jsonl", [{"prompt": prompt, "completion": "Y"} for prompt in asked])
    given = ("model=./support-model", "dataset=long.jsonl", *RUN)
    for sweep in ((), ("+sweep=tune",)):
        asked = compose(*given[:2], *sweep, "dataset.max_length=48")
        (line, warning) = understood(asked)[1:3]
        data = asked.points[0].spec.dataset
        loaded = splits.load(data, asked.exec.data_dir, llama_like())
        assert f"{loaded.n_train} training, {len(loaded.validation)} validation and " in line
        # test rows that are left out count, too
        assert loaded.n_train < 40 and "rows. Set dataset.max_length=" in warning
    for key, says in (("prompt", "longer. Set max_length="), ("completion", "Set dataset.max_le")):
        rows = [{"prompt": "So?", "completion": "Y", key: f"{k}" + " late" * 90} for k in range(80)]
        write_json(here / "long.jsonl", [{"prompt": "So?", "completion": "Y"}, *rows])
        with pytest.raises(DataError, match=says):
            understood(compose(*given, "dataset.max_length=64"))
    with pytest.raises(DataError, match="no row is left for training"):
        understood(compose(*given, "dataset.holdout=81"))


def test_columns_can_be_named_and_other_fields_set(compose, here):
    names = ("dataset.prompt_field=frage", "dataset.completion_field=antwort")
    given = ("model=support-model", "dataset=deutsch.jsonl", *RUN)
    spec = compose(*given, *names, "dataset.max_length=64").points[0].spec.dataset
    assert (spec.prompt_field, spec.completion_field, spec.max_length) == ("frage", "antwort", 64)
    with pytest.raises(SpecError, match=": 1 unique rows"):  # by the columns that are recognised
        compose(*given)


def test_configuration_files_win(compose, here, tmp_path):
    make_base(here / "tiny64")
    assert not compose("model=tiny64").described
    assert compose("model=./tiny64", "dataset=rows.jsonl").points[0].spec.model.location == "tiny64"
    own = "name: rows.jsonl\nsource: synthetic\nlocation: skills"
    write_json(tmp_path / "dataset/rows.jsonl.yaml", [own])
    found = compose_request(["dataset=rows.jsonl"], str(tmp_path))
    assert found.points[0].spec.dataset.location == "skills" and not found.described


@pytest.mark.parametrize(
    ("given", "near", "more"),
    [
        ("model=./suport-model", "support-model", "a .gguf file"),
        ("dataset=rows.json", "rows.jsonl", ".jsonl, .json, .csv or .parquet"),
        ("+sweep=lr_ratio scale=smoke sweep.axes.model=[tiny46]", "tiny64", "llama-3.1-8b"),
        ("+sweep=lr_ratio +sweep.arms.lora.dataset=[dialekt]", "dialect", "gsm8k"),
    ],
)
def test_a_wrong_name_is_said_with_the_nearest_one(compose, here, given, near, more):
    with pytest.raises(SpecError, match=f"Did you mean '{near}'") as error:
        compose(*given.split())
    assert more in str(error.value)


def test_a_name_that_is_there_but_cannot_be_used_says_why(compose, here):
    (here / "empty").mkdir(exist_ok=True)
    for given, missing in (("model=empty", "config.json"), ("dataset=empty", "train.jsonl")):
        with pytest.raises(SpecError, match=missing) as error:
            compose(given, *RUN)
        assert "Did you mean" not in str(error.value)


def test_names_of_the_hub_are_pinned(compose, monkeypatch, tmp_path):
    commit, school = small_hub.COMMIT, "openai/gsm8k"
    rows = {"train": [small_hub.school(k) for k in range(60)]}
    small_hub.download(tmp_path, school, "main", commit, rows)
    small_hub.offline(tmp_path, monkeypatch)
    data = compose("model=smollm2-135m", f"dataset={school}:main@{commit}").points[0].spec.dataset
    assert (data.location, data.config, data.revision) == (school, "main", commit)
    assert (data.holdout, data.held_out_by, data.prompt_field) == (30, "prompt", "question")
    with pytest.raises(SpecError, match=r"as a data set of the hub .* cannot load 'owner/none'"):
        compose("dataset=owner/none")


def test_shipped_names_and_plans_need_no_torch(tmp_path):
    code = (
        "import runpy, sys; from tests.world import compose_request as c; "
        "c(['+sweep=lr_ratio', 'scale=smoke']); c(['model=smollm2-135m', 'dataset=gsm8k']); "
        "sys.argv[1:] = ['+sweep=lr_ratio', 'scale=smoke', 'action=plan']\n"
        "try: runpy.run_module('lorasweep', run_name='__main__')\n"
        "finally: print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, text=True, cwd=tmp_path).endswith("\n[]\n")
