"""Plan a training for a time limit (``train.time``): steps, validations, batch and image size."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from retinanet.config import Recipe
from retinanet.errors import ConfigError
from retinanet.training.optim import short_warmup
from retinanet.training.settings_from_data import FEW_STEPS, P2_COST, can_halve

MIN_STEPS = 20
"""A training with fewer steps is meaningless."""

ENOUGH_STEPS = 400
"""With fewer steps, smaller images are considered; `quick` trains no less."""

VALIDATION_SHARE = 0.1
"""Share of the time for validations, at most; there is always one, of the last weights."""

MIN_VAL_IMAGES = 4
"""Images that a validation has at least, however long it takes."""

REPORT_IMAGES = 6
"""Validation images in which the report draws detections."""

_MARGIN = 0.03  # of the limit, for the error of the estimates
_REPORT_SECONDS = 6.0  # for the report that the command writes afterwards
_MAX_VALIDATIONS = 8
_TUNING_VALIDATIONS = 2  # as long as train.tune_detection takes, the search of NMS included
_MANY_EPOCHS = 72  # above that, larger images
_MIN_SIDE = 256
_MEASURED_STEPS = 5  # at least, for a new plan
_SIDE_STEP = 1.25  # between two image sizes that are considered


class Pace(NamedTuple):
    """Speed of a network on this machine.

    Attributes:
        step: seconds per training step.
        validation: seconds per validation.
    """

    step: float
    validation: float

    def at(self, factor: float) -> Pace:
        """Estimate the pace with image sides longer by a factor."""
        return Pace(self.step * factor**2, self.validation * factor**2)


class Plan(NamedTuple):
    """A training that fits into a time limit.

    Attributes:
        steps: training steps.
        validations: validations, the one after the last step included.
        seconds: estimated duration of both.
        val_share: share of the validation images that a validation has time for.
        validation: estimated seconds of a validation of that share.
        after: estimated seconds of what follows (:func:`seconds_afterwards`).
    """

    steps: int
    validations: int
    seconds: float
    val_share: float = 1.0
    validation: float = 0.0
    after: float = 0.0

    @property
    def period(self) -> int:
        """Steps from a validation to the next."""
        return math.ceil(self.steps / self.validations)


def seconds_to_train(limit: float) -> float:
    """Return the part of a time limit for start-up, training and validation.

    Example:
        >>> seconds_to_train(1000)
        964.0
    """
    return limit - _MARGIN * limit - min(_REPORT_SECONDS, _MARGIN * limit)


def seconds_afterwards(recipe: Recipe, validation: float, num_val: float, num_split: int) -> float:
    """Estimate the seconds of choosing the post-processing and of the report's detections.

    Args:
        recipe: all settings.
        validation: seconds of a validation.
        num_val: its images.
        num_split: images of the whole split, in some of which the report draws detections.
    """
    is_tuned = recipe.train.tune_detection and recipe.data.tile is None
    seconds = _TUNING_VALIDATIONS * validation if is_tuned else 0.0
    drawn = min(REPORT_IMAGES, num_split)
    return seconds + (validation / num_val * drawn if num_val else 0.0)


def plan_steps(
    seconds: float,
    pace: Pace,
    min_share: float = 1.0,
    afterwards: Callable[[float, float], float] = lambda validation, share: 0.0,
) -> Plan:
    """Return as many steps and validations as `seconds` allow.

    Where a validation takes longer than all may, it has a share of its images, `min_share` at
    least. `afterwards` computes the seconds to leave, from those of a validation and its share.

    Example: 1000 s at 2 s a step, and validations of 20 s: five take a tenth.

        >>> plan_steps(1000, Pace(step=2.0, validation=20.0))[:3]
        (450, 5, 1000.0)
    """
    affordable = VALIDATION_SHARE * seconds / pace.validation if pace.validation else math.inf
    share = min(1.0, max(affordable, min_share))
    validations = max(1, int(min(affordable, _MAX_VALIDATIONS)))
    validation = share * pace.validation
    after = afterwards(validation, share)
    left = seconds - after - validations * validation
    steps = max(0, int(left / pace.step))
    total = steps * pace.step + validations * validation
    return Plan(steps, validations, total, share, validation, after)


def plan_training(
    recipe: Recipe,
    pace: Pace,
    elapsed: float,
    *,
    num_images: int,
    max_side: int,
    num_val: int = 0,
    num_split: int = 0,
    enough_images: int = 0,
    min_side: int = 0,
    batch_multiple: int = 1,
    on_gpu: bool = False,
) -> tuple[dict[str, Any], Plan]:
    """Choose the length of a training for a limit and, with ``auto``, its batch and image size.

    With less than 400 steps the batch is halved, which keeps the number of images seen, and then
    images become smaller. With less than `enough_images` P2 is left out, and then images become
    smaller. With more than 72 epochs they become larger. On a CPU the batch is halved where less
    than 1,500 steps are left. Where a single validation takes over a tenth of the time, it has
    fewer images. What the recipe states is kept, and so is the size of tiles. The time of a step is
    taken as proportional to batch and pixels.

    Args:
        recipe: all settings.
        pace: of a step and a validation with them.
        elapsed: seconds of the limit that are over.
        num_images: images of an epoch.
        max_side: image size from which larger images are not worth their time.
        num_val: images of a validation.
        num_split: images of the whole split, in some of which the report draws detections.
        enough_images: to train on in all, repetitions included.
        min_side: image size from which objects are large enough without P2.
        batch_multiple: of the batch size.
        on_gpu: whether to train on a GPU.

    Raises:
        ConfigError: the limit is too short.
    """
    limit = recipe.train.time
    assert limit is not None
    seconds = seconds_to_train(limit) - elapsed
    batch, side, p2 = recipe.train.batch_size, recipe.data.image_size, recipe.model.p2
    fixed_batch = not recipe.auto or recipe.states("train.batch_size")
    fixed_side = not recipe.auto or recipe.data.tile is not None
    fixed_side |= any(map(recipe.states, ("data.image_size", "data.max_size")))
    fit = _planner(recipe, seconds, num_val, num_split)
    plan = fit(pace)
    while plan.steps < ENOUGH_STEPS:
        smaller = next_side(side, 1 / _SIDE_STEP)
        if not fixed_batch and can_halve(batch, batch_multiple):
            batch, pace = batch // 2, Pace(pace.step / 2, pace.validation)
        elif not fixed_side and smaller >= _MIN_SIDE:
            side, pace = smaller, pace.at(smaller / side)
        else:
            break
        plan = fit(pace)
    fixed_p2 = not recipe.auto or any(map(recipe.states, ("model.p2", "anchors.sizes")))
    while plan.steps * batch < enough_images:
        smaller = next_side(side, 1 / _SIDE_STEP)
        if p2 and not fixed_p2 and side >= min_side:
            p2, pace = False, Pace(pace.step / P2_COST, pace.validation / P2_COST)
        elif not p2 and not fixed_side and min_side <= smaller < side:
            side, pace = smaller, pace.at(smaller / side)
        else:
            break
        plan = fit(pace)
    while not fixed_side and plan.steps * batch > _MANY_EPOCHS * num_images:
        larger = next_side(side, _SIDE_STEP)
        slower = pace.at(larger / side)
        if larger > max_side or fit(slower).steps < ENOUGH_STEPS:
            break
        side, pace, plan = larger, slower, fit(slower)
    small_batch = not (on_gpu or fixed_batch)
    while small_batch and plan.steps < FEW_STEPS and can_halve(batch, batch_multiple):
        batch, pace = batch // 2, Pace(pace.step / 2, pace.validation)
        plan = fit(pace)
    _check_long_enough(plan, pace, limit, elapsed)
    chosen = {"train.batch_size": batch, "data.image_size": side, "model.p2": p2}
    return _changes(recipe, plan, chosen, num_val), plan


def _planner(
    recipe: Recipe, seconds: float, num_val: int, num_split: int
) -> Callable[[Pace], Plan]:
    """Return :func:`plan_steps` for a training, as a function of its pace."""
    fewer_val = num_val > MIN_VAL_IMAGES and not recipe.states("train.val_images")
    min_share = MIN_VAL_IMAGES / num_val if fewer_val else 1.0

    def afterwards(validation: float, share: float) -> float:
        return seconds_afterwards(recipe, validation, share * num_val, num_split)

    return lambda pace: plan_steps(seconds, pace, min_share, afterwards)


def _changes(recipe: Recipe, plan: Plan, chosen: Mapping[str, Any], num_val: int) -> dict[str, Any]:
    """Return the settings of a plan, and those of `chosen` that are not the recipe's."""
    changes: dict[str, Any] = {"train.steps": plan.steps, "train.epochs": None}
    if not recipe.states("train.validate_every"):
        changes["train.validate_every"] = float(plan.period)
    if not recipe.states("train.warmup_steps"):
        changes["train.warmup_steps"] = short_warmup(recipe.train, plan.steps)
    if (val_images := math.ceil(plan.val_share * num_val)) < num_val:
        changes["train.val_images"] = val_images
    return changes | {name: value for name, value in chosen.items() if value != recipe.value(name)}


def _check_long_enough(plan: Plan, pace: Pace, limit: float, elapsed: float) -> None:
    if plan.steps < MIN_STEPS:
        needed = elapsed + MIN_STEPS * pace.step + plan.validation + plan.after
        least = math.ceil(needed / (1 - 2 * _MARGIN))
        raise ConfigError(
            f"train.time {limit:g} s is too short: {MIN_STEPS} steps of {pace.step:.2g} s and a "
            f"validation of {plan.validation:.0f} s take {needed:.0f} s with the start and the "
            f"report; give at least {least}s"
        )


def next_side(side: int, factor: float) -> int:
    """Return the multiple of 32 nearest to a factor of an image size."""
    return max(1, round(side * factor / 32)) * 32


def replan(step: int, seconds: float, pace: Pace, period: int) -> int:
    """Return the number of steps in all with which a training under way ends in time.

    Example: half of 450 steps are done, and now each takes 4 s, with 500 s left. Two validations
    of 20 s, after step 270 and the last, leave 460 s.

        >>> replan(225, 500.0, Pace(step=4.0, validation=20.0), period=90)
        340
    """

    def needed(steps: int) -> float:
        validations = num_validations(step, steps, period)
        return (steps - step) * pace.step + validations * pace.validation

    most = step + max(0, int(seconds / pace.step))
    return step + bisect_right(range(step + 1, most + 1), seconds, key=needed)


def num_validations(step: int, steps: int, period: int) -> int:
    """Return the number of validations after `step` (:func:`is_due`)."""
    if steps <= step:
        return 0
    return max(0, (2 * steps - period) // (2 * period) - step // period) + 1


def is_due(step: int, steps: int, period: int) -> bool:
    """Whether to validate after `step`: each `period` steps, and after the last step.

    Not within half a period of the last step, whose number changes (:func:`replan`).
    """
    return step == steps or (step % period == 0 and 2 * (steps - step) >= period)


class Pacer:
    """Adapt the number of steps of a training under way, so that it ends in time."""

    def __init__(
        self,
        deadline: float,
        period: int,
        validation: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deadline, self._period, self._validation = deadline, period, validation
        self._clock = clock
        self._step, self._started = -1, 0.0

    def is_validation_due(self, step: int, steps: int) -> bool:
        """Whether to validate after `step` of `steps`."""
        return is_due(step, steps, self._period)

    def add_validation(self, seconds: float) -> None:
        """Note how long a validation took."""
        self._validation = seconds
        self._started += seconds

    def is_replan_due(self, step: int, steps: int) -> bool:
        """Whether enough steps have been measured, by their number alone."""
        if self._step < 0:  # the first step is slower
            self._step, self._started = step, self._clock()
        return step - self._step >= max(_MEASURED_STEPS, steps // 20)

    def replan(self, step: int) -> int:
        """Return the number of steps in all at the speed since the last call."""
        now = self._clock()
        pace = Pace((now - self._started) / (step - self._step), self._validation)
        self._step, self._started = step, now
        return replan(step, self._deadline - now, pace, self._period)
