"""Adapters with one A and B per official Linear, as PEFT and PaddleNLP have them: read into ours, and written.

What differs between the two (names, orientation, the configuration) is in peft_format.py and paddle_format.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle

from vl2.adapter.slots import UNTUNED, UNUSED, Slot, difference, factor_shapes
from vl2.checkpoint.tensor_files import MemoryTensor, StoredTensor
from vl2.errors import UserError
from vl2.lora_settings import GROUPS, LoRASettings


class Piece(NamedTuple):
    """A stored tensor as a part of one of our factors, or all of it."""

    stored: StoredTensor | MemoryTensor
    expert: int | None = None  # the slice of the stacked factor
    transposed: bool = False  # PEFT: A is [r, in], B is [out, r]
    gain: float = 1.0  # where its scaling is not its group's

    def read(self) -> np.ndarray:
        """float32, in our orientation."""
        array = paddle.to_tensor(self.stored.read()).astype("float32").numpy()  # a uint16 array is read as bfloat16
        array = array.T if self.transposed else array
        return array if self.gain == 1.0 else array * np.float32(self.gain)

    def plain(self) -> StoredTensor | MemoryTensor:
        """A float32 tensor in our orientation: the stored one where it is that."""
        as_it_is = not self.transposed and self.gain == 1.0 and self.stored.dtype == "float32"
        return self.stored if as_it_is else MemoryTensor("float32", self.read())


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that fits its base; its weights are still on disk."""

    folder: Path
    settings: LoRASettings
    metadata: Mapping[str, Any]  # of the run that made it: base, base_fingerprint, rehearsal, ...
    shapes: Mapping[str, tuple[int, ...]]  # of each of our factors
    pieces: Mapping[str, tuple[Piece, ...]]  # what is stored of it; nothing where a group is tuned in part
    untuned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # group -> its modules without factors
    weights: Mapping[str, Piece] = field(default_factory=dict)  # whole parameters by path, see weights.py

    def factor(self, name: str, initial: np.ndarray | None = None) -> np.ndarray:
        """One of our factors in float32.

        Args:
            name: a key of `shapes`.
            initial: values where the adapter has none; zeros by default. B must be zero there.
        """
        value = np.zeros(self.shapes[name], np.float32) if initial is None else initial.copy()
        for piece in self.pieces.get(name, ()):
            array = piece.read()
            target = value if piece.expert is None else value[piece.expert]
            # Of a smaller rank than its group's: the other columns of A meet rows of B that are zero.
            target[tuple(slice(n) for n in array.shape)] = array
        return value


def untuned_modules(adapter: Adapter) -> str:
    """Modules of an adapter's groups for which it has no factors, in words; empty where it has all.

    Example: "8 modules of its groups have no factors in FOLDER: attention.kv_b_proj (4), attention.o_proj (4)".
    """
    counts = Counter(f"{g}.{module.split('.')[-1]}" for g, modules in adapter.untuned.items() for module in modules)
    if not counts:
        return ""
    each = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return f"{sum(counts.values())} modules of its groups have no factors in {adapter.folder}: {each}"


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a foreign configuration says of the base's modules, by their official names."""

    path: Path  # of the file, for messages
    targets: frozenset[str]  # those that have an A and a B
    ranks: Mapping[str, int]  # of modules that have not the common one
    alphas: Mapping[str, float]
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    whole: frozenset[str]  # paths of parameters that it holds itself, see weights.py

    def rank_of(self, module: str) -> int:
        """Rank of one module."""
        return self.ranks.get(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of one module."""
        return self.alphas.get(module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """What the low-rank product of one module is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)


class Names(NamedTuple):
    """How a format names and turns the factors."""

    name: Callable[[str, str], str]  # (official Linear, A or B) -> tensor
    transposed: bool

    def shape(self, slot: Slot, letter: str, rank: int) -> tuple[int, ...]:
        """Shape of a factor as the format stores it."""
        shape = slot.shape(letter, rank)
        return shape[::-1] if self.transposed else shape


def open_foreign(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    declared: Declaration,
    names: Names,
    found: Mapping[str, Slot],
    metadata: Mapping[str, Any],
) -> Adapter:
    """Account for every tensor of a foreign adapter and for every module that its configuration names.

    Args:
        folder: of the adapter.
        stored: all its tensors.
        declared: its configuration.
        names: its naming.
        found: `slots` of the base.
        metadata: see `Adapter.metadata`.

    Raises:
        UserError: weights and configuration that disagree, or that do not fit the base; lists the names.
    """
    targeted = {module: slot for module, slot in found.items() if module in declared.targets}
    ignored = {names.name(module, letter) for module in UNUSED for letter in "AB"}
    expected = {
        names.name(module, letter): names.shape(slot, letter, declared.rank_of(module))
        for module, slot in targeted.items()
        for letter in "AB"
    }
    lines = difference({name: t.shape for name, t in stored.items() if name not in ignored}, expected)
    untuned = [module for module in UNTUNED if module in declared.targets]
    if untuned or not targeted:
        lines.append(
            f"  {declared.path.name} targets {', '.join(untuned) or 'no module of this model'}; "
            f"expected modules of the groups {', '.join(GROUPS)}"
        )
    if lines:
        base = metadata.get("base")
        raise UserError(
            "\n".join(
                [
                    f"{folder}: the adapter's weights, its {declared.path.name} and the base model do not fit"
                    + (f" (it names {base} as its base)" if base else ""),
                    *lines,
                ]
            )
        )
    settings = _settings(declared, targeted)
    pieces: dict[str, list[Piece]] = {}
    for module, slot in targeted.items():
        own, of_group = declared.scaling_of(module), settings.scaling_of(slot.group)
        for letter in "AB":
            gain = own / of_group if letter == "B" and own != of_group else 1.0
            piece = Piece(stored[names.name(module, letter)], slot.expert, names.transposed, gain)
            pieces.setdefault(f"{slot.factor}_{letter}", []).append(piece)
    return Adapter(
        folder=folder,
        settings=settings,
        metadata=metadata,
        shapes=factor_shapes(settings, found),
        pieces={name: tuple(parts) for name, parts in pieces.items()},
        untuned={
            group: tuple(m for m, slot in found.items() if slot.group == group and m not in targeted)
            for group in settings.groups
        },
    )


def _settings(declared: Declaration, targeted: Mapping[str, Slot]) -> LoRASettings:
    """Groups, ranks and alphas: of a group whose modules differ, those of a module of the largest rank."""
    largest: dict[str, str] = {}
    for module, slot in targeted.items():
        known = largest.setdefault(slot.group, module)
        if declared.rank_of(module) > declared.rank_of(known):
            largest[slot.group] = module
    groups = tuple(name for name in GROUPS if name in largest)
    ranks = {group: declared.rank_of(largest[group]) for group in groups}
    alphas = {group: declared.alpha_of(largest[group]) for group in groups}
    return LoRASettings(
        groups=groups,
        rank=declared.rank,
        alpha=declared.alpha,
        dropout=declared.dropout,
        ranks={group: rank for group, rank in ranks.items() if rank != declared.rank},
        alphas={group: alpha for group, alpha in alphas.items() if alpha != declared.alpha},
        rslora=declared.rslora,
    )


def foreign_tensors(
    adapter: Adapter, found: Mapping[str, Slot], names: Names, written: LoRASettings
) -> dict[str, np.ndarray]:
    """All factors under a format's names; experts one by one. Modules that a group leaves out are zero.

    Args:
        adapter: in any format.
        found: `slots` of its base.
        names: of the format.
        written: ranks and alphas to write with; no rank may be less than the adapter's.
    """
    settings = adapter.settings
    factors = {name: adapter.factor(name) for name in adapter.shapes}
    tensors = {}
    for module, slot in found.items():
        group = slot.group
        if group not in settings.groups:
            continue
        scaling, new = (s.scaling_of(group) for s in (settings, written))
        for letter in "AB":
            whole = factors[f"{slot.factor}_{letter}"]
            piece = whole if slot.expert is None else whole[slot.expert]
            if letter == "B" and scaling != new:
                piece = piece * np.float32(scaling / new)
            missing = [n - m for n, m in zip(slot.shape(letter, written.rank_of(group)), piece.shape, strict=True)]
            if any(missing):
                piece = np.pad(piece, [(0, n) for n in missing])
            tensors[names.name(module, letter)] = piece.T if names.transposed else piece
    return tensors
