"""How an export is loaded, here and elsewhere, as its model card says it."""

from __future__ import annotations

from train.store.provenance import ExportReport

_HERE = """\
```bash
bash launch.sh infer model=FOLDER image=cat.jpg prompt="What is this?"
bash launch.sh serve model=FOLDER
```"""

# What was read where, for whom a later version does it otherwise.
_ELSEWHERE = "The rest is what the others' code and documentation say; it was not run where this card was written."

_OFFICIAL = """\
The official code, [DeepSeek-VL2](https://github.com/deepseek-ai/DeepSeek-VL2) on Transformers:

```python
import torch
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

processor = DeepseekVLV2Processor.from_pretrained("FOLDER")
model = DeepseekVLV2ForCausalLM.from_pretrained("FOLDER", torch_dtype=torch.bfloat16).eval()
```"""

_SERVERS = """\
[vLLM](https://docs.vllm.ai/en/v0.14.0/api/vllm/model_executor/models/deepseek_vl2/) (documented for 0.14.0) and SGLang
(found in its 0.4.5 and 0.5.5, not in 0.4.4):

```bash
vllm serve FOLDER --hf-overrides '{"architectures": ["DeepseekVLV2ForCausalLM"]}'
python -m sglang.launch_server --model-path FOLDER --chat-template deepseek-vl2
```"""

_PADDLEMIX = """\
[PaddleMIX](https://github.com/PaddlePaddle/PaddleMIX), whose `paddlemix/examples/deepseek_vl2` takes the folder as
`--model_path`:

```python
from paddlemix.models.deepseek_vl2 import DeepseekVLV2ForCausalLM

model = DeepseekVLV2ForCausalLM.from_pretrained("FOLDER", dtype="bfloat16").eval()
```"""

_ADAPTER = """\
{library}, around {model}, at the resolutions of `processor_config.json` here:

```python
from {module} import {cls}

model = {cls}.from_pretrained(model, "FOLDER")
```"""

_READERS = {
    "peft": {"library": "PEFT", "model": "the official model", "module": "peft", "cls": "PeftModel"},
    # which copies float32 into nothing else
    "paddle": {
        "library": "PaddleNLP",
        "model": "PaddleMIX's model in float32",
        "module": "paddlenlp.peft",
        "cls": "LoRAModel",
    },
}


def how_to_load(report: ExportReport) -> str:
    """The section of a card, for what an export is: an adapter, or merged weights in one of two layouts."""
    if report.adapter:
        reader = _ADAPTER.format(**_READERS[report.adapter])
        return "\n\n".join([_HERE, f"{_ELSEWHERE} To merge it: `bash launch.sh export run=FOLDER`.", reader])
    others = [_PADDLEMIX] if report.layout == "paddle" else [_OFFICIAL, _SERVERS]
    return "\n\n".join([_HERE, _ELSEWHERE, *others])
