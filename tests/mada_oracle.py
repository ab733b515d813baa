"""MADA by autograd, in float64: another way to the numbers than the one that metaadamw_fast takes.

The library makes hyper-gradients of the state that an update left. Here the state before it is kept, the update is made once more
with coefficients that require a gradient, and autograd differentiates it. Sections are those of docs/mada.md.
"""

from __future__ import annotations

import torch

COEFFICIENTS = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
BOUNDS = {
    "beta1": (0.01, 0.99),
    "beta2": (0.501, 0.99),
    "beta3": (0.0, 0.99),
    "rho": (0.0, 1.0),
    "c": (0.0, 1.0),
    "gamma": (0.0, 1.0),
}
RATES = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}


def updated(state, g, theta, eps, semantics, lions=(0.95, 0.98), maximum=False):
    """The state after an update with gradient ``g``, and the direction U in which it moves the parameter; section 3.

    ``state`` is empty before the first one. Whatever ``theta`` [6] requires a gradient of flows into U, but through A, which
    section 4 holds constant, and through signs, which are flat.
    """
    beta1, beta2, beta3, rho, c, gamma = theta
    zero = torch.zeros_like(g)
    m, n, lion, mean, before = (state.get(name, zero) for name in ("m", "n", "l", "A", "g"))
    v = state.get("V", zero + semantics.v_start)
    t = state.get("t", 0) + 1
    d = g - before if semantics.keeps_gradient else g
    if t == 1 and semantics.starts_at_rest and semantics.keeps_gradient:
        d = zero
    if t == 1 and not semantics.starts_at_rest:
        n = g * g
    squared = (g + beta3 * d) ** 2
    yogi = torch.sign(squared - v) * squared
    v = beta2 * v + (1 - beta2) * (c * squared + (1 - c) * (v + yogi))
    m = m * beta1 + g * (1 - beta1)
    n = n * beta3 + d * (1 - beta3)
    mean = (torch.maximum(mean, v) if maximum else mean + (v - mean) / t).detach()
    moved_lion = lions[1] * lion + (1 - lions[1]) * g
    u = lions[0] * (lion if semantics.lion_looks_back else moved_lion) + (1 - lions[0]) * g
    v_hat = (rho * v + (1 - rho) * mean) / (1 - beta2**t)
    positive = v_hat > 0  # elsewhere the root has no slope, and section 4 says 0
    root = torch.where(positive, torch.where(positive, v_hat, 1.0).sqrt(), 0.0)
    direction = gamma * (m / (1 - beta1**t) + beta3 * n) / (root + eps) + (1 - gamma) * torch.sign(u)
    after = {"m": m, "V": v, "A": mean, "n": n, "l": moved_lion, "g": g}
    return {**{name: x.detach() for name, x in after.items()}, "t": t}, direction


class Oracle:
    """The optimizer, on copies of parameters; ``step`` takes the gradients, None where there is none.

    Args:
        groups: dicts with ``params`` and, where others than the defaults are wanted, ``lr``, ``eps``, ``weight_decay``; they may be
            changed between steps.
        start: six coefficients by name.
        others: as of :class:`metaadamw_fast.MADA`.
    """

    def __init__(self, groups, start, semantics, *, rates=RATES, momenta=None, clip=10.0, freeze_steps=0, bounds=BOUNDS,
                 max_grad_norm=None, per_group=False, maximum=False, lagged=False, sign=1.0, lions=(0.95, 0.98)):  # fmt: skip
        self.groups = [{"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.0, **group} for group in groups]
        self.params = [p.detach().clone() for group in groups for p in group["params"]]
        self.group_of = [k for k, group in enumerate(groups) for _ in group["params"]]
        self.set_of = self.group_of if per_group else [0] * len(self.params)
        self.theta = torch.tensor([[start[name] for name in COEFFICIENTS]] * (max(self.set_of) + 1), dtype=torch.float64)
        self.rates, self.momenta = ([x.get(name, 0.0) for name in COEFFICIENTS] for x in (rates, momenta or {}))
        self.bounds = [{**BOUNDS, **bounds}[name] for name in COEFFICIENTS]
        self.buffer, self.hyper_gradient = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.hyper_sums = torch.zeros(len(self.params), len(COEFFICIENTS), dtype=torch.float64)
        self.semantics, self.clip, self.freeze_steps, self.max_grad_norm = semantics, clip, freeze_steps, max_grad_norm
        self.maximum, self.lagged, self.sign, self.lions = maximum, lagged, sign, lions
        self.states = [{} for _ in self.params]
        self.last = [None] * len(self.params)  # what the last update was made of
        self.updates, self.learned = 0, False

    def _update(self, state, g, theta, eps):
        return updated(state, g, theta, eps, self.semantics, self.lions, self.maximum)

    def measure(self, grads):
        """Section 4: the derivatives of ⟨gradient, U⟩ for each tensor, and of the loss for each set of coefficients."""
        self.hyper_gradient.zero_()
        self.hyper_sums.zero_()
        for t, (grad, last) in enumerate(zip(grads, self.last, strict=True)):
            if grad is None or last is None or last["lr"] == 0.0:
                continue
            theta = last["theta"].clone().requires_grad_()
            _, direction = self._update(last["state"], last["g"], theta, last["eps"])
            (self.hyper_sums[t],) = torch.autograd.grad((self.sign * grad * direction).sum(), theta)
            self.hyper_gradient[self.set_of[t]] -= last["lr"] * self.hyper_sums[t]

    def learn(self):
        """Section 5, one number after the other."""
        if self.updates <= self.freeze_steps:
            return
        for k, row in enumerate(self.hyper_gradient.tolist()):
            for i, h in enumerate(row):
                if self.clip:
                    h *= min(1.0, self.clip / (abs(h) + 1e-6))
                self.buffer[k, i] = self.momenta[i] * self.buffer[k, i] + h
                low, high = self.bounds[i]
                self.theta[k, i] = min(max(float(self.theta[k, i] - self.rates[i] * self.buffer[k, i]), low), high)

    def hyper_update(self, grads):
        self.measure(grads)
        self.learn()
        self.learned = True

    def step(self, grads):
        learns = not self.learned
        if learns:
            self.measure(grads)
        if learns and not self.lagged:
            self.learn()
        norm = sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5
        factor = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
        for t, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            self.last[t] = None
            if grad is None:
                continue
            group, theta = self.groups[self.group_of[t]], self.theta[self.set_of[t]].clone()
            lr, eps, g = float(group["lr"]), group["eps"], self.sign * factor * grad
            self.last[t] = {"state": self.states[t], "g": g, "theta": theta, "lr": lr, "eps": eps}
            self.states[t], direction = self._update(self.states[t], g, theta, eps)
            p.mul_(1 - lr * group["weight_decay"]).sub_(lr * direction)
        if learns and self.lagged:
            self.learn()
        self.updates, self.learned = self.updates + 1, False
