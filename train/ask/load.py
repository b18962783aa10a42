"""One path to an answer for base models, adapters, full fine-tunes and exports: find, load, prepare, generate."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import paddle
import paddle.distributed as dist
from tqdm import tqdm

from data.images.pixels import Exif
from data.images.reader import DEFAULT_READER, ImageReader
from data.images.web_cache import default_folder
from data.vision_cache import VisionCache
from train.ask.model_memory import check_inference, weight_sizes
from train.ask.note import note
from train.ask.processor import exif_in_force, resolutions_in_force
from train.ask.source import Source, find_source
from train.machine.devices import check_precision
from train.store.hub import resolve_model
from train.store.names import WEIGHTS_FILE
from vl2.checkpoint.fingerprint import model_fingerprint, stored_fingerprint
from vl2.checkpoint.load import TOWER, load_model
from vl2.checkpoint.model_folder import ModelFolder, open_folder
from vl2.checkpoint.published import published
from vl2.checkpoint.tensor_files import read_header
from vl2.config import VL2Config
from vl2.dtypes import DTYPE_OF_SETTING, WEIGHT_DTYPES, item_bytes
from vl2.errors import UserError
from vl2.model import DeepseekVL2
from vl2.parameters import build_model, init_model, set_parameter
from vl2.tiles import Resolution
from vl2.tokenizer import Tokenizer

# From here on, loading takes long enough to show a bar.
_BAR_BYTES = 500_000_000


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to answer."""

    source: Source
    model: DeepseekVL2  # in eval mode, with the adapter's layers when there is one
    tokenizer: Tokenizer
    candidates: tuple[Resolution, ...]  # resolutions an image may be shown at
    frozen: str = "none"  # what the base's matrices are kept in, see vl2.quantised
    images: ImageReader = DEFAULT_READER  # opens pictures as in training
    vision_cache: VisionCache | None = None  # of the model's tower


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that is found and fits, before its weights are read."""

    source: Source
    folder: ModelFolder  # of the base
    dtype: str  # that its weights are stored in once loaded
    frozen: str = "none"  # what its matrices are kept in, see vl2.quantised

    @property
    def candidates(self) -> tuple[Resolution, ...]:
        """Resolutions an image may be shown at."""
        return resolutions_in_force(self.source, self.folder.config)

    @property
    def exif(self) -> Exif:
        """What is done with the EXIF orientation of pictures, as in training."""
        return exif_in_force(self.source)


def load(
    folder: str | Path, precision: str = "auto", base: str = "", check: str = "sizes", frozen: str = "auto"
) -> Loaded:
    """Load whatever `find_source` finds; see `open_model`.

    Raises:
        UserError: see `open_model` and `load_opened`.
    """
    return load_opened(open_model(folder, precision, base, check, frozen))


def open_model(
    folder: str | Path, precision: str = "auto", base: str = "", check: str = "sizes", frozen: str = "auto"
) -> Opened:
    """Find a model and see that it can be loaded here; no weights are read, but where it is to be fetched it is.

    Args:
        folder: base model (or its name on the hub), export, adapter, run or checkpoint.
        precision: stored type of the weights: bf16, fp16, fp32, or auto (as in the base's files).
        base: see `find_source`.
        check: "full" reads the whole base before, where it has a manifest.
        frozen: what the language model's matrices are kept in: none, nf4, int8, or auto (as an adapter was trained).

    Raises:
        UserError: see `resolve_model` and `find_source`; no memory for it; a precision that the GPU does not have.
    """
    if known := published(folder):  # before it is fetched
        wanted = DTYPE_OF_SETTING.get(precision, "bfloat16")
        check_precision(wanted)
        check_inference(
            folder, VL2Config.from_folder(known.config.parent), wanted, "none" if frozen == "auto" else frozen
        )
    source = find_source(resolve_model(folder), base, checksums=check == "full")
    opened = open_folder(source.base)
    dtype = DTYPE_OF_SETTING[precision] if precision != "auto" else stored_dtype(opened)
    check_precision(dtype)
    kept = source.frozen if frozen == "auto" else frozen
    beside = source.kind == "weights" and kept == source.frozen  # trained beside matrices that were kept so
    if kept != "none" and not beside and (source.kind == "weights" or source.random_seed is not None):
        raise UserError(
            f"frozen={kept}: only a base model's files can be read so, found the trained weights of {folder}; export "
            "them first"
        )
    check_inference(source.base, opened.config, dtype, kept)
    return Opened(source=source, folder=opened, dtype=dtype, frozen=kept)


def load_opened(opened: Opened, *, adapter: bool = True) -> Loaded:
    """Read the weights of a model.

    Args:
        opened: what to read.
        adapter: False reads the base alone of what is an adapter; `load_beside` puts it there.

    Raises:
        UserError: see `load_model`; an adapter of another base.
    """
    source, folder, dtype = opened.source, opened.folder, opened.dtype
    model = load_base(source, folder, dtype, opened.frozen)
    if source.kind == "adapter" and adapter:
        _put_adapter(opened, model)
    model.config = dataclasses.replace(model.config, candidate_resolutions=opened.candidates)
    if paddle.get_device().startswith("gpu"):
        model.compute_dtype = dtype
    model.eval()
    images = ImageReader(exif=opened.exif, cache=default_folder())
    return Loaded(
        source=source,
        model=model,
        tokenizer=folder.tokenizer,
        candidates=opened.candidates,
        frozen=opened.frozen,
        images=images,
    )


def load_beside(loaded: Loaded, folder: str | Path) -> Loaded:
    """Put an adapter on a base that is in memory; the model is the same, and changed.

    Args:
        loaded: the base.
        folder: adapter, run or checkpoint.

    Raises:
        UserError: no adapter, or one of another base; the base has weights that were trained beside it.
    """
    if loaded.source.kind == "weights":  # whose base is in its folder, and what is in memory is not that
        raise UserError(
            f"{folder}: an adapter goes on the model that it was trained on, found the trained weights of "
            f"{loaded.source.trained}; serve it with its own base"
        )
    source = find_source(resolve_model(folder), str(loaded.source.base))
    if source.kind != "adapter":
        raise UserError(f"{folder}: expected an adapter, found trained weights; give that as model=")
    opened = Opened(source=source, folder=open_folder(source.base), dtype="", frozen=loaded.frozen)
    _put_adapter(opened, loaded.model)
    images = dataclasses.replace(loaded.images, exif=opened.exif)
    return dataclasses.replace(loaded, source=source, candidates=opened.candidates, images=images)


def _put_adapter(opened: Opened, model: DeepseekVL2) -> None:
    from vl2.adapter.folder import load_adapter  # here: it imports PaddleNLP, which takes seconds

    source = opened.source
    assert source.trained is not None
    load_adapter(model, source.trained, base_fingerprint=base_fingerprint(source, opened.folder, model), say=note)
    if source.frozen != opened.frozen:
        trained, here = ("full" if kind == "none" else kind for kind in (source.frozen, opened.frozen))
        note(f"{source.trained} was trained on a base in {trained}, and answers on one in {here}; see frozen=")


def stored_dtype(folder: ModelFolder) -> str:
    """The type that most weights of a model are stored in; bfloat16 when there are none."""
    try:
        dtype = folder.checkpoint.dtype
    except UserError:
        return "bfloat16"
    return dtype if dtype in WEIGHT_DTYPES else "bfloat16"


def load_with_bar(
    folder: ModelFolder,
    dtype: str,
    keep: Callable[[str], bool] = lambda path: True,
    *,
    tower: bool = True,
    frozen: str = "none",
    frozen_cache: Path | None = None,
    trains: Callable[[str], bool] = lambda path: False,
) -> DeepseekVL2:
    """`load_model` with a progress bar on stderr, where there is enough to wait for; one of several ranks shows it."""
    sizes = weight_sizes(build_model(folder.config, 0))
    loaded = sum(size for path, size in sizes.items() if tower or not path.startswith(TOWER))
    num_bytes = loaded * item_bytes(dtype)
    what = "load weights" if frozen == "none" else f"load weights into {frozen}"
    style = {"desc": what, "unit": "B", "unit_scale": True, "mininterval": 1.0, "file": sys.stderr}
    with tqdm(total=num_bytes, disable=num_bytes < _BAR_BYTES or dist.get_rank() != 0, **style) as bar:
        return load_model(
            folder,
            dtype=dtype,
            keep=keep,
            done=bar.update,
            tower=tower,
            frozen=frozen,
            frozen_cache=frozen_cache,
            trains=trains,
        )


def base_fingerprint(source: Source, folder: ModelFolder, model: DeepseekVL2) -> str:
    """Fingerprint of an adapter's base in the precision of the training, whatever the model is stored in now."""
    if source.random_seed is not None:
        return model_fingerprint(model)
    here = str(model.language.lm_head.weight.dtype).removeprefix("paddle.")
    return stored_fingerprint(folder.weights, DTYPE_OF_SETTING[source.precision] if source.precision else here)


def load_base(source: Source, folder: ModelFolder, dtype: str, frozen: str = "none") -> DeepseekVL2:
    """The base of a source; with a full fine-tune's weights in place, all frozen."""
    if source.random_seed is not None:
        model = init_model(folder.config, folder.tokenizer.image_id, seed=source.random_seed, dtype=dtype)
    else:
        model = load_with_bar(folder, dtype, frozen=frozen)
    if source.kind == "weights":
        assert source.trained is not None
        _load_weights(model, source.trained, dtype)
    return model


def _load_weights(model: DeepseekVL2, folder: Path, dtype: str) -> None:
    """Replace the weights that a full fine-tune trained; the others are the base's."""
    stored = read_header(folder / WEIGHTS_FILE)[0]
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [name for name, tensor in stored.items() if shapes.get(name) != list(tensor.shape)]
    if wrong:
        raise UserError(f"{folder}: weights that the base model does not have in this shape: {'; '.join(wrong[:10])}")
    for name, tensor in stored.items():
        set_parameter(model, name, paddle.to_tensor(tensor.read()).astype(dtype))
