"""Train small packs in tests, and bound how far two states may differ on any processor.

Processors add up in different orders, so two ways to compute one number differ in the last digits,
and training lets differences grow: in float64 to 1e-13 after ten updates, to 1e-6 after forty at
1e-2. So two runs are held equal over at most ten updates (`ROUNDING`), on the same weights and on
weights `moved` by one unit in the last place, which stand for another processor. A longer run is
held to the difference that moved weights make to it.
"""

import dataclasses
from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lorasweep.data import splits as data
from lorasweep.data.examples import Data, Example, shuffled
from lorasweep.launch.torch_trainer import finetune
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.load import empty_model, find_targets, use_grouped_experts
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.streams import stream
from tests.world import compose_request, tiny_spec

ROUNDING = {1: 1e-12, 10: 1e-10}
"""Updates: how far two float64 runs may be apart after as many, relative to each tensor's scale."""
EPS = 1e-3
"""Adam's eps in such runs. An update is lr * m / (sqrt(v) + eps), so at 1e-8 a gradient entry that is
zero but for rounding (1e-17) moves its weight by 1e-9 of the others' change, or by as much as they."""


SMALL = ModelSpec(
    **{"name": "small", "source": "hub", "location": "nobody/small", "vocab_size": 20},
    **{"n_layers": 1, "hidden_size": 16, "mlp_size": 24},
    **{"n_heads": 2, "n_kv_heads": 1, "head_size": 8},
)
SMALL_MOE = dataclasses.replace(
    SMALL, name="small-experts", n_layers=2, qk_norm=True, n_experts=4, n_active_experts=2
)


def family_model(family, config="", **changes):
    """A random model of a family of transformers, in eval mode: two layers of width 16.

    `config`: the name of its configuration, if that is another one.
    """
    torch.manual_seed(0)
    shape = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    given = {k: v for k, v in {**shape, **changes}.items() if v is not None or "token" in k}
    config = getattr(transformers, config or f"{family}Config")(**given)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def moe(implementation="ours"):
    """A Qwen3-MoE in float64, with weights large enough for its experts to matter."""
    torch.manual_seed(0)
    model = empty_model(SMALL_MOE).double()
    for p in model.parameters():
        p.data.normal_(0, 0.4)
    if implementation == "ours":
        use_grouped_experts(model, SMALL_MOE)
    else:
        model.set_experts_implementation(implementation)
    return model.eval()


def small_world(**changes):
    """A run in float64 on the shipped base with short sequences, its base and its rows."""
    given = {"precision": "fp64", "method": LoRA(rank=4), "lr": 5e-3, "steps": 6, "eps": EPS}
    return with_base_and_rows(tiny_spec(**{**given, **changes}))


REWARDED = {
    "bandit": ("model=tiny64-knows", "batch_size=64", "group_size=8", "max_new_tokens=1"),
    "words": ("model=tiny64-skilled", "batch_size=64", "group_size=8", "max_new_tokens=6"),
}
"""Data sets with rewards: overrides of a small run."""


def rewarded_spec(name, **changes):
    """A rewarded run of six updates in float64, a bandit or new words for old skills."""
    common = ("objective=policy_gradient", "precision=fp64", "steps=6", "lr=2e-3")
    spec = compose_request([f"dataset={name}", *REWARDED[name], *common]).points[0].spec
    short = dataclasses.replace(spec.dataset, n_test=32, n_test_curve=16)
    return dataclasses.replace(spec, **{"dataset": short, "method": LoRA(rank=4), **changes})


def with_base_and_rows(spec, *folders):
    return spec, models.load(spec.model, folders, spec.precision), data.load(spec.dataset, [])


def rewarded_world(name, **changes):
    return with_base_and_rows(rewarded_spec(name, **changes), "models")


def row_of(rng, vocab, longest, share):
    """A row of 5 to `longest` random tokens; all but the first 1/`share` of it bears loss."""
    tokens = rng.integers(0, vocab, size=rng.integers(5, longest + 1)).astype(np.int32)
    return Example(tokens, np.arange(len(tokens)) > len(tokens) // share)


def ragged(vocab=32, longest=60):
    """Data without end: rows of 5 to `longest` tokens, the second half of each bearing loss."""

    def rows(seed, start, count):
        streams = (stream("ragged", seed, start + k) for k in range(count))
        return [row_of(rng, vocab, longest, 2) for rng in streams]

    return Data(rows, rows(-1, 0, 12), None)


def customer(spec, name, longest, train, test, validation, curve=0, **changes):
    """A run on rows of 5 to `longest` of the symbols 0 to 30, which it can only memorise; its data."""
    rows = {}
    for split, count in (("train", train), ("test", test), ("validation", validation)):
        rng = stream(name, split)
        rows[split] = [row_of(rng, 31, longest, 3) for _ in range(count)]
    dataset = dataclasses.replace(
        spec.dataset,
        **{"name": name, "source": "jsonl", "location": name, "format": "prompt_completion"},
        **{"generator_params": {}, "holdout": test + validation, "n_validation": validation},
        **{"n_test": test, "n_test_curve": curve},
    )
    ordered = shuffled(dataset, rows["train"])
    data = Data(ordered, rows["test"], train, validation=rows["validation"])
    return dataclasses.replace(spec, dataset=dataset, **changes), data


def by_torch(spec, model, rows, names=""):
    """Train weights with `names` in their names by torch's AdamW; each update's loss and gradient norm."""
    trained = [p.requires_grad_(True) for n, p in model.named_parameters() if names in n]
    settings = {"lr": spec.lr, "eps": spec.eps, "weight_decay": spec.weight_decay}
    optimizer, found = torch.optim.AdamW(trained, betas=(0.9, 0.95), **settings), []
    for step in range(spec.steps):
        losses = []
        for row in rows.train(spec.seed, step * spec.batch_size, spec.batch_size):
            tokens, bears = torch.from_numpy(row.tokens).long(), torch.from_numpy(row.loss[1:])
            logits = model(input_ids=tokens[None]).logits[0, :-1]
            losses.append(F.cross_entropy(logits, tokens[1:], reduction="none")[bears])
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, spec.clip_norm or torch.inf)
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found


def beside_peft(trainables, model, method):
    """PEFT's model of one run on a copy of the model, and pairs (ours, theirs) of their tensors."""
    linears = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    size = {"r": method.rank, "lora_alpha": method.alpha, "target_modules": linears}
    reference = get_peft_model(deepcopy(model), LoraConfig(**size, task_type="CAUSAL_LM")).double()
    theirs = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    name, pairs = "base_model.model.{}.lora_{}.default.weight".format, []
    for full, p in trainables.parameters().items():
        part, _ = trainables.part_of(full)
        pairs.append((p, theirs.pop(name(part[:-2], part[-1]))))
    assert not theirs
    return reference, pairs


def copied(snapshot):
    """A snapshot that later updates do not change."""
    return {
        i: {"tensors": {n: t.clone() for n, t in s["tensors"].items()}, "meta": deepcopy(s["meta"])}
        for i, s in snapshot.items()
    }


class Trained:
    """What events gave, by run: states, records, ends, results; and states after the updates `at`."""

    def __init__(self, events, at=()):
        self.states, self.records, self.ends, self.results, self.at = {}, {}, {}, {}, {}
        for event in events:
            for i, record in event.records.items():
                self.records.setdefault(i, []).append(record)
            if event.ended or event.step in at:
                self.at[event.step] = copied(event.snapshot())
            for i, (end, result) in event.ended.items():
                self.states[i] = self.at[event.step][i]
                self.ends[i], self.results[i] = end, result


def run(pack, base, rows, **kwargs):
    """Train to the end; the last state of each run, and its records."""
    found = Trained(finetune(pack, base, rows, **kwargs))
    return found.states, found.records


def as_alone(pack, base, rows, other, some=(), micro=None, at=()):
    """Train a pack, then `some` of its runs (all) alone on another base: the same to rounding.

    So are states, and the numbers of records and results that do not hang on time or on the company
    of a pack. Micro-batches are the pack's alone. Returns what the pack gave.
    """
    base.at_start.clear()
    found = Trained(finetune(pack, base, rows, micro), at)
    for one in some or pack:
        own = {one.id: rows[one.id]} if isinstance(rows, dict) else rows
        alone = Trained(finetune([one], dataclasses.replace(other, at_start={}), own))
        assert worst(alone.states[one.id], found.states[one.id]) < ROUNDING[10]
        pairs = zip(alone.records[one.id], found.records[one.id], strict=True)
        for a, b in (*pairs, (alone.results[one.id], found.results[one.id])):
            shared = {"tokens"} if "surrogate" in b else set()  # prompts are shared
            kept = {n: v for n, v in b.items() if n not in shared and n[-2:] != "_s"}
            kept = {n: v for n, v in kept.items() if isinstance(v, int | float)}
            assert a.keys() == b.keys()
            assert {n: a[n] for n in kept} == pytest.approx(kept, rel=ROUNDING[10])
    return found


def moved(base, seed=0):
    """A copy of a base or model, each weight one unit in the last place higher or lower, at random."""
    if not isinstance(base, torch.nn.Module):
        return dataclasses.replace(base, model=moved(base.model, seed), at_start={})
    model = deepcopy(base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            up = torch.from_numpy(stream("moved", seed, name).random(tuple(p.shape)) < 0.5)
            p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf).to(p)))
    return model


def worst(a, b):
    """The largest difference of two runs' tensors, each relative to the tensor's largest entry."""
    assert a["tensors"].keys() == b["tensors"].keys()
    return max(apart(a["tensors"][n].cpu(), t.cpu()) for n, t in b["tensors"].items())


def apart(a, b):
    """The largest difference between two tensors, relative to the largest entry."""
    a, b = a.detach(), b.detach()
    difference = float((a - b).abs().max())
    return difference and difference / float(b.abs().max())


def saved_for_backward(model, forward):
    """Call forward(); return a tensor of each storage that it saves, without the model's own."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in held:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept: no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return list(saved.values())


def pack_of(methods, model, shape=None, seeds=None, perturb=0.0):
    """Trainables of a pack, without a shape on all linear layers; `perturb`: noise in their tensors."""
    targets = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    if shape:
        targets = find_targets(model, shape, methods[0].target_layers())
    trainables = methods[0].attach(model, targets, methods, seeds or list(range(len(methods))))
    if perturb:
        torch.manual_seed(1)
        with torch.no_grad():
            for p in trainables.parameters().values():
                p.add_(torch.randn(p.shape).to(p), alpha=perturb)  # the same in every type
    return trainables


def state_of(trainables, k=0, what="data"):
    """The tensors of run k by their names in its state, or (`what="grad"`) their gradients."""
    found = {}
    for name, p in trainables.parameters().items():
        in_state, runs = trainables.part_of(name)
        if runs.start <= k < runs.stop:
            found[in_state] = getattr(p, what)[k - runs.start]
    return found


class OtherLibrary(TorchDispatchMode):
    """Each result of arithmetic in float64 is off by up to 16 units in the last place, as by another
    device's cosine, or another order of sums. `narrower`: operations in a narrower type."""

    MOVES = ("lift_fresh", "stack", "sum")  # rows' counts of loss tokens, which are whole numbers

    def __init__(self):
        super().__init__()
        self.noise, self.narrower = torch.Generator().manual_seed(0), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                if t.dtype != torch.float64 and name not in self.MOVES:
                    self.narrower.add(name)
                if t.dtype == torch.float64 and name in ARITHMETIC:
                    by = 2 * torch.rand(t.shape, generator=self.noise, dtype=t.dtype) - 1
                    t.mul_(1 + 16 * torch.finfo(t.dtype).eps * by)
        return out


ARITHMETIC = [
    "cos",
    "sin",
    "pow",
    "mean",
    "rsqrt",
    "mm",
    "bmm",
    "_softmax",
    "silu",
    "_log_softmax",
    "sum",
    "div",
    "sqrt",
    "exp",
]
