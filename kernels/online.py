"""AdamW's rule with what online learning needs: the arithmetic of csrc/online.h, operation by operation."""

from __future__ import annotations

import triton
import triton.language as tl

from .adamw import ADAMW, EXP_AVG_SQ, moments, parameter, scalars_of, term_of_adamw
from .elements import PARAM, quotient, square_root, storage_type

AVERAGE, MAXIMUM = 4, tl.constexpr(5)
DECAY_ROW = tl.constexpr(ADAMW.vectors)  # the average's; behind it three of the update before


@triton.jit
def _fold(column, rows, arithmetic: tl.constexpr):
    average_weight = (1.0 - tl.load(column + DECAY_ROW * rows)).to(arithmetic)
    return scalars_of(column, rows, arithmetic), average_weight


@triton.jit
def _online(x, scalars, kind: tl.constexpr):
    grad, m, p, v, average, maximum = x
    of_adamw, average_weight = scalars
    of_moments, of_parameter, _ = of_adamw
    m, v = moments(grad, m, v, of_moments)
    largest = v
    if storage_type(kind, MAXIMUM) is not None:
        largest = tl.where((maximum >= v) | (maximum != maximum), maximum, v)  # NaN if either is, as torch.maximum
    p = parameter(p, m, largest, of_parameter)
    return grad, m, p, v, average + average_weight * (p - average), largest


@triton.jit
def _fold_measured(column, rows, arithmetic: tl.constexpr):
    """Of the update before: 1 / (1 - beta1^k), 1 / sqrt(1 - beta2^k), eps; 0 first where the tensor did not move."""
    inverse_correction1 = tl.load(column).to(arithmetic)
    inverse_sqrt_correction2 = tl.load(column + rows).to(arithmetic)
    return inverse_correction1, inverse_sqrt_correction2, tl.load(column + 2 * rows).to(arithmetic)


@triton.jit
def _direction(m, v, maximum, scalars):
    inverse_correction1, inverse_sqrt_correction2, eps = scalars
    largest = tl.where((maximum >= v) | (maximum != maximum), maximum, v)
    return quotient(m * inverse_correction1, square_root(largest) * inverse_sqrt_correction2 + eps)


@triton.jit
def _term(x, scalars, column: tl.constexpr):
    """AdamW's; then those of the direction u of the update before and of the distance p - average; the non-zeros: csrc/online.h."""
    g, m, p, v, average, maximum = x
    if column < 5:
        return term_of_adamw((g, m, p, v, v), scalars, column)
    elif column == 5:
        return g * _direction(m, v, maximum, scalars)
    elif column == 6:
        return g * p
    elif column == 7:
        u = _direction(m, v, maximum, scalars)
        return u * u
    elif column == 8:
        return _direction(m, v, maximum, scalars) * p
    elif column == 9:
        return g * (p - average)
    elif column == 10:
        return (p - average) * (p - average)
    else:
        return term_of_adamw((g, m, p, v, v), scalars, column - 6)


_DIRECTION = (1, 3, MAXIMUM.value)
ONLINE = ADAMW._replace(
    operands=(*ADAMW.operands[:AVERAGE], "ema_params", ADAMW.operands[AVERAGE]),
    written=(*ADAMW.written[: ADAMW.written.index(EXP_AVG_SQ) + 1], AVERAGE, MAXIMUM.value),
    vectors=ADAMW.vectors + 4,
    fold=_fold,
    formula=_online,
    sum_operands=(
        *ADAMW.sum_operands[:5],
        (0, *_DIRECTION),
        (0, PARAM.value),
        _DIRECTION,
        (PARAM.value, *_DIRECTION),
        (0, PARAM.value, AVERAGE),
        (PARAM.value, AVERAGE),
        *ADAMW.sum_operands[5:],
    ),
    term=_term,
    found=(5, 7, 9, 11, 13),
    zeros=(AVERAGE, MAXIMUM.value),
    plain=5,
    measured=3,
    fold_measured=_fold_measured,
)
