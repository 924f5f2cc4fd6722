"""Experiments that reproduce what the sources of the methods claim: ``python -m agents.experiments NAME``."""
