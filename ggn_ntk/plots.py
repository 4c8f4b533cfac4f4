"""Pictures of kernels, spectra and training. Matplotlib is imported when one is drawn.

Each function draws into ``ax``, or the current axes if it is ``None``, and returns it.
"""
