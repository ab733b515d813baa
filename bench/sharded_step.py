"""What a step costs beside its arithmetic when the parameters are sharded: collectives, their bytes, and the host's time.

    python -m bench.sharded_step [--ranks N] [--rounds N] [--tensors N ...] [--json FILE]

Every rank holds 16 elements of each tensor (DTensors, Shard(0), gloo on the CPU), so that nearly all of a step is the host's: 291
tensors are those of Llama-2 7B. Sides take turns in one process per rank, in the same order on all ranks; times are medians over
the rounds on rank 0, ratios are formed within a round. `all-reduce` is the collective of a step alone, on a tensor of its size.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bench.timing import Spread, machine

ELEMENTS = 16
BASE = "AdamW(fused=True)"
MOST_FOR_TORCH = 1_000  # DTensor's first dispatch of a list of T tensors takes time with T²: half a minute for 1,500


def parameters(count: int, ranks: int, sharded: bool) -> list[nn.Parameter]:
    """With gradients; sharded over all ranks, or plain ones of the size of a shard."""
    mesh = init_device_mesh("cpu", (ranks,))
    out = []
    for _ in range(count):
        x, g = torch.randn(ELEMENTS * (ranks if sharded else 1)), torch.randn(ELEMENTS * (ranks if sharded else 1))
        if sharded:
            x, g = (distribute_tensor(y, mesh, [Shard(0)], src_data_rank=None) for y in (x, g))
        p = nn.Parameter(x)
        p.grad = g
        out.append(p)
    return out


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """The names of a Llama's matrices, nine to a layer, so that the groups are those of such a model."""
    kinds = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "attn_norm", "mlp_norm")
    return [(f"layers.{i // len(kinds)}.{kinds[i % len(kinds)]}.weight", p) for i, p in enumerate(params)]


def steps(count: int, ranks: int) -> dict[str, Callable[[], object]]:
    """What is timed."""
    from metaadamw_fast import MetaAdamW

    def ours(sharded: bool, **options: Any) -> Callable[[], object]:
        return MetaAdamW(named(parameters(count, ranks, sharded)), **options).step

    sums = torch.randn(count, 5, dtype=torch.float64)
    theirs: dict[str, Callable[[], object]] = {}
    if count <= MOST_FOR_TORCH:
        theirs = {
            BASE: torch.optim.AdamW(parameters(count, ranks, True), fused=True).step,
            "AdamW(foreach=True)": torch.optim.AdamW(parameters(count, ranks, True), foreach=True).step,
        }
    return theirs | {
        "MetaAdamW": ours(True),
        "MetaAdamW, lagged": ours(True, statistics="lagged"),
        "MetaAdamW, nothing sharded": ours(False),
        "all-reduce": lambda: dist.all_reduce(sums),
    }


def collectives(step: Callable[[], object]) -> list[int]:
    """Bytes of each collective that a call makes."""
    found: list[int] = []
    run = dist.all_reduce

    def recorded(x: Tensor, *args: Any, **options: Any) -> object:
        found.append(x.nbytes)
        return run(x, *args, **options)

    dist.all_reduce = recorded
    try:
        step()
    finally:
        dist.all_reduce = run
    return found


def measure(rank: int, ranks: int, counts: list[int], rounds: int, directory: str) -> None:
    """One rank; rank 0 writes the results."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    results = {}
    for count in counts:
        torch.manual_seed(rank)
        sides = steps(count, ranks)
        for _ in range(3):
            for step in sides.values():
                step()
        sent = {name: collectives(sides[name]) for name in ("MetaAdamW", "MetaAdamW, lagged")}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        order, shuffle = list(sides), random.Random(0).shuffle
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                dist.barrier()
                begin = time.perf_counter()
                sides[name]()
                seconds[name].append(time.perf_counter() - begin)
        base = BASE if BASE in sides else "MetaAdamW"
        results[count] = {
            name: {
                "ms": 1e3 * Spread.of(times).median,
                "ratio": asdict(Spread.of([a / b for a, b in zip(times, seconds[base], strict=True)])),
                "collectives": sent.get(name),
            }
            for name, times in seconds.items()
        }
    if rank == 0:
        Path(directory, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--tensors", type=int, nargs="+", default=[291, 10_000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (options.ranks, options.tensors, options.rounds, directory)
        mp.start_processes(measure, arguments, nprocs=options.ranks, start_method="spawn")
        results = json.loads(Path(directory, "results.json").read_text())
    for count, sides in results.items():
        print(f"\n{count} tensors of {ELEMENTS} elements on each of {options.ranks} ranks")
        for name, row in sides.items():
            ratio, sent = row["ratio"], row["collectives"]
            note = "" if sent is None else f"   {len(sent)} collective of {', '.join(f'{x:,}' for x in sent)} bytes"
            print(f"  {name:28} {row['ms']:9.3f} ms  {ratio['median']:6.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]{note}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
