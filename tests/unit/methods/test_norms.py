"""Norms and spectra: equal to a singular value decomposition, and copied to the host once."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch

from lorasweep.data.batches import eval_batches
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked.adapters import spectral_norm
from lorasweep.train.objectives.nll import evaluate
from lorasweep.train.optim import AdamW
from tests.training import pack_of, small_world, state_of

TO_HOST = ("cpu", "item", "tolist", "numpy", "__float__", "__int__", "__bool__")


@pytest.fixture(scope="module")
def world():
    return small_world(steps=2, precision="fp32")


@pytest.fixture
def copies(monkeypatch):
    """Count what brings a tensor's values to the host."""
    counts = Counter()

    def counted(name, old):
        def method(self, *args):
            counts[name] += 1
            return old(self, *args)

        return method

    for name in TO_HOST:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return counts


def perturbed(world, methods):
    """A pack with random tensors and gradients, on a copy of the base."""
    model = copy.deepcopy(world[1].model)
    trainables = pack_of(methods, model, world[0].model, perturb=0.1)
    for p in trainables.parameters().values():
        p.grad = torch.randn_like(p)
    return trainables


def decomposed(matrix):
    return float(torch.linalg.svdvals(matrix.double())[0]), float(matrix.double().norm())


@pytest.mark.parametrize("ranks", [(4,), (2, 2, 8)])
def test_adapters_equal_a_decomposition(world, copies, ranks):
    methods = [LoRA(rank=r, alpha=8 + k, scaling_by="sqrt_rank") for k, r in enumerate(ranks)]
    trainables = perturbed(world, methods)
    pack = [dataclasses.replace(world[0], method=m) for m in methods]
    norms, after_norms = trainables.norms(), copies.total()
    spectra, after_spectra = trainables.spectra(), copies.total()
    squares, after_squares = AdamW(trainables, pack).grad_squares(), copies.total()
    assert (after_norms, after_spectra, after_squares) == (1, 2, 3), copies
    for name, p in trainables.parameters().items():
        short, runs = trainables.part_of(name)
        for k, grad in zip(range(runs.start, runs.stop), p.grad):
            want = float(grad.double().square().sum())
            assert squares[k][short] == pytest.approx(want, rel=1e-12)
    for k, method in enumerate(methods):
        tensors, total = state_of(trainables, k), 0.0
        assert len(spectra[k]) == len(tensors) / 2
        for name, found in spectra[k].items():
            a, b = tensors[f"{name}.A"].double(), tensors[f"{name}.B"].double()
            largest, frobenius = decomposed(method.scaling * b @ a)
            want = {"a": decomposed(a)[0], "b": decomposed(b)[0], "delta": largest}
            assert found == pytest.approx(want, rel=1e-6), name
            total += frobenius**2
        assert norms[k]["norm_delta"] == pytest.approx(total**0.5, rel=1e-6)


def test_full_fine_tuning_equals_a_decomposition(world, copies):
    start = {n: p.detach().clone() for n, p in world[1].model.named_parameters()}
    trainables = perturbed(world, [FullFT()])
    (norm,), (spectrum,) = trainables.norms(), trainables.spectra()
    assert copies.total() == 2, copies
    deltas = {n: p.detach() - start[n] for n, p in trainables.parameters().items()}
    total = sum(float(d.double().square().sum()) for d in deltas.values())
    assert norm["norm_delta"] == pytest.approx(total**0.5, rel=1e-6)
    for name, found in spectrum.items():
        want = decomposed(deltas[f"{name}.weight"])[0]
        assert found["delta"] == pytest.approx(want, rel=1e-6), name


def test_a_spectral_norm_where_digits_are_hard_to_keep(monkeypatch):
    """Two nearly equal largest values, a condition of 1e12, more rows than one block."""
    monkeypatch.setattr("lorasweep.methods.stacked.adapters.BLOCK", 16)
    left, right = (torch.linalg.qr(torch.randn(n, 30).double()).Q for n in (50, 40))
    values = torch.logspace(0, -12, 30, dtype=torch.float64)
    values[1] = 1 - 1e-9
    matrix = left @ values.diag() @ right.mT
    for m in (matrix, matrix.mT):
        assert float(spectral_norm(m)) == pytest.approx(1.0, rel=1e-12)
    assert float(spectral_norm(torch.zeros(3, 2))) == 0


def test_a_run_that_broke_down_leaves_the_spectra_of_others(world):
    trainables = perturbed(world, [LoRA(rank=4)] * 2)
    alone = trainables.spectra()[1]
    with torch.no_grad():
        for p in trainables.parameters().values():
            p[0] = torch.nan
    broken, well = trainables.spectra()
    assert well == alone
    assert all(value != value for norms in broken.values() for value in norms.values())


def test_an_update_and_an_evaluation_copy_no_more_with_more_batches(world, copies):
    spec, base, rows = world
    counts = []
    for micro in (4, 1):
        for event in finetune([spec], base, rows, micro_batch_size=micro):
            if event.step == 1:
                copies.clear()
        counts.append(copies.total() - copies["__bool__"])  # of transformers' choice of a mask
    assert counts[0] == counts[1] > 0
    few, many = eval_batches(rows.test, 10**6), eval_batches(rows.test, 64)
    assert len(many) > len(few) == 1
    for batches in (few, many):
        copies.clear()
        evaluate(base.model, [batches], "fp32")
        assert copies["tolist"] == 1 and copies["cpu"] == copies["item"] == 0
