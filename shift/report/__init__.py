"""Documents: what every report is made of. Knows no experiment."""
