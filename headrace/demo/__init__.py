"""The demos, as data of the package: the recipe tiny-cpu.yaml, the policy that it starts from (policy/), and the
policies of the tasks of several turns (guessing-policy/, calculator-policy/).

A recipe anywhere names them `headrace/demo/policy` and so on; `headrace up` without a recipe runs tiny-cpu.yaml.
"""
