"""The kill matrix: a run of the real product while a seeded schedule kills, freezes, cuts, fills and truncates.

    python -m chaos --seed 7

`schedule` says what happens, `faults` does it, `test_bed` is what it is done to, `observer` sees when the run works
again, `accounting` counts what was lost or trained twice. The product runs as its users run it: by `headrace up`.
"""
