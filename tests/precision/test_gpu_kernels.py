"""Every operator of a step and of a generation has a kernel for GPUs, by the lists in Paddle's sources.

The emulated runs of test_step.py are looked up where they are made. Here: that the look-up finds what is missing, that
nothing which runs escapes it, and full fine-tuning in float16.
"""

import re
import shutil
from types import SimpleNamespace

import paddle
import pytest
from paddle import profiler
from paddle.base import libpaddle

from tests.bench.launches import BOTH, ONE, blocks_of
from tests.precision.emulation import half_precision_on_cpu
from tests.precision.gpu_kernels import LATER, UNSEEN, missing, needed, table
from tests.precision.make_gpu_kernels import NEW, OLD, preprocessed, registrations
from tests.precision.taken import Call, taken
from tests.precision.test_step import step
from vl2.balance import LoadBalance
from vl2.generate import generate
from vl2.prompt import IGNORE
from vl2.sampling import sample


def call(operator: str, *arguments, result: str | None = None, gradient: bool = False) -> Call:
    return Call(operator, arguments, (), result or arguments[0], gradient)


def test_an_operator_without_a_kernel_fails():
    assert missing([call("matmul", "float16", "float16"), call("made_up", "float32")]) == [
        "made_up: no such kernel is registered for GPUs"
    ]


def test_a_type_without_a_kernel_fails():
    """`bincount` in the router once: no kernel for 16 bits; whoever sums weights by it finds out here."""
    assert not missing([call("bincount", "int64", None, None)])
    (fault,) = missing([call("bincount", "float16", None, None)])
    assert fault == "bincount: no kernel for float16 (has float32 float64 int32 int64)"


def test_a_gradient_without_a_kernel_fails():
    """matmul multiplies int64, but has no gradient for it: the gradients' kernels are looked up by themselves."""
    assert not missing([call("matmul", "int64", "int64")])
    (fault,) = missing([call("matmul", "int64", "int64", gradient=True)])
    assert fault.startswith("matmul_grad: no kernel for int64 ")


@pytest.mark.parametrize(
    ("one", "dtype"),
    [
        (call("embedding", "int64", "bfloat16", None, None), "bfloat16"),  # by the weight, not by the ids
        (call("full", None, None, "float16", None), "float16"),  # by what is asked for
        (call("add", "float32", "bfloat16"), "float32"),  # the wider
        (call("add_", "float16", "bfloat16"), "float32"),
        (call("concat", ("bfloat16", "bfloat16"), None), "bfloat16"),
        (Call("gather", ("float16",), (("index", "int64"),), "float16", False), "float16"),
    ],
)
def test_which_type_chooses_the_kernel(one, dtype):
    assert needed(one)[0][1] == dtype


def test_what_a_call_is_recorded_as():
    """Methods and functions, numbers and tensors, forward only and with gradients, and no cast of the emulation."""
    x = paddle.ones([4, 4], "bfloat16")
    weight = paddle.ones([4, 4], "bfloat16")
    weight.stop_gradient = False
    with half_precision_on_cpu(), taken() as calls:
        product = (x * 2.0) @ weight
        with paddle.no_grad():
            paddle.add(x, weight)
        product[1:].astype("float32")
    assert {(one.operator, one.result, one.gradient) for one in calls} == {
        ("scale", "bfloat16", False),
        ("matmul", "bfloat16", True),
        ("add", "bfloat16", False),
        ("slice", "bfloat16", True),
        ("cast", "float32", True),
    }
    assert not missing(calls)


def test_sampling():
    """The draw of a token, in float64, is made where the logits are."""
    with taken() as calls:
        sample(paddle.randn([2, 9]), 0.7, 0.9, paddle.to_tensor([0.1, 0.8], dtype="float64"))
    assert {one.operator for one in calls} >= {"softmax", "argsort", "cumsum", "take_along_axis"}
    assert not missing(calls)


def test_a_run_with_a_missing_kernel_is_found():
    """The emulation computes what no GPU would: a histogram of bfloat16."""
    x = paddle.to_tensor([0.5, 1.5], "bfloat16")
    with half_precision_on_cpu(), taken() as calls:
        paddle.histogram(x, bins=2, min=0, max=2)
    assert any(fault.startswith("histogram: no kernel for bfloat16") for fault in missing(calls))


def test_sources_of_the_table():
    assert re.fullmatch(r"[0-9a-f]{40}", table()["source"]["commit"])
    assert len(table()["kernels"]) > 900 and len(table()["operators"]) > 500
    assert not (LATER.keys() | UNSEEN.keys()) & table()["kernels"].keys()  # then by hand no longer
    assert all(re.match(r"[0-9a-f]{40}:paddle/", source) for _, source in LATER.values())
    # Products in 16 bits, the point of it all.
    assert {"bfloat16", "float16"} <= set(table()["kernels"]["matmul"][0].split())
    # What depends on the build says so.
    assert table()["kernels"]["layer_norm"][2] == "bfloat16"


SOURCE = """
#include "paddle/phi/core/kernel_registry.h"
#define PD_REGISTER_ACTIVATION_KERNEL(name, func) \\
  PD_REGISTER_KERNEL(name, GPU, ALL_LAYOUT, phi::func, float, phi::dtype::float16) {}
PD_REGISTER_ACTIVATION_KERNEL(relu, ReluKernel)
#ifdef PADDLE_WITH_HIP
PD_REGISTER_KERNEL(conv, GPU, ALL_LAYOUT, phi::Conv, float) {}
#elif CUDNN_VERSION_MIN(8, 1, 0)
PD_REGISTER_KERNEL(conv, GPUDNN, ALL_LAYOUT, phi::Conv, float, phi::dtype::bfloat16) {}
#else
PD_REGISTER_KERNEL(conv, GPUDNN, ALL_LAYOUT, phi::Conv, float) {}
#endif
PD_REGISTER_KERNEL(sort, CPU, ALL_LAYOUT, phi::Sort, bool) {}
PD_REGISTER_KERNEL(add, KPS, ALL_LAYOUT, phi::Add, int64_t, phi::dtype::complex<float>) {}
PD_REGISTER_KERNEL_FOR_ALL_BACKEND_DTYPE(slice, STRIDED, phi::Slice) {}
PD_REGISTER_KERNEL_FOR_ALL_DTYPE(assign, GPU, ALL_LAYOUT, phi::Assign) {}
"""


@pytest.mark.skipif(not shutil.which("cpp"), reason="needs a C preprocessor")
def test_how_registrations_are_read():
    """A file's own macros, branches for HIP and for versions, other devices, KPS (a GPU here), views of any type."""
    found = dict(registrations(preprocessed(SOURCE, NEW)))
    assert found == {
        "relu": {"float32", "float16"},
        "conv": {"float32", "bfloat16"},
        "add": {"int64", "complex64"},
        "slice": {"all"},
        "assign": {"all"},
    }
    assert dict(registrations(preprocessed(SOURCE, OLD)))["conv"] == {"float32"}


def launched_by(work) -> set[str]:
    """Kernels that Paddle's own profiler sees, forward and backward."""
    watch = profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None)
    watch.start()
    work()
    watch.stop()
    found, waiting = set(), list(watch.profiler_result.get_data().values())
    while waiting:
        event = waiting.pop()
        waiting += event.children_node
        if event.type == profiler.TracerEventType.DygraphKernelLaunch:
            found.add(event.name.removesuffix(" kernel launch"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("family", "full", "blocks"), [("nano_base", True, ONE), ("nano_tiny", False, BOTH)])
def test_nothing_that_runs_escapes(nano, pack, monkeypatch, family, full, blocks):
    """Steps in float32 and an answer: all that Paddle's profiler sees was recorded, or is a gradient of what was.

    The first step as the trainer makes it, recomputed; the second with the load-balance loss.

    Each name is one of the installed version's kernels as well: between the table's version and this none was renamed.
    """
    monkeypatch.setattr("vl2.expert_rows.choose_blocks", blocks_of(blocks))
    model = nano(family, "float32", full=full)
    model.set_recompute(1)

    def work() -> None:
        step(model, pack)
        balance = LoadBalance(pack["seq_lens"], pack["labels"] != IGNORE)
        (model.loss(pack, balance)[0] + balance.total()).backward()
        generate(model, [{"input_ids": pack["input_ids"][-40:]}], eos_id=-1, max_new_tokens=3, chunk=48)

    with taken() as calls:
        launched = launched_by(work)
    known = {kernel for one in calls for kernels, _ in needed(one) for kernel in kernels}
    assert len(launched) > 60 and sum(name.endswith("_grad") for name in launched) > 15
    assert not launched - known
    assert not missing(calls)
    renamed = known - set(libpaddle._get_registered_phi_kernels("function"))
    assert not renamed


@pytest.mark.slow
def test_full_step_in_float16(nano, pack, monkeypatch):
    """Float32 weights computed in float16 with the loss scaler, plain attention, every kind of block: a V100."""
    gpu = SimpleNamespace(_expected_place=SimpleNamespace(is_gpu_place=lambda: True))
    monkeypatch.setattr("paddle.amp.grad_scaler._dygraph_tracer", lambda: gpu)
    monkeypatch.setattr("vl2.expert_rows.choose_blocks", blocks_of(BOTH))
    model = nano("nano_tiny", "float16", full=True)
    model.set_recompute(1)
    with half_precision_on_cpu(flash=False), taken() as calls:
        step(model, pack, paddle.amp.GradScaler(init_loss_scaling=2.0**15))
    types = {one.result for one in calls}
    assert {"float16", "float32"} <= types and "bfloat16" not in types
    assert not missing(calls)
