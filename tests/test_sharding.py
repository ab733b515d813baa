"""Parameters spread over ranks: the same training as in one process, whatever the placements, by one all-reduce a step."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from metaadamw_fast import MADA, MetaAdamW, MetaLearner
from metaadamw_fast.parallel import reshard

from . import ranks
from .models import noise, said, same
from .optimizers import AVGRAD, LEARNED, MADA_, META

pytestmark = ranks.needs_gloo
BATCH, STEPS = 8, 50


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Seven rows and three rows: on four ranks the shards are uneven, and one is empty."""

    def __init__(self, width=7):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.add_(noise(p.shape, i) * 0.3 if p.dim() > 1 else noise(p.shape, i) * 0.1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def seeded_net(width=7):
    torch.manual_seed(0)
    return Net(width)


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def joint(seed):
    return noise((BATCH, 6), 2 * seed), noise((BATCH, 3), 2 * seed + 1)


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(model, options, rank=0, parts=1, steps=STEPS, average=()):
    """Training, of MetaAdamW with meta-updates, on the ``rank``-th of ``parts`` parts of each batch.

    ``average`` are the parameters whose gradients nobody else averages over the ranks.
    """
    spec, options = options.get("spec", META), {name: x for name, x in options.items() if name != "spec"}
    opt = spec.of_model(model, lr=1e-2, **options)
    if spec.encodes:
        meta = MetaLearner(opt, model, loss_fn, hvp="finite_difference", gap_at="lookahead", lr=1.0, make_optimizer=torch.optim.SGD)
    part = slice(BATCH // parts * rank, BATCH // parts * (rank + 1))
    scales = []
    for step in range(steps):
        opt.zero_grad()
        loss_fn(model, [x[part] for x in joint(step)]).backward()
        for p in average:
            dist.all_reduce(p.grad)
            p.grad /= parts
        opt.step()
        if spec.encodes:
            scales.append(torch.stack([opt.lr_scale, opt.wd_scale]))
        if spec.encodes and step % 10 == 9:
            loss_fn(model, [x[part] for x in joint(step)])  # leaves FSDP2's root gathered
            meta.update(*([x[part] for x in joint(100 + 10 * step + i)] for i in range(3)))
    states = [opt.state[p] for p in model.parameters()]
    for p, state in zip(model.parameters(), states, strict=True):
        for x in (state[name] for name in spec.states):
            assert isinstance(x, DTensor) == isinstance(p, DTensor)
            assert not isinstance(p, DTensor) or x.placements == p.placements
    found = {
        "params": [whole(p) for p in model.parameters()],
        "moments": [whole(state[name]) for state in states for name in spec.states],
        "steps": [state["step"].clone() for state in states],
        "statistics": opt.statistics.clone(),
        "grad_norm": opt.grad_norm.clone(),
    }
    if spec.kind is MADA:
        found |= {name: getattr(opt, name) for name in LEARNED}
        assert not torch.equal(opt.coefficients, spec.kind([nn.Parameter(torch.ones(1))], **spec.tuned).coefficients)
    if spec.encodes:
        found["scales"] = torch.stack(scales)
        found["encoder"] = [p.detach().clone() for p in opt.encoder.parameters()]
        found["log_vars"] = meta.log_vars.detach().clone()
    return found


def shard(model, **options):
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def tensor_parallel(model, mesh):
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def placed(kind):
    """The model, this rank's part of the batch, the number of parts, and the parameters that nobody averages."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = seeded_net(8 if "tensor parallel" in kind else 7)
    if kind == "fsdp":
        return shard(model), rank, size, ()
    if kind == "offload":
        return shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False)), rank, size, ()
    if kind == "bfloat16":
        return shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)), rank, size, ()
    if kind == "mixed":
        for layer in model.layers:
            fully_shard(layer)
        return model, rank, size, list(model.head.parameters())
    if kind == "hsdp":
        return shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))), rank, size, ()
    if kind == "tensor parallel":
        return tensor_parallel(model, init_device_mesh("cpu", (size,))), 0, 1, ()
    if kind == "fsdp and tensor parallel":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
        return shard(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"]), mesh["dp"].get_local_rank(), 2, ()
    assert kind == "ddp and tensor parallel"
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(model, mesh["tp"])
    return model, mesh["dp"].get_local_rank(), 2, ()


def placed_training(_, kind, options):
    model, part, parts, average = placed(kind)
    return train(model, options, part, parts, average=average)


CASES = [
    ("fsdp", 2, {"max_grad_norm": 1.0}),
    ("fsdp", 4, {"max_grad_norm": 1.0, "amsgrad": True}),
    ("fsdp", 2, {"statistics": "lagged"}),
    ("fsdp", 4, {"features": "enhanced", "skip_nonfinite": True}),
    ("fsdp", 2, {"backend": "reference"}),
    ("offload", 2, {}),
    ("bfloat16", 2, {}),
    ("mixed", 2, {"max_grad_norm": 1.0}),
    ("mixed", 4, {"statistics": "lagged"}),
    ("hsdp", 4, {"max_grad_norm": 1.0}),
    ("tensor parallel", 2, {"max_grad_norm": 1.0}),
    ("fsdp and tensor parallel", 4, {"max_grad_norm": 1.0}),
    ("fsdp", 2, {"spec": AVGRAD, "max_grad_norm": 1.0}),
    ("mixed", 2, {"spec": AVGRAD}),
    ("fsdp", 2, {"spec": MADA_, "max_grad_norm": 1.0}),
    ("fsdp", 4, {"spec": MADA_}),
    ("tensor parallel", 2, {"spec": MADA_, "statistics": "lagged"}),
]


@pytest.mark.parametrize(("kind", "size", "options"), CASES, ids=str)
def test_sharded_training_is_that_of_one_process(kind, size, options, tmp_path):
    found = ranks.run(placed_training, size, tmp_path, kind, options)
    assert all(same(found[0], other) for other in found[1:])
    alone = train(seeded_net(8 if "tensor parallel" in kind else 7), options)
    # float32 sums in another order; measured: at most 5e-6 of a tensor's largest element. With bfloat16 forward passes it is
    # another computation (eps is 4e-3), which has to stay near; measured: 2e-2.
    bound = 1e-1 if kind == "bfloat16" else 5e-5
    for name, expected in alone.items():
        for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (found[0][name], expected)), strict=True):
            assert (a - b).abs().max() <= bound * b.abs().max(), name
    if "scales" in alone:
        moved = alone["scales"].diff(dim=0).abs().amax(dim=(1, 2))
        assert (moved > 1e-3).any(), "no meta-update has moved the scales: this compares nothing"


class DTensorOps(TorchDispatchMode):
    """Counts operations that are called on DTensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(issubclass(t, DTensor) for t in types)
        return func(*args, **(kwargs or {}))


def recorded(run, calls):
    def call(x, *args, **options):
        calls.append(x.nbytes)
        return run(x, *args, **options)

    return call


def collectives_of_a_step(_, kind, options, spec=META):
    model, part, parts, _ = placed(kind)
    opt = spec.of_model(model, **options)
    found = []
    for step in range(3):
        loss_fn(model, [x[BATCH // parts * part : BATCH // parts * (part + 1)] for x in joint(step)]).backward()
        calls: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
                patch.setattr(dist, name, recorded(getattr(dist, name), calls))
            with DTensorOps() as ops:
                opt.step()
        found.append((calls, ops.count))
    return found, len(opt.statistics), opt._rank_sums.active


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"statistics": "lagged"}], ids=str)
@pytest.mark.parametrize(("kind", "size"), [("fsdp", 2), ("mixed", 2), ("hsdp", 4), ("fsdp and tensor parallel", 4)])
def test_a_step_makes_one_all_reduce_and_no_dtensor_operation(kind, size, options, tmp_path):
    for found, tensors, _ in ranks.run(collectives_of_a_step, size, tmp_path, kind, options):
        assert found == [([8 * 5 * tensors], 0)] * 3


def collectives_of_avgrad(rank):
    return [collectives_of_a_step(rank, "fsdp", options, AVGRAD) for options in ({}, {"max_grad_norm": 1.0})]


def test_avgrad_communicates_what_clipping_needs(tmp_path):
    for plain, clipped in ranks.run(collectives_of_avgrad, 2, tmp_path):
        assert plain[0] == [([], 0)] * 3
        assert clipped[0] == [([8 * clipped[1]], 0)] * 3


def collectives_of_mada(rank):
    return [collectives_of_a_step(rank, "fsdp", options, MADA_) for options in ({"max_grad_norm": 1.0}, {"statistics": "lagged"})]


def test_mada_makes_one_all_reduce(tmp_path):
    for modes in ranks.run(collectives_of_mada, 2, tmp_path):
        for found, tensors, _ in modes:
            assert found == [([8 * 7 * tensors], 0)] * 3


def test_nothing_is_communicated_where_nothing_is_split(tmp_path):
    for found, _, active in ranks.run(collectives_of_a_step, 1, tmp_path, "fsdp", {}):
        assert found == [([], 0)] * 3
        assert not active


def carried_and_measured(_, kind, options):
    """Two equal trainings under writes of others: with carried sums, and with a full pass in every step."""
    results = []
    for carried in (True, False):
        model = placed(kind)[0]
        opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier", **options)
        first, last = model.layers[0].up.weight, model.layers[1].norm.bias
        seen = []
        for step in range(12):
            opt.zero_grad()
            loss_fn(model, joint(step)).backward()
            if step == 3:
                last.grad = None
            if step == 4:
                with torch.no_grad():
                    first.mul_(1.5)  # through the DTensor
            if step == 6:
                with torch.no_grad():
                    first.to_local().mul_(0.5)  # through the shard
            if step == 8:
                opt.state[last]["exp_avg_sq"].mul_(2.0)
            if step == 10:
                opt.state[last]["exp_avg_sq"] = opt.state[last]["exp_avg_sq"] * 2.0
            if not carried:
                opt.invalidate_statistics()
            opt.step()
            seen.append(opt.statistics.clone())
        results.append((seen, [whole(p) for p in model.parameters()]))
    return results


@pytest.mark.parametrize("options", [{}, {"statistics": "lagged"}], ids=str)
@pytest.mark.parametrize("kind", ["fsdp", "tensor parallel"])
def test_carried_sums_of_shards_are_those_of_a_full_pass(kind, options, tmp_path):
    for carried, measured in ranks.run(carried_and_measured, 2, tmp_path, kind, options):
        assert same(carried, measured)


def masters(_, through_the_shard, spec):
    """Of bfloat16 parameters, with one of them overwritten on the way."""
    model = placed("fsdp")[0]
    model.to(torch.bfloat16)
    opt = spec.of_model(model, lr=1e-2, master_weights=True, state_dtype=torch.float32)
    weight = model.head.weight
    for step in range(4):
        for i, p in enumerate(model.parameters()):
            p.grad = distribute_tensor(noise(p.shape, 10 * step + i).bfloat16(), p.device_mesh, p.placements)
        if step == 2:
            with torch.no_grad():
                (weight.to_local() if through_the_shard else weight).mul_(2.0)
        opt.step()
        assert isinstance(opt.state[weight]["master_param"], DTensor)
        assert torch.equal(whole(opt.state[weight]["master_param"]).bfloat16(), whole(weight))
    return whole(weight), whole(opt.state[weight]["master_param"])


@pytest.mark.parametrize(("through_the_shard", "spec"), [(False, META), (True, META), (True, AVGRAD)], ids=str)
def test_master_weights_of_shards_take_up_what_others_write(through_the_shard, spec, tmp_path):
    first, second = ranks.run(masters, 2, tmp_path, through_the_shard, spec)
    assert same(first, second)
    assert first[1].abs().max() > 1.3 * seeded_net().head.weight.abs().max()


def copies(_):
    """An optimizer made from another's pickled state finds its process groups again."""
    model = placed("hsdp")[0]
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier")
    loss_fn(model, joint(0)).backward()
    opt.step()
    state = opt.__getstate__()
    assert not state["_rank_sums"].active
    other = MetaAdamW.__new__(MetaAdamW)
    other.__setstate__(state)
    other.step()
    return other._rank_sums.active


def test_an_optimizer_s_state_holds_no_process_group(tmp_path):
    assert ranks.run(copies, 4, tmp_path) == [True] * 4


def overflow(rank, kind):
    """An infinity in the shard of one rank; the others do not see it."""
    model = placed(kind)[0]
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    for step in range(3):
        opt.zero_grad()
        scaler.scale(loss_fn(model, joint(step))).backward()
        if step == 1 and rank == 0:
            model.head.weight.grad.to_local().view(-1)[0] = float("inf")
        before = [whole(p) for p in model.parameters()]
        scaler.step(opt)
        scaler.update()
        seen.append(
            (same(before, [whole(p) for p in model.parameters()]), opt.steps_done, scaler.get_scale(), opt.grad_norm.clone())
        )
    return seen


@pytest.mark.parametrize("kind", ["fsdp", "offload"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(kind, tmp_path):
    first, second = ranks.run(overflow, 2, tmp_path, kind)
    assert same(first, second)
    assert [row[:3] for row in first] == [(False, 1, 8.0), (True, 1, 4.0), (False, 2, 4.0)]


def not_finite(rank, options):
    """A NaN in the shard of the first rank at step 1, in that of the second at step 2; the other rank does not see it."""
    model = placed("fsdp")[0]
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier", skip_nonfinite=True, **options)
    seen = []
    for step in range(4):
        opt.zero_grad()
        loss_fn(model, joint(step)).backward()
        if step - 1 == rank:
            model.head.weight.grad.to_local().view(-1)[0] = float("nan")
        before = [whole(p) for p in model.parameters()]
        opt.step()
        seen.append((same(before, [whole(p) for p in model.parameters()]), opt.steps_done, opt.skipped_steps))
    return seen, [whole(p) for p in model.parameters()], opt.lr_scale.clone()


@pytest.mark.parametrize("options", [{}, {"statistics": "lagged"}], ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(options, tmp_path):
    first, second = ranks.run(not_finite, 2, tmp_path, options)
    assert same(first, second)
    assert first[0] == [(False, 1, 0), (True, 1, 1), (True, 1, 2), (False, 2, 2)]
    assert all(p.isfinite().all() for p in first[1])


def meta_update(rank):
    """Between two halves of an accumulated gradient, after an evaluation that leaves the root gathered."""
    model = placed("fsdp")[0]
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier")
    meta = MetaLearner(opt, model, loss_fn)
    loss_fn(model, joint(rank)).backward()
    opt.step()
    grads = [p.grad for p in model.parameters()]

    def everything():
        return [whole(x) for p in model.parameters() for x in (p, p.grad, *opt.state[p].values())]

    before, random = everything(), torch.get_rng_state()
    with torch.no_grad():
        loss_fn(model, joint(rank))
    report = meta.update(joint(10 + rank), joint(20 + rank), joint(30 + rank))
    assert same(before, everything())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert meta.updates == 1
    return said(report)


def test_a_meta_update_leaves_a_sharded_model_as_it_was(tmp_path):
    first, second = ranks.run(meta_update, 2, tmp_path)
    assert same(first, second)


class SomeError(Exception):
    pass


def failing(module, where, call):
    """``module`` raises in its ``call``-th pass, forward or backward, from now on. Returns a handle that makes it stop."""
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == call:
            raise SomeError

    def fail_behind(_, inputs, output):
        if output.requires_grad:
            output.register_hook(fail)

    return module.register_forward_pre_hook(fail) if where == "forward" else module.register_forward_hook(fail_behind)


def two_micro_batches(rank, kind, accumulated=True, updated=True, fails=None):
    """A gradient accumulated over two micro-batches, a meta-update between them.

    Returns:
        The loss of the second micro-batch, the gradient, and what the meta-update reports.
    """
    model = placed(kind if kind in ("bfloat16", "hsdp", "offload") else "fsdp")[0]
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier")
    meta = MetaLearner(opt, model, loss_fn)
    loss_fn(model, joint(rank)).backward()
    opt.step()
    opt.zero_grad()
    model.set_reshard_after_backward(kind != "kept")
    synchronise = model.set_requires_all_reduce if kind == "hsdp" else model.set_requires_gradient_sync
    report = None
    if accumulated:
        synchronise(False)
        loss_fn(model, joint(10 + rank)).backward()
        synchronise(kind != "off")
    if updated:
        batches = [joint(20 + rank), joint(30 + rank), joint(40 + rank)]
        if fails is None:
            report = said(meta.update(*batches))
        else:
            handle = failing(model.layers[1], *fails)
            with pytest.raises(SomeError):
                meta.update(*batches)
            handle.remove()
    loss = loss_fn(model, joint(50 + rank))
    loss.backward()
    if accumulated and kind == "off":
        assert all(p.grad is None for p in opt.groups[0].params)  # it is still off
        synchronise(True)
        loss_fn(model, joint(60 + rank)).backward()
    reshard(model)
    return loss.detach(), [whole(p.grad) for p in model.parameters()], report


def amid_an_accumulation(rank, kind):
    loss, gradient, report = two_micro_batches(rank, kind)
    expected_loss, expected, _ = two_micro_batches(rank, kind, updated=False)
    assert same(loss, expected_loss)  # no parameter of the look-ahead has stayed gathered
    assert same(gradient, expected)
    assert same(report, two_micro_batches(rank, kind, accumulated=False)[2])
    return gradient


@pytest.mark.parametrize("kind", ["on", "off", "kept", "bfloat16", "offload", "hsdp"])
def test_a_meta_update_between_two_micro_batches_changes_no_gradient(kind, tmp_path):
    first, second = ranks.run(amid_an_accumulation, 2, tmp_path, kind)
    assert same(first, second)


def after_an_error(rank):
    """At θ, at θ′ and beyond it, in forward and backward passes."""
    expected_loss, expected, _ = two_micro_batches(rank, "on", updated=False)
    for fails in (("forward", 1), ("forward", 4), ("forward", 6), ("backward", 1), ("backward", 3)):
        loss, gradient, _ = two_micro_batches(rank, "on", fails=fails)
        assert same(loss, expected_loss), fails
        assert same(gradient, expected), fails


def test_a_meta_update_that_fails_leaves_a_sharded_model_as_it_was(tmp_path):
    ranks.run(after_an_error, 2, tmp_path)


def another_fsdp(rank):
    """One that keeps its parameters in attributes of other names: whether something is accumulated cannot be seen there."""
    model = placed("fsdp")[0]
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model)
    meta = MetaLearner(opt, model, loss_fn)
    loss_fn(model, joint(rank)).backward()
    opt.step()
    batches = [joint(10 + rank), joint(20 + rank), joint(30 + rank)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaadamw_fast.parallel._unreduced", lambda parts: [part.other_name for part in parts])
        meta.update(*batches)  # a reduced gradient stands
        opt.zero_grad()
        with pytest.raises(RuntimeError, match=r"other_name.*after the optimizer's step\(\)"):
            meta.update(*batches)
    assert meta.updates == 1


def test_internals_of_fsdp_that_are_not_known(tmp_path):
    ranks.run(another_fsdp, 2, tmp_path)


def released_report(_, model=None):
    """Its features are those of the gradient of the last training step, not of that of the meta-update."""
    model = model or placed("fsdp")[0]
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier", variant="released")
    for step in range(2):
        opt.zero_grad()
        loss_fn(model, joint(step)).backward()
        opt.step()
    report = MetaLearner(opt, model, loss_fn, hvp="finite_difference").update(*(joint(10 + i) for i in range(3)))
    return report.lr_scale, report.total


def test_the_released_variant_reads_the_gradient_that_stands(tmp_path):
    alone = released_report(0, seeded_net())
    for found in ranks.run(released_report, 2, tmp_path):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=0.0)


def refusals(_):
    model = seeded_net()
    fsdp1 = FullyShardedDataParallel(seeded_net(), device_id=torch.device("cpu"), use_orig_params=True)
    for build, words in (
        (lambda: ZeroRedundancyOptimizer(model.parameters(), MetaAdamW, lr=1e-3), "FSDP2"),
        (lambda: MetaAdamW(FullyShardedDataParallel(seeded_net(), device_id=torch.device("cpu")).parameters()), "FSDP2"),
        (lambda: MetaAdamW(fsdp1.parameters()), "FSDP2"),
        (lambda: MetaAdamW(fsdp1.named_parameters(), model=fsdp1), "FSDP2"),
        (lambda: MetaLearner(MetaAdamW((m := shard(seeded_net())).parameters()), m, loss_fn, hvp="exact"), "finite_difference"),
        (lambda: MetaAdamW(two_meshes()), "one device mesh"),
        (lambda: ZeroRedundancyOptimizer(model.parameters(), AVGRAD.kind, lr=1e-3), "^(?!.*encoder).*FSDP2"),
        (lambda: AVGRAD(fsdp1.parameters()), "FSDP2"),
        (lambda: AVGRAD(two_meshes()), "one device mesh"),
    ):
        with pytest.raises(ValueError, match=words):
            build()
    for spec in (META, AVGRAD):
        spec(DistributedDataParallel(seeded_net()).parameters())


def two_meshes():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return [nn.Parameter(distribute_tensor(torch.ones(4), mesh[name], [Shard(0)])) for name in "ab"]


def test_what_would_be_wrong_is_refused(tmp_path):
    ranks.run(refusals, 4, tmp_path)
