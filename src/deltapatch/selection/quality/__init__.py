"""How good features and filters are in themselves, whatever they are used for."""
