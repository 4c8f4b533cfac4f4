"""What is asked: the arguments of a call, checked, and the form of its result.

Internal: it may change at any time. What is public is named in :mod:`ggn_ntk` and its public modules.
"""
