"""The user's model as a function: evaluated in isolation, its graph, what it must be.

Internal: it may change at any time. What is public is named in :mod:`ggn_ntk` and its public modules.
"""
