"""The policy: features of groups [G, D] to their scales. MetaAdamW section 3.3, in plain eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import sync
from .features import FeatureConfig, standardize


@dataclass(frozen=True)
class EncoderConfig:
    """Size of the encoder.

    Args:
        layers: Transformer encoder layers.
        heads: attention heads; they must divide the feature width D.
        hidden: width of the feed-forward part.
    """

    layers: int = 2
    heads: int = 4
    hidden: int = 32

    def __post_init__(self) -> None:
        """Raises ValueError unless layers >= 0 and heads, hidden >= 1."""
        if self.layers < 0 or self.heads < 1 or self.hidden < 1:
            raise ValueError(f"Invalid encoder size: {self}")


# Whatever torch's defaults are when an optimizer is built.
_HOST_FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class _Affine(nn.Module):
    """A weight and a bias, without the random start of nn.Linear: building an optimizer must draw nothing globally."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape, **_HOST_FLOAT32))
        self.bias = nn.Parameter(torch.zeros(shape[0], **_HOST_FLOAT32))


class _Attention(nn.Module):
    """The parameters of nn.MultiheadAttention under its names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim, **_HOST_FLOAT32))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim, **_HOST_FLOAT32))
        self.out_proj = _Affine(dim, dim)


class EncoderLayer(nn.Module):
    """One pre-norm Transformer encoder layer over G groups, in about half the operations of torch's own.

    Arithmetic and state-dict names are those of ``nn.TransformerEncoderLayer(D, H, Dff, dropout=0, norm_first=True)``.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_attn = _Attention(dim)
        self.linear1 = _Affine(hidden, dim)
        self.linear2 = _Affine(dim, hidden)
        self.norm1 = _Affine(dim)
        self.norm2 = _Affine(dim)

    def forward(self, x: Tensor, attention_bias: Tensor | None = None) -> Tensor:
        """[G, D] -> [G, D]; ``attention_bias`` [1, 1, G] is added to the scores: 0, or hugely negative for a masked group."""
        # Straight from the dictionaries: twelve look-ups through nn.Module.__getattr__ cost as much as four of the operations.
        modules = self._modules
        attn = cast(_Attention, modules["self_attn"])
        in_weight, in_bias = attn._parameters.values()
        out_weight, out_bias = cast(nn.Module, attn._modules["out_proj"])._parameters.values()
        weight1, bias1 = cast(nn.Module, modules["linear1"])._parameters.values()
        weight2, bias2 = cast(nn.Module, modules["linear2"])._parameters.values()
        scale1, shift1 = cast(nn.Module, modules["norm1"])._parameters.values()
        scale2, shift2 = cast(nn.Module, modules["norm2"])._parameters.values()

        groups, dim = x.shape
        y = torch.layer_norm(x, (dim,), scale1, shift1)
        qkv = linear(y, cast(Tensor, in_weight), in_bias)
        q, k, v = qkv.view(groups, 3, self.heads, -1).permute(1, 2, 0, 3).unbind(0)  # [H, G, D/H] each
        bias, beta = (x.new_empty(1, 1, 1), 0) if attention_bias is None else (attention_bias, 1)  # beta 0: the bias is not read
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=beta, alpha=(self.heads / dim) ** 0.5)
        mixed = torch.bmm(scores.softmax(-1), v).transpose(0, 1).reshape(groups, dim)
        x = x + linear(mixed, cast(Tensor, out_weight), out_bias)
        y = torch.layer_norm(x, (dim,), scale2, shift2)
        y = linear(y, cast(Tensor, weight1), bias1).relu()
        return x + linear(y, cast(Tensor, weight2), bias2)


class EncoderStack(nn.Module):
    """Layers one after the other, under the names of ``torch.nn.TransformerEncoder``."""

    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, attention_bias: Tensor | None = None) -> Tensor:
        """[G, D] -> [G, D]; see :meth:`EncoderLayer.forward`."""
        for layer in self.layers:
            x = layer(x, attention_bias)
        return x


class GroupEncoder(nn.Module):
    """Transformer encoder over the groups as one sequence without positions, then a linear head with four outputs.

    ``lr_scale = 1 + lr_scale_range * (sigmoid(a) - 1/2)``, ``wd_scale = 1 + wd_scale_range * (sigmoid(b) - 1/2)``,
    ``flatness_weight = sigmoid(c)``, ``alignment_weight = sigmoid(d)`` (the paper's alpha, beta, lambda1, lambda2).

    State-dict names: ``encoder.layers.{i}...`` as ``torch.nn.TransformerEncoder`` has them, ``head.weight``, ``head.bias``,
    ``feature_gates`` [D] when gating, ``group_embeddings.{g}`` [E] for enhanced features.

    Args:
        config: its size.
        features: which features it will read.
        groups: G, for the group embeddings.
        lr_scale_range, wd_scale_range: in [0, 2), so that a scale stays positive; 0 switches the scale off.
        head_init: ``identity`` starts the head at 0, so that all scales are exactly 1; ``xavier`` as the paper.
        seed: of the private random generator; the global random state is not touched.

    Raises:
        ValueError: a range outside [0, 2), an unknown head_init, or heads that do not divide the feature width.
    """

    _centre: Tensor
    _base: Tensor
    _range: Tensor

    def __init__(
        self,
        config: EncoderConfig,
        features: FeatureConfig,
        groups: int,
        *,
        lr_scale_range: float = 1.0,
        wd_scale_range: float = 1.0,
        head_init: str = "identity",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if head_init not in ("identity", "xavier"):
            raise ValueError(f"Invalid head_init: {head_init!r} (identity or xavier)")
        dim = features.width(config.heads)
        self.dim = dim
        self.config = config
        self.features = features
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.encoder = EncoderStack([EncoderLayer(dim, config.heads, config.hidden) for _ in range(config.layers)])
        self.head = _Affine(4, dim)
        for name, param in self.named_parameters():
            if param.dim() == 2 and (head_init == "xavier" or not name.startswith("head.")):
                nn.init.xavier_uniform_(param, generator=self.generator)
        if head_init == "identity":
            nn.init.zeros_(self.head.weight)
        if features.gating:
            self.feature_gates = nn.Parameter(torch.ones(dim, **_HOST_FLOAT32))
        self.group_embeddings = nn.ParameterList()
        self.add_groups(groups)
        for name, column in (("_centre", [0.5, 0.5, 0.0, 0.0]), ("_base", [1.0, 1.0, 0.0, 0.0]), ("_range", [1.0] * 4)):
            self.register_buffer(name, torch.tensor(column, **_HOST_FLOAT32)[:, None], persistent=False)
        self.set_ranges(lr_scale_range, wd_scale_range)

    def description(self) -> dict[str, int | bool | str]:
        """What its sizes are and which features it reads: two encoders can share weights only if these are equal."""
        features = self.features
        return {
            **asdict(self.config),
            "version": features.version,
            "v_norm": features.v_norm and not features.enhanced,
            "time_step": features.time_step,
            "gating": features.gating,
            "group_embed_dim": features.embed_dim,
            "dim": self.dim,
        }

    def set_ranges(self, lr_scale_range: float, wd_scale_range: float) -> None:
        """How far the scales may move from 1.

        Raises:
            ValueError: a range outside [0, 2).
        """
        for name, value in (("lr_scale_range", lr_scale_range), ("wd_scale_range", wd_scale_range)):
            if not 0.0 <= value < 2.0:
                raise ValueError(f"Invalid {name}: {value} (must be in [0, 2))")
        self.ranges = (lr_scale_range, wd_scale_range)
        self._range = self._range.new_tensor([*self.ranges, 1.0, 1.0])[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupEncoder:
        """Moves and casts as any module; the ranges are then rounded anew, not from float32 to float64."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.set_ranges(*self.ranges)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A spawned process gets the file descriptors of tensors. Those of a tensor that is made here, as torch makes one when it
        # pickles a Generator, would be closed before the process starts. So the generator's state goes as bytes.
        return {**self.__dict__, "generator": bytes(self.generator.get_state().tolist())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator("cpu")
        generator.set_state(torch.frombuffer(bytearray(state["generator"]), dtype=torch.uint8))
        super().__setstate__({**state, "generator": generator})  # type: ignore[no-untyped-call]

    def add_groups(self, count: int) -> None:
        """Embeddings N(0, 0.1²) for ``count`` more groups; nothing without group embeddings."""
        if self.features.embed_dim:
            for _ in range(count):
                start = torch.randn(self.features.embed_dim, generator=self.generator, **_HOST_FLOAT32) * 0.1
                self.group_embeddings.append(nn.Parameter(start.to(self.head.weight)))

    def embed(self, features: Tensor) -> Tensor:
        """Writes the group embeddings, with their graph, into the last columns of [G, D] features."""
        if not self.features.embed_dim:
            return features
        return torch.cat([features[:, : -self.features.embed_dim], torch.stack(list(self.group_embeddings))], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Scales of every group.

        Args:
            features: [G, D] before gating and standardisation, embeddings included (:meth:`embed`).

        Returns:
            [4, G]: lr_scale, wd_scale, flatness_weight, alignment_weight. A group with a non-finite feature gets 1, 1, 0, 0, and
            the others are computed as if it did not exist: on the CPU without its row, the same bits; elsewhere masked, since the
            number of rows cannot depend on what only the device knows.
        """
        device = features.device.type
        if torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(device):
            return self._masked_scales(features)
        with _full_precision(device):
            return self._masked_scales(features)

    def _masked_scales(self, features: Tensor) -> Tensor:
        valid = self._valid(features)
        if valid is None:
            return self._scales_of(features, None)
        if sync.readable(valid) and valid.any():
            rows = valid.nonzero()[:, 0]
            scales = self._scales_of(features.index_select(0, rows), None)
            return self._base.repeat(1, len(valid)).to(scales).index_copy(1, rows, scales)
        x = torch.where(valid[:, None], features, 0.0)
        return torch.where(valid, self._scales_of(x, valid), self._base)

    def _scales_of(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Finite rows [G, D] to scales [4, G]; rows that are not ``valid`` [G] have no part in those of the others."""
        attention_bias = None
        if valid is not None:
            # Not -inf: a sequence in which every group is masked would give NaN, and with it NaN gradients.
            attention_bias = x.new_zeros(1, 1, len(valid)).masked_fill(~valid, torch.finfo(x.dtype).min)
        if self.features.gating:
            x = x * torch.sigmoid(self.feature_gates)
        if self.features.standardized_columns:
            x = standardize(x, self.features.standardized_columns, valid)
        x = self.encoder(x, attention_bias)
        weight, bias = self.head._parameters.values()
        out = linear(x, cast(Tensor, weight), bias).t().sigmoid()
        return torch.addcmul(self._base, self._range, out - self._centre)

    @staticmethod
    def _valid(features: Tensor) -> Tensor | None:
        """[G] bool, or None if it is known without a device sync that every group is valid."""
        if sync.readable(features) and math.isfinite(features.detach().sum().item()):
            return None
        return features.isfinite().all(dim=1)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Keeps the user's autocast and reduced-precision matrix products away from the encoder."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
