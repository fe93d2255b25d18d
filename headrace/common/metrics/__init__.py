"""What services say of themselves to Prometheus: one name means one thing, whoever says it.

The learner, the replicas and control may all be scraped: what two of them say has the same name and the same labels
beside Prometheus' own, so that `max by (run, …)` over it is right whichever of them are.
"""
