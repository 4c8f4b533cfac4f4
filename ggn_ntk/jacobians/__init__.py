"""Factored Jacobians of one evaluation, layer by layer."""
