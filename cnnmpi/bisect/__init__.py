"""Where two runs part that should agree: by ledgers (again.py), by their images (data.py), by fingerprints."""
