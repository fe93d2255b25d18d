"""Checks of what only tasks with `rollout` use: the section `environment`, and the model's chat template.

Every check raises `ValueError` with one line that names the value and what was expected.
"""

from headrace.common.config import RunConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.environments.limits import END_OF_CONTEXT
from headrace.common.models.template_probe import TemplateProbe


def check_environment(config: RunConfig, has_rollout: bool) -> None:
    """Checks what is known without the model."""
    environment, task = config.environment, config.task.name
    if not has_rollout:
        if environment != EnvironmentConfig():
            raise ValueError(
                f"the section environment is for tasks with `rollout`, and task {task!r} has `reward`; expected no "
                "such section"
            )
        return
    longest, micro_batch = environment.max_context_tokens, config.learner.micro_batch_tokens
    if longest is not None and longest > micro_batch:
        raise ValueError(
            f"environment.max_context_tokens {longest} is more than learner.micro_batch_tokens {micro_batch}: such a "
            "conversation could not be trained on"
        )
    starvation_s = config.learner.starvation_deadline_s
    if environment.episode_deadline_s >= starvation_s:
        raise ValueError(
            f"environment.episode_deadline_s {environment.episode_deadline_s:g} is not less than "
            f"learner.starvation_deadline_s {starvation_s:g}: the learner would give up before an episode that hangs"
        )
    room = environment.workers * environment.episodes_per_worker
    if room < config.actor.group_size:
        raise ValueError(
            f"environment.workers {environment.workers} times environment.episodes_per_worker "
            f"{environment.episodes_per_worker} is less than actor.group_size {config.actor.group_size}: a group's "
            "episodes could not run at the same time"
        )


def check_model_context(config: RunConfig, context: int) -> None:
    """`context`: the model's, in tokens."""
    longest, usable = config.environment.max_context_tokens, context - END_OF_CONTEXT
    if longest is not None and longest > usable:
        raise ValueError(
            f"environment.max_context_tokens {longest} is more than {usable}, which the engine can use of the model's "
            f"context of {context}"
        )


def check_template(config: RunConfig, probe: TemplateProbe, has_tools: bool) -> None:
    """`has_tools`: the task's prompts offer tools."""
    reasons = f": {probe.problems[0]}" if probe.problems else ""
    if has_tools and probe.after_tool in ("refused", "not rendered"):
        raise ValueError(
            f"the prompts of task {config.task.name!r} have tools, and the chat template of {config.model.path!r} does "
            f"not render them and their answers{reasons}; expected a model that knows tools, or a model.chat_template"
        )
    if probe.after_user == "refused" and probe.after_tool != "kept":
        raise ValueError(
            f"the chat template of {config.model.path!r} renders no second turn{reasons}; expected another "
            "model.chat_template"
        )
