"""Stages against the fastest way to do their work by hand, alternating in one run.

    .venv/bin/python -m tests.benchmarks.stages [score] [prune] [store] [plan]

score: on SmolLM2-135M-Instruct's shape with random weights; prune and store: on files of random bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.benchmarks.record import alternating, median_ratio, record

MB = 2**20
SCORED = {"samples": 32, "length": 256, "batch": 8}


def score(folder: Path) -> None:
    """One pass with all distances, their moments and the bootstrap, against the same pass without."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from tasks.engines.children.score import score as ours
    from tests.conftest import build_tokenizer, pocket_pairs

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = " ".join(pair["answer"] for pair in pocket_pairs())
    documents = [text[at * 50 :][:4000] for at in range(SCORED["samples"])]
    (folder / "documents.json").write_text(json.dumps(documents))
    request = {
        "checkpoint": str(folder / "model"), "documents": str(folder / "documents.json"), "seed": 0, **SCORED,
        "metric": "angular", "token": "last", "dtype": "float32", "part": str(folder / "sums"), "commit_seconds": 3600,
        "runtime": {"device": "cpu", "batch": SCORED["batch"]},
    }  # fmt: skip
    (folder / "out").mkdir()
    ids = [tokenizer.encode(document)[: SCORED["length"]] for document in documents]
    assert {len(sample) for sample in ids} == {SCORED["length"]}

    def bare() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        with torch.inference_mode():
            for at in range(0, len(ids), SCORED["batch"]):
                model(input_ids=torch.tensor(ids[at : at + SCORED["batch"]]), use_cache=False, logits_to_keep=1)

    samples = alternating(lambda: ours(request, folder / "out", lambda done, text: None), bare, 5)
    record("score", "a bare forward pass over the same batches", samples,
           median_ratio(samples["ours"], samples["theirs"]), 1.05, higher_is_better=False)  # fmt: skip


def prune(folder: Path) -> None:
    """The cut of a checkpoint of 1.3 GB, against a copy of the bytes that stay."""
    import torch
    from safetensors.torch import save_file

    from tasks.domain.span import Span
    from tasks.prune import cut

    layers, hidden = 24, 1024
    (folder / "model").mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
              "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 16, "vocab_size": 32000,
              "tie_word_embeddings": True}  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    square, up = (hidden, hidden), (4 * hidden, hidden)
    shapes = {f"self_attn.{name}_proj": square for name in "qkvo"} | {
        "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": up[::-1],
    }  # fmt: skip
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape, dtype=torch.bfloat16)
        for layer in range(layers) for name, shape in shapes.items()
    }  # fmt: skip
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = torch.randn((32000, hidden), dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    del tensors
    span = Span(8, 6, layers)
    (folder / "first").mkdir()
    kept = cut(folder / "model", folder / "first", span)["bytes"]
    with (folder / "model" / "model.safetensors").open("rb") as source, (folder / "kept").open("wb") as target:
        for _ in range(kept // MB):
            target.write(source.read(MB))

    def ours() -> None:
        out = folder / "pruned"
        out.mkdir()
        cut(folder / "model", out, span)
        shutil.rmtree(out)

    def copy() -> None:
        shutil.copyfile(folder / "kept", folder / "copy")
        (folder / "copy").unlink()

    samples = alternating(ours, copy, 7)
    record("prune", f"copying the kept {kept / 1e9:.2f} GB file to file", samples,
           median_ratio(samples["theirs"], samples["ours"]), 0.8, higher_is_better=True)  # fmt: skip


def store(folder: Path) -> None:
    """Publishing and fetching 512 MB with checksums and manifest, against boto3's multipart transfer of the file."""
    os.environ["SDD_STATE"] = str(folder / "state")
    os.environ["SDD_MIRROR"] = str(folder / "mirror")
    import boto3
    from boto3.s3.transfer import TransferConfig

    from deployments.local import environment
    from tasks.domain.stage import Stage
    from tasks.store.artifacts import ArtifactStore

    (folder / "source").mkdir()
    (folder / "source" / "weights.bin").write_bytes(os.urandom(512 * MB))
    transfer = TransferConfig(multipart_threshold=64 * MB, multipart_chunksize=64 * MB, max_concurrency=4)
    with environment(prefect=False):
        artifacts = ArtifactStore.from_environment()
        artifacts.check()
        client: Any = boto3.client("s3")
        bucket = urlsplit(os.environ["SDD_STORE"]).netloc
        numbers = iter(range(100))

        def ours() -> None:
            stage = Stage("model", 1, {"number": next(numbers)}, slug="bench")
            shutil.copytree(folder / "source", folder / "staged", copy_function=os.link)
            manifest = artifacts.publish(stage, folder / "staged", {}, 0.0)
            shutil.rmtree(artifacts.mirror)
            artifacts.fetch(manifest)
            shutil.rmtree(folder / "staged", ignore_errors=True)

        def theirs() -> None:
            client.upload_file(str(folder / "source" / "weights.bin"), bucket, "raw", Config=transfer)
            client.download_file(bucket, "raw", str(folder / "raw"), Config=transfer)

        samples = alternating(ours, theirs, 5)
    record("store", "boto3's multipart transfer of the same file, up and down", samples,
           median_ratio(samples["theirs"], samples["ours"]), 0.9, higher_is_better=True)  # fmt: skip


def plan(folder: Path) -> None:
    """The command `flows.recover demo-cpu --plan` on a running store, against two seconds."""
    os.environ["SDD_STATE"] = str(folder / "state")
    from deployments.local import environment

    with environment(prefect=False):
        command = [sys.executable, "-m", "flows.recover", "demo-cpu", "--plan"]

        def ours() -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        samples = alternating(ours, lambda: None, 7)
    middle = sorted(samples["ours"])[len(samples["ours"]) // 2]
    record("plan", "2 s", {"ours": samples["ours"]}, middle / 2, 1.0, higher_is_better=False)


def main() -> None:
    known = {"score": score, "prune": prune, "store": store, "plan": plan}
    for name in sys.argv[1:] or known:
        with tempfile.TemporaryDirectory(prefix=f"sdd-bench-{name}-") as folder:
            known[name](Path(folder))


if __name__ == "__main__":
    main()
