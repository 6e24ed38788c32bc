import json

import pytest
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwq_jax.config.model import ModelConfig, YarnConfig

# config.json as published for QwQ-32B, Qwen2.5-0.5B-Instruct and DeepSeek-R1-Distill-Qwen-1.5B.
QWQ = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27648,
    "max_position_embeddings": 40960,
    "max_window_layers": 64,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWQ_GENERATION = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "repetition_penalty": 1.0,
    "temperature": 0.6,
    "top_k": 40,
    "top_p": 0.95,
    "transformers_version": "4.45.2",
}
QWEN25 = QWQ | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
DISTILL = QWQ | {
    "eos_token_id": 151643,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "use_mrope": False,
    "vocab_size": 151936,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


def without(config, *fields):
    return {name: value for name, value in config.items() if name not in fields}


def test_reads_qwq():
    config = ModelConfig.from_huggingface(QWQ, QWQ_GENERATION)
    assert config == ModelConfig(
        vocab_size=152064,
        hidden_size=5120,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=27648,
        rope_theta=1e6,
        yarn=None,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        qkv_bias=True,
        max_position_embeddings=40960,
        bos_token_id=151643,
        eos_token_ids=(151645, 151643),
        pad_token_id=151643,
    )
    assert config.num_heads // config.num_kv_heads == 5
    assert config.max_context == 40960


@pytest.mark.parametrize("published", [QWQ, QWEN25, DISTILL], ids=["qwq", "qwen2.5", "distill"])
def test_transformers_5_says_the_same_in_its_own_style(published):
    rewritten = json.loads(Qwen2Config.from_dict(published).to_json_string(use_diff=False))
    assert "rope_parameters" in rewritten and "rope_theta" not in rewritten
    # transformers leaves the class name out of a config that no model was made from.
    assert ModelConfig.from_huggingface(rewritten) == ModelConfig.from_huggingface(published)


@pytest.mark.parametrize("published", [QWQ, QWEN25, DISTILL], ids=["qwq", "qwen2.5", "distill"])
@pytest.mark.parametrize("yarn", [None, YARN | {"rope_type": "yarn", "attention_factor": 1.25, "truncate": False}])
def test_round_trip(published, yarn):
    config = ModelConfig.from_huggingface(published | {"rope_scaling": yarn}, QWQ_GENERATION)
    written = json.loads(json.dumps(config.to_huggingface("bfloat16")))
    assert ModelConfig.from_huggingface(written) == config
    # And transformers understands what was written as what was read.
    theirs = Qwen2Config.from_dict(written)
    assert ModelConfig.from_huggingface(json.loads(theirs.to_json_string(use_diff=False))) == config


def test_head_dim_is_written_when_it_cannot_be_inferred():
    config = ModelConfig.from_huggingface(QWEN25 | {"head_dim": 128})
    assert config.head_dim == 128
    assert config.to_huggingface("float32")["head_dim"] == 128
    assert "head_dim" not in ModelConfig.from_huggingface(QWEN25).to_huggingface("float32")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": YARN | {"rope_type": "yarn"}},
        {"rope_scaling": YARN | {"type": "yarn"}},
        {"rope_scaling": YARN | {"type": "yarn", "rope_type": "yarn"}},
        {"rope_theta": None, "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 1e6}},
        {"rope_parameters": {"full_attention": YARN | {"rope_type": "yarn"}}},
        {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 32768},
        {"rope_scaling": YARN | {"type": "yarn", "factor": None}, "max_position_embeddings": 131072},
        {"rope_scaling": YARN | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0}},
    ],
)
def test_every_spelling_of_yarn(fields):
    config = ModelConfig.from_huggingface(QWQ | fields)
    assert config.yarn == YarnConfig(factor=4.0, original_max_position_embeddings=32768)
    assert config.rope_theta == 1e6
    assert config.max_context == 131072


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_factor": 1.5},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"mscale": 0.7},
        {"attention_factor": None},
    ],
)
def test_attention_scale_is_that_of_transformers(fields):
    scaling = YARN | {"rope_type": "yarn"} | fields
    ours = ModelConfig.from_huggingface(QWQ | {"rope_scaling": scaling}).yarn
    _, theirs = ROPE_INIT_FUNCTIONS["yarn"](Qwen2Config.from_dict(QWQ | {"rope_scaling": scaling}))
    assert ours is not None
    assert ours.attention_scale == pytest.approx(theirs, rel=1e-15)  # the same expression in float64


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"use_sliding_window": True, "max_window_layers": 64},
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": 1, "layer_types": ["full_attention"] * 64},
        {"attention_bias": True, "mlp_bias": False, "partial_rotary_factor": 1.0, "head_dim": 128},
        {"some_field_of_the_future": None, "quantization_config": None},
        {"id2label": {"0": "A"}, "_name_or_path": "x", "attention_dropout": 0.1},
    ],
)
def test_fields_that_change_nothing(fields):
    assert ModelConfig.from_huggingface(QWQ | fields) == ModelConfig.from_huggingface(QWQ)


def test_kv_heads_null_means_one_for_each_query_head():
    assert ModelConfig.from_huggingface(QWQ | {"num_key_value_heads": None}).num_kv_heads == 40


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["Qwen2ForTokenClassification"]}, "architectures"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "of 2 labels"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type 'linear'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type 'mrope'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type 'dynamic'"),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "short_factor": [1]}}, "rope_scaling.short_factor"),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "factor": "4"}}, "rope_scaling.factor '4'"),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "factor": 0.5}}, "yarn.factor"),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "beta_fast": 1, "beta_slow": 2}}, "beta_fast"),
        ({"rope_scaling": 4}, "rope_scaling 4 is not an object"),
        ({"rope_scaling": {"full_attention": 5}}, "rope_scaling.full_attention 5 is not an object"),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "factor": 1e308}}, "rope_scaling.factor is too large"),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "factor": 2e6}}, "yarn.factor"),
        (
            {"rope_scaling": YARN | {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": -7.213475204444817}},
            "negative",
        ),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings is too large"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}}, "both set"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"use_sliding_window": True, "max_window_layers": 63}, "use_sliding_window"),
        ({"layer_types": ["full_attention"] * 63 + ["sliding_attention"]}, "layer_types[63]"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"attention_bias": False}, "attention_bias False"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"use_mrope": True}, "use_mrope True"),
        ({"use_qk_norm": True}, "use_qk_norm True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"auto_map": {"AutoModel": "x.y"}}, "auto_map"),
        ({"logit_softcap": 30.0}, "logit_softcap is not a known field"),
        ({"num_key_value_heads": 7}, "40 query heads cannot be shared by 7"),
        ({"num_key_value_heads": 0}, "num_kv_heads"),
        ({"num_attention_heads": 39}, "num_attention_heads 39"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"head_dim": 127}, "head_dim 127 is odd"),
        ({"hidden_size": "5120"}, "hidden_size '5120' is not an integer"),
        ({"hidden_size": 5120.0}, "hidden_size 5120.0 is not an integer"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1"),
        ({"eos_token_id": 152064}, "152064 lies outside the vocabulary"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>'"),
    ],
)
def test_refusals_name_the_field(fields, names):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_huggingface(QWQ | fields)
    message = str(caught.value)
    assert names in message
    assert message.startswith("config.json: ")
    assert "\n" not in message


ODD = [None, True, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**400, "x", "", [], [1.5], [[]], {}, {"a": 1}]


@pytest.mark.parametrize(
    "field", [*QWQ, *YARN, "rope_type", "mscale", "mscale_all_dim", "attention_factor", "head_dim"]
)
def test_only_a_value_error_escapes(field):
    for value in ODD:
        yarn = YARN | {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}
        for table in ({field: value}, {"rope_scaling": yarn | {field: value}}, {"rope_scaling": {field: value}}):
            try:
                config = ModelConfig.from_huggingface(QWQ | table)
                assert config.max_context > 0 and config.to_huggingface("float32")
            except ValueError as error:
                assert str(error).startswith("config.json: ") and "\n" not in str(error), table


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_missing_fields_are_named(field):
    with pytest.raises(ValueError, match=f"config.json: {field} is missing"):
        ModelConfig.from_huggingface(without(QWQ, field))


def test_a_model_without_biases_is_no_qwen2():
    config = ModelConfig.from_huggingface(QWEN25).model_copy(update={"qkv_bias": False})
    with pytest.raises(ValueError, match="qkv_bias"):
        config.to_huggingface("bfloat16")


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="int4"):
        ModelConfig.from_huggingface(QWEN25).to_huggingface("int4")
