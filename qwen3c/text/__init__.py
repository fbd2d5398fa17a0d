"""Text <-> tokens: the tokenizer, chat templates in their sandbox, messages and replies."""
