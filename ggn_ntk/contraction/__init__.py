"""Einsums of factored Jacobians, and what they cost."""
