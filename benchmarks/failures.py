"""What to say of a contender that fails."""

#: Bytes of memory that a contender may allocate on a CPU.
MEMORY_LIMIT = 16 * 10**9

OUT_OF_MEMORY = f"out of memory at {MEMORY_LIMIT / 1e9:.0f} GB"

# As torch on a CPU, torch on a GPU, C++ and XLA say it, in lower case.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "resource_exhausted")
_LENGTH = 200


def describe(error: str, limited: bool = True) -> str:
    """Shorten an error message to what matters.

    Args:
        error: The message.
        limited: Whether memory is limited to ``MEMORY_LIMIT``.

    Returns:
        One line.
    """
    if any(sign in error.lower() for sign in _SIGNS):
        return OUT_OF_MEMORY if limited else "out of memory"
    line = " ".join(error.split())
    return line if len(line) <= _LENGTH else f"{line[:_LENGTH]}..."
