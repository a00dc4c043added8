"""`action=measure` as it is typed: known information comes out, and the adviser takes what was found."""

import json

import pytest

from lorasweep.store.run_store import RunStore
from tests.world import cli

FACTS = (
    *("action=measure", "model=tiny64-facts", "dataset=facts", "method.rank=8", "batch_size=4"),
    *("dataset.generator_params.facts=1024", "rates=2", "steps=24", "exec.threads=1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("measure")


@pytest.fixture(scope="module")
def found(folder):
    return json.loads(cli(*FACTS, "format=json", cwd=folder).stdout)


def test_facts_come_out_at_16_bits_each(folder, found):
    known = 24 * 4 * 8 * 16
    assert found["known"]["bits"] == {"generator": known}
    for name in ("as_is", "prequential"):
        bits, nats = found[name]["bits"], found[name]["nats"]
        assert bits["measured"] == pytest.approx(known, rel=0.1)
        assert bits["measured"] == pytest.approx(nats["measured"] / 0.6931471805599453)
        assert bits["per_token"] == pytest.approx(4, rel=0.1)
        assert bits["per_example"] == pytest.approx(128, rel=0.1)
        assert bits["all"]["low"] <= bits["all"]["value"] <= bits["all"]["high"]
        assert bits["all"]["value"] == pytest.approx(1024 * 16, rel=0.1)
    assert found["rows"] == {"measured": 96, "all": 128}
    for run in found["runs"]:
        result = RunStore(folder / "runs").result(run["run"])
        assert run["nats"] == pytest.approx(result["code_nats"], rel=1e-9)
