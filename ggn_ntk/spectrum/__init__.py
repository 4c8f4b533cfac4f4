"""Spectra of kernels, and how alike two are."""
