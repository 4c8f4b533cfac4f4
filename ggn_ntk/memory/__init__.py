"""What is held at once.

Internal: it may change at any time. What is public is named in :mod:`ggn_ntk` and its public modules.
"""
