"""LoRA on a DeepSeek-VL2: which modules a group means, the low-rank layers, and the float32 merge.

Built on paddlenlp.peft, extended where it falls short: a frozen bfloat16 base with float32 factors, stacked experts, a
rank per group, and names that must match. Shapes: Paddle's [in, out], so A is [in, r] and B is [r, out].
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import paddle
from paddle import nn
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.peft.lora.lora_layers import LoRALinear as PaddleNLPLoRALinear

from vl2.errors import UserError
from vl2.linear import Linear, linear
from vl2.moe import Experts, GroupedLora

_LAYER = r"language\.model\.layers\.\d+"
# What each group means, as full matches of module paths. The router is in none: it is no Linear and stays frozen.
GROUPS: dict[str, str] = {
    "attention": rf"{_LAYER}\.self_attn\.(q_proj|q_a_proj|q_b_proj|k_proj|v_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    "experts": rf"{_LAYER}\.mlp\.experts",
    "shared_experts": rf"{_LAYER}\.mlp\.shared_experts\.(gate_proj|up_proj|down_proj)",
    "dense_mlp": rf"{_LAYER}\.mlp\.(gate_proj|up_proj|down_proj)",
    "vision": r"vision\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
    "projector": r"projector\.layers\.(0|2)",
}


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """What is tuned, and how."""

    groups: tuple[str, ...]  # names of GROUPS
    rank: int = 8  # inner width of the low-rank product
    alpha: float = 16.0  # the product is scaled by alpha / rank of its group
    dropout: float = 0.0  # probability, on the input of A, in training
    ranks: Mapping[str, int] = field(default_factory=dict)  # rank of single groups, instead of `rank`
    alphas: Mapping[str, float] = field(default_factory=dict)  # alpha of single groups, instead of `alpha`

    def __post_init__(self):
        for name in (*self.groups, *self.ranks, *self.alphas):
            if name not in GROUPS:
                raise UserError(f"lora.groups: {name!r} is not a group; the groups are {', '.join(GROUPS)}")
        if not self.groups:
            raise UserError("lora.groups is empty: name at least one group, or set lora.rank=0 for full fine-tuning")
        if repeated := {name for name in self.groups if self.groups.count(name) > 1}:
            raise UserError(f"lora.groups names {', '.join(sorted(repeated))} twice")
        for key, table in (("ranks", self.ranks), ("alphas", self.alphas)):
            if unused := set(table) - set(self.groups):
                raise UserError(f"lora.{key} sets {', '.join(sorted(unused))}, which lora.groups does not tune")
        for name in self.groups:
            if self.rank_of(name) < 1:
                raise UserError(f"lora rank of {name} is {self.rank_of(name)}; expected a positive integer")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora.dropout is {self.dropout}; expected a probability in [0, 1)")

    def rank_of(self, group: str) -> int:
        """Rank of one group."""
        return self.ranks.get(group, self.rank)

    def alpha_of(self, group: str) -> float:
        """Alpha of one group."""
        return self.alphas.get(group, self.alpha)


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """What one group matched."""

    group: str
    rank: int
    modules: int  # modules that got factors; a layer's stacked experts count as one
    parameters: int  # trainable numbers


class LoRALinear(PaddleNLPLoRALinear):
    """A Linear plus a low-rank addition in float32, computed in the input's dtype.

    PaddleNLP's own multiplies tensors of different dtypes when the base is bfloat16, and its constructor would allocate
    and fill a second base weight: this one takes over the Linear it replaces.
    """

    def __init__(self, base: Linear, *, rank: int, alpha: float, dropout: float):
        nn.Layer.__init__(self)
        self.weight, self.bias, self.name = base.weight, base.bias, None
        self.in_features, self.out_features = base.weight.shape
        self.r, self.lora_alpha, self.scaling = rank, alpha, alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = self.create_parameter([self.in_features, rank], dtype="float32")
        self.lora_B = self.create_parameter([rank, self.out_features], dtype="float32")
        self.merged, self.disable_lora = False, False
        self.pissa = self.use_mora = self.lora_use_mixer = self._use_quick_lora = False

    def forward(self, x):
        """[..., in] -> [..., out]."""
        out = linear(x, self.weight, self.bias)
        if self.disable_lora:
            return out
        low = linear(self.lora_dropout(x), self.lora_A)
        return out + linear(low, self.lora_B) * self.scaling

    def effective_weight(self, dtype):
        """The matrix [in, out] that `forward` multiplies with (dropout aside), in `dtype`."""
        weight = self.weight.astype(dtype)
        if self.disable_lora:
            return weight
        return weight + (paddle.matmul(self.lora_A, self.lora_B) * self.scaling).astype(dtype)

    def merge(self):
        """Refused: PaddleNLP merges in the weight's dtype, which loses most of the addition in bfloat16."""
        raise NotImplementedError("merge with vl2.lora.deltas, which add in float32")

    unmerge = merge


class ExpertsLoRA(nn.Layer):
    """Low-rank additions to all experts of a layer; gate and up have their own A and B, as in PEFT adapters."""

    def __init__(self, base: Experts, *, rank: int, alpha: float, dropout: float):
        super().__init__()
        num_experts, size, inner = base.gate_up.shape[0], base.gate_up.shape[1], base.down.shape[1]
        self.r, self.lora_alpha, self.scaling = rank, alpha, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.gate_A = self.create_parameter([num_experts, size, rank], dtype="float32")
        self.gate_B = self.create_parameter([num_experts, rank, inner], dtype="float32")
        self.up_A = self.create_parameter([num_experts, size, rank], dtype="float32")
        self.up_B = self.create_parameter([num_experts, rank, inner], dtype="float32")
        self.down_A = self.create_parameter([num_experts, inner, rank], dtype="float32")
        self.down_B = self.create_parameter([num_experts, rank, size], dtype="float32")
        self.disable_lora = False

    def gate_up(self, x_RD) -> GroupedLora | None:
        """Addition to the stacked gate and up projections, as one product of rank 2r.

        a = [gate_A | up_A]  [E, D, 2r]        b = [gate_B   0  ]  [E, 2r, 2I], times the scaling
                                                   [  0    up_B ]
        """
        if self.disable_lora:
            return None
        zeros = paddle.zeros_like(self.gate_B)
        gate = paddle.concat([self.gate_B, zeros], axis=-1)
        up = paddle.concat([zeros, self.up_B], axis=-1)
        a = paddle.concat([self.gate_A, self.up_A], axis=-1)
        return GroupedLora(self.dropout(x_RD), a, paddle.concat([gate, up], axis=1) * self.scaling)

    def down(self, inner_RI) -> GroupedLora | None:
        """Addition to the stacked down projections: a [E, I, r], b [E, r, D] times the scaling."""
        if self.disable_lora:
            return None
        return GroupedLora(self.dropout(inner_RI), self.down_A, self.down_B * self.scaling)


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
        self.quantized = self.is_pipelinemodel = False
        self.lora_split_mapping: dict[str, bool] = {}
        self.lora_config = LoRAConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # annotated int, used as a number
            lora_dropout=settings.dropout,
            target_modules=[GROUPS[name] for name in settings.groups],
            dtype="float32",
        )
        self.reports = tuple(_add_factors(model, settings, group) for group in settings.groups)
        self.model = model
        self.mark_only_lora_as_trainable()
        _initialise(model, seed)

    def forward(self, *args, **kwargs):
        """The wrapped model's forward."""
        return self.model(*args, **kwargs)

    def factors(self) -> dict[str, paddle.Tensor]:
        """Every A and B by its path in the wrapped model: `language.model.layers.0.self_attn.q_proj.lora_A`."""
        return {name: p for name, p in self.model.named_parameters() if _is_factor(name)}

    def mark_only_lora_as_trainable(self) -> None:
        """Freeze all but the factors (PaddleNLP's own knows only its own layer types)."""
        for name, parameter in self.model.named_parameters():
            parameter.stop_gradient = not _is_factor(name)

    def train(self):
        """Training mode. PaddleNLP's visits every layer once for each of its ancestors."""
        nn.Layer.train(self)

    def eval(self):
        """Evaluation mode."""
        nn.Layer.eval(self)

    def disable_lora(self) -> None:
        """Compute as the base does."""
        self._set_disabled(True)

    def enable_lora(self) -> None:
        """Compute with the factors again."""
        self._set_disabled(False)

    def merge(self):
        """Refused, see `LoRALinear.merge`."""
        raise NotImplementedError("merge with vl2.lora.deltas, which add in float32")

    unmerge = merge

    def _set_disabled(self, disabled: bool) -> None:
        for _, layer in _lora_layers(self.model):
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
    """What an adapter adds to one official tensor: scaling * A @ B."""

    factors: tuple[str, str]  # paths of A [in, r] and B [r, out], or of the stacked ones they are slices of
    a: paddle.Tensor
    b: paddle.Tensor
    scaling: float
    expert: int | None = None  # which slice of stacked factors

    def add_to(self, base: np.ndarray) -> np.ndarray:
        """The merged tensor: base + scaling * A @ B in float32, not rounded.

        Args:
            base: float32 [in, out].
        """
        a, b = (t.numpy() if self.expert is None else t[self.expert].numpy() for t in (self.a, self.b))
        return base + np.float32(self.scaling) * np.matmul(a, b)


def deltas(lora_model: VL2LoRAModel) -> dict[str, Delta]:
    """What an adapter adds, by the official name of the tensor it adds to; nothing is computed yet.

    Returns:
        One entry an expert and projection: `language.model.layers.1.mlp.experts.5.gate_proj.weight`.
    """
    found: dict[str, Delta] = {}
    for path, layer in _lora_layers(lora_model.model):
        if isinstance(layer, LoRALinear):
            names = (f"{path}.lora_A", f"{path}.lora_B")
            found[f"{path}.weight"] = Delta(names, layer.lora_A, layer.lora_B, layer.scaling)
            continue
        for part in ("gate", "up", "down"):
            a, b = getattr(layer, f"{part}_A"), getattr(layer, f"{part}_B")
            names = (f"{path}.lora.{part}_A", f"{path}.lora.{part}_B")
            for expert in range(a.shape[0]):
                found[f"{path}.{expert}.{part}_proj.weight"] = Delta(names, a, b, layer.scaling, expert)
    return found


def _add_factors(model: nn.Layer, settings: LoRASettings, group: str) -> GroupReport:
    pattern, rank = re.compile(GROUPS[group]), settings.rank_of(group)
    options = {"rank": rank, "alpha": settings.alpha_of(group), "dropout": settings.dropout}
    matched = [(path, layer) for path, layer in model.named_sublayers() if pattern.fullmatch(path)]
    if not matched:
        raise UserError(f"lora.groups: {group!r} matches nothing in this model; take it out of lora.groups")
    before = _count_factors(model)
    for path, layer in matched:
        if isinstance(layer, Experts):
            layer.lora = ExpertsLoRA(layer, **options)  # type: ignore[arg-type,assignment]
        else:
            assert type(layer) is Linear, f"{path} is a {type(layer).__name__}, expected a plain Linear"
            parent, _, leaf = path.rpartition(".")
            setattr(_module(model, parent), leaf, LoRALinear(layer, **options))  # type: ignore[arg-type]
    return GroupReport(group=group, rank=rank, modules=len(matched), parameters=_count_factors(model) - before)


def _initialise(model: nn.Layer, seed: int) -> None:
    """A uniform in +-1/sqrt(in), which is PaddleNLP's and PEFT's Kaiming initialisation with slope sqrt(5); B zero."""
    for name, parameter in model.named_parameters():
        if not _is_factor(name):
            continue
        values = np.zeros(parameter.shape, "float32")
        if name.endswith("_A"):
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            bound = parameter.shape[-2] ** -0.5
            generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            values = generator.uniform(-bound, bound, parameter.shape).astype("float32")
        parameter.set_value(values)


def _lora_layers(model: nn.Layer) -> Iterator[tuple[str, LoRALinear | ExpertsLoRA]]:
    """(path of the module that is tuned, its LoRA layer)."""
    for path, layer in model.named_sublayers():
        if isinstance(layer, LoRALinear):
            yield path, layer
        elif isinstance(layer, ExpertsLoRA):
            yield path.rpartition(".")[0], layer


def _is_factor(name: str) -> bool:
    return re.search(r"\.(lora_[AB]|lora\.(gate|up|down)_[AB])$", name) is not None


def _count_factors(model: nn.Layer) -> int:
    return sum(int(np.prod(p.shape)) for name, p in model.named_parameters() if _is_factor(name))


def _module(model: nn.Layer, path: str) -> nn.Layer:
    for name in filter(None, path.split(".")):
        model = getattr(model, name)
    return model
