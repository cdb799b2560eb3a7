"""`hpm ray pretrain | prepare | embed`: run a verb on the nodes of a Ray cluster.

Ray Train starts the processes of a pre-training, as torchrun does elsewhere, and starts all of them
again when one dies. Ray Data hands out the shards that `hpm prepare` and `hpm embed` consist of.
Each process runs what the verb runs without Ray, in the same folders.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpm.commands.cluster_options import (
    RayEmbedConfig,
    RayOptions,
    RayPrepareConfig,
    RayPretrainConfig,
    of_verb,
)
from hpm.commands.embed import compute_here, open_embedder, run_embed
from hpm.commands.embedding_options import EmbedConfig
from hpm.commands.embedding_shards import Problems, Shards
from hpm.commands.embedding_shards import Shard as Rows
from hpm.commands.options import PrepareConfig
from hpm.commands.prepare import Shard, open_splits, prepare, write_shard
from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.core.plugins import import_named
from hpm.core.signals import Interrupted
from hpm.pretraining import run_pretraining
from hpm.training.checks import check_pretrain
from hpm.weights.run_folder import RunFolder


def pretrain_on_ray(config: RayPretrainConfig) -> str:
    """Pre-train, or resume. Returns what to print. Raises UserError, and Interrupted after
    --stop-after."""
    own = _with_workers(of_verb(config, PretrainConfig), config)
    check_pretrain(own)
    ray = _connect()
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    gpus = _uses_gpus(ray, config.device)
    outcome = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Outcome).remote()
    with tempfile.TemporaryDirectory() as folder:  # of Ray's records; checkpoints are ours
        trainer = TorchTrainer(
            _pretrain_process,
            train_loop_config={"config": own, "place": _here(), "outcome": outcome},
            torch_config=_environment_only(),
            scaling_config=ScalingConfig(
                num_workers=_processes(ray, config, gpus),
                use_gpu=gpus,
                resources_per_worker={"CPU": config.cpus_per_process}
                | ({"GPU": 1} if gpus else {}),
            ),
            run_config=RunConfig(
                storage_path=folder, failure_config=FailureConfig(max_failures=config.max_failures)
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise UserError(
                f"the processes failed {config.max_failures + 1} times (--max-failures "
                f"{config.max_failures}); the last error is above. Run the same command again to "
                "resume"
            ) from error
    problem, stopped_by = ray.get(outcome.told.remote())
    if problem:
        raise UserError(problem)
    if stopped_by:
        raise Interrupted(stopped_by)
    return f"written to {RunFolder(Path(own.out)).backbone}"


def prepare_on_ray(config: RayPrepareConfig) -> str:
    """`hpm prepare`, the shards of which are written by all processes."""
    if config.workers is not None:
        raise UserError("workers: on Ray, pass --processes instead")
    ray = _connect()

    def write(missing: list[Shard], splits: Any, own: PrepareConfig) -> Iterator[Shard]:
        for number, _ in _shared(ray, config, _Preparing, (own, missing), len(missing), gpus=False):
            yield missing[number]

    return prepare(of_verb(config, PrepareConfig), write).summary(config.out)


def embed_on_ray(config: RayEmbedConfig) -> str:
    """`hpm embed`, the shards of which are computed by all processes."""
    ray = _connect()
    own = _with_workers(of_verb(config, EmbedConfig), config)

    def compute(own: EmbedConfig, shards: Shards, missing: list[Rows]) -> Iterator[Problems]:
        given, gpus = (own, shards.about, missing), _uses_gpus(ray, own.device)
        for _, problems in _shared(ray, config, _Embedding, given, len(missing), gpus):
            yield [(index, why) for index, why in problems]

    return run_embed(own, compute=compute).summary()


def _pretrain_process(given: dict[str, Any]) -> None:
    """One process of a pre-training. An error that starting again would not cure is told to the
    driver instead of raised; when one process has failed, so do the others, for lack of it."""
    import ray
    from ray.train.torch import get_device

    _arrive(*given["place"])
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(get_device().index)
    try:
        run_pretraining(given["config"])
    except UserError as error:
        if distributed.reports_error():
            ray.get(given["outcome"].tell.remote(str(error), 0))
    except Interrupted as stopped:
        ray.get(given["outcome"].tell.remote("", stopped.signal_number))
    except Exception:
        if distributed.reports_error():
            raise


class _Outcome:
    """How a pre-training ended, other than well or by an error that Ray knows: (error of the user,
    signal that stopped it)."""

    def __init__(self) -> None:
        self._told = "", 0

    def tell(self, problem: str, stopped_by: int) -> None:
        self._told = problem, stopped_by

    def told(self) -> tuple[str, int]:
        return self._told


class _Preparing:
    """Writes shards of `hpm prepare` in one process."""

    def __init__(self, place: Any, config: PrepareConfig, shards: list[Shard]) -> None:
        _arrive(*place)
        torch.set_num_threads(1)
        self.splits, self.config, self.shards = open_splits(config), config, shards

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            write_shard(self.shards[row["number"]], self.splits, self.config)
        except UserError as error:
            return row | {"problem": str(error)}
        return row


class _Embedding:
    """Computes shards of `hpm embed` in one process."""

    def __init__(
        self, place: Any, config: EmbedConfig, about: dict[str, Any], missing: list[Rows]
    ) -> None:
        _arrive(*place)
        device = distributed.pick_device(config.device)
        embedder, source = open_embedder(config, device, report=lambda line: None)
        assert config.out is not None
        self.shards = Shards(Path(config.out), source, about, config.shard_images)
        self.missing, self.compute = missing, partial(compute_here, embedder, config, self.shards)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            (problems,) = self.compute([self.missing[row["number"]]])
        except UserError as error:
            return row | {"problem": str(error)}
        return row | {"result": [list(map(str, each)) for each in problems]}


def _shared(
    ray: Any, config: RayOptions, work: type, given: tuple[Any, ...], count: int, gpus: bool
) -> Iterator[tuple[int, Any]]:
    """Let processes do the tasks 0 to count - 1, and yield the number and the result of each that
    is done, in any order. Raises UserError as soon as one does."""
    if count == 0:
        return
    import ray.data

    processes = min(_processes(ray, config, gpus), count)
    tasks = ray.data.from_items([{"number": n} for n in range(count)], override_num_blocks=count)
    done = tasks.map(
        work,
        fn_constructor_args=(_here(), *given),
        compute=ray.data.ActorPoolStrategy(size=processes),
        num_cpus=config.cpus_per_process,
        num_gpus=1 if gpus else 0,
    )
    for row in done.iter_rows():
        if problem := row.get("problem"):
            raise UserError(problem)
        yield row["number"], row.get("result")


def _connect() -> Any:
    """Ray, connected to the cluster of RAY_ADDRESS or of this machine, or to one of its own."""
    ray = need("ray", "ray", "hpm ray")
    need("ray.data", "ray", "hpm ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=True, logging_level="warning")
    return ray


def _uses_gpus(ray: Any, device: str) -> bool:
    return device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1


def _processes(ray: Any, config: RayOptions, gpus: bool) -> int:
    """Number of processes: as given, or as many as fit into the cluster."""
    has = ray.cluster_resources()
    fit = has.get("GPU", 0) if gpus else has.get("CPU", 0) // config.cpus_per_process
    return config.processes or max(1, int(fit))


def _with_workers(config: Any, options: RayOptions) -> Any:
    """Let the other CPUs of each process load images, unless --workers is given."""
    if config.workers is not None:
        return config
    return dataclasses.replace(config, workers=options.cpus_per_process - 1)


def _here() -> tuple[str, list[str]]:
    """The working directory and the command of this process."""
    return os.getcwd(), sys.argv


def _arrive(folder: str, command: list[str]) -> None:
    """Do as if this process had been started by the same command in the same folder."""
    os.chdir(folder)
    sys.argv = command
    import_named(command[1:])


def _environment_only() -> Any:
    """Tell each process how to find the others, as torchrun does. hpm then joins them."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Environment(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            address, port = worker_group.execute_single(0, _free_address)
            worker_group.execute(_set_environment, address, port)

    class Config(TorchConfig):
        backend_cls = Environment

    return Config()


def _free_address() -> tuple[str, int]:
    from ray.util import get_node_ip_address

    with socket.socket() as found:
        found.bind(("", 0))
        return get_node_ip_address(), found.getsockname()[1]


def _set_environment(address: str, port: int) -> None:
    from ray.train import get_context

    context = get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
