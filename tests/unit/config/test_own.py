"""Names that no configuration file describes: what they become, and what is said of wrong ones."""

import math
import subprocess
import sys

import pytest

from lorasweep.cli.answer import all_points
from lorasweep.cli.plans import understood
from lorasweep.config.compose import compose_request
from lorasweep.data import load
from lorasweep.errors import DataError, SpecError
from lorasweep.store.run_store import RunStore
from tests import small_hub
from tests.customers import CHAT_TEMPLATE, make_base, write_rows
from tests.small_hub import llama_like
from tests.world import write_json

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
        loaded = load.load(data, asked.exec.data_dir, llama_like())
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
        "import runpy, sys; from lorasweep.config.compose import compose_request as c; "
        "c(['+sweep=lr_ratio', 'scale=smoke']); c(['model=smollm2-135m', 'dataset=gsm8k']); "
        "sys.argv[1:] = ['+sweep=lr_ratio', 'scale=smoke', 'action=plan']\n"
        "try: runpy.run_module('lorasweep', run_name='__main__')\n"
        "finally: print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, text=True, cwd=tmp_path).endswith("\n[]\n")
