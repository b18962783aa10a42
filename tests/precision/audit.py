"""Traces the model to a static program with 16-bit weights, which runs no kernel, and audits it operator by operator.

Tracing checks shapes by itself, but lets a product of bfloat16 and float32 pass, and turns a mixed sum into one in
float32 without a word; both are found here.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
from paddle import _C_ops
from paddle.autograd import PyLayer
from paddle.pir import Value

from tests.precision.emulation import AS_IS, BINARY, HALF, check_flash, describe, floating_types, in_float32
from vl2.balance import LoadBalance
from vl2.constant_tensors import send
from vl2.model import DeepseekVL2
from vl2.projector import distinct_tiles
from vl2.prompt import IGNORE

PRODUCTS = ("matmul", "bmm", "linear", "addmm", "baddbmm")
# Operators whose further operands are numbers, not tensors: a factor or a filling is float32 whatever the tensor is.
NUM_TENSORS = {"scale": 1, "pad": 1}


@dataclass(kw_only=True)
class Trace:
    """A traced forward pass."""

    program: paddle.static.Program | None = None
    mixed: list[str] = field(default_factory=list)  # seen when an operator was called, before Paddle evened it out
    products: list[tuple[str, set]] = field(default_factory=list)  # (where, floating types) of each matrix product
    flash: int = 0  # calls of the flash attention kernel

    @property
    def operators(self) -> list:
        """Of the program, in order."""
        assert self.program is not None
        return self.program.global_block().ops

    def faults(self) -> list[str]:
        """Every operator that a GPU would refuse or run in another precision: `vl2/lora.py:99 matmul of ...`."""
        found = list(self.mixed)
        for operator in self.operators:
            name = operator.name().removeprefix("pd_op.")
            types = floating_types(operator.operands_source()[: NUM_TENSORS.get(name)])
            if len(types) > 1 and name not in AS_IS:
                found.append(f"{_where(operator.attrs().get('op_callstack', []))} {describe(name, types)}")
        return list(dict.fromkeys(found))


def trace_loss(model: DeepseekVL2, batch: Mapping[str, np.ndarray], *, flash: bool = True) -> Trace:
    """Trace the loss and the load-balance loss of a batch in the model's compute dtype.

    Args:
        batch: as for `loss`, with tiles. Ids and tiles become inputs of the program, all else constants in it.
        flash: take the flash attention kernel where it fits.
    """
    trace = Trace()
    first, _ = distinct_tiles(batch["tiles"], [tuple(grid) for grid in batch["grids"]])

    @paddle.jit.not_to_static  # nothing in it depends on data, and the transformation stumbles over numpy code
    def run(ids, tiles):
        with _tracing(trace, model, batch["input_ids"], ids, tiles, flash):
            balance = LoadBalance(batch["seq_lens"], batch["labels"] != IGNORE)
            return model.loss(batch, balance)[0] + balance.total()

    def loss(ids, tiles):
        return run(ids, tiles)

    specs = [
        paddle.static.InputSpec(batch["input_ids"].shape, "int64", "ids"),
        paddle.static.InputSpec([len(first), *batch["tiles"].shape[1:]], "uint8", "tiles"),
    ]
    trace.program = paddle.jit.to_static(loss, full_graph=True, input_spec=specs).concrete_program.main_program
    return trace


@contextlib.contextmanager
def _tracing(trace: Trace, model: DeepseekVL2, ids_T: np.ndarray, ids, tiles, flash: bool) -> Iterator[None]:
    """What stands between the model and a static program: arrays that are inputs, counts that only a run knows."""
    language, to_tensor = model.config.language, paddle.to_tensor

    def input_among(arrays):
        return send(arrays) | {"input_ids": ids}

    def input_or_constant(data, *args, **kwargs):
        if isinstance(data, np.ndarray) and data.dtype == np.uint8:
            return tiles
        kwargs.pop("place", None)
        return to_tensor(data, *args, **kwargs)

    def counts(bounds_E1) -> list[int]:
        """In place of the host's reading: any that add up to the choices, with one expert crowded."""
        num_rows, num_experts = len(ids_T) * language.num_experts_per_tok, language.n_routed_experts
        each = num_rows // num_experts // 2
        return [num_rows - each * (num_experts - 1)] + [each] * (num_experts - 1)

    class Context:
        def save_for_backward(self, *tensors):
            pass

    def flash_kernel(q, k, v, q_bounds, k_bounds, *rest):
        check_flash(q, k, v, q_bounds, k_bounds)
        trace.flash += 1
        return paddle.assign(q), None

    with contextlib.ExitStack() as stack:
        for name in dir(_C_ops):
            function = getattr(_C_ops, name)
            if callable(function) and not name.startswith("_"):
                stack.enter_context(mock.patch.object(_C_ops, name, _watched(name, function, trace)))
        for name in (f"__{name}__" for name in BINARY):
            stack.enter_context(mock.patch.object(Value, name, _watched(name, getattr(Value, name), trace)))
        stack.enter_context(mock.patch.object(_C_ops, "flash_attn_unpadded", flash_kernel))
        stack.enter_context(mock.patch("vl2.attention._has_flash", lambda place: flash))
        stack.enter_context(mock.patch.object(paddle, "to_tensor", input_or_constant))
        stack.enter_context(mock.patch("vl2.model.send", input_among))
        stack.enter_context(mock.patch("vl2.ways.takes_batches", lambda place: True))
        stack.enter_context(mock.patch("vl2.expert_rows.read_counts", counts))
        apply = classmethod(lambda layer, *args: layer.forward(Context(), *args))
        stack.enter_context(mock.patch.object(PyLayer, "apply", apply))
        yield


def _watched(name: str, function, trace: Trace):
    def call(*args, **kwargs):
        found = floating_types([*args, *kwargs.values()])
        if name in PRODUCTS:
            trace.products.append((_where(traceback.format_stack()), found))
        if len(found) > 1 and name not in AS_IS:
            trace.mixed.append(f"{_where(traceback.format_stack())} {describe(name, found)}")
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            # A build without GPU kernels refuses to trace the few operators that have no 16-bit CPU kernel.
            if "Check data type error" not in str(error) or len(found) > 1 or not found & set(HALF):
                raise
            return in_float32(function, args, kwargs)

    return call


def _where(stack: list[str]) -> str:
    """The innermost line of vl2/ in a stack: `vl2/lora.py:99`."""
    for line in reversed(stack):
        if "vl2/" in line and line.lstrip().startswith("File "):
            file, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
            if Path(file).parent.name == "vl2" and "tests" not in Path(file).parts:
                return f"vl2/{Path(file).name}:{number}"
    return "?"
