"""The traced forward pass in 16-bit has no operator that a GPU would refuse or run in another precision."""

import paddle
import pytest

from tests.precision.audit import trace_loss
from vl2.linear import linear
from vl2.lora_layers import LoRALinear
from vl2.norm import RMSNorm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "dtype", "flash", "full"),
    [
        ("nano_tiny", "bfloat16", True, False),
        ("nano_small", "bfloat16", False, False),
        ("nano_base", "bfloat16", True, False),
        ("nano_base", "bfloat16", True, True),
        ("nano_tiny", "float16", False, False),
    ],
)
def test_no_mixture(nano, pack, family, dtype, flash, full):
    """LoRA, and full fine-tuning whose float32 weights are cast; with and without the flash kernel."""
    model = nano(family, dtype, full=full)
    trace = trace_loss(model, pack, flash=flash)
    assert trace.faults() == []
    assert len(trace.operators) > 1000
    assert trace.flash == (len(model.vision.blocks) + len(model.language.model.layers) if flash else 0)
    # Routers are float32, and count their choices for the load balance; all else is in the compute dtype.
    exact = [where.partition(":")[0] for where, types in trace.products if types == {paddle.float32}]
    assert sorted(exact) == ["vl2/balance.py"] * 3 + ["vl2/moe.py"] * 3
    assert len(trace.products) > 40
    assert all(len(types) == 1 for _, types in trace.products)


def faults_with(monkeypatch, nano, pack, owner, forward) -> list[str]:
    monkeypatch.setattr(owner, "forward", forward)
    return trace_loss(nano("nano_tiny", "bfloat16"), pack).faults()


def test_a_planted_product_of_two_types_is_found(nano, pack, monkeypatch):
    """As PaddleNLP's own LoRALinear has it. Tracing alone lets it pass."""

    def forward(self, x):
        return linear(x, self.weight, self.bias) + paddle.matmul(paddle.matmul(x, self.lora_A), self.lora_B)

    found = faults_with(monkeypatch, nano, pack, LoRALinear, forward)
    assert any(fault.endswith("matmul of bfloat16 and float32") for fault in found)


def test_a_planted_sum_that_paddle_would_promote_is_found(nano, pack, monkeypatch):
    """A norm that forgets to cast back: the stream would quietly go on in float32."""

    def forward(self, x_TD):
        x_TD = x_TD.astype("float32")
        mean_T1 = (x_TD * x_TD).mean(axis=-1, keepdim=True)
        return x_TD * paddle.rsqrt(mean_T1 + self.eps) * self.weight.astype("float32")

    found = faults_with(monkeypatch, nano, pack, RMSNorm, forward)
    assert any("vl2/language.py" in fault and "add" in fault for fault in found), found


def test_a_planted_wrong_shape_is_found(nano, pack, monkeypatch):
    with pytest.raises(ValueError, match=r"matmul|dim"):
        faults_with(monkeypatch, nano, pack, LoRALinear, lambda self, x: paddle.matmul(x, self.lora_B))
