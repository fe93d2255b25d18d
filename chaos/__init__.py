"""The kill matrix: a run of the real product while a seeded schedule kills, freezes, cuts, fills and truncates.

    python -m chaos --seed 7

`schedule` draws the faults, `faults` injects them into the `test_bed`, `observer` detects when the run has recovered,
`accounting` counts what was lost or trained twice. The product is started as users start it, by `headrace up`.
"""
