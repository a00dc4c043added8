"""A small base, customers' rows to fine-tune it on, a fleet of them, and a server with planted answers."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorasweep.advise.advice import advise
from lorasweep.advise.read import Customer, customer_of, shape_of
from lorasweep.advise.rules import Kept, Known, read_kept
from lorasweep.cli.actions import act
from lorasweep.config import catalogue
from lorasweep.config.compose import compose_request
from lorasweep.launch.process import Stopped
from lorasweep.launch.torch_trainer import TorchTrainer
from lorasweep.store.run_store import RunStore
from tests.small_hub import llama_like
from tests.world import ROOT, write_json

CONF = [ROOT / "conf"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_base(folder, dtype=torch.bfloat16, **changes):
    """Write a Llama with random weights and a tokenizer; returns the folder."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    shape |= {"vocab_size": 400, "tie_word_embeddings": True, **heads, **changes}
    tokenizer = llama_like()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**shape, **ends)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_of(base):
    """The base's ModelSpec, as the adviser reads it."""
    return shape_of(Customer("any", str(base / "config.json"), "sft"), {})


def write_rows(path, count, answer, question="How many? {k}", start=0):
    """Write rows with two columns; `answer` and `question` are templates of the row's number."""
    numbers = range(start, start + count)
    rows = [{"prompt": question.format(k=k), "completion": answer.format(k=k)} for k in numbers]
    return write_json(path, rows)


@cache
def known(results=ROOT / "analysis/results"):
    """What the adviser knows: the shipped catalogue, and kept results or none."""
    found = read_kept(results, catalogue.widths(CONF)) if results else Kept()
    return Known(catalogue.models(CONF), catalogue.machines(CONF), found)


def advice(world=None, **columns):
    row = {"name": "acme", "model": "llama-3.1-8b", "task": "sft", **columns}
    return advise(customer_of(row), world or known())


SECRET = "zanzibar 7351"
HOSTILE = '<img src=x onerror=alert(1)>/../"x"'


class Counting(TorchTrainer):
    """The real trainer, which notes what it was asked for; it stops or breaks at an update."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.asked, self.stop_at = [], stop_at

    def __call__(self, pack, exec_, resume):
        self.asked += [(s.dataset.name, s.lr, bool(resume)) for s in pack]
        for event in super().__call__(pack, exec_, resume):
            yield event
            if event.step == self.stop_at:
                raise Stopped


class World:
    """A fleet of five customers on two bases, in a folder; `rows`: name -> base, data, epochs."""

    def __init__(self, home, bases):
        self.home, self.folder = home, home / "reports/fleet-customers"
        write_rows(home / "ann.jsonl", 40, "357 in all {k}")
        write_rows(home / "bob.jsonl", 25, "No! {k}", question="Is it late? {k}")
        write_rows(home / "tiny.jsonl", 5, "Yes {k}")
        write_rows(home / "owner/train.jsonl", 30, f"{SECRET} {{k}}")
        write_rows(home / "owner/test.jsonl", 9, f"{SECRET} {{k}}", start=100)
        self.rows = {
            "ann": (bases[0], "ann.jsonl", 4),
            "bob": (bases[0], "bob.jsonl", 3),
            "few": (bases[0], "tiny.jsonl", 1),
            HOSTILE: (bases[0], "owner", 2),
            "eve": (bases[1], "ann.jsonl", 2),
        }
        self.write()

    def write(self, **more):
        """Write the table, with further customers or without some (None)."""
        rows = {n: row for n, row in {**self.rows, **more}.items() if row}
        self.table = [
            {"name": n, "model": str(b / "config.json"), "task": "sft", "data": d, "epochs": e}
            for n, (b, d, e) in rows.items()
        ]
        self.set_table(*self.table)

    def set_table(self, *rows):
        (self.home / "customers.yaml").write_text(json.dumps(rows))  # which is YAML, too

    def compose(self, *settings):
        places = (f"exec.runs_dir={self.home}/runs", f"exec.reports_dir={self.home}/reports")
        settings = (f"customers={self.home}/customers.yaml", "exec.workers=1", *settings)
        return compose_request([*places, *settings])

    def run(self, *more, trainer=None, action="fleet"):
        self.request = self.compose(f"action={action}", *more)
        return act(self.request, trainer or TorchTrainer())

    def trained(self, *more):
        """Run the fleet; return the customer of each run that was trained."""
        trainer = Counting()
        assert self.run(*more, trainer=trainer) == 0
        return [name for name, _, _ in trainer.asked]

    @property
    def store(self):
        return RunStore(self.request.exec.runs_dir)

    @property
    def page(self):
        return (self.folder / "index.html").read_text()

    def facts(self, name):
        return json.loads((self.folder / name / "facts.json").read_text())

    def card(self, name):
        return (self.folder / name / "README.md").read_text()


@contextmanager
def answering(reply) -> Iterator[str]:
    """Serve `reply(path, body, headers)` -> (status, text); yields the address. GET: body is None.

    With status 302 the text is the address that the client is sent to."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"] or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, text = reply(self.path, body, self.headers)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", text)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # connections that wait; more would be reset

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def vllm(models, log_p, complete=None):
    """Answer as vLLM: `models` is name -> base, `log_p(model, tokens)` of all tokens but the first.

    `complete(**body)` answers a request for text with (text, why it ended)."""

    def reply(path, body, headers):
        if path == "/v1/models":
            listed = [{"id": n, "parent": base, "owned_by": "vllm"} for n, base in models.items()]
            return 200, json.dumps({"data": listed})
        if "allowed_token_ids" not in body:
            text, reason = complete(**body)
            return 200, json.dumps({"choices": [{"text": text, "finish_reason": reason}]})
        values = log_p(body["model"], [*body["prompt"], *body["allowed_token_ids"]])[-1:]
        return 200, json.dumps({"choices": [{"logprobs": {"token_logprobs": values}}]})

    return reply


def changed(folder, to, by):
    """Copy an adapter's folder with B times a factor, as if alpha was another; return the copy."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    wrong = {n: (t * by if "lora_B" in n else t).contiguous() for n, t in tensors.items()}
    save_file(wrong, to / "adapter_model.safetensors")
    return to
