"""Data folders in MMEB's layout: tables, training rows, a user's pairs."""
