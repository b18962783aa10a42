"""The training loop: paddlenlp's Trainer over a plan, with its known faults overridden.

What differs: the loss is a sum over supervised tokens divided by the step's number of them; every pack and dropout
mask is a function of (plan, step); gradients are summed over ranks by hand; checkpoints and logs are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
from paddlenlp.trainer import PrinterCallback, Trainer, TrainingArguments
from paddlenlp.utils.batch_sampler import DistributedBatchSampler

from data.packs import PackDataset
from data.plan import Plan
from train.config.schema import TrainConfig
from train.run.gradients import ReachCheck, fill_zeros, gather_rows, sum_over_ranks
from train.run.optim import build_optimizer, lr_factor, scale_loss
from train.run.pack_loader import PackLoader
from train.run.state import History, load_optimizer, load_trained, trainable_parameters, trained_folder
from train.run.stop import StopRequest
from vl2.balance import LoadBalance
from vl2.prompt import IGNORE

MAX_SKIPPED_STEPS = 20  # fp16: so many overflows in a row are no longer the loss scale's


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step did, over all ranks."""

    step: int  # optimizer steps made, this one included
    epoch: int  # from 0
    loss: float  # mean per supervised token
    aux_loss: float  # load-balance loss of the experts, mean per conversation, times optim.aux_loss; not in `loss`
    lr: float
    grad_norm: float | None  # before clipping; None in a step that fp16's loss scaler left out
    tokens: int  # of the packs, image tokens included
    supervised: int  # tokens
    tiles: int
    fill: float  # tokens over the budget of the packs that are not empty
    seconds: float
    tokens_per_second: float
    memory_gb: float  # peak so far, of this process (CPU) or its GPU


@dataclass(frozen=True, kw_only=True)
class PackLoss:
    """What one pack added to its step."""

    pack: int  # index in the plan
    loss: paddle.Tensor  # sum over its supervised tokens
    aux_loss: paddle.Tensor | float  # its part of the step's
    has_images: bool  # and something supervised


class VL2Trainer(Trainer):
    """Trains the trainable parameters of a model on the packs of a plan.

    Args:
        model: a DeepseekVL2 or a VL2LoRAModel with trainable parameters in float32.
        config: of the run.
        plan: packs of every step.
        dataset: PackDataset of the plan, laid out for this number of ranks.
        stop: asked at the end of each step.
        on_step: called after each optimizer step, on every rank.
        save: writes a checkpoint; called on every rank, all of which go on together afterwards.
        history: losses and totals of the steps before, when resuming.
    """

    def __init__(
        self,
        model: paddle.nn.Layer,
        *,
        config: TrainConfig,
        plan: Plan,
        dataset: PackDataset,
        stop: StopRequest,
        on_step: Callable[[StepMetrics], None],
        save: Callable[[VL2Trainer], None],
        history: History | None = None,
    ):
        super().__init__(model=model, args=_arguments(config, plan), train_dataset=dataset)
        self.pop_callback(PrinterCallback)
        self.config, self.plan, self.stop = config, plan, stop
        self.on_step, self.save = on_step, save
        self.history = history or History()
        self.parameters = trainable_parameters(model)
        self.reach = ReachCheck(list(self.parameters))
        self.should_stop = False  # as all ranks have agreed
        self._done: list[PackLoss] = []  # of this rank's step
        self._loss = self._aux_loss = 0.0
        self._skipped = 0
        self._logged_step = 0
        self._clock = time.perf_counter()
        self.loader: PackLoader | None = None

    # ---- data

    def get_train_dataloader(self):
        """One pack a micro-batch, kept on the host: the model needs lengths and labels there.

        Position p of the dataset is rank p mod ranks'; with this sampler Trainer skips to any step, building no pack.
        """
        sampler = DistributedBatchSampler(
            self.train_dataset, batch_size=1, num_replicas=dist.get_world_size(), rank=dist.get_rank(), shuffle=False
        )
        self.loader = PackLoader(
            self.train_dataset,
            batch_sampler=sampler,
            num_workers=self.config.data.workers,
            on_worker_killed=self.stop.worker_killed,
        )
        return self.loader

    def close(self) -> None:
        """End what `train` started, also when it ended with an error."""
        if self.loader is not None:
            self.loader.close()

    def _load_rng_state(self, checkpoint):
        """Nothing to load: randomness is a function of (seed, step, pack)."""

    # ---- one micro-batch

    def training_step(self, model, inputs, step_control=0):
        """Forward and backward of one pack; the last one of a step also finishes the gradients."""
        batch = dict(inputs)
        pack, supervised = int(batch.pop("pack")), int(batch.pop("supervised_in_step"))
        paddle.seed(pack_seed(self.config.seed, self.state.global_step, pack))
        self.model.train()
        weight = self.config.optim.aux_loss
        balance = LoadBalance(batch["seq_lens"], batch["labels"] != IGNORE) if weight else None
        loss_sum, count = self.model.loss(batch, balance)
        aux_loss: paddle.Tensor | float = 0.0
        if count:
            # Gradients are summed over micro-batches and ranks, so this is the mean over the step's supervised tokens,
            # and for the load balance over its conversations.
            loss = loss_sum / supervised
            if balance is not None:
                term = balance.total() * (weight / self.plan.samples(self.state.global_step))
                loss, aux_loss = loss + term, term.detach()
            scale_loss(loss, self.scaler if self.do_grad_scaling else None).backward()
        has_images = count > 0 and "tiles" in batch
        self._done.append(PackLoss(pack=pack, loss=loss_sum.detach(), aux_loss=aux_loss, has_images=has_images))
        if len(self._done) == self.args.gradient_accumulation_steps:
            self._finish_gradients()
        return loss_sum.detach()

    def _finish_gradients(self) -> None:
        """Loss of the step, reach check, zeros where nothing arrived, sum over ranks. Collective."""
        asked = float(self.stop.code > 0)
        own = [[done.pack, float(done.loss), float(done.aux_loss), asked] for done in self._done]
        rows = gather_rows(np.array(own, dtype="float64"))
        rows = rows[np.argsort(rows[:, 0])]  # in the plan's order, so that ranks do not change the sum
        has_images = any(done.has_images for done in self._done)
        self._done = []
        for pack, *losses, _ in rows:
            for name, loss in zip(("loss", "load-balance loss"), losses, strict=True):
                if not math.isfinite(loss):
                    raise FloatingPointError(self._not_finite(f"the {name} of pack {int(pack)} is {loss}", int(pack)))
        self._loss = float(rows[:, 1].sum()) / self.plan.supervised(self.state.global_step)
        self._aux_loss = float(rows[:, 2].sum())
        self.should_stop = bool(rows[:, 3].any())
        self.reach.update({name for name, p in self.parameters.items() if p.grad is not None}, has_images)
        fill_zeros(self.parameters)
        sum_over_ranks(self.parameters)

    def _check_loss_valid(self, loss):
        """Done in `_finish_gradients`, which can name the pack."""

    def _not_finite(self, what: str, pack: int | None = None, step: int | None = None) -> str:
        where = ""
        if pack is not None:
            records = [self.train_dataset.records[i] for i in self.plan.packs[pack].samples]
            where = f" ({records[0].source}, row {', '.join(str(record.row) for record in records)})"
        return (
            f"step {step or self.state.global_step + 1}: {what}{where}. Lower optim.lr={self.config.optim.lr}, "
            "lengthen optim.warmup_ratio, or with precision=fp16 take bf16; the checkpoints before this step are good"
        )

    # ---- one step

    def create_optimizer_and_scheduler(self, num_training_steps: int):
        """AdamW over the trainable parameters; the learning rate is a function of the step."""
        optim = self.config.optim

        def factor(step: int) -> float:
            return lr_factor(
                step,
                num_training_steps,
                schedule=optim.schedule,
                warmup_ratio=optim.warmup_ratio,
                min_lr_ratio=optim.min_lr_ratio,
            )

        self.optimizer = build_optimizer(
            self.parameters,
            lr=optim.lr,
            factor=factor,
            weight_decay=optim.weight_decay,
            beta1=optim.beta1,
            beta2=optim.beta2,
            eps=optim.eps,
            max_grad_norm=optim.max_grad_norm,
            vision_lr_scale=optim.vision_lr_scale,
        )
        self.optimizer._grad_clip.describe = self._not_finite
        self.lr_scheduler = self.optimizer._learning_rate

    def _wrap_model(self, model, training=True):
        """No DataParallel: its reducer wants a gradient from every rank, and its broadcast bfloat16 kernels on CPU.

        All ranks load the same base; the trainable weights are rank 0's.
        """
        if dist.get_world_size() > 1:
            for parameter in self.parameters.values():
                dist.broadcast(parameter, src=0)
        return model

    def _maybe_log_save_evaluate(self, tr_loss, model, epoch, ignore_keys_for_eval, **kwargs):
        """After each optimizer step (and once more at the end): report it, save when it is due, stop when asked."""
        step = self.state.global_step
        if step == self._logged_step:
            return
        self._logged_step = step
        self._count_skipped()
        metrics = self._metrics(step)
        self.history.add(metrics.loss, metrics.tokens, metrics.seconds)
        # Trainer leaves the schedule behind when fp16 skips a step; the learning rate belongs to the step number.
        self.lr_scheduler.step(step)
        self.on_step(metrics)
        every = self.config.save_steps
        if self.should_stop or step == self.state.max_steps or (every and step % every == 0):
            self.save(self)
        if self.should_stop:
            self.control.should_training_stop = True
        self._clock = time.perf_counter()

    def _metrics(self, step: int) -> StepMetrics:
        packs, seconds = self.plan.step(step - 1), time.perf_counter() - self._clock
        norm = self.optimizer._grad_clip.norm
        tokens, used = sum(pack.tokens for pack in packs), sum(bool(pack.samples) for pack in packs)
        return StepMetrics(
            step=step,
            epoch=self.plan.epoch(step - 1),
            loss=self._loss,
            aux_loss=self._aux_loss,
            lr=self.config.optim.lr * self.lr_scheduler.lr_lambda(step - 1),
            grad_norm=norm if math.isfinite(norm) else None,
            tokens=tokens,
            supervised=self.plan.supervised(step - 1),
            tiles=sum(pack.tiles for pack in packs),
            fill=tokens / max(used * self.config.data.max_tokens, 1),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            memory_gb=peak_memory_gb(),
        )

    def _count_skipped(self) -> None:
        """fp16: the scaler leaves a step out when a gradient overflows; many in a row are something else."""
        overflow = self.do_grad_scaling and bool(self.scaler._cache_found_inf)
        self._skipped = self._skipped + 1 if overflow else 0
        if self._skipped >= MAX_SKIPPED_STEPS:
            what = f"gradients overflowed in {self._skipped} steps in a row"
            raise FloatingPointError(self._not_finite(what, step=self.state.global_step))

    # ---- resuming

    def _load_from_checkpoint(self, resume_from_checkpoint=None):
        if resume_from_checkpoint:
            load_trained(self.model, trained_folder(Path(resume_from_checkpoint), self.model))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint:
            step, scaler = load_optimizer(Path(checkpoint), self.optimizer, self.parameters)
            self.lr_scheduler.step(step)
            if self.do_grad_scaling and scaler:
                self.scaler.load_state_dict({**scaler, "scale": np.array(scaler["scale"], dtype="float32")})


def pack_seed(seed: int, step: int, pack: int) -> int:
    """Seed of Paddle's generator for one pack: neither ranks nor interruptions change what dropout draws."""
    return int(np.random.SeedSequence([seed, step, pack]).generate_state(1)[0])


def peak_memory_gb() -> float:
    """Most memory this process has held so far, in GB (10^9 bytes): its GPU's, or its resident set on CPU."""
    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 1e9
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _arguments(config: TrainConfig, plan: Plan) -> TrainingArguments:
    ranks = dist.get_world_size()
    on_gpu = paddle.get_device().startswith("gpu")
    return TrainingArguments(
        output_dir=config.run_dir,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.packs_per_step // ranks,
        max_steps=plan.num_steps,
        seed=config.seed,
        device="gpu" if on_gpu else "cpu",
        # Only for its loss scaler: precision is the model's own business, and CPU computes in float32.
        fp16=config.precision == "fp16" and on_gpu,
        logging_strategy="no",
        save_strategy="no",
        evaluation_strategy="no",
        disable_tqdm=True,
        report_to=[],
        release_grads=True,  # None between steps instead of zeros, so that an unreached weight can be told
    )
