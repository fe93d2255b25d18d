"""The files that `headrace init` writes: a recipe and a task module. docs/tasks.md quotes both, held by a test."""
