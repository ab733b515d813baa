"""The launch table: everything a kernel must know about T tensors, in one int64 tensor on their device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .elements import CHUNK, DTYPE_CODES, FIELDS, STRIDED_KIND

Tensors = Sequence[Tensor]
MaybeTensors = Sequence[Tensor | None]
NAMES = ("grads", "exp_avgs", "params", "exp_avg_sqs", "max_exp_avg_sqs")  # in the order of the operands
OPERANDS = len(NAMES)


class LaunchTable:
    """T tensors and their states, checked once and described on the device.

    Args:
        grads: T gradients. None, or one without elements where its momentum has some, is absent: it counts as zeros in the
            statistics and the update leaves the whole row as it is.
        exp_avgs: T first moments.
        params, exp_avg_sqs: T tensors each, or None for an op that does without.
        max_exp_avg_sqs: T running maxima or None; an entry may be absent as a gradient may: plain AdamW then.
        written: everything but the gradients will be updated, so their elements must not share memory.

    The elements of a row are walked in the order of the last given of params, else of exp_avgs, in memory. Where all operands are
    dense in that order they are walked flat, else through sizes and strides in the table.

    The table, the tensors and what the kernels write between programs belong to this object: keep it as long as a CUDA graph that
    captured a launch, and use it on one stream at a time.

    Raises:
        RuntimeError: lists of different lengths, tensors of different shapes or devices, sparse or non-floating tensors, an
            expanded tensor that would be written.
    """

    def __init__(
        self,
        grads: MaybeTensors,
        exp_avgs: Tensors,
        params: Tensors | None = None,
        exp_avg_sqs: Tensors | None = None,
        max_exp_avg_sqs: MaybeTensors | None = None,
        *,
        written: bool,
    ) -> None:
        self.written = written
        self.exp_avgs, self.params, self.exp_avg_sqs, self.max_exp_avg_sqs = exp_avgs, params, exp_avg_sqs, max_exp_avg_sqs
        self.tensors = len(exp_avgs)
        self.device = exp_avgs[0].device if self.tensors else torch.device("cpu")
        self._on_gpu = self.device.type != "cpu"
        self._captured: list[Tensor] = []  # what CUDA graphs copy from at every replay
        # Memory to capture an upload from, allocated now: during a capture it may not be.
        self._spare = torch.empty(self.tensors, dtype=torch.int64, pin_memory=True) if self._on_gpu else None
        self._fill(grads)

    # ------------------------------------------------------------------------------------------------------------ construction

    def _fill(self, grads: MaybeTensors) -> None:
        """Checks everything, then describes it."""
        lists = (grads, self.exp_avgs, self.params, self.exp_avg_sqs, self.max_exp_avg_sqs)
        leaders = self.exp_avgs if self.params is None else self.params
        for name, tensors in zip(NAMES, lists, strict=True):
            if tensors is not None and len(tensors) != len(leaders):
                leading = NAMES[1 if self.params is None else 2]
                raise RuntimeError(f"{name} has {len(tensors)} tensors, {leading} has {len(leaders)}")
        rows = []
        for t, leader in enumerate(leaders):
            # The leader first: the others are compared with it.
            self._check(NAMES[1 if self.params is None else 2], t, leader, leader)
            row = [None if tensors is None else tensors[t] for tensors in lists]
            rows.append([self._check(name, t, x, leader) for name, x in zip(NAMES, row, strict=True)])

        addresses = [[0 if x is None else x.data_ptr() for x in row] for row in rows]
        layouts: list[int] = [1, 2**62] + [1] * OPERANDS  # the one of all rows that are walked flat: offset = index
        numels, kinds, layout_of, chunk_rows, first_chunks = [], [], [], [], []
        for t, (row, leader) in enumerate(zip(rows, leaders, strict=True)):
            dimensions = _layout(row, leader)
            kind = sum(DTYPE_CODES[x.dtype] << (4 * i) for i, x in enumerate(row) if x is not None)
            kinds.append(kind if dimensions is None else kind | STRIDED_KIND)
            layout_of.append(0 if dimensions is None else len(layouts))
            if dimensions is not None:
                layouts += [len(dimensions), *(x for dimension in reversed(dimensions) for x in dimension)]
            numels.append(leader.numel())
            first_chunks.append(len(chunk_rows))
            chunk_rows += [t] * max(-(-leader.numel() // CHUNK.value), 1)
        self.kinds = tuple(sorted(set(kinds)))
        start_of_layouts = FIELDS.value * self.tensors + len(chunk_rows)
        fields = [list(column) for column in zip(*addresses, strict=True)]
        fields += [numels, first_chunks, [self.kinds.index(x) for x in kinds], [start_of_layouts + x for x in layout_of]]
        values = [x for field in fields for x in field] + chunk_rows + layouts

        self.grads = list(grads)
        self.chunks = len(chunk_rows)
        # As they stand in the table; the layout of an absent gradient is that of the last one that was there.
        self._addresses = [row[0] for row in addresses]
        self._layouts = [None if x is None else (x.dtype, x.shape, x.stride()) for x in (row[0] for row in rows)]
        self.table = torch.empty(len(values), dtype=torch.int64, device=self.device)
        self.partials = torch.empty(7 * self.chunks, dtype=torch.float64, device=self.device)
        self.tickets = torch.zeros(self.tensors, dtype=torch.int32, device=self.device)
        self._upload(self.table, values)

    def _check(self, name: str, t: int, x: Tensor | None, leader: Tensor) -> Tensor | None:
        """The tensor, or None where the row has no such operand."""
        if x is None:
            return None
        if x.layout is not torch.strided:
            raise RuntimeError(f"{name}[{t}] is sparse: only dense tensors are supported")
        if x.device != self.device:
            raise RuntimeError(f"{name}[{t}] is on {x.device}, another device than exp_avgs[0] on {self.device}")
        if x.dtype not in DTYPE_CODES:
            raise RuntimeError(f"{name}[{t}] has dtype {x.dtype}: only float32, float64, bfloat16, float16 are supported")
        if name in ("grads", "max_exp_avg_sqs") and not x.numel():
            return None
        if x.shape != leader.shape:
            raise RuntimeError(f"{name}[{t}] differs in shape from the others: {tuple(x.shape)}, {tuple(leader.shape)}")
        if self.written and name != "grads" and x.numel():
            if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
                raise RuntimeError(f"{name}[{t}] is expanded: several of its elements share one place in memory")
        return x

    def check_vector(self, name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
        """Float64, contiguous, of this shape and on the tensors' device; or None."""
        if x is not None and (x.dtype != torch.float64 or x.shape != shape or x.device != self.device or not x.is_contiguous()):
            raise RuntimeError(f"{name} must be a contiguous float64 tensor of shape {list(shape)} on {self.device}")

    # ---------------------------------------------------------------------------------------------------------- from step to step

    def set_gradients(self, grads: MaybeTensors) -> None:
        """Other gradients. Addresses that changed are uploaded; the table is built anew only for other dtypes, shapes or strides.

        While a CUDA graph is captured the addresses are uploaded in any case, so that every replay finds those of its capture.

        Raises:
            RuntimeError: as the constructor; nothing has changed then.
        """
        if len(grads) != self.tensors:
            raise RuntimeError(f"grads has {len(grads)} tensors, exp_avgs has {self.tensors}")
        addresses = []
        for g, known, old in zip(grads, self._layouts, self._addresses, strict=True):
            if g is None:
                addresses.append(0)
                continue
            if known is None or g.dtype != known[0] or g.shape != known[1] or g.layout is not torch.strided or g.stride() != known[2]:
                return self._fill(grads)
            address = g.data_ptr()
            if (address != old or address == 0) and g.device != self.device:
                return self._fill(grads)
            addresses.append(address)
        if addresses != self._addresses or self._captured or self._capturing():
            self._upload(self.table[: self.tensors], addresses)
            self._addresses = addresses
        self.grads = list(grads)

    def _upload(self, destination: Tensor, values: list[int]) -> None:
        source = torch.tensor(values, dtype=torch.int64)
        if not self._on_gpu:
            destination.copy_(source)
            return
        capturing = self._capturing()
        if capturing and self._spare is not None and len(values) == self.tensors:
            pinned, self._spare = self._spare.copy_(source), None
        else:
            pinned = source.pin_memory()
        # Asynchronous: torch does not reuse pinned memory before copies from it are done.
        destination.copy_(pinned, non_blocking=True)
        if capturing:
            self._captured.append(pinned)
        elif self._spare is None:
            self._spare = torch.empty(self.tensors, dtype=torch.int64, pin_memory=True)

    def _capturing(self) -> bool:
        return self._on_gpu and torch.cuda.is_current_stream_capturing()

    def device_guard(self) -> contextlib.AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self._on_gpu else contextlib.nullcontext()


def _layout(row: list[Tensor | None], leader: Tensor) -> list[tuple[int, ...]] | None:
    """Size and five strides of each dimension, outermost first in the leader's memory; None where the row is walked flat.

    Dimensions of size 1 are dropped, and neighbours merged where every operand allows it: tensors that are transposed or
    channels_last all alike are flat, too.
    """
    if not leader.numel() or all(x is None or x.is_contiguous() for x in row):
        return None
    dimensions: list[tuple[int, ...]] = []
    order = (d for d in range(leader.dim()) if leader.size(d) != 1)
    for d in sorted(order, key=leader.stride, reverse=True):
        size = leader.size(d)
        strides = [0 if x is None else x.stride(d) for x in row]
        if dimensions and all(x is None or outer == stride * size for x, outer, stride in zip(row, dimensions[-1][1:], strides)):
            size *= dimensions.pop()[0]
        dimensions.append((size, *strides))
    flat = all(x is None or stride == 1 for x, stride in zip(row, dimensions[0][1:])) if len(dimensions) == 1 else not dimensions
    return None if flat else dimensions

