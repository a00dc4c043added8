"""`action=verify_served` on a fleet that PEFT serves from its folders: right, and with faults."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasweep.cli.actions import check as check_request
from lorasweep.config.compose import compose_request
from lorasweep.errors import SpecError
from tests.answering import answering, openai
from tests.customers import World, make_base, write_rows

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


def peft_server(base, folders, parents=True, owner="vllm"):
    """Answers that PEFT computes from the folders, in fp32 with a little noise of its own."""
    torch.manual_seed(1)
    models = {"its-base": None} | dict.fromkeys(folders, "its-base" if parents else None)
    loaded = {"its-base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    for name, folder in folders.items():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        loaded[name] = PeftModel.from_pretrained(plain, folder)

    @torch.no_grad()
    def log_p(name, tokens):
        ids = torch.tensor([tokens])
        found = loaded[name](input_ids=ids).logits[0, :-1].log_softmax(-1)
        found = found.gather(1, ids[0, 1:, None])[:, 0]
        return (found + 1e-3 * torch.randn_like(found)).tolist()

    return answering(openai(owner, models, log_p))


def changed(folder, to, alpha=1.0, b=1.0):
    """A copy of an adapter's folder with another alpha, or another B."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    config["lora_alpha"] *= alpha
    (to / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(to / "adapter_model.safetensors")
    for name in (n for n in tensors if "lora_B" in n):
        tensors[name] *= b
    save_file(tensors, to / "adapter_model.safetensors")
    return to


def verdicts(capsys):
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("owner", ["vllm", "other"])
def test_a_right_fleet_is_served_and_each_fault_has_its_name(fleet, tmp_path, capsys, owner):
    home, check = fleet
    right = {name: home / "out" / name for name in NAMES}
    with peft_server(home / "base", right, owner == "vllm", owner) as url:
        assert check(f"url={url}/v1/") == 0
    printed = capsys.readouterr().out
    assert "3 served" in printed and "base: noise 0.00" in printed
    wrong = {
        "ann": changed(right["ann"], tmp_path / "zero", b=0.0),
        "bob": changed(right["bob"], tmp_path / "half", alpha=0.5),
    }
    with peft_server(home / "base", wrong, owner=owner) as url:
        assert check(f"url={url}", "format=json") == 1
    found = verdicts(capsys)
    assert [found[name]["verdict"] for name in NAMES] == ["not applied", "differs", "missing"]
    assert 0.3 < found["bob"]["found"]["factor"] < 0.8
    # two servers; names swapped on one of them
    swapped = {"ann": right["bob"], "bob": right["ann"]}
    with (
        peft_server(home / "base", swapped, owner=owner) as one,
        peft_server(home / "base", {"cat": right["cat"]}, owner=owner) as two,
    ):
        assert check(f"url=[{one},{two}]", "format=json") == 1
    found = verdicts(capsys)
    assert found["ann"]["notes"] == ["it is the adapter of bob"]
    swapped = "another customer's"
    assert [found[n]["verdict"] for n in NAMES] == [swapped, swapped, "served"]


def test_a_wrong_server_is_an_error_and_without_one_the_folders_are_checked(
    fleet, tmp_path, capsys
):
    home, check = fleet
    with peft_server(home / "base", {"dan": home / "out/ann"}) as url:
        assert check(f"url={url}", "format=json") == 1
    assert {row["verdict"] for row in verdicts(capsys).values()} == {"missing"}
    torch.manual_seed(5)
    config = AutoModelForCausalLM.from_pretrained(home / "base").config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with (
        peft_server(tmp_path / "other", {"ann": home / "out/ann"}) as url,
        pytest.raises(SpecError, match=r"'its-base' is another base than .*Serve the base"),
    ):
        check(f"url={url}")
    for wrong in (["action=verify_served"], ["action=fleet", "customers=c.csv", "url=http://a:1"]):
        with pytest.raises(SpecError, match="action=verify_served"):
            check_request(compose_request(wrong))
    assert check("format=json") == 0
    assert {row["verdict"] for row in verdicts(capsys).values()} == {"folder is right"}
    path = home / "out/bob/adapter_model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4])
    assert check("format=json") == 1
    path.write_bytes(kept)
    found = verdicts(capsys)["bob"]
    assert found["verdict"] == "folder refused" and "truncated" in found["notes"][0]
