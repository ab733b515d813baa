"""What a step allocates, measured by the kernel: the peak of the process's resident memory."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

ELEMENTS = 8 * 2**20  # in 64 tensors: a temporary copy of any one list would be 32 MiB
MEASURE = """
import gc, sys
from pathlib import Path
import torch
from metaadamw_fast import MADA, AVGrad, MetaAdamW

params = [torch.nn.Parameter(torch.randn({elements} // 64)) for _ in range(64)]
grads = [[torch.randn_like(p) for p in params] for _ in range(2)]
make = {{
    "fused": lambda: torch.optim.AdamW(params, fused=True),
    "exact": lambda: MetaAdamW(params, head_init="xavier"),
    "clip": lambda: MetaAdamW(params, head_init="xavier", max_grad_norm=0.1),
    "lagged": lambda: MetaAdamW(params, head_init="xavier", statistics="lagged"),
    "avgrad": lambda: AVGrad(params),
    "avgrad, clip": lambda: AVGrad(params, max_grad_norm=0.1),
    "mada": lambda: MADA(params, freeze_steps=0),
    "mada, lagged": lambda: MADA(params, freeze_steps=0, statistics="lagged"),
}}
opt = make[sys.argv[1]]()

def status(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024

def step(i):
    for p, g in zip(params, grads[i % 2]):
        p.grad = g
    opt.step()

for i in range(3):
    step(i)
gc.collect()
peaks = []
for i in range(4):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    step(i)
    peaks.append(status("VmHWM") - before)
print(min(peaks))
"""


@functools.cache
def peak(side):
    code = MEASURE.format(elements=ELEMENTS)
    run = subprocess.run(
        [sys.executable, "-c", code, side], cwd=Path(__file__).parent.parent, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's")
@pytest.mark.parametrize("side", ["exact", "clip", "lagged", "avgrad", "avgrad, clip", "mada", "mada, lagged"])
def test_a_step_needs_no_more_than_torch_and_a_mebibyte(side):
    assert peak(side) <= peak("fused") + 2**20
