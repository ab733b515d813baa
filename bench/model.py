"""How long a kernel should take on a GPU: a small model of memory, issue slots, waves and launches, to hold against measurements.

It takes of a kernel what the compiler's report and the SASS tell (`Resources`, `warp.Loop`) and of a GPU what its data sheet and
published measurements tell (`GPU`). Each formula stands once, with its reason. Nothing here was measured on a GPU by this project.

"gpu-benches" below is github.com/RRZE-HPC/gpu-benches at 1038c5d, whose folders hold the output of streaming kernels at all
occupancies, of pointer chasing and of small kernels on an A100 of 40 and of 80 GB, an H100 PCIe, a GH200 and an H200.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from bench.warp import Loop

SCHEDULERS = 4  # of a multiprocessor, each issuing one instruction a cycle to a warp of 32: sm_80, sm_90, sm_100


@dataclass(frozen=True)
class GPU:
    """A GPU, by its data sheet."""

    name: str
    device: str  # how torch.cuda.get_device_name() begins
    architecture: str
    multiprocessors: int
    bandwidth: float  # bytes per second, of the data sheet
    clock: float  # Hz; the data sheet's float32 rate divided by 2 flops, lanes and multiprocessors
    idle_latency: float  # seconds of one load from memory with nothing else under way
    ceiling: float  # of the bandwidth, that the best kernel which reads and writes reaches
    saturating: int  # bytes of loads in flight on a multiprocessor that CUB wants
    shared: int  # bytes of shared memory on a multiprocessor


# Idle latencies: 552 cycles at 1.41 GHz and 688 at 1.98 (gpu-benches/gpu-latency, A100 and GH200). Ceilings: the triads of
# gpu-benches/gpu-stream on the A100s, the H100 PCIe and, for the H200, the GH200. For the B200 no such figures were found: it has
# the GH200's latency and the H100's ceiling here. Saturating: arch_to_min_bytes_in_flight in CUB's tuning_transform.cuh, which says
# 16 KiB for A100, 32 for H100, 48 for H200, 64 for B200. The model does not use it; that the two agree is a test. Shared memory:
# CUDA C++ Programming Guide, technical specifications.
GPUS = (
    GPU("A100 40GB", "NVIDIA A100-SXM4-40GB", "8.0", 108, 1.555e12, 1.41e9, 552 / 1.41e9, 0.88, 16 << 10, 164 << 10),
    GPU("A100 80GB", "NVIDIA A100-SXM4-80GB", "8.0", 108, 2.039e12, 1.41e9, 552 / 1.41e9, 0.88, 16 << 10, 164 << 10),
    GPU("H100 SXM", "NVIDIA H100 80GB HBM3", "9.0", 132, 3.35e12, 1.98e9, 688 / 1.98e9, 0.90, 32 << 10, 228 << 10),
    GPU("H200", "NVIDIA H200", "9.0", 132, 4.8e12, 1.98e9, 688 / 1.98e9, 0.94, 48 << 10, 228 << 10),
    GPU("B200", "NVIDIA B200", "10.0", 148, 8.0e12, 1.965e9, 688 / 1.98e9, 0.90, 64 << 10, 228 << 10),
)

# From the end of a kernel to the beginning of the next in a stream, and in a CUDA graph: 3.8 and 3.4 us a kernel of 2.9 us
# ("Getting Started with CUDA Graphs", NVIDIA's blog, on a V100).
GAP, GRAPH_GAP = 0.9e-6, 0.5e-6
# A kernel of a few thousand elements by itself. In a graph an H200 takes 1.3 us for one of 64 KiB (gpu-benches/gpu-small-kernels),
# 0.8 without the gap; an operation of the encoder, a small matrix product or a softmax, is taken to last twice that: an estimate.
SMALL = 1.6e-6

# ------------------------------------------------------------------------------------------------------------ the formulas


@dataclass(frozen=True)
class Resources:
    """What a block of a kernel takes of a multiprocessor."""

    threads: int
    registers: int
    shared: int

    def resident(self, gpu: GPU) -> int:
        """Blocks that a multiprocessor holds at once: CUDA's occupancy rules for sm_80 to sm_100.

        65,536 registers, handed to warps by the 256; 2,048 threads; 32 blocks; 1 KiB of shared memory goes to each block besides.
        """
        warps = self.threads // 32
        by_registers = 65_536 // (-(-self.registers * 32 // 256) * 256 * warps)
        return min(by_registers, 2_048 // self.threads, gpu.shared // (self.shared + 1_024), 32)


def loaded_latency(gpu: GPU, share: float, stores: float) -> float:
    """Seconds that a load takes when the memory moves ``share`` of its bandwidth, of which the part ``stores`` is written.

    Waiting grows as in a queue, with s / (1 - s). How steeply was fitted to gpu-benches/gpu-stream: reading, scaling and triad with
    256 to 2,048 threads a multiprocessor on four GPUs, bandwidth by Little's law (bytes in flight = bandwidth · latency). The mean
    error of the 56 bandwidths is 4 %, the largest 17 %.
    """
    return gpu.idle_latency + (0.08e-6 + 0.32e-6 * stores) * share / (1 - share)


def rounds_per_cycle(warps: float, held: float, alone: float) -> float:
    """Times around the loop that the ``warps`` of one scheduler make together in a cycle.

    Each holds the scheduler's busiest unit ``held`` cycles a time, and alone would take ``alone`` cycles. Mean value analysis of a
    closed network with one queue (Reiser and Lavenberg 1980): a warp that arrives finds the queue of a network with one warp less.
    """
    elsewhere, queue, rate = max(alone - held, 0.0), 0.0, 0.0
    count = max(math.ceil(warps), 1)
    for n in range(1, count + 1):
        here = held * (1 + queue)
        rate = n / (here + elsewhere)
        queue = rate * here
    return rate * warps / count  # where the schedulers do not all have the same number of warps


@dataclass(frozen=True)
class Work:
    """A kernel as the model sees it."""

    loop: Loop
    resources: Resources
    loaded: int  # bytes of each element that are read
    stored: int  # and written
    fixed: float  # cycles of a block outside of its loop

    @property
    def bytes(self) -> int:
        """Moved for each element."""
        return self.loaded + self.stored

    @property
    def group(self) -> int:
        """Elements that a block takes in one time around."""
        return self.resources.threads * self.loop.elements

    def share(self, gpu: GPU, blocks: float, multiprocessors: int, elements: float) -> float:
        """Of the bandwidth, with ``blocks`` resident on each of so many multiprocessors, and ``elements`` in a block.

        What the warps ask for falls with the latency, and the latency grows with what they get: the point where both agree.
        """
        rounds = max(elements / self.group, 1.0)
        full = min(elements / self.group, 1.0)
        warps = blocks * self.resources.threads / 32 / SCHEDULERS
        held = max(self.loop.held(gpu.architecture).values())
        moved = 32 * self.loop.elements * self.bytes * full * SCHEDULERS * multiprocessors * gpu.clock
        low, high = 0.0, gpu.ceiling
        for _ in range(30):
            share = (low + high) / 2
            cycles = loaded_latency(gpu, share, self.stored / self.bytes) * gpu.clock
            alone = self.loop.period(64 * round(cycles / 64)) + self.fixed / rounds
            asked = moved * rounds_per_cycle(warps, held, alone) / gpu.bandwidth
            low, high = (share, high) if asked > share else (low, share)
        return low

    @functools.cache  # noqa: B019 -- of a few dozen kernels
    def seconds(self, gpu: GPU, blocks: int, elements: int) -> float:
        """One launch of so many equal blocks, without the gap before it: full waves, then one that does not fill the GPU.

        The blocks of a wave begin and end together here; in truth they drift apart, and the last wave overlaps with the one before.
        """
        each = elements / blocks
        resident = self.resources.resident(gpu)
        full, rest = divmod(blocks, resident * gpu.multiprocessors)

        def wave(count: int) -> float:
            used = min(count, gpu.multiprocessors)
            share = self.share(gpu, count / used, used, each)
            return count * each * self.bytes / (share * gpu.bandwidth)

        return (full * wave(resident * gpu.multiprocessors) if full else 0.0) + (wave(rest) if rest else 0.0)

    def saturated_share(self, gpu: GPU, chunk: int) -> float:
        """Of the bandwidth, with full chunks on a full GPU and no end in sight."""
        return self.share(gpu, self.resources.resident(gpu), gpu.multiprocessors, chunk)

    def issue_share(self, gpu: GPU) -> float:
        """Of the issue slots that the kernel would need to move the data sheet's bandwidth. Near 1, instructions are the limit."""
        per_second = gpu.bandwidth / self.bytes * self.loop.instructions / 32
        return per_second / (SCHEDULERS * gpu.multiprocessors * gpu.clock)


# ------------------------------------------------------------------------------------------------ torch.optim.AdamW(fused=True)


def torch_launches(numels: list[int]) -> int:
    """Kernels of one step: the update of chunks of 65,536 elements, and the step counts.

    The arguments of a launch hold 252 tensors and 2,240 chunks where torch is built with CUDA 13 (MultiTensorApply.cuh).
    """
    tensors = chunks = launches = 0
    for numel in numels:
        tensors, left = tensors + 1, -(-numel // 65_536)
        while chunks + left >= 2_240:
            launches, left = launches + 1, left - (2_240 - chunks)
            tensors, chunks = int(left > 0), 0
        chunks += left
        if tensors == 252:
            launches, tensors, chunks = launches + 1, 0, 0
    return launches + (chunks > 0) + -(-len(numels) // 770)
