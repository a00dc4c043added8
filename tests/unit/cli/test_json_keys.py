"""What `format=json` prints has the keys in tests/golden/json_keys.json: programs of users read them.

After a change that is wanted, delete that file: then this test writes it, and fails once.
"""

import json

import pytest

from lorasweep.cli.actions import act
from tests.customers import make_base, write_rows
from tests.planted import Valley
from tests.world import ROOT

FILE = ROOT / "tests/golden/json_keys.json"
SWEEP = ("+sweep=lr_ratio", "scale=smoke")
VALLEY = Valley(10, noise=0.05)
RATES = ("sweep.replicate.seeds=[1,2]", *VALLEY.rates("6e-4,1.2e-3,2.4e-3"))
STUDY = ("+sweep=study", "scale=smoke", "sweep.parts=[lr_ratio,rank]")
TABLE = "name,model,task,examples,data\nann,./base/config.json,sft,,ann.jsonl\n"
ADVISED = TABLE + "big,llama-3.1-8b,rl,900,\nbad,gpt-9,sft,10,\n"
FLEET = ("customers=fleet.csv", "rates=advised", "precision=fp32", "exec.workers=1")

CASES = {  # in this order: later cases read what earlier ones leave
    "run alone": ("scale=smoke", "method=lora", "lr=5e-3"),
    "plan alone": ("scale=smoke", "action=plan"),
    "verify": ("scale=smoke", "method=lora", "lr=5e-3", "action=verify", "sample=1"),
    "layers": ("scale=smoke", "action=layers"),
    "plan": (*SWEEP, "action=plan"),
    "plan gpus": (*SWEEP, "action=plan", "hardware=h100"),
    "plan study": (*STUDY, "action=plan"),
    "plan slurm": (*SWEEP, "action=plan", "hardware=h100", "cluster=slurm"),
    "plan search": ("+sweep=tune", "scale=smoke", "model=./base", "dataset=ann.jsonl", "action=plan"),
    "status": (*SWEEP, *RATES, "action=status"),
    "extend": (*SWEEP, *RATES, "action=extend"),
    "export": (*SWEEP, *RATES, "action=export", "table=runs.csv"),
    "cancel": (*SWEEP, "action=cancel"),
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


@pytest.mark.slow
def test_the_keys_of_json_are_kept(command, compose, fake_trainer, capsys, tmp_path):
    make_base(tmp_path / "base")
    write_rows(tmp_path / "ann.jsonl", 40, "ann {k}")
    (tmp_path / "advised.csv").write_text(ADVISED)
    (tmp_path / "fleet.csv").write_text(TABLE)
    now = {}
    asked = compose(*SWEEP, *RATES, "format=json")  # planted, so that the answer has all its parts
    assert act(asked, fake_trainer(VALLEY.nll)) == 0
    now["run"] = sorted(keys(json.loads(capsys.readouterr().out)))
    for name, arguments in CASES.items():
        done = command(*arguments, "format=json")
        assert done.returncode == (name == "advise"), (name, done.stderr)  # a wrong row
        now[name] = sorted(keys(json.loads(done.stdout)))
    if not FILE.exists():
        FILE.write_text(json.dumps(now, indent=1) + "\n")
        pytest.fail(f"{FILE} is written anew: commit it")
    assert now == json.loads(FILE.read_text())
