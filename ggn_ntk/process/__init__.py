"""What all threads of the process share: settings, turns, and torch itself.

Internal: it may change at any time. What is public is named in :mod:`ggn_ntk` and its public modules.
"""
