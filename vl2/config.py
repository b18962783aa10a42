"""The official config.json of DeepSeek-VL2 as frozen dataclasses.

Absent keys take the defaults of the official config classes. `raw` keeps the file as read, so that an export
writes back every key, known here or not. Switches that no published DeepSeek-VL2 uses are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vl2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """SigLIP tower; sizes in pixels or channels."""

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp_ratio: float = 3.7362
    patch_size: int = 14
    image_size: int = 384

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
    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """DeepSeek-V2 decoder; the defaults are those of the official DeepseekV2Config."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int = 0
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    use_mla: bool = True
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    n_group: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Any = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

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
    def from_dict(cls, raw: Mapping[str, Any]) -> VL2Config:
        """Read the official layout; unknown keys are kept in `raw` only.

        Raises:
            UserError: for a switch that no published DeepSeek-VL2 uses.
        """
        language = dict(raw.get("language_config") or {})
        # The class's own default 'gready' is accepted by no branch of the official code; the checkpoints mean greedy.
        if language.get("topk_method") in (None, "gready"):
            language["topk_method"] = "greedy"
        for optional in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
            if language.get("use_mla") is False and language.get(optional) is None:
                language[optional] = 0
        candidates = raw.get("candidate_resolutions") or [[384, 384]]
        config = cls(
            vision=_pick(VisionConfig, raw.get("vision_config") or {}),
            projector=_pick(ProjectorConfig, raw.get("projector_config") or {}),
            language=_pick(LanguageConfig, language),
            candidate_resolutions=tuple((int(w), int(h)) for w, h in candidates),
            raw=dict(raw),
        )
        _refuse_unsupported(config, raw)
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
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON ({error})") from error
        if not isinstance(raw, dict) or "language_config" not in raw:
            raise UserError(f"{path}: no language_config in it; expected the config of a DeepSeek-VL2")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The file as read, with the candidate resolutions in force."""
        return {**self.raw, "candidate_resolutions": [list(c) for c in self.candidate_resolutions]}


def _pick(kind: type, raw: Mapping[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    return kind(**{key: value for key, value in raw.items() if key in known})


def _refuse_unsupported(config: VL2Config, raw: Mapping[str, Any]) -> None:
    language, projector = config.language, config.projector
    wrong = {
        "tile_tag": (raw.get("tile_tag", "2D"), "2D"),
        "global_view_pos": (raw.get("global_view_pos", "head"), "head"),
        "projector_config.projector_type": (projector.projector_type, "downsample_mlp_gelu"),
        "projector_config.depth": (projector.depth, 2),
        "projector_config.downsample_ratio": (projector.downsample_ratio, 2),
        "language_config.rope_scaling": (language.rope_scaling, None),
        "language_config.attention_bias": (language.attention_bias, False),
        "language_config.hidden_act": (language.hidden_act, "silu"),
        "language_config.tie_word_embeddings": (language.tie_word_embeddings, False),
        "language_config.num_key_value_heads": (language.num_key_value_heads, language.num_attention_heads),
    }
    for key, (found, expected) in wrong.items():
        if found != expected:
            raise UserError(
                f"config.json: {key} is {found!r}; only {expected!r} is supported (as in the published models)"
            )
    if projector.n_embed != language.hidden_size:
        raise UserError(
            f"config.json: projector_config.n_embed is {projector.n_embed}, "
            f"but language_config.hidden_size is {language.hidden_size}"
        )
    if projector.input_dim != config.vision.width:
        raise UserError(
            f"config.json: projector_config.input_dim is {projector.input_dim}, "
            f"but vision_config.width is {config.vision.width}"
        )
    if language.topk_method not in ("greedy", "noaux_tc"):
        raise UserError(
            f"config.json: language_config.topk_method is {language.topk_method!r}; supported: greedy, noaux_tc"
        )
    if language.scoring_func not in ("softmax", "sigmoid"):
        raise UserError(
            f"config.json: language_config.scoring_func is {language.scoring_func!r}; supported: softmax, sigmoid"
        )
    if (language.n_group or 1) != 1:
        raise UserError(
            f"config.json: language_config.n_group is {language.n_group}; group-limited routing is not supported"
        )
    if language.use_mla and language.q_lora_rank is not None:
        raise UserError("config.json: language_config.q_lora_rank is set; no published DeepSeek-VL2 uses it")
