"""transformers' Trainer with the objective's loss, learning rates by parameter, skipped steps, and complete checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmtune.data.batching.batch_sampler import MixtureBatchSampler
from mmtune.data.batching.sample_stream import SampleStream
from mmtune.data.data_report import NO_SAMPLE, NOT_FINITE, DataReport, SkippedStep
from mmtune.data.message import RowError
from mmtune.data.processes import prepare_worker, worker_failure
from mmtune.data.torch_private import end_workers
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.distributed.sharded_parameters import full_state_dict
from mmtune.methods.tuners.peft_private import adapter_keys_as_stored
from mmtune.models.checkpoints.remote_code import reject_unsafe_pickles
from mmtune.models.checkpoints.trained_weights import INITIAL_FACTORS
from mmtune.models.compute import in_eval_mode
from mmtune.models.packed_attention import attention_by_sample
from mmtune.objectives.sft import SupervisedTuning
from mmtune.run_directory import SAVING, RunDirectory
from mmtune.training.adapter_state import (
    MethodStep,
    load_adapter_state,
    load_full_model,
    save_adapter_state,
    shared_method_loss,
)
from mmtune.training.cached_features.feature_cache import FeatureCache
from mmtune.training.checkpoint import finalize_checkpoint, hash_files
from mmtune.training.held_out.held_out_loss import HeldOutLoss
from mmtune.training.loss_record import LossRecord
from mmtune.training.throughput.progress import TrainingProgress
from mmtune.training.trainer_private import HookedTrainer
from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.files import fsync_tree, report_disk_errors
from mmtune.utils.manifest import check_manifest


def _listing(rows: Sequence[str]) -> str:
    return ", ".join(rows[:20]) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")


EMPTY_STEPS = 10
"""A run stops that has trained on no sample in its first steps."""


class EpochLoader(DataLoader[Any]):
    """A data loader that passes the number of the epoch on to its batch sampler, as the Trainer expects of loaders."""

    batch_sampler: MixtureBatchSampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.batch_sampler.set_epoch(epoch)


class TuningTrainer(HookedTrainer):
    """Trains on batches of `Collator`.

    Args:
        objective: model inputs of a batch, loss, and denominator of a step.
        data_report: counts rows that fail while training.
        max_bad_fraction: stop when more than this fraction of the rows failed.
        max_nonfinite_steps: skip this many steps whose gradients are not finite, and stop at the next.
        dist: the distributed context; every process counts the rows that failed in any.
        learning_rates: by parameter name, for parameters with another rate than the run's own.
        rate_names: by such a rate, its name in the log, `learning_rate/NAME`; a rate without a name has its value there.
        dummy_batch: a batch without supervised tokens. It replaces a batch whose rows were all dropped, so that the number of
            steps does not change. A step of dummy batches only, over all processes, changes nothing.
        batches: the row indices of each batch; None when the training set is a stream of batches.
        source_names: the data sources whose losses are logged separately.
        data_files: signatures of the data files by name, for checkpoints.
        initial: LoRA's matrices before training, if a checkpoint must contain them (`mmtune.tuning.save.initial_factors`).
        held_out: the rows that are evaluated while training.
        held_out_scores: further metrics of these rows, from the model without the wrappers of a distributed run.
        feature_cache: the features of the batches' images, if the recipe keeps them.
        record_batch: gets the first batch of this process and the ids of its rows.
    """

    def __init__(
        self,
        *args: Any,
        objective: SupervisedTuning,
        data_report: DataReport,
        max_bad_fraction: float,
        max_nonfinite_steps: int = 0,
        dist: DistributedContext = SINGLE_PROCESS,
        learning_rates: Mapping[str, float],
        rate_names: Mapping[float, str] | None = None,
        dummy_batch: dict[str, Any],
        batches: MixtureBatchSampler | None = None,
        source_names: Sequence[str] = (),
        data_files: Mapping[str, Any] | None = None,
        initial: dict[str, torch.Tensor] | None = None,
        held_out: HeldOutLoss | None = None,
        held_out_scores: Callable[[nn.Module], dict[str, float]] | None = None,
        feature_cache: FeatureCache | None = None,
        record_batch: Callable[[Mapping[str, Any], Sequence[str]], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, eval_dataset=None if held_out is None else held_out.data, **kwargs)
        self._held_out = held_out
        self._held_out_scores = held_out_scores
        self._feature_cache = feature_cache
        self._record_batch = record_batch
        self.model_accepts_loss_kwargs = True  # the loss below is a sum divided by the global count of supervised tokens
        self._objective = objective
        self._data_report = data_report
        self._max_bad_fraction = max_bad_fraction
        self._max_nonfinite_steps = max_nonfinite_steps
        self._dist = dist
        self._passes = 1  # forward passes of the present step, over all processes
        self._learning_rates = dict(learning_rates)
        self._rate_names = dict(rate_names or {})
        self._group_names: list[str] = []  # of the optimizer's groups
        self._dummy_batch = dummy_batch
        self._step_rows: list[str] = []  # of this process
        self._is_empty = False  # whether the present step has no supervised token in any process
        self._steps_taken = 0
        self._saved_step = 0
        self._loss_before_step = torch.zeros(())
        self.supervised = 0  # tokens that the run has trained on, over all processes
        self._batches = batches
        self._train_loader: DataLoader[Any] | None = None
        self._data_files = dict(data_files or {})
        self._initial = initial
        self._losses = LossRecord(source_names, dist)
        self._progress = TrainingProgress([self.model, *objective.frozen_models], self.args, dist)
        self.add_callback(self._progress)
        self.add_callback(MethodStep(lambda: self._is_empty))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume training from a checkpoint.

        Raises:
            UserError: a data-loader worker was killed or has no shared memory, or the checkpoint to resume from contains code.
        """
        try:
            with reject_unsafe_pickles(f"resume: {kwargs.get('resume_from_checkpoint')}"):
                return super().train(*args, **kwargs)
        except RuntimeError as error:
            if (reason := worker_failure(error)) is None:
                raise
            raise UserError(reason) from error
        finally:
            if self._train_loader is not None:
                end_workers(self._train_loader)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward pass of one batch; in a step without a sample no process runs the model."""
        if self._is_empty:
            return torch.zeros((), device=self.args.device)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's loss, divided by the denominator of the whole optimizer step; without one, by the batch's own."""
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)  # methods are found by class
        sources, features = inputs.pop("source_ids", None), self._features_of(inputs)
        denominator = self._objective.denominator([inputs]) if num_items_in_batch is None else num_items_in_batch
        inputs = self._objective.model_inputs(plain, inputs)
        costs = self._progress.record_costs(inputs)
        with features, shared_method_loss(plain, self._passes), costs, attention_by_sample():
            losses = self._objective.compute_loss(model, inputs, denominator)
        self._losses.add_parts(losses.parts)
        if sources is not None:
            self._losses.add_by_source(*self._objective.losses_by_source(losses, inputs, sources))
        # The processes' gradients are averaged, and the denominator counts the batches of all of them.
        loss = losses.loss if num_items_in_batch is None else losses.loss * self.accelerator.num_processes
        return (loss, losses.outputs) if return_outputs else loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager[None]:
        """Under FSDP2 torch's autocast: accelerate leaves it to FSDP2, which rounds trained weights. Otherwise the Trainer's."""
        context: contextlib.AbstractContextManager[None]
        context = self.accelerator.autocast() if self._dist.fsdp else super().autocast_smart_context_manager(cache_enabled)
        return context

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the held-out rows and log the metrics. The Trainer's own loop averages the means of batches.

        The state of the random number generators, the modes of the modules and the throughput of training do not change.
        """
        assert self._held_out is not None  # the recipe has no evaluation without held-out rows
        device = self.args.device
        generators = [device] if device.type == "cuda" else []
        with self._progress.pause(), torch.random.fork_rng(generators), in_eval_mode(self.model_wrapped):
            metrics = self._held_out.means(self._loader_settings(), self._held_out_sums)
            if self._held_out_scores is not None:
                metrics |= self._held_out_scores(self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False))
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_sums(self, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses of a held-out batch by name, summed over its supervised tokens, and the number of these tokens."""
        plain = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        batch = self.prepare_inputs(batch)
        features = self._features_of(batch)
        tokens = self._objective.denominator([batch])
        inputs = self._objective.model_inputs(plain, batch)
        inputs.pop("labels", None)  # a method may add a term to a loss that the model itself computes
        model = plain if self._dist.zero_stage is None else self.model_wrapped  # DDP would synchronize buffers
        with torch.no_grad(), self.compute_loss_context_manager(), features, attention_by_sample():
            losses = self._objective.compute_loss(model, inputs, 1)
        return self._objective.held_out_losses(losses), tokens

    def _features_of(self, batch: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Take the image features out of a batch; inside the block, the vision tower returns them."""
        features = batch.pop("vision_features", [])
        return contextlib.nullcontext() if self._feature_cache is None else self._feature_cache.features_of(features)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of `TrainingProgress` and the losses of `LossRecord`, to all callbacks and trackers."""
        if "loss" in logs:
            logs.update(self._progress.metrics(self.state))
            logs.update(self._losses.take())
            logs.update(self._further_rates())
        super().log(logs, start_time)

    def _further_rates(self) -> dict[str, float]:
        """The present learning rates of the parameters that do not have the run's own."""
        if not any(self._group_names):
            return {}
        groups = zip(self._group_names, self.optimizer.param_groups, strict=False)  # DeepSpeed may have fewer
        return {f"learning_rate/{name}": float(group["lr"]) for name, group in groups if name}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, its parameter groups split by learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        named = (model or self.model).named_parameters()
        rate_of = {id(parameter): self._learning_rates[name] for name, parameter in named if name in self._learning_rates}
        groups = []
        for group in optimizer.param_groups:
            by_rate: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_rate.setdefault(rate_of.get(id(parameter), group["lr"]), []).append(parameter)
            groups += [{**group, "params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        # The Trainer logs the rate of the first group, which must be the run's own.
        optimizer.param_groups[:] = sorted(groups, key=lambda group: group["lr"] != self.args.learning_rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        self._group_names = ["" if rate == self.args.learning_rate else self._rate_names.get(rate, f"{rate:g}") for rate in rates]
        return optimizer

    def grad_norm(self, model: nn.Module, compute: Callable[[], Any]) -> Any:
        """Norm of the gradients; a step without a sample is skipped, one whose gradients are not finite is skipped or an error.

        Raises:
            CheckFailed: gradients that are not finite, in one step more than `max_nonfinite_steps`.
        """
        if self._is_empty:
            return self._skip_step(model, NO_SAMPLE)
        norm = compute()
        # Every process has the same norm. DeepSpeed has already left out a step that is not finite.
        if norm is None or math.isfinite(float(norm)):
            return norm
        skipped = self._data_report.count_skipped(NOT_FINITE)
        if skipped >= self._max_nonfinite_steps:
            more = f", after {skipped} that were skipped (data.max_nonfinite_steps)" if skipped else ""
            raise CheckFailed(
                f"the gradients of step {self.state.global_step + 1} are not finite{more}; lower the learning rate, or look at "
                f"its rows: {_listing(self._rows_of_step())}"
            )
        return self._skip_step(model, NOT_FINITE)

    def _rows_of_step(self) -> list[str]:
        return list(itertools.chain.from_iterable(self._dist.all_gather_object(self._step_rows)))

    def _skip_step(self, model: nn.Module, reason: str) -> None:
        """Have the present step change no weight, no optimizer state and no logged loss; the learning-rate schedule continues."""
        step, rows = self.state.global_step + 1, self._rows_of_step()
        self._data_report.skipped_steps.append(SkippedStep(step, rows, reason))
        print(f"step {step} is skipped, {reason}; its rows: {_listing(rows)}", flush=True)
        for parameter in model.parameters():
            parameter.grad = None  # optimizers skip it, moments and weight decay included
        if self.accelerator.optimizer_step_was_skipped:  # by DeepSpeed; only then the Trainer does not step the schedule
            self.lr_scheduler.step()
        self.leave_step_out_of_log(self._loss_before_step)
        self._losses.drop_step()

    def save_weights(self, out: str | None, save: Callable[[], None]) -> None:
        """Save the model's weights; under DeepSpeed they are gathered first, which the Trainer does not do for every method."""
        if self._dist.zero_stage is None:
            save()
            return
        with full_state_dict(self.model, self._dist.is_main_process) as state:
            self.write_weights(out, state)

    def checkpoint_parent(self) -> Path:
        """The folder of checkpoints that are not complete yet."""
        return Path(self.args.output_dir) / SAVING

    def save_checkpoint(self, write: Callable[[], None]) -> None:
        """Save a checkpoint, which gets its name when it is complete."""
        if self.state.global_step == self._saved_step:  # after a signal, if the epoch ends with the same step
            return
        checkpoints = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._progress.count_tokens(self.state)
        try:
            with report_disk_errors(checkpoints / name):
                write()
                folder, limit = self.checkpoint_parent() / name, self.args.save_total_limit
                best = self._best_checkpoint()
                if self._held_out is not None and self._dist.is_main_process:
                    # The Trainer has written a path inside `checkpoint_parent`.
                    self.state.best_model_checkpoint = None if best is None else str(best)
                    self.state.save_to_json(folder / TRAINER_STATE_NAME)
                if self._dist.is_main_process and self._dist.zero_stage is None:  # DeepSpeed saves weights of its own
                    save_adapter_state(self.model, folder)
                if self._dist.is_main_process:  # with these a checkpoint of an adapter can be released
                    self.model.generation_config.save_pretrained(folder)
                    if self._initial is not None:
                        save_file(self._initial, folder / INITIAL_FACTORS, metadata={"format": "pt"})
                self._dist.barrier()
                fsync_tree(folder)
                hashed = hash_files(folder, self._dist)
                if self._dist.is_main_process:
                    finalize_checkpoint(folder, checkpoints, self._data_report, self._dist, self._data_files, hashed)
                    RunDirectory(checkpoints.parent).delete_checkpoints(limit, keep=best)
        except UserError:
            shutil.rmtree(self.checkpoint_parent(), ignore_errors=True)  # a full disk has no room for an incomplete checkpoint
            raise
        self._saved_step = self.state.global_step

    def _best_checkpoint(self) -> Path | None:
        """The checkpoint of the best step so far, which is loaded after training; None without `load_best_model_at_end`."""
        step = self.state.best_global_step
        if not (self.args.load_best_model_at_end and step):
            return None
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def load_best_model(self, load: Callable[[], None]) -> None:
        """Load the weights of the best step, unless it is the last one.

        Raises:
            CheckFailed: the checkpoint is damaged.
        """
        best = self._best_checkpoint()
        if best is None or self.state.best_global_step == self.state.global_step:
            return
        self.state.best_model_checkpoint = str(best)
        if self._dist.is_main_process:
            check_manifest(best)
        if self._dist.zero_stage is None:
            self.load_checkpoint(best)
        else:
            load()

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint, and the adapter training state beside them."""
        if not isinstance(self.model, PeftModel):
            load_full_model(self.model, checkpoint)
        elif not load_adapter_state(self.model, checkpoint):
            # The Trainer itself reads it onto the first GPU in every process.
            with adapter_keys_as_stored():
                self.model.load_adapter(str(checkpoint), self.model.active_adapter, is_trainable=True, torch_device="cpu")

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The data loader of this process's batches; accelerate does not divide them further."""
        settings = self._loader_settings() | {"persistent_workers": self.args.dataloader_persistent_workers}
        if isinstance(self.train_dataset, SampleStream):
            self._train_loader = DataLoader(self.train_dataset, batch_size=None, **settings)
        else:
            batches = {"batch_sampler": self._batches, "collate_fn": self.data_collator}
            self._train_loader = EpochLoader(self.train_dataset, **batches, **settings)
        return self._train_loader

    def _loader_settings(self) -> dict[str, Any]:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "multiprocessing_context": self.args.dataloader_multiprocessing_context,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "worker_init_fn": prepare_worker,
            "generator": torch.Generator(),  # not the run's generator, which a resumed run would use once more
        }

    def fetch_batches(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Any]:
        """The next batches of the loader, fewer at the end of the data; in the place of one, an error that stops the run."""
        return list(islice(epoch_iterator, num_batches))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """The batches of the next step, and its denominator.

        Raises:
            UserError: more rows failed than the recipe allows, or the first steps have no sample.
        """
        with self._progress.data_wait():
            batches = self.fetch_batches(epoch_iterator, num_batches)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
        self._passes = len(batches) * self._dist.size
        self._loss_before_step = self.accumulated_loss.clone()
        self._losses.begin_step()
        if self._record_batch is not None and "input_ids" in batches[0]:
            self._record_batch(batches[0], batches[0]["rows"])
            self._record_batch = None
        faults = [fault for batch in batches for fault in batch.pop("faults")]
        self._step_rows = [row for batch in batches for row in batch.pop("rows")]
        self._step_rows += [fault.row for fault in faults if isinstance(fault, RowError) and fault.row not in self._step_rows]
        if self._dist.any_rank(bool(faults), device):
            for fault in itertools.chain.from_iterable(self._dist.all_gather_object(faults)):
                self._data_report.add(fault)
            self._data_report.stop_past(self._max_bad_fraction)
        for batch in batches:
            self._progress.add(batch.pop("sizes"), "pixel_values" in batch)
        usable = [batch or dict(self._dummy_batch) for batch in batches]
        count = self.accelerator.gather(self._objective.denominator(usable).to(device)).sum()
        self.supervised += int(count)
        self._is_empty = not int(count)
        self._steps_taken += 1
        if not self.supervised and self._steps_taken >= EMPTY_STEPS:
            raise UserError(f"no usable training sample in the first {EMPTY_STEPS} steps: {self._data_report.summary()}")
        return usable, count
