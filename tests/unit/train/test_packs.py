"""Packs are the runs alone, to rounding: step by step, over ten updates, and on models of other
families."""

import dataclasses
import statistics

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.examples import Data, Example
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.streams import stream
from lorasweep.train.objectives import nll
from tests.training import EPS, ROUNDING, copied, moved, run, worst
from tests.world import tiny_spec


def ragged(vocab=32, longest=60):
    """Rows of 5 to `longest` tokens, the second half of each bearing loss."""

    def row(*names):
        rng = stream(*names)
        tokens = rng.integers(0, vocab, size=rng.integers(5, longest + 1)).astype(np.int32)
        return Example(tokens, np.arange(len(tokens)) > len(tokens) // 2)

    def rows(seed, start, count):
        return [row("ragged", seed, start + k) for k in range(count)]

    return Data(rows, rows(-1, 0, 12), None)


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(
        precision="fp64", method=LoRA(rank=4), lr=2e-3, steps=10, batch_size=2, eps=EPS
    )
    spec = dataclasses.replace(
        spec, dataset=dataclasses.replace(spec.dataset, n_test=8, n_test_curve=8)
    )
    return spec, models.load(spec.model, ["/nonexistent"], "fp64"), data.load(spec.dataset, [])


def mixed(spec, count, wild=()):
    """`count` members that mix rates, ranks (equal ones together, as the planner lays them), alphas
    and seeds."""
    ranks = sorted((1, 4, 8, 16)[k % 4] for k in range(count))
    return [
        dataclasses.replace(
            spec,
            lr=wild[k] if k < len(wild) else 5e-4 * (1 + k),
            seed=k % 3,
            method=LoRA(rank=rank, alpha=(8.0, 32.0)[k % 2]),
        )
        for k, rank in enumerate(ranks)
    ]


def losses(records, name="train_nll"):
    return np.array([r[name] for r in records if name in r])


@pytest.mark.numerics
def test_one_step_in_a_pack_is_one_step_alone(world, other_weights):
    """From the same state, at three points of a run: gradient, moments and update.

    Catches what mixes members up (a rate, an alpha, a data order, moments or a bias correction of
    another member), a loss divided by another count, and a member beyond the edge of stability that
    reaches its neighbours.
    """
    spec, base, rows = world
    # the pack is attached to `base` meanwhile
    other = other_weights(models.load(spec.model, ["/nonexistent"], "fp64"))
    pack = mixed(spec, 16, wild=(0.12,))
    checked = {2: pack, 5: pack[::5], 8: pack[::5]}  # at update 2 all, then one of each rank
    before, wild = {}, []
    for event in finetune(pack, base, rows):
        after = copied(event.snapshot())
        wild.append(event.records[pack[0].id]["train_nll"])
        for member in checked.get(event.step, ()):
            resume = {member.id: before[member.id]}
            alone = next(iter(finetune([member], other, rows, resume=resume))).snapshot()
            # beyond the edge of stability a gradient amplifies rounding, too
            bound = ROUNDING[10] if member is pack[0] else ROUNDING[1]
            assert worst(alone[member.id], after[member.id]) < bound, (event.step, member.lr)
        if event.step == max(checked):
            break
        before = after
    assert max(wild) - wild[0] > 0.5


def test_a_run_that_the_caller_drops_is_trained_no_further(world):
    """The rest of its pack goes on as if alone; a trainer that has lost all runs ends."""
    spec, base, rows = world
    pack, trained = mixed(dataclasses.replace(spec, steps=6), 3), {}
    for event in finetune(pack, base, rows):
        for i in event.records:
            trained.setdefault(i, []).append(event.step)
        if event.step == 2:
            event.dropped.add(pack[1].id)
        if event.ended:
            last = copied(event.snapshot())
    assert [trained[s.id][-1] for s in pack] == [6, 2, 6] and pack[1].id not in last
    alone, _ = run([pack[2]], base, rows)
    assert worst(alone[pack[2].id], last[pack[2].id]) < ROUNDING[10]
    events = []
    for event in finetune([dataclasses.replace(spec, method=FullFT(), lr=1e-3)], base, rows):
        events.append(event)
        event.dropped.update(event.records)
    assert len(events) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [False, pytest.param(True, marks=pytest.mark.numerics)],
    ids=["equal rows", "ragged rows"],
)
def test_ten_updates_of_a_pack_are_those_of_its_runs_alone(world, text):
    """One pack of eight: four ranks, three data orders, so that with ragged rows the members'
    widths in the pack are not their own; one ends early. Some members are run alone, on the same
    weights and on moved ones; two go on from its fifth update as a pack of their own. With decay
    and clipping, which are each member's own."""
    spec, base, rows = world
    rows = ragged(longest=40) if text else rows
    pack = mixed(dataclasses.replace(spec, weight_decay=0.1, clip_norm=0.5), 8)
    pack[5] = dataclasses.replace(pack[5], steps=8)
    together, middle = {}, {}
    for event in finetune(pack, base, rows):
        if event.step == 5:
            middle = copied(event.snapshot())
        if event.ended:
            together |= copied(event.snapshot())
    for weights in (base, moved(base)):
        for member in pack[::5]:
            alone, _ = run([member], weights, rows)
            assert worst(alone[member.id], together[member.id]) < ROUNDING[10]
        some = pack[3:7:3]
        rest, _ = run(some, weights, rows, resume={s.id: middle[s.id] for s in some})
        for member in some:
            assert worst(rest[member.id], together[member.id]) < ROUNDING[10]


@pytest.mark.slow
def test_in_float32_packing_is_far_within_the_noise_between_seeds():
    """Sixteen members of four ranks and four seeds. Bits may differ: matrix products of another
    shape may add up in another order, and which do depends on the processor. So the first losses
    agree to rounding, and the final held-out loss to a twentieth of the noise between seeds."""
    spec = tiny_spec(lr=3e-3, steps=20)
    base, rows = models.load(spec.model, ["/nonexistent"]), data.load(spec.dataset, [])
    pack = [
        dataclasses.replace(spec, method=LoRA(rank=r), seed=s)
        for r in (1, 4, 8, 16)
        for s in range(4)
    ]
    _, together = run(pack, base, rows)
    noise = statistics.stdev(losses(together[m.id], "test_nll")[-1] for m in pack[4:8])
    for member in (pack[0], pack[5], pack[-1]):
        own = run([member], base, rows)[1][member.id]
        ours, theirs = losses(together[member.id]), losses(own)
        assert np.abs(ours[:5] - theirs[:5]).max() < 1e-5
        final = losses(together[member.id], "test_nll")[-1] - losses(own, "test_nll")[-1]
        assert abs(final) < noise / 20


# ---------------------------------------------------------------- both ways to compute a forward


@pytest.mark.numerics
@pytest.mark.parametrize(
    "methods",
    [[LoRA(rank=2), LoRA(rank=2, alpha=8.0), LoRA(rank=8)], [FullFT()]],
    ids=["lora", "fullft"],
)
def test_our_passes_are_transformers_own_on_ragged_rows(
    world, norms_in_float64, monkeypatch, methods, other_weights
):
    spec, base, _ = world
    pack = [
        dataclasses.replace(spec, method=m, steps=3, lr=1e-3, seed=k) for k, m in enumerate(methods)
    ]
    ours, _ = run(pack, base, ragged())
    monkeypatch.setattr(nll, "cpu_llama_for", lambda model: None)
    theirs, _ = run(pack, other_weights(base), ragged())
    for i, state in ours.items():
        assert worst(state, theirs[i]) < ROUNDING[10]


def qwen3(spec):
    """A random Qwen3 of tiny64's shape: a family that has no passes of ours."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    m = spec.model
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=m.hidden_size,
            intermediate_size=m.mlp_size,
            num_hidden_layers=2,
            num_attention_heads=m.n_heads,
            num_key_value_heads=m.n_kv_heads,
            head_dim=m.head_size,
            vocab_size=m.vocab_size,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    shape = dataclasses.replace(m, name="qwen3-tiny", n_layers=2, qk_norm=True)
    return dataclasses.replace(spec, model=shape), models.Base(
        model.double().eval(), None, "random"
    )


@pytest.mark.numerics
def test_a_pack_on_another_family_is_its_runs_alone(world, norms_in_float64, other_weights):
    """Ragged rows: members of unequal length must not be cut at the wrong place."""
    spec, base = qwen3(dataclasses.replace(world[0], steps=4, batch_size=3))
    pack = mixed(spec, 5)
    together, _ = run(pack, base, ragged(longest=40), micro_batch_size=2)
    for member in pack[::2]:
        alone, _ = run([member], other_weights(base), ragged(longest=40))
        assert worst(alone[member.id], together[member.id]) < ROUNDING[10]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()], ids=["lora", "fullft"])
def test_on_a_gpu_it_is_the_cpus_run(method):
    """float64, the same curve as on the CPU; then bf16 autocast, near it."""
    spec = tiny_spec(method=method, steps=10, lr=1e-3, precision="fp64")
    rows, curves = data.load(spec.dataset, []), {}
    for device in ("cpu", "cuda"):
        base = models.load(spec.model, ["/nonexistent"], "fp64")
        base.model.to(device)
        curves[device] = run([spec], base, rows)[1][spec.id][-1]
    assert curves["cuda"]["test_nll"] == pytest.approx(
        curves["cpu"]["test_nll"], abs=1e-6
    )  # norms in float32
    low = dataclasses.replace(spec, precision="bf16")
    got = run([low], models.load(low.model, ["/nonexistent"], "bf16"), rows)[1][low.id][-1]
    assert got["test_nll"] == pytest.approx(curves["cpu"]["test_nll"], abs=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_pack_on_a_gpu_is_its_runs_alone(norms_in_float64):
    spec = tiny_spec(steps=10, lr=1e-3, precision="fp64", eps=EPS)
    base, rows = models.load(spec.model, ["/nonexistent"], "fp64"), ragged()
    pack = mixed(spec, 8)
    together, _ = run(pack, base, rows)
    for member in pack[::3]:
        alone, _ = run([member], base, rows)
        assert worst(alone[member.id], together[member.id]) < ROUNDING[10]
