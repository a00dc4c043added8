"""The contract with foreign trainers, with one that does on demand what they do wrong."""

import copy
import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.questions.base import Analysis
from analysis.report.sentences import cautions_of
from analysis.runs.curves import lr_curves
from analysis.runs.table import TableError
from lorasweep.cli.actions import act
from lorasweep.data.handed import write_rows
from lorasweep.errors import SpecError, TrainingError
from lorasweep.launch import external
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.torch_trainer import TorchTrainer
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models.load import weights_sha256
from lorasweep.spec.run import validate
from lorasweep.spec.trainer import PLACES, TrainerSpec
from lorasweep.store import checkpoint
from lorasweep.store.exported import load_runs, table_row
from lorasweep.store.run_store import RunStore
from lorasweep.train import referee
from lorasweep.train.loop import attached
from lorasweep.train.referee import doubt, read_weights
from tests.conftest import FakeTrainer
from tests.customers import make_base
from tests.planted import Valley
from tests.unit.launch.trainers import train
from tests.world import compose_request, tiny_spec, wait_for, write_json

FAKE = Path(__file__).with_name("fake_trainer.py")
LORA = LoRA(rank=2, alpha=8, layers="attention+mlp")


def foreign(mode="", **changes):
    words = ("model={model}", "rows={rows}", "out={out}", "lr={lr}", "seed={seed}", f"mode={mode}")
    words += ("steps={steps}", "batch_size={batch_size}")
    template = {
        "name": "fake",
        "command": (sys.executable, str(FAKE), *words),
        "lora": ("rank={rank}", "alpha={alpha}", "layers={layers}"),
        "resume": ("resume={resume}",),
    }
    trainer = TrainerSpec(**{**template, **changes.pop("trainer", {})})
    return tiny_spec(**{"method": LORA, "steps": 3, "trainer": trainer, **changes})


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "GRACE_S", 0.5)
    made = RunStore(tmp_path / "runs")
    made.prepare()
    return made


def run(store, *specs, stop=None, trainer=None, **settings):
    """Train runs, one after another; return how the last one ended: its result, or why it failed."""
    stop, settings = stop or StopFlag(), {"runs_dir": str(store.root), **settings}
    trainer = trainer or TorchTrainer(stop)
    for spec in specs:
        train(store, [spec], trainer, stop=stop, **settings)
    return store.result(spec.id) or store.failure(spec.id)


@pytest.mark.parametrize("method", [LORA, FullFT()])
def test_a_run_is_measured_by_us_before_and_after_with_the_weights_that_were_left(store, method):
    trainer, spec = TorchTrainer(), foreign(method=method, lr=3e-3)
    result = run(store, spec, trainer=trainer, keep_weights=True)
    assert result["state"] == "done" and result["nll_start"] != result["test_nll"]
    assert [p["step"] for p in result["curve"]] == [0, 3]
    assert (
        result["trainer_versions"].startswith("accelerate ")
        and "torch " in result["trainer_versions"]
    )
    assert store.records(spec.id)[0] == {"step": 1, "train_nll": 2.5}  # its own, shown
    # the same weights, loaded by PEFT or transformers, have the loss that was recorded
    base, out = trainer.base(spec, run_exec(store)), store.attempt(spec.id, 1) / "out"
    data = trainer.data(spec, run_exec(store), base)
    before = weights_sha256(base.model)
    loss = other_loss(out, base, data)
    assert loss == pytest.approx(result["test_nll"], abs=1e-5)
    kept = checkpoint.load_weights(store.folder(spec.id))
    with attached([spec], base, [kept]):
        assert weights_sha256(base.model) != before
    assert weights_sha256(base.model) == before == result["base_sha256"]
    row = load_runs(store.root).iloc[0]
    assert (
        row["trainer"] == spec.trainer.label and row["weights_sha256"] == result["weights_sha256"]
    )


def run_exec(store):
    from lorasweep.spec.execution import Exec

    return Exec(runs_dir=str(store.root))


def other_loss(out, base, data):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if (out / "adapter_config.json").exists():
        config = json.loads((out / "adapter_config.json").read_text())
        names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        (out / "adapter_config.json").write_text(
            json.dumps({**config, "target_modules": sorted(names)})
        )
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), out)
    else:
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    total = count = 0
    for row in data.test:
        tokens = torch.tensor(row.tokens[None].astype("int64"))
        with torch.no_grad():
            log_p = model(tokens).logits[0, :-1].double().log_softmax(-1)
        at = torch.tensor(row.loss[1:])
        total -= log_p.gather(1, tokens[0, 1:, None])[:, 0][at].sum().item()
        count += int(at.sum())
    return total / count


WRONG = {
    "fails": ["exit status 1", "a wrong argument", "key ***"],
    "nothing": ["left no config.json", "There: nothing"],
    "bytes": ["left no config.json", r"There: caf\udce9.bin"],
    "long": ["exit status 1", "x" * 1000],
    "rank": ["r is 3, asked was 2"],
    "alpha": ["lora_alpha is 16.0, asked was 8.0"],
    "layers": [
        "8 tensors missing (asked were the layers attention+mlp): model.layers.0.self_attn.q_proj.A"
    ],
    "zero": ["28 of 28 B are 0"],
    "half": ["4 of 28 B are 0, not trained, such as model.layers.0.self_attn.q_proj.B"],
    "whole": ["is torch.int32"],
    "broken": ["adapter_config.json or adapter_model.safetensors cannot be read"],
    "moved": ["is a link"],
    "model": ["left a model, and was asked for an adapter"],
    "pickle": ["no pickles. There: adapter_config.json, adapter_model.bin"],
    "link": ["adapter_model.safetensors is a link"],
}


@pytest.mark.parametrize("mode", WRONG)
def test_what_a_trainer_does_wrong_is_a_failure_with_its_sentence(store, mode, monkeypatch):
    monkeypatch.setenv("FAKE_API_KEY", "hidden-1234")
    why = run(store, foreign(mode))
    assert all(part in why for part in WRONG[mode]) and len(why) < 10_000, why
    assert "hidden-1234" not in why
    assert "hidden-1234" not in (store.attempt(foreign(mode).id, 1) / "log.txt").read_text()


def test_a_model_with_frozen_matrices_is_a_failure(store):
    assert "q_proj" in run(store, foreign("frozen", method=FullFT()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_was_only_saved_in_another_type_is_a_failure(store, tmp_path, dtype):
    spec = foreign(method=FullFT())
    base = TorchTrainer().base(spec, run_exec(store))
    with torch.no_grad():
        for p in base.model.parameters():
            p *= 1.0001  # no value of a smaller type
    copy.deepcopy(base.model).to(dtype).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match=r"30 matrices unchanged, such as model\."):
        read_weights(tmp_path, spec, base)


def test_weights_are_read_into_the_bases_shape_whatever_code_or_kernels_their_config_names(store):
    assert run(store, foreign("code", method=FullFT()))["state"] == "done"


RNG = np.random.default_rng(0)
START = [RNG.normal(3.5, 0.7, 29) for _ in range(32)]
END = [row * RNG.normal(0.75, 0.05) for row in START]  # 2.6 nats
FELL = 2.6 + 0.9 * np.exp(-np.arange(60) / 10) + RNG.normal(0, 0.1, 60)
HONEST = {
    "each update": FELL,
    "window": FELL.reshape(6, 10).mean(1),
    "one entry": [FELL.mean()],
    "sum": FELL * 232,
    "all tokens": FELL * 0.8,
    "bits": FELL / np.log(2),
    "smoothing": 0.9 * FELL + 0.42,
    "dropout": FELL + 0.3,
    "running mean": np.cumsum(FELL) / np.arange(1, 61),
    "few": FELL[:3],
    "none finite": [math.nan, math.nan, math.nan],
    "zero": [0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("logs", HONEST)
def test_only_a_loss_above_what_was_logged_is_doubted_whatever_its_unit_and_window(logs):
    assert doubt(START, END, HONEST[logs]) == ""
    worse = doubt(START, START, HONEST[logs])
    short = logs in ("one entry", "few", "none finite", "zero", "running mean", "bits")
    assert worse.startswith("its loss is not ours") or short
    # the last update is in no logged loss, and may raise it
    assert doubt(START, START, FELL[:5] - 1) == ""


def test_a_loss_that_is_not_ours_is_a_doubt_in_result_status_and_answer(store):
    boasts, humble, silent = (foreign(m, lr=1e-4) for m in ("boasts", "humble", "silent"))
    said = run(store, boasts)["doubt"]
    assert said.startswith("its loss is not ours: another base, scale or template? (3.")
    assert "doubt" not in run(store, humble) and "doubt" not in run(store, silent)
    alien = run(store, foreign("alien", method=FullFT()))
    assert "trained from another base" in alien["doubt"] and alien["state"] == "done"
    assert "doubt" not in run(store, foreign("humble", method=FullFT(), lr=1e-3))
    far = run(store, foreign("silent", method=FullFT(), lr=3.0))  # an honest learning rate
    assert "doubt" not in far and far["state"] == "done"
    table = load_runs(store.root, [boasts.id])
    lines = cautions_of(Analysis([], [], []), table)
    assert lines[0] == f"Doubtful: 1 of 1 runs ({boasts.id}): {said.partition(' (')[0]}"
    assert f"Trained by {boasts.trainer.label}" in lines[-1] and "cannot be checked" in lines[-1]


def test_weights_that_are_not_finite_are_diverged(store):
    result = run(store, foreign("nan"))
    assert result["state"] == "diverged" and "test_nll" not in result


IGNORED = [
    ("warmup_steps", [0, 16], "warmup_steps"),
    ("schedule", ["constant", "linear"], "schedule"),
    ("weight_decay", [0.0, 0.1], "weight_decay"),
    ("beta2", [0.9, 0.99], "beta2"),
    ("precision", ["bf16", "fp32"], "precision"),
    ("data_sha256", ["a", "b"], "rows"),
    ("base_sha256", ["a", "b"], "model"),
]


def test_equal_weights_at_two_rates_are_refused_and_at_two_seeds_count_once(store):
    run(store, *(foreign("rate", lr=lr) for lr in (1e-3, 2e-3)))
    with pytest.raises(
        TableError, match=r"left equal weights at lr 0.001 and 0.002: it ignores lr"
    ):
        lr_curves(load_runs(store.root))
    longer = load_runs(store.root).assign(lr=1e-3, steps=[3, 6])
    with pytest.raises(TableError, match="at steps 3 and 6: it ignores steps"):
        lr_curves(longer)
    for key, values, place in IGNORED:
        changed = load_runs(store.root).assign(lr=1e-3, seed=[1, 2], **{key: values})
        with pytest.raises(TableError, match=f"{key} .* and .*Correct its use of {{{place}}}"):
            lr_curves(changed)
    assert lr_curves(load_runs(store.root).assign(lr=1e-3, seed=[1, 2], clip_norm=[1, 9]))
    run(store, *(foreign("seed", seed=seed) for seed in (1, 2)), *(foreign(seed=s) for s in (1, 2)))
    table = load_runs(store.root)
    table = table[~table["trainer"].eq(foreign("rate").trainer.label)]
    curves = lr_curves(table.reset_index(drop=True))
    assert sorted(len(curve.x) for curve in curves) == [1, 2]
    assert all((curve.block == 0).all() for curve in curves)  # unpaired seeds
    assert not any(curve.mixed for curve in curves)
    table.loc[table["seed"] == 1, "trainer_versions"] = "trl 0.1"
    assert [curve.mixed for curve in lr_curves(table) if len(curve.x) == 2] == [True]


def test_seeds_are_paired_by_our_order_or_by_data_that_they_draw():
    def block(spec):
        return table_row(spec.plain(), {"run_id": spec.id, "state": "done"})["block"]

    drawn = dataclasses.replace(tiny_spec().dataset, draw_by_seed=True)
    assert block(foreign(seed=7)) == 0
    assert block(foreign(seed=7, trainer={"in_order": True})) == 7
    assert block(foreign(seed=7, dataset=drawn)) == 7


def test_diverged_runs_with_equal_weights_are_not_compared(store):
    run(store, *(foreign("nan", method=FullFT(), lr=lr) for lr in (1e-3, 2e-3)))
    (curve,) = lr_curves(load_runs(store.root))
    assert len(curve.x) == 2 and not curve.usable.any()


def test_a_trainer_that_reads_every_file_it_gets_sees_no_test_row(store):
    trainer, spec = TorchTrainer(), foreign("reads")
    run(store, spec, trainer=trainer)
    seen = (store.attempt(spec.id, 1) / "out/seen.txt").read_text()
    data = trainer.data(spec, run_exec(store))
    train_rows = data.train(spec.seed, 0, spec.steps * spec.batch_size)
    assert all(json.dumps(row.tokens.tolist()) in seen for row in train_rows)
    assert not any(json.dumps(row.tokens.tolist()) in seen for row in data.test)
    assert spec.dataset.name not in seen
    given = json.loads((store.attempt(spec.id, 1) / "out/run.json").read_text())
    assert {*PLACES} - given.keys() <= {"resume"} and given["lr"] == spec.lr


@pytest.mark.parametrize("form", ["pairs", "messages"])
def test_rows_are_handed_over_as_text_without_those_of_the_test(tmp_path, form):
    texts = [{"prompt": f"How many? {k}", "completion": f"Just {k}."} for k in range(60)]
    path, base = (
        write_json(tmp_path / "rows.jsonl", texts),
        make_base(tmp_path / "m", torch.float32),
    )
    command = '["x","--lr={lr}","--seed={seed}","{out}/run.json"]'
    overrides = (
        f"trainer.command={command}",
        f"trainer.rows={form}",
        "trainer=command",
        "scale=smoke",
    )
    request = compose_request([f"model={base}", f"dataset={path}", "+sweep=lr_ratio", *overrides])
    spec, exec_ = request.points[0].spec, request.exec
    trainer = TorchTrainer()
    base = trainer.base(spec, exec_)
    data = trainer.data(spec, exec_, base)
    write_rows(tmp_path / "handed", spec, data, base.tokenizer, exec_.data_dir)
    assert sorted(p.name for p in (tmp_path / "handed").iterdir()) == [
        "train.jsonl",
        "validation.jsonl",
    ]
    seen = {
        name: (tmp_path / f"handed/{name}.jsonl").read_text() for name in ("train", "validation")
    }
    parts = {"train": data.train(0, 0, data.n_train), "validation": data.validation}
    for name, rows in parts.items():
        lines = [json.loads(line) for line in seen[name].splitlines()]
        if form == "messages":
            roles = [[m["role"] for m in line["messages"]] for line in lines]
            assert roles == [["user", "assistant"]] * len(lines)
            answers = [line["messages"][1]["content"] for line in lines]
        else:
            # prompt and completion, tokenized one by one and ended, are the tokens that we train on
            ends = [base.tokenizer.eos_token_id]
            said = [
                tuple(
                    base.tokenizer(line["prompt"], add_special_tokens=False).input_ids
                    + base.tokenizer(line["completion"], add_special_tokens=False).input_ids
                    + ends
                )
                for line in lines
            ]
            assert sorted(said) == sorted(tuple(row.tokens.tolist()) for row in rows)
            answers = [line["completion"] for line in lines]
        assert len(answers) == len(rows)
    tests = [
        base.tokenizer.decode(row.tokens[row.loss], skip_special_tokens=True) for row in data.test
    ]
    assert tests and not any(f'"{said}"' in text for said in tests for text in seen.values())


def test_weights_outside_of_the_folder_are_not_read(store, tmp_path):
    spec = foreign(method=FullFT())
    base = TorchTrainer().base(spec, run_exec(store))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "x.safetensors").write_bytes(b"")
    index = {"weight_map": {"a": "../x.safetensors"}}
    (tmp_path / "out/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TrainingError, match=r"left no \.\./x\.safetensors"):
        read_weights(tmp_path / "out", spec, base)


def test_a_trainer_that_hangs_is_stopped_with_all_its_processes(store):
    spec = foreign("hangs")
    why = run(store, spec, trainer_max_h=3 / 3600)
    assert "trainer.max_h" in why
    wait_for(lambda: not alive(child_of(store, spec)), 10)


def test_a_stop_ends_the_trainer_and_a_later_attempt_has_a_folder_of_its_own(store):
    stop, spec = StopFlag(), foreign("hangs")
    threading.Timer(3, lambda: setattr(stop, "set", True)).start()
    with pytest.raises(Stopped):
        run(store, spec, stop=stop)
    assert store.state(spec.id) == "interrupted"
    wait_for(lambda: not alive(child_of(store, spec)), 10)
    left = sorted(p.name for p in (store.attempt(spec.id, 1) / "out").iterdir())
    run(store, spec, trainer_max_h=1 / 3600)
    assert sorted(p.name for p in (store.attempt(spec.id, 1) / "out").iterdir()) == left
    assert (store.attempt(spec.id, 2) / "out/run.json").exists()


def child_of(store, spec, n=1):
    path = store.attempt(spec.id, n) / "out/child"
    return int(wait_for(lambda: path.exists() and path.read_text().strip(), 60))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_takes_its_trainer_along(store):
    spec = foreign("hangs")
    worker = os.fork()
    if worker == 0:
        run(store, spec)
        os._exit(0)
    child = child_of(store, spec)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    wait_for(lambda: not marked(store, spec), 30)  # its group; a child that left the group stays
    assert store.state(spec.id) == "interrupted"
    wait_for(lambda: not alive(child), 10)


def marked(store, spec):
    mark = f"{external.MARK}={store.attempt(spec.id, 1)}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path] if mark in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_what_an_earlier_attempt_left_running_is_killed_and_its_checkpoint_is_resumed(store):
    spec = foreign("waits")
    n = store.claim(spec)
    (store.attempt(spec.id, n) / "out/checkpoint-3").mkdir(parents=True)
    (store.attempt(spec.id, n) / "out/checkpoint-3/trainer_state.json").write_text("{}")
    (store.attempt(spec.id, n) / "out/checkpoint-7").mkdir()  # not complete
    env = {**os.environ, external.MARK: str(store.attempt(spec.id, n))}
    left = subprocess.Popen(["sleep", "300"], env=env, start_new_session=True)
    store.write_end(spec.id, n, "stopped", "killed")
    assert run(store, spec)["resumed"] is True
    assert left.wait(10) == -signal.SIGKILL
    log = (store.attempt(spec.id, 2) / "log.txt").read_text()
    assert "1/out/checkpoint-3" in log


@pytest.mark.parametrize("mode", ["secret", "secret_key"])
def test_a_secret_in_what_the_trainer_left_is_struck_out_everywhere(store, mode, monkeypatch):
    monkeypatch.setenv("FAKE_API_KEY", "sk-it's-1234")
    spec = foreign(mode)
    assert "***" in run(store, spec)
    texts = [p for p in store.folder(spec.id).rglob("*") if p.suffix in (".txt", ".json", ".jsonl")]
    ours = [p for p in texts if "out" not in p.relative_to(store.root).parts]
    assert ours and not any("1234" in p.read_text() for p in ours)


def test_secrets_are_struck_out_as_json_and_line_by_line(monkeypatch):
    monkeypatch.setenv("MY_SECRET", 'pa"ss\\word')
    monkeypatch.setenv("MY_KEY", "-----BEGIN\nabcdef\nEND")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("OTHER_TOKEN_USE", "False")
    said = external.without_secrets(json.dumps(['pa"ss\\word']) + "\nabcdef\nis false, False\n")
    assert said == '["***"]\n***\nis false, False\n'


def test_a_secret_in_the_template_is_refused_before_it_is_stored(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_SECRET123")
    words = [*foreign().trainer.command, "--token=hf_SECRET123"]
    with pytest.raises(SpecError, match=f"word {len(words) - 1} has the value of a secret"):
        compose_request(["trainer=command", f"trainer.command={json.dumps(words)}"])


def test_a_program_that_may_be_executed_and_not_read_has_no_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(external.shutil, "which", lambda name: str(tmp_path))  # open() raises
    assert external.versions_of("unreadable-program") == ""


def test_too_little_memory_to_measure_a_trained_run_is_its_failure_alone(store, monkeypatch):
    def judge(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")

    monkeypatch.setattr(referee, "judge", judge)
    why = run(store, spec := foreign())
    assert "too little memory to measure what the trainer left in" in why
    assert (store.attempt(spec.id, 1) / "out/adapter_config.json").exists()


def test_a_program_that_is_not_there_is_named(store):
    command = ("no-such-program", "{lr}", "{seed}", "{out}")
    assert "'no-such-program' cannot be started" in run(
        store, foreign(trainer={"command": command})
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"command": ("x", "{lr}", "{out}")}, "{seed}"),
        ({"command": ("x", "{lr}", "{seed}", "{out}", "{rnak}")}, "Did you mean 'rank'?"),
        ({"command": ("x", "{lr}{seed}{out}{resume}")}, "trainer.resume"),
        ({"in_order": True, "rows": "pairs"}, "in_order"),
        ({"rows": "pairs"}, "rows=pairs needs text. Expected trainer.rows=tokens"),
        ({"command": ("x", "{lr}{seed}{out}{model}{rows}{batch_size}")}, "--steps={steps},"),
        ({"command": ("x", "{lr}{seed}{out}{model}{rows}{steps}")}, "--batch_size"),
        ({"lora": ("{rank}", "{layers}")}, ": lora needs --alpha={alpha}, or {out}/run.json"),
        ({"lora": ("{rank}", "{alpha}")}, ": lora needs --layers={layers}"),
        ({"command": ("x", "{lr}{seed}{out}{rows}{steps}{batch_size}")}, "needs --model={model}"),
        ({"command": ("x", "{lr}{seed}{out}{model}{steps}{batch_size}")}, "needs --rows={rows}"),
    ],
)
def test_a_template_is_refused_with_what_is_allowed(changes, said):
    with pytest.raises(SpecError, match=r".*") as refused:
        validate(foreign(trainer=changes))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"warmup_steps": 1}, "{warmup_steps}"),
        ({"method": dataclasses.replace(LORA, lr_b_ratio=16)}, "lr_b_ratio=16"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"schedule": "linear", "trainer": {"full": ["{schedule}"]}}, "schedule=linear"),
    ],
)
def test_a_setting_that_the_trainer_is_not_told_is_refused(changes, said):
    with pytest.raises(SpecError) as refused:
        validate(foreign(**changes))
    assert said in str(refused.value)


def test_a_program_that_reads_all_values_from_their_file_is_told_of_every_setting():
    reads = {"command": ("x", "{lr}", "{seed}", "--config={out}/run.json"), "lora": ()}
    for more in ({"schedule": "linear"}, {"method": FullFT(), "weight_decay": 0.1}):
        validate(foreign(trainer=reads, **more))
    validate(foreign(trainer={"lora": ("{rank}", "{alpha}", "{modules}")}))


def test_words_stay_words_and_a_file_of_the_trainer_that_changed_is_refused(store, tmp_path):
    command = (*foreign().trainer.command, "x=$(a) {b'}")
    spec = foreign(trainer={"command": command, "files": ("0" * 64,)})
    (tmp_path / "a.py").write_text("")
    with pytest.raises(SpecError, match=r"a\.py has changed"):
        run(store, spec, trainer_files=[str(tmp_path / "a.py")])
    spec = foreign(trainer={"command": command})
    run(store, spec)
    assert "'x': \"$(a) {b'}\"" in (store.attempt(spec.id, 1) / "trainer.log").read_text()
    assert oct((store.attempt(spec.id, 1) / "trainer.log").stat().st_mode)[-3:] == "600"


def test_a_trainer_that_writes_into_the_base_spoils_that_of_no_other_run(store):
    fails = run(store, foreign("spoils", lr=1e-3))
    assert "exit status 3" in fails
    assert run(store, foreign(lr=2e-3))["state"] == "done"


@pytest.mark.parametrize("word, seen", [("n={gpus}", "0,1"), ("n=1", "0")])
def test_a_command_that_is_not_told_of_several_gpus_sees_one(store, monkeypatch, word, seen):
    monkeypatch.setattr(external.detect, "devices", lambda: ("0", "1"))
    spec = foreign()
    trainer = {"command": (*spec.trainer.command, word)}
    run(store, spec := foreign(trainer=trainer))
    said = (store.attempt(spec.id, 1) / "trainer.log").read_text()
    assert f"GPUs {seen} " in said and f"'n': '{len(seen.split(','))}'" in said


def test_a_run_that_another_process_claimed_meanwhile_is_left_to_it(store, monkeypatch):
    monkeypatch.setattr(external, "LOOK_S", 0.1)
    spec = foreign("hangs")

    def take():
        child_of(store, spec)
        (store.folder(spec.id) / "attempts/2").mkdir()

    threading.Thread(target=take).start()
    started = time.monotonic()
    train(store, [spec], TorchTrainer(), runs_dir=str(store.root))
    assert time.monotonic() - started < 100 and store.result(spec.id) is None


# ---------------------------------------------------------------- from the command line

GIVEN = ("scale=smoke", "trainer=hf")


def test_ids_have_the_contents_of_a_trainers_files_and_not_their_paths(tmp_path):
    paths = [tmp_path / name for name in ("a.py", "b.py", "c.py")]
    for path, text in zip(paths, ("x", "x", "y")):
        path.write_text(text)
    ids = [compose_request([*GIVEN, f"trainer.script={path}"]).points[0].id for path in paths]
    assert ids[0] == ids[1] != ids[2]
    request = compose_request(
        [*GIVEN, f"trainer.script={paths[0]}", f"trainer.resume=['{paths[2]}','{{resume}}']"]
    )
    assert request.exec.trainer_files == [str(paths[0]), str(paths[2])]  # of an argument, too
    builtin = [
        compose_request(["scale=smoke", *more]).points[0].id for more in ((), ("trainer=builtin",))
    ]
    assert builtin[0] == builtin[1] == tiny_spec().id


@pytest.mark.parametrize("word", ["t.sh", "--config=t.sh", "--config={method}.sh"])
def test_ids_have_the_contents_of_files_that_words_name(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    found = set()
    words = [word, "--lr={lr}", "--seed={seed}", "{out}/run.json"]  # which has base and rows, too
    for text in ("x", "y"):
        for name in ("t.sh", "fullft.sh", "lora.sh"):
            (tmp_path / name).write_text(text)
        given = ["scale=smoke", "trainer=command", f"trainer.command={json.dumps(words)}"]
        found.add(compose_request(given).points[0].id)
    assert len(found) == 2


@pytest.mark.parametrize("setting", ["trainer.rows=pairs", "trainer.in_order=true"])
def test_settings_of_foreign_trainers_are_refused_with_our_loop(setting):
    with pytest.raises(SpecError, match="expected another, and trainer"):
        compose_request(["scale=smoke", setting])


def test_a_script_that_no_word_names_is_refused_and_no_other_file_runs_in_its_place(tmp_path):
    (tmp_path / "utils.py").write_text("")
    for given, said in (
        (["trainer=hf", f"trainer.files=[{tmp_path}/utils.py]"], "trainer.script=FILE.py"),
        (["trainer=trl", f"trainer.script={tmp_path}/utils.py"], "no place {script}"),
    ):
        with pytest.raises(SpecError) as refused:
            compose_request(["scale=smoke", *given])
        assert said in str(refused.value)


def test_trl_on_a_base_without_a_tokenizer_is_refused_in_the_plan(command):
    refused = command("plan", "scale=smoke", "trainer=trl")
    assert refused.returncode == 2 and "has no tokenizer, and trainer=trl" in refused.stderr


def test_a_schedule_with_a_warmup_has_the_name_that_warms_up(store):
    given = (*foreign().trainer.command, "schedule={schedule}", "warmup={warmup_steps}")
    for warmup, name in ((0, "constant"), (2, "constant_with_warmup")):
        run(store, spec := foreign(warmup_steps=warmup, trainer={"command": given}))
        values = json.loads((store.attempt(spec.id, 1) / "out/run.json").read_text())
        assert values["schedule"] == name and values["warmup_steps"] == warmup


def test_a_foreign_lora_leaves_out_the_unembedding_and_ours_does_not(tmp_path):
    (tmp_path / "a.py").write_text("x")
    theirs = compose_request([*GIVEN, f"trainer.script={tmp_path}/a.py", "+sweep=lr_ratio"])
    layers = {p.spec.method.name: p.spec.method.layers for p in theirs.points}
    assert layers == {"lora": "attention+mlp", "fullft": "attention+mlp+unembedding"}
    assert theirs.exec.workers == theirs.exec.pack_size == 1
    both = ["+sweep=lr_ratio", "+sweep.arms.lora.layers=[all,attention+mlp]"]
    with pytest.raises(SpecError, match="are the same with trainer=hf"):
        compose_request([*GIVEN, f"trainer.script={tmp_path}/a.py", *both])


@pytest.mark.parametrize(
    "setting, said",
    [
        ("exec.world_size=2", "exec.world_size=2"),
        ("cluster.gpus=8 cluster.gpus_per_node=4 cluster=slurm", "several nodes"),
        ("hardware=h100", "hardware=h100"),
        ("action=measure", "action=measure"),
        ("action=verify", "action=verify"),
        ("trainer.max_h=0", "trainer.max_h=0"),
        ("trainer.command=python", "expected a list"),
        ("trainer.files=[none.py]", "no file"),
    ],
)
def test_settings_of_our_loop_are_refused_before_anything_starts(tmp_path, setting, said):
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(SpecError) as refused:
        compose_request([*GIVEN, f"trainer.script={tmp_path}/a.py", *setting.split()])
    assert said in str(refused.value)


def test_claims_that_need_more_than_final_losses_are_refused_in_the_plan_by_name(command, tmp_path):
    (tmp_path / "a.py").write_text("x")
    more = (*GIVEN, f"trainer.script={tmp_path}/a.py")
    claim = "+sweep.claims.speed={estimand: rho_top_rank, expected: 1, margin: [0.5, 2]}"
    said = command("plan", "lr_ratio", *more, claim).stdout
    assert "refused with this trainer, as they need more than final losses: speed" in said
    assert (
        "claim no_regret" in said
        and "claim speed" not in said
        and "unknown before the first" in said
        and "assumed speed" not in said
    )
    assert "claim speed" in command("plan", "lr_ratio", "scale=smoke", claim).stdout
    plain = json.loads(command("plan", "lr_ratio", *more, claim, "format=json").stdout)
    assert plain["refused"] == ["speed"]
    assert plain["cost"]["basis"] == "unknown" and plain["cost"]["hours"] is None
    assert "6 missing; time left unknown" in command("status", "lr_ratio", *more).stdout
    plain = json.loads(command("status", "lr_ratio", *more, "format=json").stdout)
    assert plain["left_s"] is None
    absent = command(
        "plan",
        "lr_ratio",
        GIVEN[0],
        "trainer=command",
        "trainer.command=[absent,'{lr}','{seed}','{out}/run.json']",
    )
    assert "memory of absent (which is not found here) are unknown" in absent.stdout
    refused = command("plan", "batch_size", *more)
    assert refused.returncode == 2 and "any_rank" in refused.stderr and "builtin" in refused.stderr
    fewer = command(
        "plan", "tune", *more, "model=tiny64", "dataset=dialect_smoke", "steps=20"
    ).stdout
    assert "short runs of 20" not in fewer


@pytest.mark.slow
def test_one_command_trains_by_a_foreign_command_and_answers_and_repeated_trains_nothing(command):
    words = [*foreign().trainer.command, "rank={rank}", "alpha={alpha}", "layers={layers}"]
    given = ("lr_ratio", "scale=smoke", "trainer=command", f"trainer.command={json.dumps(words)}")
    first, again = command(*given), command(*given)
    assert first.returncode == 0 and "[  6/6]" in first.stderr + first.stdout
    assert "UNDECIDED" in again.stdout and "[  1/" not in again.stderr + again.stdout


def test_the_command_that_tune_names_trains_a_run_without_weights_again(
    command, compose, tmp_path, capsys
):
    """Losses are planted, so that the weights of no run were kept."""
    words = [*foreign().trainer.command, "rank={rank}", "alpha={alpha}", "layers={layers}"]
    given = ("+sweep=tune", "scale=smoke", "arms=lora", "steps=3", "budget=9runs")
    given += ("trainer=command", f"trainer.command={json.dumps(words)}", f"out={tmp_path}/best/")
    no = {"data_sha256": None, "base_sha256": None}
    planted = FakeTrainer(Valley(10).nll, more=lambda s: {**no, "weights_sha256": s.id})
    request = compose(*given, "exec.world_size=1")
    request.exec = dataclasses.replace(request.exec, keep_weights=False)
    assert act(request, planted) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert "not written to" in first
    named = shlex.split(first.partition("To train it again: lorasweep ")[2])
    done = command(*named, "max_difference=99")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"best-{named[1]}/adapter_config.json").exists()
    bare = command("adapter", named[1], "out=b", f"exec.runs_dir={request.exec.runs_dir}")
    assert bare.returncode == 0 or "max_difference=" in bare.stderr  # it knows the trainer's files
    (env,) = RunStore(request.exec.runs_dir).folder(named[1]).glob("attempts/*/env.json")
    env.unlink()  # as if it was imported
    bare = command("adapter", named[1], "out=b", f"exec.runs_dir={request.exec.runs_dir}")
    assert bare.returncode == 2 and "add exec.trainer_files=[PATH, ...]" in bare.stderr
