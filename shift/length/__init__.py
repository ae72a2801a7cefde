"""How right a trained model is by length and number of loops."""
