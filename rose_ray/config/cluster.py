"""Where the job runs: the YAML's `ray`."""

from __future__ import annotations

from pydantic import Field, field_validator

from rose_ray.config.strict import Strict


class RayConfig(Strict):
    """Where the job runs."""

    address: str = Field(
        "auto", description="local (start one here), auto (join the cluster that this machine is in), or host:port."
    )
    actors: int = Field(1, ge=1, description="Scoring actors.")
    cpus_per_actor: float = Field(
        1.0, gt=0, description="CPUs reserved for each; fractions leave room for the readers."
    )
    gpus_per_actor: float = Field(0.0, ge=0, description="GPUs reserved for each; 0 computes on the CPU.")
    ranks_per_actor: int = Field(
        1,
        ge=1,
        description="Ranks that share the model of one actor, partitioned over their devices: for a model larger than "
        "one. Each gets what is reserved for an actor; needs model.deepspeed.zero_stage: 3.",
    )
    threads_per_actor: int = Field(1, ge=1, description="Torch threads in each; fixed, since it decides the last bits.")
    cpus_per_task: float = Field(0.25, gt=0, description="CPUs reserved for a task that reads or tokenises.")
    autoscale_seconds: float = Field(
        0.0,
        ge=0,
        description="On a cluster that grows: ask its autoscaler for what the job needs and wait so long for it. 0 "
        "takes the cluster as it is and refuses at once what does not fit.",
    )
    stall_seconds: int = Field(3600, ge=60, description="Give up when no shard ends for so long.")

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_gpus(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError(f"{value} GPUs: Ray shares one GPU among actors, or gives an actor whole ones")
        return value
