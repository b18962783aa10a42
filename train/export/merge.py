"""What an export holds, tensor by tensor: the base's own bits, or base and training merged in float32 and rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import paddle

from train.ask.load import stored_dtype
from train.ask.note import note
from train.ask.source import Source
from train.store.names import WEIGHTS_FILE
from vl2.adapter.folder import check_base, load_factors, open_adapter
from vl2.adapter.foreign import untuned_modules
from vl2.adapter.weights import in_words, replacing
from vl2.checkpoint.fingerprint import stored_fingerprint
from vl2.checkpoint.layouts import Part
from vl2.checkpoint.model_folder import open_folder
from vl2.checkpoint.quantised import QuantisedReader
from vl2.checkpoint.stored_model import StoredModel, hold_model
from vl2.checkpoint.tensor_files import MemoryTensor, StoredTensor, cast, read_header
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.errors import UserError
from vl2.lora import Delta, VL2LoRAModel, apply_lora, deltas
from vl2.parameters import build_model, init_model
from vl2.quantised import kept_in


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A base and what training made of it; values are read and computed when they are asked for."""

    base: StoredModel
    dtype: str | None  # of the exported files; None: each tensor as in the base
    lora: VL2LoRAModel | None = None  # around a model without base weights
    deltas: Mapping[str, Delta] = field(default_factory=dict)  # of an adapter, by official name
    # By parameter path: of a full fine-tune, or what an adapter replaces of the base.
    weights: Mapping[str, StoredTensor | MemoryTensor] = field(default_factory=dict)
    frozen: str = "none"  # what the base's matrices were kept in while it was trained, see vl2.quantised
    precision: str = ""  # type that they were rounded to before; known where `frozen` is not "none"

    def dtype_of(self, name: str) -> str:
        """Type of an exported tensor."""
        return self.dtype or self.base.tensors[name].dtype

    @property
    def dtype_name(self) -> str:
        """The type of the exported files; of several joined."""
        return "/".join(sorted({self.dtype_of(name) for name in self.base.tensors}))

    def trained(self) -> set[str]:
        """Everything that training made: paths of the adapter's factors, or of whole parameters."""
        return {*(self.lora.factors() if self.lora else ()), *self.weights}

    def taken(self, path: str, part: Part) -> set[str]:
        """What of `trained` goes into one official tensor."""
        if part.name in self.deltas:
            return set(self.deltas[part.name].factors)
        return {path} & self.weights.keys()

    def merged(self, path: str, part: Part) -> np.ndarray:
        """One official tensor, float32 and not rounded, in its parameter's orientation."""
        if path in self.weights:
            stored = self.weights[path]
            if not part.at:
                return stored.read()
            assert isinstance(stored, StoredTensor)
            expert, *rest = part.at
            return stored.row(expert).read()[tuple(rest)]
        base = cast(self.base.piece(part), self.base.tensors[part.name].dtype, "float32")
        return self.deltas[part.name].add_to(base) if part.name in self.deltas else base

    def rounded(self, path: str, part: Part) -> np.ndarray:
        """The bits of one exported tensor, in its parameter's orientation."""
        target = self.dtype_of(part.name)
        if self.taken(path, part):
            return cast(self.merged(path, part), "float32", target)
        return cast(self.base.piece(part), self.base.tensors[part.name].dtype, target)

    def trained_parameter(self, path: str) -> paddle.Tensor:
        """A weight of the trained model beside which the adapter's factors stand, as it is stored."""
        if path in self.weights:
            return paddle.to_tensor(self.weights[path].read())
        return self.base.parameter(path)

    def quantised_parameter(self, path: str) -> paddle.Tensor:
        """A weight of the trained model as training multiplied by it: in few bits and back."""
        if path in self.weights or kept_in(path, self.frozen) == "none":
            return self.trained_parameter(path)
        kept = self._quantised.read(path)
        whole = np.empty(self.base.shapes[path], np.float32)
        for index, matrix in enumerate(whole.reshape(-1, *whole.shape[-2:])):
            matrix[...] = kept.matrix(paddle.float32, index).numpy()
        return paddle.to_tensor(whole)

    @cached_property
    def _quantised(self) -> QuantisedReader:
        return QuantisedReader(self.base, self.frozen, self.precision)

    def merged_parameter(self, path: str) -> paddle.Tensor:
        """A weight of the unrounded float32 merge."""
        whole = np.empty(self.base.shapes[path], np.float32)
        for part in self.base.parts[path]:
            whole[part.at] = self.merged(path, part)
        return paddle.to_tensor(whole)


def open_merge(source: Source, dtype: str | None) -> Merge:
    """Look at a base and what was trained on it, without reading the base's weights.

    Args:
        source: a base model alone, an adapter, or a full fine-tune.
        dtype: the type to export; None as in the base.

    Raises:
        UserError: when base or training do not fit their names and shapes, or each other.
    """
    folder = open_folder(source.base)
    if source.random_seed is not None:
        assert source.precision is not None
        kind = "float32" if source.kind == "weights" else DTYPE_OF_SETTING[source.precision]
        model = init_model(folder.config, folder.tokenizer.image_id, seed=source.random_seed, dtype=kind)
        base = hold_model(source.base, model, kind)
        dtype = dtype or stored_dtype(folder)
    else:
        base = folder.weights
    if source.kind == "adapter":
        assert source.trained is not None
        skeleton = build_model(base.skeleton.config, base.skeleton.image_token_id)
        kind = DTYPE_OF_SETTING[source.precision] if source.precision else stored_dtype(folder)
        check_base(source.trained, stored_fingerprint(base, kind))
        adapter = open_adapter(source.trained, skeleton)
        lora = apply_lora(skeleton, adapter.settings)
        load_factors(lora, adapter)
        pieces = replacing(adapter, base.parameter)
        if pieces and not adapter.settings.also_train:
            note(f"{source.trained}: the adapter has its own {in_words([*pieces])} in place of the base's")
        if untuned := untuned_modules(adapter):
            note(f"{untuned}; they stay as in the base")
        weights = {path: piece.plain() for path, piece in pieces.items()}
        return Merge(
            base=base,
            dtype=dtype,
            lora=lora,
            deltas=deltas(lora),
            weights=weights,
            frozen=source.frozen,
            precision=kind,
        )
    if source.kind == "weights":
        assert source.trained is not None
        return Merge(
            base=base,
            dtype=dtype,
            weights=_read_weights(source.trained, base),
            frozen=source.frozen,
            precision=DTYPE_OF_SETTING[source.precision or "bf16"],
        )
    return Merge(base=base, dtype=dtype)


def _read_weights(folder: Path, base: StoredModel) -> dict[str, StoredTensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} there; expected the trained weights of a full fine-tune")
    stored = read_header(path)[0]
    wrong = [
        f"{name} is {tensor.dtype}{list(tensor.shape)}, expected float32{base.shapes.get(name, ' of no parameter')}"
        for name, tensor in stored.items()
        if base.shapes.get(name) != list(tensor.shape) or tensor.dtype != "float32"
    ]
    if wrong:
        raise UserError(f"{path}: weights that the base model does not have so: {'; '.join(wrong[:10])}")
    return stored
