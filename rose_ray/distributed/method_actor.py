"""Methods that need the model: the same scoring actors, holding what a method is given of them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from rose_ray.distributed.actors import ModelHolder, ScoringSpec
from rose_ray.distributed.roll import Enrolment
from rose_ray.distributed.session import carried_errors
from rose_ray.distributed.tokens import cached_tokeniser
from rose_ray.failpoints import die_at
from rose_ray.methods.interface import Arrays, MethodModel
from rose_ray.methods.shards import MethodRun, make_state, read_state, score_shard
from rose_ray.stages.halving import counted_halvings
from rose_ray.stores.manifest import Manifest


class MethodActor(ModelHolder):
    """Prepares a method, or scores shards with it."""

    def __init__(self, spec: ScoringSpec, pool: Manifest, run: MethodRun) -> None:
        super().__init__(spec)
        self.pool, self.run = pool, run
        self.enrolment = Enrolment(spec.roll)
        if self.enrolment.refusal is None:
            die_at("actor_start")

    @functools.cached_property
    def method_model(self) -> MethodModel:
        """What the method is given."""
        spec = self.spec
        checkpoints = tuple(self.checkpoints)
        tokeniser = cached_tokeniser(spec.model)
        return MethodModel(lambda: self.model, spec.device, tokeniser, checkpoints, spec.max_batch_tokens)

    @functools.cached_property
    def state(self) -> Arrays:
        """What the method has prepared; read from storage, so that an actor that starts again finds it."""
        return read_state(self.spec.workspace, self.run)

    def prepare(self) -> Manifest:
        """Let the method prepare, and commit its state."""
        self.enrolment.check()
        return make_state(self.spec.workspace, self.pool, self.run, self.method_model)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score the shards of a Ray Data batch and return one line about each."""
        with carried_errors():
            self.enrolment.check()
            lines = [
                self._score(str(shard), list(skipped))
                for shard, skipped in zip(batch["shard"], batch["skipped"], strict=True)
            ]
        return {key: [line[key] for line in lines] for key in lines[0]}

    def _score(self, shard: str, skipped: list[str]) -> dict[str, Any]:
        workspace = self.spec.workspace
        with counted_halvings() as halvings:
            receipt = score_shard(workspace, self.pool, shard, skipped, self.run, self.state, self.method_model)
        self.enrolment.finished()
        return {"shard": shard, "rows": receipt.counts["rows"], "num_halvings": halvings.number}
