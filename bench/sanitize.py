"""Every kernel once on small tensors of every kind, for compute-sanitizer: `compute-sanitizer python -m bench.sanitize`.

Sizes are around the edges of groups, blocks and chunks; dtypes, layouts, absent gradients and maxima come in all the ways that
choose another branch. Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1: then every tensor is an allocation of its own, and an access
beside it is seen.
"""

import argparse
import itertools

import torch
from torch import Tensor

from metaadamw_fast import MetaAdamW, ops

SIZES = [0, 1, 3, 8, 1023, 1024, 16_385, 70_001]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(device: str, dtype: torch.dtype, positive: bool = False) -> list[Tensor]:
    """Dense, odd-sized, transposed and offset ones."""
    flat = [torch.rand(n, device=device) for n in SIZES]
    others = [torch.rand(70, 30, device=device).t(), torch.rand(2_001, device=device)[1:], torch.rand((), device=device)]
    return [(x if positive else x - 0.5).to(dtype) for x in flat + others]


def main() -> None:
    """Runs both ops on lists and through optimizers."""
    parser = argparse.ArgumentParser(description="A short program for compute-sanitizer.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["cpp", "triton"])
    options = parser.parse_args()
    for backend, dtype, state in itertools.product(options.backends, DTYPES, (None, torch.float32, torch.bfloat16)):
        device = options.device
        grads, params = tensors(device, dtype), tensors(device, dtype)
        moments = [tensors(device, state or dtype, positive) for positive in (False, True, True)]
        grads[3] = torch.empty(0, device=device, dtype=dtype)  # absent
        ops.tensor_stats(grads, moments[0], params, moments[1], count_nonzero=True, backend=backend)
        for seed in (None, 1):
            ops.adamw_update_(
                params, grads, *moments[:2], 0.1, 0.99, step=3, max_exp_avg_sqs=moments[2], rounding_seed=seed, backend=backend
            )
        for more in ({}, {"statistics": "lagged"}, {"max_grad_norm": 1.0, "maximize": True, "features": "enhanced"}):
            leaves = [torch.nn.Parameter(x.contiguous()) for x in params]
            opt = MetaAdamW(leaves, backend=backend, state_dtype=state, head_init="xavier", **more)
            for _ in range(3):
                for p in leaves:
                    p.grad = torch.rand_like(p)
                opt.step()
            if not bool(opt.lr_scale.isfinite().all()):
                raise RuntimeError(f"{backend}, {dtype}: scales are not finite")
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
