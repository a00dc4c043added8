"""The dress rehearsal of the sweeps at the study's own size, so that no GPU-hour is spent on a typo.

Each is composed from its own files and built with the real shapes, on the device without values.
Shrunken models of the same families train two updates, from a hub's cache without a network, started
as a user's runs are: a dense one and one with experts each time, all sweeps' arms in `make nightly`.
"""

import dataclasses
import re
from collections import Counter

import pytest

from lorasweep.launch import local
from lorasweep.models.load import config_of, find_targets, without_weights
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import REST, Point, trained_by_set
from tests import small_hub
from tests.world import ROOT, compose_request

pytestmark = pytest.mark.slow


@pytest.mark.full
def test_the_documented_plan_is_what_its_command_prints(command):
    text = (ROOT / "docs" / "clusters.md").read_text()
    shown = re.search(r"<!-- plan: .*?```text\n(.*?)```", text, re.DOTALL)
    study = ("+sweep=study", "scale=paper", "action=plan", "hardware=h100")
    assert shown and shown[1] in command(*study).stdout


@pytest.fixture(scope="module")
def runs():
    """The first-stage runs of all sweeps at the study's size: [(sweep, arm, spec)]."""
    study = compose_request(["+sweep=study", "scale=paper"])
    files = {path.stem: path.read_text() for path in (ROOT / "sweeps").glob("*.yaml")}
    asked = {name for name, text in files.items() if re.search(r"^  paper:", text, re.MULTILINE)}
    assert asked <= {p.sweep_name for p in study.parts}
    return [(part.sweep_name, p.arm, p.spec) for part in study.parts for p in part.points]


@pytest.mark.full
def test_every_run_is_built_with_its_real_shape_and_trains_what_it_says(runs):
    methods = {}
    for _, _, spec in runs:
        if not getattr(spec.method, "init_seed", 0):  # else it is another draw
            of_model = methods.setdefault((spec.model, spec.precision), {})
            of_model[spec.method.canonical] = spec.method
    for (model, precision), of_model in methods.items():
        built = without_weights(config_of(model), model, precision)
        assert sum(p.numel() for p in built.parameters()) == model.n_params
        for method in of_model.values():
            said = Counter({t["layer_set"]: t["trained"] for t in trained_by_set(method, model)})
            if model.tied and not method.target_layers():  # one matrix with the embedding
                said[REST] += said.pop("unembedding")
            targets = find_targets(built, model, method.target_layers())
            attached = method.attach(built, targets, [method], [0])
            found = Counter()
            for name, p in attached.parameters().items():
                layer_set = model.set_of(name)
                found[REST if layer_set == "rest" else layer_set] += p.numel()
            assert found == +said, (model.name, method)
            assert found.total() == method.n_trainable(model)
            attached.detach()


def shrunken(specs):
    """Two updates of the runs on shrunken models, wide enough for all ranks, and on a few rows."""
    shape = {"n_layers": 2, "hidden_size": 512, "n_heads": 8, "n_kv_heads": 8, "head_size": 64}
    found = []
    for s in specs:
        # experts share a rank
        experts = {"mlp_size": 128, "n_experts": 16} if s.model.n_experts else {"mlp_size": 512}
        model = dataclasses.replace(s.model, **shape, vocab_size=512, **experts)
        dataset = dataclasses.replace(s.dataset, n_test=16, n_test_curve=8)
        # some answers of a few tokens, where the study's have thousands
        few = {"batch_size": 3 * s.group_size, "max_new_tokens": 8} if s.group_size else {}
        few |= {"lr": 3e-4, "seed": 0, "steps": 2}
        found.append(dataclasses.replace(s, model=model, dataset=dataset, **few))
    return list({s.id: s for s in found}.values())


def trained(specs, tmp_path, monkeypatch, processes=1):
    """The results of runs that train from a hub's cache, started as a sweep is."""
    env = small_hub.make(tmp_path, {s.model: 0 for s in specs}, {s.dataset: 0 for s in specs})
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    settings = (f"runs_dir={tmp_path}/runs", f"world_size={processes}", "workers=1")
    settings += ("micro_batch_size=64",)  # rows are far shorter here than the plan expects
    exec_ = compose_request([f"exec.{setting}" for setting in settings]).exec
    store = RunStore(tmp_path / "runs")
    store.prepare()
    local.run_points([Point("rehearsal", s) for s in specs], store, exec_, lambda event: None)
    failed = {s.id: store.failure(s.id) for s in specs if store.result(s.id) is None}
    assert not failed, failed
    results = [store.result(s.id) for s in specs]
    assert {(r["steps_done"], r["state"]) for r in results} == {(2, "done")}
    return results


@pytest.mark.full
def test_a_dense_run_one_with_experts_and_a_rewarded_one_train_from_the_hubs_cache(
    runs, tmp_path, monkeypatch
):
    def first(sweep, **fields):
        for name, arm, spec in runs:
            named = {"model": spec.model.name, "dataset": spec.dataset.name}
            if (name, arm) == (sweep, "lora") and fields.items() <= named.items():
                return spec

    kinds = [first("lr_ratio", model=n) for n in ("llama-3.1-8b", "qwen3-30b-a3b-base")]
    specs = shrunken([*kinds, first("rl", dataset="math_reward")])
    dense, experts, rewarded = trained(specs, tmp_path, monkeypatch)
    for spec, result in zip(specs, (dense, experts)):
        assert result["base_commit"] == spec.model.revision
        assert result["test_nll"] < result["curve"][0]["test_nll"]
    assert rewarded["metric"]["name"] == "test_reward" and rewarded["answers"] == 2 * 3 * 32
    assert rewarded["test_reward_unread"] > 0.9 and rewarded["cut_off"] > 0.9
    assert rewarded["n_train"] == 7 * 4  # without the held-out problems


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_sweep_trains_two_updates_shrunken(runs, processes, tmp_path, monkeypatch):
    """The run of the lowest rank of each sweep, arm, family, layer set, data set and precision."""
    found = {}
    for sweep, arm, spec in sorted(runs, key=lambda r: getattr(r[2].method, "rank", 0)):
        numbers = {"rank": 1, "alpha": 1.0, "init_seed": 0} if spec.method.name == "lora" else {}
        how = dataclasses.replace(spec.method, **numbers).canonical
        family = (type(config_of(spec.model)), spec.model.tied)
        rows = (spec.dataset.name, spec.batch_size, spec.precision)
        found.setdefault((sweep, arm, *family, how, *rows), spec)
    trained(shrunken(found.values()), tmp_path, monkeypatch, processes)
