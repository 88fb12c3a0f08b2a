"""Nothing that is due is ever stepped over."""

import itertools

from rezero_jax.config import base_config
from rezero_jax.training.intervals import Intervals, in_examples

CASES = [
    Intervals(size, batch, total, group, log, save, evaluate)
    for (size, batch), total, group, log, save, evaluate in itertools.product(
        [(10, 1), (10, 3), (7, 5), (12, 4)],
        [1, 40],
        [1, 3, 100],
        [1, 4, 1000],
        [2, 1000],
        [None, 1, 10, 23],
    )
]


def completes(period, batch, step):
    """Whether update number `step` handles the last example of some multiple of `period`."""
    return any(n % period == 0 for n in range((step - 1) * batch + 1, step * batch + 1))


def test_every_step_where_something_is_due_is_a_stop_and_dispatches_are_as_long_as_may_be():
    """From any step, where a run may resume."""
    for times in CASES:
        due = []
        for step in range(1, times.total + 1):
            epoch = completes(times.size, times.batch_size, step)
            at_end = step == times.total
            evaluation = at_end or (
                times.eval_every is not None and completes(times.eval_every, times.batch_size, step)
            )
            save = at_end or step % times.save_every == 0
            log = epoch or evaluation or step % times.log_every == 0
            found = (times.ends_epoch(step), times.is_eval(step), times.is_save(step))
            assert (*found, times.is_log(step)) == (epoch, evaluation, save, log), (times, step)
            if log or save:
                due.append(step)
        for now in range(times.total):
            most = min(now + times.per_dispatch, times.total)
            expected = min([step for step in due if step > now] + [most])
            assert times.next_stop(now) == expected, (times, now)


def config_with(**fields):
    config = base_config()
    config.train.batch_size = 8
    for key, value in fields.items():
        section, field = key.split("__")
        config[section][field] = value
    return config


def test_lengths_in_examples():
    for fields, examples in (
        ({}, None),
        ({"train__steps": 7}, 7 * 8),
        ({"train__epochs": 3.0}, 3 * 30),
        ({"train__epochs": 0.5}, 15),
        ({"train__epochs": 0.1}, 3),  # 0.1 * 30 is a little more than 3
        ({"train__epochs": 0.31}, 10),  # 9.3: the example begun is finished
        ({"train__examples": 11}, 11),
    ):
        assert in_examples(config_with(**fields), "train", size=30, batch_size=8) == examples


def test_a_run_takes_whole_steps_and_evaluation_has_its_own_unit():
    for field, value, total in (("steps", 7, 7), ("epochs", 2.0, 8), ("examples", 9, 2)):
        times = Intervals.from_config(config_with(**{f"train__{field}": value}), size=30)
        assert (times.total, times.eval_every) == (total, None)
    config = config_with(train__steps=3, eval__every_epochs=0.5)
    assert Intervals.from_config(config, size=30).eval_every == 15
