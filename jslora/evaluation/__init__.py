"""What becomes of a model's answers, and of its speed, when its weights are kept another way."""
