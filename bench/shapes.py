"""Parameter names and shapes of real models, so that a benchmark needs neither the models nor a download.

Names are the ones the original checkpoints use: grouping reads the layer type and the depth from them.
Every list is checked against the published number of tensors and parameters when it is asked for.
"""

import math
from collections.abc import Callable

Shapes = list[tuple[str, tuple[int, ...]]]


def gpt2(layers: int, width: int, vocabulary: int = 50_257, positions: int = 1_024) -> Shapes:
    """GPT-2 as published: fused q, k, v projection, biases everywhere, and the head tied to `wte`."""
    shapes: Shapes = [
        ("transformer.wte.weight", (vocabulary, width)),
        ("transformer.wpe.weight", (positions, width)),
    ]
    for i in range(layers):
        block = f"transformer.h.{i}"
        shapes += [
            (f"{block}.ln_1.weight", (width,)),
            (f"{block}.ln_1.bias", (width,)),
            (f"{block}.attn.c_attn.weight", (width, 3 * width)),
            (f"{block}.attn.c_attn.bias", (3 * width,)),
            (f"{block}.attn.c_proj.weight", (width, width)),
            (f"{block}.attn.c_proj.bias", (width,)),
            (f"{block}.ln_2.weight", (width,)),
            (f"{block}.ln_2.bias", (width,)),
            (f"{block}.mlp.c_fc.weight", (width, 4 * width)),
            (f"{block}.mlp.c_fc.bias", (4 * width,)),
            (f"{block}.mlp.c_proj.weight", (4 * width, width)),
            (f"{block}.mlp.c_proj.bias", (width,)),
        ]
    return [*shapes, ("transformer.ln_f.weight", (width,)), ("transformer.ln_f.bias", (width,))]


def llama2_7b() -> Shapes:
    """Llama-2 7B: no biases, gated feed-forward, an untied head."""
    width, hidden, vocabulary = 4_096, 11_008, 32_000
    shapes: Shapes = [("model.embed_tokens.weight", (vocabulary, width))]
    for i in range(32):
        block = f"model.layers.{i}"
        shapes += [(f"{block}.self_attn.{x}_proj.weight", (width, width)) for x in "qkvo"]
        shapes += [
            (f"{block}.mlp.gate_proj.weight", (hidden, width)),
            (f"{block}.mlp.up_proj.weight", (hidden, width)),
            (f"{block}.mlp.down_proj.weight", (width, hidden)),
            (f"{block}.input_layernorm.weight", (width,)),
            (f"{block}.post_attention_layernorm.weight", (width,)),
        ]
    return [*shapes, ("model.norm.weight", (width,)), ("lm_head.weight", (vocabulary, width))]


def resnet18() -> Shapes:
    """ResNet-18 for ImageNet, as torchvision names it."""

    def batch_norm(name: str, channels: int) -> Shapes:
        return [(f"{name}.weight", (channels,)), (f"{name}.bias", (channels,))]

    shapes: Shapes = [("conv1.weight", (64, 3, 7, 7)), *batch_norm("bn1", 64)]
    channels_in = 64
    for stage, channels in enumerate((64, 128, 256, 512), 1):
        for i in range(2):
            block = f"layer{stage}.{i}"
            shapes += [(f"{block}.conv1.weight", (channels, channels_in, 3, 3)), *batch_norm(f"{block}.bn1", channels)]
            shapes += [(f"{block}.conv2.weight", (channels, channels, 3, 3)), *batch_norm(f"{block}.bn2", channels)]
            if channels != channels_in:
                shapes += [(f"{block}.downsample.0.weight", (channels, channels_in, 1, 1))]
                shapes += batch_norm(f"{block}.downsample.1", channels)
            channels_in = channels
    return [*shapes, ("fc.weight", (1_000, 512)), ("fc.bias", (1_000,))]


def equal_tensors(count: int, numel: int) -> Shapes:
    """`count` vectors of `numel` elements: nothing but the cost per tensor."""
    return [(f"layers.{i}.weight", (numel,)) for i in range(count)]


def tiny_gpt2() -> Shapes:
    """The 148 tensors of GPT-2 with 8 features each: what a step costs apart from its elements."""
    return gpt2(layers=12, width=8, vocabulary=8, positions=8)


# name: (list, tensors, parameters)
MODELS: dict[str, tuple[Callable[[], Shapes], int, int]] = {
    "minigpt-1.7m": (lambda: gpt2(2, 128, vocabulary=10_000, positions=128), 28, 1_693_184),
    "resnet18-11.7m": (resnet18, 62, 11_689_512),
    "gpt2-124m": (lambda: gpt2(12, 768), 148, 124_439_808),
    "gpt2-xl-1.56b": (lambda: gpt2(48, 1_600), 580, 1_557_611_200),
    "llama2-7b": (llama2_7b, 291, 6_738_415_616),
    "148-tiny": (tiny_gpt2, 148, 10_608),
    "2000x1": (lambda: equal_tensors(2_000, 1), 2_000, 2_000),
    "10000x64": (lambda: equal_tensors(10_000, 64), 10_000, 640_000),
}


def numel(shapes: Shapes) -> int:
    """Parameters of the whole list."""
    return sum(math.prod(shape) for _, shape in shapes)


def named_shapes(model: str) -> Shapes:
    """The list called `model`, checked against its published size."""
    make, tensors, parameters = MODELS[model]
    shapes = make()
    if (len(shapes), numel(shapes)) != (tensors, parameters):
        raise AssertionError(f"{model}: {len(shapes)} tensors, {numel(shapes)} parameters")
    return shapes
