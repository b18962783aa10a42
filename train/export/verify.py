"""Whether an export is what it should be: read back bit for bit, logits of the merge, and what rounding costs.

The models that are compared read their weights layer by layer, so that a pass holds one layer of one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import paddle

from train.export.merge import Merge
from vl2.checkpoint.stored_model import StoredModel
from vl2.checkpoint.stream import stream_weights
from vl2.errors import UserError
from vl2.model import DeepseekVL2
from vl2.parameters import build_model
from vl2.prompt import Message, render
from vl2.tiles import TILE_SIZE, Resolution
from vl2.tokenizer import Tokenizer

# (b): float32 sums in another order; measured on nano below 1e-5.
MERGE_TOLERANCE = 1e-4
# (c): mean KL of next-token distributions, in nats, that rounding to the stored type may cost.
MAX_KL = 0.02


def verify_tensors(export: StoredModel, merge: Merge, done: Callable[[int], None]) -> dict[str, int]:
    """(a) Every tensor read back equals round(base + delta), an untouched one the base's, bit for bit.

    Args:
        export: the files as the loader sees them: their names and shapes fit already.
        merge: what they should hold; read and computed once more.
        done: told the bytes of each tensor that was compared.

    Returns:
        Numbers of tensors: all, those that training changed, and what of the training went into them.

    Raises:
        UserError: naming the tensors that read back otherwise, or the trained ones that nothing took up.
    """
    wrong, changed = [], 0
    used: set[str] = set()
    written = {part.name: part for _, part in export.named_parts()}
    for path, part in merge.base.named_parts():
        expected, found = merge.rounded(path, part), export.piece(written[part.name])
        if export.tensors[part.name].dtype != merge.dtype_of(part.name) or not _same_bits(expected, found):
            wrong.append(part.name)
        taken = merge.taken(path, part)
        changed, used = changed + bool(taken), used | taken
        done(found.nbytes)
    if wrong:
        raise UserError(
            f"the export was refused: {len(wrong)} tensors read back otherwise than written ({'; '.join(wrong[:5])})"
        )
    if unused := sorted(merge.trained() - used):
        raise UserError(
            f"the export was refused: {len(unused)} trained weights that no tensor took up: {'; '.join(unused[:5])}"
        )
    return {"tensors": len(written), "tensors_changed": changed, "trained_used": len(used)}


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, so that a NaN equals itself and -0 is not 0."""
    kind = {2: np.uint16, 4: np.uint32}[a.itemsize]
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a.view(kind), b.view(kind)))


def verify_logits(
    export: StoredModel, merge: Merge, probe: Mapping[str, np.ndarray], passes: Callable[[list], Iterable]
) -> dict[str, float]:
    """(b) of an adapter, and (c): logits of the trained model, of the unrounded merge, and of the files.

    An adapter that was trained on weights in few bits is merged into the original ones; what that costs is (d).

    Args:
        export: the files as the loader sees them.
        merge: what they were made of.
        probe: see `make_probe`.
        passes: wraps the iteration over the models (a progress bar).

    Raises:
        UserError: when they are too far from each other.
    """
    skeleton = merge.base.skeleton
    trained = merge.lora.model if merge.lora else _like(skeleton)
    models: list[tuple[str, DeepseekVL2, Callable[[str], paddle.Tensor]]] = [
        ("trained", trained, merge.trained_parameter),
        ("exported", _like(skeleton), export.parameter),
    ]
    if merge.frozen != "none":
        models.append(("quantised", trained, merge.quantised_parameter))
    if merge.lora:
        models.insert(1, ("merged", _like(skeleton), merge.merged_parameter))
    logits = {name: streamed_logits(model, value_of, probe) for name, model, value_of in passes(models)}
    error = {"merge_error": verify_merge(logits["trained"], logits["merged"])} if merge.lora else {}
    found = {**error, **verify_rounding(logits["trained"], logits["exported"])}
    if merge.frozen != "none":
        found |= _costs("quantised", logits["quantised"], logits["exported"])
    return found


def _like(model: DeepseekVL2) -> DeepseekVL2:
    return build_model(model.config, model.image_token_id)


def streamed_logits(
    model: DeepseekVL2, value_of: Callable[[str], paddle.Tensor], probe: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Logits of a model without weights, which it reads layer by layer; see `logits_of`."""
    stop = stream_weights(model, value_of)
    model.eval()
    logits = logits_of(model, probe)
    stop()
    return logits


def logits_of(model: DeepseekVL2, probe: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 logits [N, V] at the N text positions of the probe; next to an image's own rows nothing is predicted."""
    with paddle.no_grad():
        hidden = model(probe)
        text = np.flatnonzero(probe["input_ids"] != model.image_token_id)
        return model.language.logits(paddle.gather(hidden, paddle.to_tensor(text))).numpy().astype(np.float64)


def verify_merge(trained: np.ndarray, merged: np.ndarray) -> float:
    """(b) Largest difference of the logits, relative to the largest logit.

    Raises:
        UserError: when it is more than the order of float32 sums explains.
    """
    error = float(np.abs(trained - merged).max() / np.abs(trained).max())
    if not error <= MERGE_TOLERANCE:
        raise UserError(
            f"the export was refused: the float32 merge changes logits by {error:.2e} of the largest, "
            f"more than {MERGE_TOLERANCE:.0e}"
        )
    return error


def verify_rounding(trained: np.ndarray, exported: np.ndarray) -> dict[str, float]:
    """(c) What rounding costs on the probe: mean |Δlogit|, mean KL in nats, and how often the next token agrees.

    Raises:
        UserError: when it costs too much.
    """
    found = _costs("rounding", trained, exported)
    if not (kl := found["rounding_kl"]) <= MAX_KL:
        raise UserError(
            f"the export was refused: rounding costs a KL of {kl:.3f} nats, more than {MAX_KL}; try dtype=fp32"
        )
    return found


def _costs(what: str, trained: np.ndarray, exported: np.ndarray) -> dict[str, float]:
    """How far two models' logits are from each other, by names that begin with what lies between them."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (trained, exported))
    return {
        f"{what}_mean_logit_change": float(np.abs(trained - exported).mean()),
        f"{what}_kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        f"{what}_next_token_agreement": float((trained.argmax(-1) == exported.argmax(-1)).mean()),
    }


def make_probe(tokenizer: Tokenizer, candidates: Sequence[Resolution]) -> dict[str, np.ndarray]:
    """A conversation with one drawn picture of two tiles and its global view, for comparing logits."""
    messages = [
        Message(role="user", content="<image>\nWhat is in this picture?"),
        Message(role="assistant", content="A red circle on the left and stripes on the right."),
        Message(role="user", content="这是什么？"),
        Message(role="assistant", content="红色圆形"),
    ]
    grid = (2, 1) if (2 * TILE_SIZE, TILE_SIZE) in candidates else (1, 1)
    rows, columns = np.mgrid[0:TILE_SIZE, 0:TILE_SIZE]
    circle = np.full([3, TILE_SIZE, TILE_SIZE], 230, np.uint8)
    circle[:, (rows - 190) ** 2 + (columns - 190) ** 2 < 110**2] = np.array([[210], [40], [40]], np.uint8)
    stripes = np.where((columns // 32) % 2, 40, 220).astype(np.uint8)[None].repeat(3, axis=0)
    tiles = np.stack([circle, circle, stripes][: 1 + grid[0] * grid[1]])
    rendered = render(messages, [grid], tokenizer)
    tokens = len(rendered.input_ids)
    return {
        "input_ids": rendered.input_ids,
        "position_ids": np.arange(tokens),
        "seq_lens": np.array([tokens]),
        "tiles": tiles,
        "grids": np.array([grid]),
    }
