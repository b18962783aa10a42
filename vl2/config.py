"""The official config.json of DeepSeek-VL2 as frozen dataclasses.

Absent keys take the defaults of the official config classes. `raw` keeps the file as read, so that an export
writes back every key, known here or not. Switches that no published DeepSeek-VL2 uses are refused by name, and so are
numbers far beyond any model: a config of a million layers would be built for hours before anything were said.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vl2.errors import UserError
from vl2.json_object import read_json_object
from vl2.tiles import TILE_SIZE

# The published models have up to 9 tiles, in 23 ways.
_MAX_TILES, _MAX_RESOLUTIONS = 64, 1000


def _number(default: Any, low: float, high: float) -> Any:
    """A field whose value in a config.json lies from `low` to `high`."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """SigLIP tower; sizes in pixels or channels."""

    width: int = _number(1152, 1, 16384)
    layers: int = _number(27, 1, 256)
    heads: int = _number(16, 1, 256)
    mlp_ratio: float = _number(3.7362, 0.01, 64)
    patch_size: int = _number(14, 14, 14)
    image_size: int = _number(384, 384, 384)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of a block's MLP: 4304 for the published tower."""
        return int(self.width * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches along one side of a tile: 27."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Two-layer MLP over 2x2 unfolded patches."""

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = _number(1152, 1, 16384)
    n_embed: int = _number(2048, 1, 65536)
    depth: int = _number(2, 1, 64)
    mlp_ratio: int = _number(1, 1, 64)
    downsample_ratio: int = _number(2, 1, 64)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """DeepSeek-V2 decoder; the defaults are those of the official DeepseekV2Config."""

    vocab_size: int = _number(102400, 1, 10**6)
    hidden_size: int = _number(4096, 1, 65536)
    intermediate_size: int = _number(11008, 1, 10**6)
    moe_intermediate_size: int = _number(1407, 1, 10**6)
    num_hidden_layers: int = _number(30, 1, 256)
    num_attention_heads: int = _number(32, 1, 1024)
    num_key_value_heads: int = _number(32, 1, 1024)
    n_shared_experts: int | None = _number(None, 0, 256)
    n_routed_experts: int | None = _number(None, 0, 1024)
    num_experts_per_tok: int = _number(0, 0, 1024)
    routed_scaling_factor: float = _number(1.0, 0, 1000)
    first_k_dense_replace: int = _number(0, 0, 256)
    moe_layer_freq: int = _number(1, 1, 256)
    use_mla: bool = True
    kv_lora_rank: int | None = _number(512, 0, 16384)
    q_lora_rank: int | None = _number(1536, 0, 16384)
    qk_rope_head_dim: int = _number(64, 0, 4096)
    qk_nope_head_dim: int = _number(128, 0, 4096)
    v_head_dim: int = _number(128, 0, 4096)
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    n_group: int | None = _number(None, 0, 256)
    hidden_act: str = "silu"
    max_position_embeddings: int = _number(2048, 1, 10**8)
    rms_norm_eps: float = _number(1e-6, 0, 1)
    rope_theta: float = _number(10000.0, 1, 1e12)
    rope_scaling: Any = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = _number(0.02, 0, 10)

    @property
    def head_dim(self) -> int:
        """Channels of one head of the plain (MHA) attention."""
        return self.hidden_size // self.num_attention_heads

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) has experts instead of a dense MLP."""
        return bool(self.n_routed_experts) and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


@dataclass(frozen=True, kw_only=True)
class VL2Config:
    """One DeepSeek-VL2; `candidate_resolutions` are (width, height) in pixels in the order of the file."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    candidate_resolutions: tuple[tuple[int, int], ...] = ((384, 384),)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> VL2Config:
        """Read the official layout; unknown keys are kept in `raw` only.

        Args:
            raw: the file's object.
            where: the file, for errors.

        Raises:
            UserError: a value of the wrong type or out of its range, parts that do not fit each other, or a switch
                that no published DeepSeek-VL2 uses; names the key.
        """
        try:
            language = dict(_part(raw, "language_config"))
            # The class's own default 'gready' is accepted by no branch of the official code; the checkpoints mean
            # greedy.
            if language.get("topk_method") in (None, "gready"):
                language["topk_method"] = "greedy"
            for optional in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
                if language.get("use_mla") is False and language.get(optional) is None:
                    language[optional] = 0
            config = cls(
                vision=_pick(VisionConfig, _part(raw, "vision_config"), "vision_config"),
                projector=_pick(ProjectorConfig, _part(raw, "projector_config"), "projector_config"),
                language=_pick(LanguageConfig, language, "language_config"),
                candidate_resolutions=read_resolutions(raw.get("candidate_resolutions"), where),
                raw=dict(raw),
            )
            _refuse_unsupported(config, raw)
            _refuse_what_does_not_fit(config)
        except _Wrong as wrong:
            raise UserError(f"{where}: {wrong}") from None
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> VL2Config:
        """Read `folder`/config.json.

        Raises:
            UserError: when the folder or its config.json is missing or is not a DeepSeek-VL2's.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(f"{folder}: no config.json there; expected the folder of a DeepSeek-VL2 checkpoint")
        raw = read_json_object(path)
        if "language_config" not in raw:
            raise UserError(f"{path}: no language_config in it; expected the config of a DeepSeek-VL2")
        return cls.from_dict(raw, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The file as read, with the candidate resolutions in force."""
        return {**self.raw, "candidate_resolutions": [list(c) for c in self.candidate_resolutions]}


class _Wrong(Exception):
    """What is wrong with a config; whoever knows the file says which it is."""


def _part(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = raw.get(name)
    if part is not None and not isinstance(part, dict):
        raise _Wrong(f"{name}: expected an object, found {reprlib.repr(part)}")
    return part or {}


# Annotation of a field -> (Python's types, in words).
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}


def _pick(kind: type, raw: Mapping[str, Any], part: str) -> Any:
    """One part of the config from its object, each value checked."""
    known = {f.name: f for f in fields(kind) if f.name in raw}
    for name, known_field in known.items():
        value, annotation = raw[name], str(known_field.type)
        if annotation == "Any" or (value is None and annotation.endswith("| None")):
            continue
        types, words = _KINDS[annotation.removesuffix(" | None")]
        fits = isinstance(value, types) and isinstance(value, bool) == (types == (bool,))
        if "range" in known_field.metadata:
            low, high = known_field.metadata["range"]
            fits = fits and low <= value <= high  # not so for NaN
            words += f" from {low} to {high}" if low < high else f", {low} (no other is supported)"
        if not fits:
            raise _Wrong(f"{part}.{name}: expected {words}, found {reprlib.repr(value)}")
    return kind(**{name: raw[name] for name in known})


def read_resolutions(value: Any, where: str) -> tuple[tuple[int, int], ...]:
    """The candidate_resolutions of a file as (width, height) in pixels, each made of whole tiles.

    Args:
        value: what the file says; None: the official default, one tile.
        where: the file, for errors.

    Raises:
        UserError: no such list.
    """
    if value is None:
        return ((TILE_SIZE, TILE_SIZE),)
    fits = isinstance(value, list) and 0 < len(value) <= _MAX_RESOLUTIONS
    if not fits or not all(_is_resolution(pair) for pair in value):
        raise UserError(
            f"{where}: candidate_resolutions: expected a list of at most {_MAX_RESOLUTIONS} [width, height] in pixels, "
            f"multiples of {TILE_SIZE} of at most {_MAX_TILES} tiles together, found {reprlib.repr(value)}"
        )
    return tuple((width, height) for width, height in value)


def _is_resolution(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        return False
    (columns, over), (rows, below) = (divmod(side, TILE_SIZE) for side in pair)
    return over == below == 0 and columns * rows <= _MAX_TILES


def _refuse_unsupported(config: VL2Config, raw: Mapping[str, Any]) -> None:
    """Switches that no published DeepSeek-VL2 uses."""
    language, projector = config.language, config.projector
    supported: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "tile_tag": (raw.get("tile_tag", "2D"), ("2D",)),
        "global_view_pos": (raw.get("global_view_pos", "head"), ("head",)),
        "projector_config.projector_type": (projector.projector_type, ("downsample_mlp_gelu",)),
        "projector_config.depth": (projector.depth, (2,)),
        "projector_config.downsample_ratio": (projector.downsample_ratio, (2,)),
        "language_config.rope_scaling": (language.rope_scaling, (None,)),
        "language_config.attention_bias": (language.attention_bias, (False,)),
        "language_config.hidden_act": (language.hidden_act, ("silu",)),
        "language_config.tie_word_embeddings": (language.tie_word_embeddings, (False,)),
        "language_config.num_key_value_heads": (language.num_key_value_heads, (language.num_attention_heads,)),
        "language_config.topk_method": (language.topk_method, ("greedy", "noaux_tc")),
        "language_config.scoring_func": (language.scoring_func, ("softmax", "sigmoid")),
        "language_config.n_group": (language.n_group or 1, (1,)),
    }
    if language.use_mla:
        supported["language_config.q_lora_rank"] = (language.q_lora_rank, (None,))
    for key, (found, admitted) in supported.items():
        if found not in admitted:
            words = " or ".join(map(repr, admitted))
            raise _Wrong(f"{key} is {reprlib.repr(found)}; only {words} is supported (as in the published models)")


def _refuse_what_does_not_fit(config: VL2Config) -> None:
    """Numbers that contradict each other."""
    vision, projector, language = config.vision, config.projector, config.language
    if projector.n_embed != language.hidden_size:
        raise _Wrong(
            f"projector_config.n_embed is {projector.n_embed}, but language_config.hidden_size is "
            f"{language.hidden_size}; expected the same"
        )
    if projector.input_dim != vision.width:
        raise _Wrong(
            f"projector_config.input_dim is {projector.input_dim}, but vision_config.width is {vision.width}; "
            "expected the same"
        )
    if vision.width % vision.heads:
        raise _Wrong(f"vision_config.heads: expected a divisor of width={vision.width}, found {vision.heads}")
    if not language.use_mla and language.hidden_size % (2 * language.num_attention_heads):
        raise _Wrong(
            f"language_config.num_attention_heads: expected a divisor of hidden_size={language.hidden_size} into heads "
            f"of an even size, found {language.num_attention_heads}"
        )
    if language.use_mla:
        for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
            found, even = getattr(language, key), key == "qk_rope_head_dim"
            if not found or (even and found % 2):
                expected = "an even number" if even else "a number"
                raise _Wrong(f"language_config.{key}: expected {expected} of at least 1 with use_mla, found {found}")
    experts, chosen = language.n_routed_experts or 0, language.num_experts_per_tok
    if experts and not 1 <= chosen <= experts:
        raise _Wrong(f"language_config.num_experts_per_tok: expected 1 to n_routed_experts={experts}, found {chosen}")
