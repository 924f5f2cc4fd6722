"""Many runs with Ray, on this machine or on many: ``python -m agents.sweep``."""
