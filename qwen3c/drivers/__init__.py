"""Between the engine and who asks it: sampling, replies, sequences that share passes, texts as vectors."""
