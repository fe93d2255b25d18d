"""Tests of the repository itself: imports, documents, deployment files."""
