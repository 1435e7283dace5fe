"""Adapters that a server loads by itself: nothing here is imported by the rest of dsv4x, and nothing runs unasked."""
