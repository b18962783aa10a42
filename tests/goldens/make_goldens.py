"""Makes the numbers of nano_tiny, nano_small and nano_base again, by the official PyTorch code.

    pip install torch==2.13.0 torchvision transformers==4.38.2 timm einops attrdict safetensors numpy==1.26.4
    git clone https://github.com/deepseek-ai/DeepSeek-VL2 && git -C DeepSeek-VL2 checkout ef9f91e
    python tests/goldens/make_goldens.py DeepSeek-VL2            # compares with what lies here
    python tests/goldens/make_goldens.py DeepSeek-VL2 --write    # and replaces it

In an environment of its own: our lock file has no torch. Weights, token ids and pixels are inputs and stay as they
are (model.safetensors, images/*.npz, input_ids, labels, prompt_ids of each case), and so does the choice of rows.
Everything else in <family>/<case>.npz, in the cases of golden.json and in batch2_leftpad.npz is computed.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
FAMILIES = ("nano_tiny", "nano_small", "nano_base")
CASES = ("text", "crop2x1", "three", "multiturn")
ALPHA = 0.001  # of the load-balance loss, for each sequence
NEW_TOKENS = 20
PAD_ID = 2
IMAGE_ID = 976  # <image>: the first that the official processor adds to nano_bpe
TOLERANCE = 2e-5  # of the largest value: what two float32 runs on other processors may differ by
Arrays = dict[str, np.ndarray]


def official_model(checkout: Path, family: str) -> Any:
    """The official model with the weights of a family, float32, in evaluation mode."""
    use_official(checkout)
    from deepseek_vl2.models.modeling_deepseek_vl_v2 import DeepseekVLV2Config, DeepseekVLV2ForCausalLM

    config = DeepseekVLV2Config(**json.loads((HERE / family / "config.json").read_text()))
    model = DeepseekVLV2ForCausalLM(config).float()
    weights = {name: tensor.float() for name, tensor in load_file(HERE / family / "model.safetensors").items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


def use_official(checkout: Path) -> None:
    """Make the official package importable and runnable here.

    xformers has no kernel for CPUs, so its attention is written out; the load-balance loss can be left out.
    """
    if "xformers.ops" in sys.modules:
        return

    def memory_efficient_attention(q, k, v, p=0.0):
        """Of [batch, positions, heads, width]; p, a dropout, is 0 in these models."""
        assert p == 0.0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return (weights @ v).transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    sys.modules["xformers"], sys.modules["xformers.ops"] = types.ModuleType("xformers"), ops
    sys.path.insert(0, str(checkout))
    from deepseek_vl2.models import modeling_deepseek

    class Balance(modeling_deepseek.AddAuxiliaryLoss):
        """In training the official experts assert a load-balance loss; without one their output is what it is."""

        @staticmethod
        def apply(y, loss):
            return y if loss is None else official.apply(y, loss)

    official, modeling_deepseek.AddAuxiliaryLoss = modeling_deepseek.AddAuxiliaryLoss, Balance


def stored(family: str, case: str) -> Arrays:
    """What lies here of a case."""
    found: Arrays = {}
    for path in (HERE / family / f"{case}.npz", HERE / family / f"{case}_aux.npz"):
        if path.exists():
            with np.load(path) as arrays:
                found |= {name: arrays[name] for name in arrays.files}
    return found


def inputs_of(case: str, kept: Arrays, ids: str = "input_ids") -> dict[str, torch.Tensor]:
    """A case as the official forward takes it, a batch of one; pixels are (u8 / 255 - 0.5) / 0.5."""
    tokens = torch.from_numpy(kept[ids])[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if case != "text":
        with np.load(HERE / "images" / f"{case}.npz") as arrays:
            pixels = torch.from_numpy(arrays["images_u8"]).float()
        inputs["images"] = ((pixels / 255.0 - 0.5) / 0.5)[None]
        inputs["images_seq_mask"] = tokens == IMAGE_ID
        inputs["images_spatial_crop"] = torch.from_numpy(kept["images_spatial_crop"])[None]
    return inputs


def gates(model: Any) -> Iterator[tuple[int, Any]]:
    """(layer, router) of every layer with experts."""
    for i, layer in enumerate(model.language.model.layers):
        if hasattr(layer.mlp, "gate"):
            yield i, layer.mlp.gate


class Seen:
    """Records inputs and outputs of modules while a forward runs."""

    def __init__(self, modules: dict[str, Any]):
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.hooks = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def _hook(self, name: str):
        def keep(module, inputs, output):
            self.inputs[name], self.outputs[name] = inputs[0], output

        return keep

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


def rows_like(full: np.ndarray, kept: np.ndarray, case: Arrays, axis: int = 0) -> np.ndarray:
    """Those positions of `full` that the file keeps: all of them, `rows` or `logits_rows`."""
    size = kept.shape[axis]
    if size == full.shape[axis]:
        return full
    rows = next(case[name] for name in ("rows", "logits_rows") if len(case[name]) == size)
    return np.take(full, rows, axis=axis)


@torch.no_grad()
def forward_numbers(model: Any, case: str, kept: Arrays) -> tuple[Arrays, dict[str, Any]]:
    """Features, hidden states, logits, routing, cache and greedy tokens of one case."""
    inputs, routers = inputs_of(case, kept), dict(gates(model))
    embeds = model.prepare_inputs_embeds(**{name: value for name, value in inputs.items() if name != "attention_mask"})
    modules = {f"gate{layer}": gate for layer, gate in routers.items()}
    modules |= {"vision": model.vision, "projector": model.projector, "block0": model.vision.blocks[0]}
    with Seen(modules) as seen:
        labels = torch.from_numpy(kept["labels"])[None]
        out = model(**inputs, labels=labels, output_hidden_states=True, use_cache=True, return_dict=True)
    full: Arrays = {"inputs_embeds": embeds[0].numpy(), "logits": out.logits[0].numpy()}
    full["hidden_states"] = torch.stack([state[0] for state in out.hidden_states]).numpy()
    scalars: dict[str, Any] = {"T": embeds.shape[1], "loss_eval": out.loss.item(), "router_counts": {}}
    for layer, gate in routers.items():
        index, weight, _ = seen.outputs[f"gate{layer}"]
        order = index.argsort(dim=-1)
        full[f"router_idx_L{layer}"] = index.gather(1, order).numpy().astype(np.int8)
        full[f"router_weight_L{layer}"] = weight.gather(1, order).numpy()
        scalars["router_counts"][str(layer)] = torch.bincount(index.flatten(), minlength=gate.n_routed_experts).tolist()
    first = min(routers)
    entered = seen.inputs[f"gate{first}"].reshape(-1, embeds.shape[-1])
    scores = entered @ routers[first].weight.T
    full[f"router_scores_L{first}"] = (
        scores.sigmoid() if routers[first].scoring_func == "sigmoid" else scores.softmax(dim=-1)
    ).numpy()
    full[f"router_input_L{first}"] = entered.numpy()
    found = {name: rows_like(value, kept[name], kept, int(name == "hidden_states")) for name, value in full.items()}
    for part in (0, 1):
        found[f"kv{part}_layer1_last"] = out.past_key_values[1][part][0, :, -5:-1].numpy()  # as prefilling leaves it
    if "vision_features" in kept:  # kept for one family: the towers of all three are alike
        features = seen.outputs["vision"]
        found["vision_features"] = features[:, ::13].numpy()
        found["vision_features_sum"] = features.sum(dim=(1, 2)).numpy()
        found["projector_out"] = seen.outputs["projector"][:, ::7].numpy()
        if "vision_embed_tile0" in kept:
            found["vision_embed_tile0"] = seen.inputs["block0"][0, ::13].numpy()
            found["vision_block0_tile0"] = seen.outputs["block0"][0, ::13].numpy()
    prompt = inputs_of(case, kept, "prompt_ids")
    embeds = model.prepare_inputs_embeds(**{name: value for name, value in prompt.items() if name != "attention_mask"})
    scalars["generate"], first = greedy(model, embeds)
    found["generate_logits_first"] = first.numpy()
    return found, scalars


def greedy(model: Any, embeds: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """The likeliest tokens, each by a forward over the whole sequence, and the logits of the first."""
    tokens: list[int] = []
    first = None
    for _ in range(NEW_TOKENS):
        logits = model(inputs_embeds=embeds, use_cache=False, return_dict=True).logits[0, -1]
        first = logits if first is None else first
        tokens.append(int(logits.argmax()))
        new = model.language.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        embeds = torch.cat([embeds, new], dim=1)
    return tokens, first


def gradient_numbers(model: Any, case: str, kept: Arrays) -> tuple[Arrays, dict[str, Any]]:
    """Gradients in training mode without the load-balance loss and with it, which enters as a gradient only.

    The official router refuses to train with the correction bias (nano_base); its routers stay in evaluation mode.
    """
    found: Arrays = {}
    scalars: dict[str, Any] = {}
    sigmoid = any(gate.topk_method == "noaux_tc" for _, gate in gates(model))
    for prefix, alpha in (("grad/", 0.0), ("grad_aux/", ALPHA)):
        if alpha and sigmoid:
            continue
        model.train()
        for _, gate in gates(model):
            gate.alpha = alpha
            gate.train(not sigmoid)
        model.zero_grad(set_to_none=True)
        routers = dict(gates(model))
        with Seen({str(layer): gate for layer, gate in routers.items()}) as seen:
            labels = torch.from_numpy(kept["labels"])[None]
            loss = model(**inputs_of(case, kept), labels=labels, use_cache=False, return_dict=True).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if alpha:
            scalars["aux_loss_per_layer"] = {layer: output[2].item() for layer, output in seen.outputs.items()}
        else:
            scalars["loss_train_noaux"] = loss.item()
            scalars["no_grad_params"] = [name for name, p in model.named_parameters() if p.grad is None][:40]
            scalars["grad_norms"] = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        for name in (name.removeprefix(prefix) for name in kept if name.startswith(prefix)):
            value = gradients[name].numpy()
            if name.endswith("lm_head.weight"):
                value = value[:64]
            elif name.endswith("embed_tokens.weight"):
                value = value[kept["grad_rows_embed"]]
            found[prefix + name] = value
    model.eval()
    return found, scalars


@torch.no_grad()
def left_padded_logits(model: Any, family: str) -> np.ndarray:
    """`text` and `multiturn` as one left-padded batch: the kept rows and columns of the logits, [2, rows, columns]."""
    kept = [stored(family, case) for case in ("text", "multiturn")]
    with np.load(HERE / "batch2_leftpad.npz") as arrays:
        rows, columns = arrays["rows"].astype(int), arrays["columns"].astype(int)
    short, long = (inputs_of(case, arrays) for case, arrays in zip(("text", "multiturn"), kept, strict=True))
    pad = long["input_ids"].shape[1] - short["input_ids"].shape[1]

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(short[name], (pad, 0), value=value), long[name]])

    ids, mask = padded("input_ids", PAD_ID), padded("attention_mask", 0)
    logits = model(
        input_ids=ids,
        use_cache=False,
        attention_mask=mask,
        images=torch.cat([torch.zeros_like(long["images"]), long["images"]]),
        images_seq_mask=ids == IMAGE_ID,
        images_spatial_crop=torch.cat([torch.zeros_like(long["images_spatial_crop"]), long["images_spatial_crop"]]),
        return_dict=True,
    ).logits
    return logits[:, rows][:, :, columns].numpy()


def off(found: Any, kept: Any) -> float:
    """How far two numbers, arrays or trees of them are apart, of the largest value; whole numbers must be equal."""
    if isinstance(kept, dict):
        return max((off(found[name], kept[name]) for name in kept), default=0.0)
    ours, theirs = np.asarray(found), np.asarray(kept)
    if ours.shape != theirs.shape or theirs.dtype.kind != "f":
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def main() -> int:
    """Compute every case; compare with what lies here, and with --write replace it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the official repository")
    parser.add_argument("--write", action="store_true", help="replace the files here")
    options = parser.parse_args()
    worst, padded = 0.0, {}
    for family in FAMILIES:
        model = official_model(options.checkout, family)
        document = json.loads((HERE / family / "golden.json").read_text())
        for case in CASES:
            kept, known = stored(family, case), document["cases"][case]
            found, scalars = forward_numbers(model, case, kept)
            more, further = gradient_numbers(model, case, kept)
            found, scalars = found | more, scalars | further
            differences = {name: off(value, kept[name]) for name, value in found.items()}
            differences |= {name: off(scalars[name], known[name]) for name in known}
            name = max(differences, key=lambda name: differences[name])
            print(f"{family} {case}: {len(differences)} numbers and arrays, off by {differences[name]:.1e} ({name})")
            worst = max(worst, differences[name])
            if options.write:
                for path in (HERE / family / f"{case}.npz", HERE / family / f"{case}_aux.npz"):
                    if path.exists():
                        with np.load(path) as arrays:
                            names = arrays.files
                        np.savez_compressed(path, **{name: found.get(name, kept[name]) for name in names})
                known.update({name: scalars[name] for name in known})
        padded[family] = left_padded_logits(model, family)
        if options.write:
            (HERE / family / "golden.json").write_text(json.dumps(document))
    with np.load(HERE / "batch2_leftpad.npz") as arrays:
        batch = {name: arrays[name] for name in arrays.files}
    difference = max(off(value, batch[family]) for family, value in padded.items())
    print(f"batch2_leftpad: off by {difference:.1e}")
    if options.write:
        np.savez_compressed(HERE / "batch2_leftpad.npz", **(batch | padded))
        return 0
    return int(max(worst, difference) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
