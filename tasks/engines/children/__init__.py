"""Programs that run behind the process border; the only imports of vllm, peft and lm_eval."""
