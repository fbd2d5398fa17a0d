"""The ground: files, terminals, what this computer is, and what people mistake for a model."""
