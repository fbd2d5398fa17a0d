"""Models by name: from the Hugging Face Hub to a model.bin in the cache."""
