"""Rollouts of GRPO: the engine against transformers.generate, in turns within one run.

    python benchmarks/rollouts.py build/sft            # a Hugging Face directory

Both sample 16 completions of the same prompts at temperature 1, for exactly --tokens tokens each (no end
token), on the same threads. Printed: tokens per second, medians and ranges of --pairs pairs, the first one
discarded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from qwen3c import engine
from qwen3c.convert.export import export
from qwen3c.system.machine import default_threads
from qwen3c.training.rollouts import rollout

PROMPT = "What is 27 + 45?"


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO rollouts: the engine against transformers.generate.")
    parser.add_argument("model", type=Path, help="Hugging Face directory with a chat template")
    parser.add_argument("--batch", type=int, default=16, help="completions at once (default: 16)")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion (default: 64)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=default_threads())
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    theirs.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    batch = torch.tensor([prompt] * args.batch)

    def run_theirs() -> None:
        with torch.no_grad():
            out = theirs.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0,
                max_new_tokens=args.tokens,
            )  # fmt: skip
        assert out.shape == (args.batch, len(prompt) + args.tokens)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.bin"

        def export_weights() -> engine.Engine:  # as in training: every step has new ones
            export(args.model, path)
            return engine.Engine(str(path), args.threads)

        def run_ours() -> None:
            groups = rollout(model, [prompt] * args.batch, 1, args.tokens, (), 1.0, (1,))
            assert all(len(completion.tokens) == args.tokens for group in groups for completion in group)

        rates: dict[str, list[float]] = {"qwen3c": [], "transformers": []}
        exports: list[float] = []
        for pair in range(args.pairs + 1):
            begin = time.perf_counter()
            model = export_weights()
            exports.append(time.perf_counter() - begin)
            for name, function in (("qwen3c", run_ours), ("transformers", run_theirs)):
                begin = time.perf_counter()
                function()
                if pair:
                    rates[name].append(args.batch * args.tokens / (time.perf_counter() - begin))
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<13}{median:>9,.0f} tok/s   {min(values):,.0f} to {max(values):,.0f}")
    ratios = [ours / other for ours, other in zip(*rates.values(), strict=True)]
    print(f"ratio        {statistics.median(ratios):>9.2f}         {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"and {1e3 * statistics.median(exports):.0f} ms a step to export the weights and open them")


if __name__ == "__main__":
    main()
