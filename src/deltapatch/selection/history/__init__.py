"""What is known of models on other targets, published and own, and what to expect from it."""
