"""A small GPT trained with FSDP2 and MetaAdamW or MADA; killed at any moment, it goes on from its last checkpoint.

    torchrun --standalone --nproc-per-node 2 examples/fsdp_train.py --checkpoints DIR      gloo on CPUs, NCCL on GPUs
    python examples/fsdp_train.py --checkpoints DIR                                        one process, nothing sharded

A checkpoint may be continued on another number of processes. The text is the source of Python's own argparse; what a step reads
depends on its number only, so that a continued run is the uninterrupted one, bit for bit on the same number of processes.
"""

import argparse
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from metaadamw_fast import MADA, MetaAdamW, MetaLearner

CONTEXT, WIDTH, HEADS, BATCH = 64, 64, 4, 16  # BATCH: sequences of all processes together


class Block(nn.Module):
    """A pre-norm Transformer block with causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn_in, self.attn_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_in, self.mlp_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, WIDTH] -> [B, S, WIDTH]."""
        q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in self.attn_in(self.attn_norm(x)).chunk(3, dim=2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn_out(attended)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """A language model on bytes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding, self.position_embedding = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes [B, S] -> logits [B·S, 256]."""
        x = self.embedding(tokens) + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).flatten(0, 1))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean cross-entropy of the next byte, in nats; ``batch`` is [B, CONTEXT + 1]."""
    return F.cross_entropy(model(batch[:, :-1]), batch[:, 1:].flatten())


class Text:
    """Batches of a text by number; its last tenth is for validation."""

    def __init__(self, device: torch.device) -> None:
        data = torch.tensor(list(Path(argparse.__file__).read_bytes()), dtype=torch.long, device=device)
        cut = len(data) * 9 // 10
        self._parts = {"train": data[:cut], "val": data[cut:]}

    def batch(self, part: str, number: int) -> Tensor:
        """The share that this process has of a batch, [BATCH / processes, CONTEXT + 1]."""
        data = self._parts[part]
        starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(number))
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return torch.stack([data[i : i + CONTEXT + 1] for i in starts.tolist()[rank::processes]])


class Checkpoints:
    """Checkpoints of a training in a directory, of which one is always whole.

    A checkpoint is written aside, under a name that nobody reads, forced to the disk, and renamed; then the one before is removed.
    """

    def __init__(self, directory: Path, model: nn.Module, opt: Optimizer, meta: MetaLearner | None) -> None:
        self._directory, self._model, self._opt, self._meta = directory, model, opt, meta
        self._first = not dist.is_initialized() or dist.get_rank() == 0

    def _state(self) -> dict[str, object]:
        model, optimizer = get_state_dict(self._model, self._opt)
        return {"model": model, "optimizer": optimizer} | ({} if self._meta is None else {"meta": self._meta})

    def _whole(self) -> list[Path]:
        return sorted(self._directory.glob("step-" + "[0-9]" * 8))

    def save(self, step: int) -> None:
        """Write a checkpoint; every process must call it."""
        final, aside = self._directory / f"step-{step:08}", self._directory / "unfinished"
        if self._first:
            shutil.rmtree(aside, ignore_errors=True)
        _barrier()
        dcp.save(self._state(), checkpoint_id=aside)  # forces its files to the disk
        if self._first:
            _force_to_disk(aside)
            os.rename(aside, final)
            _force_to_disk(self._directory)
            for old in self._whole()[:-1]:
                shutil.rmtree(old)
        _barrier()

    def load(self) -> int:
        """Load the last checkpoint, if there is one; returns the steps that it has."""
        self._directory.mkdir(parents=True, exist_ok=True)
        _barrier()
        found = self._whole()
        if not found:
            return 0
        state = self._state()
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(self._model, self._opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return int(found[-1].name.removeprefix("step-"))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _force_to_disk(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def train(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Optimizer, MetaLearner | None]:
    """Train to ``options.steps``, from the last checkpoint on."""
    torch.manual_seed(0)  # all processes begin with the same model
    model = GPT(options.layers).to(device)
    if dist.is_initialized():
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    if options.optimizer == "mada":  # its coefficients learn in every step
        opt, meta = MADA(model.named_parameters(), lr=1e-3, max_grad_norm=1.0, freeze_steps=5), None
    else:
        opt = MetaAdamW(model.named_parameters(), lr=1e-3, model=model, total_steps=options.steps, max_grad_norm=1.0)
        meta = MetaLearner(opt, model, loss_fn, hvp="finite_difference")
    text = Text(device)
    checkpoints = Checkpoints(options.checkpoints, model, opt, meta)
    done = checkpoints.load()
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {done} steps done")
    for step in range(done + 1, options.steps + 1):
        opt.zero_grad()
        loss = loss_fn(model, text.batch("train", step))
        loss.backward()
        opt.step()
        if meta is not None and step % options.meta_every == 0:
            first = 10**6 + 3 * step  # batches that no training step reads
            meta.update(text.batch("train", first), text.batch("train", first + 1), text.batch("val", first + 2))
        if step % options.checkpoint_every == 0 or step == options.steps:
            checkpoints.save(step)
        if step % options.report_every == 0:
            say(f"step {step}: loss {loss.item():.4f} (this process), {shown(opt)}")
    return model, opt, meta


def shown(opt: Optimizer) -> str:
    """What an optimizer has made of itself."""
    if isinstance(opt, MADA):
        return "coefficients " + " ".join(f"{x:.3f}" for x in opt.coefficients[0].tolist())
    low, high = opt.lr_scale.aminmax()
    return f"lr_scale {low.item():.3f} to {high.item():.3f}"


def say(line: str) -> None:
    """Print on the first process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, required=True, metavar="DIR", help="where checkpoints are, and go on being")
    parser.add_argument("--optimizer", choices=("metaadamw", "mada"), default="metaadamw")
    parser.add_argument("--steps", type=int, default=300, metavar="N")
    parser.add_argument("--layers", type=int, default=2, metavar="N")
    parser.add_argument("--checkpoint-every", type=int, default=25, metavar="N")
    parser.add_argument("--meta-every", type=int, default=50, metavar="N")
    parser.add_argument("--report-every", type=int, default=25, metavar="N")
    return parser.parse_args(arguments)


def main() -> None:
    """Train, on the processes that torchrun has started or on this one."""
    options = parse_arguments()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # what one process means
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        train(options, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
