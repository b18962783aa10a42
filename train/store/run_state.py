"""What a checkpoint says about its run: state.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What resuming a run must not change."""

    model_fingerprint: str  # of the base model
    model_path: str  # as typed, for the message
    tokenizer: str  # fingerprint
    settings: dict[str, Any]  # by configuration key: precision, what trains
    plan: dict[str, Any]  # what the packs of every step depend on


@dataclass(kw_only=True)
class History:
    """Of all optimizer steps so far, through every interruption; it grows with the run."""

    losses: list[float | None] = field(default_factory=list)  # of each step, see StepMetrics
    tokens: int = 0
    seconds: float = 0.0  # in steps; loading, evaluation and saving are not counted

    def add(self, loss: float | None, tokens: int, seconds: float) -> None:
        """Take in one step."""
        self.losses.append(loss)
        self.tokens += tokens
        self.seconds += seconds


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best checkpoint of a run so far."""

    metric: str  # that decides: `loss` (lower is better), or one that is higher for better answers
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class ValidationState:
    """How far the validation of a run was at a checkpoint."""

    step: int  # of the newest validation on the way
    best: Best | None  # of all validations until then
    without_best: int  # validations in a row that found no new best


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """Everything of a checkpoint that is not tensors."""

    step: int  # optimizer steps made
    identity: Identity
    history: History
    scaler: dict[str, int | float | bool | list[float]] | None  # of fp16's loss, by the names of its state
    wandb_id: str | None  # of the run on wandb, which goes on there; None: not known
    versions: dict[str, str]  # of the packages
    validation: ValidationState | None = None  # None: there was none on the way

    @staticmethod
    def from_format_1(document: Mapping[str, Any]) -> dict[str, Any]:
        """It held the model's two facts in a table, and no wandb_id."""
        fields = {"wandb_id": None, **document}
        identity = fields.get("identity")
        if isinstance(identity, Mapping) and isinstance(identity.get("model"), Mapping):
            model, rest = identity["model"], {key: value for key, value in identity.items() if key != "model"}
            fields["identity"] = {**rest, **{f"model_{key}": value for key, value in model.items()}}
        return fields
