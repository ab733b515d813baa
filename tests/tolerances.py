"""Every tolerance of the test suite, with its reason."""

import torch

# The golden numbers are float32 results of other code in another order of operations; a float64 implementation agrees with their
# steps within 5e-7 relative and with their meta-updates within 3e-6, but for a small difference of two losses (9e-5).
GOLDEN_STEP = {"rtol": 1e-5, "atol": 1e-7}
GOLDEN_META = {"rtol": 1e-4, "atol": 1e-6}

# Five steps on from a checkpoint, on another processor: torch's products there differ in their last bits, which the scales (near 1)
# take on as 1e-7. A parameter stored in bfloat16 may then be the neighbour of what it was: 2^-7 of it at most.
CONTINUED = {"rtol": 1e-5, "atol": 1e-7}
CONTINUED_BFLOAT16 = {"rtol": 2.0**-7, "atol": 0.0}

# Features are roots and means of sums of a few hundred squares: a dozen roundings (6e-8 and 1.1e-16 each), but for variances and
# cosines, whose terms (of size 1 to 10 in the tests) cancel to the absolute bound.
FLOAT32_FEATURES = {"rtol": 1e-6, "atol": 2e-6}
FLOAT64_FEATURES = {"rtol": 3e-15, "atol": 3e-15}

# ------------------------------------------------------------------------------------------------------ the multi-tensor ops
#
# Bounds, not estimates: the number of roundings times the largest error of one (u, half an epsilon) times the size of what is
# rounded. Products of two errors are below 1e-5 of the whole and are covered by SECOND_ORDER. The float64 oracle makes as many
# roundings of its own, so each count is multiplied by u of the arithmetic plus u of float64.
SECOND_ORDER = 1 + 1e-5
_U64 = 2.0**-53


def unit_roundoff(dtype):
    """The largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def sum_bound(size_of_terms, numel, arithmetic, result):
    """|error| of a sum in `tensor_stats`. `size_of_terms` is the sum of the absolute values of its terms.

    A term goes through the rounding of its product and at most 64 additions (16 lanes share a block of 1024), all in the
    arithmetic type; then through float64 additions, in the oracle too, of which there are fewer than elements; and the total is
    rounded once to the result.
    """
    return ((1 + 64) * unit_roundoff(arithmetic) + 2 * numel * _U64 + unit_roundoff(result)) * size_of_terms * SECOND_ORDER


def bias_correction_bound(beta, step):
    """Relative error of 1 - beta^step in float64, on both sides together.

    Repeated squaring doubles the relative error of its base each time, so beta^step is off by up to (step - 1)u; the oracle's pow
    by 2u. The subtraction turns both into an error of that times beta^step / (1 - beta^step), and adds u of its own.
    """
    power = beta**step
    return ((step + 1) * power / (1 - power) + 2) * _U64


def update_bounds(p, g, m, v, new_v, h, arithmetic):
    """|error| of the parameter, both moments and the maximum that `adamw_update_` computes, before they are stored.

    Args:
        p, g, m, v: what the update starts from, in float64.
        new_v: the exact second moment (with amsgrad the maximum) that it divides by. It must be 0 or far from underflow.
        h: numbers.
        arithmetic: float32 or float64.
    """
    u = unit_roundoff(arithmetic) + _U64
    underflow = 4 * torch.finfo(arithmetic).smallest_normal * torch.finfo(arithmetic).eps  # of each product, at most
    g = g.abs() * abs(h.grad_scale)  # 2u: the factor, the product
    # m + (1 - beta1)(g - m), from the heavier end: weight, difference, product and sum, each of at most this size; and 2u of g.
    size_of_m = h.beta1 * m.abs() + (1 - h.beta1) * g
    m_bound = 6 * u * size_of_m
    # beta2*v + (1 - beta2)*g*g: the constant, two products, the sum, and 4u of g*g. No term is negative.
    v_bound = 8 * u * (h.beta2 * v + (1 - h.beta2) * g * g)
    # Numerator: 6u of m, 2u of the step size, its product. Denominator: 4u of v under the root, u of the root, at most 2.5u of the
    # bias correction, its product, and the sum (eps loses less). Then the division, the subtraction. The plain formula of
    # reference.py has one rounding more above and one fewer below: torch's own root is off by up to 2u.
    bias1, bias2 = 1 - h.beta1**h.step, 1 - h.beta2**h.step
    size_of_update = abs(h.step_size) / bias1 * size_of_m / ((new_v / bias2).sqrt() + h.eps)
    powers = bias_correction_bound(h.beta1, h.step) + bias_correction_bound(h.beta2, h.step) / 2
    p_bound = ((9 + 9.5 + 2) * u + powers) * size_of_update + 3 * u * (
        h.decay_factor * p
    ).abs()  # decay: constant, product, subtraction
    return [x * SECOND_ORDER + underflow for x in (p_bound, m_bound, v_bound, v_bound)]


def avgrad_bounds(p, g, m, v, a, new_v, new_a, h, arithmetic):
    """As `update_bounds`, of an update that divides by the mean A of the second moments; the last bound is that of A.

    Args:
        a, new_a: the mean before the update, and exactly after it. The latter is 0 or far from underflow.
        new_v: the exact second moment.
    """
    p_bound, m_bound, v_bound, _ = update_bounds(p, g, m, v, new_a, h, arithmetic)
    u = unit_roundoff(arithmetic) + _U64
    # A + (V - A)/t: the error of V, then 3u of the quotient (the difference, t, the division), which is no larger than V/t or A/t,
    # and u of the sum.
    a_bound = v_bound / h.step + 3 * u * torch.maximum(new_v, a) / h.step + u * new_a
    # update_bounds has 4u of the second moment under the root; what A's error is relative to A, halved by the root, comes on top.
    bias1, bias2 = 1 - h.beta1**h.step, 1 - h.beta2**h.step
    size_of_m = h.beta1 * m.abs() + (1 - h.beta1) * g.abs() * abs(h.grad_scale)
    size_of_update = abs(h.step_size) / bias1 * size_of_m / ((new_a / bias2).sqrt() + h.eps)
    relative = torch.where(new_a == 0, 0.0, a_bound / (2 * new_a))
    return [p_bound + relative * size_of_update * SECOND_ORDER, m_bound, v_bound, a_bound * SECOND_ORDER]


def stored(bound, exact, storage, arithmetic):
    """A bound after storing the result: half an ulp of the storage more, or half the distance of its subnormal numbers."""
    if storage == arithmetic:
        return bound
    info = torch.finfo(storage)
    u = info.eps / 2
    if arithmetic == torch.float64 and storage.itemsize == 2:
        u += unit_roundoff(torch.float32)  # torch's own conversion goes through float32
    return bound + u * (exact.abs() + bound) + info.smallest_normal * info.eps / 2


# The requirement against torch's encoder, relative to the size of the outputs: the sums are in another order.
ENCODER = {"rtol": 1e-6, "atol": 1e-6}
ENCODER_FLOAT64 = {"rtol": 1e-14, "atol": 1e-14}

# The requirement: 2-norm of the difference to torch.optim.AdamW(foreach=False) after 100 steps, relative to that of the tensor.
REDUCTION = {torch.float32: 1e-6, torch.float64: 1e-13}
# The requirement for folded clipping, likewise, after 50 steps.
CLIPPED = 1e-6
# The requirement for a meta-gradient against a double backward, both in float64, each tensor's 2-norm.
META_GRADIENT = 1e-10
# In float32 the encoder, the model and its two backward passes round some tens of times; measured up to 2.5e-6.
FLOAT32_META_GRADIENT = 1e-5

# The requirement for MADA's golden numbers: relative to the largest entry of each array, coefficients absolute, after up to 160
# updates of other code in another order of operations. Plain float64 is within 3e-13 of them, plain float32 within 3e-6.
GOLDEN_MADA = {torch.float64: 1e-9, torch.float32: 1e-4}
