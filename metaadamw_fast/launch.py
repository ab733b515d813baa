"""The ops on fixed lists of tensors, of which only the gradients change from call to call.

An optimizer calls the same two ops on the same tensors in every step. A launch makes all checks and, in C++, writes down all
addresses, sizes and strides once, in a table (csrc/table.h); after that a call costs little more than its arithmetic.

Longer than 300 lines: the launches of C++, of plain PyTorch and of FakeTensorMode have the same methods, documented once, here.

All of them take the same arguments, the lists by position, in the order of the rule's operands (csrc/rules.h):

    grads: T gradients. None, or a tensor without elements where its momentum has some, is an absent one: it counts as zeros in the
        statistics, and the update leaves its row alone. Whoever calls holds them until the ops have been called: if a launch
        did, they would outlive `zero_grad` by a whole backward pass.
    exp_avgs: T first moments.
    params, exp_avg_sqs: T tensors each; the update needs both.
    what else the rule has: AdamW max_exp_avg_sqs, None or T running maxima (amsgrad), where None or a tensor without elements
        leaves its tensor plain; AVGrad average_sqs; MADA five lists, of which each may be None: it then counts as zeros; online
        AdamW ema_params, which may be None, too, and max_exp_avg_sqs.
    low_precision_params, the last: T model parameters of bfloat16 or float16 whose float32 masters stand in ``params``; None, or a
        tensor without elements, for a row that has none. The update starts from the master where the parameter is its rounding to
        nearest, else from the parameter, which somebody has written then; it writes the master and, into the parameter, its
        rounding. The statistics are of the master alone: whoever wants them of what others wrote updates the masters first.
    written: whether the update will be called; then no tensors but the gradients may share memory.
    rule: whose update it is, a key of ``RULES``.

Elements are walked in the order of the parameters' memory, or of the first moments' without parameters. Errors are those of the ops
of the same names in :mod:`metaadamw_fast.ops`; nothing has changed then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import mada_reference, online_reference, reference
from .checks import OpList, check_distinct, check_lists, check_low_precision
from .core import devices

OptionalTensors = Iterable[Tensor | None]


Operands = Sequence[list[Tensor] | None]  # the lists of a launch that stay from call to call, in order, low-precision ones last


class RuleLists(NamedTuple):
    """The lists of a rule's operands behind the gradients; the low-precision parameters follow them."""

    names: tuple[str, ...]
    required: frozenset[str] = frozenset({"exp_avgs", "params", "exp_avg_sqs"})  # by an update
    in_some_rows: frozenset[str] = frozenset()  # an entry without elements says that its row has none
    take_turns: tuple[str, ...] = ()  # two that change their roles with every update; the first needs the second


_MOMENTS = ("exp_avgs", "params", "exp_avg_sqs")
RULES = {  # in the order of csrc/rules.h
    "adamw": RuleLists((*_MOMENTS, "max_exp_avg_sqs"), in_some_rows=frozenset({"max_exp_avg_sqs"})),
    "avgrad": RuleLists((*_MOMENTS, "average_sqs"), required=frozenset({*_MOMENTS, "average_sqs"})),
    "mada": RuleLists(
        (*_MOMENTS, "average_sqs", "exp_avg_diffs", "lion_exp_avgs", "last_grads", "previous_grads"),
        take_turns=("last_grads", "previous_grads"),
    ),
    "online_adamw": RuleLists((*_MOMENTS, "ema_params", "max_exp_avg_sqs"), in_some_rows=frozenset({"max_exp_avg_sqs"})),
}
_LOW_PRECISION = "low_precision_params"
_PARAMS = 1
_MAX_DIMS = 16  # csrc/chunks.h
_SAME, _OTHER_ADDRESSES, _OTHER_TABLE, _NEGATIVES = range(4)  # what launch_set_gradients returns; csrc/ops.cpp


def statistics_columns(params: bool, exp_avg_sqs: bool, count_nonzero: bool) -> int:
    """The columns of ``tensor_stats`` as the bits that ``measure`` takes: those of csrc/adamw.h."""
    return 0b111 | params << 3 | exp_avg_sqs << 4 | count_nonzero * 0b1100000


def _filled(tensors: OptionalTensors, absent: Tensor) -> list[Tensor]:
    return [absent if x is None else x for x in tensors]


def listed(operands: Sequence[OptionalTensors | None], rule: str) -> tuple[Operands, Tensor]:
    """The lists of a launch, None where none is given, and the tensor without elements that stands where one is absent."""
    number = len(RULES[rule].names) + 1
    if len(operands) > number:
        raise RuntimeError(f"the rule {rule} has {number} lists besides the gradients, not {len(operands)}")
    lists = [None if xs is None else list(xs) for xs in operands] + [None] * (number - len(operands))
    if lists[0] is None:
        raise RuntimeError("a launch needs exp_avgs")
    absent = next((x for x in lists[0] if x is not None), None)
    absent = torch.empty(0, device="cpu") if absent is None else absent.new_empty(0)
    return [None if xs is None else _filled(xs, absent) for xs in lists], absent


def leaders(operands: Operands) -> list[Tensor]:
    """The tensors in the order of whose memory elements are walked: the parameters, without these the first moments."""
    return (operands[_PARAMS] if operands[_PARAMS] is not None else operands[0]) or []


def check_operands(operands: Operands, grads: Sequence[Tensor], rule: str, *, written: bool) -> None:
    """Checks all lists of a launch.

    Raises:
        RuntimeError: see :mod:`metaadamw_fast.checks`; an update that lacks a list; gradient buffers that differ.
    """
    names, required, in_some_rows, take_turns = RULES[rule]
    missing = [name for name, xs in zip(names, operands, strict=False) if xs is None and name in required]
    if written and missing:
        raise RuntimeError(f"the update needs {' and '.join(missing)}")
    own = [
        OpList(name, xs, written, optional=name in in_some_rows or name == _LOW_PRECISION)
        for name, xs in zip((*names, _LOW_PRECISION), operands, strict=True)
    ]
    leader = own[_PARAMS if operands[_PARAMS] is not None else 0]
    lists = (leader, OpList("grads", grads, optional=True), *(xs for xs in own if xs is not leader))
    check_lists(*lists)
    check_low_precision(operands[_PARAMS], operands[-1])
    check_distinct(*lists)
    both = [operands[names.index(name)] for name in take_turns]
    if both and both[0] is not None:
        first, second = take_turns
        if both[1] is None:
            raise RuntimeError(f"{first} need {second}, with which they take turns")
        for t, (x, y) in enumerate(zip(both[0], both[1], strict=True)):
            if (x.dtype, x.stride()) != (y.dtype, y.stride()):
                raise RuntimeError(f"{first}[{t}] and {second}[{t}] differ in dtype or strides: they take turns")


def resolved(grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients without negative views of their memory, which autograd may return of complex functions.

    Returns:
        All of them, and the copies among them, which nobody else holds.
    """
    out = [x.resolve_neg() if x is not None and x.is_neg() else x for x in grads]
    return out, [y for x, y in zip(grads, out, strict=True) if y is not None and y is not x]


class DeviceCopy:
    """A GPU's copy of a launch table, brought up to date when it has to be.

    Nothing waits for the GPU: the table goes through pinned memory, which is written once and then left alone, since the copy from
    it may be carried out at any later time. In a CUDA graph it is carried out at every replay. So a graph gets a copy of its own,
    which no upload outside of it touches, and this and the pinned memory are kept in ``in_graphs``.

    Args:
        table: int64, on the CPU (csrc/table.h).
        device: the GPU.
        in_graphs: what must live and stay as it is while graphs may be replayed; the launch has it to its end.
    """

    def __init__(self, table: Tensor, device: torch.device, in_graphs: list[tuple[Tensor, Tensor]]) -> None:
        copied_bytes, device_bytes, row_bytes = table[:3].tolist()
        self._table = table[: copied_bytes // 8]
        self._row_words = row_bytes // 8
        self._changed = len(self._table)  # words from the beginning that have changed since they were copied
        self._size, self._device, self._in_graphs = device_bytes // 8, device, in_graphs
        self._capture = 0  # in which the copy was made; 0 outside of any
        self.tensor = torch.empty(self._size, dtype=torch.int64, device=device)
        # In stock, since not every torch can allocate pinned memory in the capture of a graph. Captures that follow without a step
        # outside of them need one that can.
        self._spare: Tensor | None = self._new_spare()

    def _new_spare(self) -> Tensor:
        return torch.empty_like(self._table, pin_memory=self._device.type == "cuda")

    def addresses_changed(self) -> None:
        """Says that the gradients lie elsewhere: the rows, some 100 bytes each, are copied again, the rest of the table is not."""
        self._changed = max(self._changed, self._row_words)

    def current(self) -> Tensor:
        """The copy, int64 on the device: the table and, behind it, room for partial sums."""
        capture = 0
        if devices.capturing(self._device):
            capture = torch.ops.metaadamw_fast.launch_capture.default(self.tensor)
        if capture != self._capture:
            self._capture, self._changed = capture, len(self._table)
            self.tensor = torch.empty(self._size, dtype=torch.int64, device=self._device)
        if self._changed:
            pinned = self._spare if self._spare is not None else self._new_spare()
            words = slice(self._changed)
            pinned[words].copy_(self._table[words])
            self.tensor[words].copy_(pinned[words], non_blocking=True)
            if capture:
                self._in_graphs.append((pinned, self.tensor))
                self._spare = None
            else:
                # torch gives freed pinned memory away again when the copies from it are done.
                self._spare = self._new_spare()
            self._changed = 0
        return self.tensor


class CppLaunch:
    """The C++ ops on the CPU or a CUDA device; see the head of this file.

    A CUDA graph that captured its ops must not be replayed after its end. What is captured are the gradients of that time.
    """

    # The tests replace these to run the CUDA kernels on the CPU.
    namespace = torch.ops.metaadamw_fast
    chunk_size = 0  # elements; 0: that of the device

    def __init__(
        self,
        grads: OptionalTensors,
        *operands: OptionalTensors | None,
        written: bool,
        rule: str = "adamw",
    ) -> None:
        self._rule = rule
        lists, self._absent = listed(operands, rule)
        self._operands: Callable[[], Operands] = lambda: lists
        if any(x.is_neg() for xs in lists for x in xs or ()):
            raise RuntimeError("a tensor is a negative view of its memory: resolve_neg() makes it one of its own")
        self._written = written
        self._in_graphs: list[tuple[Tensor, Tensor]] = []
        # Stand-ins without memory: of a leader only its shape and strides are asked.
        self._many_dims = [
            (t, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
            for t, x in enumerate(leaders(lists))
            if x.dim() > _MAX_DIMS
        ]
        whole, self._copies = resolved(list(grads))
        self._copies += self._copy_many_dims(whole)
        self._make_table(_filled(whole, self._absent))

    def _copy_many_dims(self, grads: list[Tensor | None]) -> list[Tensor]:
        """Replaces the gradients among ``grads`` that a table cannot describe by copies in the order of their parameters.

        A table describes tensors of up to 16 dimensions that cannot be merged. A parameter of more is one run of memory nearly
        always, unless its gradient has another order. Returns the copies.
        """
        copies = []
        for t, leader in self._many_dims:
            grad = grads[t]
            if grad is None or grad.layout is not torch.strided or grad.shape != leader.shape:
                continue  # absent, or refused later
            if grad.stride() != leader.stride():
                copy = torch.empty_strided(leader.shape, leader.stride(), dtype=grad.dtype, device=grad.device)
                grads[t] = copy.copy_(grad)
                copies.append(copy)
        return copies

    def _make_table(self, grads: list[Tensor]) -> None:
        lists = (grads, *self._operands())
        tensors = [x for xs in lists for x in xs or ()]
        lengths = [-1 if xs is None else len(xs) for xs in lists]
        table: Tensor = self.namespace.launch_table.default(
            [*RULES].index(self._rule), tensors, lengths, self._written, self.chunk_size
        )
        self._table = table
        self._device_copy = DeviceCopy(self._table, self._absent.device, self._in_graphs) if self.on_gpu else None

    def let_go(self, operands: Callable[[], Operands]) -> None:
        """Holds its tensors no longer, but asks ``operands`` for them when it needs them: by addresses alone it goes on.

        Whoever takes the tensors over must notice when one of them is replaced, and make another launch then.
        """
        self._operands = operands

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels read a copy of the table."""
        return self._absent.is_cuda

    def set_gradients(self, grads: OptionalTensors) -> None:
        """Takes T other gradients. Cheap if their dtypes and layouts are as before, whatever their addresses.

        Raises:
            RuntimeError: as the constructor; the launch then keeps the gradients that it had.
        """
        listed = list(grads)
        copies = self._copy_many_dims(listed) if self._many_dims else []
        grads = _filled(listed, self._absent)
        outcome = self.namespace.launch_set_gradients.default(self._table, grads)
        if outcome == _NEGATIVES:
            whole, more = resolved(grads)
            copies += more
            grads = _filled(whole, self._absent)
            outcome = self.namespace.launch_set_gradients.default(self._table, grads)
        if outcome == _OTHER_TABLE:
            self._make_table(grads)
        elif outcome == _OTHER_ADDRESSES and self._device_copy is not None:
            self._device_copy.addresses_changed()
        self._copies = copies

    def _copy(self) -> Tensor | None:
        return None if self._device_copy is None else self._device_copy.current()

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step."""
        return [] if self._device_copy is None else [self._device_copy.tensor]

    def tensor_stats(
        self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype, carried: Tensor | None = None
    ) -> Tensor:
        """Sums [T, S] of AdamW, as :func:`metaadamw_fast.ops.tensor_stats`; columns that are not asked for are not read.

        ``carried``, float64 [T, 2], are the columns Σp² and Σv² of a call that asks for neither.
        """
        return self.measure(statistics_columns(params, exp_avg_sqs, count_nonzero), dtype, carried)

    def measure(self, columns: int, dtype: torch.dtype, carried: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """Sums [T, S] of the rule: the columns that ``columns`` has a bit for. What they do not need is not read.

        AdamW's are Σg², Σg·m, Σm², Σp², Σv² and the non-zeros of g and of m, AVGrad's is Σg², MADA's are that and six that need the
        ``vectors`` [H, T] of the update before, online AdamW's are AdamW's and six such ones. ``carried``, float64 [T, C], are the
        columns of what an update left, of a call that asks for none of them.
        """
        sums: Tensor = self.namespace.launch_measure.default(self._table, self._copy(), columns, dtype, carried, vectors)
        return sums

    def update_(
        self,
        vectors: Tensor,
        new_sums: Tensor | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        """Updates in place; see :func:`metaadamw_fast.ops.adamw_update_`.

        ``vectors``, float64 [V, T], absent rows counted, are what the backend's ``update_vectors`` or ``modulation`` returned.
        ``new_sums``, of AdamW only, float64 [T, 2], gets Σp² and Σv² of what the update leaves, in the bits that
        ``tensor_stats(True, True, ...)`` would find now; rows without a gradient, or whose step is 0, keep what it holds.
        Of a wider one ([T, 5] of AdamW, [T, 7] of MADA, [T, 5, 7, 9, 11 or 13] of online AdamW) every row gets the first sums of
        what the update finds, in the bits of a pass before it.
        """
        self.namespace.launch_update_.default(self._table, self._copy(), vectors, new_sums, rounding_seed)


class ReferenceLaunch:
    """Plain eager PyTorch; see the head of this file."""

    def __init__(
        self,
        grads: OptionalTensors,
        *operands: OptionalTensors | None,
        written: bool,
        rule: str = "adamw",
    ) -> None:
        self._rule = rule
        lists, self._absent = listed(operands, rule)
        self._operands: Callable[[], Operands] = lambda: lists
        self._written = written
        self.set_gradients(grads)

    def set_gradients(self, grads: OptionalTensors) -> None:
        """Takes T other gradients.

        Raises:
            RuntimeError: as the constructor; the launch then keeps the gradients that it had.
        """
        grads = _filled(grads, self._absent)
        check_operands(self._operands(), grads, self._rule, written=self._written)
        self._grads = grads

    def let_go(self, operands: Callable[[], Operands]) -> None:
        """As :meth:`CppLaunch.let_go`. The gradients of the last call stay until the next."""
        self._operands = operands

    def kept(self) -> list[Tensor]:
        """As :meth:`CppLaunch.kept`."""
        return []

    def tensor_stats(
        self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype, carried: Tensor | None = None
    ) -> Tensor:
        """As :meth:`CppLaunch.tensor_stats`."""
        return self.measure(statistics_columns(params, exp_avg_sqs, count_nonzero), dtype, carried)

    def measure(self, columns: int, dtype: torch.dtype, carried: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """As :meth:`CppLaunch.measure`. All columns of AdamW's that read neither p nor v are made, whatever is asked."""
        if self._rule == "mada":
            return mada_reference.mada_sums((self._grads, *self._operands()), columns, dtype, vectors)
        if self._rule == "online_adamw":
            lists = online_reference.Lists(self._grads, *self._operands())  # type: ignore[arg-type]
            return online_reference.online_sums(lists, columns, dtype, carried, vectors)
        params, exp_avg_sqs, count_nonzero = (bool(columns >> column & 1) for column in (3, 4, 5))
        exp_avgs, mine, theirs, *_ = self._operands()
        if (params and mine is None) or (exp_avg_sqs and theirs is None):
            raise RuntimeError("the launch was made without the lists of these columns")
        chosen = (mine if params else None, theirs if exp_avg_sqs else None)
        rows = zip(*(x for x in (self._grads, exp_avgs, mine, theirs) if x is not None), strict=True)
        arithmetic = [reference.arithmetic_dtype(*row) for row in rows]  # also of the columns that are not read now
        read = reference.tensor_stats(self._grads, exp_avgs or [], *chosen, count_nonzero, dtype, arithmetic)
        return read[:, :1] if self._rule == "avgrad" else reference.beside(read, carried)

    def update_(
        self,
        vectors: Tensor,
        new_sums: Tensor | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        """As :meth:`CppLaunch.update_`."""
        if not self._written:
            raise RuntimeError("the launch was not made for updates: written=False")
        if self._rule == "mada":
            mada_reference.mada_update_((self._grads, *self._operands()), vectors, new_sums, rounding_seed)
            return
        if self._rule == "online_adamw":
            online = online_reference.Lists(self._grads, *self._operands())  # type: ignore[arg-type]
            online_reference.online_update_(online, vectors, new_sums, rounding_seed)
            return
        exp_avgs, params, exp_avg_sqs, of_v_hat, low = self._operands()
        assert exp_avgs is not None
        assert params is not None
        assert exp_avg_sqs is not None
        lists = (params, self._grads, exp_avgs, exp_avg_sqs, of_v_hat)
        formula = reference.running_maximum if self._rule == "adamw" else reference.running_mean
        step_size, decay_factor, step, beta1, beta2, eps, grad_scale = vectors.unbind()
        hyperparameters = (step_size, decay_factor, step, beta1, beta2, eps, grad_scale)
        reference.adamw_update_(*lists, *hyperparameters, new_sums, rounding_seed, low, formula)


class FakeLaunch:
    """Allocates what the ops return and does nothing else: for tensors without elements, under FakeTensorMode."""

    def __init__(
        self,
        grads: OptionalTensors,
        *operands: OptionalTensors | None,
        written: bool,
        rule: str = "adamw",
    ) -> None:
        lists, absent = listed(operands, rule)
        self._rows, self._device = len(leaders(lists)), absent.device

    def set_gradients(self, grads: OptionalTensors) -> None:
        """As :meth:`CppLaunch.set_gradients`."""

    def let_go(self, operands: Callable[[], Operands]) -> None:
        """As :meth:`CppLaunch.let_go`."""

    def tensor_stats(
        self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype, carried: Tensor | None = None
    ) -> Tensor:
        """As :meth:`CppLaunch.tensor_stats`."""
        return self.measure(statistics_columns(params, exp_avg_sqs, count_nonzero), dtype, carried)

    def measure(self, columns: int, dtype: torch.dtype, carried: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """As :meth:`CppLaunch.measure`."""
        width = columns.bit_count() + (0 if carried is None else carried.shape[1])
        return torch.empty(self._rows, width, dtype=dtype, device=self._device)

    def kept(self) -> list[Tensor]:
        """As :meth:`CppLaunch.kept`."""
        return []

    def update_(self, vectors: Tensor, new_sums: Tensor | None = None, rounding_seed: int | None = None) -> None:
        """As :meth:`CppLaunch.update_`."""
