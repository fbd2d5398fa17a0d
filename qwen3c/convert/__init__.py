"""Hugging Face directories, GGUF files and LoRA adapters -> model.bin. Inference needs none of this."""
