"""Every number has bounds, so that a slip of the finger is refused by name and neither hangs nor overflows."""

import re

import pytest

from train.config import load
from train.config.fields import check_values, list_entry_keys, list_keys, value_of
from train.config.schema import EvaluateConfig, ExportConfig, InferConfig, TrainConfig
from train.config.serve_schema import ServeConfig
from train.machine.devices import Machine
from vl2.errors import UserError

GPU = Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True)
SCHEMAS = (TrainConfig, ExportConfig, InferConfig, EvaluateConfig, ServeConfig)
NUMBERS = [
    (schema, spec)
    for schema in SCHEMAS
    for key in list_keys(schema)
    for spec in (key, *list_entry_keys(key, "vision" if key.is_table else "0"))
    if spec.type in (int, float, dict[str, int], dict[str, float])
]


def is_of_entry(spec):
    """Whether a key belongs to an entry of a list or table, as data.sources[0].repeat does."""
    return "[0]." in spec.name or spec.name.startswith("optim.groups.")


def read(schema, argument):
    if schema is TrainConfig:
        return load.load_config(["conf=sft_tiny", argument], GPU)
    if schema is InferConfig:
        return load.load_infer_config(["model=m", "prompt=p", argument])
    if schema is ServeConfig:
        return load.load_serve_config(["model=m", argument])
    return load.load_eval_config(["model=m", "data.path=d", argument])


def argument(name, value):
    """data.sources[0].repeat is no key that could be typed by itself."""
    before, inside, leaf = name.partition("[0].")
    return f"{before}=[{{path:a,{leaf}:{value}}}]" if inside else f"{name}={value}"


def test_numbers_are_found():
    assert len(NUMBERS) > 40


@pytest.mark.parametrize(("schema", "spec"), NUMBERS, ids=lambda value: getattr(value, "name", ""))
def test_number_has_both_bounds(schema, spec):
    assert spec.low is not None
    assert spec.high is not None
    assert spec.low < spec.high < float("inf")


@pytest.mark.parametrize(
    ("schema", "spec"),
    [(schema, spec) for schema, spec in NUMBERS if not is_of_entry(spec)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_no_sane_number_is_refused_by_name(schema, spec):
    """epochs=inf planned for ever, optim.lr=1e9 trained weights of 2e9 at exit 0, seed=10^23 overflowed."""
    owner, _, leaf = spec.name.rpartition(".")
    for value in (float("inf"), float("nan"), float("-inf"), 10**30, -(10**30)):
        config = schema()
        check_values(config)
        setattr(value_of(config, owner) if owner else config, leaf, {"experts": value} if spec.is_table else value)
        name = f"{spec.name}.experts" if spec.is_table else spec.name
        with pytest.raises(UserError, match=f"^{re.escape(f'{name}={value}')}: expected at (most|least)"):
            check_values(config)


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1" + "0" * 30])
@pytest.mark.parametrize(
    ("schema", "name"),
    [
        (TrainConfig, "save_steps"),
        (TrainConfig, "epochs"),
        (TrainConfig, "lora.ranks.experts"),
        (TrainConfig, "lora.alphas.experts"),
        (InferConfig, "top_p"),
        (EvaluateConfig, "limit"),
        *((schema, spec.name) for schema, spec in NUMBERS if is_of_entry(spec)),
    ],
)
@pytest.mark.slow
def test_what_is_no_sane_number_is_refused_as_typed(schema, name, value):
    """A key of each type, through Hydra, which converts the text: also what it cannot convert is said by name."""
    place = re.escape(name)
    with pytest.raises(UserError, match=f"^{place}={value}: expected |^{place}=.*: expected at (most|least)"):
        read(schema, argument(name, value))


@pytest.mark.parametrize(
    ("schema", "argument", "message"),
    [
        (TrainConfig, "epochs=inf", "epochs=inf: expected at most 1000 epochs"),
        (TrainConfig, "epochs=nan", "epochs=nan: expected at least 0.001 epochs"),
        (TrainConfig, "max_steps=100000000000000000000", "max_steps=1.*: expected at most 1000000 optimizer steps"),
        (TrainConfig, "seed=100000000000000000000000", "seed=1.*: expected at most 4294967295"),
        (TrainConfig, "data.workers=100000", "data.workers=100000: expected at most 256 processes"),
        (TrainConfig, "optim.lr=1e9", "optim.lr=1000000000.0: expected at most 1"),
        (TrainConfig, "lora.alpha=0", "lora.alpha=0.0: expected at least 0.001"),
        (TrainConfig, "lora.alphas.experts=0", "lora.alphas.experts=0.0: expected at least 0.001"),
        (InferConfig, "max_new_tokens=100000000000000000000", "max_new_tokens=1.*: expected at most 1000000 tokens"),
        (EvaluateConfig, "max_new_tokens=100000000000000000000", "max_new_tokens=1.*: expected at most"),
        (InferConfig, "top_p=0", "top_p=0.0: expected at least 0.001"),
        (InferConfig, "temperature=1e-310", "temperature=1e-310: expected 0, which is greedy, or at least 0.001"),
        (InferConfig, "temperature=nan", "temperature=nan: expected at least 0"),
    ],
)
def test_found_in_use(schema, argument, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read(schema, argument)
