"""A job whose right answer is known: generated pool, pairs and base model."""
