"""Checks before anything starts, on files and on a task's first prompts."""
