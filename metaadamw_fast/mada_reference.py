"""MADA's ops in plain eager PyTorch: oracle, documentation, and the fallback where nothing faster runs.

Ozkara et al., *MADA*, arXiv 2401.08893 (2024). Sections are those of docs/mada.md; its symbols are the names here: ``m``, ``V``,
``A``, ``n``, ``l`` are the states, ``g`` is the gradient after unscaling and clipping, ``d`` its difference to that of the step
before. Nothing is decided by the host: what differs from tensor to tensor are 0-dim tensors on the device.

The lists of an update, by position (:class:`Lists`), have T tensors each. A list may be None and an entry may have no elements: the
operand then counts as zeros, and nothing is stored. An absent gradient leaves its row alone. A launch has checked them.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import _sum, _write, _Writer, arithmetic_dtype, start_of_update

COEFFICIENTS = ("beta1", "beta2", "beta3", "rho", "c", "gamma")  # the order of all tensors of six columns
SUMS = ("grad_sq", *COEFFICIENTS)  # Σg⁺² and Σg⁺·∂U/∂θ_i, of the raw new gradient g⁺


class Flags(enum.IntFlag):
    """How an update differs from the plain one; a row of :class:`Half` holds the sum of those that are set."""

    KEEPS = 1  # d = g - g₋; else d = g
    FIRST = 2  # no gradient of a step before is known: d = 0, with KEEPS
    LOOKS_BACK = 4  # u is formed from l before the update
    MAXIMUM = 8  # A is the maximum of V, as amsgrad's
    SIGN_IN_V = 16  # the bit of section 4 is the sign of V; else of A
    V_STARTS = 32  # V before the update counts as 1e-15
    N_STARTS = 64  # n before the update counts as g²
    TWO = 128  # there are two buffers of gradients: Lists.last_grads is given
    STARTS_AT_REST = 256  # of mada_policy_ alone: FIRST is to be set where there was no update


class Half(NamedTuple):
    """What the elements of a tensor share in one update: the rows of a half of the vectors, float64 [H, T]; or one column of it.

    Attributes:
        step: 0 leaves the tensor alone.
        grad_scale: what unscaling, clipping and maximizing multiply the gradient with; last_scale: the one of the gradient before.
        k1, k2: 1 - beta^step. slope1, slope2: step·beta^(step-1)/k², the derivative of -1/k by beta.
        turn: updates since the lists were made. Where it is odd, the two buffers of gradients have changed roles.
        unclipped: grad_scale without the clipping: that of the gradient from which the update before is learned.
    """

    step_size: Tensor
    decay_factor: Tensor
    step: Tensor
    beta1: Tensor
    beta2: Tensor
    beta3: Tensor
    rho: Tensor
    c: Tensor
    gamma: Tensor
    eps: Tensor
    grad_scale: Tensor
    last_scale: Tensor
    k1: Tensor
    k2: Tensor
    slope1: Tensor
    slope2: Tensor
    lion1: Tensor
    lion2: Tensor
    turn: Tensor
    flags: Tensor
    unclipped: Tensor

    def has(self, flag: Flags) -> Tensor:
        """Whether it is set, bool."""
        return (self.flags.long() & int(flag)) != 0

    def of(self, t: int) -> Half:
        """The column of tensor ``t``."""
        return Half(*(x[t] for x in self))


VECTORS = Half._fields
H = len(VECTORS)


class Lists(NamedTuple):
    """The operands of an update, T tensors each, by the numbers that the kernels have for them."""

    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]  # m
    params: Sequence[Tensor] | None
    exp_avg_sqs: Sequence[Tensor] | None  # V
    average_sqs: Sequence[Tensor] | None = None  # A
    exp_avg_diffs: Sequence[Tensor] | None = None  # n
    lion_exp_avgs: Sequence[Tensor] | None = None  # l
    last_grads: Sequence[Tensor] | None = None
    previous_grads: Sequence[Tensor] | None = None
    low_precision_params: Sequence[Tensor] | None = None


# ---------------------------------------------------------------------------------------------------- what a row is computed from


class _Row:
    """The states of one tensor in the type of the arithmetic, zeros for those that it lacks.

    The buffers of gradients are read as an update of parity ``exchanged`` finds them: ``last`` is the gradient of the update before
    it, ``before`` the one before that (zeros with a single buffer).
    """

    def __init__(self, lists: Lists, t: int, exchanged: Tensor | None) -> None:
        self._t = t
        self.leader = lists.exp_avgs[t] if lists.params is None else lists.params[t]
        stored = (x for xs in lists[:-1] if (x := _entry(xs, t)) is not None)
        self.arithmetic = arithmetic_dtype(self.leader, *stored)
        self.m, self.v, self.a, self.n, self.lion = (
            self._read(xs)
            for xs in (lists.exp_avgs, lists.exp_avg_sqs, lists.average_sqs, lists.exp_avg_diffs, lists.lion_exp_avgs)
        )
        self.last, self.before = self._read(lists.previous_grads), torch.zeros_like(self.leader, dtype=self.arithmetic)
        if exchanged is not None and lists.last_grads is not None:
            first, second = self._read(lists.last_grads), self.last
            self.last, self.before = torch.where(exchanged, second, first), torch.where(exchanged, first, second)

    def _read(self, xs: Sequence[Tensor] | None) -> Tensor:
        x = _entry(xs, self._t)
        return torch.zeros_like(self.leader, dtype=self.arithmetic) if x is None else x.to(self.arithmetic)


def _entry(xs: Sequence[Tensor] | None, t: int) -> Tensor | None:
    return None if xs is None or not xs[t].numel() else xs[t]


def _odd(x: Tensor) -> Tensor:
    return x.remainder(2) == 1


def _difference(g: Tensor, last: Tensor, h: Half) -> Tensor:
    """The d of section 3, line 1."""
    d = torch.where(h.has(Flags.FIRST), 0.0, g - last * h.last_scale)
    return torch.where(h.has(Flags.KEEPS), d, g)


def _mixed(v: Tensor, a: Tensor, rho: Tensor) -> Tensor:
    return torch.where(rho == 1, v, rho * v + (1 - rho) * a)  # v alone also where a is infinite


# ------------------------------------------------------------------------------------------------------------ the update, section 3


def mada_update_(
    lists: Sequence[Sequence[Tensor] | None], vectors: Tensor, new_sums: Tensor | None = None, rounding_seed: int | None = None
) -> None:
    """One update in place, operation by operation as in section 3.

    Args:
        lists: the ten of :class:`Lists`, or the first of them.
        vectors: float64 [2H, T], of this update and, behind it, of the last one, which only ``new_sums`` need.
        new_sums: float64 [T, 7], gets the sums of what the update finds: those that :func:`mada_sums` made before it, of every row.
        rounding_seed: rounds m, V, n, l and the parameter stochastically. None: to nearest, as A and the gradients always are.
    """
    lists = Lists(*lists)  # type: ignore[arg-type]
    assert lists.params is not None
    this, exchanged = Half(*vectors[:H]), _odd(vectors[VECTORS.index("turn")])
    if new_sums is not None:
        new_sums.copy_(_sums(lists, 2 ** len(SUMS) - 1, Half(*vectors[H:]), exchanged))
    for t, (param, grad) in enumerate(zip(lists.params, lists.grads, strict=True)):
        if not grad.numel():
            continue
        h, x = this.of(t), _Row(lists, t, exchanged[t])
        g = grad.to(x.arithmetic) * h.grad_scale
        d = _difference(g, x.last, h)
        g_hat_sq = (g + h.beta3 * d).square()
        v = torch.where(h.has(Flags.V_STARTS), 1e-15, x.v.abs())
        n = torch.where(h.has(Flags.N_STARTS), g * g, x.n)
        a = x.a.abs()

        sigma = torch.sign(g_hat_sq - v)
        kappa = h.c + (1 - h.c) * sigma
        kept = torch.where(h.c == 1, 0.0, (1 - h.c) * v)  # 0 also where v is infinite
        v = h.beta2 * v + (1 - h.beta2) * (kappa * g_hat_sq + kept)
        m = h.beta1 * x.m + (1 - h.beta1) * g
        n = h.beta3 * n + (1 - h.beta3) * d
        a = torch.where(h.has(Flags.MAXIMUM), torch.maximum(a, v), a + (v - a) / h.step)
        lion = h.lion2 * x.lion + (1 - h.lion2) * g
        u = h.lion1 * torch.where(h.has(Flags.LOOKS_BACK), x.lion, lion) + (1 - h.lion1) * g

        s = (_mixed(v, a, h.rho) / h.k2).sqrt()
        r = (m / h.k1 + h.beta3 * n) / (s + h.eps)
        direction = torch.where(h.gamma == 0, 0.0, h.gamma * r) + (1 - h.gamma) * torch.sign(u)
        low = _entry(lists.low_precision_params, t)
        start = param if low is None else start_of_update(param, low)
        p = h.decay_factor * start.to(x.arithmetic) - h.step_size * direction

        falling, in_v = sigma < 0, h.has(Flags.SIGN_IN_V)
        skip = h.step == 0
        write = _Writer(skip, None if rounding_seed is None else (rounding_seed, h.step, t), param)
        for operand, value in (
            (1, m), (2, p), (3, torch.where(falling & in_v, -v, v)), (5, n), (6, lion)
        ):  # fmt: skip
            stored = _entry(lists[operand], t)
            if stored is not None:
                write(stored, value, operand)
        average = _entry(lists.average_sqs, t)
        if average is not None:
            _write(average, torch.where(falling & ~in_v, -a, a), skip)
        _keep_gradient(lists, t, grad, exchanged[t], skip)
        if low is not None:
            low.copy_(torch.where(skip, low, param.to(low.dtype)))


def _keep_gradient(lists: Lists, t: int, grad: Tensor, exchanged: Tensor, skip: Tensor) -> None:
    """The raw gradient over the one of the update before the last; over the last one where a single buffer is kept."""
    other, last = _entry(lists.previous_grads, t), _entry(lists.last_grads, t)
    if other is not None:
        _write(other, grad, skip if last is None else skip | exchanged)
    if last is not None:
        _write(last, grad, skip | ~exchanged)


# ------------------------------------------------------------------------------------------------------- the derivatives, section 4


def mada_sums(lists: Sequence[Sequence[Tensor] | None], columns: int, dtype: torch.dtype, vectors: Tensor | None = None) -> Tensor:
    """Sums [T, S] of the new gradients with what the last update left: the columns of ``SUMS`` that ``columns`` has a bit for.

    Args:
        lists: the ten of :class:`Lists`, or the first of them.
        dtype: of the result.
        vectors: float64 [H, T], of the last update; None will do for column 0. ``turn`` is the one that the last update had.

    The row of an absent gradient is 0. Of a tensor that was never updated (``step`` 0) the columns behind the first mean nothing.
    """
    lists = Lists(*lists)  # type: ignore[arg-type]
    half = None if vectors is None else Half(*vectors)
    return _sums(lists, columns, half, None if half is None else _odd(half.turn + 1)).to(dtype)


def _sums(lists: Lists, columns: int, last: Half | None, exchanged: Tensor | None) -> Tensor:
    """As :func:`mada_sums`, float64, with the buffers of gradients as an update of parity ``exchanged`` finds them."""
    chosen = [column for column in range(len(SUMS)) if columns >> column & 1]
    rows = []
    for t, (grad, m) in enumerate(zip(lists.grads, lists.exp_avgs, strict=True)):
        if not grad.numel():
            rows.append(m.new_zeros(len(chosen), dtype=torch.float64))
            continue
        x = _Row(lists, t, None if exchanged is None else exchanged[t])
        new = grad.to(x.arithmetic)
        along = [new]
        if chosen != [0]:
            if last is None:
                raise RuntimeError("the derivatives need the vectors of the last update")
            along += _derivatives(x, last.of(t), lists.last_grads is not None)
        rows.append(torch.stack([_sum(new * along[column]) for column in chosen]))
    if not rows:
        return torch.zeros(0, len(chosen), dtype=torch.float64)
    return torch.stack(rows)


def _derivatives(x: _Row, h: Half, two: bool) -> list[Tensor]:
    """∂U/∂θ_i, elementwise, for the six coefficients: line by line section 4, from the state that the update left."""
    g = x.last * h.grad_scale
    # With a single buffer the gradient before is gone. Then KEEPS goes with a beta3 that stays 0, and d is not needed.
    d = _difference(g, x.before, h) if two else torch.where(h.has(Flags.KEEPS), 0.0, g)
    sigma = torch.where(torch.where(h.has(Flags.SIGN_IN_V), x.v, x.a) < 0, -1.0, 1.0).to(g)
    m, v, a, n, lion = x.m, x.v.abs(), x.a.abs(), x.n, x.lion
    b = 1 - h.beta2
    g_hat = g + h.beta3 * d
    kappa = h.c + (1 - h.c) * sigma
    v_before = (v - b * (kappa * g_hat.square())) / (1 - b * h.c)
    mixed = _mixed(v, a, h.rho)
    s = (mixed / h.k2).sqrt()
    r = (m / h.k1 + h.beta3 * n) / (s + h.eps)
    p_factor = h.gamma / (s + h.eps)
    q_factor = torch.where(s > 0, -(p_factor * r) / (2 * s), 0.0)
    along_beta1 = p_factor * ((m - g) / (h.beta1 * h.k1) + m * h.slope1)
    along_beta2 = q_factor * (h.rho * (h.c * v_before - kappa * g_hat.square()) / h.k2 + mixed * h.slope2)
    along_beta3 = p_factor * (2 * n - d) + q_factor * (h.rho * b / h.k2) * kappa * (2 * g_hat * d)
    along_rho = q_factor * (v - a) / h.k2
    along_c = q_factor * (h.rho * b / h.k2) * (g_hat.square() * (1 - sigma) - v_before)
    lion = torch.where(h.has(Flags.LOOKS_BACK), (lion - (1 - h.lion2) * g) / h.lion2, lion)
    along_gamma = r - torch.sign(h.lion1 * lion + (1 - h.lion1) * g)
    return [along_beta1, along_beta2, along_beta3, along_rho, along_c, along_gamma]


# ------------------------------------------------------------------------------------------------------------ the policy, section 5


def mada_policy_(
    sums: Tensor | None,
    coefficients: Tensor,
    momentum: Tensor,
    hyper_gradient: Tensor,
    hyper_sums: Tensor,
    last: Tensor,
    set_of: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    eps: Tensor,
    grad_scale: Tensor | None,
    unclipped: Tensor | None,
    counts: Tensor,
    present: Tensor | None,
    turns: Tensor,
    go: Tensor | None,
    constants: Tensor,
    hyper_clip: float,
    freeze_steps: int,
    lion1: float,
    lion2: float,
    flags: int,
    lagged: bool,
    advance: bool,
) -> Tensor:
    """Learns from the sums and says what the update takes of each tensor: section 5. float64 where nothing else is said.

    Args:
        sums: [T, 7], made with the new gradients; with ``lagged`` those that the last step made. None: nothing is learned.
        coefficients, momentum, hyper_gradient: [K, 6], in place.
        hyper_sums: [T, 6], in place: the sums of the unscaled and unclipped gradients, 0 where a tensor has nothing to teach.
        last: [2, H, T], in place: the halves of the last update and of the one before it. A row ``step`` of 0 says that there was
            none. A tensor that an update passed over has ``step_size`` 0 there.
        set_of: int64 [T], the set of coefficients of each tensor.
        lr, weight_decay, eps, grad_scale, unclipped: [T]; None for 1.
        counts: [T + 1], the steps so far, of each tensor and of the optimizer.
        present: [T], 0 where there is no gradient; None: there is one everywhere.
        turns: [T], row ``turn`` of the update.
        go: 0-dim bool: False changes nothing and has the update leave all tensors alone. None: True.
        constants: [4, 6]: rates, momenta, lower and upper bounds.
        hyper_clip: 0: none.
        flags: those that always hold. V_STARTS and N_STARTS, and FIRST for STARTS_AT_REST, get into the vectors only at a start.
        advance: whether an update follows.

    Returns:
        [2H, T], of this update and of the last one; [2H, 0] without ``advance``.
    """
    rates, momenta, lower, upper = constants.unbind()
    if sums is not None:
        half, factor = Half(*last[1 if lagged else 0]), Half(*last[0]).unclipped if lagged else unclipped
        learned = sums[:, 1:] if factor is None else sums[:, 1:] * factor[:, None]
        learned = torch.where(((half.step == 0) | (half.step_size == 0))[:, None], 0.0, learned)
        h = torch.zeros_like(hyper_gradient).index_add_(0, set_of, -half.step_size[:, None] * learned)
        _update(hyper_sums, learned, go)
        _update(hyper_gradient, h, go)
        h = torch.where(h.isfinite(), h, 0.0)
        if hyper_clip > 0:
            h = h * (hyper_clip / (h.abs() + 1e-6)).clamp(max=1.0)
        thawed = counts[-1] - int(lagged) > freeze_steps
        learns = thawed if go is None else thawed & go
        _update(momentum, momenta * momentum + h, learns)
        _update(coefficients, torch.minimum(torch.maximum(coefficients - rates * momentum, lower), upper), learns)
    if not advance:
        return last.new_empty(2 * H, 0)
    before = last[0].clone()
    this = _half(coefficients.index_select(0, set_of), Half(*before), lr, weight_decay, eps, grad_scale, unclipped, counts[:-1] + 1,
                 turns, lion1, lion2, flags)  # fmt: skip
    passed_over = Half(*before)._replace(step_size=torch.zeros_like(lr), unclipped=this.unclipped)
    kept = this if present is None else Half(*(torch.where(present != 0, x, y) for x, y in zip(this, passed_over, strict=True)))
    _update(last, torch.stack([torch.stack(kept), before]), go)
    if go is not None:
        this = this._replace(step=this.step * go)
    return torch.cat([torch.stack(this), before])


def _update(x: Tensor, value: Tensor, go: Tensor | None) -> None:
    x.copy_(value if go is None else torch.where(go, value, x))


def _half(
    theta: Tensor,
    before: Half,
    lr: Tensor,
    weight_decay: Tensor,
    eps: Tensor,
    grad_scale: Tensor | None,
    unclipped: Tensor | None,
    step: Tensor,
    turns: Tensor,
    lion1: float,
    lion2: float,
    flags: int,
) -> Half:
    """What the elements of each tensor share in update number ``step`` of it, with coefficients [T, 6]."""
    beta1, beta2, beta3, rho, c, gamma = theta.unbind(1)
    one = torch.ones_like(lr)
    k1, k2 = 1 - beta1**step, 1 - beta2**step
    starts = before.step == 0
    always = Flags(flags) & ~(Flags.FIRST | Flags.V_STARTS | Flags.N_STARTS | Flags.STARTS_AT_REST)
    at_first = Flags.FIRST if flags & Flags.STARTS_AT_REST else Flags(0)
    at_start = Flags(flags) & (Flags.V_STARTS | Flags.N_STARTS)
    return Half(
        step_size=lr,
        decay_factor=1 - lr * weight_decay,
        step=step,
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        rho=rho,
        c=c,
        gamma=gamma,
        eps=eps,
        grad_scale=one if grad_scale is None else grad_scale,
        last_scale=before.grad_scale,
        k1=k1,
        k2=k2,
        slope1=step * beta1 ** (step - 1) / k1.square(),
        slope2=step * beta2 ** (step - 1) / k2.square(),
        lion1=lion1 * one,
        lion2=lion2 * one,
        turn=turns,
        flags=int(always) * one + starts * int(at_first) + (starts & (step == 1)) * int(at_start),
        unclipped=one if unclipped is None else unclipped,
    )
