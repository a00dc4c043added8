"""Judge from log-probabilities whether a server computes what the trainer computes.

All arrays hold log p of the same answer tokens, in nats. Errors of a server are measured in the
same run: its base against the trainer's base. The server is asked by the OpenAI API.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorasweep.data.examples import Example
from lorasweep.errors import SpecError

SERVED, NOT_APPLIED, ANOTHERS = "served", "not applied", "another customer's"
DIFFERS, TOO_SMALL = "differs", "too small to tell"
TIMES_NOISE = 2.0
"""Accepted distance to the trainer, in units of the noise (tinker-cookbook, pull request 928)."""
OF_CHANGE = 0.03
"""Further accepted distance, as a share of the change by training. A server rounds an adapter to
bf16, so errors grow with the change: measured 0.0014 to 0.0025 of it on a two-layer base of random
weights, up to ten times the noise of the base (docs/fleet.md). Half an alpha is about 0.5."""
ERRORS = 3.0
"""Standard errors at which a factor differs from 1, or from 0."""
FACTOR = 0.25
"""The change is too small to tell if the factor is not known to this: 0.5 and 1 must differ."""
OTHER_BASE = 0.25
"""The server has another base if the noise is above this share of the spread (standard deviation)
of the trainer's log p under the base. In bf16 it was 0.004 on a two-layer base and 0.03 on
SmolLM2-135M; unrelated values of equal spread give 1.4."""

KEY = "OPENAI_API_KEY"
"""Environment variable with the server's key; the openai client reads the same one."""
AT_ONCE = 16
"""Maximum number of requests in flight."""
TIMEOUT_S = 120


@dataclass(frozen=True)
class Probe:
    """Log p of one adapter's tokens in nats, [L]; the first tokens are common to all adapters."""

    base: np.ndarray
    """The trainer's base."""
    trained: np.ndarray
    """The trainer's base with the adapter."""
    server_base: np.ndarray
    served: np.ndarray
    """The server's answer under the adapter's name."""


@dataclass(frozen=True)
class Finding:
    """What was found of one adapter; distances are root mean squares over tokens, in nats."""

    verdict: str
    change: float
    """Between the trainer's adapter and base."""
    distance: float
    """Between server and trainer."""
    bound: float
    """The accepted distance."""
    factor: float
    """Slope of the server's change on the trainer's: 1 is right, 0 not applied."""
    factor_se: float
    nearest: str
    """Name of the adapter whose values on the common tokens are nearest to the server's."""


def rms(values: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def judge(name: str, probe: Probe, trained: Mapping[str, np.ndarray], noise: float) -> Finding:
    """Judge one adapter: is it applied, is it the right one, how far is it from the trainer's.

    Args:
        name: the adapter.
        probe: its log-probabilities.
        trained: name -> the trainer's values on the common tokens, for all adapters of the base.
        noise: distance between the server's and the trainer's base, in nats.
    """
    change, served_change = probe.trained - probe.base, probe.served - probe.server_base
    size, distance = rms(change), rms(probe.served - probe.trained)
    length = max(float(np.linalg.norm(change)), 1e-12)
    factor = float(served_change @ change) / length**2
    # a slope's standard error; the difference of two answers of the server has twice the variance
    se = 2**0.5 * noise / length
    bound, uncertain = TIMES_NOISE * noise + OF_CHANGE * size, ERRORS * se + OF_CHANGE
    common = {n: v - probe.served[: len(v)] for n, v in trained.items()}
    nearest = min(common, key=lambda n: rms(common[n]))
    tells = ERRORS * se <= FACTOR
    # two adapters are told apart if they differ by more than errors would move one to the other
    gap = float(np.linalg.norm(common[nearest] - common[name]))
    apart = gap > 2 * ERRORS * (noise + OF_CHANGE * size)
    its_change = rms(trained[nearest] - probe.base[: len(trained[nearest])])
    near = rms(common[nearest]) <= TIMES_NOISE * noise + OF_CHANGE * its_change
    if tells and abs(factor) <= uncertain and rms(served_change) <= TIMES_NOISE * noise:
        verdict = NOT_APPLIED
    elif nearest != name and apart and near:
        verdict = ANOTHERS
    elif distance > bound or (tells and abs(factor - 1) > uncertain):
        verdict = DIFFERS
    else:
        verdict = SERVED if tells else TOO_SMALL
    return Finding(verdict, size, distance, bound, factor, se, nearest)


# ---------------------------------------------------------------- the server


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
            raise SpecError(f"url={url}: no list of models. Expected an OpenAI API.") from None

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
                "(/v1/completions with echo=true and logprobs=1). vLLM and SGLang return them."
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
