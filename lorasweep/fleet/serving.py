"""Serving of adapters: what a server takes, the command, the check of a folder and of answers.

A profile is a file of conf/serve, in which every rule has its source. A folder is checked by its
headers and JSON alone: nothing is unpickled, and no weight is read. A running vLLM is asked for
log-probabilities by the OpenAI API; arrays hold log p of the same answer tokens, in nats. Errors of
a server are measured in the same run: its base against the trainer's base.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lorasweep.data.examples import Example
from lorasweep.errors import SpecError
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.values import Value
from lorasweep.store import files

HEAD = "unembedding"
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Profile(Value):
    """What a server takes. The defaults take all that a fleet writes, as PEFT does."""

    WHERE: ClassVar[str] = "serve."

    name: str = "peft"
    server: str = "PEFT"
    """The server, with the version whose files were read."""
    ranks: tuple[int, ...] = ()
    """Allowed values of the server's largest rank, ascending; empty: every rank."""
    heads: tuple[str, ...] | None = None
    """Architectures whose unembedding takes an adapter; None: all."""
    no_tied_heads: str = ""
    no_experts: str = ""
    """Why tied unembeddings are left out and experts refused; empty: they are served."""
    weights: tuple[str, ...] = ("F64", "F32", "F16", "BF16")
    refuses: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    """Keys of adapter_config.json with which the server refuses an adapter (KEY=START: values that
    start so), and those that it ignores although they change the adapter in PEFT."""
    command: str = ""
    chat_template: str = ""
    """Templates of the command to serve, and of its option with a chat template."""

    def largest_rank(self, rank: int) -> int:
        """Return the lowest largest rank of the server for adapters up to `rank`.

        Raises:
            SpecError: the server takes no such rank.
        """
        found = next((allowed for allowed in self.ranks or (rank,) if allowed >= rank), None)
        if found is None:
            raise SpecError(
                f"rank {rank}: {self.server} takes ranks up to {self.ranks[-1]}, set to one of "
                f"{', '.join(map(str, self.ranks))}. Add serve=peft, or another server's profile."
            )
        return found

    def why_no_head(self, model: ModelSpec, architecture: str) -> str:
        """Return why the unembedding of a base gets no adapter; '' if it gets one.

        `architecture`: the class that config.json names; '' if it is not known.
        """
        if model.tied and self.no_tied_heads:
            return self.no_tied_heads
        if self.heads is None or architecture in self.heads:
            return ""
        which = f"{architecture} is not among them" if architecture else "the base's is not known"
        return f"{self.server} takes it for some architectures, and {which}"


PEFT = Profile()


def adapted(profile: Profile, layers: str, model: ModelSpec, architecture: str) -> tuple[str, str]:
    """Return the layer sets to adapt for a server, and why the unembedding was left out of them.

    Raises:
        SpecError: the server takes none of these layers, or no experts.
    """
    sets = parse_layers(layers)
    why = profile.why_no_head(model, architecture) if HEAD in sets else ""
    left = "+".join(s for s in sets if s != HEAD)
    refused = why if not left else ""
    if model.n_experts and "mlp" in sets:
        refused = refused or profile.no_experts
    if refused:
        raise SpecError(
            f"serve={profile.name} and method.layers={layers} with model {model.name!r}: "
            f"{refused}. Add method.layers=attention, or serve=peft."
        )
    return (left, why) if why else (layers, "")


# ---------------------------------------------------------------- the check of a folder


def problems(
    folder: Path, profile: Profile, model: ModelSpec, method: Any, architecture: str = ""
) -> list[str]:
    """Return how an adapter's folder differs from its run, and what a server refuses, as sentences.

    Args:
        model, method: those of the run that the folder holds; the method is a LoRA.
        architecture: the class that the base's config.json names; '': not known.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        header = files.safetensors_header(folder / ADAPTER)
    except OSError as error:
        return [f"{Path(error.filename or folder).name} cannot be read: {error.strerror}."]
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        return [f"{CONFIG} is truncated, or no JSON object."]
    if header is None or header[1] != (folder / ADAPTER).stat().st_size:
        return [f"{ADAPTER} is truncated, or no safetensors file: it has no valid header."]
    wanted = {"peft_type": "LORA", "r": method.rank, "lora_alpha": method.scaling * method.rank}
    found = [
        f"{key} is {config.get(key)!r}, and {value!r} was trained."
        for key, value in wanted.items()
        if config.get(key) != value
    ]
    base = config.get("base_model_name_or_path")
    if base not in (None, model.name, model.location):
        found.append(f"{CONFIG} names the base {base!r}, which is not {model.name!r}.")
    for keys, verb in ((profile.refuses, "refuses"), (profile.ignores, "ignores")):
        for key, _, start in (entry.partition("=") for entry in keys):
            value = config.get(key)
            unset = value in (None, False, "none") or value in ([], {}, "")
            if str(value).lower().startswith(start) if start else not unset:
                found.append(f"{key} is {json.dumps(value)}, which {profile.server} {verb}.")
    sides: dict[str, tuple[int, ...]] = {}  # end of a module's name -> inputs, outputs, rank
    hidden, n = model.hidden_size, model.n_experts
    for layer_set in method.target_layers():
        for name in model.modules(layer_set)[0]:
            if name == "experts":  # in PEFT's layout
                r, inner = n * method.expert_rank_of(n, model.n_active_experts), model.mlp_size
                sides["experts.base_layer"] = (hidden, 2 * inner, 2 * r)
                sides["experts"] = (inner, hidden, r)
            else:
                sides[name] = (*model.known_shapes[name], method.rank)
    plain = [s for s in sides if "experts" not in s]
    listed = config.get("target_modules") or []
    if isinstance(listed, list) and (left := [s for s in plain if s not in listed]):
        found.append(f"target_modules lacks {', '.join(left)}, which PEFT then leaves out.")
    scales = ("rank_pattern", "alpha_pattern", "use_rslora")
    for key in scales if plain == [*sides] else scales[2:]:  # experts have their own
        if config.get(key):
            found.append(f"{key} is {json.dumps(config[key])}, and was not set in training.")
    lost = {
        (kind, layer, which): shape
        for kind, (i, o, r) in sides.items()
        for layer in range(1 if kind in model.unembedding else model.n_layers)
        for which, shape in (("A", [r, i]), ("B", [o, r]))
    }
    odd = []
    for name, tensor in header[0].items():
        module, which = m.groups() if (m := FACTOR.fullmatch(name)) else ("", "")
        kind = next((k for k in sides if f".{module}".endswith(f".{k}")), "")
        layer, *nested = [int(part) for part in module.split(".") if part.isdigit()] or [0]
        right = not nested and lost.pop((kind, layer, which), ()) == tensor.get("shape")
        if not right or tensor.get("dtype") not in profile.weights:
            odd.append(f"{name} {tensor.get('shape')} ({tensor.get('dtype')})")
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        what = f"tensors that were not trained on {model.name!r}, or that {profile.server} refuses"
        found.append(f"{what}: {', '.join(odd[:3])}{more}.")
    if lost:
        kinds = ", ".join(dict.fromkeys(kind for kind, *_ in lost))
        found.append(f"{ADAPTER} lacks {len(lost)} tensors that were trained, of {kinds}.")
    why = profile.why_no_head(model, architecture) if model.tied or architecture else ""
    if why and HEAD in method.target_layers():
        found.append(f"an adapter of the unembedding {model.unembedding[0]}: {why}.")
    if profile.no_experts and "experts" in sides:
        found.append(f"adapters of experts: {profile.no_experts}.")
    return found


# ---------------------------------------------------------------- the judgement of a server

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
TELLS = 0.25
"""The change is too small to tell if the factor is not known to this: 0.5 and 1 must differ."""
OTHER_BASE = 0.25
"""The server has another base if the noise is above this share of the spread (standard deviation)
of the trainer's log p under the base. In bf16 it was 0.004 on a two-layer base and 0.03 on
SmolLM2-135M; unrelated values of equal spread give 1.4."""
KEY = "OPENAI_API_KEY"
"""Environment variable with the server's key; the openai client reads the same one."""
AT_ONCE, TIMEOUT_S = 16, 120
"""Maximum number of requests in flight, and seconds to wait for an answer."""


def rms(values: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def judge(
    name: str,
    base: np.ndarray,
    trained: np.ndarray,
    server_base: np.ndarray,
    served: np.ndarray,
    common: Mapping[str, np.ndarray],
    noise: float,
) -> dict[str, Any]:
    """Judge one adapter: is it applied, is it the right one, how far is it from the trainer's.

    Args:
        name: the adapter.
        base, trained: log p of its tokens by the trainer's base, without and with the adapter, [L].
        server_base, served: those by the server's base, and under the adapter's name, [L].
        common: name -> the trainer's values on the tokens that all adapters of the base have, which
            are the first of [L].
        noise: distance between the server's and the trainer's base, in nats.

    Returns the verdict and, as root mean squares over tokens in nats, `change` (the trainer's
    adapter to its base), `distance` (server to trainer) and the accepted `bound`; `factor` with its
    standard error, the slope of the server's change on the trainer's (1 is right, 0 not applied);
    and `nearest`, the adapter whose values on the common tokens are nearest to the server's.
    """
    change, served_change = trained - base, served - server_base
    size, distance = rms(change), rms(served - trained)
    length = max(float(np.linalg.norm(change)), 1e-12)
    factor = float(served_change @ change) / length**2
    # a slope's standard error; the difference of two answers of the server has twice the variance
    se = 2**0.5 * noise / length
    bound, uncertain = TIMES_NOISE * noise + OF_CHANGE * size, ERRORS * se + OF_CHANGE
    off = {n: v - served[: len(v)] for n, v in common.items()}
    nearest = min(off, key=lambda n: rms(off[n]))
    tells = ERRORS * se <= TELLS
    # two adapters are told apart if they differ by more than errors would move one to the other
    gap = float(np.linalg.norm(off[nearest] - off[name]))
    apart = gap > 2 * ERRORS * (noise + OF_CHANGE * size)
    its_change = rms(common[nearest] - base[: len(common[nearest])])
    near = rms(off[nearest]) <= TIMES_NOISE * noise + OF_CHANGE * its_change
    if tells and abs(factor) <= uncertain and rms(served_change) <= TIMES_NOISE * noise:
        verdict = NOT_APPLIED
    elif nearest != name and apart and near:
        verdict = ANOTHERS
    elif distance > bound or (tells and abs(factor - 1) > uncertain):
        verdict = DIFFERS
    else:
        verdict = SERVED if tells else TOO_SMALL
    found = {"verdict": verdict, "change": size, "distance": distance, "bound": bound}
    return {**found, "factor": factor, "factor_se": se, "nearest": nearest}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follow no redirect, as the other address would get the key."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Server:
    """A vLLM server that answers, with the names of its adapters."""

    def __init__(self, url: str) -> None:
        """Ask for the models. Raises SpecError if no vLLM answers at `url`."""
        self.url = url.rstrip("/").removesuffix("/v1")
        listed = self._call("models")
        try:
            is_vllm = any(m["owned_by"] == "vllm" for m in listed["data"])
            self.bases = {m["id"]: m["parent"] for m in listed["data"] if m.get("parent")}
            """Name of an adapter -> name of its base."""
        except (KeyError, TypeError, AttributeError):
            is_vllm = False
        if not is_vllm:
            raise SpecError(f"url={url}: no list of vLLM's models. Other servers are not asked.")

    def log_p(self, name: str, rows: Sequence[Example]) -> np.ndarray:
        """Return log p of the loss tokens of rows under a model, [loss tokens], in nats.

        vLLM generates one token after each prefix, and only the given token is allowed; it returns
        log p before this restriction. Its log-probabilities of prompts lack an adapter of the
        unembedding, and asking a CPU for several of them stops the server (vLLM 0.32; issues 51594,
        29955).

        Raises:
            SpecError: the server refuses, or returns no log-probabilities.
        """
        asked: list[dict[str, Any]] = []
        for row in rows:
            tokens = row.tokens.tolist()
            for t in np.flatnonzero(row.loss):
                asked.append({"prompt": tokens[:t], "allowed_token_ids": [tokens[t]]})
        answers = self.complete(name, asked, max_tokens=1, logprobs=1)
        try:
            found = [a["choices"][0]["logprobs"]["token_logprobs"][0] for a in answers]
            values = np.array([float(value) for value in found])
            if np.isfinite(values).all():  # else no distance would be too large
                return values
        except (KeyError, TypeError, ValueError, IndexError):
            pass
        raise SpecError(
            f"url={self.url}: the server returns no log-probabilities of given tokens "
            "(/v1/completions with allowed_token_ids and logprobs=1)."
        )

    def complete(self, name: str, asked: Sequence[dict[str, Any]], **fixed: Any) -> list[Any]:
        """Return the answers of a model to prompts, greedy, as JSON. SpecError: there is none."""
        fixed |= {"model": name, "temperature": 0}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda one: self._call("completions", fixed | one), asked))

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
        except (OSError, ValueError) as error:
            said, there = str(error), ""
            if isinstance(error, urllib.error.HTTPError):
                said = f"{error.code}: {error.read(500).decode(errors='replace')}"
                there = error.headers.get("Location") or ""
            there = f" It redirects to {there}, which would get the key." if there else ""
            raise SpecError(
                f"url={self.url}: /v1/{path} gives no answer of the OpenAI API ({said}).{there} "
                f"Start the server (the fleet's page has the command), set {KEY} if it has a key, "
                "and give its address: url=http://localhost:8000"
            ) from None
