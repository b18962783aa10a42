"""LoRA on a DeepSeek-VL2: the model with low-rank additions, and the float32 merge.

Built on paddlenlp.peft, extended where it falls short: a frozen bfloat16 base with float32 factors, stacked experts, a
rank per group, and names that must match.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddlenlp.peft import LoRAConfig, LoRAModel

from vl2.errors import UserError
from vl2.linear import Linear
from vl2.lora_layers import MERGE, ExpertsLoRA, LoRALinear, addition, refused, starts_of
from vl2.lora_settings import GROUPS, LoRASettings, is_factor, is_start
from vl2.moe import Experts


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """What one group matched."""

    group: str
    rank: int  # 0: it trains itself
    modules: int  # modules that got factors (a layer's stacked experts count as one), or weights that train
    parameters: int  # trainable numbers


class VL2LoRAModel(LoRAModel):
    """A DeepSeek-VL2 with low-rank additions; missing attributes are those of the wrapped `model`.

    Its constructor replaces PaddleNLP's, which knows one rank, its own layers only, and a PretrainedModel's config.

    Args:
        model: the DeepseekVL2; its targeted modules are replaced in place, everything but the factors is frozen.
        settings: groups, ranks, scaling and dropout.
        seed: A depends on (seed, its name) only, so that neither the order nor the other groups matter.

    Raises:
        UserError: when a group matches no module of this model.
    """

    def __init__(self, model: nn.Layer, settings: LoRASettings, *, seed: int = 0):
        nn.Layer.__init__(self)
        self.settings = settings
        self.quantized = False  # PaddleNLP's Trainer asks
        self.lora_config = LoRAConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # annotated int, used as a number
            lora_dropout=settings.dropout,
            target_modules=[GROUPS[name] for name in settings.groups],
            rslora=settings.rslora,
            dtype="float32",
        )
        self.reports = tuple(_add_factors(model, settings, group) for group in settings.groups)
        self.model = model
        self.mark_only_lora_as_trainable()
        _initialise(model, seed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        return self.model(*args, **kwargs)

    def factors(self) -> dict[str, paddle.Tensor]:
        """Every A and B by its path in the wrapped model: `language.model.layers.0.self_attn.q_proj.lora_A`."""
        return {name: p for name, p in self.model.named_parameters() if is_factor(name)}

    def starts(self) -> dict[str, paddle.Tensor]:
        """Where each A and B of PiSSA started, by its path: `...q_proj.lora_A_start`; frozen."""
        return {name: p for name, p in self.model.named_parameters() if is_start(name)}

    def mark_only_lora_as_trainable(self) -> None:
        """Freeze all but the factors (PaddleNLP's own knows only its own layer types)."""
        for name, parameter in self.model.named_parameters():
            parameter.stop_gradient = not is_factor(name)

    def train(self) -> None:
        """Training mode. PaddleNLP's visits every layer once for each of its ancestors."""
        nn.Layer.train(self)

    def eval(self) -> None:
        """Evaluation mode."""
        nn.Layer.eval(self)

    def disable_lora(self) -> None:
        """Compute as the base does."""
        self._set_disabled(True)

    def enable_lora(self) -> None:
        """Compute with the factors again."""
        self._set_disabled(False)

    # PaddleNLP's takes names that start at the wrapped model: what `state_dict` gives would set nothing, unsaid.
    set_state_dict = nn.Layer.set_state_dict

    # The rest of PaddleNLP's own that would do wrong here.
    merge = unmerge = refused(MERGE)
    restore_original_model = refused("PaddleNLP knows no stacked experts; disable_lora() computes as the base does")
    get_lora_model = refused("PaddleNLP knows no stacked experts; use vl2.lora.apply_lora")
    from_pretrained = classmethod(
        refused("PaddleNLP accepts a half-missing adapter; use vl2.adapter.folder.load_adapter")
    )
    save_pretrained = refused("PaddleNLP writes a pickle and one rank; use vl2.adapter.folder.save_adapter")
    save_to_aistudio = refused("write a folder with vl2.adapter.folder.save_adapter and upload that")
    add_lora_split_mapping = refused("no tensor of it is split over devices")

    def _set_disabled(self, disabled: bool) -> None:
        for _, layer in lora_layers(self.model):
            layer.disable_lora = disabled


def apply_lora(model: nn.Layer, settings: LoRASettings, *, seed: int = 0) -> VL2LoRAModel:
    """Add low-rank factors to a model; at initialisation it computes what the base does.

    Args:
        model: a DeepseekVL2, changed in place.
        settings: see LoRASettings.
        seed: of the initialisation of A (B is zero).

    Raises:
        UserError: when a group matches no module of this model.
    """
    return VL2LoRAModel(model, settings, seed=seed)


def plan_factors(model: nn.Layer, settings: LoRASettings) -> tuple[GroupReport, ...]:
    """What `apply_lora` would add, counted without memory for it.

    Args:
        model: from `vl2.parameters.build_model`, changed in place and of no use afterwards.
        settings: see LoRASettings.

    Raises:
        UserError: when a group matches no module of this model.
    """
    with paddle.LazyGuard():
        return tuple(_add_factors(model, settings, group) for group in settings.groups)


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one official tensor: scaling * A @ B, of PiSSA how far that has moved."""

    factors: tuple[str, str]  # paths of A [in, r] and B [r, out], or of the stacked ones they are slices of
    a: paddle.Tensor
    b: paddle.Tensor
    starts: tuple[paddle.Tensor | None, paddle.Tensor | None]  # of PiSSA, see vl2.lora_layers.addition
    scaling: float
    expert: int | None = None  # which slice of stacked factors

    def add_to(self, base: np.ndarray) -> np.ndarray:
        """The merged tensor: base + the addition in float32, not rounded.

        Args:
            base: float32 [in, out].
        """
        one = [t if t is None or self.expert is None else t[self.expert] for t in (self.a, self.b, *self.starts)]
        a, b = addition(*one)  # type: ignore[arg-type]
        return base + np.float32(self.scaling) * np.matmul(a.numpy(), b.numpy())


def deltas(lora_model: VL2LoRAModel) -> dict[str, Delta]:
    """What an adapter adds, by the official name of the tensor it adds to; nothing is computed yet.

    Returns:
        One entry an expert and projection: `language.model.layers.1.mlp.experts.5.gate_proj.weight`.
    """
    found: dict[str, Delta] = {}
    for path, layer in lora_layers(lora_model.model):
        if isinstance(layer, LoRALinear):
            names = (f"{path}.lora_A", f"{path}.lora_B")
            starts = starts_of(layer, "lora")
            found[f"{path}.weight"] = Delta(names, layer.lora_A, layer.lora_B, starts, layer.scaling)
            continue
        for part in ("gate", "up", "down"):
            a, b = getattr(layer, f"{part}_A"), getattr(layer, f"{part}_B")
            names = (f"{path}.lora.{part}_A", f"{path}.lora.{part}_B")
            for expert in range(a.shape[0]):
                starts = starts_of(layer, part)
                found[f"{path}.{expert}.{part}_proj.weight"] = Delta(names, a, b, starts, layer.scaling, expert)
    return found


def _add_factors(model: nn.Layer, settings: LoRASettings, group: str) -> GroupReport:
    pattern, rank = re.compile(GROUPS[group]), settings.rank_of(group)
    options = {
        "rank": rank,
        "scaling": settings.scaling_of(group),
        "dropout": settings.dropout,
        "pissa": settings.pissa,
    }
    matched = [(path, layer) for path, layer in model.named_sublayers() if pattern.fullmatch(path)]
    if not matched:
        raise UserError(f"lora.groups: {group!r} matches nothing in this model; take it out of lora.groups")
    if settings.pissa:
        _check_principal(group, rank, [layer for _, layer in matched])
    before = _count_factors(model)
    for path, layer in matched:
        if isinstance(layer, Experts):
            layer.lora = ExpertsLoRA(layer, **options)  # type: ignore[arg-type,assignment]
        else:
            assert type(layer) is Linear, f"{path} is a {type(layer).__name__}, expected a plain Linear"
            parent, _, leaf = path.rpartition(".")
            setattr(_module(model, parent), leaf, LoRALinear(layer, **options))  # type: ignore[arg-type]
    return GroupReport(group=group, rank=rank, modules=len(matched), parameters=_count_factors(model) - before)


def _check_principal(group: str, rank: int, layers: Sequence[nn.Layer]) -> None:
    """Refuse more principal singular values than a weight has."""
    shapes = [layer.down.shape[1:] if isinstance(layer, Experts) else layer.weight.shape for layer in layers]
    if rank > (most := min(map(min, shapes))):
        raise UserError(
            f"lora.pissa=true: rank {rank} of {group} is more than the {most} singular values of its smallest weight; "
            f"give lora.ranks.{group}={most} or less"
        )


def _initialise(model: nn.Layer, seed: int) -> None:
    """A uniform in +-1/sqrt(in), which is PaddleNLP's and PEFT's Kaiming initialisation with slope sqrt(5); B zero."""
    for name, parameter in model.named_parameters():
        if not (is_factor(name) or is_start(name)):
            continue
        values = np.zeros(parameter.shape, "float32")
        if name.endswith("_A"):
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            bound = parameter.shape[-2] ** -0.5
            generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            values = generator.uniform(-bound, bound, parameter.shape).astype("float32")
        parameter.set_value(values)


def lora_layers(model: nn.Layer) -> Iterator[tuple[str, LoRALinear | ExpertsLoRA]]:
    """(path of the module that is tuned, its LoRA layer)."""
    for path, layer in model.named_sublayers():
        if isinstance(layer, LoRALinear):
            yield path, layer
        elif isinstance(layer, ExpertsLoRA):
            yield path.rpartition(".")[0], layer


def _count_factors(model: nn.Layer) -> int:
    return sum(int(np.prod(p.shape)) for name, p in model.named_parameters() if is_factor(name))


def _module(model: nn.Layer, path: str) -> nn.Layer:
    for name in filter(None, path.split(".")):
        model = getattr(model, name)
    return model
