"""One path to an answer for base models, adapters, full fine-tunes and exports: find, load, prepare, generate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from train.files import ADAPTER, EXPORT_REPORT, WEIGHTS, WEIGHTS_FILE, WEIGHTS_METADATA
from train.hub import resolve_model
from train.identity import model_fingerprint, stored_fingerprint
from train.need import check_inference
from vl2.adapter_files import PADDLE_CONFIG, PEFT_CONFIG, adapter_format, adapter_metadata
from vl2.config import VL2Config
from vl2.generate import generate
from vl2.model import DeepseekVL2
from vl2.prompt import Message, render
from vl2.published import published
from vl2.tensor_files import checkpoint_tensors, read_header
from vl2.tiles import Resolution, cut_tiles, limit_candidates, load_image, tile_grid
from vl2.tokenizer import Tokenizer
from vl2.weights import init_model, load_model, open_model, set_parameter

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Prompts that are answered together: bounds the memory of their caches.
BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a `model=` folder turned out to hold."""

    kind: str  # base (also an export), adapter, or weights (a full fine-tune)
    base: Path  # folder of the base model
    trained: Path | None = None  # folder of the adapter or of the trained weights
    about: dict[str, Any] = field(default_factory=dict)  # metadata of the run that made it

    @property
    def rehearsal(self) -> bool:
        """Whether this comes from a rehearsal on nano."""
        return bool(self.about.get("rehearsal"))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to answer."""

    source: Source
    model: DeepseekVL2  # in eval mode, all weights frozen
    lora: nn.Layer | None  # the VL2LoRAModel around it, for an adapter
    tokenizer: Tokenizer

    @property
    def candidates(self) -> tuple[Resolution, ...]:
        """Resolutions an image may be shown at."""
        return self.model.config.candidate_resolutions


def find_source(folder: str | Path, base: str = "") -> Source:
    """Tell what lies in a folder: a checkpoint in the official layout, an adapter, a run, or a run's checkpoint.

    Args:
        folder: to look into.
        base: base model of what was trained; empty: the one it names.

    Raises:
        ValueError: when it is none of these, or the base of an adapter cannot be found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a base model, a run, an adapter or an export")
    for trained in (folder, folder / ADAPTER, folder / WEIGHTS):
        if adapter_format(trained):
            about = adapter_metadata(trained)
            return Source(kind="adapter", base=_base_of(trained, about, base), trained=trained, about=about)
        if (trained / WEIGHTS_METADATA).is_file():
            about = json.loads((trained / WEIGHTS_METADATA).read_text(encoding="utf-8"))
            return Source(kind="weights", base=_base_of(trained, about, base), trained=trained, about=about)
    if base:
        raise ValueError(f"base={base}: {folder} holds neither an adapter nor trained weights that would need a base")
    if (folder / "config.json").is_file():
        report = folder / EXPORT_REPORT
        about = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        return Source(kind="base", base=folder, about=about)
    hint = ""
    if (folder / "checkpoints").is_dir():
        hint = "; the run is not finished: give one of its checkpoints, or finish it with resume=auto"
    raise ValueError(
        f"{folder}: neither a model (config.json) nor an adapter ({PADDLE_CONFIG}, {PEFT_CONFIG}) "
        f"nor a run (adapter/){hint}"
    )


def _base_of(trained: Path, about: dict[str, Any], given: str) -> Path:
    if given:
        return resolve_model(given)
    name = about.get("base")
    if not name:
        raise ValueError(f"{trained}: this adapter does not name its base model; give base=FOLDER")
    problem = "no config.json"
    try:
        base = resolve_model(name)
        if (base / "config.json").is_file():
            return base
    except ValueError as error:
        problem = str(error)
    raise ValueError(
        f"{trained}: was trained on the base model {name}, which is not there now ({problem}); give base=FOLDER"
    )


def load(folder: str | Path, precision: str = "auto", base: str = "") -> Loaded:
    """Load whatever `find_source` finds.

    Args:
        folder: base model (or its name on the hub), export, adapter, run or checkpoint.
        precision: stored type of the weights: bf16, fp16, fp32, or auto (as in the base's files).
        base: see `find_source`.

    Raises:
        ValueError: see `resolve_model`, `find_source` and `load_model`; an adapter of another base.
    """
    if published(folder):  # before it is fetched
        check_inference(folder, DTYPES.get(precision, "bfloat16"))
    source = find_source(resolve_model(folder), base)
    tokenizer = Tokenizer.from_folder(source.base)
    dtype = DTYPES[precision] if precision != "auto" else stored_dtype(source.base)
    check_inference(source.base, dtype)
    model = load_base(source, tokenizer, dtype)
    lora = None
    if source.kind == "adapter":
        from vl2.adapter import load_adapter  # here: it imports PaddleNLP, which takes seconds

        assert source.trained is not None
        lora = load_adapter(model, source.trained, base_fingerprint=base_fingerprint(source, model))
    if "max_tiles" in source.about and source.trained is not None:  # an adapter trained elsewhere does not say
        candidates = limit_candidates(model.config.candidate_resolutions, source.about["max_tiles"])
        model.config = dataclasses.replace(model.config, candidate_resolutions=candidates)
    if paddle.get_device().startswith("gpu"):
        model.compute_dtype = dtype
    model.eval()
    return Loaded(source=source, model=model, lora=lora, tokenizer=tokenizer)


def base_fingerprint(source: Source, model: DeepseekVL2) -> str:
    """Fingerprint of an adapter's base in the precision of the training, whatever the model is stored in now."""
    if source.about.get("init") == "random" or "precision" not in source.about:
        return model_fingerprint(model)
    return stored_fingerprint(open_model(source.base), DTYPES[source.about["precision"]])


def load_base(source: Source, tokenizer: Tokenizer, dtype: str) -> DeepseekVL2:
    """The base of a source; with a full fine-tune's weights in place, all frozen."""
    if source.about.get("init") == "random":
        config = VL2Config.from_folder(source.base)
        model = init_model(config, tokenizer.image_id, seed=source.about["seed"], dtype=dtype)
    else:
        model = load_model(source.base, dtype=dtype)
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
        raise ValueError(f"{folder}: weights that the base model does not have in this shape: {'; '.join(wrong[:10])}")
    for name, tensor in stored.items():
        set_parameter(model, name, paddle.to_tensor(tensor.read()).astype(dtype))


def stored_dtype(folder: Path) -> str:
    """Paddle's name of the type that most weights of a checkpoint are stored in; bfloat16 when there are none."""
    try:
        stored = checkpoint_tensors(folder)
    except ValueError:
        return "bfloat16"
    kinds = [tensor.dtype for tensor in stored.values()]
    return {"F32": "float32", "F16": "float16"}.get(max(set(kinds), key=kinds.count), "bfloat16")


def prepare(
    messages: Sequence[Message], images: Sequence[str | Path], tokenizer: Tokenizer, candidates: Sequence[Resolution]
) -> dict[str, np.ndarray]:
    """A conversation that waits for an answer, as `generate` takes it.

    Args:
        messages: the last one is the user's; one <image> in the users' turns for each image.
        images: files, in the order of the placeholders.
        tokenizer: of the model.
        candidates: resolutions (width, height) in pixels.
    """
    opened = [load_image(image) for image in images]
    grids = [tile_grid(image.size, len(opened), candidates) for image in opened]
    prompt = {"input_ids": render(messages, grids, tokenizer, for_generation=True).input_ids}
    if opened:
        prompt["tiles"] = np.concatenate([cut_tiles(image, grid) for image, grid in zip(opened, grids, strict=True)])
        prompt["grids"] = np.array(grids, np.int64)
    return prompt


def answer_all(
    loaded: Loaded,
    questions: Sequence[tuple[Sequence[Message], Sequence[Path]]],
    *,
    max_new_tokens: int,
) -> Iterator[str]:
    """Greedy answers to many questions, some of them computed together, in order.

    Args:
        loaded: the model.
        questions: (messages, images) each.
        max_new_tokens: most tokens of an answer.
    """
    batch: list[dict[str, np.ndarray]] = []

    def flush() -> Iterator[str]:
        ids = generate(loaded.model, batch, eos_id=loaded.tokenizer.eos_id, max_new_tokens=max_new_tokens)
        yield from (loaded.tokenizer.decode(answer) for answer in ids)
        batch.clear()

    for messages, images in questions:
        prompt = prepare(messages, images, loaded.tokenizer, loaded.candidates)
        if batch and sum(len(p["input_ids"]) for p in [*batch, prompt]) > BATCH_TOKENS:
            yield from flush()
        batch.append(prompt)
    if batch:
        yield from flush()
