"""Experiments that are too long for a chapter: each script writes a small file that a chapter shows."""
