"""What `headrace up` tries before it starts anything: prompts, reward, and whether the sizes suit this machine."""

from headrace.common.config import RunConfig
from headrace.common.preflight.recipe import NotHere
from headrace.launcher.check.sections import EstimateInputs, disk, host, learner, times
from headrace.launcher.check.trial import notes_of, try_task
from headrace.launcher.estimates.host_memory import shared_memory_problem
from headrace.launcher.estimates.model_size import shape_of


def preflight_notes(config: RunConfig) -> list[str]:
    """For people: what the run will pass over, and what does not suit this machine. Raises `ValueError`, or as that
    `NotHere`, for what would not work. A model whose size is not known here is not measured."""
    try:
        shape = shape_of(config)
    except ValueError:
        shape = None
    if shape is not None and (problem := shared_memory_problem(shape, config)):
        raise NotHere(problem)
    inputs = EstimateInputs(config, try_task(config), shape, [])
    for note_in in (learner, host, disk, times):
        note_in(inputs)
    return [*notes_of(inputs.found, config), *inputs.notes]
