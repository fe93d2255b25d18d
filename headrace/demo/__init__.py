"""The demo, as data of the package: its recipe (tiny-cpu.yaml) and the policy that it starts from (policy/).

A recipe anywhere names that policy `headrace/demo/policy`; `headrace up` without a recipe runs this one.
"""
