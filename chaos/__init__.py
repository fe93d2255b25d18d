"""The kill matrix: a real run under a seeded schedule of faults (kill, freeze, cut, stall, fill, truncate).

    python -m chaos --seed 7

`schedule` draws the faults, `faults` injects them into the `test_bed`, `observer` detects when the run has recovered,
`accounting` counts what was lost or trained twice. The run is started as users start it, by `headrace up`.
"""
