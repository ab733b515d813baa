"""The rules of AdamW and AVGrad: the arithmetic of csrc/adamw.h, operation by operation."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import PARAM, STEP, quotient, square_root, storage_type
from .engine import Rule

EXP_AVG, EXP_AVG_SQ, MAXIMUM = 1, 3, tl.constexpr(4)  # AVGrad has its mean in the place of the maximum


# ----------------------------------------------------------------------------------------------------- what both have in common


@triton.jit
def scalars_of(column, rows, arithmetic: tl.constexpr):
    """Rounded once, as `AdamW::scalars` in csrc/adamw.h."""
    step_size = tl.load(column).to(arithmetic)
    decay_factor = tl.load(column + rows).to(arithmetic)
    step = tl.load(column + STEP * rows).to(arithmetic)
    beta1 = tl.load(column + 3 * rows)
    beta2 = tl.load(column + 4 * rows)
    lerp_from_grad = beta1 < 0.5
    momentum_weight = tl.where(lerp_from_grad, beta1, 1.0 - beta1).to(arithmetic)
    beta2_complement = (1.0 - beta2).to(arithmetic)
    inverse_sqrt_bias_correction2 = tl.load(column + 5 * rows).to(arithmetic)
    eps = tl.load(column + 6 * rows).to(arithmetic)
    grad_scale = tl.load(column + 7 * rows).to(arithmetic)
    of_moments = (grad_scale, lerp_from_grad, momentum_weight, beta2.to(arithmetic), beta2_complement)
    return of_moments, (step_size, decay_factor, inverse_sqrt_bias_correction2, eps), step


@triton.jit
def moments(grad, m, v, scalars):
    """Both, as `AdamW::moments`."""
    grad_scale, lerp_from_grad, momentum_weight, beta2, beta2_complement = scalars
    g = grad * grad_scale
    start = tl.where(lerp_from_grad, g, m)
    end = tl.where(lerp_from_grad, m, g)
    return start + momentum_weight * (end - start), beta2 * v + beta2_complement * g * g


@triton.jit
def parameter(p, m, second, scalars):
    """As `AdamW::moved`."""
    step_size, decay_factor, inverse_sqrt_bias_correction2, eps = scalars
    denominator = square_root(second) * inverse_sqrt_bias_correction2 + eps
    return decay_factor * p - quotient(step_size * m, denominator)


@triton.jit
def term_of_adamw(x, _, column: tl.constexpr):
    """Of Σg², Σg·m, Σm², Σp², Σv², and the numbers of non-zeros of g and m: the columns of csrc/adamw.h."""
    g, m, p, v, _ = x
    if column == 0:
        return g * g
    elif column == 1:
        return g * m
    elif column == 2:
        return m * m
    elif column == 3:
        return p * p
    elif column == 4:
        return v * v
    elif column == 5:
        return (g != 0).to(g.dtype)
    else:
        return (m != 0).to(m.dtype)


# --------------------------------------------------------------------------------------------------------------------- AdamW


@triton.jit
def _adamw(x, scalars, kind: tl.constexpr):
    grad, m, p, v, maximum = x
    of_moments, of_parameter, _ = scalars
    m, v = moments(grad, m, v, of_moments)
    largest = v
    if storage_type(kind, MAXIMUM) is not None:
        largest = tl.where((maximum >= v) | (maximum != maximum), maximum, v)  # NaN if either is, as torch.maximum
    return grad, m, parameter(p, m, largest, of_parameter), v, largest


ADAMW = Rule(
    operands=("grads", "exp_avgs", "params", "exp_avg_sqs", "max_exp_avg_sqs"),
    written=(EXP_AVG, PARAM.value, EXP_AVG_SQ, MAXIMUM.value),
    rounded=(EXP_AVG, PARAM.value, EXP_AVG_SQ),
    vectors=8,
    fold=scalars_of,
    formula=_adamw,
    sum_operands=((0,), (0, 1), (1,), (2,), (3,), (0,), (1,)),
    term=term_of_adamw,
    found=(5,),
    left=(3, 4),
)


# -------------------------------------------------------------------------------------------------------------------- AVGrad


@triton.jit
def _avgrad(x, scalars, kind: tl.constexpr):
    """AdamW whose denominator is of A, the mean of v over all steps: MADA section 7."""
    grad, m, p, v, mean = x
    of_moments, of_parameter, step = scalars
    m, v = moments(grad, m, v, of_moments)
    mean = mean + quotient(v - mean, step)
    return grad, m, parameter(p, m, mean, of_parameter), v, mean


# A is not rounded stochastically. The only sum is that of clipping.
AVGRAD = ADAMW._replace(
    operands=(*ADAMW.operands[: MAXIMUM.value], "average_sqs"),
    formula=_avgrad,
    sum_operands=((0,),),
    found=(),
    left=(),
)
