"""Every kernel once on small tensors of every kind, for compute-sanitizer: `compute-sanitizer python -m bench.sanitize`.

Sizes are around the edges of groups, blocks and chunks. Dtypes, layouts, absent gradients and maxima come in all the ways that
choose another branch, and one optimizer has more tensors than a block has threads. Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1:
then every tensor is an allocation of its own, and an access beside it is seen.
"""

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor

from metaadamw_fast import MADA, MetaAdamW, ops

SIZES = [0, 1, 3, 8, 1023, 1024, 8_192, 8_193, 16_385, 70_001]
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"statistics": "lagged"},
    {"statistics": "lagged", "stochastic_rounding": True},
    {"stochastic_rounding": True},
    {"max_grad_norm": 1.0, "maximize": True, "features": "enhanced"},
)
OF_MADA: tuple[dict[str, Any], ...] = ({}, {"statistics": "lagged"}, {"variant": "released", "scope": "per_group"})
MANY = 300  # tensors in one group
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STATES = [None, torch.float32, torch.bfloat16]  # dtypes of the states, None for that of the parameters
# Triton compiles its kernels anew for every combination of dtypes, for seconds each.
OF_TRITON = [(torch.float32, None), (torch.bfloat16, torch.float32)]


def tensors(device: str, dtype: torch.dtype, positive: bool = False) -> list[Tensor]:
    """Dense, odd-sized, transposed and offset ones."""
    flat = [torch.rand(n, device=device) for n in SIZES]
    others = [torch.rand(70, 30, device=device).t(), torch.rand(2_001, device=device)[1:], torch.rand((), device=device)]
    return [(x if positive else x - 0.5).to(dtype) for x in flat + others]


def three_steps(leaves: list[torch.nn.Parameter], **options: Any) -> None:
    """Three steps of an optimizer.

    Raises:
        RuntimeError: its scales are not finite then.
    """
    opt = MetaAdamW(leaves, head_init="xavier", **options)
    for _ in range(3):
        for p in leaves:
            p.grad = torch.rand_like(p)
        opt.step()
    if not bool(opt.lr_scale.isfinite().all()):
        raise RuntimeError(f"scales are not finite: {options}")


def main() -> None:
    """Runs both ops on lists and through optimizers."""
    parser = argparse.ArgumentParser(description="A short program for compute-sanitizer.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["cpp", "triton"])
    options = parser.parse_args()
    device = options.device
    for backend, (dtype, state) in (
        (name, combination)
        for name in options.backends
        for combination in (OF_TRITON if name == "triton" else itertools.product(DTYPES, STATES))
    ):
        grads, params = tensors(device, dtype), tensors(device, dtype)
        moments = [tensors(device, state or dtype, positive) for positive in (False, True, True)]
        grads[3] = torch.empty(0, device=device, dtype=dtype)  # absent
        ops.tensor_stats(grads, moments[0], params, moments[1], count_nonzero=True, backend=backend)
        for seed in (None, 1):
            ops.adamw_update_(
                params, grads, *moments[:2], 0.1, 0.99, step=3, max_exp_avg_sqs=moments[2], rounding_seed=seed, backend=backend
            )
        for more in OPTIONS:
            three_steps([torch.nn.Parameter(x.contiguous()) for x in params], backend=backend, state_dtype=state, **more)
    for backend, more in itertools.product(options.backends, OF_MADA):
        opt = MADA([torch.nn.Parameter(x) for x in tensors(device, torch.float32)], backend=backend, freeze_steps=0, **more)
        for _ in range(3):
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.rand_like(p)
            opt.step()
    for backend, more in itertools.product(options.backends, OPTIONS):
        leaves = [torch.nn.Parameter(torch.rand(2 + t % 5, device=device)) for t in range(MANY)]
        three_steps(leaves, backend=backend, grouping="param_groups", **more)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
