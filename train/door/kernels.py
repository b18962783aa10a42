"""Tries single operations of a training step on the device, forward and backward, against float64 on the CPU.

Those that nobody could try without a card: matrix products for its architecture, flash attention with the model's
heads, 16-bit kernels of indexing. A process of its own, because a kernel that fails may take the process with it:
`python -m train.door.cli train.door.kernels DEVICE FIRST` prints a JSON line for the build and one for each trial from
number FIRST on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.nn.functional import swiglu

from train.machine.devices import use_device
from vl2.attention import attention
from vl2.norm import RMSNorm

# What Paddle's error codes are in Python (paddle/fluid/pybind/exception.cc).
PADDLE_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError, SystemError, OSError, TypeError)
# Relative to the largest number: sums in another order, and one rounding of what went in and came out. TF32 in place of
# float32 is off by 5e-4.
TOLERANCE = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 2e-2}
_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operation: shapes of its floating operands, whole numbers beside them, and how it is called."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., paddle.Tensor]
    high: tuple[int, ...] = ()  # for each list of whole numbers the first number that is too large; as long as shape 0
    learns: bool = True  # whether backward is tried
    dtypes: tuple[str, ...] = ("float32", "half")


def _scatter(x: paddle.Tensor, rows: paddle.Tensor) -> paddle.Tensor:
    return paddle.scatter(x, paddle.arange(rows.shape[0]) * 2, rows)


def _attention(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, *, causal: bool, lens: Sequence[int] = (64, 32)
) -> paddle.Tensor:
    return attention(q, k, v, lens, lens, scale=q.shape[-1] ** -0.5, causal=causal)


def _heads(size: int, value: int | None = None) -> tuple[tuple[int, ...], ...]:
    return (_TOKENS, 2, size), (_TOKENS, 2, size), (_TOKENS, 2, value or size)


def _rms_norm(x: paddle.Tensor) -> paddle.Tensor:
    return RMSNorm(x.shape[-1], 1e-6)(x)


def _layer_norm(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _cross_entropy(logits: paddle.Tensor, ids: paddle.Tensor) -> paddle.Tensor:
    return F.cross_entropy(logits, ids, reduction="none")


KERNELS = (
    Kernel(name="product", shapes=((_TOKENS, 1280), (1280, 256)), call=paddle.matmul),
    Kernel(name="product of patches, 588 rows", shapes=((_TOKENS, 588), (588, 128)), call=paddle.matmul),
    Kernel(name="product with bias (cublasLt)", shapes=((_TOKENS, 1152), (1152, 256), (256,)), call=F.linear),
    Kernel(name="batched product", shapes=((8, 16, 256), (8, 256, 64)), call=paddle.bmm),
    Kernel(name="attention, 72 channels (vision)", shapes=_heads(72), call=partial(_attention, causal=False)),
    Kernel(name="attention, 128 channels (Tiny)", shapes=_heads(128), call=partial(_attention, causal=True)),
    Kernel(
        name="attention, 192 channels (Small, full)", shapes=_heads(192, 128), call=partial(_attention, causal=True)
    ),
    Kernel(name="RMS norm", shapes=((_TOKENS, 256),), call=_rms_norm),
    Kernel(name="layer norm", shapes=((_TOKENS, 256), (256,), (256,)), call=_layer_norm),
    Kernel(name="swiglu", shapes=((_TOKENS, 256),), call=swiglu),
    Kernel(name="batched product added to", shapes=((8, 16, 64), (8, 16, 256), (8, 256, 64)), call=paddle.baddbmm),
    Kernel(name="division by a number", shapes=((_TOKENS, 64),), call=lambda x: x / 3.0, dtypes=("float32",)),
    Kernel(name="cross entropy", shapes=((_TOKENS, 64),), high=(64,), call=_cross_entropy, dtypes=("float32",)),
    Kernel(name="softmax", shapes=((_TOKENS, 64),), call=F.softmax),
    Kernel(name="silu", shapes=((_TOKENS, 64),), call=F.silu),
    Kernel(name="gelu", shapes=((_TOKENS, 64),), call=partial(F.gelu, approximate=True)),
    Kernel(name="scatter", shapes=((_TOKENS, 64), (32, 64)), call=_scatter),
    Kernel(name="gather", shapes=((_TOKENS, 64),), high=(_TOKENS,), call=paddle.gather),
    Kernel(name="embedding", shapes=((_TOKENS, 64),), high=(_TOKENS,), call=lambda x, ids: F.embedding(ids, x)),
    Kernel(name="topk", shapes=((_TOKENS, 64),), call=lambda x: paddle.topk(x, 6)[0]),
    Kernel(
        name="take_along_axis",
        shapes=((_TOKENS, 64),),
        high=(64,),
        call=lambda x, ids: paddle.take_along_axis(x, ids.unsqueeze(1), axis=1, broadcast=False),
    ),
    Kernel(
        name="bincount",
        shapes=((_TOKENS,),),
        high=(64,),
        call=lambda x, ids: paddle.bincount(ids, minlength=64),
        learns=False,
        dtypes=("float32",),
    ),
    Kernel(name="argmax", shapes=((_TOKENS, 64),), call=lambda x: paddle.argmax(x, -1), learns=False),
)


def plan_trials(half: str) -> list[tuple[Kernel, str]]:
    """Every operation with each of its types.

    Args:
        half: the 16-bit type of the device; empty: it has none, as a CPU.
    """
    kinds = {"float32": "float32", "half": half}
    return [(kernel, kinds[kind]) for kernel in KERNELS for kind in kernel.dtypes if kinds[kind]]


def error_of(kernel: Kernel, dtype: str, device: str) -> float:
    """How far the device is off: the largest difference to float64 on the CPU, relative to the largest number.

    Args:
        kernel: what to compute, forward and backward.
        dtype: to compute it in.
        device: Paddle's name of it.
    """
    draw = np.random.default_rng(0)
    # Rounded as the device will have them, so that only its own arithmetic is compared.
    floats = [_rounded(draw.normal(size=shape), dtype) for shape in kernel.shapes]
    whole = [draw.integers(0, high, kernel.shapes[0][0]) for high in kernel.high]
    paddle.set_device("cpu")
    shape = _call(kernel, [paddle.to_tensor(array) for array in floats], whole).shape
    weights = _rounded(draw.normal(size=shape), dtype)
    found = _outcome(kernel, floats, whole, weights, dtype, device)
    expected = _outcome(kernel, floats, whole, weights, "float64", "cpu")
    scales = [max(float(np.abs(b).max()), 1e-30) for b in expected]
    errors = [float(np.abs(a - b).max()) / scale for a, b, scale in zip(found, expected, scales, strict=True)]
    return max(error if np.isfinite(error) else float("inf") for error in errors)


def _rounded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Float64 numbers that `dtype` holds exactly."""
    paddle.set_device("cpu")
    return paddle.to_tensor(numbers.astype("float32")).astype(dtype).astype("float64").numpy()


def _call(kernel: Kernel, tensors: Sequence[paddle.Tensor], whole: Sequence[np.ndarray]) -> paddle.Tensor:
    return kernel.call(*tensors, *(paddle.to_tensor(numbers) for numbers in whole))


def _outcome(
    kernel: Kernel,
    floats: Sequence[np.ndarray],
    whole: Sequence[np.ndarray],
    weights: np.ndarray,
    dtype: str,
    device: str,
) -> list[np.ndarray]:
    """The result, and the gradients of its sum under these weights, in float64."""
    paddle.set_device(device)
    paddle.set_default_dtype("float64" if dtype == "float64" else "float32")
    wide = paddle.get_default_dtype()
    tensors = [paddle.to_tensor(array).astype(dtype) for array in floats]
    for tensor in tensors:
        tensor.stop_gradient = not kernel.learns
    out = _call(kernel, tensors, whole)
    results = [out]
    if kernel.learns:
        (out * paddle.to_tensor(weights).astype(out.dtype)).astype(wide).sum().backward()
        results += [tensor.grad for tensor in tensors if tensor.grad is not None]
    paddle.set_default_dtype("float32")
    return [result.detach().astype(wide).numpy().astype("float64") for result in results]


def build_facts() -> dict[str, Any]:
    """What the installed Paddle was built for, and what it sees of the current device."""
    facts: dict[str, Any] = {
        "paddle": paddle.__version__,
        "cuda": paddle.version.cuda(),
        "cudnn": paddle.version.cudnn(),
        "nccl": paddle.version.nccl(),
        "archs": [str(arch) for arch in paddle.version.cuda_archs()],
    }
    if paddle.get_device().startswith("gpu"):
        facts["device"] = paddle.device.cuda.get_device_name()
        facts["capability"] = list(paddle.device.cuda.get_device_capability())
    return facts


def main(arguments: list[str]) -> int:
    """Entry script: 0 all were tried, 1 the device is no longer to be trusted after the last one printed."""
    device = use_device(arguments[0])
    facts = build_facts()
    print(json.dumps({"build": facts}), flush=True)
    half = ("bfloat16" if facts["capability"][0] >= 8 else "float16") if "capability" in facts else ""
    for kernel, dtype in plan_trials(half)[int(arguments[1]) :]:
        result: dict[str, Any] = {"kernel": kernel.name, "dtype": dtype}
        print(json.dumps({"trying": result}), flush=True)
        try:
            error = error_of(kernel, dtype, device)
        except PADDLE_ERRORS as problem:
            lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
            said = next((line for line in lines if "Error" in line), lines[-1] if lines else type(problem).__name__)
            print(json.dumps({**result, "said": said[:300]}), flush=True)
            if any(word in str(problem) for word in ("CUDA error", "CUBLAS", "CUDNN")):
                return 1
        else:
            print(json.dumps({**result, "error": error, "limit": TOLERANCE[dtype]}), flush=True)
    return 0
