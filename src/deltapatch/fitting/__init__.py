"""Fitting a patch: data and base in, patch and history out."""
