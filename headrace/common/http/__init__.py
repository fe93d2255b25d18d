"""The shared parts of the services' HTTP servers: authorisation, limits, errors as problem details."""
