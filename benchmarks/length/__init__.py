"""Does a model that was trained on short samples solve long ones? A study, and its tables."""
