"""Tuning records shipped with adaptconv, one JSON file a device; see README.md beside this file."""
