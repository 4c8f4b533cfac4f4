"""Inside a user's own BackPACK pass."""
