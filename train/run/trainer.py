"""The training loop: paddlenlp's Trainer over a plan, with a loop of our own.

From Trainer come its arguments, callbacks, state and distributed set-up. The loop is ours because the loss is a sum
over supervised tokens divided by the step's number of them, every pack and dropout mask is a function of (plan, step),
and gradients are summed over ranks by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.optimizer.lr import LambdaDecay
from paddlenlp.trainer import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from paddlenlp.trainer.trainer_utils import TrainOutput
from paddlenlp.utils.batch_sampler import DistributedBatchSampler

from data.packs import PackDataset
from data.plan import Plan
from train.config.schema import TrainConfig
from train.machine.disk import is_full
from train.run.barrier import barrier
from train.run.by_source import Sources
from train.run.clock import Deadline, SaveSchedule
from train.run.finite import FiniteCheck
from train.run.gradients import (
    ReachCheck,
    any_rank,
    clip_gradients,
    fill_zeros,
    gradient_norm,
    has_overflow,
    sum_over_ranks,
)
from train.run.micro_batch import PackLoss, gather_losses, train_pack
from train.run.optim import build_optimizer, by_group, loss_scale, lr_factor
from train.run.pack_loader import Pack, PackLoader
from train.run.shard.group import make_shard_group
from train.run.shard.layers import SharedLayers
from train.run.shard.optimizer import ShardedOptimizer
from train.run.state import History, load_optimizer, load_trained, trainable_parameters, trained_folder
from train.run.stop import StopRequest
from train.run.validation import Validation
from train.run.watch.meter import StepMeter
from train.run.watch.step_metrics import StepMetrics
from train.store.names import TRAINER_STATE_FILE
from vl2.errors import UserError


class VL2Trainer(Trainer):
    """Trains the trainable parameters of a model on the packs of a plan.

    A TrainerCallback gets Trainer's events and may ask for a save or a stop, on any rank. on_epoch_begin and
    on_epoch_end are those of the data, on_evaluate those of the validation.

    Args:
        model: a DeepseekVL2 or a VL2LoRAModel with trainable parameters in float32.
        config: of the run.
        plan: packs of every step.
        dataset: PackDataset of the plan, laid out for this number of ranks.
        stop: asked at the end of each step.
        on_step: called after each optimizer step, on every rank. When it finds the disk full, the step is saved and
            the run ends.
        deadline: asked at the end of each step as well.
        save: saves the step just made; called on every rank. What it has not written yet when it comes back, it holds
            in a copy.
        history: losses and totals of the steps before, when resuming.
        sources: of a mixture, whose losses are logged one by one; None: there is only one source.
        validation: of the run, at the steps that are due; None: there is none on the way.
        shared: the layers whose gradients or weights are divided among the processes; None: there are none.
        callbacks: of the user.
    """

    control: TrainerControl  # what the callbacks have asked for

    def __init__(
        self,
        model: paddle.nn.Layer,
        *,
        config: TrainConfig,
        plan: Plan,
        dataset: PackDataset,
        stop: StopRequest,
        deadline: Deadline,
        on_step: Callable[[StepMetrics], None],
        save: Callable[[VL2Trainer], None],
        history: History | None = None,
        sources: Sources | None = None,
        validation: Validation | None = None,
        shared: SharedLayers | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        super().__init__(model=model, args=_arguments(config, plan), train_dataset=dataset, callbacks=list(callbacks))
        self.pop_callback(PrinterCallback)
        self.config, self.plan, self.stop, self.deadline = config, plan, stop, deadline
        self.schedule = SaveSchedule(config, plan.num_steps)
        self.on_step, self.save = on_step, save
        self.history = history or History()
        self.sources, self.validation = sources, validation
        self.parameters, self.shared = trainable_parameters(model), shared
        self.whole = {name: p for name, p in self.parameters.items() if not (shared and name in shared.names)}
        self.reach = ReachCheck(list(self.parameters))
        self.scaler: paddle.amp.GradScaler | None = self.scaler if self.do_grad_scaling else None
        self.finite = FiniteCheck(config, dataset)
        self.groups = by_group(self.parameters)
        own = config.optim.groups
        lr_scales = {group: own[group].lr_scale if group in own else 1.0 for group in self.groups}
        self.meter = StepMeter(model, plan, lr_scales=lr_scales)
        self.loader: PackLoader | None = None
        self.is_whole = False  # weights, moments and counts are those of the same step

    # ---- the loop

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:
        """Make the steps that are left.

        Args:
            resume_from_checkpoint: folder of a checkpoint to go on from.

        Raises:
            UserError: a pack that cannot be read, a full disk.
            FloatingPointError: a loss or gradient that is not finite.
            RuntimeError: a trainable weight that no gradient reaches.
        """
        self.is_in_train = True
        self.create_optimizer_and_scheduler(self.plan.num_steps)
        self._start(Path(resume_from_checkpoint) if resume_from_checkpoint else None)
        first_step = self.state.global_step
        self.finite.begin(first_step)
        self.is_whole = True
        loader = self.get_train_dataloader()
        loader.batch_sampler.set_epoch(0, consumed_samples=first_step * self.plan.packs_per_step)
        events = self.callback_handler
        events.model, events.train_dataloader = self.model, loader
        events.optimizer, events.lr_scheduler = self.optimizer, self.lr_scheduler
        self._fire("on_train_begin")
        if first_step and self._validate():  # of a step that was saved when a signal had ended its validation
            self.save(self)
        self._optimizer_steps(iter(loader))
        self.is_in_train = False
        self._fire("on_train_end")
        known = [loss for loss in self.history.losses[first_step:] if loss is not None]
        mean_loss = float(np.mean(known or [math.nan]))
        return TrainOutput(self.state.global_step, mean_loss, {"train_loss": mean_loss})

    def _optimizer_steps(self, packs: Iterator[Pack]) -> None:
        """One turn of the loop is one optimizer step, from fetching its packs to saving it."""
        state, plan, fire, parameters = self.state, self.plan, self._fire, self.parameters
        divided = self.shared.names if self.shared else set()
        first_step, num_packs = state.global_step, self.args.gradient_accumulation_steps
        while state.global_step < plan.num_steps and not self.control.should_training_stop:
            step = state.global_step
            self.meter.begin()
            if step == first_step or self._ends_epoch(step - 1):
                fire("on_epoch_begin")
            fire("on_step_begin")
            done: list[PackLoss] = []  # of this rank's packs, whose gradients add up
            while len(done) < num_packs:
                inputs = self.meter.fetch(packs)
                fire("on_load_data_end", inputs=inputs)
                done.append(self.training_step(self.model, inputs))  # forward and backward
                if len(done) < num_packs:
                    fire("on_substep_end")
            num_sources = len(self.sources.names) if self.sources else 0
            losses, of_ranks = gather_losses(done, num_sources, self.meter.of_rank())

            reached = {name for name, p in self.whole.items() if p.grad is not None}
            reached |= self.shared.end_step() if self.shared else set()
            self.reach.update(reached, has_images=any(pack.has_images for pack in done))
            fill_zeros(self.whole)
            sum_over_ranks(self.whole)

            fire("on_optimizer_begin", scaler=self.scaler)
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            norm, norm_of = gradient_norm(parameters, self.groups, divided)
            overflow = None if self.scaler is None else not math.isfinite(norm) and has_overflow(parameters)
            left_out = self.finite.leaves_out(step, losses, norm, overflow)
            if not left_out:
                clip_gradients(parameters, norm, self.config.optim.max_grad_norm)
            lr, self.is_whole = self.optimizer.get_lr(), False
            if self.scaler is not None:
                self.scaler.step(self.optimizer)  # does nothing after an overflow,
                self.scaler.update()  # for which this lowers the scale
            elif not left_out:
                self.optimizer.step()
            self.optimizer.clear_grad(set_to_zero=False)  # None, not zeros, so that an unreached weight can be told
            fire("on_optimizer_end", scaler=self.scaler)

            self._count_step()
            self.lr_scheduler.step(state.global_step)  # by number, so that what is left out does not delay the schedule
            learned = self.sources if not left_out else None
            by_source = learned.means(plan.step(step), losses[:, 3:].sum(axis=0)) if learned else None
            norms = None if left_out else (norm, norm_of)
            metrics = self.meter.metrics(step, losses, of_ranks, by_source=by_source, lr=lr, norms=norms)
            self.history.add(metrics.loss, metrics.tokens, metrics.seconds)
            self.is_whole = True
            fire("on_step_end")
            full_disk = self._log(metrics)
            new_best = self._validate()
            if self._ends_epoch(step):
                fire("on_epoch_end")
            save = self.control.should_save or self.schedule.is_due(state.global_step) or new_best
            if state.global_step < plan.num_steps and self.deadline.ends_turn():
                self.stop.time_is_up()
            stop = self.stop.code != 0 or self.control.should_training_stop
            save, stop, full = any_rank(save, stop, full_disk is not None)
            if save or stop or full:
                self.save(self)
                self.schedule.saved()
                fire("on_save")
            if full:
                raise self._full_disk_error(full_disk)
            self.control.should_training_stop = stop

    # ---- parts of a step

    def training_step(self, model: paddle.nn.Layer, inputs: Pack) -> PackLoss:  # type: ignore[override]
        """Forward and backward of one pack."""
        model.train()
        return train_pack(
            model,
            self.train_dataset.complete(inputs, model.seen),
            plan=self.plan,
            step=self.state.global_step,
            seed=self.config.seed,
            aux_weight=self.config.optim.aux_loss,
            loss_scale=loss_scale(self.scaler),
            sources=self.sources,
            shared=self.shared,
        )

    def _count_step(self) -> None:
        state, epoch = self.state, self.plan.epoch(self.state.global_step)
        state.global_step += 1
        state.consumed_samples = state.global_step * self.plan.packs_per_step
        length = self.plan.steps_per_epoch[epoch]
        state.epoch = epoch + (state.global_step - sum(self.plan.steps_per_epoch[:epoch])) / length

    def _ends_epoch(self, step: int) -> bool:
        return step + 1 == self.plan.num_steps or self.plan.epoch(step) != self.plan.epoch(step + 1)

    def _log(self, metrics: StepMetrics) -> OSError | None:
        """Report a step. A full disk is returned, not raised, so that all ranks come together to save the step."""
        try:
            self.on_step(metrics)
            if self.control.should_log or metrics.step % self.config.log_steps == 0:
                self.log(metrics.to_json())  # fires on_log
        except OSError as problem:
            if not is_full(problem):
                raise
            return problem
        return None

    def _validate(self) -> bool:
        """Ask the held-out rows, where the step is due for it; whether it is the best so far. Collective."""
        if self.validation is None:
            return False
        found = self.validation.during(self.state.global_step, self.stop)
        if found is not None:
            self._fire("on_evaluate", metrics=found.to_json())
        self.control.should_training_stop |= self.validation.is_over
        return found is not None and self.validation.is_best(self.state.global_step)

    def _full_disk_error(self, problem: OSError | None) -> UserError:
        where = f"{problem.filename}: " if problem and problem.filename else ""
        return UserError(
            f"{where}the disk is full, so the log of step {self.state.global_step} could not be written; the step was "
            "saved. Free some space; the same command with resume=auto goes on"
        )

    def _fire(self, event: str, **details: object) -> None:
        """Hand an event to the callbacks, and keep what they ask for."""
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, **details)

    # ---- before the first step

    def _start(self, checkpoint: Path | None) -> None:
        """Weights, optimizer and counts as a checkpoint has them, or as they are for a first step."""
        self.state = TrainerState()
        if checkpoint is not None:
            # Before `_wrap_model`, which gives rank 0's weights to all.
            load_trained(self.model, trained_folder(checkpoint, self.model))
        self._wrap_model(self.model)
        if checkpoint is not None:
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE))
            step, scaler = load_optimizer(checkpoint, self.optimizer, self.parameters)
            self.lr_scheduler.step(step)
            if self.scaler is not None and scaler:
                self.scaler.load_state_dict({**scaler, "scale": np.array(scaler["scale"], dtype="float32")})
        self.state.max_steps, self.state.num_train_epochs = self.plan.num_steps, len(self.plan.steps_per_epoch)
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()

    def get_train_dataloader(self) -> PackLoader:
        """One pack a micro-batch, kept on the host: the model needs lengths and labels there.

        Position p of the dataset is rank p mod ranks'; this sampler can begin at any step, building no pack before it.
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

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
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

        group = make_shard_group(self.config)
        moves = self.shared is not None and self.shared.moves_weights
        stay = {self.parameters[name].name for name in self.shared.names} if self.shared and moves else set()
        self.lr_scheduler = LambdaDecay(optim.lr, factor)
        self.optimizer = build_optimizer(
            self.parameters,
            self.lr_scheduler,
            weight_decay=optim.weight_decay,
            beta1=optim.beta1,
            beta2=optim.beta2,
            eps=optim.eps,
            groups=optim.groups,
            plus_scale=self.config.lora.plus_scale,
            share=lambda optimizer: ShardedOptimizer(optimizer, group, stay) if group else optimizer,
        )

    def _wrap_model(self, model: paddle.nn.Layer, training: bool = True) -> paddle.nn.Layer:
        """The model itself, with rank 0's trainable weights on all ranks, which loaded the same base.

        Trainer's own, the one private member overridden, would wrap it in a DataParallel, whose reducer wants a
        gradient from every rank and whose broadcast has no bfloat16 kernel on CPU.
        """
        if dist.get_world_size() > 1:
            barrier()  # one rank may have read its weights 30 seconds before another, and gloo waits no longer
            for name, parameter in self.parameters.items():
                if not (self.shared and self.shared.moves_weights and name in self.shared.names):
                    dist.broadcast(parameter, src=0)
        return model

    def close(self) -> None:
        """End what `train` started, also when it ended with an error."""
        if self.loader is not None:
            self.loader.close()


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
    )
