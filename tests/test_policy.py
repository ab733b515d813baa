"""csrc/policy.h and kernels/policy.py against the same in PyTorch: features of groups, what the update takes of their scales.

test_triton_interpreter.py runs this with TRITON_INTERPRET=1, and so the Triton kernels on the CPU.
"""

import os
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from metaadamw_fast import FeatureConfig, ops, reference
from metaadamw_fast.features import VERSIONS, FeatureTable, feature_table
from metaadamw_fast.grouping import Member

from . import emulated
from .cases import same_bits
from .models import noise

F32, F64 = torch.float32, torch.float64

EMULATED, INTERPRETED = emulated.use(), os.environ.get("TRITON_INTERPRET") == "1"


def place(backend, device):
    """A backend on a device, skipped where it cannot run."""
    reason = ops._unavailable(backend, torch.device(device))
    marks = [pytest.mark.skipif(bool(reason), reason=str(reason)), *([pytest.mark.gpu] if device == "cuda" else [])]
    return pytest.param((backend, device), marks=marks, id=f"{backend}, {device}")


PLACES = [("cpp", "cpu"), ("cpp", "cuda"), ("triton", "cuda")]
PLACES = [("emulated", "cpu")] if EMULATED else [("triton", "cpu")] if INTERPRETED else PLACES


@pytest.fixture(params=[place(*x) for x in PLACES])
def run(request):
    """Calls an op of a backend on copies of its arguments on the device; the results are on the CPU."""
    backend, device = request.param

    def there(x, device):
        if isinstance(x, FeatureTable):
            return replace(x, **{f.name: there(getattr(x, f.name), device) for f in fields(x)})
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def call(op, *arguments):
        found = getattr(ops.resolve_backend(backend, torch.device(device)), op)(*(there(x, device) for x in arguments))
        return [there(x, "cpu") for x in found] if isinstance(found, (list, tuple)) else there(found, "cpu")

    return call


def table_of(config, group_ids, like, *, heads=1):
    """Tensors of 0, 1, 2, ... elements; every third is a bias, layers go up to 3."""
    members = []
    for t in range(len(group_ids)):
        param = nn.Parameter(torch.zeros((t,) if t % 3 == 0 else (1, t)))
        members.append(Member(param, f"layers.{t % 4}.x" if t % 5 else None, 0, "linear"))
    return feature_table(members, group_ids, max(group_ids) + 1, config, config.width(heads), like)


def statistics_of(tensors, config, dtype, seed=0):
    """Sums as tensors of up to `tensors` elements may have: Σgm between -Σ and Σ, fewer non-zeros than elements."""
    rows = noise((tensors, 7), seed, F64).abs() * 10.0 ** noise((tensors, 1), seed + 1, F64)
    rows[:, 1] = noise((tensors,), seed + 2, F64) * (rows[:, 0] * rows[:, 2]).sqrt()
    sizes = torch.arange(tensors, dtype=F64)[:, None]
    rows[:, 5:] = (sizes * torch.rand(tensors, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))).floor()
    rows[0] = 0.0  # no elements
    return rows[:, : 7 if config.enhanced else 5].to(dtype).contiguous()


# Float32 norms, cosines and deviations, each rounded a few times; means of up to 40 of them added up in float32 by the reference.
ROUNDINGS = 50


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("v_norm", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("total_steps", [None, 80])
def test_features_are_those_of_the_reference(run, version, v_norm, dtype, total_steps):
    config = FeatureConfig(version, v_norm=v_norm, time_step=version != "basic_plus")
    group_ids = [t % 7 % 5 for t in range(40)]
    statistics = statistics_of(40, config, dtype)
    table, done = table_of(config, group_ids, statistics, heads=4), torch.tensor(6.0)
    found = run("group_features", statistics, table, done, 1, total_steps)
    wide = statistics.double()
    expected = reference.group_features(wide, table_of(config, group_ids, wide, heads=4), done, 1, total_steps)
    assert found.dtype == dtype
    # Deviations are small differences of large numbers: their error is that of the values that they are of.
    scale = wide.sqrt().nan_to_num().amax() if version.endswith("plus") else expected.abs().amax(0)
    if config.enhanced:  # means and variances of two norms, two sparsities, then constants, t and padding
        squares = wide[:, [0, 0, 2, 2]].amax(0)
        scale[:4] = torch.stack([squares[0].sqrt(), squares[1], squares[2].sqrt(), squares[3]])
    assert ((found.double() - expected).abs() <= ROUNDINGS * torch.finfo(dtype).eps * scale).all()
    assert not found[:, config.statistic_columns + config.time_step :].any()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_only_the_group_of_a_bad_sum_has_bad_features(run, version, bad):
    """-1 stands where lagged mode has no statistics yet."""
    config = FeatureConfig(version)
    group_ids = [0, 1, 2, 1, 0, 2]
    statistics = statistics_of(6, config, F32)
    table, done = table_of(config, group_ids, statistics), torch.tensor(0.0)
    good = run("group_features", statistics, table, done, 1, None)
    for column in (0, 2):
        spoiled = statistics.clone()
        spoiled[3, column] = bad
        found = run("group_features", spoiled, table, done, 1, None)
        assert torch.equal(found[[0, 2]], good[[0, 2]])
        assert not found[1].isfinite().all()
        assert good.isfinite().all()


def test_a_cosine_has_floors_under_its_norms(run):
    statistics = torch.tensor([[0.0, 0.0, 4.0, 1.0, 1.0], [1e-20, 3e-17, 9.0, 1.0, 1.0]])
    config = FeatureConfig()
    found = run("group_features", statistics, table_of(config, [0, 1], statistics), torch.tensor(0.0), 1, 2)
    assert found[0, 3] == 0
    torch.testing.assert_close(found[1, 3], torch.tensor(3e-17 / (1e-8 * 3)))
    assert found[:, 5].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e9, float("inf")])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("spoil", [None, float("nan"), float("inf")])
def test_gradients_are_scaled_as_in_the_reference(run, dtype, max_norm, loss_scale, maximize, spoil):
    statistics = statistics_of(40, FeatureConfig("enhanced"), dtype)
    if spoil is not None:
        statistics[7, 0] = spoil
    sign = torch.where(torch.arange(40) % 2 == 0, -1.0, 1.0).double() if maximize else None
    arguments = (statistics, sign, None if loss_scale is None else torch.tensor(loss_scale), max_norm)
    found, expected = run("scaled_gradients", *arguments), reference.scaled_gradients(*arguments)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        # The reference adds up 40 squares in the dtype of the statistics, and rounds the norm once.
        torch.testing.assert_close(x, y, rtol=50 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    assert torch.equal(found[2][:, 2:], statistics[:, 2:])


def test_a_sum_of_squares_that_overflows_clips_to_nothing_as_in_torch(run):
    """Each of the four sums is finite."""
    grads = [torch.full((4,), 7e18) for _ in range(4)]
    statistics = torch.zeros(4, 5)
    statistics[:, 0] = torch.stack([g.square().sum() for g in grads])
    arguments = (statistics, None, None, 1.0)
    for found in (run("scaled_gradients", *arguments), reference.scaled_gradients(*arguments)):
        assert torch.equal(found[0], torch.zeros(4, dtype=F64))
        assert found[1] == float("inf") == nn.utils.get_total_norm(grads)


def modulation_arguments(tensors=30, groups=6, dtype=F32, grad_scale=True):
    scales = 1 + 0.4 * noise((4, groups), 1, dtype).clamp(-1, 1)
    group_of = torch.arange(tensors) % groups
    lr, weight_decay = noise((tensors,), 2, F64).abs(), noise((tensors,), 3, F64).abs()
    beta1, beta2, eps = ((torch.arange(tensors) % 3 * x + y).double() for x, y in ((0.1, 0.7), (0.01, 0.9), (1e-8, 1e-8)))
    scale = noise((tensors,), 4, F64) if grad_scale else None
    return [scales, group_of, lr, weight_decay, beta1, beta2, eps, scale, (torch.arange(tensors) // 4 * 7.0) % 100]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("go", [None, torch.tensor(True), torch.tensor(False)])
@pytest.mark.parametrize("grad_scale", [False, True])
def test_modulation_has_the_bits_of_the_reference(run, dtype, transposed, go, grad_scale):
    arguments = modulation_arguments(dtype=dtype, grad_scale=grad_scale)
    if transposed:
        arguments[0] = arguments[0].t().contiguous().t()
    found, plain = run("modulation", *arguments, go, False), reference.modulation(*arguments, go, False)
    assert same_bits(found, run("update_vectors", *plain.unbind()))
    assert torch.equal(plain[2], torch.zeros(30, dtype=F64) if go is not None and not go else arguments[-1].double() + 1)


def test_modulation_of_the_released_code(run):
    """β1^k by repeated squaring and by torch's power: a rounding for each squaring."""
    arguments = modulation_arguments()
    found, plain = run("modulation", *arguments, None, True), reference.modulation(*arguments, None, True)
    torch.testing.assert_close(found, run("update_vectors", *plain.unbind()), rtol=1e-13, atol=0)


def test_vectors_of_an_update(run):
    """[8, T]: step size over 1 - β1^k, decay factor, k, β1, β2, 1/√(1 - β2^k), eps, gradient scale."""
    step_size, decay_factor, eps = (noise((300,), seed, F64) for seed in (1, 2, 3))
    step = (torch.arange(300) // 3).double()
    beta1, beta2 = (torch.arange(300) % 7 / 7).double(), (torch.arange(300) % 11 / 11).double()
    for scale in (None, noise((300,), 4, F64)):
        found = run("update_vectors", step_size, decay_factor, step, beta1, beta2, eps, scale)
        want = [step_size / (1 - beta1**step), decay_factor, step, beta1, beta2, (1 - beta2**step).rsqrt(), eps]
        want.append(torch.ones(300, dtype=F64) if scale is None else scale)
        torch.testing.assert_close(found, torch.stack(want), rtol=1e-13, atol=0, equal_nan=True)


def test_arguments_that_do_not_fit_are_refused(run):
    config = FeatureConfig()
    statistics = statistics_of(6, config, F32)
    table, done = table_of(config, [0, 1, 2, 1, 0, 2], statistics), torch.tensor(0.0)
    for wrong in (statistics[:, :4], statistics[:5], statistics.half(), statistics.double()):
        with pytest.raises(RuntimeError, match=r"statistics|elements"):
            run("group_features", wrong, table, done, 1, None)
    arguments = modulation_arguments()
    changes = {0: lambda x: x[:2], 1: torch.Tensor.int, 2: lambda x: x[1:], 7: lambda x: x[1:], 8: torch.Tensor.half}
    for position, change in changes.items():
        wrong = change(arguments[position])
        with pytest.raises(RuntimeError, match=r"scales|elements|contiguous"):
            run("modulation", *arguments[:position], wrong, *arguments[position + 1 :], None, False)


def test_more_tensors_than_a_block_of_a_gpu_has_threads(run):
    """Every thread takes several, and the last ones take one more than the others."""
    tensors, config = 700, FeatureConfig("basic_plus", v_norm=True, time_step=False)
    group_ids = [0] * 600 + [1 + t % 3 for t in range(100)]
    statistics = statistics_of(tensors, config, F64)
    table, done = table_of(config, group_ids, statistics), torch.tensor(6.0)
    found = run("group_features", statistics, table, done, 1, None)
    expected = reference.group_features(statistics, table, done, 1, None)
    # As above; means of 600 are added up in another order.
    assert ((found - expected).abs() <= 600 * torch.finfo(F64).eps * statistics.sqrt().nan_to_num().amax()).all()

    found = run("scaled_gradients", statistics, None, None, 0.1)
    for x, y in zip(found, reference.scaled_gradients(statistics, None, None, 0.1), strict=True):
        torch.testing.assert_close(x, y, rtol=tensors * torch.finfo(F64).eps, atol=0)

    arguments = modulation_arguments(tensors)
    found, plain = run("modulation", *arguments, None, False), reference.modulation(*arguments, None, False)
    assert same_bits(found, run("update_vectors", *plain.unbind()))
