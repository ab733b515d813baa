"""The profile of a call on a GPU: the kernels that it launches, how long each takes, the gaps between them, and the host's time.

Everything comes from torch.profiler (kineto). Two runs are traced: one behind a kernel that keeps the GPU busy until the host has
launched everything, so that gaps are the device's own; and one from an idle GPU, where the device also waits for the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

BUSY = "spin_kernel"  # of torch.cuda._sleep


class Launch(NamedTuple):
    """A kernel, copy or fill on the device. Microseconds."""

    name: str
    begin: float
    end: float


def short(name: str) -> str:
    """A kernel's name that fits a table: without return type, namespaces, template arguments and parameters."""
    inner = re.search(r"(\w*Functor\w*|\w+_kernel_cuda|\w+_kernel_impl)", name)  # what an elementwise kernel of torch computes
    plain = re.sub(r"<.*|\(.*", "", name.replace("(anonymous namespace)::", "").removeprefix("void "))
    plain = plain.rpartition("::")[2] or name
    return f"{plain} ({inner[1]})" if inner is not None and inner[1] not in plain else plain


def timeline(launches: Iterable[Launch]) -> dict[str, Any]:
    """Launches by name, in the order in which they come first, with their device time and the gaps before them; and the sums."""
    ordered = sorted(launches, key=lambda launch: launch.begin)
    rows: dict[str, dict[str, Any]] = {}
    busy = gaps = 0.0
    until = None
    for launch in ordered:
        row = rows.setdefault(short(launch.name), {"name": short(launch.name), "count": 0, "device_us": 0.0, "gap_us": 0.0})
        gap = 0.0 if until is None else max(launch.begin - until, 0.0)
        row["count"] += 1
        row["device_us"] += launch.end - launch.begin
        row["gap_us"] += gap
        busy, gaps = busy + launch.end - launch.begin, gaps + gap
        until = launch.end if until is None else max(until, launch.end)
    return {"launches": len(ordered), "busy_us": busy, "gaps_us": gaps, "kernels": list(rows.values())}


def traced(call: Callable[[], object], before: Callable[[], object], sync: Callable[[], object], on_gpu: bool) -> dict[str, Any]:
    """One call under the profiler. ``before`` is called first and not counted."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profile:
        before()
        with torch.profiler.record_function("the call"):
            call()
        sync()
    events = profile.events()
    on_device = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation)
    launches = [Launch(e.name, e.time_range.start, e.time_range.end) for e in on_device if BUSY not in e.name]
    (whole,) = (e for e in events if e.name == "the call" and e.device_type == torch.autograd.DeviceType.CPU)
    host: dict[str, dict[str, Any]] = {}
    for e in events:
        inside = whole.time_range.start <= e.time_range.start and e.time_range.end <= whole.time_range.end
        if e.device_type == torch.autograd.DeviceType.CPU and inside:
            name = "Python and the rest" if e is whole else e.name
            row = host.setdefault(name, {"name": name, "count": 0, "host_us": 0.0})
            row["count"] += 1
            row["host_us"] += e.self_cpu_time_total
    by_time = sorted(host.values(), key=lambda row: -row["host_us"])
    return {**timeline(launches), "host_us": whole.time_range.elapsed_us(), "host": by_time}


def profile(
    call: Callable[[], object], keep_busy: Callable[[], object], sync: Callable[[], object], on_gpu: bool
) -> dict[str, Any]:
    """Both runs, after one that is thrown away: the profiler's first costs more."""
    traced(call, keep_busy, sync, on_gpu)
    return {"queued": traced(call, keep_busy, sync, on_gpu), "idle": traced(call, sync, sync, on_gpu)}


def markdown(name: str, found: dict[str, Any], rows: int = 12) -> str:
    """One side's profile."""
    queued, idle = found["queued"], found["idle"]
    lines = [
        f"#### Profile of {name}",
        "",
        f"{queued['launches']} launches: {queued['busy_us']:.0f} µs of kernels, {queued['gaps_us']:.0f} µs between them"
        f" ({idle['gaps_us']:.0f} µs from an idle GPU, which waits for the host too); {idle['host_us']:.0f} µs on the host,"
        " the profiler's own time included.",
    ]
    if queued["kernels"]:
        lines += ["", "| on the device | launches | µs | µs before | µs before, from idle |", "|---|---|---|---|---|"]
        waits = {row["name"]: row["gap_us"] for row in idle["kernels"]}
        for row in queued["kernels"]:
            times = (row["device_us"], row["gap_us"], waits.get(row["name"], 0.0))
            lines.append(f"| {row['name']} | {row['count']} | {' | '.join(f'{x:.1f}' for x in times)} |")
    lines += ["", "| on the host | calls | µs of its own |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['count']} | {row['host_us']:.1f} |" for row in idle["host"][:rows]]
    return "\n".join(lines)
