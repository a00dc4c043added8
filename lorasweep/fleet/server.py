"""Ask a server of the OpenAI API for its models, and for log-probabilities of given tokens."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lorasweep.data.examples import Example
from lorasweep.errors import SpecError

KEY = "OPENAI_API_KEY"
"""Environment variable with the server's key; the openai client reads the same one."""
AT_ONCE = 16
"""Maximum number of requests in flight."""
TIMEOUT_S = 120


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follow no redirect, as the other address would get the key."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Server:
    """A server that answers, with the names of its models."""

    def __init__(self, url: str) -> None:
        """Ask for the models. Raises SpecError if no server of the OpenAI API answers at `url`."""
        self.url = url.rstrip("/").removesuffix("/v1")
        listed = self._call("models")
        try:
            self.models: dict[str, str] = {m["id"]: m.get("parent") or "" for m in listed["data"]}
            """Name -> name of its base; '' for a base, or if the server does not say."""
            self._is_vllm = any(m.get("owned_by") == "vllm" for m in listed["data"])
        except (KeyError, TypeError, AttributeError):
            raise SpecError(
                f"url={url}: /v1/models has no list of models. Expected a server of the OpenAI API."
            ) from None

    def base_of(self, name: str, adapters: Collection[str]) -> str:
        """Return the name of an adapter's base; `adapters`: names that are no bases."""
        others = {self.models[name]} - {""} or self.models.keys() - set(adapters)
        if len(others) != 1:
            raise SpecError(
                f"url={self.url}: the server does not say which model is the base of {name!r}. It "
                f"serves {', '.join(sorted(self.models))}. Serve only the base and its adapters."
            )
        return others.pop()

    def log_p(self, name: str, rows: Sequence[Example]) -> np.ndarray:
        """Return log p of the loss tokens of rows under a model, [loss tokens], in nats.

        vLLM generates one token after each prefix, and only the given token is allowed; it returns
        log p before this restriction. Its log-probabilities of prompts lack an adapter of the
        unembedding, and asking a CPU for several of them stops the server (vLLM 0.32; issues 51594,
        29955). Other servers are asked for the log-probabilities of the prompt (echo).

        Raises:
            SpecError: the server refuses, or returns no log-probabilities.
        """
        fixed = {"model": name, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        asked: list[dict[str, Any]] = []
        for row in rows:
            tokens = row.tokens.tolist()
            if not self._is_vllm:
                asked.append({**fixed, "prompt": tokens, "echo": True})
                continue
            for t in np.flatnonzero(row.loss):
                asked.append({**fixed, "prompt": tokens[:t], "allowed_token_ids": [tokens[t]]})
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda body: self._call("completions", body), asked))
        try:
            found = [a["choices"][0]["logprobs"]["token_logprobs"] for a in answers]
            if not self._is_vllm:  # the first token has no log p
                found = [np.array(f[1 : len(r.loss)])[r.loss[1:]] for f, r in zip(found, rows)]
            return np.concatenate([np.zeros(0), *found]).astype(float)
        except (KeyError, TypeError, ValueError, IndexError):
            raise SpecError(
                f"url={self.url}: the server returns no log-probabilities of given tokens "
                "(/v1/completions with echo=true and logprobs=1), so its answers cannot be "
                "compared with the trainer's. vLLM and SGLang return them."
            ) from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON answer to a GET, or with `body` to a POST."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.url}/v1/{path}", data, headers)
            opener = urllib.request.build_opener(_NoRedirects)
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            what = f" for model {body['model']!r}" if body else ""
            hint = f" Set {KEY} to the server's key." if error.code in (401, 403) else ""
            if there := error.headers.get("Location"):
                hint = f" It redirects to {there}, which would get the key: give the final address."
            raise SpecError(
                f"url={self.url}: /v1/{path}{what} answers {error.code}: {said}{hint}"
            ) from None
        except (OSError, ValueError) as error:
            raise SpecError(
                f"url={self.url}: no server of the OpenAI API answers there ({error}). Start it "
                "(the fleet's page has the command), and give its address: "
                "url=http://localhost:8000"
            ) from None
