"""Writes tests/parity/logits.npz: transformers' logits of the parity cases, for machines without torch.

python -m tools.make_parity_fixtures
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from tests.parity.models import CASES, prompt


def main() -> None:
    """Computes the last two positions of every case in float32 and stores them."""
    out = {}
    for case in CASES:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config.from_dict(case.huggingface())).eval()
        model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in case.weights().items()}, strict=False)
        model.tie_weights()
        with torch.no_grad():
            out[case.name] = model(torch.from_numpy(prompt()).long()).logits.numpy()[:, -2:]
    path = Path(__file__).parents[1] / "tests" / "parity" / "logits.npz"
    np.savez_compressed(path, allow_pickle=False, **out)
    print(f"{path}: {len(out)} cases, {path.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
