"""Configuration: every setting of a run, typed, documented and checked before anything starts.

`ActorConfig` holds the algorithm's settings, `RunConfig` those of the whole run. `load_recipe` reads a run's settings
from YAML, with the source of every value. Only a service's `__main__` reads configuration; every other module is given
its section.
"""

from headrace.common.config.actor import ActorConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.config.generation import EngineConfig, GenerationConfig
from headrace.common.config.learner import LearnerConfig, OptimizerConfig
from headrace.common.config.model import ModelConfig, SamplingConfig, TaskConfig
from headrace.common.config.recipe import ConfigError, Recipe, load_recipe, resolve
from headrace.common.config.run import ControlConfig, EvaluationConfig, RunConfig

__all__ = [
    "ActorConfig",
    "ConfigError",
    "ControlConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "LearnerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "RunConfig",
    "SamplingConfig",
    "TaskConfig",
    "load_recipe",
    "resolve",
]
