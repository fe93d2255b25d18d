"""The demos, as data of the package: the recipe tiny-cpu.yaml, the policy that it starts from (policy/), and the policy
of the guessing game (guessing-policy/).

A recipe anywhere names them `headrace/demo/policy` and `headrace/demo/guessing-policy`; `headrace up` without a recipe
runs tiny-cpu.yaml.
"""
