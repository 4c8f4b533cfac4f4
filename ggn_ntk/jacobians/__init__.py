"""Factored Jacobians of one evaluation, layer by layer.

Internal: it may change at any time. What is public is named in :mod:`ggn_ntk` and its public modules.
"""
