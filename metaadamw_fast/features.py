"""Statistics of tensors [T, S] to features of groups [G, D]. Pure functions; MetaAdamW section 3.2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .grouping import Member, max_layer

# Columns of the statistics: the two last only with `count_nonzero`.
GRAD_SQUARED, GRAD_MOMENTUM, MOMENTUM_SQUARED, PARAM_SQUARED, SECOND_MOMENT_SQUARED = range(5)
GRAD_NONZERO, MOMENTUM_NONZERO = 5, 6

NORM_FLOOR = 1e-8  # below it a norm counts as this in a cosine
VERSIONS = ("basic", "basic_plus", "enhanced", "norm_basic", "norm_basic_plus")


@dataclass(frozen=True)
class FeatureConfig:
    """What the encoder reads of each group.

    Args:
        version: ``basic`` (mean norms of gradient, momentum, parameter, their cosine), ``basic_plus`` (also standard
            deviations), ``enhanced`` (means, variances, sparsity, size, kind, depth and a learnable group embedding),
            ``norm_basic`` and ``norm_basic_plus`` (standardised over the groups).
        v_norm: also the norm of the second moment; ``enhanced`` has no such column.
        time_step: also the progress of training.
        gating: multiply each column by a learnable sigmoid gate.
        group_embed_dim: width of the group embedding of ``enhanced``.
        dim: width D of a row, zero-padded; None takes the smallest multiple of the head count that holds all columns.
    """

    version: str = "basic"
    v_norm: bool = True
    time_step: bool = True
    gating: bool = False
    group_embed_dim: int = 4
    dim: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on an unknown version or a negative width."""
        if self.version not in VERSIONS:
            raise ValueError(f"Invalid feature version: {self.version!r} (one of {', '.join(VERSIONS)})")
        if self.group_embed_dim < 0 or (self.version == "enhanced" and self.group_embed_dim < 1):
            raise ValueError(f"Invalid group_embed_dim: {self.group_embed_dim}")

    @property
    def enhanced(self) -> bool:
        """Whether sparsity is counted and groups have embeddings."""
        return self.version == "enhanced"

    @property
    def embed_dim(self) -> int:
        """Width of the group embedding: the last columns of a row, 0 unless enhanced."""
        return self.group_embed_dim if self.enhanced else 0

    @property
    def statistic_columns(self) -> int:
        """How many leading columns are statistics (neither t, nor padding, nor embedding)."""
        if self.enhanced:
            return 9
        return (4 + self.v_norm) * (1 + self.deviations)

    @property
    def deviations(self) -> bool:
        """Whether standard deviations stand behind the means."""
        return self.version.endswith("plus")

    @property
    def time_column(self) -> int | None:
        """Where the training progress stands."""
        return self.statistic_columns if self.time_step else None

    @property
    def standardized_columns(self) -> int:
        """How many leading columns the encoder standardises over the groups."""
        return self.statistic_columns if self.version.startswith("norm_") else 0

    def width(self, heads: int) -> int:
        """D, the width of a row for an encoder with this many heads.

        Raises:
            ValueError: ``dim`` is too small for the columns, or not a multiple of ``heads``.
        """
        columns = self.statistic_columns + self.time_step + self.embed_dim
        dim = -(-columns // heads) * heads if self.dim is None else self.dim
        if dim < columns:
            raise ValueError(f"Invalid feature dim: {dim}, {self.version} features need at least {columns}")
        if dim % heads != 0:
            raise ValueError(f"Invalid head count: {heads} heads do not divide the feature dim {dim}")
        return dim

    def description(self, heads: int) -> dict[str, int | bool | str]:
        """What an encoder with this many heads reads: equal for two configs if and only if they give the same columns and gates."""
        return {
            "version": self.version,
            "v_norm": self.v_norm and not self.enhanced,
            "time_step": self.time_step,
            "gating": self.gating,
            "group_embed_dim": self.embed_dim,
            "dim": self.width(heads),
        }


@dataclass(frozen=True)
class FeatureTable:
    """What the features of a fixed set of groups need besides the statistics, all on one device.

    ``order`` [T] lists the tensors group by group, ``lengths`` [G] the tensors in each group, ``begin`` [G + 1] where each begins
    in that order and where the last ends, ``group_of`` [T] the group of each tensor in that order. ``template`` [G, D] is a row's
    constant part, ``numel`` [T, 1] (in that order) the tensors' sizes.
    ``norm_columns`` are the columns of the statistics under a square root.
    """

    config: FeatureConfig
    order: Tensor
    lengths: Tensor
    begin: Tensor
    group_of: Tensor
    template: Tensor
    numel: Tensor
    norm_columns: Tensor

    def kept(self) -> list[Tensor]:
        """Its tensors."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]


def feature_table(
    members: Sequence[Member], group_ids: Sequence[int], groups: int, config: FeatureConfig, dim: int, like: Tensor
) -> FeatureTable:
    """The constant part of the features, on the device and in the dtype of ``like``."""
    device = like.device
    ids = torch.tensor(group_ids, dtype=torch.long, device="cpu")
    order = torch.argsort(ids, stable=True)
    lengths = torch.zeros(groups, dtype=torch.long, device="cpu").index_add(0, ids, torch.ones_like(ids))
    template = torch.zeros(groups, dim, dtype=torch.float64, device="cpu")
    numel = torch.tensor([m.numel for m in members], dtype=torch.float64, device="cpu")
    if config.enhanced:
        deepest = max(max_layer(members), 1)
        constants = torch.stack(
            [
                numel.add(1).log(),
                torch.tensor([float(m.is_bias) for m in members], dtype=torch.float64, device="cpu"),
                torch.tensor([(m.layer or 0) / deepest for m in members], dtype=torch.float64, device="cpu"),
            ],
            dim=1,
        )
        template[:, 6:9] = torch.zeros(groups, 3, dtype=torch.float64, device="cpu").index_add(0, ids, constants) / lengths[:, None]
    if config.enhanced:
        columns = [GRAD_SQUARED, MOMENTUM_SQUARED]
    else:
        columns = [GRAD_SQUARED, MOMENTUM_SQUARED, PARAM_SQUARED, GRAD_MOMENTUM] + [SECOND_MOMENT_SQUARED] * config.v_norm
    return FeatureTable(
        config,
        order.to(device),
        lengths.to(device),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device),
        ids[order].to(device),
        template.to(like),
        numel[order, None].to(like),
        torch.tensor(columns, device=device),
    )


Number = TypeVar("Number", float, Tensor)


def training_progress(step: Number, total_steps: int | None) -> Number:
    """The t column: ``step`` is 1 in the first step. s/total_steps if known, else 2·sigmoid(s/1000) - 1."""
    if total_steps is not None:
        return step / total_steps
    if isinstance(step, Tensor):
        return 2 * torch.sigmoid(step / 1000) - 1
    return 2 / (1 + math.exp(-step / 1000)) - 1


def group_features(statistics: Tensor, table: FeatureTable, t: float | Tensor) -> Tensor:
    """Features before gating and standardisation, group embeddings left 0.

    Args:
        statistics: [T, S] sums per tensor; see :func:`metaadamw_fast.ops.tensor_stats`.
        table: from :func:`feature_table`.
        t: the training progress, a number or 0-dim; see :func:`training_progress`.

    Returns:
        [G, D]. A group with a non-finite statistic has non-finite features and does not touch the others.
    """
    config = table.config
    sums = statistics.index_select(0, table.order)
    out = table.template.clone()
    if config.enhanced:
        norms = sums.index_select(1, table.norm_columns).sqrt_()
        zeros = table.numel - sums[:, GRAD_NONZERO:]
        sparsity = zeros / table.numel.clamp(min=1)  # 0 for an empty tensor
        means = _group_mean(torch.cat([norms, sparsity], dim=1), table)
        variances = _group_mean((norms - means[:, :2].index_select(0, table.group_of)).square(), table)
        out[:, 0:4:2] = means[:, :2]
        out[:, 1:4:2] = variances
        out[:, 4:6] = means[:, 2:]
    else:
        # The square root of the Σg·m column is meaningless (NaN if negative); the cosine takes its place.
        values = sums.index_select(1, table.norm_columns).sqrt_()
        floored = values[:, :2].clamp(min=NORM_FLOOR)
        torch.div(sums[:, GRAD_MOMENTUM], floored[:, 0] * floored[:, 1], out=values[:, 3])
        means = _group_mean(values, table)
        width = means.shape[1]
        out[:, :width] = means
        if config.deviations:
            deviations = values - means.index_select(0, table.group_of)
            out[:, width : 2 * width] = _group_mean(deviations.square_(), table).sqrt_()
    if config.time_column is not None:
        out[:, config.time_column] = t
    return out


def _group_mean(values: Tensor, table: FeatureTable) -> Tensor:
    """Means over the tensors of each group, [T, C] -> [G, C]; rows of ``values`` in the table's order.

    Not a product with an averaging matrix: there one NaN would reach every group.
    """
    return torch.segment_reduce(values, "mean", lengths=table.lengths, axis=0, unsafe=True)


def standardize(features: Tensor, columns: int, valid: Tensor | None) -> Tensor:
    """Standardises the leading columns over the valid groups: (x - mean) / (std + 1e-8), std with Bessel's correction.

    Args:
        features: [G, D].
        columns: how many leading columns.
        valid: [G] bool, or None if all groups are; rows that are not must be finite and have no part in mean and std.

    Returns:
        [G, D]; the standardised columns are 0 if only one group is valid.
    """
    x = features[:, :columns]
    weight = x.new_ones(x.shape[0], 1) if valid is None else valid.to(x.dtype)[:, None]
    count = weight.sum()
    centred = (x - (x * weight).sum(0) / count.clamp(min=1)) * weight
    std = (centred.square().sum(0) / (count - 1).clamp(min=1)).sqrt()
    return torch.cat([centred / (std + 1e-8), features[:, columns:]], dim=1)
