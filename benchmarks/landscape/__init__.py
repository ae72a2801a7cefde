"""Does the river-valley picture of looped training hold? A study, and its table."""
