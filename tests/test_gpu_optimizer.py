"""The whole optimizer on the device that is there, against the C++ backend on the CPU: all backends of a GPU, else `reference`.

With CUDA_ON_CPU (test_cuda_emulated.py) the CUDA kernels on the CPU; with TRITON_INTERPRET=1 (test_triton_interpreter.py) the
Triton ones.
"""

import copy
import os
import pickle

import pytest
import torch
from torch import nn

from metaadamw_fast import MetaAdamW, ops

from . import emulated
from .models import noise, one_thread, relative  # noqa: F401

pytestmark = pytest.mark.gpu
EMULATED, INTERPRETED = emulated.use(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not EMULATED else "cpu")
BACKENDS = ["cpp", "triton", "reference"] if DEVICE.type == "cuda" else ["reference"]
BACKENDS = ["emulated"] if EMULATED else ["triton"] if INTERPRETED else BACKENDS
OPTIONS = {
    "plain": {},
    "amsgrad, clipping": {"amsgrad": True, "max_grad_norm": 0.5},
    "lagged": {"statistics": "lagged"},
    "maximize, enhanced": {"maximize": True, "features": "enhanced"},
    "released": {"variant": "released"},
    "masters": {"master_weights": True, "state_dtype": torch.float32},
}


def trained(device, backend, dtype, options, steps=20):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 40), nn.Linear(40, 3)).to(dtype)
    model = model.to(device)
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, backend=backend, head_init="xavier", **options)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = None if (step + i) % 7 == 6 else noise(p.shape, 100 * step + i, dtype).to(device)
        opt.step()
    tensors = [x for p in model.parameters() for x in (p, *opt.state[p].values())]
    return [x.detach().cpu() for x in (*tensors, opt.lr_scale, opt.wd_scale, opt.grad_norm)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps(backend, options, dtype):
    """What differs is the order of the sums, hence the last bits of the scales, and how those grow in 20 steps."""
    reason = ops._unavailable(backend, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    low = dtype == torch.bfloat16 and "master" not in options
    bound = 3e-2 if low else 1e-4  # a last bit of bfloat16 is 4e-3, and a float32 sum that differs moves some of them
    ours, want = (trained(device, name, dtype, OPTIONS[options]) for device, name in ((DEVICE, backend), ("cpu", "cpp")))
    for x, y in zip(ours, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y) or relative(x, y) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_pickles(backend):
    p = nn.Parameter(torch.ones(5, device=DEVICE))
    opt = MetaAdamW([p], backend=backend)
    p.grad = torch.ones_like(p)
    opt.step()
    for copied in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        (q,) = copied.param_groups[0]["params"]
        q.grad = torch.ones_like(q)
        copied.step()
        assert copied.steps_done == copied.state[q]["step"] == 2
        assert torch.equal(p, q)


@pytest.mark.skipif(DEVICE.type == "cpu" and not EMULATED, reason="the op is one of the CUDA kernels'")
def test_no_capture_has_the_number_zero():
    launch = ops.resolve_backend("emulated" if EMULATED else "cpp", DEVICE).launch
    assert launch.namespace.launch_capture.default(torch.zeros(1, device=DEVICE)) == 0


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
def test_tensors_on_two_devices_are_refused():
    a, b = nn.Parameter(torch.ones(3, device="cuda")), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="all parameters on one device"):
        MetaAdamW([a, b])
    lists = [[x.detach()] for x in (a, a, b, a)]
    with pytest.raises(RuntimeError, match="another device"):
        ops.tensor_stats(*lists)
    opt = MetaAdamW([a])
    a.grad = torch.ones_like(a)
    opt.step()
    before = a.detach().clone()
    with pytest.raises(RuntimeError, match="another device"):
        opt._current_states().set_gradients([torch.ones(3)])
    assert torch.equal(a, before)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
def test_a_model_moved_after_the_optimizer_was_built():
    model = nn.Linear(4, 3)
    opt = MetaAdamW(model.parameters(), lr=0.1)
    model.cuda()
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    assert all(x.device.type == "cuda" for state in opt.state.values() for x in state.values())


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"statistics": "lagged"}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_on_another_stream(backend, options):
    """Every tensor that the optimizer keeps is on the GPU by then: torch takes no stream for one of the CPU's."""
    p = nn.Parameter(torch.ones(5, device="cuda"))
    opt = MetaAdamW([p], lr=0.1, backend=backend, **options)
    with torch.cuda.stream(torch.cuda.Stream()):
        p.grad = torch.ones_like(p)
        opt.step()
    torch.cuda.synchronize()
    assert opt.steps_done == 1
    assert p[0].item() == pytest.approx(0.899, abs=1e-5)
