"""Packs by the command line: resumed in another pack, verified, memory as planned. The real pretrained
model: loads from GGUF, speaks, and is adapted as PEFT adapts it."""

import copy
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import steps
from lorasweep.data.examples import Example, collate
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.describe import describe_model
from lorasweep.store.run_store import RunStore, checksum
from lorasweep.train.objectives.nll import nll_sums
from tests.conftest import SMOKE
from tests.integration.test_interruptions import kept, killed_at, places
from tests.training import EPS, ROUNDING, beside_peft, pack_of
from tests.world import ROOT, cli, compose_request

pytestmark = pytest.mark.slow
WEIGHTS = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = os.environ.get("LORASWEEP_TEST_DATA", str(ROOT / "data"))
MIXED = (
    *(*SMOKE, "~sweep.arms.fullft", "sweep.arms.lora.rank=[1,4]", "sweep.arms.lora.lr=[1e-3,3e-3]"),
    *("exec.pack_size=8", "exec.workers=1", "exec.threads=1"),
)


@pytest.mark.full
def test_a_pack_of_mixed_ranks_resumes_in_a_different_pack_and_records_it(tmp_path):
    """In float64 over ten updates: rounding depends on the shape of a pack, and grows."""
    long = (*MIXED, "precision=fp64", "steps=80", "batch_size=8", "exec.checkpoint_s=0.3")
    long = (*long, f"eps={EPS}")
    whole, killed = places(tmp_path)
    cli(*long, cwd=whole)
    saved = "*/checkpoint/*.json"
    killed_at(lambda: len(list((killed / "runs").glob(saved))) >= 4, *long, cwd=killed)
    cli(*long, "sweep.arms.lora.lr=[3e-3]", cwd=killed)  # half of the pack
    store, other = RunStore(whole / "runs"), RunStore(killed / "runs")
    records, again = kept(whole), kept(killed)
    done = [i for i in again if other.state(i) == "done"]
    assert len(done) == 2
    for i in done:
        a, b = store.result(i), other.result(i)
        assert a["pack_size"] == 4 and b["pack_size"] == 2
        assert b["resumed_in_other_company"] and not a["resumed_in_other_company"]
        tenth = other.env(i)["resumed_from_step"] + 10
        assert 10 < tenth <= 80
        for step in range(1, tenth + 1):
            ours, theirs = (r[i][step][:2] for r in (records, again))  # train_nll, test_nll
            assert ours == theirs or theirs == pytest.approx(ours, rel=ROUNDING[10])


@pytest.mark.xdist_group("smoke")
def test_verify_finds_runs_equal_and_a_falsified_one(smoke_copy, tmp_path, command):
    verify = (*SMOKE, "action=verify", "sample=2", "format=json")
    found = json.loads(command(*verify).stdout)
    runs = found["runs"]
    assert len(runs) == 2 and found["differing"] == [] and runs[0]["pack_size"] == 3
    # to rounding: whether the bits are equal depends on the processor
    assert all(abs(r["difference"]) < 1e-4 and r["curve_difference"] < 1e-4 for r in runs)
    path = tmp_path / "runs" / runs[0]["run"] / "result.json"
    body = json.loads(path.read_text())["result"]
    body["test_nll"] += 0.5
    path.write_text(json.dumps({"sha256": checksum(body), "result": body}))
    done = command(*verify)
    assert done.returncode == 1 and json.loads(done.stdout)["differing"] == [runs[0]["run"]]


FAST = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("amx_bf16", "avx512_bf16"))
THERE = WEIGHTS.is_file() and Path(DATA, "gsm8k", "train.jsonl").is_file()
WHY = "no weights (make weights), no gsm8k in data/ or LORASWEEP_TEST_DATA, or no bf16 products"
REAL = (pytest.mark.real, pytest.mark.skipif(not (FAST and THERE), reason=WHY))
NIGHTLY = (*REAL, pytest.mark.nightly)


@pytest.mark.full
@pytest.mark.parametrize(
    "scale, method, batch, count",
    [
        *(("tiny", "lora", 16, 1), ("tiny", "lora", 16, 8)),
        *(("tiny", "lora", 4, 16), ("tiny", "fullft", 16, 1)),
        pytest.param("small", "lora", 2, 2, marks=REAL),
        *(pytest.param("small", m, k, 1, marks=NIGHTLY) for m, k in (("lora", 8), ("fullft", 4))),
    ],
)
def test_the_memory_model_is_within_a_fifth_of_the_measured_peak(scale, method, batch, count):
    found = steps.in_process(scale, method, batch, count, [f"{ROOT}/models"], [DATA])
    assert found["planned_bytes"] == pytest.approx(found["peak_bytes"], rel=0.2)


@pytest.fixture(scope="module")
def world():
    spec = compose_request(["scale=small", "+sweep=lr_ratio"]).points[-1].spec
    return spec, models.load(spec.model, [str(ROOT / "models")], "fp32")


def real(test):
    missing = not WEIGHTS.is_file() and not os.environ.get("CI")
    skipped = pytest.mark.skipif(missing, reason="no weights: run `make weights`")
    return pytest.mark.real(skipped(test))


@real
def test_the_file_alone_describes_it_and_it_knows_the_capital_of_france(world):
    spec, base = world
    found, models_dir = describe_model(str(WEIGHTS))
    assert models_dir == str(WEIGHTS.parent)
    same = {"name": spec.model.name, "context_length": 0}
    assert dataclasses.replace(found, **same) == spec.model
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = base.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in base.tokenizer.decode(out[0])


@real
def test_one_step_equals_peft_in_float64_with_the_tied_head_adapted(world, norms_in_float64):
    spec, base = world
    method, model = LoRA(rank=4), copy.deepcopy(base.model).double()
    # PEFT would tie an adapter on a tied head to the embedding; the reference has a separate head
    reference = copy.deepcopy(model)
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    reference.config.tie_word_embeddings = False
    trainables = pack_of([method], model, spec.model, perturb=0.01)
    reference, pairs = beside_peft(trainables, reference, method)
    assert sum(p.numel() for p, _ in pairs) == method.n_trainable(spec.model)
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours[0])
    ids = base.tokenizer("Question: What is 3 + 4?\nAnswer: It is 7.").input_ids
    batch = collate([Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 8)])
    for m in (model, reference.get_base_model()):
        nll_sums(m, batch, "fp64").sum().backward()
    for ours, theirs in pairs:
        assert float(theirs.grad.abs().max()) > 0
        assert torch.allclose(ours.grad[0], theirs.grad, rtol=1e-9, atol=1e-9)
    assert model.model.embed_tokens.weight.grad is None
