"""Where two runs part that should agree: by their ledgers (again.py computes what lies between), or by fingerprints."""
