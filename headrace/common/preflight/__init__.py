"""What can be known to be wrong before anything starts, from files and from a task's first prompts."""
