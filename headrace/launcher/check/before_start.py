"""The checks of `headrace up` before it starts anything: prompts, reward, and whether the machine is large enough."""

from headrace.common.config import RunConfig
from headrace.common.preflight.recipe import UnavailableHere
from headrace.launcher.check.estimate_inputs import EstimateInputs
from headrace.launcher.check.sections import disk, host, learner, times
from headrace.launcher.check.trial import trial_notes, try_task
from headrace.launcher.estimates.host_memory import shared_memory_problem
from headrace.launcher.estimates.model_size import shape_of


def preflight_notes(config: RunConfig) -> list[str]:
    """Notes on prompts that the run will skip and on sizes that do not suit this machine.

    Raises `ValueError`, or its subclass `UnavailableHere`, if the run cannot work. Memory and time are estimated only
    if the model's size is known.
    """
    try:
        shape = shape_of(config)
    except ValueError:
        shape = None
    if shape is not None and (problem := shared_memory_problem(shape, config)):
        raise UnavailableHere(problem)
    inputs = EstimateInputs(config, try_task(config), shape, [])
    for note_in in (learner, host, disk, times):
        note_in(inputs)
    return [*trial_notes(inputs.found), *inputs.notes]
