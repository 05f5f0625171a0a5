"""One prompt everywhere: what the engines are really fed in generation, training and evaluation by chat template."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from tasks.algorithms.prompts import Message, prompt_ids, training_ids
from tasks.domain.errors import ConfigError
from tasks.domain.recipe import Distil, Runtime
from tasks.engines.child import _environment
from tasks.engines.children.chat import ChatPrompts
from tasks.engines.children.evaluate import evaluate
from tasks.evaluate import refuse_without_chat_template
from tests.algorithms.test_prompts import WITH_START, tokenizer_that_adds_its_start_token
from tests.conftest import ROOT, write_jsonl
from tests.engines.test_child import quiet
from tests.tiny_data import _item, write_data_root

RUNTIME = Runtime(device="cpu", kv_cache_gb=1, batch=1)
ITEMS = 6
LIMIT = 3
# Both children in one process that notes what reaches vLLM's core.
NOTED = """
import json, sys
from pathlib import Path
from vllm.v1.engine.core_client import InprocClient
from tasks.engines.children.distil import distil
from tasks.engines.children.evaluate import evaluate
fed, seeds, add = [], [], InprocClient.add_request
def noting(self, request):
    fed.append(list(request.prompt_token_ids))
    seeds.append(request.sampling_params.seed)
    return add(self, request)
InprocClient.add_request = noting
evaluation, generation, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
evaluate(evaluation, out, print)
evaluated, fed[:], seeds[:] = list(fed), [], []
distil(generation, out, print)
(out / "fed.json").write_text(json.dumps({"evaluation": evaluated, "generation": fed, "seeds": seeds}))
"""

Ids = list[int]


def question(item: dict[str, Any]) -> Message:
    return {"role": "user", "content": f"Question: {item['question']}\nAnswer:"}


def choice_prompts() -> list[tuple[list[Message], list[str]]]:
    """ARC without examples: the conversation of each item, and the answers that are compared."""
    items = [_item("arc_challenge", number) for number in range(LIMIT)]
    return [([question(item)], item["choices"]["text"]) for item in items]


def worked_prompts() -> list[list[list[Message]]]:
    """GSM8K with one example: for each item the conversations that may be asked, by the example that was drawn."""
    items = [_item("gsm8k", number) for number in range(ITEMS)]
    return [
        [[question(shot), {"role": "assistant", "content": shot["answer"]}, question(item)] for shot in items]
        for item in items[:LIMIT]
    ]


def checkpoint(pico: Path, folder: Path, template: str) -> Path:
    """The pico model, its tokenizer one that puts the start token in front by itself."""
    shutil.copytree(pico, folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer_that_adds_its_start_token(template).save_pretrained(folder)
    found = AutoTokenizer.from_pretrained(folder)
    assert found.encode("x")[0] == found.bos_token_id and found.chat_template == template
    return folder


def evaluation_request(model: Path, root: Path, backend: str) -> dict[str, Any]:
    shots = {"arc_challenge": 0, "gsm8k": 1}
    return {
        "checkpoint": str(model), "backend": backend, "chat_template": True, "dtype": "float32", "max_length": 1024,
        "max_generated": 8, "seed": 0, "runtime": RUNTIME.model_dump(),
        "tasks": {name: {"shots": count, "limit": LIMIT, "data_root": str(root)} for name, count in shots.items()},
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_root(tmp_path_factory.mktemp("root"), items=ITEMS)


@pytest.fixture(scope="module")
def model(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(pico, tmp_path_factory.mktemp("chat") / "model", WITH_START)


@pytest.fixture(scope="module")
def vllm(model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation and generation by vLLM. The rewriting is asked for by a template that adds no word of its own."""
    folder = tmp_path_factory.mktemp("vllm")
    prompts = [messages for messages, _ in choice_prompts()] + [asked for each in worked_prompts() for asked in each]
    rows = [{"id": f"r-{number}", "kind": "instruction", "reference": "So.", "prompt": messages}
            for number, messages in enumerate(prompts)]  # fmt: skip
    (folder / "parts").mkdir()
    generation = {
        "checkpoint": str(model), "rows": str(write_jsonl(folder / "rows.jsonl", rows)),
        "shards": [["all", 0, len(rows)]], "parts": str(folder / "parts"), "runtime": RUNTIME.model_dump(),
        **Distil(max_tokens=2, max_length=1024, attempts=2, dtype="float32").model_dump(),
        "messages": [{"role": "user", "content": "{request}"}],
    }  # fmt: skip
    requests = [json.dumps(evaluation_request(model, root, "vllm")), json.dumps(generation)]
    script = [sys.executable, "-c", NOTED, *requests, str(folder)]
    done = subprocess.run(script, cwd=ROOT, env=_environment(RUNTIME), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def by_hf(model: Path, root: Path, out: Path) -> list[Ids]:
    """Evaluates in this process; what the model was called with."""
    fed: list[Ids] = []
    with pytest.MonkeyPatch.context() as patch:
        call, generate = HFLM._model_call, HFLM._model_generate

        def noting_call(self: Any, inps: Any, *args: Any, **options: Any) -> Any:
            fed.extend(inps.tolist())
            return call(self, inps, *args, **options)

        def noting_generate(self: Any, context: Any, *args: Any, **options: Any) -> Any:
            fed.extend(context.tolist())
            return generate(self, context, *args, **options)

        patch.setattr(HFLM, "_model_call", noting_call)
        patch.setattr(HFLM, "_model_generate", noting_generate)
        evaluate(evaluation_request(model, root, "hf"), out, quiet)
    return fed


@pytest.fixture(scope="module")
def hf(model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ids]]:
    folder = tmp_path_factory.mktemp("hf")
    return folder, by_hf(model, root, folder)


def test_generation_training_and_evaluation_read_the_same_ids(
    model: Path, vllm: Path, hf: tuple[Path, list[Ids]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    fed = json.loads((vllm / "fed.json").read_text())
    left = {"vllm": [*fed["evaluation"]], "hf": [*hf[1]]}
    for messages, answers in choice_prompts():
        for answer in answers:
            ids, length = training_ids(tokenizer, [messages], [answer])[0]
            assert ids[:length] in fed["generation"]
            assert ids[:length].count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
            left["vllm"].remove(ids[:-1])  # all but the end of the turn, which the harness does not score
            left["hf"].remove(ids[:-2])  # nor is the last scored token read
        left["vllm"].remove(ids[: length - 1])  # what the choices share goes into the cache before them
    for possible in worked_prompts():
        prompts = [training_ids(tokenizer, [messages], [""])[0][0][:-1] for messages in possible]
        for name, backend in left.items():
            asked = [ids for ids in backend if ids in prompts]
            assert len(asked) == 1 and asked[0] in fed["generation"], name
            assert asked[0].count(tokenizer.bos_token_id) == 1
            assert tokenizer.decode(asked[0]).count("[user]") == 2 and "[assistant]" in tokenizer.decode(asked[0])
            backend.remove(asked[0])
    assert left == {"vllm": [], "hf": []}, "nothing else was asked"


def test_a_rewrite_that_is_not_kept_is_asked_for_again_with_another_seed(vllm: Path) -> None:
    fed = json.loads((vllm / "fed.json").read_text())
    rows = [json.loads(line) for line in (vllm / "parts" / "all.jsonl").read_text().splitlines()]
    again = [row["id"] for row in rows if row["outcome"] == "kept_original"]
    assert again and len(rows) < len(fed["generation"]) <= 2 * len(rows)
    assert len(set(fed["seeds"])) == len(fed["seeds"])
    asked = [fed["generation"].count(ids) for ids in fed["generation"]]
    assert max(asked) == 2, "with the same prompt"


def test_both_backends_score_the_same_answers(vllm: Path, hf: tuple[Path, list[Ids]]) -> None:
    found = []
    for folder in (vllm, hf[0]):
        lines = (folder / "arc_challenge" / "samples_arc_challenge.jsonl").read_text().splitlines()
        samples = sorted((json.loads(line) for line in lines), key=lambda sample: int(sample["doc_id"]))
        found.append([[float(answer[0][0]) for answer in sample["resps"]] for sample in samples])
    assert np.shape(found[0]) == (LIMIT, 4)
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_no_start_token_where_the_template_has_none(pico: Path, tmp_path: Path) -> None:
    """However the harness's backend encodes a prompt, and though its tokenizer adds one to other text."""
    model = checkpoint(pico, tmp_path / "model", WITH_START.removeprefix("{{ bos_token }}"))
    harness = type("Chat", (ChatPrompts, HFLM), {})(pretrained=str(model), device="cpu", dtype="float32", batch_size=1)
    (messages, (answer, *_)), *_ = choice_prompts()
    ids, length = training_ids(harness.tokenizer, [messages], [answer])[0]
    assert harness.tokenizer.bos_token_id not in ids
    text = harness.apply_chat_template(messages)
    assert harness.tok_encode(text) == harness.tok_batch_encode([text])[0][0].tolist() == ids[:length]
    assert harness._encode_pair(text, answer) == (ids[:length], ids[length:-1])


def test_a_template_that_refuses_a_system_message_is_asked_without_it() -> None:
    class Backend:
        def __init__(self) -> None:
            self.tokenizer = tokenizer_that_adds_its_start_token(
                "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WITH_START
            )

    class Chat(ChatPrompts, Backend):
        """As the evaluation makes it."""

    talk = [{"role": "system", "content": "Choose."}, {"role": "user", "content": "A or B?"}]
    chat = Chat()
    assert chat.apply_chat_template(talk) == "<|start|>[user] A or B?\n[assistant] "
    assert chat._encode_pair(chat.apply_chat_template(talk), "A") == (
        prompt_ids(chat.tokenizer, talk[1:]), chat.tokenizer.encode("A", add_special_tokens=False)
    )  # fmt: skip


def test_a_model_without_a_chat_template_is_refused_by_the_settings_name(pico: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico, tmp_path / "model")
    refuse_without_chat_template(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"evaluate\.chat_template=true: .* has no chat template; set it to false"):
        refuse_without_chat_template(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": WITH_START}))
    refuse_without_chat_template(folder)  # where older checkpoints have it
