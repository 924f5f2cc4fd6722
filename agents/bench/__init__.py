"""What watching, recycling and tracing cost: ``python -m agents.bench overhead|methods|trace|slopes``."""
