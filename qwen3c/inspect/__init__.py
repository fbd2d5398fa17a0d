"""Looking into a model and measuring it: info, traces, perplexity, speed."""
