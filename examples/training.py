"""One training run with AdamW, MetaAdamW or MADA, and what it measured."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from tasks import Task, batches
from torch import nn

from metaadamw_fast import MADA, MetaAdamW, MetaLearner
from metaadamw_fast.grouping import Group

ADAMW_ARGUMENTS = ("lr", "betas", "eps", "weight_decay", "amsgrad")


@dataclass
class ScaleHistory:
    """The scales of every group, as each step used them; `lr` and `wd` are lists of [G] lists."""

    groups: list[Group]
    lr: list[list[float]] = field(default_factory=list)
    wd: list[list[float]] = field(default_factory=list)


@dataclass
class Run:
    """Results of one run. Losses and accuracies are those of the reported part, times seconds."""

    eval_steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    optimizer_times: list[float] = field(default_factory=list)
    meta_times: list[float] = field(default_factory=list)
    scales: ScaleHistory | None = None  # of MetaAdamW
    coefficients: list[list[float]] | None = None  # of MADA, [6] after each step

    @property
    def step_time(self) -> float:
        """Median time of a training step: zero_grad, forward, backward, optimizer."""
        return median(self.step_times)

    @property
    def optimizer_share(self) -> float:
        """Part of a step that the optimizer takes, 0 to 1."""
        return median(self.optimizer_times) / self.step_time

    @property
    def meta_cost(self) -> float | None:
        """Time of one meta-update in training steps, or None where there was none."""
        return median(self.meta_times) / self.step_time if self.meta_times else None

    @property
    def training_time(self) -> float:
        """All steps and meta-updates, without evaluation, each counted with its median time.

        A plain sum would mostly tell what else the machine was doing.
        """
        meta_time = len(self.meta_times) * median(self.meta_times) if self.meta_times else 0.0
        return len(self.step_times) * self.step_time + meta_time


@torch.no_grad()
def evaluate(task: Task, model: nn.Module) -> tuple[float, float]:
    """Loss and, for classification, accuracy over the reported part."""
    model.eval()
    inputs, targets = task.reported
    loss = correct = 0.0
    for rows in torch.arange(len(inputs)).split(256):
        batch = inputs[rows], targets[rows]
        loss += task.loss_fn(model, batch).item() * len(rows)
        if task.is_classification:
            correct += (model(batch[0]).argmax(dim=1) == batch[1]).sum().item()
    model.train()
    return loss / len(inputs), correct / len(inputs)


def train(task: Task, name: str, seed: int, on_step: Callable[[], object]) -> Run:
    """Train a fresh model of `task` with optimizer `name`; `on_step` is called after each step.

    The seed fixes the initial model, the batch order and the dropout masks. Nothing that only
    MetaAdamW does may disturb these, so its extra batches come from generators of their own.
    """
    torch.manual_seed(seed)
    model = task.make_model().train()
    total_steps = task.epochs * task.steps_per_epoch
    meta: MetaLearner | None = None
    optimizer: torch.optim.Optimizer
    if name == "MetaAdamW":
        optimizer = MetaAdamW(
            model.named_parameters(),
            model=model,
            total_steps=total_steps,
            seed=seed,
            **task.optimizer,
        )
        meta = MetaLearner(optimizer, model, task.loss_fn, **task.learner)
    else:
        shared = {key: task.optimizer[key] for key in ADAMW_ARGUMENTS if key in task.optimizer}
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **shared)
        if name == "MADA":
            # It starts as this AdamW; torch's default for beta2, .999, is above MADA's default bound.
            start = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
            optimizer = MADA(model.parameters(), bounds={"beta2": (0.501, 0.9999)}, **start)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)

    training_batches = batches(task.train, task.batch_size, seed)
    meta_batches = batches(task.train, task.batch_size, seed + 1_000_000)
    validation_batches = batches(task.meta_validation, task.batch_size, seed + 2_000_000)

    run = Run()
    if meta:
        run.scales = ScaleHistory(optimizer.groups)
        after_step = meta.every(task.meta_every, meta_batches, validation_batches)
    if name == "MADA":
        run.coefficients = []
    evaluation_interval = max(1, task.steps_per_epoch // task.evaluations_per_epoch)
    for step in range(1, total_steps + 1):
        batch = next(training_batches)
        start = perf_counter()
        optimizer.zero_grad()
        task.loss_fn(model, batch).backward()
        before_optimizer = perf_counter()
        optimizer.step()
        end = perf_counter()
        run.step_times.append(end - start)
        run.optimizer_times.append(end - before_optimizer)
        if task.cosine:
            schedule.step()

        if run.coefficients is not None:
            run.coefficients.append(optimizer.coefficients[0].tolist())
        if meta:
            run.scales.lr.append(optimizer.lr_scale.tolist())
            run.scales.wd.append(optimizer.wd_scale.tolist())
            start = perf_counter()
            if after_step() is not None:
                run.meta_times.append(perf_counter() - start)
        if step % evaluation_interval == 0 or step == total_steps:
            loss, accuracy = evaluate(task, model)
            run.eval_steps.append(step)
            run.losses.append(loss)
            run.accuracies.append(accuracy)
        on_step()
    return run
