"""The whole step on a GPU against torch.optim.AdamW: device time, host time, bytes, launches.

    python -m bench.gpu_step --model gpt2-124m [--dtype bfloat16] [--backends cpp triton] [--seconds S] [--profile] [--json FILE]
    python -m bench.gpu_step --optimizer mada ...

Device times are between CUDA events around one step, behind a kernel that keeps the GPU busy until the host has launched
all of it: what the GPU takes, without waiting for Python. Host times are what the call itself takes. A round runs every side once
in a random order; ratios are formed within a round and shown as their median and quartiles. Values are random, never zeros.
Bytes are counted: 36 per float32 element for MetaAdamW against 28 for AdamW, and 40 with clip_grad_norm_ before it.
With bfloat16, MetaAdamW keeps float32 states and torch's fused AdamW bfloat16 ones: it takes no others. Where bench/results has
predictions for the GPU they stand beside the device times, and those that are off by more than 15 % are marked. With --profile the
profiles of whole steps follow (bench/gpu_profile.py).

With --optimizer mada the sides are those of bench/mada.py in float32: MADA, AVGrad, and MADA differentiated by autograd. Their
gradients change from call to call, so that no difference of gradients is 0; that the parameters get them is in the host times.

Longer than 300 lines: the sides, their bytes and the table are one experiment.

`--device cpu` goes through the same code without a GPU, to test it; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import gpu_profile
from bench.mada import ALL_FROZEN, WORDS, AutogradMADA
from bench.predictions import predicted
from bench.shapes import MODELS, named_shapes
from bench.timing import Spread

if TYPE_CHECKING:
    from metaadamw_fast import MetaAdamW

LR, WEIGHT_DECAY = 1e-4, 1e-2
CAN_BE_HELD = 4e9  # bytes of parameters; above, the sides that only repeat others are left out
OFF = 0.15  # a prediction that misses by more is marked
# What is timed of MetaAdamW besides its default step, and what it moves.
VARIANTS: dict[str, dict[str, Any]] = {
    "max_grad_norm": {"max_grad_norm": 0.1},
    "lagged": {"statistics": "lagged"},
    "encoder_graph": {"encoder_graph": True},
}
CLOCK = 1.5e9  # cycles of a GPU in a second, roughly: how long it is kept busy


@dataclass
class Side:
    """One thing that is timed. ``bytes`` per element: read and written, None where not counted."""

    name: str
    call: Callable[[], object]
    bytes: int | None = None


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def sync(self) -> None:
        """Waits until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def host(self, call: Callable[[], object]) -> float:
        """Seconds until the call returns, begun with an idle device."""
        self.sync()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def keep_busy(self, host_seconds: float) -> None:
        """Gives the device work for longer than the host needs for a call that takes it ``host_seconds`` at most."""
        if self.on_gpu:
            torch.cuda._sleep(int(CLOCK * (2 * host_seconds + 1e-4)))

    def device(self, call: Callable[[], object], host_seconds: float) -> float:
        """Seconds that the device takes. ``host_seconds``: what the call takes on the host, at most."""
        if not self.on_gpu:
            return self.host(call)
        self.sync()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.keep_busy(host_seconds)
        first.record()
        call()
        last.record()
        self.sync()
        return first.elapsed_time(last) * 1e-3

    def launches(self, call: Callable[[], object]) -> dict[str, int] | None:
        """How many kernels of each name the call launches; None without a GPU."""
        if not self.on_gpu:
            return None
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            self.sync()
        return {
            e.key: e.count
            for e in profile.key_averages()
            if e.device_type == torch.autograd.DeviceType.CUDA and not e.key.startswith(("Mem", "cuda"))
        }


class Workload:
    """Random parameters and gradients. All sides share the gradients; each optimizer has parameters of its own."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.dtype, self.device = named_shapes(model), dtype, device
        generator = torch.Generator(device).manual_seed(0)
        self.gradients = [self._random(shape, 1e-3, generator) for _, shape in self.shapes]
        self.numel = sum(x.numel() for x in self.gradients)

    def _random(self, shape: tuple[int, ...], size: float, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.device).mul_(size).to(self.dtype)

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Equal ones at every call."""
        generator = torch.Generator(self.device).manual_seed(1)
        named = [(name, torch.nn.Parameter(self._random(shape, 0.02, generator))) for name, shape in self.shapes]
        for (_, p), g in zip(named, self.gradients, strict=True):
            p.grad = g
        return named


def sides_of(workload: Workload, backends: list[str]) -> tuple[list[Side], dict[str, torch.optim.Optimizer]]:
    """Everything that is timed; the first side is what the others are divided by."""
    from metaadamw_fast import MetaAdamW  # here, so that gpu_check can import this file before the extension is built

    low = workload.dtype == torch.bfloat16
    word, state = (2, 4) if low else (4, 4)
    update, statistics = 3 * word + 4 * state, word + state  # p, g, m, v read and p, m, v written; g and m read
    plain = torch.optim.AdamW([p for _, p in workload.parameters()], lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    params = plain.param_groups[0]["params"]

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm=1e30)  # a factor of 1, which torch multiplies with all the same
        plain.step()

    sides = [Side("torch fused", plain.step, 7 * word), Side("clip_grad_norm_ + fused", clip_and_step, 10 * word)]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    everything = word * workload.numel < CAN_BE_HELD
    for backend in backends:

        def make(backend: str = backend, **options: Any) -> MetaAdamW:
            named = workload.parameters()
            options = {"head_init": "xavier", "state_dtype": torch.float32, **options}
            return MetaAdamW(named, lr=LR, weight_decay=WEIGHT_DECAY, backend=backend, **options)

        exact = optimizers[backend] = make()
        sides.append(Side(f"MetaAdamW {backend}", exact.step, update + statistics))
        for name, options in VARIANTS.items() if everything else ():
            moved = update if "lagged" in name else update + statistics
            sides.append(Side(f"MetaAdamW {backend}, {name}", make(**options).step, moved))
        exact.step()  # so that the states are not zero
        sides += parts_of(exact, backend, update, statistics)
    return sides, optimizers


def mada_sides_of(workload: Workload, backends: list[str]) -> tuple[list[Side], dict[str, torch.optim.Optimizer]]:
    """What is timed of MADA and AVGrad; bytes are those of docs/mada.md section 9."""
    from metaadamw_fast import MADA, AVGrad

    optimizers: dict[str, torch.optim.Optimizer] = {}
    generator = torch.Generator(workload.device).manual_seed(2)
    gradients = workload.gradients, [workload._random(shape, 1e-3, generator) for _, shape in workload.shapes]

    def side(name: str, make: Callable[..., torch.optim.Optimizer], words: tuple[int, int] | None, **options: Any) -> Side:
        opt = optimizers[name] = make([p for _, p in workload.parameters()], lr=LR, weight_decay=WEIGHT_DECAY, **options)
        params, turns = opt.param_groups[0]["params"], itertools.cycle(gradients)

        def call() -> None:
            for p, g in zip(params, next(turns), strict=True):
                p.grad = g
            opt.step()

        return Side(name, call, None if words is None else 4 * sum(words))

    sides = [side("torch fused", torch.optim.AdamW, (4, 3), fused=True), side("autograd's MADA", AutogradMADA, None)]
    kinds = {"exact": {}, "lagged": {"statistics": "lagged"}, "frozen": ALL_FROZEN}
    for backend in backends:
        for kind, options in kinds.items():
            sides.append(side(f"MADA {backend}, {kind}", MADA, WORDS[kind], backend=backend, freeze_steps=0, **options))
        sides.append(side(f"AVGrad {backend}", AVGrad, WORDS["AVGrad"], backend=backend))
    return sides, optimizers


def parts_of(opt: MetaAdamW, backend: str, update: int, statistics: int) -> list[Side]:
    """The two launches over all elements, and what is between them, alone."""
    lists = opt._current_states()
    count = len(lists.held.params)
    hyper = [
        torch.full((count,), x, dtype=torch.float64, device=lists.device) for x in (LR, 1 - LR * WEIGHT_DECAY, 9, 0.9, 0.999, 1e-8)
    ]
    vectors = opt._backend.update_vectors(*hyper, None)
    sums = torch.zeros(count, 2, dtype=torch.float64, device=lists.device)
    found = opt.statistics

    @torch.no_grad()
    def encode() -> None:
        opt._encode(found, 1)

    def hold() -> None:
        # Eager PyTorch needs the tensors themselves, which lists hold during a step only. Kernels go on by addresses.
        if backend == "reference":
            lists.hold(opt.state, opt.param_groups)

    @torch.no_grad()
    def write() -> None:
        hold()
        lists.launch.update_(vectors, sums)

    def read() -> None:
        hold()
        lists.launch.tensor_stats(False, False, False, torch.float32)

    return [
        Side(f"{backend}: update alone", write, update),
        Side(f"{backend}: statistics alone", read, statistics),
        Side(f"{backend}: features and encoder alone", encode),
    ]


def copy_bandwidth(clock: Clock, device: torch.device) -> Spread:
    """Bytes per second of a copy, read and written, on buffers far larger than the cache."""
    elements = 2**28 if clock.on_gpu else 2**20
    source, target = (torch.rand(elements, device=device) for _ in range(2))
    return Spread.of([8 * elements / clock.device(lambda: target.copy_(source), 1e-3) for _ in range(20)])


def measure(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    backends: list[str],
    seconds: float,
    profiled: bool = False,
    optimizer: str = "metaadamw",
) -> dict[str, Any]:
    """Times all sides of an optimizer on one model; also takes profiles of MetaAdamW's whole steps if ``profiled``."""
    clock = Clock(device)
    workload = Workload(model, dtype, device)
    bandwidth = copy_bandwidth(clock, device)
    sides, optimizers = (mada_sides_of if optimizer == "mada" else sides_of)(workload, backends)
    for side in sides:
        for _ in range(3):
            side.call()
    slowest = {side.name: max(clock.host(side.call) for _ in range(3)) for side in sides}
    host: dict[str, list[float]] = {side.name: [] for side in sides}
    busy: dict[str, list[float]] = {side.name: [] for side in sides}
    order, shuffle = list(sides), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(busy[sides[0].name]) < 5:
        shuffle(order)
        for side in order:
            busy[side.name].append(clock.device(side.call, slowest[side.name]))
            host[side.name].append(clock.host(side.call))
    expected = predicted(torch.cuda.get_device_name(device) if clock.on_gpu else "cpu", model, str(dtype).removeprefix("torch."))
    rows = []
    for side in sides:
        device_time = Spread.of(busy[side.name])
        base = busy[sides[0].name]
        row: dict[str, Any] = {
            "side": side.name,
            "device_seconds": asdict(device_time),
            "host_seconds": asdict(Spread.of(host[side.name])),
            "ratio": asdict(Spread.of([a / b for a, b in zip(busy[side.name], base, strict=True)])),
        }
        kernels = clock.launches(side.call)
        if kernels is not None:
            row["launches"], row["kernels"] = sum(kernels.values()), kernels
        if side.bytes is not None:
            rate = side.bytes * workload.numel / device_time.median
            row |= {"bytes_per_element": side.bytes, "bytes_per_second": rate, "share_of_copy": rate / bandwidth.median}
        if side.name in expected:
            row["predicted_seconds"] = expected[side.name]
        if profiled and side.name.startswith("MetaAdamW"):
            busy_first = functools.partial(clock.keep_busy, 3 * slowest[side.name])  # the profiler takes its time
            row["profile"] = gpu_profile.profile(side.call, busy_first, clock.sync, clock.on_gpu)
        rows.append(row)
    for name, opt in optimizers.items():
        if not all(bool(p.isfinite().all()) for group in opt.param_groups for p in group["params"]):
            raise RuntimeError(f"{name}: the steps left parameters that are not finite")
    return {
        "model": model,
        "optimizer": optimizer,
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(workload.shapes),
        "parameters": workload.numel,
        "rounds": len(busy[sides[0].name]),
        "copy_bytes_per_second": asdict(bandwidth),
        "rows": rows,
    }


def markdown(table: dict[str, Any]) -> str:
    """One model's table."""
    title = table["dtype"] + (", MADA" if table.get("optimizer") == "mada" else "")
    lines = [
        f"### {table['model']}, {title}: {table['tensors']} tensors, {table['parameters']:,} parameters",
        "",
        f"{table['rounds']} rounds; a copy moves {table['copy_bytes_per_second']['median'] / 1e9:.0f} GB/s.",
        "",
        "| side | device ms | predicted | ratio | quartiles | B/element | GB/s | of copy | launches | host µs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        ratio = row["ratio"]
        counted = ["-"] * 3
        if "share_of_copy" in row:
            counted = [str(row["bytes_per_element"]), f"{row['bytes_per_second'] / 1e9:.0f}", f"{row['share_of_copy']:.0%}"]
        cells = [row["side"], f"{row['device_seconds']['median'] * 1e3:.3f}", prediction(row), f"{ratio['median']:.2f}"]
        cells += [f"[{ratio['q1']:.2f}, {ratio['q3']:.2f}]", *counted, str(row.get("launches", "-"))]
        cells.append(f"{row['host_seconds']['median'] * 1e6:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{gpu_profile.markdown(row['side'], row['profile'])}" for row in table["rows"] if "profile" in row]
    return "\n".join(lines)


def off(row: dict[str, Any]) -> float | None:
    """By how much a measured device time exceeds the predicted one; None without a prediction."""
    return row["device_seconds"]["median"] / row["predicted_seconds"] - 1 if "predicted_seconds" in row else None


def prediction(row: dict[str, Any]) -> str:
    """The predicted milliseconds and how far the measured ones are off, marked if that is much."""
    by = off(row)
    if by is None:
        return "-"
    text = f"{row['predicted_seconds'] * 1e3:.3f} ({by:+.0%})"
    return f"**{text}**" if abs(by) > OFF else text


def main() -> None:
    """Reads the options, measures and prints one table."""
    parser = argparse.ArgumentParser(description="One optimizer step on a GPU, against torch.optim.AdamW(fused=True).")
    parser.add_argument("--model", default="gpt2-124m", choices=list(MODELS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--optimizer", default="metaadamw", choices=["metaadamw", "mada"])
    parser.add_argument("--backends", nargs="+", default=["cpp", "triton"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing")
    parser.add_argument("--profile", action="store_true", help="profiles of whole steps, too")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if options.optimizer == "mada" and options.dtype != "float32":
        parser.error("--optimizer mada: float32 only")
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    table = measure(options.model, dtype, device, options.backends, options.seconds, options.profile, options.optimizer)
    print(markdown(table))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
