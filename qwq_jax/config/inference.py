"""Settings of a run that only reads the model."""

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.frozen import Frozen
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams

# What the makers of QwQ advise, and the defaults of `chat`; greedy decoding makes it repeat itself.
CHAT_SAMPLING = SamplingParams(temperature=0.6, top_p=0.95, top_k=40, max_tokens=32_768)


class InferenceConfig(Frozen):
    """What ``generate`` and ``chat`` can be told with ``--set``.

    Attributes:
        engine: Sizes and types of the engine.
        mesh: The device mesh.
        sampling: For requests that do not say themselves.
    """

    engine: EngineConfig = EngineConfig()
    mesh: MeshConfig = MeshConfig()
    sampling: SamplingParams = SamplingParams()
