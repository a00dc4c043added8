"""Norms and spectra: equal to a singular value decomposition, and copied to the host once."""

import dataclasses
from collections import Counter

import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.batches import eval_batches
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked.spectral import spectral_norm
from lorasweep.models import load as models
from lorasweep.models.targets import find_targets
from lorasweep.train.objectives.held_out import evaluate
from lorasweep.train.optim import AdamW
from tests.world import tiny_spec

TO_HOST = ("cpu", "item", "tolist", "numpy", "__float__", "__int__", "__bool__")


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(steps=2)
    return spec, models.load(spec.model, ["/nonexistent"]), data.load(spec.dataset, [])


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


def perturbed(pack, base):
    """The pack's Trainables, their tensors random and with gradients."""
    method = pack[0].method
    targets = find_targets(base.model, pack[0].model, method.target_layers())
    trainables = method.attach(
        base.model, targets, [s.method for s in pack], [s.seed for s in pack]
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainables.parameters().values():
            p.add_(torch.randn_like(p), alpha=0.1)
            p.grad = torch.randn_like(p)
    return trainables


def decomposed(matrix):
    return float(torch.linalg.svdvals(matrix.double())[0]), float(matrix.double().norm())


@pytest.mark.parametrize("ranks", [(4,), (2, 2, 8)])
def test_adapters_equal_a_decomposition(world, copies, ranks):
    spec, base, _ = world
    methods = [LoRA(rank=r, alpha=8 + k, scaling_by="sqrt_rank") for k, r in enumerate(ranks)]
    pack = [dataclasses.replace(spec, method=m) for m in methods]
    trainables = perturbed(pack, base)
    try:
        norms, after_norms = trainables.norms(), copies.total()
        spectra, after_spectra = trainables.spectra(), copies.total()
        squares, after_squares = AdamW.start(trainables, pack).grad_squares(), copies.total()
        assert (after_norms, after_spectra, after_squares) == (1, 2, 3), copies
        of_member = [{} for _ in pack]
        for name, p in trainables.parameters().items():
            short, members = trainables.part_of(name)
            for k, tensor, grad in zip(range(members.start, members.stop), p.detach(), p.grad):
                of_member[k][short] = tensor
                want = float(grad.double().square().sum())
                assert squares[k][short] == pytest.approx(want, rel=1e-12)
    finally:
        trainables.detach()
    for method, tensors, norm, spectrum in zip(methods, of_member, norms, spectra):
        total = 0.0
        assert len(spectrum) == len(tensors) / 2
        for name, found in spectrum.items():
            a, b = tensors[f"{name}.A"].double(), tensors[f"{name}.B"].double()
            largest, frobenius = decomposed(method.scaling * b @ a)
            want = {"a": decomposed(a)[0], "b": decomposed(b)[0], "delta": largest}
            assert found == pytest.approx(want, rel=1e-6), name
            total += frobenius**2
        assert norm["norm_delta"] == pytest.approx(total**0.5, rel=1e-6)


def test_full_fine_tuning_equals_a_decomposition(world, copies):
    spec, base, _ = world
    start = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    trainables = perturbed([dataclasses.replace(spec, method=FullFT())], base)
    try:
        (norm,), (spectrum,) = trainables.norms(), trainables.spectra()
        assert copies.total() == 2, copies
        deltas = {n: p.detach() - start[n] for n, p in trainables.parameters().items()}
    finally:
        trainables.detach()
    assert norm["norm_delta"] == pytest.approx(
        sum(decomposed(d[None] if d.dim() == 1 else d)[1] ** 2 for d in deltas.values()) ** 0.5,
        rel=1e-6,
    )
    for name, found in spectrum.items():
        want = decomposed(deltas[f"{name}.weight"])[0]
        assert found["delta"] == pytest.approx(want, rel=1e-6), name


def test_a_spectral_norm_where_digits_are_hard_to_keep(monkeypatch):
    """Two nearly equal largest values, a condition of 1e12, more rows than one block."""
    monkeypatch.setattr("lorasweep.methods.stacked.spectral.BLOCK", 16)
    left, right = (torch.linalg.qr(torch.randn(n, 30).double()).Q for n in (50, 40))
    values = torch.logspace(0, -12, 30, dtype=torch.float64)
    values[1] = 1 - 1e-9
    matrix = left @ values.diag() @ right.mT
    for m in (matrix, matrix.mT):
        assert float(spectral_norm(m)) == pytest.approx(1.0, rel=1e-12)
    assert float(spectral_norm(torch.zeros(3, 2))) == 0


def test_a_member_that_broke_down_does_not_take_the_others_spectra(world):
    spec, base, _ = world
    pack = [dataclasses.replace(spec, method=LoRA(rank=4), seed=k) for k in range(2)]
    trainables = perturbed(pack, base)
    try:
        alone = trainables.spectra()[1]
        with torch.no_grad():
            for p in trainables.parameters().values():
                p[0] = torch.nan
        broken, well = trainables.spectra()
    finally:
        trainables.detach()
    assert well == alone
    assert all(value != value for norms in broken.values() for value in norms.values())


def test_an_update_and_an_evaluation_copy_no_more_with_more_batches(world, copies):
    """Losses are summed on the device: copies do not grow with micro-batches or held-out batches."""
    spec, base, rows = world
    counts = []
    for micro in (4, 1):
        for event in finetune([spec], base, rows, micro_batch_size=micro):
            if event.step == 1:
                copies.clear()
        counts.append(copies.total() - copies["__bool__"])  # of the hand-written CPU passes
    assert counts[0] == counts[1] > 0
    few, many = eval_batches(rows.test, 10**6), eval_batches(rows.test, 64)
    assert len(many) > len(few) == 1
    for batches in (few, many):
        copies.clear()
        evaluate(base.model, [batches], "fp32")
        assert copies["tolist"] == 1 and copies["cpu"] == copies["item"] == 0
