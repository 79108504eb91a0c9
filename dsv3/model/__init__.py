"""The model, equations 1-25 of the report. Knows one device; no process group, no trainer, no server."""
