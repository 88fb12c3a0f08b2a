"""The steps at which a run logs, evaluates, saves and ends."""

import dataclasses
import math

from ml_collections import ConfigDict

from rezero_jax.config import LARGEST, LENGTHS
from rezero_jax.errors import UserError, check_between

RANGES = {
    "train.steps_per_dispatch": (1, 10_000),  # all batches of a dispatch are in memory
    "train.until_loss": (0, math.inf),
    "log.every_steps": (1, LARGEST),
    "checkpoint.every_steps": (1, LARGEST),
    "checkpoint.keep": (1, LARGEST),
    "checkpoint.keep_every_steps": (1, LARGEST),
    "checkpoint.keep_best": (0, LARGEST),
}


@dataclasses.dataclass(frozen=True)
class Intervals:
    """The steps at which a run logs, evaluates, saves and ends.

    "After step t" means that t updates are applied. An event with a period of p examples, such as
    the end of an epoch, occurs after each step that completes a multiple of p.
    """

    size: int  # training examples in an epoch
    batch_size: int  # examples in a step
    total: int  # steps in the run
    per_dispatch: int  # most steps in one dispatch
    log_every: int  # steps
    save_every: int  # steps
    eval_every: int | None  # examples; None evaluates only at the end

    @classmethod
    def from_config(cls, config: ConfigDict, size: int) -> "Intervals":
        """The intervals of a config for `size` training examples.

        Raises a UserError if a length is missing, set twice or not positive.
        """
        batch_size = config.train.batch_size
        total = in_examples(config, "train", size, batch_size)
        if total is None:
            raise UserError("the run has no length; set train.steps, .epochs or .examples")
        for key, (low, high) in RANGES.items():
            section, field = key.split(".")
            check_between(low, config[section][field], high, key)
        if total > LARGEST * batch_size:
            raise UserError(f"the run has more than {LARGEST} updates; shorten it")
        return cls(
            size=size,
            batch_size=batch_size,
            total=-(-total // batch_size),
            per_dispatch=config.train.steps_per_dispatch,
            log_every=config.log.every_steps,
            save_every=config.checkpoint.every_steps,
            eval_every=in_examples(config, "eval", size, batch_size),
        )

    def next_stop(self, now: int) -> int:
        """The last step of the dispatch after step `now`; no event occurs before that step."""
        size = self.batch_size
        periods = (self.log_every * size, self.save_every * size, self.size, self.eval_every)
        stops = [-(-(now * size // p + 1) * p // size) for p in periods if p is not None]
        return min(now + self.per_dispatch, self.total, *stops)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with this step."""
        return self._completes(self.size, step)

    def is_eval(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        every = self.eval_every
        return step == self.total or (every is not None and self._completes(every, step))

    def is_save(self, step: int) -> bool:
        """Whether there is a checkpoint after this step."""
        return step == self.total or step % self.save_every == 0

    def is_log(self, step: int) -> bool:
        """Whether this step has a line in metrics.jsonl."""
        return step % self.log_every == 0 or self.ends_epoch(step) or self.is_eval(step)

    def _completes(self, period: int, step: int) -> bool:
        return step * self.batch_size // period > (step - 1) * self.batch_size // period


def in_examples(config: ConfigDict, section: str, size: int, batch_size: int) -> int | None:
    """The length in examples that a section of the config sets in steps, epochs or examples.

    "train" sets the length of the run, "eval" the interval of evaluations. Raises a UserError if
    two lengths are set, or the length is not positive.
    """
    examples_in = dict(zip(LENGTHS[section], (batch_size, size, 1), strict=True))
    given = {field: config[section][field] for field in examples_in}
    given = {field: value for field, value in given.items() if value is not None}
    if not given:
        return None
    names = [f"{section}.{field}" for field in given]
    if len(given) > 1:
        raise UserError(f"{' and '.join(names)} are both set; set one of them to None")
    ((field, value),) = given.items()
    if value <= 0:
        raise UserError(f"{names[0]}={value} is not positive; give a length above 0")
    return math.ceil(round(value * examples_in[field], 6))
