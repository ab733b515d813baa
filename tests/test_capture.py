"""The step in a CUDA graph: recorded and replayed on the CPU, and on a GPU where there is one.

What a graph does to a step is memory: the operations of the capture run again on the same addresses, and no line of Python does.
`Recording` does just that with the operations that torch dispatches, so what the step keeps in Python shows without a GPU.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaadamw_fast.core import devices

from .cases import same_bits
from .optimizers import AVGRAD, MADA_, META, every, spec_of

aten = torch.ops.aten
ALLOCATES = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
KEPT = {torch.ops.metaadamw_fast.launch_set_gradients}  # fills the table, which a capture copies as it is then
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero}
FROM_HOST = {aten.lift_fresh, aten.lift_fresh_copy}  # torch.tensor([...]): memory that is gone at replay


class Recording(TorchDispatchMode):
    """What is dispatched inside, to be done again by :meth:`replay`. Waiting for a value is an error, as in a capture.

    As in a capture, nothing has happened at the end: what was written is put back, and what was made is filled with NaN.

    Args:
        written: tensors that operations write without naming them: through the addresses in a launch table.
    """

    def __init__(self, written):
        super().__init__()
        self.calls = []
        self._before = [(x, x.detach().clone()) for x in written]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func.overloadpacket not in WAITS, f"{func} waits for the device"
        assert func.overloadpacket not in FROM_HOST, f"{func} takes numbers from the host"
        named = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
        written = [named[x.name] for x in func._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
        targets = [x for xs in written for x in (xs if isinstance(xs, (list, tuple)) else [xs])]  # of foreach and fused operations
        self._before += [(x, x.clone()) for x in targets if isinstance(x, torch.Tensor) and func.overloadpacket not in KEPT]
        out = func(*args, **kwargs)
        if func.overloadpacket not in ALLOCATES | KEPT and not func.is_view and func.namespace != "profiler":
            self.calls.append((func, args, kwargs, tensors_in(out)))
        return out

    def __exit__(self, *exception):
        super().__exit__(*exception)
        with torch.no_grad():
            for _, _, _, made in self.calls:
                for x in made:
                    x.fill_(float("nan") if x.is_floating_point() else True)
            for x, old in reversed(self._before):
                x.data.copy_(old)

    def replay(self):
        """The same operations on the same memory."""
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                for old, new in zip(made, tensors_in(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():  # not what the operation writes in place
                        old.copy_(new)


def tensors_in(out):
    return [x for x in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(x, torch.Tensor)]


OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "lagged": {"statistics": "lagged"},
    "lagged and clipped": {"statistics": "lagged", "max_grad_norm": 0.5},
    "amsgrad, maximize": {"amsgrad": True, "maximize": True},
    "enhanced": {"features": "enhanced"},
    "known length": {"total_steps": 50},
    "released": {"variant": "released"},
    "AVGrad": {"spec": AVGRAD},
    "AVGrad, clipped": {"spec": AVGRAD, "max_grad_norm": 0.5, "maximize": True},
    "AVGrad, skipping": {"spec": AVGRAD, "skip_nonfinite": True},
    "MADA": {"spec": MADA_},
    "MADA, clipped": {"spec": MADA_, "max_grad_norm": 0.5, "maximize": True},
    "MADA, lagged": {"spec": MADA_, "statistics": "lagged"},
    "MADA, lagged, skipping": {"spec": MADA_, "statistics": "lagged", "skip_nonfinite": True},
    "MADA, released": {"spec": MADA_, "variant": "released", "scope": "per_group"},
}


def build(device="cpu", spec=META, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(device)
    model[1].bias.requires_grad_(False)  # no gradient at any time
    lr, decay = torch.tensor(0.1, device=device), torch.tensor(0.2, device=device)
    groups = [{"params": list(model[0].named_parameters())}, {"params": list(model[1:].named_parameters()), "lr": 0.03}]
    options = {"model": model, **options} if spec.encodes else options
    opt = spec(groups, lr=lr, weight_decay=decay, capturable=device == "cuda", **options)
    return model, opt, lr, decay


def put_gradients(model, step):
    """New numbers in the gradients that are there."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.requires_grad:
            g = torch.randn(p.shape, generator=generator).to(p)
            p.grad = g if p.grad is None else p.grad.copy_(g)


def state_of(model, opt):
    """All numbers of a model and its optimizer, copied."""
    opt.state_dict()  # which names those states that change their roles: a replay does not
    states = [copy.deepcopy(dict(opt.state[p])) for p in model.parameters()]
    shown = (*spec_of(opt).shown, "steps_done")
    return [p.detach().clone() for p in model.parameters()], states, {name: copy.deepcopy(getattr(opt, name)) for name in shown}


def assert_equal(x, y, what=""):
    if isinstance(x, dict):
        assert x.keys() == y.keys()
        x, y = list(x.items()), list(y.items())
    if isinstance(x, (list, tuple)):
        assert len(x) == len(y)
        for i, pair in enumerate(zip(x, y, strict=True)):
            assert_equal(*pair, f"{what}[{i}]")
    else:
        assert same_bits(x, y) if isinstance(x, torch.Tensor) else x == y, (what, x, y)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors of the CPU are taken for ones that the host must not read; the value set tells whether a capture is under way."""
    under_way = []
    monkeypatch.setattr(devices, "readable", lambda x: False)
    monkeypatch.setattr(devices, "capturing", lambda device: bool(under_way))
    return under_way


def recorded_step(model, opt, as_on_a_gpu):
    """A step as a graph has it."""
    as_on_a_gpu.append(True)
    with Recording([*model.parameters(), *(x for p in model.parameters() for x in opt.state[p].values())]) as recording:
        opt.step()
    as_on_a_gpu.clear()
    return recording


def allow(opt):
    for group in opt.param_groups:
        group["capturable"] = True  # the constructor wants a CUDA device


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_recorded_step_does_what_steps_do(name, backend, as_on_a_gpu):
    """With other gradients, learning rates and weight decays at each replay, and steps of the usual kind between them."""
    eager, recorded = (build(backend=backend, **OPTIONS[name]) for _ in range(2))
    allow(eager[1])
    allow(recorded[1])
    recording = None
    for step in range(12):
        for model, opt, lr, decay in (eager, recorded):
            put_gradients(model, step)
            lr.fill_(0.1 / (step + 1))
            decay.fill_(0.2 + step)
            if step in (5, 10):
                with torch.no_grad():
                    model[0].weight.mul_(0.5)  # as an EMA swap or weight clipping would
            if opt is eager[1] or step < 2 or step == 7:
                opt.step()
                continue
            if recording is None:
                recording = recorded_step(model, opt, as_on_a_gpu)
            recording.replay()
        assert_equal(state_of(*recorded[:2]), state_of(*eager[:2]), f"step {step}")


@every
def test_numbers_that_change_before_the_capture_are_captured_as_they_are_then(as_on_a_gpu, spec):
    """And a step outside of the graph sees neither them nor what the capture made of them."""
    eager, recorded = (build(spec=spec) for _ in range(2))
    recording = None
    for step in range(6):
        for model, opt, *_ in (eager, recorded):
            allow(opt)
            opt.param_groups[1]["betas"] = (0.9, 0.999) if step in (0, 5) else (0.5, 0.9)
            opt.param_groups[1]["lr"] = 0.03 if step in (0, 5) else 0.01
            put_gradients(model, step)
            if opt is eager[1] or step in (0, 4, 5):  # 4: as in the graph; 5: as before it
                opt.step()
                continue
            if recording is None:
                recording = recorded_step(model, opt, as_on_a_gpu)
                opt.step()  # before the first replay: nothing of the capture has been carried out yet
                continue
            recording.replay()
        assert_equal(state_of(*recorded[:2]), state_of(*eager[:2]), f"step {step}")


def test_gradients_that_change_roles_do_so_at_every_replay(as_on_a_gpu):
    """Of each tensor by its own count: one is left out of steps between the seven replays.

    By the reference: a graph on a GPU has a table of its own, on the CPU C++ has one for all.
    """
    eager, recorded = (build(spec=MADA_, backend="reference") for _ in range(2))
    recording = None
    for step in range(13):
        for model, opt, *_ in (eager, recorded):
            allow(opt)
            put_gradients(model, step)
            kept = model[2].weight.grad
            if step in (3, 6, 7, 10):
                model[2].weight.grad = None
            if opt is eager[1] or step in (0, 1, 3, 6, 7, 10):
                opt.step()
                model[2].weight.grad = kept
                continue
            if recording is None:
                recording = recorded_step(model, opt, as_on_a_gpu)
            recording.replay()
        if step % 2:
            assert_equal(state_of(*recorded[:2]), state_of(*eager[:2]), f"step {step}")
    assert_equal(state_of(*recorded[:2]), state_of(*eager[:2]))


# ------------------------------------------------------------------------------------------------------------------ refusals


def without_a_gradient(model, opt):
    model[2].bias.grad = None


def not_capturable(model, opt):
    opt.param_groups[1]["capturable"] = False


def other_data(model, opt):
    model[0].weight.data = model[0].weight.data.clone()


def loaded(model, opt):
    opt.load_state_dict(opt.state_dict())


REFUSED = {
    without_a_gradient: r"parameter 2\.bias has no gradient",
    not_capturable: "needs capturable=True in all param groups",
    other_data: "take a step before one is captured",
    loaded: "take a step before one is captured",
}


@every
@pytest.mark.parametrize("spoil", REFUSED)
def test_what_a_graph_cannot_repeat_is_refused_at_capture(spoil, as_on_a_gpu, spec):
    model, opt, *_ = build(spec=spec)
    allow(opt)
    put_gradients(model, 0)
    opt.step()
    spoil(model, opt)
    before = state_of(model, opt)
    as_on_a_gpu.append(True)
    with pytest.raises(RuntimeError, match=REFUSED[spoil]):
        opt.step()
    as_on_a_gpu.clear()
    assert_equal(state_of(model, opt), before)


@every
def test_the_first_step_cannot_be_captured(as_on_a_gpu, spec):
    model, opt, *_ = build(spec=spec)
    allow(opt)
    put_gradients(model, 0)
    as_on_a_gpu.append(True)
    with pytest.raises(RuntimeError, match="take a step before one is captured"):
        opt.step()


@every
def test_capturable_needs_a_gpu(spec):
    with pytest.raises(ValueError, match="capturable=True needs parameters on a CUDA device"):
        spec.kind([nn.Parameter(torch.ones(2))], capturable=True)


# ------------------------------------------------------------------------------------------------------------------ on a GPU

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_graph_does_what_steps_do(name, backend):
    eager, captured = (build("cuda", backend=backend, **OPTIONS[name]) for _ in range(2))
    graph = None
    for step in range(12):
        for model, opt, lr, decay in (eager, captured):
            put_gradients(model, step)
            lr.fill_(0.1 / (step + 1))
            decay.fill_(0.2 + step)
            if step in (5, 10):
                with torch.no_grad():
                    model[0].weight.mul_(0.5)  # as an EMA swap or weight clipping would
            if opt is eager[1] or step < 2 or step == 7:
                opt.step()
                continue
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    opt.step()
            graph.replay()
        torch.cuda.synchronize()
        assert_equal(state_of(*captured[:2]), state_of(*eager[:2]), f"step {step}")


@every
@pytest.mark.gpu
@ON_A_GPU
def test_a_whole_training_step_in_a_graph(spec):
    """Gradients in the graph's own memory, and ones elsewhere in steps between the replays."""
    results = []
    for captures in (False, True):
        model, opt, *_ = build("cuda", spec)
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).cuda()

        def train(model=model, opt=opt, x=x):
            opt.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            opt.step()

        graph = None
        for step in range(10):
            x.fill_(step / 10)
            if not captures or step < 3 or step == 6:
                train()
                continue
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    train()
            graph.replay()
        torch.cuda.synchronize()
        results.append(state_of(model, opt))
    assert_equal(*results)


@every
@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_no_step_waits_for_the_device(backend, spec):
    model, opt, *_ = build("cuda", spec, backend=backend, max_grad_norm=1.0)
    for step in range(4):
        put_gradients(model, step)
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            opt.param_groups[1]["lr"] = 0.1 / (step + 1)
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert opt.steps_done == 4


@every
@pytest.mark.gpu
@ON_A_GPU
def test_a_capture_without_capturable_is_refused(spec):
    model, opt, *_ = build("cuda", spec)
    opt.param_groups[0]["capturable"] = False
    put_gradients(model, 0)
    opt.step()
    with pytest.raises(RuntimeError, match="needs capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
