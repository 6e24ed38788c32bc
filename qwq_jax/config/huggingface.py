"""Hugging Face's ``config.json`` to the fields of `ModelConfig` and back.

Every field is either understood, or known not to change the function the weights compute, or refused by name: a config
that loads means the same here as in transformers.
"""

from collections.abc import Mapping
from typing import Any

from qwq_jax.config.yarn import default_attention_factor

ARCHITECTURE = "Qwen2ForCausalLM"
# A reward model, if it has one label.
CLASSIFIER = "Qwen2ForSequenceClassification"

# Read below.
_UNDERSTOOD = frozenset(
    """
    model_type architectures hidden_act vocab_size hidden_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim intermediate_size rms_norm_eps tie_word_embeddings max_position_embeddings
    rope_theta rope_scaling rope_parameters original_max_position_embeddings partial_rotary_factor
    use_sliding_window sliding_window max_window_layers layer_types bos_token_id eos_token_id pad_token_id
    num_labels id2label
    """.split()
)

# How weights are stored, how transformers loads them, defaults of its `generate`, and training-time noise.
_HARMLESS = frozenset(
    """
    dtype torch_dtype transformers_version use_cache initializer_range attention_dropout name_or_path _name_or_path
    attn_implementation _attn_implementation _attn_implementation_autoset _experts_implementation tokenizer_class
    model_max_length return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    torchscript use_bfloat16 chunk_size_feed_forward problem_type label2id finetuning_task
    task_specific_params prefix
    sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id min_length max_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty num_return_sequences remove_invalid_values tf_legacy_loss
    pretraining_tp unsloth_fixed unsloth_version
    """.split()
)

# Fields that other members of transformers' zoo, or forks of Qwen2, switch on: fine while they hold this value. Qwen2
# itself always has a bias on q, k and v and never elsewhere, whatever `attention_bias` says.
_ONLY = {
    "attention_bias": True,
    "mlp_bias": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}

_YARN = frozenset(
    """
    factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate
    """.split()
)
# No width, position or factor comes near; sums and products below it are exact or finite.
_TOO_LARGE = 2**63
_ROPE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def read_huggingface(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `ModelConfig`.

    Raises:
        ValueError: A field is missing, has the wrong type, or is not supported.
    """
    _refuse_what_changes_the_mathematics(config)
    _refuse_sliding_window(config)
    hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    if config.get("head_dim") is not None:
        head_dim = _integer(config, "head_dim")
    elif num_heads and hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        raise ValueError(f"config.json: num_attention_heads {num_heads} does not divide hidden_size {hidden_size}")
    kv_heads = config.get("num_key_value_heads", num_heads)
    return {
        "vocab_size": _integer(config, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": _integer(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads if kv_heads is None else _integer(config, "num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "intermediate_size": _integer(config, "intermediate_size"),
        "rms_norm_eps": _number(config, "rms_norm_eps"),
        "tie_word_embeddings": _boolean(config, "tie_word_embeddings", False),
        "qkv_bias": True,
        "max_position_embeddings": _integer(config, "max_position_embeddings"),
        "scalar_head": _scalar_head(config),
        **_rope(config),
        **_special_tokens(config, generation_config),
    }


def write_huggingface(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns ``config.json`` for the `fields` of a `ModelConfig`.

    Raises:
        ValueError: The fields do not describe a Qwen2 model.
    """
    if not fields["qkv_bias"]:
        raise ValueError("qkv_bias is false, and a Qwen2 model always has a bias on q, k and v: export zeros instead")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    eos = fields["eos_token_ids"]
    config = {
        "architectures": [ARCHITECTURE],
        "attention_dropout": 0.0,
        "bos_token_id": fields["bos_token_id"],
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "hidden_act": "silu",
        "hidden_size": fields["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": fields["intermediate_size"],
        "max_position_embeddings": fields["max_position_embeddings"],
        "max_window_layers": fields["num_layers"],
        "model_type": "qwen2",
        "num_attention_heads": fields["num_heads"],
        "num_hidden_layers": fields["num_layers"],
        "num_key_value_heads": fields["num_kv_heads"],
        "pad_token_id": fields["pad_token_id"],
        "rms_norm_eps": fields["rms_norm_eps"],
        "rope_scaling": None,
        "rope_theta": fields["rope_theta"],
        "sliding_window": None,
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": fields["vocab_size"],
    }
    if fields["head_dim"] * fields["num_heads"] != fields["hidden_size"]:
        config["head_dim"] = fields["head_dim"]
    if fields.get("scalar_head"):
        config |= {"architectures": [CLASSIFIER], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if fields["yarn"] is not None:
        set_fields = {name: value for name, value in fields["yarn"].items() if value is not None}
        config["rope_scaling"] = {"rope_type": "yarn", **set_fields}
    return config


def _refuse_what_changes_the_mathematics(config: Mapping[str, Any]) -> None:
    if (model_type := config.get("model_type")) != "qwen2":
        raise ValueError(f"config.json: model_type {model_type!r} is not supported, only 'qwen2' is")
    architectures = config.get("architectures")
    if architectures not in (None, [ARCHITECTURE], [CLASSIFIER]):
        raise ValueError(
            f"config.json: architectures {architectures!r} is not supported, only [{ARCHITECTURE!r}] is, and "
            f"[{CLASSIFIER!r}] of one label"
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"config.json: hidden_act {activation!r} is not supported, only 'silu' is")
    if config.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is set, and only unquantized weights can be read")
    _refuse_partial_rotary(config)
    for field, value in config.items():
        if value is None or field in _UNDERSTOOD or field in _HARMLESS:
            continue
        if field not in _ONLY:
            raise ValueError(f"config.json: {field} is not a known field, and {value!r} might change the model")
        if value != _ONLY[field]:
            raise ValueError(f"config.json: {field} {value!r} is not supported, only {_ONLY[field]!r} is")


def _scalar_head(config: Mapping[str, Any]) -> bool:
    """Whether the model is a reward model; the default of two labels is transformers'."""
    if config.get("architectures") != [CLASSIFIER]:
        return False
    named = config.get("id2label")
    labels = _integer(config, "num_labels", len(named) if isinstance(named, Mapping) else 2)
    if labels != 1:
        raise ValueError(f"config.json: a {CLASSIFIER} of {labels} labels is not supported, only one of 1 is, a reward")
    return True


def _refuse_partial_rotary(fields: Mapping[str, Any], path: str = "") -> None:
    if (factor := fields.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"config.json: {path}partial_rotary_factor {factor!r} is not supported, only 1.0 is")


def _refuse_sliding_window(config: Mapping[str, Any]) -> None:
    """Every layer must attend to everything; the defaults are those of transformers' Qwen2Config."""
    layers = _integer(config, "num_hidden_layers")
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != layers:
            raise ValueError(f"config.json: layer_types is not a list of {layers} entries, one a layer")
        for layer, kind in enumerate(layer_types):
            if kind != "full_attention":
                raise ValueError(
                    f"config.json: layer_types[{layer}] {kind!r} is not supported, only 'full_attention' is"
                )
        return
    in_use = _boolean(config, "use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    first = _integer(config, "max_window_layers", 28)
    if in_use and first < layers:
        raise ValueError(f"config.json: use_sliding_window is true from layer {first}, and it is not supported")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `rope_theta` and `yarn`, with the precedence of transformers' ``convert_rope_params_to_dict``."""
    path, rope = _rope_table(config)
    _refuse_partial_rotary(rope, f"{path}.")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    theta_source = rope if rope.get("rope_theta") is not None else config
    theta = _number(theta_source, "rope_theta", 10_000.0)
    if rope_type not in ("default", "yarn"):
        raise ValueError(f"config.json: {path}.rope_type {rope_type!r} is not supported, only 'default' and 'yarn' are")
    allowed = _ROPE | _YARN if rope_type == "yarn" else _ROPE
    for field, value in rope.items():
        if field not in allowed and value is not None:
            raise ValueError(f"config.json: {path}.{field} is not a known field of rope_type {rope_type!r}")
    return {"rope_theta": theta, "yarn": _yarn(config, rope, path) if rope_type == "yarn" else None}


def _rope_table(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise ValueError("config.json: rope_scaling and rope_parameters are both set and differ")
    path, rope = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters or {})
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {path} {rope!r} is not an object")
    if set(rope) == {"full_attention"}:
        path, rope = f"{path}.full_attention", rope["full_attention"] or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {path} {rope!r} is not an object")
    return path, rope


def _yarn(config: Mapping[str, Any], rope: Mapping[str, Any], path: str) -> dict[str, Any]:
    positions = _integer(config, "max_position_embeddings")
    # A field beside the table wins over the one in it, and the context length stands in for both.
    outer = config.get("original_max_position_embeddings")
    original = rope.get("original_max_position_embeddings", positions) if outer is None else outer
    if isinstance(original, bool) or not isinstance(original, int) or not 1 <= original < _TOO_LARGE:
        raise ValueError(f"config.json: {path}.original_max_position_embeddings {original!r} is not a positive integer")
    factor = _number(rope, "factor", positions / original, path)
    attention_factor = None
    if rope.get("attention_factor") is not None:
        attention_factor = _number(rope, "attention_factor", path=path)
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = _scale(rope, "mscale", factor, path) / _scale(rope, "mscale_all_dim", factor, path)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
        "beta_fast": _number(rope, "beta_fast", 32.0, path) or 32.0,
        "beta_slow": _number(rope, "beta_slow", 1.0, path) or 1.0,
        "truncate": _boolean(rope, "truncate", True, path),
    }


def _scale(rope: Mapping[str, Any], name: str, factor: float, path: str) -> float:
    multiplier = _number(rope, name, path=path)
    if multiplier < 0:
        raise ValueError(f"config.json: {path}.{name} {multiplier!r} is negative")
    return default_attention_factor(factor, multiplier)


def _special_tokens(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> dict[str, Any]:
    def read(field: str) -> tuple[int, ...]:
        for name, source in (("generation_config.json", generation_config), ("config.json", config)):
            value = source.get(field)
            if value is None:
                continue
            ids = value if isinstance(value, list | tuple) else [value]
            if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
                raise ValueError(f"{name}: {field} {value!r} is not a token id")
            return tuple(ids)
        return ()

    bos, pad = read("bos_token_id"), read("pad_token_id")
    return {
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": read("eos_token_id"),
        "pad_token_id": pad[0] if pad else None,
    }


def _integer(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _present(fields, name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json: {name} {value!r} is not an integer")
    if abs(value) >= _TOO_LARGE:
        raise ValueError(f"config.json: {name} is too large")
    return value


def _number(fields: Mapping[str, Any], name: str, default: float | None = None, path: str = "") -> float:
    value = _present(fields, name, default, path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json: {_joined(path, name)} {value!r} is not a number")
    if abs(value) >= _TOO_LARGE:
        raise ValueError(f"config.json: {_joined(path, name)} is too large")
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str, default: bool, path: str = "") -> bool:
    value = _present(fields, name, default, path)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {_joined(path, name)} {value!r} is not true or false")
    return value


def _present(fields: Mapping[str, Any], name: str, default: Any, path: str = "") -> Any:
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json: {_joined(path, name)} is missing")
    return value


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
