"""Whole weights in an adapter, beside its factors: they replace the base's.

Ours has those of lora.also_train, PEFT's those of modules_to_save, PaddleNLP's those of trainable_modules and two
more: it freezes the parameters of layers, and image_newline and view_seperator are the model's own. So it looks for
both in an adapter's files; what was trained in PaddleMIX may have changed them, and only then they count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from vl2.adapter.foreign import Adapter, Piece
from vl2.adapter.slots import difference
from vl2.checkpoint.layouts import Layout, Part, official_parts, official_tensors
from vl2.checkpoint.tensor_files import StoredTensor
from vl2.errors import UserError
from vl2.parameter_groups import group_of

ROWS = ("image_newline", "view_seperator")  # the checkpoint's spelling


def whole_parts(model: nn.Layer, layout: Layout) -> dict[str, Part]:
    """Every parameter that is one official tensor, by its path, which is that tensor's name too; no stacked experts.

    Args:
        model: without factors.
        layout: of the files.
    """
    return {path: parts[0] for path, parts in official_parts(model, layout) if parts[0].name == path}


def take_weights(
    folder: Path, tensors: dict[str, StoredTensor], paths: Iterable[str], prefix: str, model: nn.Layer, layout: Layout
) -> dict[str, Piece]:
    """Take the whole weights out of a foreign adapter's tensors.

    Args:
        folder: of the adapter.
        tensors: all that it holds; the whole weights are gone from it afterwards.
        paths: parameters that its configuration says it has.
        prefix: of their names in the files.
        model: the base, without factors.
        layout: in which they lie.

    Raises:
        UserError: one is missing or shaped otherwise.
    """
    parts, shapes = whole_parts(model, layout), {name: p.shape for name, p in model.named_parameters()}
    expected = {f"{prefix}{path}": shapes[path][::-1] if parts[path].transposed else shapes[path] for path in paths}
    stored = {name: tensors.pop(name) for name in expected if name in tensors}
    if lines := difference({name: tensor.shape for name, tensor in stored.items()}, expected):
        raise UserError("\n".join([f"{folder}: the adapter's whole weights and the base model do not fit", *lines]))
    return {
        name.removeprefix(prefix): Piece(tensor, transposed=parts[name.removeprefix(prefix)].transposed)
        for name, tensor in stored.items()
    }


def replacing(adapter: Adapter, value_of: Callable[[str], paddle.Tensor]) -> dict[str, Piece]:
    """The whole weights that an adapter puts in the place of the base's.

    Args:
        adapter: in any format.
        value_of: the base's parameter by its path. The two rows of PaddleNLP are compared with it, in its type, since
            the adapter may be stored in another.
    """

    def same(path: str) -> bool:
        value = value_of(path)
        row = paddle.to_tensor(adapter.weights[path].read()).astype(value.dtype)
        return np.array_equal(row.astype("float32").numpy(), value.astype("float32").numpy())

    always = set(adapter.weights) if adapter.settings.also_train else set(adapter.weights) - set(ROWS)
    return {path: piece for path, piece in adapter.weights.items() if path in always or not same(path)}


def in_words(paths: Sequence[str]) -> str:
    """Whole weights by name, where they are many by their groups: "25 weights of norms"."""
    if len(paths) <= 2:
        return " and ".join(paths)
    counts = Counter(map(group_of, paths))
    return ", ".join(f"{count} weight{'s' * (count > 1)} of {group}" for group, count in counts.items())


def written_weights(
    paths: Iterable[str],
    weights: Mapping[str, Piece],
    value_of: Callable[[str], paddle.Tensor],
    prefix: str,
    parts: Mapping[str, Part],
) -> dict[str, np.ndarray]:
    """Whole weights as a foreign format has them, float32: the adapter's where it has them, else the base's.

    Args:
        paths: of the parameters to write.
        weights: from `replacing`.
        value_of: the base's parameter by its path.
        prefix: of their names in the files.
        parts: from `whole_parts`, in the format's layout.
    """
    written = {}
    for path in paths:
        value = weights[path].read() if path in weights else value_of(path).astype("float32").numpy()
        ((name, array),) = official_tensors(path, value, [parts[path]])
        written[f"{prefix}{name}"] = array
    return written


def saved_module(path: str) -> str:
    """The module of the official model that PEFT saves whole for the sake of a parameter.

    vision.pos_embed                                   -> vision
    language.model.layers.3.input_layernorm.weight     -> language.model.layers.3.input_layernorm
    """
    return "vision" if path.startswith("vision.") else path.rpartition(".")[0]
