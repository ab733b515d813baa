"""encoder_graph=True: the same bits as operation by operation, whatever changes between two steps; and how many operations.

On the CPU a graph is a `Recording` (test_capture.py): the operations of the capture run again on the same memory, without Python.
"""

import copy
import logging
import pickle
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench.predictions import BETWEEN
from metaadamw_fast import FeatureConfig, GroupEncoder, MetaAdamW, MetaLearner, OnlineLearner, encoder_graph
from metaadamw_fast.core import devices

from . import ranks
from .models import noise, one_thread, randomise  # noqa: F401
from .test_capture import ON_A_GPU, Recording, assert_equal

aten = torch.ops.aten
STEPS = 30


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(noise(p.shape, i))

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def loss_fn(model, x):
    return model(x).square().mean()


class Run:
    """A model, its optimizer and its meta-learner."""

    def __init__(self, graph, device="cpu", **options):
        self.model = Net().to(device)
        named = list(self.model.named_parameters())
        groups = [{"params": named[:2]}, {"params": named[2:], "lr": 0.003}]
        options = {"lr": 0.01, "weight_decay": 0.1, "head_init": "xavier", "model": self.model, **options}
        self.opt = MetaAdamW(groups, encoder_graph=graph, **options)
        randomise(self.opt.encoder.cpu())
        self.opt.encoder.to(device)
        self.meta = MetaLearner(self.opt, self.model, loss_fn, lr=0.05)

    def put_gradients(self, step):
        for i, p in enumerate(p for group in self.opt.param_groups for p in group["params"]):
            p.grad = noise(p.shape, 100 * step + i).to(p)

    def update_encoder(self, step):
        device = self.opt.lr_scale.device
        self.meta.update(*(noise((4, 5), 1000 * step + i).to(device) for i in range(3)))

    def state(self):
        """All numbers, copied."""
        params = [p for group in self.opt.param_groups for p in group["params"]]
        shown = ("lr_scale", "wd_scale", "flatness_weight", "alignment_weight", "features", "statistics", "grad_norm")
        numbers = [params, [dict(self.opt.state[p]) for p in params], [getattr(self.opt, name) for name in shown]]
        numbers += [self.opt.steps_done, self.opt.skipped_steps, list(self.opt.encoder.parameters())]
        return copy.deepcopy(numbers)


@pytest.fixture
def captures(monkeypatch):
    """Graphs are recordings, and tensors of the CPU are taken for ones that the host must not read. The captures so far."""
    made, under_way = [], []
    monkeypatch.setattr(devices, "readable", lambda x: False)
    monkeypatch.setattr(devices, "capturing", lambda device: bool(under_way))
    monkeypatch.setattr(encoder_graph, "can_capture", lambda device: True)

    def capture(run, device):
        under_way.append(True)
        with Recording([]) as recording:
            result = run()
        under_way.clear()
        made.append(recording)
        return recording, result

    monkeypatch.setattr(encoder_graph, "capture", capture)
    return made


def compare(events, steps=STEPS, every=7, **options):
    """Takes steps with and without the graph; ``events[step]`` changes something before a step."""
    both = [Run(graph, **options) for graph in (False, True)]
    for step in range(steps):
        for run in both:
            for event in events.get(step, ()):
                event(run)
            run.put_gradients(step)
            run.opt.step()
            if step % every == every - 1:
                run.update_encoder(step)
        assert_equal(both[1].state(), both[0].state(), f"step {step}")
    return both


OPTIONS = {
    "plain": {},
    "reference": {"backend": "reference"},
    "clipped": {"max_grad_norm": 0.5},
    "lagged": {"statistics": "lagged"},
    "lagged and clipped": {"statistics": "lagged", "max_grad_norm": 0.5},
    "amsgrad, maximize": {"amsgrad": True, "maximize": True},
    "enhanced": {"features": FeatureConfig("enhanced", gating=True)},
    "standardised": {"features": FeatureConfig("norm_basic_plus", gating=True)},
    "known length": {"total_steps": 50},
    "released": {"variant": "released"},
    "skipping": {"skip_nonfinite": True},
    "one group a tensor": {"grouping": lambda name, param: name},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_graph_does_what_the_operations_do(name, captures):
    compare({}, **OPTIONS[name])
    assert len(captures) == 1


def test_the_encoder_in_float64(captures):
    def double(run):
        run.opt.encoder.double()
        run.meta = MetaLearner(run.opt, run.model, loss_fn, lr=0.05)

    compare({0: [double]})
    assert len(captures) == 1


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_an_encoder_that_learns_in_every_step_is_captured_once(statistics, captures):
    def learns(run):
        OnlineLearner(run.opt, policy="encoder", lr=0.05, every=3)

    eager, _ = compare({0: [learns]}, statistics=statistics)
    assert len(captures) == 1
    assert not torch.equal(eager.opt.lr_scale, torch.ones_like(eager.opt.lr_scale))


def test_scales_without_an_encoder_need_no_graph(captures):
    compare({0: [lambda run: OnlineLearner(run.opt)]}, steps=8, every=99)
    assert not captures


# ---------------------------------------------------------------------------------------- what a replay sees without a new capture


def other_numbers(run):
    run.opt.param_groups[0].update(lr=0.02, betas=(0.8, 0.99))
    run.opt.param_groups[1]["weight_decay"] = 0.3


def old_numbers(run):
    run.opt.param_groups[0].update(lr=0.01, betas=(0.9, 0.999))
    run.opt.param_groups[1]["weight_decay"] = 0.1


def weights_in_place(run):
    with torch.no_grad():
        run.opt.encoder.head.weight.mul_(1.5)


def weights_through_data(run):
    run.opt.encoder.encoder.layers[0].linear1.weight.data.mul_(1.5)


def parameter_in_place(run):
    with torch.no_grad():
        run.model.first.weight.mul_(0.5)


def parameter_data(run):
    run.model.first.weight.data = run.model.first.weight.data * 0.5


def loaded_into_the_encoder(run):
    run.opt.encoder.load_state_dict({name: x * 1.1 for name, x in run.opt.encoder.state_dict().items()})


def other_step_counts(run):
    run.opt.steps_done = 500


@pytest.mark.parametrize(
    "event",
    [other_numbers, weights_in_place, weights_through_data, parameter_in_place, loaded_into_the_encoder, other_step_counts],
)
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_other_numbers_need_no_other_capture(event, statistics, captures):
    compare({10: [event], 11: [event], 15: [old_numbers], 16: [event]}, statistics=statistics)
    assert len(captures) == 1


def test_a_learning_rate_that_changes_in_every_step(captures):
    """As a number, and as a tensor that is written in place."""
    lr = torch.tensor(0.01)

    def schedule(run):
        step = run.opt.steps_done
        run.opt.param_groups[0]["lr"] = 0.02 / (step + 1)
        lr.fill_(0.03 / (step + 1))
        run.opt.param_groups[1]["lr"] = lr

    compare({step: [schedule] for step in range(STEPS)})
    assert len(captures) == 1


@pytest.mark.parametrize("options", [{}, {"statistics": "lagged"}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
def test_a_grad_scaler_and_gradients_that_are_not_finite(options, captures):
    both = [Run(graph, **options) for graph in (False, True)]
    for step in range(STEPS):
        for run in both:
            run.put_gradients(step)
            if step % 5 == 3:
                run.model.norm.weight.grad[2] = float("inf")
            if step >= 8:  # there is a scaler from then on
                run.opt.grad_scale, run.opt.found_inf = torch.tensor(4.0), torch.tensor(float(step % 5 == 3))
            run.opt.step()
        assert_equal(both[1].state(), both[0].state(), f"step {step}")
    assert len(captures) == 2  # from then on whether a step counts, or what unscales its gradients, is a number


# --------------------------------------------------------------------------------------------------- what asks for another capture


def loaded(run):
    run.opt.load_state_dict(run.opt.state_dict())


def another_param_group(run):
    extra = nn.Parameter(noise((4, 3), 99))
    run.opt.add_param_group({"params": [("extra.weight", extra)], "lr": 0.02})


def other_ranges(run):
    run.opt.encoder.set_ranges(0.5, 1.5)


def other_length(run):
    run.opt.total_steps = 77 if run.opt.total_steps is None else None


def another_encoder(run):
    run.opt.encoder = copy.deepcopy(run.opt.encoder)
    randomise(run.opt.encoder, seed=5)
    run.meta = MetaLearner(run.opt, run.model, loss_fn, lr=0.05)


def weights_assigned(run):
    run.opt.encoder.load_state_dict({name: x * 1.1 for name, x in run.opt.encoder.state_dict().items()}, assign=True)
    run.meta = MetaLearner(run.opt, run.model, loss_fn, lr=0.05)


def transposed_weight(run):
    """In the memory that it has: only its strides change."""
    weight = run.opt.encoder.encoder.layers[0].self_attn.out_proj.weight
    weight.data = weight.data.t()


def weights_replaced(run):
    for p in run.opt.encoder.parameters():
        p.data = p.data * 1.1


def moved(run):
    run.model.first.weight.data = run.model.first.weight.data.clone()


def other_variant(run):
    run.opt.variant = "released" if run.opt.variant == "paper" else "paper"


CHANGES = [
    loaded, another_param_group, other_ranges, other_length, another_encoder, weights_assigned, transposed_weight, weights_replaced,
    parameter_data, moved, other_variant,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_what_changes_is_captured_again(change, statistics, captures):
    compare({10: [change]}, every=6, statistics=statistics)
    assert len(captures) == 2


def test_what_changes_in_every_step_is_never_captured(captures):
    compare({step: [other_length] for step in range(STEPS)})
    assert not captures


def test_embeddings_of_other_data(captures):
    def replace(run):
        run.opt.encoder.group_embeddings[1].data = run.opt.encoder.group_embeddings[1].data + 1

    compare({10: [replace]}, features="enhanced")
    assert len(captures) == 2


# ---------------------------------------------------------------------------------------------------------------- what can be seen


@pytest.mark.parametrize("options", [{}, {"statistics": "lagged"}, {"skip_nonfinite": True}], ids=str)
def test_what_was_read_stays_what_it_was(options, captures):
    run, kept = Run(True, **options), []
    for step in range(10):
        run.put_gradients(step)
        run.opt.step()
        kept.append((run.opt.lr_scale, run.opt.features, run.opt.lr_scale.clone(), run.opt.features.clone()))
    assert captures
    for scale, features, scale_then, features_then in kept:
        assert torch.equal(scale, scale_then)
        assert torch.equal(features, features_then)
    assert len({tuple(scale.tolist()) for scale, *_ in kept[2:]}) == len(kept[2:])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_captures_anew(how, captures):
    run = Run(True)
    for step in range(5):
        run.put_gradients(step)
        run.opt.step()
    assert len(captures) == 1
    again = Run(True)
    again.opt = how(run.opt)
    for step in range(5, 12):
        for one in (run, again):
            one.put_gradients(step)
            one.opt.step()
        assert_equal(again.state(), run.state(), f"step {step}")
    assert len(captures) == 2


# ------------------------------------------------------------------------------------------------------------ what is not captured


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, "metaadamw_fast")
    return lambda: caplog.messages


def test_on_the_cpu_nothing_is_captured_and_the_log_says_so_once(logged):
    compare({})
    assert logged() == ["encoder_graph: a step is carried out without the graph: the parameters are on cpu, not on a CUDA device"]


def test_without_the_option_nothing_is_captured(captures, logged):
    run = Run(False)
    for step in range(5):
        run.put_gradients(step)
        run.opt.step()
    assert not captures
    assert not logged()


def hooked(run):
    run.seen = []
    run.hook = run.opt.encoder.encoder.layers[1].register_forward_hook(lambda module, args, out: run.seen.append(out))


def test_hooks_of_the_encoder_run_in_every_step(captures, logged):
    both = compare({5: [hooked], 15: [lambda run: run.hook.remove()]}, every=STEPS + 1)
    assert [len(run.seen) for run in both] == [10, 10]
    assert len(captures) == 1  # which serves again when the hook is gone
    assert logged() == ["encoder_graph: a step is carried out without the graph: the encoder is of a subclass or has hooks"]


def test_a_subclass_of_the_encoder_is_called_in_every_step(captures):
    class Counting(GroupEncoder):
        calls = 0

        def forward(self, features):
            type(self).calls += 1
            return super().forward(features)

    run = Run(True)
    run.opt.encoder.__class__ = Counting
    for step in range(5):
        run.put_gradients(step)
        run.opt.step()
    assert Counting.calls == 5
    assert not captures


def test_a_capture_that_fails_is_not_tried_again_before_something_changes(captures, logged, monkeypatch):
    attempts = []

    def fail(run, device):
        attempts.append(run)
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(encoder_graph, "capture", fail)
    compare({15: [loaded]})
    assert len(attempts) == 2
    assert len(logged()) == 1
    assert "the capture failed: operation not permitted" in logged()[0]


def test_the_user_s_own_graph_has_the_operations(captures, monkeypatch):
    """And sees the weights that are written in place since; between its replays, steps replay ours."""
    both = [Run(graph) for graph in (False, True)]
    for run in both:
        for group in run.opt.param_groups:
            group["capturable"] = True  # the constructor wants a CUDA device
    recording = None
    for step in range(STEPS):
        for run in both:
            params = list(run.model.parameters())
            if recording is None:
                run.put_gradients(step)
            else:
                for i, p in enumerate(params):
                    p.grad.copy_(noise(p.shape, 100 * step + i))
            if run is both[0] or step < 5 or step % 7 == 6:
                run.opt.step()
            else:
                if recording is None:
                    written = [*params, *(x for p in params for x in run.opt.state[p].values())]
                    monkeypatch.setattr(devices, "capturing", lambda device: True)
                    with Recording(written) as recording:
                        run.opt.step()
                    monkeypatch.setattr(devices, "capturing", lambda device: False)
                recording.replay()
            if step % 7 == 6:
                weights_in_place(run)  # not a meta-update, whose gradients would stay in the table that the recording reads
        assert_equal(both[1].state(), both[0].state(), f"step {step}")
    assert len(captures) == 1
    assert sum(func is aten.addmm.default for func, *_ in recording.calls) == 9


def sharded(rank):
    patch = pytest.MonkeyPatch()
    captured = []
    patch.setattr(devices, "readable", lambda x: False)
    patch.setattr(encoder_graph, "can_capture", lambda device: True)

    def capture(run, device):
        with Recording([]) as recording:
            result = run()
        captured.append(recording)
        return recording, result

    patch.setattr(encoder_graph, "capture", capture)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = []
    for graph in (False, True):
        params = [nn.Parameter(distribute_tensor(noise((n, 3), n), mesh, [Shard(0)])) for n in (5, 4, 1)]
        opt = MetaAdamW([{"params": [p]} for p in params], grouping="param_groups", head_init="xavier", encoder_graph=graph)
        for step in range(8):
            for i, p in enumerate(params):
                p.grad = distribute_tensor(noise(p.shape, 10 * step + i), mesh, [Shard(0)])
            opt.step()
        results.append([*(p.full_tensor().detach() for p in params), opt.lr_scale, opt.features])
    patch.undo()
    return results, len(captured)


@ranks.needs_gloo
def test_sharded_parameters(tmp_path):
    """The graph begins behind the all-reduce of the statistics: no collective is in it."""
    for results, captured in ranks.run(sharded, 2, tmp_path / "run"):
        assert captured == 1
        assert_equal(results[1], results[0])


# ------------------------------------------------------------------------------------------------------------------------- counted

# Launches of a default step on a GPU that are torch's own, each some 5 us of the host.
BUDGET = 40
FREE = {aten.empty, aten.empty_like, aten.new_empty, aten._unsafe_view}


class Launches(TorchDispatchMode):
    """Counts the operations inside that launch something on a GPU."""

    def __init__(self):
        super().__init__()
        self.of_torch, self.of_ours = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func.overloadpacket not in FREE:
            self.of_torch[str(func)] += 1
        elif func.namespace == "metaadamw_fast" and "set_gradients" not in str(func):
            self.of_ours[str(func)] += 1
        return out


def launches_of_a_step(**options):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    opt = MetaAdamW(model.named_parameters(), **options)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with Launches() as launches:
            opt.step()
    return launches


def test_operations_of_a_default_step_on_a_gpu(monkeypatch):
    monkeypatch.setattr(devices, "readable", lambda x: False)
    launches = launches_of_a_step()
    assert launches.of_torch.total() <= BUDGET, launches.of_torch
    assert launches.of_ours.total() == 4  # statistics, features, modulation, update
    assert launches.of_torch.total() + 2 == BETWEEN["exact"]  # what the predictions count on
    launches = launches_of_a_step(statistics="lagged")
    assert launches.of_ours.total() == 3
    assert launches.of_torch.total() + 2 == BETWEEN["lagged"]


def test_operations_of_a_step_beside_the_graph(captures, monkeypatch):
    """What goes into the graph, what is read of it, and the counts, exact and shown; our own are the statistics and the update."""
    replays, whole = [], Recording.replay

    def replay(recording):
        with _disable_current_modes():  # one launch on a GPU
            whole(recording)
        replays.append(recording)

    monkeypatch.setattr(Recording, "replay", replay)
    launches = launches_of_a_step(encoder_graph=True)
    assert len(replays) == 3
    assert set(launches.of_torch) == {"aten._foreach_copy_.default", "aten.clone.default", "aten.add_.Tensor", "aten.copy_.default"}
    assert launches.of_torch.total() == 4
    assert launches.of_ours.total() == 2


# ------------------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
@pytest.mark.parametrize("name", ["plain", "lagged", "clipped", "enhanced", "standardised", "skipping"])
def test_a_graph_on_a_gpu(name, backend, logged):
    """Also on another stream, with other numbers and weights, and after a change that asks for another capture."""
    both = [Run(graph, device="cuda", **{**OPTIONS[name], "backend": backend}) for graph in (False, True)]
    events = {8: other_numbers, 12: weights_in_place, 16: loaded, 20: other_ranges, 24: weights_replaced}
    side = torch.cuda.Stream()
    for step in range(STEPS):
        for run in both:
            if step in events:
                events[step](run)
            run.put_gradients(step)
            if step in (6, 19):
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    run.opt.step()
                torch.cuda.current_stream().wait_stream(side)
            else:
                run.opt.step()
            if step % 7 == 6:
                run.update_encoder(step)
        torch.cuda.synchronize()
        assert_equal(both[1].state(), both[0].state(), f"step {step}")
    assert both[1].opt._encoder_graph._captured is not None
    assert not logged()
