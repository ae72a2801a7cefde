"""One comparison: the same model trained in several ways, and what each needed."""
