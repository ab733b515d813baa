"""The launch table: everything a kernel must know about T tensors, in one int64 tensor on their device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from metaadamw_fast.launch import Operands, check_operands, leaders, listed, resolved

from .adamw import ADAMW, AVGRAD
from .elements import CHUNK, DTYPE_CODES, FIELDS, STRIDED_KIND
from .mada import MADA
from .online import ONLINE

RULES = {"adamw": ADAMW, "avgrad": AVGRAD, "mada": MADA, "online_adamw": ONLINE}

MaybeTensors = Iterable[Tensor | None]


class LaunchTable:
    """T tensors and their states, checked once and described on the device.

    Args:
        grads: T gradients, not kept alive. None, or one without elements where its momentum has some, is absent: it counts as
            zeros in the statistics and the update leaves the whole row as it is.
        operands: the other lists of the rule in its order, then the low-precision parameters; :mod:`metaadamw_fast.launch` has
            what each is and which may be None.
        written: an update will write the operands, so their elements must not share memory.
        rule: whose operands these are, a key of ``RULES``.

    The elements of a row are walked in the order of the last given of params, else of exp_avgs, in memory. Where all operands are
    dense in that order they are walked flat, else through sizes and strides in the table.

    The table, the tensors until `let_go`, and what the kernels write between programs belong to this object: keep it as long as a
    CUDA graph that captured a launch, and use it on one stream at a time.

    Raises:
        RuntimeError: lists of different lengths, tensors of different shapes or devices, sparse or non-floating tensors, an
            expanded tensor that would be written, an update without a list that it needs, gradient buffers that differ.
    """

    def __init__(self, grads: MaybeTensors, *operands: MaybeTensors | None, written: bool, rule: str = "adamw") -> None:
        self.written, self.rule, self._name = written, RULES[rule], rule
        lists, self._absent = listed(operands, rule)
        self._given = (True, *(tensors is not None for tensors in lists))
        self._operands: Callable[[], Operands] = lambda: lists
        self.tensors = len(leaders(lists))
        self.device = self._absent.device
        self._on_gpu = self.device.type != "cpu"
        self._captured: list[Tensor] = []  # what CUDA graphs copy from at every replay
        # Memory to capture an upload from, allocated now: not every torch can while it captures.
        self._spare = torch.empty(self.tensors, dtype=torch.int64, pin_memory=True) if self._on_gpu else None
        grads, self._copies = resolved(list(grads))
        self._fill(grads)

    # ------------------------------------------------------------------------------------------------------------ construction

    def _fill(self, grads: list[Tensor | None]) -> None:
        """Checks everything, then describes it."""
        mine = self._operands()
        check_operands(mine, [self._absent if x is None else x for x in grads], self._name, written=self.written)
        lists = (grads, *mine)
        rows = [[None if tensors is None else tensors[t] for tensors in lists] for t in range(self.tensors)]
        if any(x is not None and x.is_neg() for row in rows for x in row):
            raise RuntimeError("a tensor is a negative view of its memory: resolve_neg() makes it one of its own")
        # Without elements: either absent, or all of the row is empty and no address matters.
        rows = [[None if x is None or not x.numel() else x for x in row] for row in rows]
        addresses = [[0 if x is None else x.data_ptr() for x in row] for row in rows]
        layouts: list[int] = [1, 2**62] + [1] * len(lists)  # the one of all rows that are walked flat: offset = index
        numels, kinds, layout_of, chunk_rows, first_chunks = [], [], [], [], []
        for t, (row, leader) in enumerate(zip(rows, leaders(mine), strict=True)):
            dimensions = _layout(row, leader)
            kind = sum(DTYPE_CODES[x.dtype] << (4 * i) for i, x in enumerate(row) if x is not None)
            kinds.append(kind if dimensions is None else kind | STRIDED_KIND)
            layout_of.append(0 if dimensions is None else len(layouts))
            if dimensions is not None:
                layouts += [len(dimensions), *(x for dimension in reversed(dimensions) for x in dimension)]
            numels.append(leader.numel())
            first_chunks.append(len(chunk_rows))
            chunk_rows += [t] * max(-(-leader.numel() // CHUNK.value), 1)
        # A row without elements has no operands, so a kernel of its kind would have no types to be compiled for. All that is done
        # for such a row is to write its sums, which the code for any kind does.
        of_float32 = sum(DTYPE_CODES[torch.float32] << (4 * i) for i, tensors in enumerate(lists) if tensors is not None)
        any_kind = max(kinds, default=0) or of_float32
        kinds = [kind or any_kind for kind in kinds]
        self.kinds = tuple(sorted(set(kinds)))
        start_of_layouts = (len(lists) + FIELDS.value) * self.tensors + len(chunk_rows)
        fields = [list(column) for column in zip(*addresses, strict=True)]
        fields += [numels, first_chunks, [self.kinds.index(x) for x in kinds], [start_of_layouts + x for x in layout_of]]
        values = [x for field in fields for x in field] + chunk_rows + layouts

        self.chunks = len(chunk_rows)
        # As they stand in the table; the layout of an absent gradient is that of the last one that was there.
        self._addresses = [row[0] for row in addresses]
        self._layouts = [None if x is None else (x.dtype, x.shape, x.stride()) for x in (row[0] for row in rows)]
        self.table = torch.empty(len(values), dtype=torch.int64, device=self.device)
        self.partials = torch.empty(len(self.rule.sum_operands) * self.chunks, dtype=torch.float64, device=self.device)
        self.tickets = torch.zeros(self.tensors, dtype=torch.int32, device=self.device)
        self._upload(self.table, values)

    def has(self, operand: int) -> bool:
        """Whether a list of this operand of the rule was given."""
        return self._given[operand]

    def check_vector(self, name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
        """Float64, contiguous, of this shape and on the tensors' device; or None."""
        if x is not None and (x.dtype != torch.float64 or x.shape != shape or x.device != self.device or not x.is_contiguous()):
            raise RuntimeError(f"{name} must be a contiguous float64 tensor of shape {list(shape)} on {self.device}")

    # ---------------------------------------------------------------------------------------------------------- from step to step

    def let_go(self, operands: Callable[[], Operands]) -> None:
        """Holds its tensors no longer; see :meth:`metaadamw_fast.launch.CppLaunch.let_go`."""
        self._operands = operands

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step."""
        return [self.table, self.partials, self.tickets]

    def set_gradients(self, grads: MaybeTensors) -> None:
        """Other gradients. Addresses that changed are uploaded; the table is built anew only for other dtypes, shapes or strides.

        While a CUDA graph is captured the addresses are uploaded in any case, so that every replay finds those of its capture.

        Raises:
            RuntimeError: as the constructor; nothing has changed then.
        """
        grads, self._copies = resolved(list(grads))
        if len(grads) != self.tensors:
            self._fill(grads)  # which says what is wrong
            return
        addresses = []
        for g, known, old in zip(grads, self._layouts, self._addresses, strict=True):
            if g is None:
                addresses.append(0)
                continue
            # An absent one without elements comes here, too, in the end: its shape is not the known one.
            if (
                known is None
                or g.dtype != known[0]
                or g.shape != known[1]
                or g.layout is not torch.strided
                or g.stride() != known[2]
            ):
                self._fill(grads)
                return
            address = g.data_ptr()
            if (address != old or address == 0) and g.device != self.device:
                self._fill(grads)
                return
            addresses.append(address)
        if addresses != self._addresses or self._captured or self._capturing():
            self._upload(self.table[: self.tensors], addresses)
            self._addresses = addresses

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
    """Size and all strides of each dimension, outermost first in the leader's memory; None where the row is walked flat.

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
        if dimensions and all(
            x is None or outer == stride * size for x, outer, stride in zip(row, dimensions[-1][1:], strides, strict=True)
        ):
            size *= dimensions.pop()[0]
        dimensions.append((size, *strides))
    flat = (
        all(x is None or stride == 1 for x, stride in zip(row, dimensions[0][1:], strict=True))
        if len(dimensions) == 1
        else not dimensions
    )
    return None if flat else dimensions
