"""``loss_drop`` as a method: see `rose_ray.stages.loss_drop`."""

from __future__ import annotations

import torch

from rose_ray.config.method import Needs
from rose_ray.config.model_methods import LossDropOptions
from rose_ray.methods.answers import chosen_answers
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target
from rose_ray.stages.loss_drop import TargetTraining, loss_drop_scores, train_on_target


class LossDrop(Method[LossDropOptions]):
    """Share of a row's loss that a short training on all chosen answers of the target takes away.

    One training and one column, under the target's name, whatever its subtasks: a training each would cost a pass
    over the pool each. Where subtasks matter, make them targets.
    """

    options_model = LossDropOptions
    columns = "one"
    needs = Needs(pairs=True, adapter=True)

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        """Return the trained adapter by parameter name, float32."""
        assert model is not None
        training = TargetTraining(**self.options.model_dump(), max_batch_tokens=model.max_batch_tokens)
        names = [pair.pair_id for pair in target.pairs]
        adapter = train_on_target(model.scoring, chosen_answers(target, model.tokeniser), names, training)
        return {name: tensor.numpy() for name, tensor in adapter.items()}

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return drops [N, 1]."""
        assert model is not None
        adapter = {name: torch.from_numpy(array) for name, array in state.items()}
        samples = rows.samples(model.tokeniser)
        found = loss_drop_scores(model.scoring, samples, adapter, max_batch_tokens=model.max_batch_tokens)
        return Scored(found.values_NU, found.rejected)
