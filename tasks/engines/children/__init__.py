"""Programs that run behind the process border; the only imports of vllm, peft, lm_eval and the Trainer."""
