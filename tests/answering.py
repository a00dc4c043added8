"""A small HTTP server in this process, whose answers a test plants, and adapters with a fault."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import load_file, save_file


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


def vllm(models, log_p):
    """Answer as vLLM: `models` is name -> base, `log_p(model, tokens)` of all tokens but the first."""

    def reply(path, body, headers):
        if path == "/v1/models":
            listed = [{"id": n, "parent": base, "owned_by": "vllm"} for n, base in models.items()]
            return 200, json.dumps({"data": listed})
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
