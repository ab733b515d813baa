"""The multi-tensor ops, and the choice of what runs them.

Each op takes lists over T tensors and is one call (one parallel region, one launch) whatever T is. The tensors of one position
must have the same shape; strides, dtypes (float32, float64, bfloat16, float16) and sizes may differ from tensor to tensor and from
list to list. float64 tensors are computed in float64, all others in float32.

Longer than 300 lines: a quarter is documentation, and what runs an op stands beside the ops, so that a backend is added in one
place.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import mada_reference, reference
from .checks import HYPERPARAMETERS, check_stats, check_update
from .core.hyperparameters import pair_of
from .features import FeatureTable
from .launch import CppLaunch, FakeLaunch, ReferenceLaunch
from .rounding import signed

Tensors = Iterable[Tensor]


def _load_extension() -> str | None:
    """Loads the C++ ops. None if that worked, else why there are none.

    Raises:
        ImportError: the extension was built from other sources than the ones beside it.
    """
    try:
        extension = importlib.import_module("metaadamw_fast._C")
    except ModuleNotFoundError:  # an extension that is there and does not load raises what it has to say
        return (
            "the C++ extension is not installed (METAADAMW_NO_EXTENSION=1); reinstall without it:"
            " pip install --no-build-isolation ."
        )
    # In an editable install Python files are live, the extension is not.
    names = getattr(extension, "source_names", None)  # which the builds of older sources lack
    if names is None or _differ(Path(__file__).parent.parent / "csrc", names.split(","), extension.source_hash):
        raise ImportError(
            "metaadamw_fast._C was built from older sources than csrc/: rebuild it with"
            " `pip install --no-build-isolation -e .` (make does)"
        )
    return None


def _differ(directory: Path, names: Sequence[str], source_hash: str) -> bool:
    """Whether a folder has the sources of the extension, under the names that the build recorded, and others than were built.

    Beside an installed copy there may be a csrc/ of another project, in which one or two names may be the same by chance. It has
    most of ours only if it is ours. Files and folders under other names are none of our business.
    """
    found = [directory / name for name in names if (directory / name).is_file()]
    if 2 * len(found) <= len(names):
        return False
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.read_bytes())
    return digest.hexdigest() != source_hash


_NO_EXTENSION = _load_extension()


def listed_objects(containers: list[Any]) -> list[Any]:
    """The items of lists and the values of dicts, one after the other; what is neither, itself."""
    lists = (list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else [x] for x in containers)
    return list(chain.from_iterable(lists))


def addresses_of(objects: Sequence[Any]) -> bytes:
    """What :func:`expected_objects` recognises these objects by, without holding them."""
    return array("Q", map(id, objects)).tobytes()


def _expected_objects(containers: list[Any], expected: bytes) -> list[Any] | None:
    """:func:`listed_objects`, if they are the very objects of which ``expected`` has the addresses; else None.

    An object that was freed may have left its address to another. Whoever asks must learn of that by other means.
    """
    found = listed_objects(containers)
    return found if addresses_of(found) == expected else None


expected_objects: Callable[[list[Any], bytes], list[Any] | None] = _expected_objects
if _NO_EXTENSION is None:
    expected_objects = importlib.import_module("metaadamw_fast._C").expected_objects


class CppBackend:
    """The C++ ops, through the dispatcher."""

    name = "cpp"
    namespace = torch.ops.metaadamw_fast  # the tests also know another one
    if _NO_EXTENSION is None:
        tensor_stats = staticmethod(torch.ops.metaadamw_fast.tensor_stats.default)
        adamw_update_ = staticmethod(torch.ops.metaadamw_fast.adamw_update_.default)
        scaled_gradients = staticmethod(torch.ops.metaadamw_fast.scaled_gradients.default)
        modulation = staticmethod(torch.ops.metaadamw_fast.modulation.default)
        update_vectors = staticmethod(torch.ops.metaadamw_fast.update_vectors.default)
        mada_policy_ = staticmethod(torch.ops.metaadamw_fast.mada_policy_.default)
        launch = CppLaunch

    @classmethod
    def group_features(cls, statistics: Tensor, table: FeatureTable, done: Tensor, ahead: int, total_steps: int | None) -> Tensor:
        """As :func:`metaadamw_fast.reference.group_features`; the means are accumulated in float64."""
        config = table.config
        time = -1 if config.time_column is None else config.time_column
        features: Tensor = cls.namespace.group_features.default(
            statistics, table.order, table.begin, table.numel, table.template,
            config.enhanced, config.v_norm, config.deviations, time, done, ahead, total_steps or 0.0,
        )  # fmt: skip
        return features


class ReferenceBackend:
    """Plain eager PyTorch."""

    name = "reference"
    tensor_stats = staticmethod(reference.tensor_stats)
    adamw_update_ = staticmethod(reference.adamw_update_)
    group_features = staticmethod(reference.group_features)
    scaled_gradients = staticmethod(reference.scaled_gradients)
    modulation = staticmethod(reference.modulation)
    update_vectors = staticmethod(reference.update_vectors)
    mada_policy_ = staticmethod(mada_reference.mada_policy_)
    launch: Any = ReferenceLaunch


class FakeBackend(ReferenceBackend):
    """Shapes only: what runs under FakeTensorMode, whatever was chosen. A step takes as much memory as with kernels."""

    launch: Any = FakeLaunch


@functools.cache
def _triton_backend() -> Any:
    """The Triton ops, those around the encoder included; the encoder itself is eager PyTorch everywhere.

    Imported when they are asked for: importing Triton takes a good part of a second.
    """
    kernels = importlib.import_module("metaadamw_fast.kernels.launch").TritonBackend
    return type("TritonBackend", (kernels, ReferenceBackend), {})


BACKENDS: dict[str, Callable[[], Any]] = {  # "auto" takes the first that can run
    "cpp": lambda: CppBackend,
    "triton": _triton_backend,
    "reference": lambda: ReferenceBackend,
}


def _unavailable(name: str, device: torch.device) -> str | None:
    """Why backend ``name`` cannot run on ``device``; None if it can."""
    if name == "reference":
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        reason: str | None = _triton_backend().unavailable(device)
        return reason
    if _NO_EXTENSION is not None:
        return _NO_EXTENSION
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are C++ kernels for the CPU and for CUDA, the tensors are on {device.type}"
    if torch.version.cuda is None:
        return "there are C++ kernels for the CPU and for CUDA, this torch is for another kind of GPU"
    built: str = importlib.import_module("metaadamw_fast._C").cuda_architectures
    rebuild = "reinstall with METAADAMW_CUDA=1 pip install --no-build-isolation . (needs nvcc)"
    if not built:
        return f"the extension was built for the CPU only, the tensors are on {device.type}; {rebuild}"
    major, minor = torch.cuda.get_device_capability(device)
    if not any(_runs_on(architecture, major, minor) for architecture in built.split(",")):
        return f"the extension was built for the GPU architectures {built}, {device} is {major}.{minor}; {rebuild}"
    return None


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for ``architecture``, "9.0" or "10.0+PTX", runs on a GPU of this compute capability."""
    number = architecture.removesuffix("+PTX")
    built = tuple(int(x) for x in number.rstrip("af").split("."))
    if number.endswith("a"):  # nowhere else
        return built == (major, minor)
    return built <= (major, minor) and (built[0] == major or architecture.endswith("+PTX"))


def resolve_backend(name: str, device: torch.device) -> Any:
    """The backend object that runs on ``device``.

    ``auto`` takes the first of cpp, triton, reference that can run; :func:`backend_report` says which and why. A backend that is
    chosen by name runs or raises.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the chosen backend cannot run; the message says why.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r} (auto, {', '.join(BACKENDS)})")
    candidates = list(BACKENDS) if name == "auto" else [name]
    for candidate in candidates:
        reason = _unavailable(candidate, device)
        if reason is None:
            return BACKENDS[candidate]()
        if name != "auto":
            raise RuntimeError(f"backend={name!r} cannot run here: {reason}")
    raise AssertionError("reference runs everywhere")


def backend_report(device: torch.device | str | None = None) -> str:
    """What ``backend="auto"`` runs on ``device`` (default: the CPU and the accelerator if any), and why not the others."""
    devices = [torch.device(device)] if device is not None else [torch.device("cpu")]
    if device is None and torch.accelerator.is_available():
        devices.append(torch.device(torch.accelerator.current_accelerator() or "cpu"))
    lines = []
    for d in devices:
        lines.append(f"{d}: auto runs {resolve_backend('auto', d).name}")
        for name in BACKENDS:
            reason = _unavailable(name, d)
            lines.append(f"  {name}: {'can run' if reason is None else reason}")
    return "\n".join(lines)


def tensor_stats(
    grads: Tensors,
    exp_avgs: Tensors,
    params: Tensors | None = None,
    exp_avg_sqs: Tensors | None = None,
    *,
    count_nonzero: bool = False,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Sums that describe each tensor: MetaAdamW section 3.2.

    Args:
        grads: T gradients. One without elements where its momentum has some stands for "no gradient" and counts as zeros.
        exp_avgs: T first moments.
        params: T parameters, or None to leave their column out.
        exp_avg_sqs: T second moments, or None to leave their column out.
        count_nonzero: append the two counts.
        dtype: of the result, float32 or float64. The sums are accumulated in float64 over blocks of at most 1024 elements; products
            and sums inside a block are in the arithmetic type.
        backend: ``auto``, ``cpp``, ``triton`` or ``reference``.

    Returns:
        [T, S], columns Σg², Σg·m, Σm² (then Σp², Σv² where given, then the non-zeros of g and of m if counted). 0 for an empty
        tensor. Equal inputs give equal bits, whatever the number of threads.

    Raises:
        RuntimeError: lists of different lengths, tensors of different shapes or devices, sparse or non-floating tensors.
    """
    with torch.no_grad():
        grads, exp_avgs = list(grads), list(exp_avgs)
        params, exp_avg_sqs = _listed(params), _listed(exp_avg_sqs)
        run = resolve_backend(backend, _device(exp_avgs))
        if not len(exp_avgs):
            run = ReferenceBackend  # without a tensor, torch's dispatcher does not know where to go
        statistics: Tensor = run.tensor_stats(grads, exp_avgs, params, exp_avg_sqs, count_nonzero, dtype)
        return statistics


def tensor_dots(xs: Tensors, ys: Tensors, *, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Tensor:
    """The dot product of each pair of tensors, Σ x·y.

    Args:
        xs, ys: T tensors each, shapes equal pair by pair.
        dtype: of the result, float32 or float64.
        backend: ``auto``, ``cpp``, ``triton`` or ``reference``.

    Returns:
        [T]. It is a column of :func:`tensor_stats`: both read every element once, so the squares cost nothing.
    """
    return tensor_stats(xs, ys, dtype=dtype, backend=backend)[:, 1]


def adamw_update_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    step_size: Tensor | float,
    decay_factor: Tensor | float,
    *,
    step: Tensor | float,
    betas: tuple[Tensor | float, Tensor | float] = (0.9, 0.999),
    eps: Tensor | float = 1e-8,
    max_exp_avg_sqs: Tensors | None = None,
    grad_scale: Tensor | float | None = None,
    rounding_seed: int | None = None,
    low_precision_params: Iterable[Tensor | None] | None = None,
    backend: str = "auto",
) -> None:
    """AdamW with per-tensor hyper-parameters, in place: MetaAdamW algorithm 1, Loshchilov & Hutter 2019.

    ``m ← β1·m + (1-β1)·g``, ``v ← β2·v + (1-β2)·g²``, ``p ← decay_factor·p - step_size·m̂/(√v̂ + eps)`` with g = grad_scale·grad,
    m̂ = m/(1-β1^step), v̂ = v/(1-β2^step). Plain AdamW is ``step_size=lr, decay_factor=1 - lr*weight_decay``.

    Args:
        params, exp_avgs, exp_avg_sqs: T tensors each, written.
        grads: T tensors, read. One without elements where its parameter has some leaves all of its row as it is.
        step_size: [T] or a number, lr·lr_scale.
        decay_factor: [T] or a number, 1 - lr·lr_scale·wd_scale·weight_decay.
        step: [T] or a number, the step count k >= 1, this step included. A tensor whose k is 0 is left as it is: this is how a
            device decides what the host need not know, as with GradScaler's found_inf.
        betas, eps: [T] or a number each.
        max_exp_avg_sqs: T running maxima of v, written (amsgrad); an entry without elements leaves its tensor plain.
        grad_scale: [T] or a number: unscaling, clipping, or -1 to maximize.
        rounding_seed: round what is written in bfloat16 or float16 by chance, up or down so that the mean is the number itself,
            except the maxima. The random bits depend on seed, step, tensor and element only. None rounds to the nearest.
        low_precision_params: T bfloat16 or float16 tensors, written, whose float32 masters stand in ``params``; None or an entry
            without elements for a parameter that has no master. Where an element is its master's rounding to the nearest the update
            starts from the master, else from the element, which somebody has written then. The master is written, and its rounding
            to the nearest, never by chance, into the element.
        backend: ``auto``, ``cpp``, ``triton`` or ``reference``.

    Raises:
        ValueError: fewer or more than two betas.
        RuntimeError: as :func:`tensor_stats`; a written tensor whose elements share memory. Nothing has changed then.
    """
    with torch.no_grad():
        params, grads, exp_avgs, exp_avg_sqs = list(params), list(grads), list(exp_avgs), list(exp_avg_sqs)
        max_exp_avg_sqs = _listed(max_exp_avg_sqs)
        device = _device(params)
        absent = torch.empty(0, device=device)
        low = None if low_precision_params is None else [absent if x is None else x for x in low_precision_params]
        numbers = (step_size, decay_factor, step, *pair_of(betas), eps, grad_scale)
        hyper = [None if x is None else _per_tensor(x, len(params), device) for x in numbers]
        run = resolve_backend(backend, device)
        seed = None if rounding_seed is None else signed(rounding_seed)
        run.adamw_update_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, *hyper, None, seed, low)
        rows = [t for t, (p, grad) in enumerate(zip(params, grads, strict=True)) if grad.numel() or not p.numel()]
        written = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, low)
        mark_written([xs[t] for xs in written if xs is not None for t in rows])


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Bumps the version counters, as torch's own in-place ops do: autograd's checks and EMA-like observers rely on it."""
    torch.autograd.graph.increment_version(tensors)


def _listed(tensors: Iterable[Tensor] | None) -> list[Tensor] | None:
    return None if tensors is None else list(tensors)


def _per_tensor(value: Tensor | float, count: int, device: torch.device) -> Tensor:
    """A hyper-parameter as contiguous float64 [T]."""
    return torch.as_tensor(value, dtype=torch.float64, device=device).expand(count).contiguous()


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if len(tensors) else torch.device("cpu")


if _NO_EXTENSION is None:

    @torch.library.register_fake("metaadamw_fast::tensor_stats")
    def _(grads, exp_avgs, params, exp_avg_sqs, count_nonzero, dtype):  # type: ignore[no-untyped-def]
        check_stats(grads, exp_avgs, params, exp_avg_sqs, dtype)
        width = 3 + (params is not None) + (exp_avg_sqs is not None) + 2 * count_nonzero
        return torch.empty(len(exp_avgs), width, dtype=dtype, device=_device(exp_avgs))

    @torch.library.register_fake("metaadamw_fast::adamw_update_")
    def _(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, *others):  # type: ignore[no-untyped-def]
        numbers, rest = others[: len(HYPERPARAMETERS)], others[len(HYPERPARAMETERS) :]  # new_sums, seed, low_precision_params
        low = rest[2] if len(rest) > 2 else None
        check_update(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, *numbers, low_precision_params=low)
