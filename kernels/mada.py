"""MADA's rule: the arithmetic of csrc/mada.h, operation by operation. docs/mada.md has the formulas and what each letter is."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import PARAM, quotient, square_root, storage_type
from .engine import Rule

# The operands: g, m, p, V, A, n, l, the last gradient and the other one. Only m, p and V are in every launch.
EXP_AVG, EXP_AVG_SQ, AVERAGE_SQ, EXP_AVG_DIFF, LION_EXP_AVG, LAST_GRAD, OTHER_GRAD = 1, 3, 4, 5, 6, tl.constexpr(7), 8

# The vectors are two halves of these rows: the update to come, and the one before it, from whose scalars the derivatives are made.
ROWS_OF_HALF = 21
STEP_SIZE, DECAY_FACTOR, STEP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BETA1, BETA2, BETA3, RHO, C, GAMMA = (tl.constexpr(3 + i) for i in range(6))
EPS, GRAD_SCALE, LAST_SCALE = (
    tl.constexpr(9),
    tl.constexpr(10),
    tl.constexpr(11),
)  # the factors of this gradient and of the last one
CORRECTION1, CORRECTION2, SLOPE1, SLOPE2 = (tl.constexpr(12 + i) for i in range(4))  # 1 - beta^t, and t beta^(t-1) / its square
LION1, LION2 = tl.constexpr(16), tl.constexpr(17)
TURN = tl.constexpr(18)  # the update's number since the table was made
FLAGS = tl.constexpr(19)
UNCLIPPED = tl.constexpr(20)  # the factor of this gradient without clipping, which only the policy reads

KEEPS, FIRST = tl.constexpr(1), tl.constexpr(2)  # d = g - the last gradient; there is none yet
LOOKS_BACK = tl.constexpr(4)  # Lion's order: u from l before the step
MAXIMUM = tl.constexpr(8)  # A is the maximum
SIGN_IN_V = tl.constexpr(16)  # which stores the bit of section 4, else A
V_STARTS, N_STARTS = tl.constexpr(32), tl.constexpr(64)  # V before the update counts as 1e-15, n as g²
TWO = tl.constexpr(128)  # gradient buffers
STARTS_AT_REST = tl.constexpr(256)  # of the policy alone: FIRST is to be set where a tensor has no last update


@triton.jit
def _number(column, rows, vector: tl.constexpr):
    return tl.load(column + vector * rows)


@triton.jit
def _with_complement(x, arithmetic: tl.constexpr):
    """X and 1 - x, each rounded once."""
    return x.to(arithmetic), (1.0 - x).to(arithmetic)


@triton.jit
def _magnitude(x):
    return tl.where(x < 0.0, x * -1.0, x)


@triton.jit
def _with_sign(x, negative):
    return tl.where(negative, x * -1.0, x)  # not -x, which Triton makes 0 - x, and -0 of 0 would be lost


@triton.jit
def _sign(x):
    """0 of 0 and of NaN."""
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)


# -------------------------------------------------------------------------------------------------------- the update, section 3


@triton.jit
def _fold(column, rows, arithmetic: tl.constexpr):
    """Rounded once, as `MADA::scalars` in csrc/mada.h."""
    scales = (_number(column, rows, GRAD_SCALE).to(arithmetic), _number(column, rows, LAST_SCALE).to(arithmetic))
    beta1 = _number(column, rows, BETA1)
    lerp_from_grad = beta1 < 0.5
    momentum = (lerp_from_grad, tl.where(lerp_from_grad, beta1, 1.0 - beta1).to(arithmetic))
    betas = _with_complement(_number(column, rows, BETA2), arithmetic)
    betas += _with_complement(_number(column, rows, BETA3), arithmetic)
    mixture = _with_complement(_number(column, rows, C), arithmetic)
    mixture += _with_complement(_number(column, rows, RHO), arithmetic)
    mixture += _with_complement(_number(column, rows, GAMMA), arithmetic)
    lion = _with_complement(_number(column, rows, LION1), arithmetic)
    lion += _with_complement(_number(column, rows, LION2), arithmetic)
    corrections = (
        (1.0 / _number(column, rows, CORRECTION1)).to(arithmetic),
        (1.0 / tl.sqrt(_number(column, rows, CORRECTION2))).to(arithmetic),
    )
    step = (
        _number(column, rows, STEP).to(arithmetic),
        _number(column, rows, STEP_SIZE).to(arithmetic),
        _number(column, rows, DECAY_FACTOR).to(arithmetic),
        _number(column, rows, EPS).to(arithmetic),
    )
    flags = tl.load(column + FLAGS * rows).to(tl.int64)
    return scales, momentum, betas, mixture, lion, corrections, step, flags


@triton.jit
def _mada(x, scalars, kind: tl.constexpr):
    grad, m, p, v, a, n, lion_exp_avg, last_grad, other_grad = x
    scales, momentum, betas, mixture, lion, corrections, of_step, flags = scalars
    grad_scale, last_scale = scales
    lerp_from_grad, momentum_weight = momentum
    beta2, beta2_complement, beta3, beta3_complement = betas
    c, c_complement, rho, rho_complement, gamma, gamma_complement = mixture
    lion1, lion1_complement, lion2, lion2_complement = lion
    inverse_correction1, inverse_sqrt_correction2 = corrections
    step, step_size, decay_factor, eps = of_step

    last = other_grad
    if storage_type(kind, LAST_GRAD) is not None:  # the other gradient is then not read, only overwritten
        last = last_grad
    g = grad * grad_scale
    difference = tl.where((flags & FIRST) != 0, 0.0, g - last * last_scale)
    d = tl.where((flags & KEEPS) != 0, difference, g)
    ahead = g + beta3 * d
    squared = ahead * ahead
    v = tl.where((flags & V_STARTS) != 0, tl.full([], 1e-15, g.dtype), _magnitude(v))
    n = tl.where((flags & N_STARTS) != 0, g * g, n)
    a = _magnitude(a)
    sigma = (squared > v).to(g.dtype) - (squared < v).to(g.dtype)
    kappa = c + c_complement * sigma

    kept = tl.where(c_complement == 0.0, 0.0, c_complement * v)  # 0 times an infinite v would be NaN, and with it the parameter
    v = beta2 * v + beta2_complement * (kappa * squared + kept)
    start = tl.where(lerp_from_grad, g, m)
    end = tl.where(lerp_from_grad, m, g)
    m = start + momentum_weight * (end - start)
    n = beta3 * n + beta3_complement * d
    largest = tl.where((a >= v) | (a != a), a, v)  # NaN if either is, as torch.maximum
    a = tl.where((flags & MAXIMUM) != 0, largest, a + quotient(v - a, step))
    before = lion_exp_avg
    lion_exp_avg = lion2 * before + lion2_complement * g
    u = lion1 * tl.where((flags & LOOKS_BACK) != 0, before, lion_exp_avg) + lion1_complement * g

    mixed = tl.where(rho_complement == 0.0, v, rho * v + rho_complement * a)
    denominator = square_root(mixed) * inverse_sqrt_correction2 + eps
    r = quotient(m * inverse_correction1 + beta3 * n, denominator)
    update = tl.where(gamma == 0.0, 0.0, gamma * r) + gamma_complement * _sign(u)
    p = decay_factor * p - step_size * update

    sign_in_v = (flags & SIGN_IN_V) != 0
    v = _with_sign(v, sign_in_v & (sigma < 0.0))
    a = _with_sign(a, (sign_in_v == 0) & (sigma < 0.0))
    return grad, m, p, v, a, n, lion_exp_avg, last_grad, grad


# ------------------------------------------------------------------------------------------------- the derivatives, section 4


@triton.jit
def _fold_measured(column, rows, arithmetic: tl.constexpr):
    """As `_fold`, of the update before, as `MADA::derivative_scalars` in csrc/mada.h."""
    scales = (_number(column, rows, GRAD_SCALE).to(arithmetic), _number(column, rows, LAST_SCALE).to(arithmetic))
    rho = _number(column, rows, RHO)
    c = _number(column, rows, C)
    beta1 = _number(column, rows, BETA1)
    beta2_complement = 1.0 - _number(column, rows, BETA2)
    correction1 = _number(column, rows, CORRECTION1)
    correction2 = _number(column, rows, CORRECTION2)
    mixture = _with_complement(c, arithmetic)
    mixture += _with_complement(rho, arithmetic)
    betas = (
        beta2_complement.to(arithmetic),
        _number(column, rows, BETA3).to(arithmetic),
        (1.0 / (1.0 - beta2_complement * c)).to(arithmetic),
        (1.0 / (beta1 * correction1)).to(arithmetic),
        (rho * beta2_complement / correction2).to(arithmetic),
    )
    corrections = (
        (1.0 / correction1).to(arithmetic),
        (1.0 / tl.sqrt(correction2)).to(arithmetic),
        (1.0 / correction2).to(arithmetic),
        _number(column, rows, SLOPE1).to(arithmetic),
        _number(column, rows, SLOPE2).to(arithmetic),
    )
    lion = _with_complement(_number(column, rows, LION1), arithmetic)
    lion2 = _number(column, rows, LION2)
    lion += ((1.0 - lion2).to(arithmetic), (1.0 / lion2).to(arithmetic))
    rest = (_number(column, rows, GAMMA).to(arithmetic), _number(column, rows, EPS).to(arithmetic))
    return scales, betas, mixture, corrections, lion, rest, tl.load(column + FLAGS * rows).to(tl.int64)


@triton.jit
def _term(x, scalars, column: tl.constexpr):
    """Of Σg², and Σg·D for the derivatives D of the last update by beta1, beta2, beta3, rho, c and gamma."""
    grad, m, _, stored_v, stored_a, n, lion_exp_avg, last_grad, other_grad = x
    if column == 0:
        return grad * grad
    else:
        scales, betas, mixture, corrections, lion, rest, flags = scalars
        grad_scale, last_scale = scales
        beta2_complement, beta3, inverse_a, inverse_beta1_correction1, rho_by_correction2 = betas
        c, c_complement, rho, rho_complement = mixture
        inverse_correction1, inverse_sqrt_correction2, inverse_correction2, slope1, slope2 = corrections
        lion1, lion1_complement, lion2_complement, inverse_lion2 = lion
        gamma, eps = rest

        two = (flags & TWO) != 0
        g = tl.where(two, last_grad, other_grad) * grad_scale
        difference = tl.where(two & ((flags & FIRST) == 0), g - other_grad * last_scale, 0.0)
        d = tl.where((flags & KEEPS) != 0, difference, g)
        v = _magnitude(stored_v)
        a = _magnitude(stored_a)
        sigma = tl.where(tl.where((flags & SIGN_IN_V) != 0, stored_v, stored_a) < 0.0, -1.0, 1.0).to(g.dtype)
        ahead = g + beta3 * d
        squared = ahead * ahead
        kappa = c + c_complement * sigma
        v_before = (v - beta2_complement * (kappa * squared)) * inverse_a
        mixed = tl.where(rho_complement == 0.0, v, rho * v + rho_complement * a)
        root = square_root(mixed) * inverse_sqrt_correction2
        r = quotient(m * inverse_correction1 + beta3 * n, root + eps)
        by_m = quotient(gamma, root + eps)
        by_root = tl.where(root > 0.0, quotient(by_m * r * -1.0, 2.0 * root), 0.0)
        if column == 1:
            return grad * (by_m * ((m - g) * inverse_beta1_correction1 + m * slope1))
        elif column == 2:
            return grad * (by_root * (rho * (c * v_before - kappa * squared) * inverse_correction2 + mixed * slope2))
        elif column == 3:
            of_v = by_root * rho_by_correction2 * kappa * (2.0 * ahead * d)
            return grad * (by_m * (2.0 * n - d) + of_v)
        elif column == 4:
            return grad * (by_root * (v - a) * inverse_correction2)
        elif column == 5:
            return grad * (by_root * rho_by_correction2 * (squared * (1.0 - sigma) - v_before))
        else:
            old = (lion_exp_avg - lion2_complement * g) * inverse_lion2
            u = lion1 * tl.where((flags & LOOKS_BACK) != 0, old, lion_exp_avg) + lion1_complement * g
            return grad * (r - _sign(u))


_OF_ROOT = (0, EXP_AVG, EXP_AVG_SQ, AVERAGE_SQ, EXP_AVG_DIFF, LAST_GRAD.value, OTHER_GRAD)
MADA = Rule(
    operands=(
        "grads",
        "exp_avgs",
        "params",
        "exp_avg_sqs",
        "average_sqs",
        "exp_avg_diffs",
        "lion_exp_avgs",
        "last_grads",
        "previous_grads",
    ),
    written=(EXP_AVG, PARAM.value, EXP_AVG_SQ, AVERAGE_SQ, EXP_AVG_DIFF, LION_EXP_AVG, OTHER_GRAD),
    rounded=(EXP_AVG, PARAM.value, EXP_AVG_SQ, EXP_AVG_DIFF, LION_EXP_AVG),
    vectors=2 * ROWS_OF_HALF,
    fold=_fold,
    formula=_mada,
    sum_operands=((0,), *(5 * (_OF_ROOT,)), (*_OF_ROOT, LION_EXP_AVG)),
    term=_term,
    found=(7,),
    left=(),
    zeros=(AVERAGE_SQ, EXP_AVG_DIFF, LION_EXP_AVG, LAST_GRAD.value, OTHER_GRAD),
    plain=1,
    measured=ROWS_OF_HALF,
    fold_measured=_fold_measured,
    of_gradient=True,
    exchanged=(LAST_GRAD.value, OTHER_GRAD, TURN.value),
)
