"""Networks expanded in their parameters."""
