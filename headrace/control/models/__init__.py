"""The request and response bodies of control's HTTP API; the OpenAPI document is generated from them.

Times are unix seconds (`_at`) or durations (`_s`), shares are in 0 to 1, and null means that there is no measurement.
"""
