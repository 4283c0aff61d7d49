"""`cordee.Trainer`: a run in this very process, step by step, for notebooks and scripts."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from torch import nn

from cordee.config.load import override
from cordee.config.run import Run
from cordee.data.loader import MapDataset
from cordee.dist.ipc import Assignment
from cordee.dist.process_group import join_process_group, read_launch_info
from cordee.errors import ConfigError
from cordee.launcher.prepare import acquire_run_lock, inspect_run_dir, prepare_run
from cordee.model.arithmetic import COMPATIBLE, portable_sqrt
from cordee.parallel.parallelize import LossFunction
from cordee.training.resume import SurvivorState
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts
from cordee.training.worker import broadcast_config, distribute_data, go_on


class LocalTrainer(Trainer):
    """A Trainer of this process (of every process, under torchrun), from a configuration.

    It goes on where the run in run.dir stands. `train_step` makes one step and records it; what is
    due between steps (evaluate.every, checkpoint.every, the stop after many dropped steps) is done
    by `fit`, or by your own calls of `evaluate` and `save_checkpoint`. `finish` writes the run's
    last event. `close`, or the end of a `with` block, gives the folder and the group back.
    """

    def __init__(
        self, config: Run, *, model: nn.Module | None = None, loss: LossFunction | None = None,
        data: MapDataset | None = None, held_out: MapDataset | None = None,
    ) -> None:  # fmt: skip
        """Parts are those of `cordee.train`. ConfigError: the configuration asks for several
        processes outside a launcher, or the run is finished."""
        parts = Parts(model=model, loss=loss, data=data, held_out=held_out)
        parts.check(config)
        prepared_run = prepare_run(_of_one_process(config), parts.info)
        run, plan, launch_info = prepared_run.run, prepared_run.plan, prepared_run.launch_info
        if prepared_run.status.end_event is not None:
            raise ConfigError(
                "the run in this folder is finished",
                values={"run.dir": run.run.dir},
                fix=f"run.dir=... for another run, or cordee.load_model({run.run.dir!r})",
            )
        with ExitStack() as resources:
            if launch_info.rank == 0:
                resources.enter_context(acquire_run_lock(run))
                inspect_run_dir(run, parts.model_name)
            process = resources.enter_context(
                join_process_group(
                    launch_info, plan.device, plan.threads, run.launch.timeout_s,
                    force_group=run.memory.offload != "none",
                )
            )  # fmt: skip
            resources.enter_context(portable_sqrt(run.run.arithmetic == COMPATIBLE))
            if launch_info.size > 1:
                run, plan = broadcast_config(run, plan)
            dataset = distribute_data(run, parts, launch_info)
            super().__init__(run, plan, process, dataset, parts)
            resources.callback(lambda: self.logger.close())
            assignment = Assignment(
                rank=launch_info.rank, size=launch_info.size, local_rank=launch_info.local_rank,
                drill=run.fault.kill_specs[0],
            )  # fmt: skip
            go_on(self, assignment, SurvivorState(), launch_info)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Ends it: records are written out, the group is left, the run's folder is free again."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def _of_one_process(config: Run) -> Run:
    """The configuration without ranks that this process would have to start; ConfigError when it
    asks for them."""
    if read_launch_info().has_launcher:
        return config
    if config.launch.processes not in ("auto", 1):
        raise ConfigError(
            "cordee.Trainer is one process; it starts no others",
            values={"launch.processes": config.launch.processes},
            fix="cordee.train(config), or torchrun --nproc-per-node N script.py",
        )
    return override(config, {"launch.processes": 1})
