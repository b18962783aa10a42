"""Checkpoint layouts <-> this model's parameters: names, transposition, stacked experts.

Module paths follow the checkpoint, so the conversion is three rules: the experts of a layer are stacked, a matrix may
be transposed, everything else is equal. Two layouts hold the same names: the official one ("hf"), whose Linear weights
are [out, in], and PaddleMIX's ("paddle"), whose Linear weights are [in, out] and router [D, E].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from paddle import nn

from vl2.checkpoint.folder import Checkpoint
from vl2.dtypes import WEIGHT_DTYPES
from vl2.errors import UserError
from vl2.linear import Linear
from vl2.moe import Router

Layout = Literal["hf", "paddle"]
# What the `format` of a safetensors file's metadata says of the layout. PaddleNLP writes "np" (and reads no "pd"),
# which says nothing of the orientation: other tools write it, or nothing, into official checkpoints.
FORMATS: dict[str, Layout] = {"pt": "hf", "pd": "paddle"}


class Part(NamedTuple):
    """One official tensor as a piece of a parameter: index into the parameter, then transposed or not."""

    name: str
    at: tuple
    transposed: bool


def official_parts(model: nn.Layer, layout: Layout = "hf") -> Iterator[tuple[str, list[Part]]]:
    """For every parameter of the model its path and the official tensors it is made of.

    language.model.layers.1.mlp.experts.gate_up [E, D, 2I]
        -> ...experts.0.gate_proj.weight [I, D] at [0, :, :I] transposed, ...experts.0.up_proj.weight at [0, :, I:], ...

    Args:
        model: with or without memory for its weights.
        layout: of the files; it decides what is transposed.

    Source: PaddleMIX's paddlemix/models/deepseek_vl2 has the official names; its Linear weights and its router's are
        [in, out], as is all that paddle.nn.Linear holds.
    """
    official = layout == "hf"
    transposed = {
        f"{path}.weight" for path, layer in model.named_sublayers() if isinstance(layer, Linear if official else Router)
    }
    for path, parameter in model.named_parameters():
        if path.endswith(".experts.gate_up"):
            prefix, inner = path.removesuffix(".gate_up"), parameter.shape[2] // 2
            halves = (("gate_proj", slice(None, inner)), ("up_proj", slice(inner, None)))
            yield (
                path,
                [
                    Part(f"{prefix}.{e}.{name}.weight", (e, slice(None), half), official)
                    for e in range(parameter.shape[0])
                    for name, half in halves
                ],
            )
        elif path.endswith(".experts.down"):
            prefix = path.removesuffix(".down")
            yield path, [Part(f"{prefix}.{e}.down_proj.weight", (e,), official) for e in range(parameter.shape[0])]
        else:
            yield path, [Part(path, (), path in transposed)]


def _part_shape(shape: list[int], part: Part) -> tuple[int, ...]:
    piece = np.broadcast_to(np.empty(()), shape)[part.at]  # no memory: strides of zero
    return tuple(reversed(piece.shape)) if part.transposed else tuple(piece.shape)


def official_shapes(model: nn.Layer, layout: Layout = "hf") -> dict[str, tuple[int, ...]]:
    """Official name -> shape as in the files of every tensor of a model, with or without memory for its weights."""
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
    pieces = official_parts(model, layout)
    return {part.name: _part_shape(shapes[path], part) for path, parts in pieces for part in parts}


def find_layout(model: nn.Layer, checkpoint: Checkpoint, where: str) -> Layout:
    """Tell the layout of a checkpoint: by the matrices that are not square, which decide for those that are.

    Without any, by the files' metadata; "np" alone, or a .pdparams, means PaddleNLP, which writes it.

    Raises:
        UserError: when matrices disagree among themselves or with the metadata.
    """
    stored = checkpoint.tensors
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
    lying: dict[Layout, list[str]] = {"hf": [], "paddle": []}
    for (path, parts), (_, others) in zip(official_parts(model, "hf"), official_parts(model, "paddle")):
        for part, other in zip(parts, others):
            if part.name in stored and part.transposed != other.transposed:
                official, paddles = _part_shape(shapes[path], part), _part_shape(shapes[path], other)
                if official != paddles and stored[part.name].shape in (official, paddles):
                    lying["hf" if stored[part.name].shape == official else "paddle"].append(part.name)
    formats = {header.metadata.get("format", "") for header in checkpoint.headers.values()}
    stated = {FORMATS[name] for name in formats if name in FORMATS}
    if lying["hf"] and lying["paddle"]:
        raise UserError(
            f"{where}: some matrices lie as in the official layout ({len(lying['hf'])}, {lying['hf'][0]} is "
            f"{list(stored[lying['hf'][0]].shape)}), others as in PaddleMIX's ({len(lying['paddle'])}, "
            f"{lying['paddle'][0]} is {list(stored[lying['paddle'][0]].shape)}); a checkpoint must be in one layout"
        )
    found: set[Layout] = {layout for layout, names in lying.items() if names}
    if len(found | stated) > 1:
        seen = f"the shapes of its matrices mean {next(iter(found))}" if found else "its files differ"
        raise UserError(
            f"{where}: the layout is uncertain: the metadata says format={'/'.join(sorted(formats))}, but {seen} "
            "(expected pt for the official layout, np or pd for PaddleMIX's); square matrices could be read either way"
        )
    if found or stated:
        return next(iter(found | stated))
    return "paddle" if formats <= {"np"} else "hf"  # no format at all: a .pdparams, which Paddle wrote


def check_tensors(model: nn.Layer, checkpoint: Checkpoint, where: str) -> Layout:
    """Every official tensor there, none besides, each of the model's shape in one of the two layouts.

    Returns:
        The layout.

    Raises:
        UserError: listing missing, unknown and wrongly shaped names; or see `find_layout`.
    """
    layout, stored = find_layout(model, checkpoint, where), checkpoint.tensors
    expected = official_shapes(model, layout)
    mistyped = [f"{name} is {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in WEIGHT_DTYPES]
    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected]
    misshaped = [
        f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if missing or extra or misshaped or mistyped:
        lines = [f"{where}: the weights are not those of the model that config.json describes"]
        wrong_type = f"wrong type, expected {', '.join(WEIGHT_DTYPES)}"
        for title, names in (
            ("missing", missing),
            ("unknown", extra),
            ("wrong shape", misshaped),
            (wrong_type, mistyped),
        ):
            if names:
                shown = "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")
                lines.append(f"  {title} ({len(names)}): {shown}")
        raise UserError("\n".join(lines))
    return layout


def official_tensors(path: str, value: np.ndarray, parts: list[Part]) -> Iterator[tuple[str, np.ndarray]]:
    """Cut one parameter's values into its official tensors, in the official orientation (contiguous)."""
    for part in parts:
        piece = value[part.at]
        yield part.name, np.ascontiguousarray(piece.T if part.transposed else piece)
