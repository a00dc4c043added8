"""`action=verify_served` on a fleet that PEFT serves from its folders: right, and with faults."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasweep.cli.actions import act
from lorasweep.errors import SpecError
from lorasweep.launch.trainer import TorchTrainer
from tests.answering import answering, openai
from tests.customers import make_base, write_rows

NAMES = ("ann", "bob", "cat")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet of three: the folder with the table, runs and adapters."""
    from lorasweep.config.compose import compose_request

    home = tmp_path_factory.mktemp("fleet")
    base = make_base(home / "base")
    rows = []
    for k, name in enumerate(NAMES):
        data = write_rows(home / f"{name}.jsonl", 30, f"{name} {k} {{k}}")
        model = str(base / "config.json")
        rows.append({"name": name, "model": model, "task": "sft", "data": str(data), "epochs": 4})
    (home / "customers.yaml").write_text(json.dumps(rows))
    settings = (f"customers={home}/customers.yaml", f"exec.runs_dir={home}/runs", f"out={home}/out")

    def run(*more):
        request = compose_request([*settings, "rates=advised", "precision=fp32", *more])
        return act(request, TorchTrainer())

    assert run("action=fleet") == 0
    return home, run


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
    (to / "adapter_config.json").write_text(
        json.dumps({**config, "lora_alpha": alpha * config["lora_alpha"]})
    )
    path = to / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: b * t if "lora_B" in k else t for k, t in tensors.items()}, path)
    return to


def verdicts(capsys):
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("owner", ["vllm", "other"])
def test_a_right_fleet_is_served_and_each_fault_has_its_name(fleet, tmp_path, capsys, owner):
    home, run = fleet
    right = {name: home / "out" / name for name in NAMES}
    with peft_server(home / "base", right, owner == "vllm", owner) as url:
        assert run("action=verify_served", f"url={url}/v1/") == 0
    printed = capsys.readouterr().out
    assert "3 served" in printed and "base: noise 0.00" in printed
    wrong = {
        "ann": changed(right["ann"], tmp_path / "zero", b=0.0),
        "bob": changed(right["bob"], tmp_path / "half", alpha=0.5),
    }
    with peft_server(home / "base", wrong, owner=owner) as url:
        assert run("action=verify_served", f"url={url}", "format=json") == 1
    found = verdicts(capsys)
    assert [found[name]["verdict"] for name in NAMES] == ["not applied", "differs", "missing"]
    assert 0.3 < found["bob"]["found"]["factor"] < 0.8
    # two servers; names swapped on one of them
    swapped = {"ann": right["bob"], "bob": right["ann"]}
    with (
        peft_server(home / "base", swapped, owner=owner) as one,
        peft_server(home / "base", {"cat": right["cat"]}, owner=owner) as two,
    ):
        assert run("action=verify_served", f"url=[{one},{two}]", "format=json") == 1
    found = verdicts(capsys)
    assert found["ann"]["notes"] == ["it is the adapter of bob"]
    swapped = "another customer's"
    assert [found[n]["verdict"] for n in NAMES] == [swapped, swapped, "served"]


def test_a_wrong_server_is_an_error_that_says_what_to_type(fleet, tmp_path, capsys):
    home, run = fleet
    with pytest.raises(SpecError, match=r"no server .*url=http://localhost:8000"):
        run("action=verify_served", "url=http://127.0.0.1:1")
    with (
        peft_server(home / "base", {"dan": home / "out/ann"}) as url,
        pytest.raises(SpecError, match=r"serves dan, its-base, and no customer of .*ann, bob, cat"),
    ):
        run("action=verify_served", f"url={url}")
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(home / "base").config
    )
    other.save_pretrained(tmp_path / "other")
    with (
        peft_server(tmp_path / "other", {"ann": home / "out/ann"}) as url,
        pytest.raises(SpecError, match=r"'its-base' is another base than .*Serve the base"),
    ):
        run("action=verify_served", f"url={url}")
    with pytest.raises(SpecError, match="url is only for action=verify_served"):
        run("action=fleet", "url=http://localhost:8000")
    with pytest.raises(SpecError, match="action=verify_served checks the adapters of a table"):
        from lorasweep.config.compose import compose_request

        compose_request(["action=verify_served"])


def test_without_a_server_the_folders_are_checked(fleet, capsys):
    home, run = fleet
    assert run("action=verify_served", "format=json") == 0
    assert {row["verdict"] for row in verdicts(capsys).values()} == {"folder is right"}
    path = home / "out/bob/adapter_model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4])
    assert run("action=verify_served", "format=json") == 1
    path.write_bytes(kept)
    found = verdicts(capsys)
    assert found["bob"]["verdict"] == "folder refused"
    assert "truncated" in found["bob"]["notes"][0]
