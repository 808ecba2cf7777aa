"""Measurements: `python -m eval <command>`. Each leaves `<out>/<command>.json` and PNG pictures, and prints a table."""
