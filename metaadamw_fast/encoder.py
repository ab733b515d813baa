"""The policy: features of groups [G, D] to their scales. MetaAdamW section 3.3, in plain eager PyTorch.

Longer than 300 lines: the layer, the encoder of such layers and what an optimizer takes for one are read together; a quarter is
documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .core import devices
from .features import FeatureConfig, standardize
from .threads import one_thread

_FEW_GROUPS = 128  # more are worth waking threads for


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


def _pair(module: nn.Module | None, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Weight and bias of a module, straight from its dictionary: nn.Module.__getattr__ takes a third of an operation's time."""
    parameters: dict[str, Tensor] = module._parameters  # type: ignore[union-attr, assignment]
    return parameters[prefix + "weight"], parameters[prefix + "bias"]


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

    def weights(self) -> list[Tensor]:
        """The parameters in the order in which :meth:`forward` uses them."""
        modules = self._modules
        attention: nn.Module = modules["self_attn"]  # type: ignore[assignment]
        return [
            *_pair(modules["norm1"]), *_pair(attention, "in_proj_"), *_pair(attention._modules["out_proj"]),
            *_pair(modules["norm2"]), *_pair(modules["linear1"]), *_pair(modules["linear2"]),
        ]  # fmt: skip

    def forward(self, x: Tensor, attention_bias: Tensor | None = None, weights: Sequence[Tensor] | None = None) -> Tensor:
        """[G, D] -> [G, D].

        Args:
            x: a row per group.
            attention_bias: [1, 1, G], added to the scores: 0, or hugely negative for a masked group.
            weights: in the place of :meth:`weights`.
        """
        (scale1, shift1, in_weight, in_bias, out_weight, out_bias, scale2, shift2, weight1, bias1, weight2, bias2) = (
            self.weights() if weights is None else weights
        )
        groups, dim = x.shape
        y = torch.layer_norm(x, (dim,), scale1, shift1)
        qkv = linear(y, in_weight, in_bias)
        # [H, D/H, G] each, so that the heads' results lie one after the other as the rows of one matrix.
        q, k, v = qkv.t().view(3, self.heads, -1, groups).unbind(0)
        # beta 0: the bias is not read
        bias, beta = (x.new_empty(1, 1, 1), 0) if attention_bias is None else (attention_bias.transpose(1, 2), 1)
        # Keys before queries: on the CPU, torch's softmax in float64 takes a third of the time along any dimension but the last.
        scores = torch.baddbmm(bias, k.transpose(1, 2), q, beta=beta, alpha=(self.heads / dim) ** 0.5)
        mixed = torch.bmm(v, scores.softmax(1)).view(dim, groups).t()
        x = x + linear(mixed, out_weight, out_bias)
        y = torch.layer_norm(x, (dim,), scale2, shift2)
        y = linear(y, weight1, bias1).relu()
        return x + linear(y, weight2, bias2)


def threads_for(groups: int, device: torch.device) -> AbstractContextManager[None]:
    """Where an encoder's forward or backward pass over so many groups runs: few are encoded in the calling thread alone."""
    return one_thread() if groups <= _FEW_GROUPS and device.type == "cpu" else nullcontext()


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
        TypeError: a config that is none.
    """

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
        if not isinstance(config, EncoderConfig):
            raise TypeError(f"config should be an EncoderConfig, but got {type(config).__name__}")
        _check_features(features)
        dim = features.width(config.heads)
        self.dim = dim
        self.config = config
        self.features = features
        self.head_init = head_init
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.encoder = nn.Module()  # for the state-dict names
        self.encoder.layers = nn.ModuleList([EncoderLayer(dim, config.heads, config.hidden) for _ in range(config.layers)])
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
        self.float64_copies: list[Tensor] = []  # of the weights, where no gradients are wanted
        self.set_ranges(lr_scale_range, wd_scale_range)

    def description(self) -> dict[str, int | bool | str]:
        """What its sizes are and which features it reads: two encoders can share weights only if these are equal."""
        return {**asdict(self.config), **self.features.description(self.config.heads)}

    def set_ranges(self, lr_scale_range: float, wd_scale_range: float) -> None:
        """How far the scales may move from 1.

        Raises:
            ValueError: a range outside [0, 2).
        """
        for name, value in (("lr_scale_range", lr_scale_range), ("wd_scale_range", wd_scale_range)):
            if not 0.0 <= value < 2.0:
                raise ValueError(f"Invalid {name}: {value} (must be in [0, 2))")
        self.ranges = (lr_scale_range, wd_scale_range)
        rows = [
            [1 - lr_scale_range / 2, 1 - wd_scale_range / 2, 0.0, 0.0],  # plus half the range this is 1, to the last bit
            [lr_scale_range, wd_scale_range, 1.0, 1.0],
            [1.0, 1.0, 0.0, 0.0],
            # Not -inf: a sequence in which every group is masked would give NaN, and with it NaN gradients.
            [0.0, torch.finfo(torch.float64).min, 0.0, 0.0],
        ]
        numbers = torch.tensor(rows, dtype=torch.float64, device="cpu").to(self.head.weight.device)
        self._lowest, self._range, self._masked = numbers[:3, :, None].unbind()  # [4, 1] each
        self._seen, self._hidden = numbers[3, :2].unbind()  # what is added to the scores of a group

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupEncoder:
        """Moves and casts as any module; the constants follow to the device and stay float64."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.set_ranges(*self.ranges)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A spawned process gets the file descriptors of tensors. Those of a tensor that is made here, as torch makes one when it
        # pickles a Generator, would be closed before the process starts. So the generator's state goes as bytes.
        return {**self.__dict__, "float64_copies": [], "generator": bytes(self.generator.get_state().tolist())}

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

    def keep_groups(self, groups: Sequence[int]) -> None:
        """Drops the embeddings of all other groups; nothing without group embeddings."""
        if self.features.embed_dim and len(groups) < len(self.group_embeddings):
            self.group_embeddings = nn.ParameterList([self.group_embeddings[g] for g in groups])

    def embed(self, features: Tensor) -> Tensor:
        """Writes the group embeddings, with their graph, into the last columns of [G, D] features."""
        if not self.features.embed_dim:
            return features
        return torch.cat([features[:, : -self.features.embed_dim], torch.stack(list(self.group_embeddings))], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Scales of every group.

        Computed in float64: torch rounds no float64 product to TF32 or bfloat16, whatever the settings of the process and autocast
        are. They are global, so they are neither read nor changed here.

        Args:
            features: [G, D] before gating and standardisation, embeddings included (:meth:`embed`).

        Returns:
            [4, G] in the dtype of the features: lr_scale, wd_scale, flatness_weight, alignment_weight. A group with a non-finite
            feature gets 1, 1, 0, 0, and the others are computed as if it did not exist: on the CPU without its row, the same bits;
            elsewhere masked, since the number of rows cannot depend on what only the device knows.
        """
        with threads_for(len(features), features.device):
            x, weights = features.double(), self._weights_in_float64()
            valid = self._valid(features)
            if valid is None:
                scales = self._scales_of(x, None, weights)
            elif devices.readable(valid) and valid.any():
                rows = valid.nonzero()[:, 0]
                scales = self._scales_of(x.index_select(0, rows), None, weights)
                scales = self._masked.repeat(1, len(valid)).index_copy(1, rows, scales)
            else:
                x = torch.where(valid[:, None], x, self._seen)
                scales = torch.where(valid, self._scales_of(x, valid, weights), self._masked)
            return scales.to(features.dtype)

    def weights(self) -> list[Tensor]:
        """All parameters but the group embeddings: the gates if there are any, twelve of each layer, two of the head."""
        found = [weight for layer in self._layers() for weight in layer.weights()]
        found += _pair(self._modules["head"])
        return [self.feature_gates, *found] if self.features.gating else found

    def read_in_place(self) -> list[Tensor]:
        """The parameters that :meth:`embed` and :meth:`forward` read."""
        return [*self.weights(), *self.group_embeddings._parameters.values()]  # type: ignore[list-item]

    def constants(self) -> list[Any]:
        """Whatever else they read: other objects, where something has changed."""
        tensors = [self._lowest, self._range, self._masked, self._seen, self._hidden]
        return [self.config, self.features, *self._layers(), *tensors]

    @property
    def is_plain(self) -> bool:
        """Whether calling it runs what stands here and nothing else: no method of a subclass, no hook of a user."""
        layers = self._layers()
        return (
            type(self) is GroupEncoder
            and all(type(layer) is EncoderLayer for layer in layers)
            and not any(x._forward_hooks or x._forward_pre_hooks or "forward" in x.__dict__ for x in (self, *layers))
        )

    def _layers(self) -> list[EncoderLayer]:
        return list(self.encoder._modules["layers"]._modules.values())  # type: ignore[union-attr, arg-type]

    def kept(self) -> list[Tensor]:
        """The tensors besides its parameters that it keeps from step to step."""
        return [*self.float64_copies, self._lowest, self._range, self._masked, self._seen, self._hidden]

    def _weights_in_float64(self) -> list[Tensor]:
        """:meth:`weights` as they are now, with their graph if gradients are enabled.

        Without gradients one launch converts all of them. It reads the parameters in every step, since neither torch's fused
        optimizers nor writes through ``.data`` leave a sign, and a captured graph must find the weights of its replay.
        """
        weights = self.weights()
        if torch.is_grad_enabled():
            return [weight.double() for weight in weights]
        if all(weight.dtype == torch.float64 for weight in weights):
            return weights
        if len(self.float64_copies) != len(weights) or self.float64_copies[0].device != weights[0].device:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
                self.float64_copies = [torch.empty_like(weight, dtype=torch.float64, requires_grad=False) for weight in weights]
        torch._foreach_copy_(self.float64_copies, weights)
        return self.float64_copies

    def _scales_of(self, x: Tensor, valid: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """Finite rows [G, D] to scales [4, G]; rows that are not ``valid`` [G] have no part in those of the others."""
        attention_bias = None if valid is None else torch.where(valid, self._seen, self._hidden).view(1, 1, -1)
        if self.features.gating:
            gates, *weights = weights
            x = x * torch.sigmoid(gates)
        if self.features.standardized_columns:
            x = standardize(x, self.features.standardized_columns, valid)
        for number, layer in enumerate(self._layers()):
            x = layer(x, attention_bias, weights[12 * number : 12 * number + 12])
        head_weight, head_bias = weights[-2:]
        return torch.addcmul(self._lowest, self._range, linear(x, head_weight, head_bias).t().sigmoid())

    @staticmethod
    def _valid(features: Tensor) -> Tensor | None:
        """[G] bool, or None if it is known without a device sync that every group is valid."""
        features = features.detach()
        if devices.readable(features) and math.isfinite(features.sum().item()):
            return None
        largest: Tensor = torch.linalg.vector_norm(features, math.inf, dim=1)  # NaN if there is one
        return largest < math.inf


def _check_features(features: Any) -> None:
    if not isinstance(features, FeatureConfig):
        raise TypeError(f"features should be a FeatureConfig or the name of its version, but got {type(features).__name__}")


def check_encoder(
    encoder: Any, features: Any, head_init: str, seed: int | None
) -> tuple[EncoderConfig | GroupEncoder, FeatureConfig]:
    """What the constructor of an optimizer makes of these arguments of its own: an encoder or its size, and the features.

    A ready encoder keeps its features and its weights. An argument that is left at its default contradicts none of them.

    Args:
        encoder, features, head_init: as the optimizer's.
        seed: as the optimizer's; None if the seed is for something else, too.

    Raises:
        TypeError: ``encoder`` or ``features`` of another type.
        ValueError: an argument that a ready encoder contradicts.
    """
    config = FeatureConfig(features) if isinstance(features, str) else features
    encoder = EncoderConfig() if encoder is None else encoder
    _check_features(config)
    if not isinstance(encoder, (EncoderConfig, GroupEncoder)):
        raise TypeError(f"encoder should be an EncoderConfig or a GroupEncoder, but got {type(encoder).__name__}")
    if isinstance(encoder, GroupEncoder):
        if features != "basic" and config.description(encoder.config.heads) != encoder.features.description(encoder.config.heads):
            raise ValueError(f"features={features!r} contradicts the encoder, which reads {encoder.features}")
        if head_init not in ("identity", encoder.head_init):
            raise ValueError(f"head_init={head_init!r} contradicts the encoder, which began with {encoder.head_init!r}")
        own = encoder.generator.initial_seed()
        if seed is not None and seed != 0 and torch.Generator("cpu").manual_seed(seed).initial_seed() != own:
            raise ValueError(f"seed={seed} contradicts the encoder, which has a generator of seed {own}")
    return encoder, config
