"""Adapters in PEFT's format: PEFT itself computes with ours what we do, and we with its own what it does."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwq_jax.checkpoint.peft import CONFIG, WEIGHTS, adapter_table, export_adapter, read_adapter
from qwq_jax.config.lora import MODULES, LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.lora import lora_spec, merge, random_adapters
from qwq_jax.model.params import bind, stack
from tests.parity.models import CASES, L, prompt

CASE = next(case for case in CASES if case.N == 10 and not case.tied and not case.yarn)
MODEL = ModelConfig.from_huggingface(CASE.huggingface())
TOKENS = prompt()[:, :64]
LORAS = {
    "all": LoraConfig(rank=4, alpha=6.0),
    "some": LoraConfig(rank=3, alpha=4.5, rslora=True, target_modules=("k_proj", "o_proj", "up_proj", "down_proj")),
}
# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# Two float32 implementations of the same sums, whose logits reach 10, as in tests/parity.
TOLERANCE = 2e-4


def trained(lora: LoraConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: 0.1 * rng.standard_normal(x.shape, np.float32) for name, x in lora_spec(MODEL, lora).items()}


def our_logits(adapters, lora) -> np.ndarray:
    @jax.jit
    def forward(params):
        model = bind(MODEL, params, dtype=jnp.float32, lora=lora)
        positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        return model.logits(model(TOKENS, positions, causal_attend(None))[0])

    return np.asarray(forward(stack(CASE.params(), L) | adapters))


def their_model():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config.from_dict(CASE.huggingface())).eval()
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in CASE.weights().items()})
    return model


def their_logits(model) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize("name", LORAS)
def test_peft_computes_with_our_adapter_what_we_do(peft, tmp_path, name):
    lora, adapters = LORAS[name], trained(LORAS[name])
    export_adapter(str(tmp_path), adapters, MODEL, lora, base_model="Qwen/QwQ-32B")
    loaded = peft.PeftModel.from_pretrained(their_model(), str(tmp_path)).eval()
    ours = our_logits(adapters, lora)
    np.testing.assert_allclose(ours, their_logits(loaded), atol=TOLERANCE, rtol=0)
    assert np.abs(ours - their_logits(their_model())).max() > 0.5, "the adapter does something"
    settings = loaded.peft_config["default"]
    assert settings.base_model_name_or_path == "Qwen/QwQ-32B" and settings.task_type == "CAUSAL_LM"
    merged = loaded.merge_and_unload().state_dict()
    own = jax.jit(lambda base, adapters: merge(base, adapters, lora))(stack(CASE.params(), L), adapters)
    for module, kernel in (("mlp.up_proj", "mlp.up_kernel"), ("self_attn.k_proj", "attention.k_kernel")):
        theirs = merged[f"model.layers.1.{module}.weight"].numpy()
        np.testing.assert_allclose(own[f"layers.{kernel}"][1].reshape(len(theirs.T), -1).T, theirs, atol=1e-6)


def test_names_shapes_and_types_are_those_that_peft_writes(peft, tmp_path):
    lora = LORAS["all"]
    modules = list(lora.target_modules)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM")
    peft.get_peft_model(their_model(), settings).save_pretrained(str(tmp_path / "theirs"))
    export_adapter(str(tmp_path / "ours"), trained(lora), MODEL, lora)
    ours, theirs = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    described = lambda tensors: {name: (x.shape, x.dtype) for name, x in tensors.items()}  # noqa: E731
    assert described(ours) == described(theirs)
    mine, yours = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs"))
    for name in mine.keys() - {"target_modules", "base_model_name_or_path"}:
        assert mine[name] == yours[name], name
    assert set(mine["target_modules"]) == set(modules)


def test_we_compute_with_an_adapter_of_peft_what_it_does(peft, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False, use_rslora=True
    )
    theirs = peft.get_peft_model(their_model(), settings).eval()
    theirs.save_pretrained(str(tmp_path))
    loaded = read_adapter(str(tmp_path), MODEL)
    assert loaded.lora == LoraConfig(rank=4, alpha=6.0, rslora=True, target_modules=MODULES)
    np.testing.assert_allclose(our_logits(loaded.params, loaded.lora), their_logits(theirs), atol=TOLERANCE, rtol=0)


def test_both_begin_alike(peft):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=64, target_modules=["o_proj", "down_proj"])
    theirs = dict(peft.get_peft_model(their_model(), settings).named_parameters())
    lora = LoraConfig(rank=64, target_modules=("o_proj", "down_proj"))
    ours = random_adapters(MODEL, lora, jax.random.key(0))
    for row in adapter_table(MODEL, lora):
        value = row.to_source(np.asarray(ours[row.path]))
        expected = theirs[row.source.replace(".weight", ".default.weight")].detach().numpy()
        assert value.shape == expected.shape
        # 6,144 or more draws: means agree to 3 of their deviations, bounds to a thousandth of the range.
        assert value.std() == pytest.approx(expected.std(), rel=0.03, abs=1e-9)
        assert np.abs(value).max() == pytest.approx(np.abs(expected).max(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", LORAS)
def test_what_is_exported_comes_back(tmp_path, name):
    lora, adapters = LORAS[name], trained(LORAS[name])
    export_adapter(str(tmp_path), {path: jnp.asarray(x) for path, x in adapters.items()}, MODEL, lora, base_model="x/y")
    loaded = read_adapter(str(tmp_path), MODEL)
    assert (loaded.lora, loaded.base_model) == (lora, "x/y")
    assert loaded.params.keys() == adapters.keys()
    assert all(loaded.params[path].tobytes() == x.tobytes() for path, x in adapters.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    export_adapter(str(tmp_path), adapters, MODEL, lora, dtype="bfloat16")
    rounded = read_adapter(str(tmp_path), MODEL)
    for path, x in adapters.items():
        np.testing.assert_array_equal(rounded.params[path], x.astype(jnp.bfloat16).astype(np.float32))


def edit(path, **changes):
    settings = json.loads((path / CONFIG).read_text()) | changes
    (path / CONFIG).write_text(json.dumps(settings))


def edit_tensors(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda p: (p / CONFIG).unlink(), f"{CONFIG} is missing"),
        (lambda p: (p / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda p: (p / CONFIG).write_text("{"), f"{CONFIG} is not valid JSON"),
        (lambda p: (p / CONFIG).write_text("[]"), f"{CONFIG} should hold a JSON object"),
        (lambda p: edit(p, peft_type="LOHA"), "peft_type is 'LOHA', and only \"LORA\" is read"),
        (lambda p: edit(p, use_dora=True), "use_dora is True, which changes what an adapter does"),
        (lambda p: edit(p, bias="all"), "bias is 'all'"),
        (lambda p: edit(p, rank_pattern={"q_proj": 2}), "rank_pattern is {'q_proj': 2}"),
        (lambda p: edit(p, next_years_trick=1), "next_years_trick is 1"),
        (lambda p: edit(p, init_lora_weights="pissa"), "init_lora_weights 'pissa' means other weights"),
        (lambda p: edit(p, r="four"), "rank: expected a valid integer, got 'four'"),
        (lambda p: edit(p, lora_alpha=0), "alpha: expected greater than 0, got 0"),
        (lambda p: edit(p, r=5), f"{FIRST} has shape [4, 96], but the model and the rank ask for [5, 96]"),
        (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-1]), f"{WEIGHTS} is truncated"),
        (lambda p: edit_tensors(p, lambda t: t.pop(FIRST)), f"{FIRST} is missing"),
        (lambda p: edit_tensors(p, lambda t: t.update({"x": t[FIRST]})), "x is no part of an adapter of this model"),
        (
            lambda p: edit_tensors(p, lambda t: t[FIRST].__setitem__((0, 0), np.nan)),
            f"{FIRST} holds a value that is no",
        ),
        (lambda p: save_file({"x": np.zeros(1)}, p / WEIGHTS), "x has dtype F64"),
        (lambda p: save_file({"x": np.zeros(1, np.float32)}, p / WEIGHTS), "none of q_proj, k_proj"),
    ],
)
def test_another_adapter_is_refused_in_one_sentence(tmp_path, harm, sentence):
    export_adapter(str(tmp_path), trained(LORAS["all"]), MODEL, LORAS["all"])
    harm(tmp_path)
    with pytest.raises(ValueError) as caught:
        read_adapter(str(tmp_path), MODEL)
    assert sentence in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(ValueError, match="cannot write /proc/adapter: "):
        export_adapter("/proc/adapter", trained(LORAS["all"]), MODEL, LORAS["all"])
