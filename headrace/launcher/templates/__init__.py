"""The files that `headrace init` writes, a folder for each kind of task: `task` has one whose completions are rewarded,
`environment` one of several turns. docs/tasks.md and docs/environments.md quote them, held by a test."""
