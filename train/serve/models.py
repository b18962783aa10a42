"""What is served, by name: a base model, and adapters that share its memory."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import paddle

from data.images.reader import ImageReader
from train.ask.load import Loaded, load_beside, load_opened, open_model
from train.ask.model_memory import cached_numbers
from train.ask.note import note
from train.config.serve_schema import ServeConfig
from train.machine.memory import FreeMemory, gigabytes
from train.store.checkpoints import chosen_checkpoint
from vl2.adapter.switch import Switch
from vl2.dtypes import item_bytes
from vl2.errors import UserError

_SPARE_ROOM = 2
_INSIDE_A_RUN = re.compile(r"(export|adapter)(_|-|$)")  # folders that are called by what they are, not by whose


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that requests can name."""

    name: str
    loaded: Loaded
    switch: Switch
    adapter: str | None  # None: the base

    def use(self) -> None:
        """Let the model in memory compute as this one."""
        self.switch.use(self.adapter)


def load_models(config: ServeConfig) -> dict[str, Served]:
    """Load the base model once, and the adapters beside it.

    What `model` names may be an adapter or a run: then it is the first to be served, and its base the second.

    Raises:
        UserError: as `open_model`, `load_opened` and `load_beside`; or two of one name.
    """
    folder = chosen_checkpoint(config.model, config.checkpoint)
    opened = open_model(folder, config.precision, config.base, config.check, config.frozen)
    base = load_opened(opened, adapter=False)
    base = dataclasses.replace(base, images=ImageReader(exif=base.images.exif, max_pixels=config.max_pixels))
    switch = Switch(base.model)
    folders = dict(config.adapters)
    name = config.name or name_of(config.model)
    if base.source.kind == "adapter":
        folders = {name: folder, **_without(folders, name)}
        name = name_of(str(base.source.base))
    adapters = {}
    for adapter, place in _without(folders, name).items():
        with switch.adding(adapter):
            try:
                loaded = load_beside(base, place)
            except UserError as error:
                raise UserError(f"{'model' if place == folder else f'adapters.{adapter}'}: {error}") from error
        adapters[adapter] = Served(name=adapter, loaded=loaded, switch=switch, adapter=adapter)
    served = {name: Served(name=name, loaded=base, switch=switch, adapter=None)}
    for each in (base, *(other.loaded for other in adapters.values())):
        if each.source.rehearsal:
            note("a model comes from a rehearsal on nano")
            break
    return {**adapters, **served} if base.source.kind == "adapter" else {**served, **adapters}


def warn_of_memory(served: dict[str, Served], max_batch_tokens: int, free: FreeMemory | None) -> None:
    """Say so where the answers that may run at the same time need more memory than there is.

    Args:
        served: all that is.
        max_batch_tokens: of the settings.
        free: what can be had once the weights are loaded; None: nobody knows.
    """
    model = next(iter(served.values())).loaded.model
    # Activations are float32 on a CPU. A sequence that outgrows its place gets one of twice the room.
    weights = str(model.language.lm_head.weight.dtype).removeprefix("paddle.")
    dtype = "float32" if paddle.get_device() == "cpu" else weights
    each = _SPARE_ROOM * item_bytes(dtype) * cached_numbers(model.config.language)
    if free is not None and each * max_batch_tokens > free.num_bytes:
        note(
            f"max_batch_tokens={max_batch_tokens}: keys and values of so many tokens can take "
            f"{gigabytes(each * max_batch_tokens)}, and {gigabytes(free.num_bytes)} are available ({free.where}); "
            f"max_batch_tokens={free.num_bytes // each} fits"
        )


def name_of(model: str) -> str:
    """What a model is called: the last part of its folder or its name on the hub; inside a run, the run's.

    outputs/cats/export -> cats        deepseek-ai/deepseek-vl2-tiny -> deepseek-vl2-tiny

    Args:
        model: folder or name.
    """
    path = Path(model).absolute() if Path(model).exists() else Path(model)
    return path.parent.name if _INSIDE_A_RUN.match(path.name) and path.parent.name else path.name


def _without(folders: dict[str, str], name: str) -> dict[str, str]:
    if name in folders:
        raise UserError(
            f"adapters.{name}: {name} is what the model is called; give one of them another name (name=...)"
        )
    return folders
