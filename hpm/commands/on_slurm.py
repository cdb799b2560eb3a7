"""`hpm slurm pretrain | embed`: submit a verb to Slurm, by submitit.

Each task of the job is one process of the verb. Before the time limit, Slurm sends submitit's
signal to all of them; on preemption, SIGTERM, as for `scancel`. They save and stop, and unless the
user has ended the job, it goes back into the queue, where the same command resumes.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpm.commands.cluster_options import (
    SlurmEmbedConfig,
    SlurmOptions,
    SlurmPretrainConfig,
    of_verb,
    pairs,
)
from hpm.commands.embed import run_embed
from hpm.commands.embedding_options import EmbedConfig
from hpm.core.config import PretrainConfig
from hpm.core.durations import seconds
from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.core.plugins import import_named
from hpm.core.signals import Interrupted
from hpm.evals.embeddings import format_to_write
from hpm.pretraining import run_pretraining
from hpm.training.checks import check_pretrain

SIGNAL_BEFORE_END = 120  # seconds to save in
WAIT_FOR_REQUEUE = 30  # seconds; putting a job back into the queue ends all of its processes


def pretrain_on_slurm(config: SlurmPretrainConfig) -> str:
    """Submit a pre-training. Returns what to print. Raises UserError on bad input."""
    own = of_verb(config, PretrainConfig)
    check_pretrain(own)
    return _submit(config, SlurmJob(run_pretraining, own, sys.argv), own.out)


def embed_on_slurm(config: SlurmEmbedConfig) -> str:
    """The same for `hpm embed`."""
    own = of_verb(config, EmbedConfig)
    assert own.out is not None
    format_to_write(Path(own.out))
    return _submit(config, SlurmJob(run_embed, own, sys.argv), own.out)


def _submit(config: SlurmOptions, job: SlurmJob, out: str) -> str:
    submitit = need("submitit", "slurm", "hpm slurm")
    try:
        executor = submitit.AutoExecutor(
            f"{out}.jobs/%j",
            None if config.cluster == "auto" else config.cluster,
            slurm_max_num_timeout=config.max_timeouts,
            local_max_num_timeout=config.max_timeouts,
        )
        executor.update_parameters(
            name="hpm",
            timeout_min=-(-seconds(config.time) // 60),
            nodes=config.nodes,
            tasks_per_node=max(1, config.gpus_per_node),
            gpus_per_node=config.gpus_per_node or None,
            cpus_per_task=config.cpus_per_process,
            slurm_partition=config.partition,
            slurm_signal_delay_s=SIGNAL_BEFORE_END,
            # Since version 22.05, srun does not take the CPUs of a task from sbatch. By default, it
            # waits for the other tasks when one has failed.
            slurm_srun_args=[f"--cpus-per-task={config.cpus_per_process}", "--kill-on-bad-exit=1"],
            slurm_additional_parameters=pairs(config.sbatch),
        )
        submitted = executor.submit(job)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"submitit: {one_line(error)}") from error
    return f"job {submitted.job_id}: {submitted.paths.stdout} and {submitted.paths.stderr.name}"


class SlurmJob:
    """What each task of a job runs. submitit calls `checkpoint`, and submits the result again."""

    def __init__(self, run: Callable[[Any], Any], config: Any, command: list[str]) -> None:
        self.run, self.config, self.command = run, config, command

    def __call__(self) -> None:
        import submitit

        sys.argv = self.command
        import_named(self.command[1:])
        # Not CUDA_VISIBLE_DEVICES: hpm picks the GPU by LOCAL_RANK.
        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)

        number = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        requeue: Any = signal.getsignal(number)

        def receive(number: int, frame: Any) -> None:
            if callable(signal.getsignal(signal.SIGUSR1)):  # a training, which saves first
                signal.raise_signal(signal.SIGUSR1)
            else:
                requeue(number, frame)

        signal.signal(number, receive)
        try:
            self.run(self.config)
        except Interrupted as stopped:
            job = submitit.JobEnvironment()
            if stopped.signal_number != signal.SIGUSR1 and not (
                job.cluster == "slurm" and (job.global_rank > 0 or preempted(job.job_id))
            ):
                raise
            requeue(number, None)  # which ends the first process
            time.sleep(WAIT_FOR_REQUEUE)
            sys.exit(1)

    def checkpoint(self) -> Any:
        """What to submit again: the same, which resumes."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def preempted(job: str) -> bool:
    """Whether Slurm ends a job to make room for another one, and not because the user says so."""
    try:
        told = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    except OSError:
        return False
    return "PreemptTime=" in told.stdout and "PreemptTime=None" not in told.stdout
