"""Training: text -> a Hugging Face directory that export.py reads (extra `train`; see train.py).

shapes        presets and custom sizes -> a new model
vocabulary    character and byte-level BPE tokenizers
text          documents -> windows of tokens (pretrain)
conversations messages -> packed samples with a loss mask (sft)
rollouts      prompts -> completions with log-probabilities, by the engine (grpo)
trainer       what the three stages share: optimiser, schedule, checkpoints, metrics, resume
next_token    what pretraining and fine-tuning share
pretrain, sft, grpo   the stages
estimate      parameters, memory and FLOPs before anything runs
curves        metrics.jsonl -> a picture
loading       a Hugging Face directory -> a model to tune, checked as the exporter does
telling       what a run says on stderr
"""


class TrainingError(ValueError):
    """Training cannot start or go on; the message is one line."""
