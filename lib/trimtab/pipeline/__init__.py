"""Notebooks as pipeline stages: run one, record it, report on all. Nothing outside this package knows of notebooks."""
