"""A tiny model of random weights, factors on it that matter, and its logits."""

import numpy as np
import paddle

from vl2.config import VL2Config
from vl2.parameters import init_model

IMAGE_ID = 1000


def new_model(config: VL2Config, dtype: str = "float32"):
    """Weights three times those of a fresh model, so that every block matters."""
    model = init_model(config, IMAGE_ID, seed=1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.set_value(parameter * 3.0)
    if dtype != "float32":
        model.to(dtype=dtype)
    return model


def randomise(lora_model, scale: float = 0.05) -> None:
    """Factors that change the logits by 70 %; much larger ones make the model ill-conditioned (0.2: noise of 6e-5)."""
    rng = np.random.default_rng(11)
    for parameter in lora_model.factors().values():
        parameter.set_value(rng.normal(0, scale, parameter.shape).astype("float32"))


def logits(model, batch):
    with paddle.no_grad():
        inner = getattr(model, "model", model)
        return inner.language.logits(inner(batch)).numpy()
