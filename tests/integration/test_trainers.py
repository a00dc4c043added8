"""Real foreign trainers on a small base: TRL's own command, a plain script, two processes; a kill.

With our rows in our order, fp32 and our optimizer's settings, a run ends with our loop's loss.
"""

import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.trl_baseline import symbol_tokenizer
from lorasweep.config.compose import shipped_model
from lorasweep.models.load import transformers_folder
from lorasweep.store.run_store import RunStore
from tests.customers import make_base
from tests.world import ROOT, cli, start, wait_for

pytestmark = pytest.mark.full

RATES = (3e-4, 1e-3, 2e-3, 3e-3, 6e-3)
NATS = 1e-3
"""How far a foreign trainer's final loss may be from ours."""
SMOKE = ("model=./m", "dataset=dialect_smoke", "scale=smoke")
SCRIPT = ("trainer=hf", f"trainer.script={ROOT}/examples/train.py", "trainer.in_order=true")
WITH_PROGRAMS = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a shipped base in the form of transformers, and a tokenizer of its symbols."""
    here = tmp_path_factory.mktemp("trainers")
    model = shipped_model("tiny64")
    transformers_folder(model, [], here / "m")
    symbols = [chr(0x4E00 + k) for k in range(model.vocab_size)]
    symbol_tokenizer(
        symbols, symbols[0], eos_token=symbols[1], pad_token=symbols[2]
    ).save_pretrained(here / "m")
    return here


def losses(cwd, *settings, rates=RATES, env=None):
    """Learning rate -> the final loss of a run of SMOKE."""
    said = [
        cli(*SMOKE, *settings, "method=fullft", f"lr={lr}",
            cwd=cwd, env={**WITH_PROGRAMS, **(env or {})}, timeout=1500, check=False)
        for lr in rates
    ]  # fmt: skip
    text = "".join(one.stdout + one.stderr for one in said)
    store = RunStore(cwd / "runs")
    wanted = settings[0].partition("=")[2] if settings else "builtin"
    found = {}
    for rid in store.existing():
        spec, result = store.spec(rid), store.result(rid)
        if spec.get("trainer", {}).get("name", "builtin") == wanted and spec["lr"] in rates:
            assert result, text
            found[spec["lr"]] = result["test_nll"]
    assert sorted(found) == sorted(rates), text
    return found


@pytest.mark.parametrize("trainer", [("trainer=trl",), SCRIPT], ids=["trl", "script"])
def test_full_fine_tuning_by_another_trainer_ends_with_our_loss_at_five_rates(place, trainer):
    ours, theirs = losses(place), losses(place, *trainer)
    assert all(abs(theirs[lr] - ours[lr]) < NATS for lr in RATES), (ours, theirs)
    # the comparison can fail: at twice the rate our loop's losses are elsewhere
    doubled = losses(place, rates=tuple(2 * lr for lr in RATES))
    assert all(abs(theirs[lr] - doubled[2 * lr]) > NATS for lr in RATES)


def test_adapters_by_trl_and_by_the_script_start_alike_and_are_obeyed_alike(place):
    found = []
    for trainer in (("trainer=trl",), SCRIPT):
        said = cli(*SMOKE, *trainer, "lr=5e-3", "method.rank=4", "steps=8", "seed=7", cwd=place,
                   env=WITH_PROGRAMS, timeout=600).stdout  # fmt: skip
        rid = said.partition("run ")[2].split()[0]
        result = RunStore(place / "runs").result(rid)
        assert "trl 1." in result["trainer_versions"] and result["state"] == "done"
        assert "doubt" not in result
        found.append(result["test_nll"])
    assert abs(found[0] - found[1]) < NATS


def test_a_killed_run_of_trl_resumes_from_its_checkpoint_and_nothing_runs_twice(place):
    more = ("method=fullft", "lr=2e-3", "steps=400", "trainer=trl", "exec.checkpoint_s=1")
    command = json.loads(json.dumps(shipped("trl")["command"]))
    command = [w for w in command if not w.startswith("--save_strategy")] + [
        "--save_strategy=steps"
    ]
    command += ["--save_steps=20", "--save_total_limit=2"]
    more += (
        f"trainer.command={json.dumps(command)}",
        'trainer.resume=["--resume_from_checkpoint={resume}"]',
    )
    process = start("-m", "lorasweep", *SMOKE, *more, cwd=place, env=WITH_PROGRAMS)
    pattern = "*/attempts/1/out/checkpoint-*/trainer_state.json"
    saved = wait_for(lambda: [*(place / "runs").glob(pattern)])[0]
    rid = saved.relative_to(place / "runs").parts[0]
    (worker,) = psutil.Process(process.pid).children()
    theirs = worker.children(recursive=True)
    worker.kill()
    process.wait()  # the command tries again
    process.stdout.close()
    store = RunStore(place / "runs")
    result = store.result(rid)
    assert result["state"] == "done" and result["resumed"] and store.last_attempt(rid) == 2
    assert not any(p.is_running() and p.status() != "zombie" for p in theirs)
    whole = cli(*SMOKE, *more[:-2], cwd=place, env=WITH_PROGRAMS, timeout=900).stdout
    other = store.result(whole.rpartition("run ")[2].split()[0])
    assert other["run_id"] != rid and abs(other["test_nll"] - result["test_nll"]) < NATS


def shipped(name):
    import yaml

    return yaml.safe_load((ROOT / f"conf/trainer/{name}.yaml").read_text())


def test_two_processes_of_accelerate_train_one_run(place):
    """Each has half of a batch, so the loss is ours only if both ran."""
    import trl

    words = [w for w in shipped("trl")["command"][2:] if "batch_size" not in w]
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no"]
    words = [*launch, str(Path(trl.__file__).parent / "scripts/sft.py"), *words]
    words += ["--run_name=batch-{batch_size}"]
    words += ["--per_device_train_batch_size=2", "--use_cpu=True", "--ddp_backend=gloo"]
    found = losses(
        place,
        "trainer=command",
        f"trainer.command={json.dumps(words)}",
        "trainer.in_order=true",
        rates=(2e-3,),
    )
    assert abs(found[2e-3] - losses(place, rates=(2e-3,))[2e-3]) < NATS


def test_one_command_searches_with_the_users_script_and_rows_and_keeps_the_best(tmp_path):
    import torch

    make_base(tmp_path / "m", torch.float32)
    lines = [f"How many? {k % 37}+{k},{k % 10}\n" for k in range(100)]
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "".join(lines))
    said = cli("tune", "./m", "rows.csv", "trainer=hf", f"trainer.script={ROOT}/examples/train.py", "steps=10",
               "out=best", "budget=8runs", cwd=tmp_path, env=WITH_PROGRAMS, timeout=1200)  # fmt: skip
    assert "written to best" in said.stdout
    assert (tmp_path / "best/lorasweep.json").exists() and list(
        (tmp_path / "best").glob("*.safetensors")
    )
    steps = {
        RunStore(tmp_path / "runs").spec(rid)["steps"]
        for rid in RunStore(tmp_path / "runs").existing()
    }
    assert steps == {10}  # full lengths only


def test_the_environment_of_a_trainer_is_the_users(place):
    """The worker finds our code first; the trainer does not, unless the user says so."""
    script = "import os, sys; print(os.environ['PYTHONPATH'], os.environ.get('PYTHONSAFEPATH')); sys.exit(3)"
    command = json.dumps([sys.executable, "-c", script, "{lr}", "{seed}", "{out}/run.json"])
    own = f"{ROOT}:/users/own"  # as the worker's is ours, and then this
    said = cli(
        *(*SMOKE, "lr=1e-3", "trainer=command", f"trainer.command={command}"),
        cwd=place,
        check=False,
        env={**WITH_PROGRAMS, "PYTHONPATH": own},
    )
    assert f"\n{own} None" in said.stdout + said.stderr
