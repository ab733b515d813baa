"""examples/fsdp_train.py: run by torchrun, and killed at random moments; it goes on as if nothing had happened, bit for bit."""

import importlib.util
import multiprocessing
import os
import random
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from . import ranks
from .models import same

pytestmark = ranks.needs_gloo
EXAMPLE = Path(__file__).parent.parent / "examples" / "fsdp_train.py"


def example():
    spec = importlib.util.spec_from_file_location("fsdp_train", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(rank, size, directory, attempt, optimizer):
    """One attempt; writes what the training ends with, and where it began."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size > 1:
        store = f"file://{directory}/store {attempt}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    module = example()
    checkpoints = directory / "checkpoints"
    found = sorted(path.name for path in checkpoints.glob("step-*"))
    (directory / f"began {attempt} {rank}").write_text(found[-1].removeprefix("step-") if found else "0")
    arguments = [
        "--checkpoints",
        str(checkpoints),
        "--steps",
        "30",
        "--layers",
        "1",
        "--checkpoint-every",
        "3",
        "--meta-every",
        "5",
        "--optimizer",
        optimizer,
    ]
    model, opt, meta = module.train(module.parse_arguments(arguments), torch.device("cpu"))
    local = [p.detach() for p in model.parameters()] if size == 1 else [p._local_tensor.detach() for p in model.parameters()]
    states = [
        {n: x._local_tensor if hasattr(x, "_local_tensor") else x for n, x in opt.state[p].items()} for p in model.parameters()
    ]
    end = {"params": local, "states": states, "extra": opt.state_dict()[optimizer], "meta": meta and meta.state_dict()}
    torch.save(end, directory / f"unfinished {rank}.pt")
    os.rename(directory / f"unfinished {rank}.pt", directory / f"end {rank}.pt")


class Attempt:
    """A training on ``size`` processes, in the background."""

    def __init__(self, size, directory, number=0, optimizer="metaadamw"):
        directory.mkdir(exist_ok=True)
        self._size, self._directory, self._number = size, directory, number
        context = multiprocessing.get_context("forkserver")
        self.processes = [context.Process(target=train, args=(rank, size, directory, number, optimizer)) for rank in range(size)]
        for process in self.processes:
            process.start()

    def begin(self):
        """Waits until every process has read where to go on, and returns the time."""
        for rank in range(self._size):
            while not (self._directory / f"began {self._number} {rank}").exists():
                assert self.processes[rank].is_alive(), "it ended before it began"
                time.sleep(0.001)
        return time.monotonic()

    def wait(self, seconds=None):
        """Whether all processes came to their end."""
        end = None if seconds is None else time.monotonic() + seconds
        for process in self.processes:
            process.join(None if end is None else max(0.0, end - time.monotonic()))
        return all(process.exitcode == 0 for process in self.processes)

    def kill(self, first):
        """SIGKILL to one process, then, as torchrun does, to the others; whether the one was still running."""
        self.processes[first].kill()
        for process in self.processes:
            process.kill()
            process.join()
        return self.processes[first].exitcode == -9

    def end(self):
        return [torch.load(self._directory / f"end {rank}.pt", weights_only=True) for rank in range(self._size)]


@pytest.mark.parametrize(("size", "optimizer", "killed"), [(1, "metaadamw", 20), (2, "metaadamw", 20), (2, "mada", 12)])
def test_killed_trainings_end_as_the_uninterrupted_one(size, optimizer, killed, tmp_path):
    whole = Attempt(size, tmp_path / "whole", optimizer=optimizer)
    began = whole.begin()
    assert whole.wait()
    seconds = time.monotonic() - began  # on this machine, as busy as it is
    expected = whole.end()
    moments = random.Random(size)
    kills = attempts = rounds = 0
    while kills < killed:
        rounds += 1
        directory, finished = tmp_path / f"round {rounds}", False
        while not finished:
            attempts += 1
            attempt = Attempt(size, directory, attempts, optimizer)
            if kills == killed:
                assert attempt.wait()
                finished = True
                continue
            attempt.begin()
            if attempt.wait(moments.uniform(0.0, 0.6 * seconds)):
                finished = True
            else:
                kills += attempt.kill(moments.randrange(size))
        assert same(attempt.end(), expected)
    began = [int(path.read_text()) for path in tmp_path.glob("round */began * 0")]
    assert sum(step > 0 for step in began) >= killed // 4, "too few continued from a checkpoint for this to show anything"


def test_torchrun_trains_and_goes_on_with_fewer_processes(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    options = [str(EXAMPLE), "--checkpoints", str(tmp_path), "--layers", "1", "--report-every", "20", "--meta-every", "15"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def run(*command):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run(*torchrun, *options, "--steps", "40")
    assert "0 steps done" in first
    losses = [float(line.split("loss ")[1].split()[0]) for line in first.splitlines() if "loss" in line]
    assert losses[-1] < losses[0] < 5.6  # log 256 = 5.545
    assert "40 steps done" in run(sys.executable, *options, "--steps", "60")
