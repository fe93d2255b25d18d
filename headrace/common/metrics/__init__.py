"""The services' Prometheus metrics: a name means the same thing in every service.

The learner, the replicas and control may all be scraped. A metric that two of them export has the same name and labels
in both, besides Prometheus' own, so `max by (run, …)` is correct whichever of them are scraped.
"""
