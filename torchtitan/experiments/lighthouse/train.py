"""Train in two stages.

    torchrun --nproc-per-node 2 -m torchtitan.experiments.lighthouse.train --job.config_file FILE

Stage 1 trains with Lighthouse Attention. Stage 2 continues with dense attention and the same
parameters, optimizer state, learning rate schedule and data position. The stage switch removes the
wrapper within the running process. With `lighthouse.stage2_seq_len`, stage 2 trains on pieces of
the same batches. Its last `lighthouse.stage2_full_steps` steps train on whole sequences again.

A restart loads the newest checkpoint and derives the phase from the step. SIGTERM, SIGUSR1, SIGINT
and SIGHUP end the run after the current step, with a checkpoint and exit code 75 (`signals.py`).
Only one run at a time can write to a dump folder (`run_lock.py`).
"""

import atexit
import contextlib
import dataclasses
import os
import sys

import torch
import torch.distributed as dist
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse import apply_lighthouse, selection_metrics
from torchtitan.experiments.lighthouse.checkpoint import stage_switch
from torchtitan.experiments.lighthouse.checkpoint.compatibility import record_of
from torchtitan.experiments.lighthouse.checkpoint.manager import TwoStageCheckpointManager
from torchtitan.experiments.lighthouse.checkpoint.resume import check_checkpointing, check_own_step
from torchtitan.experiments.lighthouse.config.job_config import (
    FULL,
    LIGHTHOUSE,
    PIECES,
    JobConfig,
)
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.config.model_args import model_args
from torchtitan.experiments.lighthouse.context_parallel import (
    context_parallel_of,
    cut_batch,
    shard_batch,
    use_context_parallel,
    use_local_attention,
    use_shared_attention,
)
from torchtitan.experiments.lighthouse.metrics import FULL_LENGTH, SWITCH
from torchtitan.experiments.lighthouse.preflight import check_config, warnings_of
from torchtitan.experiments.lighthouse.runtime import cpu_device, signals
from torchtitan.experiments.lighthouse.runtime.absent_ranks import (
    absent_ranks,
    announce,
    description,
    is_of_communication,
)
from torchtitan.experiments.lighthouse.runtime.console import Phase, quiet_start
from torchtitan.experiments.lighthouse.runtime.errors import TrainingAborted
from torchtitan.experiments.lighthouse.runtime.launcher import (
    check_environment,
    count_of,
    end_with_launcher,
)
from torchtitan.experiments.lighthouse.runtime.nonfinite import FiniteSteps
from torchtitan.experiments.lighthouse.runtime.read_files import reason_of
from torchtitan.experiments.lighthouse.runtime.run_lock import FolderLock
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools import utils
from torchtitan.tools.logging import init_logger, logger
from torchtitan.train import Trainer

from lighthouse.sdpa import fused_backends


class TwoStageTrainer(Trainer):
    """torchtitan's trainer with the stage switch."""

    def __init__(self, job_config: JobConfig):
        self.interruption = signals.Interruption()
        self.folder_lock: FolderLock | None = None
        self._lost_folder = False
        self.exit_code = 0
        self.phase = None
        if cpu_device.device_type() == "cpu":
            cpu_device.use_cpu_device()
        super().__init__(job_config)
        training = job_config.training
        if training.loss_chunk_size:
            (model,) = self.model_parts
            self.loss_fn.attach(model)
        dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
        lighthouse = job_config.lighthouse
        self.cp = context_parallel_of(
            self.parallel_dims.get_optional_mesh("cp"), lighthouse.context_parallel
        )
        sdpa_backend = lighthouse.sdpa_backend
        if self.cp is not None and lighthouse.context_parallel == "ring":
            # cuDNN can fail a stride assertion in the backward pass of ring attention
            # (pytorch #176915).
            sdpa_backend = "flash"
        rotate_method = job_config.parallelism.context_parallel_rotate_method
        for part in self.model_parts:
            if self.cp is not None:
                use_context_parallel(part, self.cp, rotate_method, utils.device_type)
            apply_lighthouse.use_fused_attention(part, dtype, training.seq_len, sdpa_backend)
            apply_lighthouse.save_selections(part)
            if utils.device_type == "cpu":
                cpu_device.sum_gradients_on_gloo(part)
                cpu_device.draw_initial_weights(part)
        if job_config.has_pieces:
            # Each phase has one shape. Compile separate static kernels for each phase.
            torch._dynamo.config.automatic_dynamic_shapes = False
        self._local_backends = fused_backends(dtype, training.seq_len, lighthouse.sdpa_backend)
        dense_flops = self.metrics_processor.num_flops_per_token
        self._flops_per_token = {FULL: dense_flops}
        if lighthouse.stage1_steps != 0:
            saved = apply_lighthouse.flops_saved_per_token(
                self.model_args,
                lighthouse.attention_config(),
                lighthouse.full_attn_layers,
                training.seq_len,
            )
            self._flops_per_token[LIGHTHOUSE] = dense_flops - saved
        if job_config.has_pieces:
            self._flops_per_token[PIECES] = dense_flops - apply_lighthouse.flops_saved_by_pieces(
                self.model_args, training.seq_len, lighthouse.stage2_seq_len
            )
        self._show_progress()
        self._replace_checkpointer()
        self.optimizers = FiniteSteps(self)

    @property
    def train_spec(self) -> TrainSpec:
        return self._train_spec

    @train_spec.setter
    def train_spec(self, spec: TrainSpec) -> None:
        # torchtitan looks up the model by its flavor name.
        args = {self.job_config.model.flavor: model_args(self.job_config)}
        self._train_spec = dataclasses.replace(spec, model_args=args)

    def _show_progress(self) -> None:
        """Pass the steps of each phase and their FLOPs per token to the console."""
        console = self.metrics_processor.console
        if console is None:
            return
        names = {LIGHTHOUSE: "stage 1", PIECES: "stage 2 in pieces", FULL: "stage 2"}
        console.clock.phases = [
            Phase(names[phase], last, self._flops_per_token[phase])
            for phase, last in self.job_config.last_steps().items()
        ]

    def _replace_checkpointer(self) -> None:
        """Replace torchtitan's checkpointer, whose class is fixed in torchtitan's constructor."""
        config = self.job_config
        self.checkpointer.close()
        lighthouse, dims = config.lighthouse, self.parallel_dims
        has_switch = 0 < lighthouse.stage1_steps < config.training.steps
        self.checkpointer = TwoStageCheckpointManager(
            dataloader=self.dataloader,
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self},
            checkpoint_config=config.checkpoint,
            sd_adapter=self.train_spec.state_dict_adapter(
                self.model_args, config.model.hf_assets_path
            ),
            base_folder=config.job.dump_folder,
            switch_step=lighthouse.stage1_steps if has_switch else None,
            record=record_of(config, dims.dp_replicate * dims.dp_shard),
            with_checksums=config.checkpoint.checksums,
            check_step=lambda step: check_own_step(config, dist.get_world_size(), step),
        )

    def batch_generator(self, data_iterable):
        try:
            yield from super().batch_generator(data_iterable)
        except ValueError as error:
            # The data raised this error. Errors in the use of a batch are not raised here.
            raise TrainingAborted(
                f"{error}; {self.checkpointer.last_good()}", of_all_ranks=False
            ) from error

    def post_dataloading_process(self, input_dict, labels):
        # Our data loader returns a dictionary with tokens only.
        inputs = input_dict["input"]
        if self.phase == PIECES:
            seq_len = self.job_config.lighthouse.stage2_seq_len
            return *cut_batch(inputs, labels, seq_len, self.cp), {}, {}
        inputs, labels, extra_kwargs = shard_batch(inputs, labels, self.cp)
        self._last_inputs = inputs
        return inputs, labels, {}, extra_kwargs

    def train_step(self, data_iterator) -> None:
        super().train_step(data_iterator)
        if self.metrics_processor.console is not None:
            self.metrics_processor.console.advance(self.step)
        freq = self.job_config.lighthouse.telemetry_freq
        if freq and self.phase == LIGHTHOUSE and self.step % freq == 0:
            (model,) = self.model_parts
            with self.metrics_processor.stopped_clock():
                with self.train_context(), self.maybe_enable_amp:
                    figures = selection_metrics.measure_layers(model, self._last_inputs)
                self.metrics_processor.logger.log(figures, self.step)

    def forward_backward_step(self, **batch) -> torch.Tensor:
        loss = super().forward_backward_step(**batch)
        self.optimizers.record_loss(loss)
        return loss

    def should_continue_training(self) -> bool:
        # This runs between two steps, after the last step is complete and before the next data.
        if not super().should_continue_training():
            if self.phase is None:
                logger.info(f"Nothing to train: all {self.step} steps of this run are done")
            return False
        if self.folder_lock is not None and self.folder_lock.is_gone():
            self._lost_folder = True
            self.interruption.ask()
        if self.interruption.is_on_any_rank(self.device):
            self._stop()
            return False
        phase = self.job_config.phase_of(self.step + 1)
        if phase != self.phase:
            self._enter_phase(phase)
        return True

    def _stop(self) -> None:
        # Without a phase, this process has run no step that could be lost.
        is_saved = self.phase is None or self.checkpointer.save_now(self.step)
        self.exit_code = signals.EXIT_CODE if is_saved else 1
        kept = "nothing is lost" if is_saved else "without checkpoints its steps are lost"
        if is_saved and self.phase is not None and not self.checkpointer.is_good(self.step):
            kept = f"this state does not count as good, and {self.checkpointer.last_good()}"
        logger.warning(f"Asked to stop: the run ends after step {self.step}; {kept}")
        if self._lost_folder:
            raise TrainingAborted(
                f"job.dump_folder must stay where it is during a run, got "
                f"{self.job_config.job.dump_folder!r} removed or replaced; after step {self.step}: "
                f"{kept}; what was in it before is not",
                of_all_ranks=False,
            )

    def close(self) -> None:
        self.interruption.close()
        super().close()

    @property
    def stage(self) -> int:
        """The stage of the current phase."""
        return 1 if self.phase == LIGHTHOUSE else 2

    def _enter_phase(self, phase: str) -> None:
        config = self.job_config
        former = config.phase_of(self.step) if self.step else phase
        before = stage_switch.state_digests(self) if former != phase else None
        for part in self.model_parts:
            self._use_attention_of(phase, part)
        self.phase = phase
        self.metrics_processor.enter_phase(self.stage, phase, self._flops_per_token[phase])
        kind = "Lighthouse" if phase == LIGHTHOUSE else "dense"
        seq_len = config.training.seq_len
        length = ""
        if config.has_pieces and phase != LIGHTHOUSE:
            seq_len = config.lighthouse.stage2_seq_len if phase == PIECES else seq_len
            length = f", sequences of {seq_len:,} tokens,"
        logger.info(f"Stage {self.stage} ({kind} attention){length} from step {self.step + 1} on")
        if before is not None:
            self._hand_over({"from": former, "to": phase, "seq_len": seq_len}, before)

    def _use_attention_of(self, phase: str, model: torch.nn.Module) -> None:
        if phase == LIGHTHOUSE:
            apply_lighthouse.use_stage_1(
                model, self.job_config.lighthouse, self.model_args.n_layers, self.cp
            )
            return
        apply_lighthouse.use_dense(model)
        use_shared_attention(model)
        if phase == PIECES and self.cp is not None:
            use_local_attention(model, self._local_backends)

    def _hand_over(self, change: dict[str, object], before: dict[str, str]) -> None:
        after = stage_switch.state_digests(self)
        if before != after:
            raise RuntimeError(f"the stage switch changed the state: {before} became {after}")
        record = {
            **change,
            "step": self.step,
            "learning_rate": self.lr_schedulers.schedulers[0].get_last_lr()[0],
            "tokens_seen_per_rank": self.ntokens_seen,
            "data": stage_switch.data_positions(self),
            "before": before,
            "after": after,
        }
        path = stage_switch.write_handover(self.job_config.job.dump_folder, record)
        is_switch = change["from"] == LIGHTHOUSE
        what = "Stage switch" if is_switch else "Full length"
        change_of = "Lighthouse to dense" if is_switch else "pieces to whole sequences"
        logger.info(
            f"{what} after step {self.step}: {change_of}, learning rate "
            f"{record['learning_rate']:.3e}, {self.ntokens_seen:,} tokens per rank, parameters and "
            f"optimizer state unchanged (SHA-256 {after['parameters'][:12]}, "
            f"{after['optimizer'][:12]}), recorded in {path}"
        )
        self.metrics_processor.logger.log({SWITCH if is_switch else FULL_LENGTH: 1}, self.step)
        if is_switch and self.job_config.validation.enable:
            self.validator.validate(self.model_parts, self.step)
        self.metrics_processor.restart_clock()


def main(args: list[str] | None = None) -> None:
    """Entry point. An invalid configuration prints one line on stderr and exits with code 2."""
    end_with_launcher()
    init_logger()
    quiet_start()
    # torchtitan writes the tracebacks of all ranks to this file, and torchrun would repeat them.
    os.environ.pop("TORCHELASTIC_ERROR_FILE", None)
    with contextlib.ExitStack() as stack:
        is_first = True
        try:
            check_environment()
            is_first = os.environ["LOCAL_RANK"] == "0"
            config = load_config(sys.argv[1:] if args is None else args)
            # With torchtitan's fake backend, one process simulates rank 0 of NGPU ranks.
            is_alone = config.comm.mode == "fake_backend"
            world_size = count_of("NGPU" if is_alone else "WORLD_SIZE")
            check_config(config, world_size)
            lock = None
            if os.environ["RANK"] == "0":
                lock = FolderLock("job.dump_folder", config.job.dump_folder)
                stack.enter_context(lock)
                # Another run may have written to the folder in the meantime.
                check_checkpointing(config, world_size, cpu_device.device_type(), is_start=True)
                for warning in warnings_of(config):
                    logger.warning(warning)
        except ValueError as error:
            if is_first:
                print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        exit_code = run(config, lock)
    if exit_code:
        raise SystemExit(exit_code)


def run(config: JobConfig, lock: FolderLock | None) -> int:
    """Train. Returns the exit code."""
    trainer = None
    try:
        trainer = TwoStageTrainer(config)
        trainer.folder_lock = lock
        announce()
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(0, last_step=True)
        else:
            trainer.train()
            if trainer.exit_code:
                logger.info(
                    f"Stopped after step {trainer.step} of {config.training.steps} and saved. The "
                    "same command resumes."
                )
    except (TrainingAborted, OSError, RuntimeError) as error:
        message = _last_words(error, trainer)
        if message is None:
            raise
        if message:
            print(f"error: {message}", file=sys.stderr)
        # A file that could not be written cannot be closed either. From Python 3.13 on, this would
        # print a traceback at exit.
        atexit.register(setattr, sys, "unraisablehook", lambda _: None)
        raise SystemExit(1) from None
    finally:
        if trainer is not None:
            if trainer.exit_code:
                trainer.interruption.ignore_more()
            trainer.close()
    torch.distributed.destroy_process_group()
    return trainer.exit_code


def _last_words(error: Exception, trainer: TwoStageTrainer | None) -> str | None:
    """The message of this rank about an error.

    Returns:
        "" if another rank reports the error; None for a bug in the program.
    """
    rank, step = dist.get_rank() if dist.is_initialized() else 0, getattr(trainer, "step", 0)
    cause = error if isinstance(error, RuntimeError) else error.__cause__
    if dist.is_initialized() and dist.get_world_size() > 1 and is_of_communication(cause):
        absent = absent_ranks(step)
        if absent:
            teller = min(set(range(dist.get_world_size())) - absent.keys())
            return description(absent, step) if rank == teller else ""
    if isinstance(error, TrainingAborted):
        if error.of_all_ranks and rank:
            return ""
        return str(error) if error.of_all_ranks else f"rank {rank}: {error}"
    if isinstance(error, OSError):
        good = "nothing is saved" if trainer is None else trainer.checkpointer.last_good()
        return f"rank {rank}: {reason_of(error)} ({error.filename or 'no file'}); {good}"
    return None


if __name__ == "__main__":
    main()
