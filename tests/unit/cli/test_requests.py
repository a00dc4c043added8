"""Requests that are refused before anything starts, with what to type next; help; own files.

The command line runs in this process: `main` with the arguments of a shell.
"""

import json
import re

import pytest
import yaml

from tests.world import ROOT

SWEEP = ("+sweep=lr_ratio", "scale=smoke")


def test_an_unwritable_run_folder_is_refused_before_anything_starts(command, tmp_path):
    (tmp_path / "file").write_text("")
    done = command(*SWEEP, f"exec.runs_dir={tmp_path}/file/runs")
    assert (
        done.returncode == 2
        and "cannot be written" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+sweep=lr_ration"], "lr_ratio"),
        (["scale=huge"], "tiny"),
        (["model=lama"], "tiny64"),
        (["lrr=1"], "lrr"),
        (["lr=abc"], "abc"),
        (["+sweep=lr_ratio", "lr=1"], "sweep.arms.fullft.lr"),
        (["-m", "lr=1"], "multirun"),
        (["+sweep=lr_ratio", "scale=small", "exec.models_dir=[/nowhere]"], "make weights"),
        (["method=fullft", "method.rank=3"], "rank"),
        (["steps"], "steps"),
        (["action=plan", "hardware=h10"], "h100"),
        (["hardware=h100"], "Add action=plan"),
        (["action=measure_packs", "cluster=slurm"], "inside a job"),
    ],
)
def test_wrong_requests_end_with_status_2_and_no_traceback(command, tmp_path, arguments, words):
    done = command(*arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/spec.json"))


def test_alone_the_command_shows_what_one_can_do_and_trains_nothing(command, tmp_path):
    done = command()
    assert done.returncode == 0 and "+sweep=lr_ratio action=plan" in done.stdout
    assert "capacity, compute" in done.stdout and len(done.stdout.splitlines()) < 30
    assert list(tmp_path.iterdir()) == []


def test_help_shows_groups_and_how_to_change_a_grid(command, tmp_path):
    text = command("--help").stdout
    for words in (
        "sweep: batch_size, capacity",
        "lr_ratio",
        "scale: paper, small",
        "method: fullft, lora",
        "${geom:1e-4,1e-2,4}",
        "exec.runs_dir",
    ):
        assert words in text
    assert list(tmp_path.iterdir()) == []  # nothing is dropped into the current folder


def test_a_users_sweep_and_model_come_in_by_config_dir(command, tmp_path):
    for folder in ("sweep", "model"):
        (tmp_path / "mine" / folder).mkdir(parents=True)
    text = (ROOT / "sweeps/lr_ratio.yaml").read_text().replace("model: tiny64,", "model: narrow,")
    (tmp_path / "mine/sweep/my_ratio.yaml").write_text(text)
    model = (
        (ROOT / "conf/model/tiny64.yaml")
        .read_text()
        .replace("tiny64", "narrow")
        .replace("steps: 670", "steps: 3")
    )
    (tmp_path / "mine/model/narrow.yaml").write_text(model)
    plan = command(
        "--config-dir",
        tmp_path / "mine",
        "+sweep=my_ratio",
        "scale=smoke",
        "action=plan",
        "format=json",
    )
    assert json.loads(plan.stdout)["arms"][0]["model"] == "narrow"
    (tmp_path / "mine/sweep/lr_ratio.yaml").write_text(text)
    done = command("--config-dir", tmp_path / "mine", "+sweep=lr_ratio", "action=plan")
    assert done.returncode == 2 and "would be ignored. Rename it" in done.stderr
    (tmp_path / "mine/sweep/lr_ratio.yaml").rename(tmp_path / "mine/sweep/broken.yaml")
    (tmp_path / "mine/sweep/broken.yaml").write_text("question: [")
    done = command("--config-dir", tmp_path / "mine", "+sweep=broken", "action=plan")
    assert done.returncode == 2 and "YAML" in done.stderr and "Traceback" not in done.stderr


def test_what_a_users_sweep_sets_beside_the_sweep_holds_for_models_and_data_on_its_axes(
    command, tmp_path
):
    (tmp_path / "mine/sweep").mkdir(parents=True)
    ours = yaml.safe_load((ROOT / "sweeps/lr_ratio.yaml").read_text())
    ours["scales"]["smoke"]["axes"]["dataset"] = ["dialect_few"]
    text = "# @package _global_\n" + yaml.safe_dump({"dataset": {"max_length": 32}, "sweep": ours})
    (tmp_path / "mine/sweep/short.yaml").write_text(text)
    arguments = ("--config-dir", tmp_path / "mine", "+sweep=short", "scale=smoke", "action=plan")
    flops = [
        json.loads(command(*arguments, "format=json", *more).stdout)["cost"]["flops"]
        for more in ((), ("dataset.max_length=32",), ("dataset.max_length=64",))
    ]
    assert flops[0] == flops[1] < flops[2]


def test_an_unreadable_row_is_named_before_anything_starts(command, tmp_path):
    (tmp_path / "mine/dataset").mkdir(parents=True)
    text = (ROOT / "conf/dataset/gsm8k.yaml").read_text().replace("name: gsm8k", "name: mine")
    lines = [line for line in text.splitlines() if not line.startswith("revision")]
    (tmp_path / "mine/dataset/mine.yaml").write_text("\n".join(lines))
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"gsm8k/{split}.jsonl").write_text(
            '{"question": "a", "answer": "b"}\n{"question": \n'
        )
    done = command(
        "--config-dir",
        tmp_path / "mine",
        "dataset=mine",
        "model=tiny64",
        "method.rank=4",
        f"exec.data_dir=[{tmp_path}]",
    )
    assert (
        done.returncode == 2
        and "train.jsonl:2: not a JSON row" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list((tmp_path / "runs").glob("*/spec.json"))


def test_a_name_on_the_hub_without_a_commit_is_said_and_shipped_ones_have_one(command):
    arguments = ("dataset=tulu3", "method.rank=4", "action=plan")
    assert "names no commit" not in command("model=qwen3-8b-base", *arguments).stdout
    text = command("model=llama-3.1-8b", "model.revision=main", *arguments).stdout
    assert "model llama-3.1-8b (meta-llama/Llama-3.1-8B) names no commit of the hub" in text
    assert "dataset tulu3" not in text
    shipped = [
        path.read_text()
        for group in ("model", "dataset")
        for path in (ROOT / "conf" / group).glob("*.yaml")
        if "source: hub" in path.read_text()
    ]
    assert len(shipped) > 17 and all(
        re.search(r"^revision: [0-9a-f]{40}$", t, re.M) for t in shipped
    )
