"""The lean encoder against torch.nn.TransformerEncoder: same weights, same input, same result, fewer operations.

    python -m bench.encoder [--groups 24] [--dim 8] [--layers 2] [--heads 4] [--hidden 32] [--json FILE]

The base is torch's module in train mode with dropout 0: it stays in this mode while it learns. `GroupEncoder, layers`
computes the same function; `GroupEncoder` is what a step calls, with the finiteness check, the head and the scales on
top, and `nn.TransformerEncoder + head` is torch's way to the same scales. In eval mode torch has a fused path, which
has no backward.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing

BASE = "nn.TransformerEncoder"
CALLS = 10  # in one sample: a call takes tens to hundreds of microseconds, so the clock must not be read around each
AGREEMENT = 1e-6


def sides(groups: int, dim: int, layers: int, heads: int, hidden: int) -> dict[str, Callable[[], Tensor]]:
    """What is compared: functions of no argument over one set of weights and features [G, D], checked to agree."""
    from metaadamw_fast.encoder import EncoderConfig, GroupEncoder
    from metaadamw_fast.features import FeatureConfig

    torch.manual_seed(0)
    ours = GroupEncoder(EncoderConfig(layers, heads, hidden), FeatureConfig("basic", dim=dim), groups, head_init="xavier", seed=0)
    layer = nn.TransformerEncoderLayer(dim, heads, hidden, dropout=0.0, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    fused = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    weights = {name.removeprefix("encoder."): x for name, x in ours.state_dict().items() if name.startswith("encoder.")}
    theirs.load_state_dict(weights)
    fused.load_state_dict(weights)
    x = torch.randn(groups, dim)
    batch = x[None]  # batched from the start: torch spends a little more on a lone sequence

    def scales(y: Tensor) -> Tensor:
        """[G, D] to scales [4, G], for the default ranges."""
        out = torch.sigmoid(nn.functional.linear(y, ours.head.weight, ours.head.bias)).t()
        return torch.cat([out[:2] + 0.5, out[2:]])

    def our_layers() -> Tensor:
        y = x
        for block in ours.encoder.layers:
            y = block(y)
        return y

    functions: dict[str, Callable[[], Tensor]] = {
        BASE: lambda: theirs(batch)[0],
        "GroupEncoder, layers": our_layers,
        "GroupEncoder": lambda: ours(x),
        BASE + " + head": lambda: scales(theirs(batch)[0]),
        BASE + ", eval": lambda: fused(batch)[0],
    }
    with torch.no_grad():
        for name, reference in (("GroupEncoder, layers", BASE), ("GroupEncoder", BASE + " + head")):
            torch.testing.assert_close(functions[name](), functions[reference](), rtol=AGREEMENT, atol=AGREEMENT)
        torch.testing.assert_close(functions[BASE + ", eval"](), functions[BASE](), rtol=1e-5, atol=1e-5)
    return functions


def without_grad(function: Callable[[], Tensor]) -> Callable[[], object]:
    """The forward pass of a step."""

    def run() -> Tensor:
        with torch.no_grad():
            return function()

    return run


def with_backward(function: Callable[[], Tensor]) -> Callable[[], object]:
    """The forward and backward pass of a meta-update. Gradients add up in `.grad`, allocated by the first call."""
    return lambda: torch.autograd.backward(function().square().sum())


def measure(functions: dict[str, Callable[[], Tensor]], backward: bool, seconds: float) -> dict[str, Any]:
    """Times all sides; returns what the table prints."""
    wrap = with_backward if backward else without_grad
    calls = {name: wrap(f) for name, f in functions.items() if not (backward and name.endswith("eval"))}
    for call in calls.values():
        call()
    times = timing.interleaved(calls, seconds=seconds, calls=CALLS)
    return {
        "mode": "forward and backward" if backward else "forward, no_grad",
        "rounds": times.note(),
        "rows": [
            {
                "encoder": name,
                "seconds": asdict(times.spread(name)),
                "ratio": asdict(times.ratio(name, BASE)),
            }
            for name in calls
        ],
    }


def show(table: dict[str, Any]) -> None:
    """Prints one table."""
    print(f"\n{table['mode']}: {CALLS} calls a round, {table['rounds']}")
    print(f"{'encoder':<34}{'us':>9}{'ratio':>8}  {'quartiles':<16}95 % of median")
    for row in table["rows"]:
        ratio = row["ratio"]
        quartiles = f"[{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
        print(
            f"{row['encoder']:<34}{row['seconds']['median'] * 1e6:>9.1f}{ratio['median']:>8.2f}"
            f"  {quartiles:<16}[{ratio['low95']:.2f}, {ratio['high95']:.2f}]"
        )


def main() -> None:
    """Reads the options, measures and prints both tables."""
    parser = argparse.ArgumentParser(description="GroupEncoder against torch.nn.TransformerEncoder on the CPU.")
    for name, default in (("groups", 24), ("dim", 8), ("layers", 2), ("heads", 4), ("hidden", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=8.0, help="of interleaved timing per table")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in ("groups", "dim", "layers", "heads", "hidden")}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {shape}")
    functions = sides(**shape)
    tables = []
    for backward in (False, True):
        tables.append(measure(functions, backward, options.seconds))
        show(tables[-1])
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": timing.machine(), "shape": shape, "tables": tables}, file, indent=1)


if __name__ == "__main__":
    main()
