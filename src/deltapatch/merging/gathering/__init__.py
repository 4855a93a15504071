"""What is found out about a model from a few images before it is merged, or after."""
