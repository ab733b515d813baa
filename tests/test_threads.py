"""Small steps take one thread, and no setting of the process changes for it."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from metaadamw_fast import EncoderConfig, FeatureConfig, GroupEncoder, threads
from metaadamw_fast.threads import one_thread

from .models import noise

needs_openmp = pytest.mark.skipif(threads._set_openmp_threads is None, reason="torch is built without OpenMP")

# The parent wakes its threads; the child has none of them, and waits for ever for the first operation that wants them.
FORKS = """
import os, sys, time
import torch
from torch import nn
from metaadamw_fast import MetaAdamW, MetaLearner
from tests.models import noise

class Products(nn.Module):  # without an operation of torch that would wake threads itself
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(noise((n, 3), n)) for n in range(1, 33)])
    def forward(self, x):
        return sum((w * x).square().sum() for w in self.weights)

def train(backend, meta):
    model = Products()
    options = {"head_init": "xavier", "grouping": lambda name, param: name, "backend": backend, "features": "norm_basic_plus"}
    opt = MetaAdamW(model.named_parameters(), **options)
    assert len(opt.groups) == 32
    loss = lambda model, x: model(x)
    for step in range(2):
        opt.zero_grad()
        loss(model, 1.0).backward()
        opt.step()
    if meta:
        MetaLearner(opt, model, loss).update(1.0, 2.0, 3.0)

how, backend, meta = sys.argv[1], sys.argv[2], sys.argv[3] == "meta"
if how == "told":
    torch.set_num_threads(2)
assert torch.get_num_threads() == 2
train(backend, meta)
torch.ones(2**20).add_(1)
child = os.fork()
if not child:
    train(backend, meta)
    os._exit(0)
for _ in range(600):
    if os.waitpid(child, os.WNOHANG)[0]:
        print("ended")
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
"""


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("what", ["steps", "meta"])
@pytest.mark.parametrize(
    ("how", "backend"),
    # Not "told" with "reference": after torch.set_num_threads, torch's root of 128 numbers wakes threads, in any optimizer.
    [("from the environment", "cpp"), ("from the environment", "reference"), ("told", "cpp")],
)
def test_a_child_of_a_fork_takes_steps(how, backend, what, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run = subprocess.run([sys.executable, "-c", FORKS, how, backend, what], capture_output=True, text=True)
    assert run.stdout == "ended\n", run.stderr


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def number_elsewhere():
    """What another thread, one that has asked torch for nothing yet, has."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@needs_openmp
def test_the_number_of_threads_is_the_caller_s_own(three_threads):
    with one_thread():
        assert torch.get_num_threads() == 1
        assert number_elsewhere() == 3
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with pytest.raises(KeyboardInterrupt), one_thread():
        raise KeyboardInterrupt
    assert torch.get_num_threads() == number_elsewhere() == 3


@needs_openmp
def test_in_a_thread_that_has_not_used_torch(three_threads):
    found = []

    def run():
        with one_thread():
            torch.ones(2**20).add_(1)
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [1, 3]
    assert torch.get_num_threads() == 3


def test_without_openmp_nothing_changes(three_threads, monkeypatch):
    monkeypatch.setattr(threads, "_set_openmp_threads", None)
    with one_thread():
        assert torch.get_num_threads() == 3


@needs_openmp
@pytest.mark.parametrize(("groups", "expected"), [(3, 1), (128, 1), (129, 3)])
def test_few_groups_are_encoded_in_one_thread(groups, expected, three_threads):
    encoder = GroupEncoder(EncoderConfig(), FeatureConfig(), groups)
    seen = []
    encoder.encoder.layers[0].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    encoder(noise((groups, encoder.dim), 0))
    assert seen == [expected]
    assert torch.get_num_threads() == 3
