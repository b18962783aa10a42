"""Whole runs in bfloat16 and float16, emulated on the CPU: what only a GPU computes in, through the trainer."""

import json
from types import SimpleNamespace

import pytest

from tests.precision.emulation import half_precision_on_cpu
from vl2.checkpoint.tensor_files import read_header

pytestmark = pytest.mark.slow


@pytest.fixture
def half_run(run, monkeypatch):
    """half_run(run_dir, "fp16", "key=value", ...): a run that computes in that precision, as on a GPU."""
    import train.run.trainer as trainer
    import train.run.training as entry

    build_base, arguments = entry.build_base, trainer._arguments

    def computing(config, folder, **parts):
        model = build_base(config, folder, **parts)
        model.compute_dtype = compute[config.precision]
        return model

    def scaling(config, plan):
        found = arguments(config, plan)
        found.fp16 = config.precision == "fp16"
        found.scale_loss = scale
        return found

    compute = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    scale = 2.0**15
    gpu = SimpleNamespace(_expected_place=SimpleNamespace(is_gpu_place=lambda: True))
    monkeypatch.setattr("paddle.amp.grad_scaler._dygraph_tracer", lambda: gpu)
    monkeypatch.setattr(entry, "build_base", computing)
    monkeypatch.setattr(trainer, "_arguments", scaling)

    def go(run_dir, precision, *more, start=2.0**15):
        nonlocal scale
        scale = start
        with half_precision_on_cpu() as ran:
            code = run(run_dir, f"precision={precision}", "recompute=1", *more)
        assert ran["flash_attn_unpadded"] >= 4  # one for each layer
        return code

    return go


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scaler_state(run_dir, step: int) -> dict:
    return json.loads((run_dir / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())["scaler"]


OPTIONS = ("max_steps=3", "packs_per_step=2", "optim.lr=1e-3", "optim.aux_loss=0.01")


@pytest.fixture(scope="module")
def exact(run, tmp_path_factory) -> list[dict]:
    """Metrics of the run in float32."""
    run_dir = tmp_path_factory.mktemp("runs") / "exact"
    assert run(run_dir, *OPTIONS) == 0
    return lines(run_dir)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_run_stays_close_to_float32(exact, half_run, tmp_path, precision):
    """Three steps, dropout and the load-balance loss on; the losses within 0.5 %, the gradient norms within 5 %."""
    assert half_run(tmp_path / "half", precision, *OPTIONS) == 0
    half = lines(tmp_path / "half")
    for key, tolerance in (("loss", 5e-3), ("aux_loss", 5e-3), ("grad_norm", 5e-2)):
        assert [line[key] for line in half] == pytest.approx([line[key] for line in exact], rel=tolerance), key
        assert [line[key] for line in half] != [line[key] for line in exact]
    kinds = {
        stored.dtype for stored in read_header(tmp_path / "half" / "adapter" / "peft_model.safetensors")[0].values()
    }
    assert kinds == {"float32"}
    scaler = scaler_state(tmp_path / "half", 3)
    assert scaler is None if precision == "bf16" else scaler["scale"] == [2.0**15] and scaler["incr_count"] == 3


def test_overflow_is_left_out_and_the_scale_resumes(half_run, tmp_path):
    """From 2^28 the loss scaler halves until the gradients fit; a resumed run goes on with the scale it had."""
    options = ("packs_per_step=1", "optim.lr=1e-3")
    assert half_run(tmp_path / "run", "fp16", "max_steps=2", *options, start=2.0**28) == 0
    assert [line["grad_norm"] for line in lines(tmp_path / "run")] == [None, None]
    assert scaler_state(tmp_path / "run", 2)["scale"] == [2.0**26]
    assert half_run(tmp_path / "run", "fp16", "max_steps=3", *options, "resume=auto") == 0
    assert scaler_state(tmp_path / "run", 3)["scale"] == [2.0**25]


def test_too_many_overflows_end_the_run(half_run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.finite.MAX_LEFT_OUT", 3)
    with pytest.raises(FloatingPointError, match=r"step 3: gradients overflowed in 3 steps in a row\. Lower optim\.lr"):
        half_run(tmp_path / "run", "fp16", "max_steps=6", "packs_per_step=1", start=2.0**40)
