"""The one guard against hanging that every test uses: it is no measurement, and no slow machine reaches it."""

GUARD_S = 600.0
