"""Every setting of every verb: dataclasses that are the schema, the help text and what the code below receives.

Values that recipes share stand here; conf/*.yaml holds what a recipe changes.  The classes are not frozen only because
OmegaConf refuses to compose into frozen ones; nobody changes one after `load_*`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from train.config.conf_files import ROOT
from train.config.data_schema import DataConfig, EvalDataConfig
from train.config.fields import LAST_SEED, LONGEST_TEXT, MANY, OneOrMore, key

LORA_GROUPS = ("attention", "experts", "shared_experts", "dense_mlp", "vision", "projector")
PARTS = ("vision", "projector", "language")
# Every weight is in one of them; an adapter's are in the group that it tunes.
PARAMETER_GROUPS = (*LORA_GROUPS, "embeddings", "head", "norms", "routers")
WHOLE_GROUPS = ("vision", "projector", "embeddings", "head", "norms", "routers")  # that can train beside adapters
PRECISIONS = ("bf16", "fp16", "fp32")
FROZEN = ("none", "nf4", "int8")  # see vl2.quantised
DEVICES = ("auto", "cpu", "gpu")
MODEL_DOC = "Folder of a base model, a run, an adapter (PEFT's too) or an export; or a name (nano, tiny, ...)."
BASE_DOC = "Base model of a run or an adapter, where it does not name it or it lies elsewhere now."
FROZEN_DOC = (
    "Keep the language model's matrices in few bits, which takes a quarter (nf4) or half (int8) of the memory; auto: "
    "as an adapter was trained."
)
# One for infer and eval: an answer that one of them cuts and the other does not looks like another model.
MAX_NEW_TOKENS = 512
TF32_DOC = "On a GPU from Ampere on: multiply float32 in TF32, which keeps 3 digits of 7; faster with precision=fp32."
CHECK_DOC = "What is read of a model that has a manifest (an export) before it is used; adapters are read as a whole."
CHECKPOINT_DOC = "Of a run one of its checkpoints: best, last, or a number of steps; empty: what it ended with."
NANO = ROOT / "vl2" / "nano"
# Defined in train/ask/scores.
METRICS = (
    *("exact_match", "normalised_match", "contains", "anls", "relaxed_accuracy"),
    *("box_iou", "box_accuracy"),
)
METRICS_DOC = (
    "How answers are scored; higher is better. exact_match: word for word; normalised_match: but for case, width, "
    "punctuation and white space; contains: the expected answer is in it; anls: 1 - edits / length, from 0.5 on; "
    "relaxed_accuracy: numbers within 5 %, else equal; box_iou, and box_accuracy (IoU from 0.5 on): where boxes are "
    "expected."
)


@dataclass(kw_only=True)
class ModelConfig:
    """`model=NAME` picks conf/model/NAME.yaml; `model.path=FOLDER` takes any folder of weights."""

    path: str = key("deepseek-ai/deepseek-vl2-tiny", "Folder of the model, or its name on the hub.", path=True)
    init: str = key("weights", "Start from the folder's weights, or from random ones.", choices=("weights", "random"))
    frozen: str = key(
        "none",
        "Keep the language model's frozen matrices in few bits: nf4, 4.1 bits a weight, for adapters on a card that is "
        "too small (QLoRA), or int8, 8 bits; none: as precision says. Those of the vision tower, where it does not "
        "train, take 8 bits in either case; tables, norms and routers stay as they are; exports merge the adapter into "
        "the original weights.",
        choices=FROZEN,
    )
    frozen_cache: str = key("", "Folder that keeps what model.frozen made, for later starts; empty: none.", path=True)


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank adapters; rank 0 trains the parts in `trainable` instead."""

    rank: int = key(8, "Rank of the adapters; 0: no adapters, `trainable` is trained.", low=0, high=4096)
    alpha: float = key(16.0, "The update is scaled by alpha / rank; see lora.rslora.", low=0.001, high=65536)
    dropout: float = key(0.0, "Part of an adapter's inputs that is dropped.", low=0, high=0.95)
    groups: list[str] = key(
        factory=lambda: ["attention", "experts", "shared_experts", "dense_mlp"],
        doc="Which weights get adapters.",
        choices=LORA_GROUPS,
    )
    ranks: dict[str, int] = key(
        factory=dict, doc="Another rank for a group: lora.ranks.experts=4.", choices=LORA_GROUPS, low=1, high=4096
    )
    alphas: dict[str, float] = key(
        factory=dict,
        doc="Another alpha for a group: lora.alphas.experts=8.",
        choices=LORA_GROUPS,
        low=0.001,
        high=65536,
    )
    rslora: bool = key(False, "Scale by alpha / sqrt(rank) instead, which does not fade as the rank grows (rsLoRA).")
    pissa: bool = key(
        False, "Start at the principal singular values of each weight, which the adapter then moves (PiSSA)."
    )
    also_train: list[str] = key(
        factory=list,
        doc="Groups that train themselves beside the adapters on others: lora.also_train=[projector,norms].",
        choices=WHOLE_GROUPS,
    )
    plus_scale: float = key(
        1.0, "B learns at that many times A's rate (LoRA+, whose authors took 16).", low=0.001, high=1000
    )
    init: str = key(
        "", "Adapter (PEFT's too) to start from; empty: B is zero, so training starts at the base.", path=True
    )


@dataclass(kw_only=True)
class GroupConfig:
    """How one group of weights, or its adapters, learns otherwise than the rest."""

    lr_scale: float = key(1.0, "It learns at optim.lr times this.", low=0, high=100)
    weight_decay: float | None = key(None, "Of its matrices; null: optim.weight_decay.", low=0, high=10)


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = key(1e-4, "Peak learning rate.", low=0, high=1)
    schedule: str = key("cosine", "After the warm-up.", choices=("cosine", "constant"))
    warmup_ratio: float = key(0.03, "Linear warm-up.", unit="part of all optimizer steps", low=0, high=1)
    min_lr_ratio: float = key(0.1, "Where cosine ends.", unit="part of lr", low=0, high=1)
    groups: dict[str, Any] = key(
        factory=dict,
        entry_class=GroupConfig,
        doc="Groups that learn otherwise: optim.groups.vision.lr_scale=0.1.",
        choices=PARAMETER_GROUPS,
    )
    weight_decay: float = key(0.0, "Decoupled weight decay of matrices.", low=0, high=10)
    beta1: float = key(0.9, "Adam's first moment.", low=0, high=0.9999)
    beta2: float = key(0.95, "Adam's second moment.", low=0, high=0.9999)
    eps: float = key(1e-8, "Adam's epsilon.", low=1e-12, high=1)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this global norm; 0: not.", low=0, high=MANY)
    aux_loss: float = key(
        0.0,
        "Weight of the experts' load-balance loss, which is 1 for each layer of experts in balance, averaged over the "
        "conversations of a step; 0: off. DeepSeek took 0.001 for Tiny and Small, 0.0001 for the full model.",
        low=0,
        high=100,
    )


@dataclass(kw_only=True)
class EvalConfig:
    """Validation on the held-out rows: before training, after it, and every so often on the way."""

    every: str = key(
        "0",
        "On the way: 20 is every 20 optimizer steps, 0.25 after each quarter of an epoch, epoch after each epoch, and "
        "with any of them after the last step; 0: not on the way.",
    )
    best: str = key(
        "auto",
        "Which checkpoint is kept as the best beside the newest ones: of the lowest loss, or of the highest metric; "
        "auto: loss, with eval.every; none: no one.",
        choices=("auto", "none", "loss", *METRICS),
    )
    patience: int | None = key(
        None, "End the run after that many validations without a new best; null: never.", low=1, high=MANY
    )
    questions: int = key(200, "How many are answered each time; 0: none.", unit="questions", low=0, high=MANY)
    max_new_tokens: int | None = key(
        None,
        "Longest answer; null: as long as the longest that is expected, and a quarter more.",
        unit="tokens",
        low=1,
        high=LONGEST_TEXT,
    )
    permuted: bool = key(True, "Ask again with the pictures exchanged: is it looking at them?")
    metrics: list[str] = key(factory=lambda: ["exact_match"], doc=METRICS_DOC, choices=METRICS)


@dataclass(kw_only=True)
class ShardingConfig:
    """What several processes keep once between them; Paddle's stages, which are those of ZeRO."""

    stage: int = key(
        0,
        "0: every process keeps all; 1: each keeps the optimizer's moments of some weights only; 2: and of the decoder "
        "layers the gradients of those; 3: and these weights themselves, which the others get while they compute.",
        low=0,
        high=3,
    )
    degree: int = key(
        0,
        "Processes that share, a divisor of all of them; 0: all. 8 on machines of 8 GPUs shares within each machine.",
        unit="processes",
        low=0,
        high=65536,
    )


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases, where `log` names it."""

    mode: str = key("auto", "auto: online when logged in, else offline.", choices=("auto", "online", "offline"))
    project: str = key("deepseek-vl2", "Project on wandb.")
    name: str = key("", "Name of the run; empty: the recipe's.")


@dataclass(kw_only=True)
class TrainConfig:
    """Training: `bash launch.sh conf=RECIPE key=value ...`."""

    recipe: str = key("", "Set by conf=RECIPE or conf=FILE.yaml.")
    rehearsal: bool = key(False, "Set by the door: this run is a rehearsal on nano.")
    command: str = key("", "Set by the door: the command that was typed.")
    run_dir: str = key("", "Where everything of the run lies; empty: outputs/[rehearsal/]RECIPE.", path=True)
    resume: str = key("", "auto: go on from the newest whole checkpoint in run_dir; or a checkpoint's path.", path=True)
    overwrite: bool = key(False, "Replace another run that lies in run_dir.")
    rehearse: bool | None = key(None, "true or false by hand; null: where there is no accelerator.")

    device: str = key("auto", "auto: the GPUs when there are any.", choices=DEVICES)
    nproc: int = key(0, "Processes on this machine; 0: one a GPU, one on a CPU.", unit="processes", low=0, high=256)
    nnodes: int = key(1, "Machines that train together.", unit="machines", low=1, high=1000)
    master: str = key("", "IP:PORT of machine 0, with nnodes > 1.")
    rank: int = key(0, "Number of this machine, from 0.", low=0, high=999)
    seed: int = key(42, "Order of the data, initialisation, dropout.", low=0, high=LAST_SEED)

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    trainable: list[str] = key(
        factory=lambda: ["projector", "language"], doc="Parts that train when lora.rank is 0.", choices=PARTS
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    epochs: float | None = key(
        1.0, "Passes over the data; null: max_steps alone decides.", unit="epochs", low=0.001, high=1000
    )
    max_steps: int | None = key(
        None,
        "The run ends after that many, or with its epochs. Typed alone, either sets the other aside.",
        unit="optimizer steps",
        low=1,
        high=1_000_000,
    )
    packs_per_step: int = key(
        8, "Batch size over all processes, which must divide it.", unit="packs", low=1, high=65536
    )
    precision: str = key("bf16", "Frozen weights and, on a GPU, compute.", choices=PRECISIONS)
    tf32: bool = key(False, TF32_DOC)
    deterministic: bool = key(
        False, "On a GPU: add gradients up in a fixed order, so that a run repeats bit for bit; slower."
    )
    recompute: int = key(
        1, "Forget activations and compute them again: 0 none, n every n-th layer.", unit="layers", low=0, high=1000
    )
    save_steps: int = key(
        200,
        "A checkpoint every so often, and at the end; 0: only at the end.",
        unit="optimizer steps",
        low=0,
        high=MANY,
    )
    on_nonfinite: str = key(
        "stop",
        "When a loss or gradient is not a finite number: end the run, or leave the step out (20 in a row end it). "
        "nonfinite.jsonl names the rows.",
        choices=("stop", "skip"),
    )
    save_minutes: float | None = key(
        None, "A checkpoint every so often by the clock as well.", unit="minutes", low=0.01, high=MANY
    )
    max_minutes: float | None = key(
        None,
        "Save and stop in time to end before the process has run so long, as under a job's time limit; exit code 75.",
        unit="minutes",
        low=0.01,
        high=MANY,
    )
    keep_checkpoints: int = key(2, "Older ones are removed.", unit="checkpoints", low=1, high=MANY)
    log: list[str] = key(
        factory=lambda: ["wandb"],
        doc="Where the numbers go beside metrics.jsonl, which is always written; []: nowhere.",
        choices=("wandb", "visualdl"),
    )
    log_steps: int = key(1, "The numbers are written every so often.", unit="optimizer steps", low=1, high=MANY)
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(kw_only=True)
class ExportConfig:
    """Merged weights: `bash launch.sh export run=FOLDER key=value ...`."""

    run: str = key("", "Folder of a run, of one of its checkpoints, or of an adapter (PEFT's too).", path=True)
    model: str = key("", "Instead of run: a model to write in another layout or dtype; its folder or name.", path=True)
    out: str = key(
        "",
        "Folder to write; empty: export/, adapter_peft/ or adapter_paddle/ in the run; of a checkpoint export-step-N/.",
        path=True,
    )
    layout: str = key(
        "hf",
        "hf: the official one, [out, in], for vLLM, SGLang and Transformers; paddle: PaddleMIX's, [in, out].",
        choices=("hf", "paddle"),
    )
    adapter: str = key(
        "",
        "Instead of merged weights the adapter alone; peft: for PEFT; paddle: for PaddleNLP and PaddleMIX.",
        choices=("", "peft", "paddle"),
    )
    base: str = key("", BASE_DOC, path=True)
    checkpoint: str = key("", CHECKPOINT_DOC)
    check: str = key("sizes", CHECK_DOC, choices=("sizes", "full"))
    dtype: str = key("base", "Stored type: the base model's, or another.", choices=("base", "bf16", "fp16", "fp32"))
    overwrite: bool = key(False, "Replace what lies in `out`.")
    device: str = key("auto", "Where the export is verified.", choices=DEVICES)


@dataclass(kw_only=True)
class InferConfig:
    """One answer: `bash launch.sh infer model=FOLDER image=FILE prompt=TEXT key=value ...`."""

    model: str = key("", MODEL_DOC, path=True)
    base: str = key("", BASE_DOC, path=True)
    checkpoint: str = key("", CHECKPOINT_DOC)
    check: str = key("sizes", CHECK_DOC, choices=("sizes", "full"))
    image: list[str] = key(factory=list, doc="An image, a file or an address; image=A image=B for several.", path=True)
    prompt: str = key("", "The question; <image> marks where images stand, else they come first.")
    messages: str = key("", "JSON file with a list of messages, instead of prompt.", path=True)
    draw: str = key(
        "", "FILE.png to draw the answer's boxes into, of several images FILE-1.png, FILE-2.png ...", path=True
    )
    chunk: int = key(
        0, "Prefill in pieces of that size, which saves memory; 0: at once.", unit="tokens", low=0, high=LONGEST_TEXT
    )
    temperature: float = key(0.0, "0: greedy.", low=0, high=100)
    top_p: float = key(1.0, "Sample from the likeliest tokens that add up to this.", low=0.001, high=1)
    max_new_tokens: int = key(MAX_NEW_TOKENS, "Longest answer.", unit="tokens", low=1, high=LONGEST_TEXT)
    precision: str = key("auto", "auto: as the weights are stored.", choices=("auto", *PRECISIONS))
    frozen: str = key("auto", FROZEN_DOC, choices=("auto", *FROZEN))
    tf32: bool = key(False, TF32_DOC)
    json: bool = key(False, "Print one JSON object: ids, text, timing.")
    seed: int = key(42, "Seed of the sampling.", low=0, high=LAST_SEED)
    device: str = key("auto", "auto: the GPU when there is one.", choices=DEVICES)


@dataclass(kw_only=True)
class DoctorConfig:
    """What a machine is fit for: `bash launch.sh doctor key=value ...`.

    Looks at driver, cards, Paddle, memory, disk and hub; lets several GPUs sum numbers; tries the operations of a
    training step; trains and answers on nano, on the GPU in bf16 (fp16 where it has none; on a machine without one, on
    the CPU) against float32 on the CPU. Prints a line for each and writes all of it to one file, for a bug report. It
    ends with

      0  all is well
      2  wrong arguments
      3  the driver: missing, failing, or too old for every build of Paddle
      4  Paddle: a CPU build beside a GPU, a GPU build without one, two builds, or a build that the driver does not run
      5  a card that other processes have filled
      6  an operation fails or is wrong, or training or answers differ from float32 by more than they do in emulation
    """

    out: str = key("doctor.txt", "File to write.", path=True)
    device: str = key("auto", "auto: the GPU when there is one.", choices=DEVICES)


@dataclass(kw_only=True)
class RunsConfig:
    """The runs that lie here: `bash launch.sh runs [FOLDER ...] key=value ...`; without a folder those in outputs/.

    A line for each: running (its lock is held), stopped, finished, diverged, failed or killed; steps, losses, the best
    checkpoint, accuracy before and after, how long ago it wrote, and its size.
    """

    diff: OneOrMore = key(
        factory=list,
        doc="[A,B], the folders of two runs: which settings differ between them, and what came of each.",
        path=True,
        one_or_more=True,
    )
    json: bool = key(False, "Print one JSON object.")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Loss and scores: `bash launch.sh eval model=FOLDER data.path=FILE key=value ...`."""

    model: str = key("", MODEL_DOC, path=True)
    base: str = key("", BASE_DOC, path=True)
    checkpoint: str = key("", CHECKPOINT_DOC)
    check: str = key("sizes", CHECK_DOC, choices=("sizes", "full"))
    against: str = key("", "Another model, to answer the same questions after the first; both are compared.", path=True)
    against_checkpoint: str = key("", "Of `against` as checkpoint is of `model`: best against last of one run, say.")
    against_base: str = key("", "Base model of `against`, as base is of `model`.", path=True)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    out: str = key("predictions.jsonl", "File to write the answers to.", path=True)
    report: str = key(
        "", "FILE.html to write: pictures, questions, answers and scores to look through; empty: none.", path=True
    )
    metrics: list[str] = key(factory=lambda: ["exact_match"], doc=METRICS_DOC, choices=METRICS)
    limit: int | None = key(None, "Take only the first rows.", unit="rows", low=1, high=MANY)
    max_new_tokens: int = key(MAX_NEW_TOKENS, "Longest answer.", unit="tokens", low=1, high=LONGEST_TEXT)
    precision: str = key("auto", "auto: as the weights are stored.", choices=("auto", *PRECISIONS))
    frozen: str = key("auto", FROZEN_DOC, choices=("auto", *FROZEN))
    tf32: bool = key(False, TF32_DOC)
    device: str = key("auto", "auto: the GPU when there is one.", choices=DEVICES)
