"""From what people have to a model.bin: Hugging Face directories, GGUF files, LoRA adapters. Inference needs none of it."""
