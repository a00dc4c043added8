"""Runs that end by their held-out loss: in a pack as alone, resumed, and their best weights."""

import dataclasses

import pytest

from lorasweep.errors import SpecError
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.memory import checkpoint_bytes
from lorasweep.plan.plan import pack_key
from lorasweep.plan.planner import place
from lorasweep.spec.evaluations import Best, eval_steps, no_better, why_not_early
from lorasweep.spec.run import validate
from lorasweep.train.loop import Progress
from tests.training import ROUNDING, Trained, moved, noise, small_world, worst


@pytest.fixture(scope="module")
def world():
    return small_world(batch_size=4)[:2]


def customer(spec, name, longest, steps, patience=2, rate=1e-2, train=6):
    """A run on few rows of noise, which it can only memorise; other rows of noise are held out."""
    dataset = dataclasses.replace(
        spec.dataset,
        **{"name": name, "source": "jsonl", "location": name, "format": "prompt_completion"},
        **{"generator_params": {}, "holdout": 20, "n_validation": 8, "n_test": 12},
        n_test_curve=0,
    )
    changes = {"dataset": dataset, "steps": steps, "lr": rate, "early_stopping": patience}
    data = noise(dataset, longest, train=train, test=12, validation=8)
    return dataclasses.replace(spec, **changes), data


def trained(pack, data, base, resume=None):
    """The results, the last states, and the snapshots after 5 and 10 updates."""
    base.at_start.clear()
    found = Trained(finetune(pack, base, data, resume=resume), at=(5, 10))
    assert set(found.ends.values()) == {"done"}
    return found.results, found.states, found.at


@pytest.fixture(scope="module")
def together(world):
    """One pack: two that overfit, one of them patient; one that only learns; one without patience."""
    spec, base = world
    made = [
        customer(spec, "hasty", 30, 48, patience=1),
        customer(spec, "patient", 60, 64, patience=3, rate=5e-3),
        customer(spec, "slow", 20, 24, rate=1e-4, train=40),
        customer(spec, "all", 40, 40, patience=0),
    ]
    runs, data = [s for s, _ in made], {s.id: d for s, d in made}
    return runs, data, *trained(runs, data, base)


NUMBERS = ("test_nll", "test_nll_curve", "train_nll", "norm_b", "code_nats")


def numbers_apart(a, b):
    """The largest relative difference between two results' numbers, those of the curve included."""
    pairs = [(a[name], b[name]) for name in NUMBERS]
    pairs += [(p["test_nll"], q["test_nll"]) for p, q in zip(a["curve"], b["curve"], strict=True)]
    return max(abs(x - y) / abs(y) for x, y in pairs)


@pytest.mark.full
@pytest.mark.numerics
def test_each_stops_where_it_would_alone_and_leaves_the_same(world, together):
    """Over ten updates to rounding. At the end, after up to 40 updates at 1e-2, as close as the run
    alone is to itself on moved weights (1e-7 here): more cannot be had on any two processors. Where
    each stops does not hang on that: evaluations differ by far more."""
    runs, data, results, states, middle = together
    assert results[runs[0].id]["steps_done"] < results[runs[1].id]["steps_done"] < 64
    assert results[runs[2].id]["steps_done"] == 24 and results[runs[3].id]["steps_done"] == 40
    for run in runs:
        own, alone, at = trained([run], data, world[1])
        other, away, other_at = trained([run], data, moved(world[1]))
        if run.id in middle.get(10, ()):
            for found in (at, other_at):
                assert worst(found[10][run.id], middle[10][run.id]) < ROUNDING[10]
        ours, theirs, elsewhere = results[run.id], own[run.id], other[run.id]
        for name in ("steps_done", "best_step", "tokens"):
            assert ours.get(name) == theirs.get(name) == elsewhere.get(name)
        tensors, numbers = worst(away[run.id], alone[run.id]), numbers_apart(elsewhere, theirs)
        packed = worst(alone[run.id], states[run.id]), numbers_apart(theirs, ours)
        for spread, found in zip((tensors, numbers), packed):
            bound = max(100 * spread, ROUNDING[1])
            assert found <= bound < 1e-3
        if run.early_stopping:
            losses = sorted(p.get("test_nll_curve", p["test_nll"]) for p in ours["curve"][1:])
            assert losses[1] - losses[0] > 100 * bound * losses[0]


def test_the_best_evaluation_is_kept(together):
    runs, _, results, _, _ = together
    for run in runs:
        found = results[run.id]
        losses = {p["step"]: p.get("test_nll_curve", p["test_nll"]) for p in found["curve"][1:]}
        if not run.early_stopping:
            assert "best_step" not in found and losses == {run.steps: found["test_nll_curve"]}
            continue
        assert found["best_step"] == min(losses, key=losses.get)
        assert found["test_nll_curve"] == pytest.approx(min(losses.values()), abs=1e-12)
        evaluated = list(losses)
        since = len([s for s in evaluated if s > found["best_step"] and s >= run.steps / 10])
        assert found["early_stopping_rule"] == 2
        early = found["steps_done"] < run.steps
        assert early == (since == run.early_stopping)
        assert evaluated == [s for s in eval_steps(run.steps) if s <= found["steps_done"]]
        assert "test_nll_curve" in found["curve"][-1]


def test_a_run_resumes_after_a_kill_to_the_same_bits(world, together):
    """From a checkpoint between its best evaluation and its end."""
    runs, data, results, states, middle = together
    rest = [s for s in runs if s.id in middle[5]]
    assert any(0 < results[s.id].get("best_step", 0) < 5 for s in rest)
    again, left, _ = trained(rest, data, world[1], resume=middle[5])
    for run in rest:
        ours, wanted = again[run.id], results[run.id]
        assert all(ours[k] == wanted[k] for k in ours.keys() | wanted if not k.endswith("_s"))
        tensors = left[run.id]["tensors"]
        assert all(t.equal(tensors[n]) for n, t in states[run.id]["tensors"].items())


@pytest.mark.parametrize("method", [LoRA(rank=8), FullFT()], ids=["lora", "fullft"])
def test_a_customer_that_overfits_is_not_worse_for_it(world, method):
    spec, base = world
    rate = 1e-2 if method.name == "lora" else 2e-3
    run, data = customer(dataclasses.replace(spec, method=method), "noisy", 30, 48, rate=rate)
    both = (run, dataclasses.replace(run, early_stopping=0))
    early, late = (trained([one], {one.id: data}, base)[0][one.id] for one in both)
    assert early["steps_done"] < 48 and early["test_nll"] < late["test_nll"] - 0.1
    assert late["train_nll"] < early["test_nll"] - 0.5  # it does memorise its rows
    assert early["tokens"] < late["tokens"]


def test_its_memory_is_planned(world):
    spec, _ = world
    run, _ = customer(spec, "any", 30, 48)
    endless = dataclasses.replace(run, early_stopping=0)
    assert pack_key(run) == pack_key(endless) and run.id != endless.id
    machine = Hardware(name="any", cores=2, memory_gib=8.0)
    one, other = (place(s, machine, 4).memory_bytes for s in (run, endless))
    trained_ = run.method.n_trainable(run.model)
    assert one - other == 4 * 8 * trained_  # the best weights
    assert checkpoint_bytes([run]) - checkpoint_bytes([endless]) == 2 * 4 * trained_


def test_wrong_input_is_refused(world):
    spec, _ = world
    run, _ = customer(spec, "any", 30, 48)
    validate(run)
    few = dataclasses.replace(run.dataset, n_validation=3)
    for changes, says in (
        ({"early_stopping": -1}, "early_stopping=-1"),
        ({"early_stopping": 2, "dataset": few}, "4 are the fewest"),
        ({"early_stopping": 2, "dataset": spec.dataset}, "dataset.n_validation=0"),
        ({"early_stopping": 3, "steps": 4}, "of the 4 evaluations of 4 updates at most 3 count"),
        ({"early_stopping": 7, "steps": 128}, "before 128/10 updates"),
        ({"objective": "policy_gradient", "group_size": 2, "max_new_tokens": 4}, "rewards"),
    ):
        problems = " ".join(dataclasses.replace(run, **changes).problems())
        assert says in problems, problems
    with pytest.raises(SpecError, match="early_stopping"):
        validate(dataclasses.replace(run, early_stopping=10))
    assert why_not_early(2, 4, 4) == "" and why_not_early(3, 4, 4)
    validate(dataclasses.replace(run, early_stopping=6, steps=128))
    best = Best()
    for step, loss in enumerate([3.0, 2.0, 2.0, float("nan"), 2.5], 1):
        best.note(step, loss)
    assert (best.step, best.loss) == (2, 2.0)


def end_of(losses, patience, steps):
    """The update at which planted losses of evaluations end a run of `steps` updates."""
    best, evaluated = Best(), []
    for step, loss in zip(eval_steps(steps), losses):
        evaluated.append(step)
        best.note(step, loss)
        if no_better(best.step, evaluated, steps) >= patience:
            return step
    return steps


def test_patience_begins_after_a_tenth_of_the_updates():
    """Updates 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128: 16 is the first that counts."""
    assert eval_steps(8) == [1, 2, 3, 4, 6, 8] and eval_steps(30, curve=False) == [30]
    assert set(eval_steps(30)[:-1]) <= set(eval_steps(1000)) and eval_steps(1) == [1]
    assert eval_steps(128)[6:8] == [12, 16]
    spike = [2.0, 2.5, 2.4, 2.3, 2.2, 2.1, 1.9, 1.5, 1.2, 1.0, 1.1, 1.2, 0.9, 0.8]
    assert [end_of(spike, p, 128) for p in (1, 2, 3)] == [48, 64, 128]
    hopeless = [1.0] + [2.0] * 13  # the best one is in the head, and is kept
    assert [end_of(hopeless, p, 128) for p in (1, 2, 3)] == [16, 24, 32]
    # 20 updates: 2 is a tenth. Up to 10 updates all but the first count, as they always did.
    assert end_of([1.0, 2.0], 1, 20) == 2 and end_of([1.0, 2.0], 1, 21) == 21
    assert end_of([1.0, 2.0, 3.0], 1, 21) == 3 and end_of([1.0, 2.0], 1, 10) == 2
    for steps in range(2, 200):  # a patience that is allowed can end a run before its last update
        for patience in range(1, 12):
            ends = end_of([1.0] + [2.0] * 20, patience, steps) < steps
            assert ends == (why_not_early(patience, steps, 4) == "")


def test_an_old_checkpoint_resumes_without_counts_of_its_first_evaluations():
    progress = Progress([])
    curve = [{"step": s, "test_nll": 3.0} for s in (0, 1, 2, 3)]
    progress.load({"curve": curve, "tokens": 5, "best": [2.0, 1, 2]})
    assert (progress.best.loss, progress.best.step) == (2.0, 1)
    assert no_better(1, [p["step"] for p in progress.curve[1:]], 128) == 0
    assert progress.state()["best"] == (2.0, 1)
