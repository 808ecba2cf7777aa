"""Runs that are killed, disks that fill up, files that lie."""
