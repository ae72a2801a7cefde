"""Who decides how many loops a step runs."""
